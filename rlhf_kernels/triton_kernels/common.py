"""What two or more kernels share: addressing and launching, then scalar maths on the device.

A tensor goes to a kernel as a `Rows` tuple, so any strides are read in place. Numbers are annotated tl.float64, since
Triton would round a Python float to fp32 and fp64 ops would lose half of it; `number` brings one to the compute dtype.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

Rows = tuple[Tensor, int, int]  # tensor, stride between outer places, stride between inner places


def rows(x: Tensor | None, trailing: int = 0) -> Rows | None:
    """x as [outer, inner, *trailing], inner the last leading dimension; a copy only where outer has no one stride."""
    if x is None:
        return None
    leading = x.shape[: x.ndim - trailing]
    inner = leading[-1] if leading else 1
    outer = math.prod(leading[:-1])
    folded = x.reshape(outer, inner, *x.shape[x.ndim - trailing :])
    return folded, folded.stride(0), folded.stride(1)


def inner(x: Tensor) -> int:
    """How many inner places `rows(x)` has."""
    return max(x.shape[-1], 1) if x.ndim else 1


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, warps: int = 4, registers: int | None = None, **constants: Any
) -> None:
    """Run on the first tensor's device and its current stream; an empty grid is nothing to do."""
    first = next(x[0] if isinstance(x, tuple) else x for x in arguments if isinstance(x, (tuple, Tensor)))
    if all(grid):
        with torch.cuda.device_of(first):
            kernel[grid](*arguments, **constants, num_warps=warps, maxnreg=registers, enable_fp_fusion=True)


def registers_for(result: Tensor) -> int | None:
    """How many a thread of a row kernel may have; left to itself the assembler spills some to fit one more program."""
    return 128 if result.dtype == torch.float32 else None


def power_of_2(n: int, low: int, high: int) -> int:
    """The smallest power of two that is at least n, kept between low and high."""
    return min(max(triton.next_power_of_2(max(n, 1)), low), high)


# ------------------------------------------------------------------------------------------------ addressing, numbers


@triton.jit
def at(x, i, j):
    """Address of place (i, j) of a `Rows` tuple; 64 bits, since tensors may have more than 2³¹ elements."""
    return x[0] + i.to(tl.int64) * x[1] + j.to(tl.int64) * x[2]


@triton.jit
def at_place(x, place, inner):
    """Address of a place counted through all rows."""
    return at(x, place // inner, place % inner)


@triton.jit
def number(x, DTYPE: tl.constexpr):
    return tl.full([], x, DTYPE)


@triton.jit
def finite_or_zero(highest):
    """A maximum to subtract: −inf − −inf would be NaN."""
    return tl.where(highest == float("-inf"), 0.0, highest)


# ---------------------------------------------------------------------------------------------------- functions


@triton.jit
def tanh(x):
    e = tl.exp(-2.0 * tl.abs(x))
    y = (1.0 - e) / (1.0 + e)
    square = x * x
    # 1 − e cancels near zero, where five terms of the series are exact to fp64.
    tail = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
    series = x * (1.0 + square * (-1.0 / 3.0 + square * tail))
    return tl.where(tl.abs(x) < 0.03, series, tl.where(x < 0, -y, y))


@triton.jit
def expm1(x):
    """exp(x) − 1 without cancellation."""
    series = x * 0.0 + 1.0
    for k in tl.static_range(13, 1, -1):  # x·(1 + x/2·(1 + x/3·(…))), to fp64 for |x| ≤ 0.35
        series = 1.0 + x / k * series
    return tl.where(tl.abs(x) < 0.35, x * series, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) for x > −1: the rounding of 1 + x is divided out again (Goldberg 1991, theorem 4)."""
    sum_ = 1.0 + x
    return tl.where(sum_ == 1.0, x, tl.log(sum_) * (x / tl.where(sum_ == 1.0, 1.0, sum_ - 1.0)))


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def sigmoid(x):
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1.0) / (1.0 + e)


# ------------------------------------------------------------------------------------------------------------ softmax


@triton.jit
def scaled(x, inverse_temperature, softcap, SOFTCAP: tl.constexpr):
    """Logits as the softmax sees them; tanh would turn a forbidden token's −inf into −softcap."""
    if SOFTCAP:
        x = tl.where(x == float("-inf"), x, softcap * tanh(x / softcap))
    return x * inverse_temperature


@triton.jit
def block_sums(z):
    """Of one block: its maximum m, Σ exp(z − m), Σ exp(z − m)·(z − m)."""
    m = tl.max(z, 0)
    shifted = z - finite_or_zero(m)
    e = tl.exp(shifted)
    return m, tl.sum(e, 0), tl.sum(e * tl.where(z == float("-inf"), 0.0, shifted), 0)


@triton.jit
def merge_sums(m, s, t, m_block, s_block, t_block):
    """`block_sums` of two parts as those of the whole."""
    highest = tl.maximum(m, m_block)
    shift, shift_block = (
        finite_or_zero(m) - finite_or_zero(highest),
        finite_or_zero(m_block) - finite_or_zero(highest),
    )
    scale = tl.where(m == float("-inf"), 0.0, tl.exp(shift))
    scale_block = tl.where(m_block == float("-inf"), 0.0, tl.exp(shift_block))
    t = (t + s * shift) * scale + (t_block + s_block * shift_block) * scale_block
    return highest, s * scale + s_block * scale_block, t


# --------------------------------------------------------------------------------------------------------- statistics


@triton.jit
def block_moments(x, mask):
    """Count, mean and sum of squared deviations of the True places; two passes, E[x²] − E[x]² would cancel."""
    n = tl.sum(mask.to(x.dtype), 0)
    mean = tl.sum(tl.where(mask, x, 0.0), 0) / tl.maximum(n, 1.0)
    deviation = tl.where(mask, x - mean, 0.0)
    return n, mean, tl.sum(deviation * deviation, 0)


@triton.jit
def merge_moments(n, mean, m2, n_block, mean_block, m2_block):
    """Chan, Golub and LeVeque 1979."""
    total = n + n_block
    share = n_block / tl.maximum(total, 1.0)
    difference = mean_block - mean
    return total, mean + difference * share, m2 + m2_block + difference * difference * n * share


@triton.jit
def all_moments(n, mean, m2):
    """Vectors of partial moments as those of the whole."""
    total = tl.sum(n, 0)
    whole = tl.sum(n * mean, 0) / tl.maximum(total, 1.0)
    difference = mean - whole
    return total, whole, tl.sum(m2 + n * difference * difference, 0)


# ------------------------------------------------------------------------------------------------------- KL and ratio


@triton.jit
def log_difference(a, b):
    """a − b; 0 where both are −inf."""
    return tl.where(a == b, 0.0, a - b)


@triton.jit
def clamped(x, low, high):
    """NaN passes through."""
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def kl_estimate(difference, KIND: tl.constexpr):
    if KIND == "k1":
        return difference
    elif KIND == "k2":
        return difference * difference * 0.5
    elif KIND == "k3":
        d = clamped(difference, -20.0, 20.0)
        return expm1(-d) + d
    elif KIND == "abs":
        return tl.abs(difference)
    else:
        return tl.where(difference < 0, 0.0, difference)


@triton.jit
def k3_derivative(difference):
    return tl.where(tl.abs(difference) <= 20.0, -expm1(-difference), 0.0)


@triton.jit
def policy_term(difference, advantage, low, high, dual_clip):
    """Clipped loss, its derivative by the log-probability, log-ratio, ratio; dual_clip may be ∞."""
    log_ratio = clamped(difference, -20.0, 20.0)
    ratio = tl.exp(log_ratio)
    unclipped = -advantage * ratio
    clipped = -advantage * clamped(ratio, low, high)
    loss = tl.where((unclipped > clipped) | (unclipped != unclipped), unclipped, clipped)
    held = ((advantage > 0) & (ratio > high)) | ((advantage < 0) & (ratio < low))
    bounded = (advantage < 0) & (ratio > dual_clip)
    loss = tl.where(bounded, -dual_clip * advantage, loss)
    active = ~held & ~bounded & ((difference == log_ratio) | (difference != difference))
    return loss, tl.where(active, unclipped, 0.0), log_ratio, ratio


@triton.jit
def value_term(value, old_value, target, cliprange, CLIP: tl.constexpr):
    """½ max((V − R)², (V_old + clip(V − V_old) − R)²), its derivative by V, whether the clipped error was larger."""
    error = value - target
    if CLIP:
        change = value - old_value
        clipped_error = old_value + clamped(change, -cliprange, cliprange) - target
        inside = tl.abs(change) <= cliprange
        larger = clipped_error * clipped_error > error * error
        chosen = tl.where(larger, clipped_error, error)
        return 0.5 * chosen * chosen, tl.where(inside | ~larger, error, 0.0), ~inside & larger
    else:
        return 0.5 * error * error, error, error != error

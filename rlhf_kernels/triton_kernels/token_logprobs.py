"""token_logprobs: one program a row, or one a block of a row where rows are few."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import check_range, compute_dtype, valid_tokens
from .common import (
    at_place,
    block_sums,
    finite_or_zero,
    inner,
    launch,
    merge_sums,
    number,
    power_of_2,
    rows,
    scaled,
    tanh,
)

FEW_ROWS = 256  # below this the rows alone do not fill a GPU
MAX_BLOCK_V = 4096  # of a row at a time: with 8 warps 16 values a thread, so four programs share a multiprocessor


def block_of(logits: Tensor) -> tuple[int, int]:
    """BLOCK_V and the number of warps for these logits."""
    block = power_of_2(logits.shape[-1], 128, MAX_BLOCK_V)
    return block, max(1, block // 512)


@triton.jit
def load_token(tokens, mask, place, inner, V):
    """The token to look up, clamped before it becomes an address; whether it counts; whether it lies outside of V."""
    token = tl.load(at_place(tokens, place, inner)).to(tl.int64)
    valid = token >= 0
    if mask is not None:
        valid = valid & tl.load(at_place(mask, place, inner))
    return tl.minimum(tl.maximum(token, 0), V - 1), valid, token >= V


@triton.jit
def load_block(row, start, stride_v, V, DTYPE: tl.constexpr, BLOCK_V: tl.constexpr, EVICT: tl.constexpr):
    """BLOCK_V logits of a row from column `start`, −inf beyond its end."""
    v = start + tl.arange(0, BLOCK_V)
    place = row + v.to(tl.int64) * stride_v
    return tl.load(place, mask=v < V, other=float("-inf"), eviction_policy=EVICT).to(DTYPE)


@triton.jit
def row_sums(
    row,
    stride_v,
    V,
    inverse_temperature,
    softcap,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    like,
    EVICT: tl.constexpr,
):
    """`block_sums` of a whole row, block by block in order: the same bits whether or not a row is split."""
    m, s, t = number(float("-inf"), like.dtype), number(0.0, like.dtype), number(0.0, like.dtype)
    for start in tl.range(0, V, BLOCK_V, num_stages=3):  # two blocks are on their way while one is summed
        x = load_block(row, start, stride_v, V, like.dtype, BLOCK_V, EVICT)
        m_block, s_block, t_block = block_sums(scaled(x, inverse_temperature, softcap, SOFTCAP))
        m, s, t = merge_sums(m, s, t, m_block, s_block, t_block)
    return m, s, t


@triton.jit
def logprob_entropy(chosen, m, s, t, outside):
    """From the scaled logit of the token and the sums of its row. Relative to m: near 1e4 an fp32 logsumexp is off by
    5e-4."""
    log_total = tl.log(s)
    logprob = tl.where(chosen == float("-inf"), chosen, chosen - finite_or_zero(m) - log_total)
    entropy = tl.where(s > 0, log_total - t / s, tl.where(s == 0, 0.0, s))
    return tl.where(outside, float("nan"), logprob), entropy, finite_or_zero(m) + log_total


@triton.jit
def _token_logprobs_fwd_kernel(
    logits,
    stride_v,
    tokens,
    mask,
    inner,
    V,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    sums_ptr,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """BLOCKS > 0: the sums of a row's blocks have been taken by `_block_sums_kernel`."""
    place = tl.program_id(0)
    token, valid, outside = load_token(tokens, mask, place, inner, V)
    DTYPE: tl.constexpr = logprobs_ptr.dtype.element_ty
    zero = number(0.0, DTYPE)
    logprob, entropy, lse = zero, zero, zero
    if valid:
        scale, cap = number(inverse_temperature, DTYPE), number(softcap, DTYPE)
        row = at_place(logits, place, inner)
        if BLOCKS > 0:
            m, s, t = number(float("-inf"), DTYPE), zero, zero
            for block in range(BLOCKS):
                sums = sums_ptr + (place.to(tl.int64) * BLOCKS + block) * 3
                m, s, t = merge_sums(m, s, t, tl.load(sums), tl.load(sums + 1), tl.load(sums + 2))
        else:
            m, s, t = row_sums(row, stride_v, V, scale, cap, SOFTCAP, BLOCK_V, zero, "")
        chosen = scaled(tl.load(row + token * stride_v).to(DTYPE), scale, cap, SOFTCAP)
        logprob, entropy, lse = logprob_entropy(chosen, m, s, t, outside)
    tl.store(logprobs_ptr + place, logprob)
    tl.store(lse_ptr + place, lse)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + place, entropy)


@triton.jit
def _block_sums_kernel(
    logits,
    stride_v,
    tokens,
    mask,
    inner,
    V,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    sums_ptr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    place, block = tl.program_id(0), tl.program_id(1)
    _, valid, _ = load_token(tokens, mask, place, inner, V)
    if valid:
        DTYPE: tl.constexpr = sums_ptr.dtype.element_ty
        x = load_block(at_place(logits, place, inner), block * BLOCK_V, stride_v, V, DTYPE, BLOCK_V, "")
        z = scaled(x, number(inverse_temperature, DTYPE), number(softcap, DTYPE), SOFTCAP)
        m, s, t = block_sums(z)
        sums = sums_ptr + (place.to(tl.int64) * BLOCKS + block) * 3
        tl.store(sums, m)
        tl.store(sums + 1, s)
        tl.store(sums + 2, t)


def fwd(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    grad_buffer: Tensor | None = None,  # for the backward pass
) -> tuple[Tensor, Tensor, Tensor]:
    check_range("token_logprobs", tokens, valid_tokens(tokens, mask), logits.shape[-1])
    logprobs = logits.new_empty(tokens.shape, dtype=compute_dtype(logits))
    entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
    lse = torch.empty_like(logprobs)
    block, warps = block_of(logits)
    blocks = triton.cdiv(logits.shape[-1], block) if tokens.numel() < FEW_ROWS else 1
    arguments = (rows(logits, 1), logits.stride(-1), rows(tokens), rows(mask), inner(tokens), logits.shape[-1])
    scalars = (1 / temperature, softcap or 0.0)
    constants = {"SOFTCAP": softcap is not None, "BLOCK_V": block, "BLOCKS": blocks if blocks > 1 else 0}
    sums = None
    if blocks > 1:
        sums = logprobs.new_empty(tokens.numel(), blocks, 3)
        launch(_block_sums_kernel, (tokens.numel(), blocks), *arguments, *scalars, sums, warps=warps, **constants)
        warps = 1
    outputs = (logprobs, entropy if with_entropy else None, lse)
    launch(
        _token_logprobs_fwd_kernel, (tokens.numel(),), *arguments, *scalars, sums, *outputs, warps=warps, **constants
    )
    return logprobs, entropy, lse


@triton.jit
def logit_gradient(
    x, v, token, lse, entropy, g, g_entropy, inverse_temperature, softcap, SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr
):
    """∂L/∂logits at the columns v of a row, from the gradients g of its log-probability and of its entropy."""
    z = scaled(x, inverse_temperature, softcap, SOFTCAP)
    logp = z - finite_or_zero(lse)
    p = tl.exp(logp)
    dz = tl.where(v == token, g, 0.0) - g * p
    if ENTROPY:
        dz -= g_entropy * tl.where(p > 0, p * (logp + entropy), 0.0)
    du = dz * inverse_temperature
    if SOFTCAP:
        capped = tanh(x / softcap)
        du *= 1.0 - capped * capped
    return tl.where(z == float("-inf"), 0.0, du)


@triton.jit
def _token_logprobs_bwd_kernel(
    logits,
    stride_v,
    tokens,
    mask,
    inner,
    V,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    lse,
    entropy,
    grad_logprobs,
    grad_entropy,
    dlogits_ptr,
    SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    place, block = tl.program_id(0), tl.program_id(1)
    token, valid, _ = load_token(tokens, mask, place, inner, V)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    target = dlogits_ptr + place.to(tl.int64) * V + v
    if valid:
        DTYPE: tl.constexpr = lse[0].dtype.element_ty
        zero = number(0.0, DTYPE)
        g, g_entropy, h = zero, zero, zero
        if grad_logprobs is not None:
            g = tl.load(at_place(grad_logprobs, place, inner)).to(DTYPE)
        if grad_entropy is not None:
            g_entropy = tl.load(at_place(grad_entropy, place, inner)).to(DTYPE)
            h = tl.load(at_place(entropy, place, inner))
        total = tl.load(at_place(lse, place, inner))
        x = load_block(at_place(logits, place, inner), block * BLOCK_V, stride_v, V, DTYPE, BLOCK_V, "")
        scale, cap = number(inverse_temperature, DTYPE), number(softcap, DTYPE)
        dx = logit_gradient(x, v, token, total, h, g, g_entropy, scale, cap, SOFTCAP, grad_entropy is not None)
        tl.store(target, dx.to(dlogits_ptr.dtype.element_ty), mask=v < V)
    else:
        tl.store(target, tl.zeros((BLOCK_V,), dlogits_ptr.dtype.element_ty), mask=v < V)


def bwd_out(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    dlogits: Tensor,
) -> None:
    """`dlogits` may be the logits themselves: no program reads what another writes."""
    block, warps = block_of(logits)
    launch(
        _token_logprobs_bwd_kernel,
        (tokens.numel(), triton.cdiv(logits.shape[-1], block)),
        rows(logits, 1),
        logits.stride(-1),
        rows(tokens),
        rows(mask),
        inner(tokens),
        logits.shape[-1],
        1 / temperature,
        softcap or 0.0,
        rows(lse),
        rows(entropy) if grad_entropy is not None else None,
        rows(grad_logprobs),
        rows(grad_entropy),
        dlogits,
        warps=warps,
        SOFTCAP=softcap is not None,
        BLOCK_V=block,
    )


def bwd(logits: Tensor, *rest: Any) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    bwd_out(*[logits, *rest, dlogits])
    return dlogits

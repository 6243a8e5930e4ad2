"""ppo_loss: sums over the tokens, then the gradient; one launch where a single program can do both."""

import math

import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from ..stats import PPOStats
from .common import (
    all_moments,
    at_place,
    block_moments,
    inner,
    kl_estimate,
    launch,
    log_difference,
    merge_moments,
    number,
    policy_term,
    power_of_2,
    rows,
    value_term,
)

BLOCK = 1024
SINGLE = 4 * BLOCK  # tokens that one program goes through faster than a second launch starts
MAX_PROGRAMS = 512
CHANNELS = tl.constexpr(16)  # partial sums a program leaves behind


@triton.jit
def _load_mask(mask, tokens, place, inner, N):
    """Where the mask is True and (if there are tokens) the token is not negative."""
    valid = tl.load(at_place(mask, place, inner), mask=place < N, other=0) != 0
    if tokens is not None:
        valid = valid & (tl.load(at_place(tokens, place, inner), mask=valid, other=-1) >= 0)
    return valid


@triton.jit
def _load(x, place, inner, mask, DTYPE: tl.constexpr):
    return tl.load(at_place(x, place, inner), mask=mask, other=0.0).to(DTYPE)


@triton.jit
def policy_at(logprobs, old_logprobs, advantages, place, inner, mask, low, high, dual_clip, DTYPE: tl.constexpr):
    """`policy_term` of a block of tokens, the advantage, and the mask without the tokens that could not be sampled."""
    logprob = _load(logprobs, place, inner, mask, DTYPE)
    old_logprob = _load(old_logprobs, place, inner, mask, DTYPE)
    counted = mask & ~((logprob == float("-inf")) & (old_logprob == float("-inf")))
    advantage = tl.where(counted, _load(advantages, place, inner, mask, DTYPE), 0.0)
    difference = tl.where(counted, log_difference(logprob, old_logprob), 0.0)
    loss, derivative, log_ratio, ratio = policy_term(difference, advantage, low, high, dual_clip)
    return tl.where(counted, loss, 0.0), derivative, log_ratio, ratio, advantage, logprob, counted


@triton.jit
def _ppo_loss_fwd_kernel(
    logprobs,
    old_logprobs,
    advantages,
    values,
    old_values,
    returns,
    mask,
    tokens,
    entropy,
    ref_logprobs,
    normalizer_ptr,
    inner,
    N,
    TILES,
    cliprange: tl.float64,
    cliprange_high: tl.float64,
    cliprange_value: tl.float64,
    vf_coef: tl.float64,
    dual_clip: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    partials_ptr,
    PROGRAMS,
    loss_ptr,
    stats_ptr,
    dlogprobs_ptr,
    dvalues_ptr,
    CLIP_VALUE: tl.constexpr,
    KL: tl.constexpr,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """SUMS leaves a program's sums in `partials_ptr`, GRADIENT reads everybody's; with both they stay in registers.

    values, entropy (and KL) may be absent, as the losses have them; with entropy, the mask's whole count divides.
    """
    program = tl.program_id(0)
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    low, high = 1.0 - number(cliprange, DTYPE), 1.0 + number(cliprange_high, DTYPE)
    dual, clip_value = number(dual_clip, DTYPE), number(cliprange_value, DTYPE)
    zero = number(0.0, DTYPE)
    first = program * TILES * BLOCK
    count, masked, policy, squares, above, below, ratios, highest = zero, zero, zero, zero, zero, zero, zero, zero
    value_sum, value_clips, entropies, kls = zero, zero, zero, zero
    residual_mean, residual_m2, return_mean, return_m2 = zero, zero, zero, zero
    if SUMS:
        for tile in range(TILES):
            place = first + tile * BLOCK + tl.arange(0, BLOCK)
            valid = _load_mask(mask, tokens, place, inner, N)
            loss, derivative, log_ratio, ratio, advantage, logprob, counted = policy_at(
                logprobs, old_logprobs, advantages, place, inner, valid, low, high, dual, DTYPE
            )
            policy += tl.sum(loss, 0)
            squares += tl.sum(tl.where(counted, log_ratio * log_ratio, 0.0), 0)
            above += tl.sum((counted & (advantage > 0) & (ratio > high)).to(DTYPE), 0)
            below += tl.sum((counted & (advantage < 0) & (ratio < low)).to(DTYPE), 0)
            ratios += tl.sum(tl.where(counted, ratio, 0.0), 0)
            highest = tl.maximum(highest, tl.max(tl.where(counted, ratio, 0.0), 0))
            masked += tl.sum(valid.to(DTYPE), 0)
            if values is not None:
                value = _load(values, place, inner, counted, DTYPE)
                old_value = _load(old_values, place, inner, counted, DTYPE)
                target = _load(returns, place, inner, counted, DTYPE)
                loss, derivative, clipped = value_term(value, old_value, target, clip_value, CLIP_VALUE)
                value_sum += tl.sum(tl.where(counted, loss, 0.0), 0)
                value_clips += tl.sum((counted & clipped).to(DTYPE), 0)
                n_tile, mean, m2 = block_moments(target - value, counted)
                _n, residual_mean, residual_m2 = merge_moments(count, residual_mean, residual_m2, n_tile, mean, m2)
                n_tile, mean, m2 = block_moments(target, counted)
                _n, return_mean, return_m2 = merge_moments(count, return_mean, return_m2, n_tile, mean, m2)
            if entropy is not None:
                entropies += tl.sum(_load(entropy, place, inner, valid, DTYPE), 0)
            if ref_logprobs is not None:
                ref_logprob = _load(ref_logprobs, place, inner, counted, DTYPE)
                kl = kl_estimate(log_difference(logprob, ref_logprob), "k3")
                kls += tl.sum(tl.where(counted, kl, 0.0), 0)
            count += tl.sum(counted.to(DTYPE), 0)
        if not GRADIENT:
            partial = partials_ptr + program
            tl.store(partial, count)
            tl.store(partial + PROGRAMS, masked)
            tl.store(partial + 2 * PROGRAMS, policy)
            tl.store(partial + 3 * PROGRAMS, squares)
            tl.store(partial + 4 * PROGRAMS, above)
            tl.store(partial + 5 * PROGRAMS, below)
            tl.store(partial + 6 * PROGRAMS, ratios)
            tl.store(partial + 7 * PROGRAMS, highest)
            tl.store(partial + 8 * PROGRAMS, value_sum)
            tl.store(partial + 9 * PROGRAMS, value_clips)
            tl.store(partial + 10 * PROGRAMS, entropies)
            tl.store(partial + 11 * PROGRAMS, kls)
            tl.store(partial + 12 * PROGRAMS, residual_mean)
            tl.store(partial + 13 * PROGRAMS, residual_m2)
            tl.store(partial + 14 * PROGRAMS, return_mean)
            tl.store(partial + 15 * PROGRAMS, return_m2)
    elif GRADIENT:
        p = tl.arange(0, BLOCK_P)
        there = p < PROGRAMS
        partial = partials_ptr + p
        counts = tl.load(partial, mask=there, other=0.0)
        masked = tl.sum(tl.load(partial + PROGRAMS, mask=there, other=0.0), 0)
        policy = tl.sum(tl.load(partial + 2 * PROGRAMS, mask=there, other=0.0), 0)
        squares = tl.sum(tl.load(partial + 3 * PROGRAMS, mask=there, other=0.0), 0)
        above = tl.sum(tl.load(partial + 4 * PROGRAMS, mask=there, other=0.0), 0)
        below = tl.sum(tl.load(partial + 5 * PROGRAMS, mask=there, other=0.0), 0)
        ratios = tl.sum(tl.load(partial + 6 * PROGRAMS, mask=there, other=0.0), 0)
        highest = tl.max(tl.load(partial + 7 * PROGRAMS, mask=there, other=0.0), 0)
        value_sum = tl.sum(tl.load(partial + 8 * PROGRAMS, mask=there, other=0.0), 0)
        value_clips = tl.sum(tl.load(partial + 9 * PROGRAMS, mask=there, other=0.0), 0)
        entropies = tl.sum(tl.load(partial + 10 * PROGRAMS, mask=there, other=0.0), 0)
        kls = tl.sum(tl.load(partial + 11 * PROGRAMS, mask=there, other=0.0), 0)
        means, m2s = tl.load(partial + 12 * PROGRAMS, mask=there, other=0.0), partial + 13 * PROGRAMS
        count, _, residual_m2 = all_moments(counts, means, tl.load(m2s, mask=there, other=0.0))
        means, m2s = tl.load(partial + 14 * PROGRAMS, mask=there, other=0.0), partial + 15 * PROGRAMS
        count, _, return_m2 = all_moments(counts, means, tl.load(m2s, mask=there, other=0.0))
    if GRADIENT:
        n = tl.maximum(count, 1.0)
        n_masked = tl.maximum(masked, 1.0)
        total = n if entropy is None else n_masked
        if normalizer_ptr is not None:
            total = tl.load(normalizer_ptr).to(DTYPE)
        if (dlogprobs_ptr is not None) or (dvalues_ptr is not None):
            for tile in range(TILES):
                place = first + tile * BLOCK + tl.arange(0, BLOCK)
                valid = _load_mask(mask, tokens, place, inner, N)
                loss, derivative, log_ratio, ratio, advantage, logprob, counted = policy_at(
                    logprobs, old_logprobs, advantages, place, inner, valid, low, high, dual, DTYPE
                )
                if dlogprobs_ptr is not None:
                    gradient = tl.where(counted, derivative / total, 0.0)
                    tl.store(dlogprobs_ptr + place, gradient.to(dlogprobs_ptr.dtype.element_ty), mask=place < N)
                if dvalues_ptr is not None:
                    value = _load(values, place, inner, counted, DTYPE)
                    old_value = _load(old_values, place, inner, counted, DTYPE)
                    target = _load(returns, place, inner, counted, DTYPE)
                    loss, derivative, clipped = value_term(value, old_value, target, clip_value, CLIP_VALUE)
                    gradient = tl.where(counted, number(vf_coef, DTYPE) * derivative / total, 0.0)
                    tl.store(dvalues_ptr + place, gradient.to(dvalues_ptr.dtype.element_ty), mask=place < N)
        if program == 0:
            whole = policy / total
            tl.store(stats_ptr, policy / total)
            stat = stats_ptr + 1
            if values is not None:
                whole += number(vf_coef, DTYPE) * (value_sum / total)
                tl.store(stat, value_sum / total)
                stat += 1
            if entropy is not None:
                whole -= number(entropy_coef, DTYPE) * entropies / total
                tl.store(stat, entropies / n_masked)
                stat += 1
            if KL:
                whole += number(kl_coef, DTYPE) * kls / total
                tl.store(stat, kls / n)
                stat += 1
            tl.store(loss_ptr, whole)
            tl.store(stat, 0.5 * squares / n)
            tl.store(stat + 1, above / n)
            tl.store(stat + 2, below / n)
            stat += 3
            if values is not None:
                tl.store(stat, value_clips / n)
                stat += 1
            tl.store(stat, ratios / n)
            tl.store(stat + 1, highest)
            stat += 2
            if values is not None:
                explained = 1.0 - residual_m2 / tl.where(return_m2 > 0, return_m2, 1.0)
                tl.store(stat, tl.where(return_m2 > 0, explained, 0.0))
                stat += 1
            tl.store(stat, count)


def reduce_tokens(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor | None,
    old_values: Tensor | None,
    returns: Tensor | None,
    mask: Tensor,
    tokens: Tensor | None,
    entropy: Tensor | None,
    ref_logprobs: Tensor | None,
    normalizer: Tensor | None,
    cliprange: float,
    cliprange_high: float,
    cliprange_value: float | None,
    vf_coef: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    dlogprobs: Tensor | None,
    dvalues: Tensor | None,
    stats: int,
    with_kl: bool = False,
) -> tuple[Tensor, Tensor]:
    """Loss and statistics from what the tokens have; writes the gradients that are given."""
    dtype = compute_dtype(logprobs)
    loss, stats_ = logprobs.new_empty((), dtype=dtype), logprobs.new_empty(stats, dtype=dtype)
    n = logprobs.numel()
    tiles = max(triton.cdiv(n, BLOCK), 1)
    single = n <= SINGLE
    per_program = tiles if single else triton.cdiv(tiles, MAX_PROGRAMS)
    programs = triton.cdiv(tiles, per_program)
    partials = None if single else loss.new_empty(CHANNELS.value, programs)
    per_token = (logprobs, old_logprobs, advantages, values, old_values, returns, mask, tokens, entropy, ref_logprobs)
    for sums, gradient in ((True, True),) if single else ((True, False), (False, True)):
        launch(
            _ppo_loss_fwd_kernel,
            (programs,),
            *(rows(x) for x in per_token),
            normalizer,
            inner(logprobs),
            n,
            per_program,
            cliprange,
            cliprange_high,
            cliprange_value or 0.0,
            vf_coef,
            dual_clip or math.inf,
            entropy_coef,
            kl_coef,
            partials,
            programs,
            loss,
            stats_,
            dlogprobs,
            dvalues,
            warps=4,
            CLIP_VALUE=cliprange_value is not None,
            KL=with_kl,
            SUMS=sums,
            GRADIENT=gradient,
            BLOCK=BLOCK,
            BLOCK_P=power_of_2(programs, 16, MAX_PROGRAMS),
        )
    return loss, stats_


def fwd(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    cliprange: float,
    cliprange_high: float,
    cliprange_value: float | None,
    vf_coef: float,
    dual_clip: float | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dlogprobs, dvalues = (x.new_empty(x.shape if with_grad else 0) for x in (logprobs, values))
    loss, stats = reduce_tokens(
        logprobs,
        old_logprobs,
        advantages,
        values,
        old_values,
        returns,
        mask,
        None,
        None,
        None,
        normalizer,
        cliprange,
        cliprange_high,
        cliprange_value,
        vf_coef,
        dual_clip,
        0.0,
        0.0,
        dlogprobs if with_grad else None,
        dvalues if with_grad else None,
        len(PPOStats._fields),
    )
    return loss, stats, dlogprobs, dvalues

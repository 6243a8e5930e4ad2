"""fused_ppo_loss: one launch over [B, T], one pass over the logits, one launch that sums up the tokens."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import check_range, compute_dtype, valid_tokens
from ..stats import FusedPPOStats
from .common import (
    at_place,
    inner,
    k3_derivative,
    launch,
    log_difference,
    number,
    policy_term,
    power_of_2,
    registers_for,
    rows,
    scaled,
)
from .ppo_loss import reduce_tokens
from .rollout_advantages import MAX_PROGRAMS, batch_moments, by_rows
from .token_logprobs import block_of, load_block, load_token, logit_gradient, logprob_entropy, row_sums


@triton.jit
def _ppo_rows_kernel(
    logits,
    stride_v,
    tokens,
    mask,
    old_logprobs,
    advantages,
    ref_logprobs,
    inner,
    V,
    inverse_temperature: tl.float64,
    softcap: tl.float64,
    cliprange: tl.float64,
    cliprange_high: tl.float64,
    dual_clip: tl.float64,
    entropy_coef: tl.float64,
    kl_coef: tl.float64,
    normalizer_ptr,
    moments_ptr,
    PROGRAMS,
    logprobs_ptr,
    entropy_ptr,
    lse_ptr,
    advantages_ptr,
    live_ptr,
    dlogits_ptr,
    stride_gradient,
    WHITEN: tl.constexpr,
    SOFTCAP: tl.constexpr,
    GRADIENT: tl.constexpr,
    OVERWRITE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One row of logits: log-probability, entropy, clipped policy term, and the gradient while the row is in the cache.

    Without old_logprobs the gradient is that of the log-probability. moments_ptr: of the raw advantages, to whiten
    them and to divide by their number; without it and a normalizer nothing divides. live_ptr: whether a row has a
    gradient. OVERWRITE: the gradient takes the place of the logits, in a dtype that may be narrower.
    """
    place = tl.program_id(0)
    DTYPE: tl.constexpr = logprobs_ptr.dtype.element_ty
    zero = number(0.0, DTYPE)
    token, valid, outside = load_token(tokens, mask, place, inner, V)
    source = at_place(logits, place, inner)
    scale, cap = number(inverse_temperature, DTYPE), number(softcap, DTYPE)
    logprob, entropy, lse, advantage, g, g_entropy = zero, zero, zero, zero, zero, zero
    if valid:
        m, s, t = row_sums(source, stride_v, V, scale, cap, SOFTCAP, BLOCK_V, zero, "evict_last" if GRADIENT else "")
        chosen = scaled(tl.load(source + token * stride_v).to(DTYPE), scale, cap, SOFTCAP)
        logprob, entropy, lse = logprob_entropy(chosen, m, s, t, outside)
        total = number(1.0, DTYPE)
        if advantages is not None:
            advantage = tl.load(at_place(advantages, place, inner)).to(DTYPE)
        if moments_ptr is not None:
            n, mean, inverse_deviation = batch_moments(moments_ptr, PROGRAMS, BLOCK_P)
            total = tl.maximum(n.to(DTYPE), 1.0)
            if WHITEN:
                advantage = (advantage - mean.to(DTYPE)) * inverse_deviation.to(DTYPE)
        if normalizer_ptr is not None:
            total = tl.load(normalizer_ptr).to(DTYPE)
        if GRADIENT:
            g = number(1.0, DTYPE)
            if old_logprobs is not None:
                difference = log_difference(logprob, tl.load(at_place(old_logprobs, place, inner)).to(DTYPE))
                low, high = 1.0 - number(cliprange, DTYPE), 1.0 + number(cliprange_high, DTYPE)
                _, g, _, _ = policy_term(difference, advantage, low, high, number(dual_clip, DTYPE))
                g = tl.where(logprob == float("-inf"), 0.0, g)
            if ref_logprobs is not None:
                ref_logprob = tl.load(at_place(ref_logprobs, place, inner)).to(DTYPE)
                g += number(kl_coef, DTYPE) * k3_derivative(log_difference(logprob, ref_logprob))
            g = g / total
            g_entropy = -number(entropy_coef, DTYPE) / total
    tl.store(logprobs_ptr + place, logprob)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + place, entropy)
    if lse_ptr is not None:
        tl.store(lse_ptr + place, lse)
    if advantages_ptr is not None:
        tl.store(advantages_ptr + place, advantage)
    if GRADIENT:
        # Not g != 0: a NaN has to show.
        dead = (g == 0) & (g_entropy == 0)
        if live_ptr is not None:
            tl.store(live_ptr + place, tl.where(dead, 0, 1).to(tl.int8))
        target = dlogits_ptr + place.to(tl.int64) * stride_gradient
        blocks = tl.cdiv(V, BLOCK_V)
        for k in range(blocks):
            # Downwards: the end of the row was read last and is still in the cache.
            start = (k if OVERWRITE else blocks - 1 - k) * BLOCK_V
            v = start + tl.arange(0, BLOCK_V)
            dx = tl.zeros((BLOCK_V,), DTYPE)
            if not dead:
                x = load_block(source, start, stride_v, V, DTYPE, BLOCK_V, "evict_first")
                dx = logit_gradient(x, v, token, lse, entropy, g, g_entropy, scale, cap, SOFTCAP, True)
            if OVERWRITE:
                tl.debug_barrier()  # every thread has read its block before one of them writes there
            tl.store(target + v, dx.to(dlogits_ptr.dtype.element_ty), mask=v < V)


def launch_rows(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    logprobs: Tensor,
    entropy: Tensor | None,
    dlogits: Tensor | None,
    *,
    overwrite: bool = True,
    old_logprobs: Tensor | None = None,
    advantages: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    cliprange: float = 0.0,
    cliprange_high: float = 0.0,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    kl_coef: float = 0.0,
    normalizer: Tensor | None = None,
    moments: Tensor | None = None,
    whiten: bool = False,
    lse: Tensor | None = None,
    whitened: Tensor | None = None,
    live: Tensor | None = None,
) -> None:
    """The one pass over the logits; the outputs are filled, the gradient (over the logits themselves?) if given."""
    block, warps = block_of(logits)
    programs = 0 if moments is None else moments.shape[1]
    launch(
        _ppo_rows_kernel,
        (tokens.numel(),),
        rows(logits, 1),
        logits.stride(-1),
        rows(tokens),
        rows(mask),
        rows(old_logprobs),
        rows(advantages),
        rows(ref_logprobs),
        inner(tokens),
        logits.shape[-1],
        1 / temperature,
        softcap or 0.0,
        cliprange,
        cliprange_high,
        dual_clip or math.inf,
        entropy_coef,
        kl_coef,
        normalizer,
        moments,
        programs,
        logprobs,
        entropy,
        lse,
        whitened,
        live,
        dlogits,
        0 if dlogits is None else dlogits.stride(-2),
        warps=warps,
        registers=registers_for(logprobs),
        WHITEN=whiten,
        SOFTCAP=softcap is not None,
        GRADIENT=dlogits is not None,
        OVERWRITE=overwrite,
        BLOCK_V=block,
        BLOCK_P=power_of_2(programs, 16, MAX_PROGRAMS),
    )


def fwd(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, with_grad = rest
    dlogits = torch.empty(logits.shape if with_grad else 0, dtype=logits.dtype, device=logits.device)
    loss, stats, dvalues = fwd_out(*[logits, *given, dlogits if with_grad else None])
    return loss, stats, dlogits, dvalues


def fwd_out(
    logits: Tensor,
    tokens: Tensor,
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    values: Tensor,
    old_values: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    temperature: float,
    softcap: float | None,
    kl_coef: float,
    beta: float,
    gamma: float,
    lam: float,
    kl_estimator: str,
    whiten: bool,
    cliprange: float,
    cliprange_high: float,
    cliprange_value: float | None,
    vf_coef: float,
    dual_clip: float | None,
    entropy_coef: float,
    dlogits: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`dlogits` may be the logits themselves: a block is written after it has been read for the last time."""
    with_grad = dlogits is not None
    check_range("token_logprobs", tokens, valid_tokens(tokens, mask), logits.shape[-1])
    raw, returns, _, _, moments = by_rows(
        scores,
        old_logprobs,
        ref_logprobs,
        attention,
        old_values,
        mask,
        tokens,
        kl_coef,
        beta,
        gamma,
        lam,
        kl_estimator,
        compute_dtype(old_logprobs),
        False,
    )
    logprobs = logits.new_empty(tokens.shape, dtype=compute_dtype(logits))
    entropy, advantages = torch.empty_like(logprobs), torch.empty_like(logprobs)
    dvalues = values.new_empty(values.shape if with_grad else 0)
    launch_rows(
        logits,
        tokens,
        mask,
        temperature,
        softcap,
        logprobs,
        entropy,
        dlogits,
        overwrite=False,
        old_logprobs=old_logprobs,
        advantages=raw,
        cliprange=cliprange,
        cliprange_high=cliprange_high,
        dual_clip=dual_clip,
        entropy_coef=entropy_coef,
        normalizer=normalizer,
        moments=moments,
        whiten=whiten,
        whitened=advantages,
    )
    loss, stats = reduce_tokens(
        logprobs,
        old_logprobs,
        advantages,
        values,
        old_values,
        returns,
        mask,
        tokens,
        entropy,
        None,
        normalizer,
        cliprange,
        cliprange_high,
        cliprange_value,
        vf_coef,
        dual_clip,
        entropy_coef,
        0.0,
        None,
        dvalues if with_grad else None,
        len(FusedPPOStats._fields),
    )
    return loss, stats, dvalues

"""policy_ref_logprobs: one pass over both rows, with the exact KL from the same sums."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import check_range, compute_dtype, valid_tokens
from .common import at_place, finite_or_zero, inner, launch, merge_sums, number, registers_for, rows
from .token_logprobs import block_of, load_block, load_token, logit_gradient, logprob_entropy


@triton.jit
def pair_sums(row, stride_v, other_row, other_stride_v, V, scale, like, BLOCK_V: tl.constexpr, EVICT: tl.constexpr):
    """`block_sums` of two rows p and q, and Σ exp(z − m)·((z − m) − (z_q − m_q)): with both maxima taken off, no large
    numbers cancel in KL(p ‖ q)."""
    zero, low = number(0.0, like.dtype), number(float("-inf"), like.dtype)
    m, s, t, m_q, s_q, gap = low, zero, zero, low, zero, zero
    for start in tl.range(0, V, BLOCK_V, num_stages=3):
        z = load_block(row, start, stride_v, V, like.dtype, BLOCK_V, EVICT) * scale
        z_q = load_block(other_row, start, other_stride_v, V, like.dtype, BLOCK_V, EVICT) * scale
        m_block, m_q_block = tl.max(z, 0), tl.max(z_q, 0)
        shifted, shifted_q = z - finite_or_zero(m_block), z_q - finite_or_zero(m_q_block)
        e = tl.exp(shifted)
        s_block, s_q_block = tl.sum(e, 0), tl.sum(tl.exp(shifted_q), 0)
        t_block = tl.sum(e * tl.where(e > 0, shifted, 0.0), 0)
        gap_block = tl.sum(tl.where(e > 0, e * (shifted - shifted_q), 0.0), 0)
        top, top_q = finite_or_zero(tl.maximum(m, m_block)), finite_or_zero(tl.maximum(m_q, m_q_block))
        shift = (finite_or_zero(m) - top) - (finite_or_zero(m_q) - top_q)
        shift_block = (finite_or_zero(m_block) - top) - (finite_or_zero(m_q_block) - top_q)
        weight = tl.where(s > 0, tl.exp(finite_or_zero(m) - top), 0.0)
        weight_block = tl.where(s_block > 0, tl.exp(finite_or_zero(m_block) - top), 0.0)
        gap = tl.where(weight > 0, (gap + s * shift) * weight, 0.0)
        gap += tl.where(weight_block > 0, (gap_block + s_block * shift_block) * weight_block, 0.0)
        m, s, t = merge_sums(m, s, t, m_block, s_block, t_block)
        m_q, s_q, _ = merge_sums(m_q, s_q, zero, m_q_block, s_q_block, zero)
    return m, s, t, m_q, s_q, gap


@triton.jit
def kl_from_sums(s, s_q, gap):
    return tl.where(s == 0, 0.0, gap / s - tl.log(s) + tl.log(s_q))


@triton.jit
def _policy_ref_logprobs_fwd_kernel(
    logits,
    stride_v,
    ref_logits,
    ref_stride_v,
    tokens,
    mask,
    inner,
    V,
    inverse_temperature: tl.float64,
    logprobs_ptr,
    ref_logprobs_ptr,
    entropy_ptr,
    kl_ptr,
    lse_ptr,
    ref_lse_ptr,
    BLOCK_V: tl.constexpr,
):
    place = tl.program_id(0)
    DTYPE: tl.constexpr = logprobs_ptr.dtype.element_ty
    zero = number(0.0, DTYPE)
    logprob, ref_logprob, entropy, kl, lse, ref_lse = zero, zero, zero, zero, zero, zero
    token, valid, outside = load_token(tokens, mask, place, inner, V)
    if valid:
        scale = number(inverse_temperature, DTYPE)
        row, ref_row = at_place(logits, place, inner), at_place(ref_logits, place, inner)
        m, s, t, m_ref, s_ref, gap = pair_sums(row, stride_v, ref_row, ref_stride_v, V, scale, zero, BLOCK_V, "")
        chosen = tl.load(row + token * stride_v).to(DTYPE) * scale
        ref_chosen = tl.load(ref_row + token * ref_stride_v).to(DTYPE) * scale
        logprob, entropy, lse = logprob_entropy(chosen, m, s, t, outside)
        ref_logprob, _, ref_lse = logprob_entropy(ref_chosen, m_ref, s_ref, zero, outside)
        kl = kl_from_sums(s, s_ref, gap)
    tl.store(logprobs_ptr + place, logprob)
    tl.store(ref_logprobs_ptr + place, ref_logprob)
    tl.store(entropy_ptr + place, entropy)
    tl.store(kl_ptr + place, kl)
    tl.store(lse_ptr + place, lse)
    tl.store(ref_lse_ptr + place, ref_lse)


def fwd(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    grad_buffer: Tensor | None,  # for the backward pass
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    check_range("token_logprobs", tokens, valid_tokens(tokens, mask), logits.shape[-1])
    logprobs = logits.new_empty(tokens.shape, dtype=compute_dtype(logits))
    ref_logprobs = logits.new_empty(tokens.shape, dtype=compute_dtype(ref_logits))
    entropy, kl, lse = (torch.empty_like(logprobs) for _ in range(3))
    ref_lse = torch.empty_like(ref_logprobs)
    block, warps = block_of(logits)
    launch(
        _policy_ref_logprobs_fwd_kernel,
        (tokens.numel(),),
        rows(logits, 1),
        logits.stride(-1),
        rows(ref_logits, 1),
        ref_logits.stride(-1),
        rows(tokens),
        rows(mask),
        inner(tokens),
        logits.shape[-1],
        1 / temperature,
        logprobs,
        ref_logprobs,
        entropy,
        kl,
        lse,
        ref_lse,
        warps=warps,
        registers=registers_for(logprobs),
        BLOCK_V=block,
    )
    return logprobs, ref_logprobs, entropy, kl, lse, ref_lse


@triton.jit
def _policy_ref_logprobs_bwd_kernel(
    logits,
    stride_v,
    ref_logits,
    ref_stride_v,
    tokens,
    mask,
    inner,
    V,
    inverse_temperature: tl.float64,
    lse_ptr,
    ref_lse_ptr,
    entropy_ptr,
    kl_ptr,
    grad_logprobs,
    grad_entropy,
    grad_kl,
    dlogits_ptr,
    BLOCK_V: tl.constexpr,
):
    place, block = tl.program_id(0), tl.program_id(1)
    token, valid, _ = load_token(tokens, mask, place, inner, V)
    v = block * BLOCK_V + tl.arange(0, BLOCK_V)
    target = dlogits_ptr + place.to(tl.int64) * V + v
    if valid:
        DTYPE: tl.constexpr = lse_ptr.dtype.element_ty
        g, g_entropy = number(0.0, DTYPE), number(0.0, DTYPE)
        if grad_logprobs is not None:
            g = tl.load(at_place(grad_logprobs, place, inner)).to(DTYPE)
        if grad_entropy is not None:
            g_entropy = tl.load(at_place(grad_entropy, place, inner)).to(DTYPE)
        lse, entropy, scale = tl.load(lse_ptr + place), tl.load(entropy_ptr + place), number(inverse_temperature, DTYPE)
        x = load_block(at_place(logits, place, inner), block * BLOCK_V, stride_v, V, DTYPE, BLOCK_V, "")
        cap = number(0.0, DTYPE)
        dx = logit_gradient(x, v, token, lse, entropy, g, g_entropy, scale, cap, False, grad_entropy is not None)
        if grad_kl is not None:
            g_kl, kl = tl.load(at_place(grad_kl, place, inner)).to(DTYPE), tl.load(kl_ptr + place)
            x_ref = load_block(at_place(ref_logits, place, inner), block * BLOCK_V, ref_stride_v, V, DTYPE, BLOCK_V, "")
            logp = x * scale - finite_or_zero(lse)
            log_ratio = logp - (x_ref * scale - tl.load(ref_lse_ptr + place).to(DTYPE))
            p = tl.exp(logp)
            dx += tl.where(p > 0, g_kl * p * (log_ratio - kl) * scale, 0.0)
        tl.store(target, dx.to(dlogits_ptr.dtype.element_ty), mask=v < V)
    else:
        tl.store(target, tl.zeros((BLOCK_V,), dlogits_ptr.dtype.element_ty), mask=v < V)


def bwd_out(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    ref_lse: Tensor,
    entropy: Tensor,
    kl: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    temperature: float,
    dlogits: Tensor,
) -> None:
    """`dlogits` may be the logits themselves: no program reads what another writes."""
    block, warps = block_of(logits)
    launch(
        _policy_ref_logprobs_bwd_kernel,
        (tokens.numel(), triton.cdiv(logits.shape[-1], block)),
        rows(logits, 1),
        logits.stride(-1),
        rows(ref_logits, 1),
        ref_logits.stride(-1),
        rows(tokens),
        rows(mask),
        inner(tokens),
        logits.shape[-1],
        1 / temperature,
        *(x.contiguous() for x in (lse, ref_lse, entropy, kl)),
        rows(grad_logprobs),
        rows(grad_entropy),
        rows(grad_kl),
        dlogits,
        warps=warps,
        BLOCK_V=block,
    )


def bwd(logits: Tensor, *rest: Any) -> Tensor:
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    bwd_out(*[logits, *rest, dlogits])
    return dlogits

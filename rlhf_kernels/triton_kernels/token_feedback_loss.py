"""token_feedback_loss: one pass over both rows for the sums, the gradient while they are in the cache."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import check_range, compute_dtype
from ..stats import TokenFeedbackStats
from .common import at_place, expm1, finite_or_zero, inner, launch, log1p, number, power_of_2, registers_for, rows
from .policy_ref_logprobs import kl_from_sums, pair_sums
from .token_logprobs import block_of, load_block, load_token, logprob_entropy


@triton.jit
def _log1mexp(x):
    """log(1 − exp(x)) for x ≤ 0 without cancellation (Mächler 2012)."""
    near = x > -0.6931471805599453
    return tl.where(near, tl.log(-expm1(tl.where(near, x, -1.0))), log1p(-tl.exp(tl.where(near, -1.0, x))))


@triton.jit
def _token_feedback_loss_fwd_kernel(
    logits,
    stride_v,
    ref_logits,
    ref_stride_v,
    tokens,
    labels,
    inner,
    V,
    beta: tl.float64,
    count_ptr,
    terms_ptr,
    logprobs_ptr,
    kl_ptr,
    dlogits_ptr,
    BANDIT: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """dz = a·p − b·q − c·1[v = token], with (a, b, c) from the token's own row."""
    place = tl.program_id(0)
    DTYPE: tl.constexpr = terms_ptr.dtype.element_ty
    zero = number(0.0, DTYPE)
    term, logprob, kl, lse, ref_lse, a, b, c = zero, zero, zero, zero, zero, zero, zero, zero
    token, valid, outside = load_token(tokens, None, place, inner, V)
    row, ref_row = at_place(logits, place, inner), at_place(ref_logits, place, inner)
    if valid:
        one, anchor = number(1.0, DTYPE), number(beta, DTYPE)
        label = tl.load(at_place(labels, place, inner)).to(DTYPE)
        m_ref, s_ref, _, m, s, gap = pair_sums(
            ref_row, ref_stride_v, row, stride_v, V, one, zero, BLOCK_V, "evict_last" if GRADIENT else ""
        )
        logprob, _, lse = logprob_entropy(tl.load(row + token * stride_v).to(DTYPE), m, s, zero, outside)
        ref_chosen = tl.load(ref_row + token * ref_stride_v).to(DTYPE)
        ref_logprob, _, ref_lse = logprob_entropy(ref_chosen, m_ref, s_ref, zero, outside)
        kl = kl_from_sums(s_ref, s, gap)
        if BANDIT:
            # The target is the reference tilted at one token, so KL(target ‖ π) follows from KL(ref ‖ π).
            tilt = label / anchor
            rest, tilted = _log1mexp(ref_logprob), ref_logprob + tilt
            log_total = tl.maximum(rest, tilted) + log1p(tl.exp(-tl.abs(rest - tilted)))
            target, untilted = tl.exp(tilted - log_total), tl.exp(ref_logprob - log_total)
            moved = tl.where(ref_logprob == float("-inf"), 0.0, (target - untilted) * (ref_logprob - logprob))
            moved += tl.where(target > 0, target * tilt, 0.0)
            term = tl.exp(-log_total) * kl + moved - log_total
            a, b, c = one, tl.exp(-log_total), target - untilted
        else:
            bounded = tl.minimum(logprob, -1e-6)
            unlikely = _log1mexp(bounded)
            term = tl.where(label > 0, -label * logprob, label * unlikely)
            push = tl.where(label > 0, label, label * tl.exp(bounded - unlikely))
            term = tl.where(label == 0, anchor * kl, term)
            a, b = tl.where(label == 0, anchor, push), tl.where(label == 0, anchor, 0.0)
            c = tl.where(label == 0, 0.0, push)
    tl.store(terms_ptr + place, term)
    tl.store(logprobs_ptr + place, logprob)
    tl.store(kl_ptr + place, kl)
    if GRADIENT:
        total = tl.maximum(tl.load(count_ptr), 1).to(DTYPE)
        target = dlogits_ptr + place.to(tl.int64) * V
        blocks = tl.cdiv(V, BLOCK_V)
        for k in range(blocks):
            start = (blocks - 1 - k) * BLOCK_V  # downwards: the end of the row was read last
            v = start + tl.arange(0, BLOCK_V)
            dx = tl.zeros((BLOCK_V,), DTYPE)
            if valid:
                x = load_block(row, start, stride_v, V, DTYPE, BLOCK_V, "evict_first")
                q = tl.exp(load_block(ref_row, start, ref_stride_v, V, DTYPE, BLOCK_V, "evict_first") - ref_lse)
                dz = a * tl.exp(x - finite_or_zero(lse)) - b * q - tl.where(v == token, c, 0.0)
                dx = tl.where(x == float("-inf"), 0.0, dz / total)
            tl.store(target + v, dx.to(dlogits_ptr.dtype.element_ty), mask=v < V)


@triton.jit
def _token_feedback_stats_kernel(
    tokens, labels, inner, N, terms_ptr, logprobs_ptr, kl_ptr, loss_ptr, stats_ptr, BLOCK: tl.constexpr
):
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    zero = number(0.0, DTYPE)
    count, loss, kl, good, bad, logprobs_good, logprobs_bad = zero, zero, zero, zero, zero, zero, zero
    for start in range(0, N, BLOCK):
        place = start + tl.arange(0, BLOCK)
        valid = tl.load(at_place(tokens, place, inner), mask=place < N, other=-1) >= 0
        label = tl.load(at_place(labels, place, inner), mask=valid, other=0.0).to(DTYPE)
        logprob = tl.load(logprobs_ptr + place, mask=valid, other=0.0)
        count += tl.sum(valid.to(DTYPE), 0)
        loss += tl.sum(tl.load(terms_ptr + place, mask=valid, other=0.0), 0)
        kl += tl.sum(tl.load(kl_ptr + place, mask=valid, other=0.0), 0)
        good += tl.sum((label > 0).to(DTYPE), 0)
        bad += tl.sum((label < 0).to(DTYPE), 0)
        logprobs_good += tl.sum(tl.where(label > 0, logprob, 0.0), 0)
        logprobs_bad += tl.sum(tl.where(label < 0, logprob, 0.0), 0)
    n = tl.maximum(count, 1.0)
    tl.store(loss_ptr, loss / n)
    tl.store(stats_ptr, logprobs_good / tl.maximum(good, 1.0))
    tl.store(stats_ptr + 1, logprobs_bad / tl.maximum(bad, 1.0))
    tl.store(stats_ptr + 2, kl / n)
    tl.store(stats_ptr + 3, count)


def fwd(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, labels: Tensor, beta: float, kind: str, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dlogits = torch.empty(logits.shape if with_grad else 0, dtype=logits.dtype, device=logits.device)
    arguments = (logits, ref_logits, tokens, labels, beta, kind)
    return *fwd_out(*arguments, dlogits if with_grad else None), dlogits


def fwd_out(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, labels: Tensor, beta: float, kind: str, dlogits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`dlogits` may be the logits themselves: a block is written after it has been read for the last time."""
    valid = tokens >= 0
    check_range("token_logprobs", tokens, valid, logits.shape[-1])
    dtype = compute_dtype(logits)
    loss, stats = logits.new_empty((), dtype=dtype), logits.new_empty(len(TokenFeedbackStats._fields), dtype=dtype)
    terms, logprobs, kl = logits.new_empty(3, tokens.numel(), dtype=dtype).unbind()
    block, warps = block_of(logits)
    launch(
        _token_feedback_loss_fwd_kernel,
        (tokens.numel(),),
        rows(logits, 1),
        logits.stride(-1),
        rows(ref_logits, 1),
        ref_logits.stride(-1),
        rows(tokens),
        rows(labels),
        inner(tokens),
        logits.shape[-1],
        beta,
        valid.sum(),
        terms,
        logprobs,
        kl,
        dlogits,
        warps=warps,
        registers=registers_for(terms),
        BANDIT=kind == "bandit",
        GRADIENT=dlogits is not None,
        BLOCK_V=block,
    )
    per_token = (rows(tokens), rows(labels), inner(tokens), tokens.numel(), terms, logprobs, kl)
    size = power_of_2(tokens.numel(), 128, 2048)
    launch(_token_feedback_stats_kernel, (1,), *per_token, loss, stats, BLOCK=size)
    return loss, stats

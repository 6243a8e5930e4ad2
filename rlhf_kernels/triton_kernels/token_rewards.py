"""token_rewards: one program a row; a first loop finds the attention's mass and the last place, a second pays out."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from .common import at, kl_estimate, launch, log_difference, number, rows
from .gae import block_of, load_valid


@triton.jit
def row_credit(attention, mask, tokens, row, T, DTYPE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Σ attention over the places that count, their number, and the last of them (−1 if there is none)."""
    total, count = number(0.0, DTYPE), number(0.0, DTYPE)
    last = tl.full([], -1, tl.int32)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        valid = load_valid(mask, tokens, row, t, T)
        count += tl.sum(valid.to(DTYPE), 0)
        last = tl.maximum(last, tl.max(tl.where(valid, t, -1), 0))
        if attention is not None:
            total += tl.sum(tl.load(at(attention, row, t), mask=valid, other=0.0).to(DTYPE), 0)
    return total, count, last


@triton.jit
def row_score(scores, row, DTYPE: tl.constexpr, PER_TOKEN: tl.constexpr):
    """The score that a row spreads, 0 where each token has its own."""
    score = number(0.0, DTYPE)
    if not PER_TOKEN:
        score = tl.load(at(scores, row, row * 0)).to(DTYPE)
    return score


@triton.jit
def tile_rewards(
    scores,
    score,
    logprobs,
    ref_logprobs,
    attention,
    valid,
    row,
    t,
    total,
    count,
    last,
    kl_coef,
    beta,
    DTYPE: tl.constexpr,
    KL_ESTIMATOR: tl.constexpr,
    PER_TOKEN: tl.constexpr,
):
    """Rewards and KL estimates of one tile; both 0 where masked."""
    logprob = tl.load(at(logprobs, row, t), mask=valid, other=0.0).to(DTYPE)
    ref_logprob = tl.load(at(ref_logprobs, row, t), mask=valid, other=0.0).to(DTYPE)
    kl = kl_estimate(log_difference(logprob, ref_logprob), KL_ESTIMATOR)
    kl = tl.where(valid, kl, 0.0)
    if PER_TOKEN:
        credit = tl.load(at(scores, row, t), mask=valid, other=0.0).to(DTYPE)
    else:
        credit = tl.where(t == last, score, 0.0)
    if attention is not None:
        usable = (total >= 1e-12) & (total < float("inf"))
        weight = tl.load(at(attention, row, t), mask=valid, other=0.0).to(DTYPE) / tl.where(usable, total, 1.0)
        weight = tl.where(usable, weight, 1.0 / tl.maximum(count, 1.0))
        credit = (1.0 - beta) * credit + tl.where(valid, beta * weight * score, 0.0)
    return credit - kl_coef * kl, kl


@triton.jit
def _token_rewards_kernel(
    scores,
    logprobs,
    ref_logprobs,
    attention,
    mask,
    T,
    kl_coef: tl.float64,
    beta: tl.float64,
    rewards_ptr,
    kl_ptr,
    KL_ESTIMATOR: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    row = tl.program_id(0)
    DTYPE: tl.constexpr = rewards_ptr.dtype.element_ty
    total, count, last = row_credit(attention, mask, None, row, T, DTYPE, BLOCK_T)
    score = row_score(scores, row, DTYPE, PER_TOKEN)
    coef, mix = number(kl_coef, DTYPE), number(beta, DTYPE)
    for start in range(0, T, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        valid = load_valid(mask, None, row, t, T)
        reward, kl = tile_rewards(
            scores,
            score,
            logprobs,
            ref_logprobs,
            attention,
            valid,
            row,
            t,
            total,
            count,
            last,
            coef,
            mix,
            DTYPE,
            KL_ESTIMATOR,
            PER_TOKEN,
        )
        target = row.to(tl.int64) * T + t
        tl.store(rewards_ptr + target, reward, mask=t < T)
        tl.store(kl_ptr + target, kl, mask=t < T)


def score_rows(scores: Tensor) -> tuple[Tensor, int, int]:
    """scores [B] or [B, T] as a `Rows` tuple."""
    return scores, scores.stride(0), scores.stride(1) if scores.ndim == 2 else 0


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    mask: Tensor,
    kl_coef: float,
    beta: float,
    kl_estimator: str,
) -> tuple[Tensor, Tensor]:
    rewards = logprobs.new_empty(logprobs.shape, dtype=compute_dtype(logprobs))
    kl = torch.empty_like(rewards)
    block, warps = block_of(logprobs.shape[1])
    launch(
        _token_rewards_kernel,
        (logprobs.shape[0] if logprobs.numel() else 0,),
        score_rows(scores),
        rows(logprobs),
        rows(ref_logprobs),
        rows(attention),
        rows(mask),
        logprobs.shape[1],
        kl_coef,
        beta,
        rewards,
        kl,
        warps=warps,
        KL_ESTIMATOR=kl_estimator,
        PER_TOKEN=scores.ndim == 2,
        BLOCK_T=block,
    )
    return rewards, kl

"""rrhf_loss: one launch where a tile holds every response, else one a step with [K] buffers between them.

SUMS: each response's log-probability; PAIRS: each against all of its prompt; GRADIENT: needs the number of prompts.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from ..stats import RRHFStats
from .common import at, launch, number, power_of_2, rows

BLOCK = tl.constexpr(64)
RIVALS = tl.constexpr(32)  # at a time, where there are several tiles
SINGLE = 1 << 17  # elements that one program goes through faster than two more launches start


@triton.jit
def _pairs(p, score, prompt, candidate, i, other_p, other_score, other_prompt, other_candidate, j, DTYPE: tl.constexpr):
    """Of responses i against j: the ranking loss, wrong pairs with i as the worse and as the better one, pairs, pairs
    in the right order, and whether an earlier candidate or a better one (the first of equals) exists."""
    rivals = (prompt[:, None] == other_prompt[None, :]) & candidate[:, None] & other_candidate[None, :]
    worse, better = rivals & (score[:, None] < other_score[None, :]), rivals & (score[:, None] > other_score[None, :])
    gap = p[:, None] - other_p[None, :]
    wrong, wronged = worse & (gap > 0), better & (gap < 0)
    earlier = rivals & (j[None, :] < i[:, None])
    ahead = worse | (earlier & (score[:, None] == other_score[None, :]))
    return (
        tl.sum(tl.where(wrong, gap, 0.0), 1),
        tl.sum(wrong.to(DTYPE), 1) - tl.sum(wronged.to(DTYPE), 1),
        tl.sum(worse.to(DTYPE), 1),
        tl.sum((worse & (gap < 0)).to(DTYPE), 1),
        tl.sum(earlier.to(DTYPE), 1),
        tl.sum(ahead.to(DTYPE), 1),
    )


@triton.jit
def _load_score(scores, j, there):
    """In fp64 where the scores are, whatever the log-probabilities: rounding would make ties."""
    SCORE: tl.constexpr = tl.float64 if scores[0].dtype.element_ty == tl.float64 else tl.float32
    return tl.load(scores[0] + j.to(tl.int64) * scores[1], mask=there, other=0.0).to(SCORE)


@triton.jit
def _load_responses(scores, prompts, sums_ptr, j, K):
    """p, score, prompt, candidates; sums_ptr holds p, Σ logprobs, 1 / length^power, candidate as [4, K]."""
    there = j < K
    score = _load_score(scores, j, there)
    prompt = tl.load(prompts[0] + j.to(tl.int64) * prompts[1], mask=there, other=0)
    p = tl.load(sums_ptr + j, mask=there, other=0.0)
    candidate = tl.load(sums_ptr + 3 * K + j, mask=there, other=0.0) > 0
    return p, score, prompt, candidate


@triton.jit
def _rrhf_loss_fwd_kernel(
    logprobs,
    scores,
    prompts,
    mask,
    K,
    T,
    rank_coef: tl.float64,
    sft_coef: tl.float64,
    length_power: tl.float64,
    sums_ptr,
    slopes_ptr,
    partials_ptr,
    TILES,
    loss_ptr,
    stats_ptr,
    dlogprobs_ptr,
    SUMS: tl.constexpr,
    PAIRS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    tile = tl.program_id(0)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    if SUMS:
        sums, counted = tl.zeros((BLOCK, BLOCK_T), DTYPE), tl.zeros((BLOCK, BLOCK_T), DTYPE)
        for start in range(0, T, BLOCK_T):
            t = start + tl.arange(0, BLOCK_T)
            inside = (i < K)[:, None] & (t < T)[None, :]
            counts = tl.load(at(mask, i[:, None], t[None, :]), mask=inside, other=0) != 0
            sums += tl.load(at(logprobs, i[:, None], t[None, :]), mask=counts, other=0.0).to(DTYPE)
            counted += counts.to(DTYPE)
        summed, length = tl.sum(sums, 1), tl.sum(counted, 1)
        score = _load_score(scores, i, i < K)
        prompt = tl.load(prompts[0] + i.to(tl.int64) * prompts[1], mask=i < K, other=0)
        candidate = (length > 0) & (score == score)
        scale = tl.exp(-number(length_power, DTYPE) * tl.log(tl.maximum(length, 1.0)))
        p = summed * scale
        if not PAIRS:
            tl.store(sums_ptr + i, p, mask=i < K)
            tl.store(sums_ptr + K + i, summed, mask=i < K)
            tl.store(sums_ptr + 2 * K + i, scale, mask=i < K)
            tl.store(sums_ptr + 3 * K + i, candidate.to(DTYPE), mask=i < K)
    elif PAIRS:
        p, score, prompt, candidate = _load_responses(scores, prompts, sums_ptr, i, K)
        summed = tl.load(sums_ptr + K + i, mask=i < K, other=0.0)
        scale = tl.load(sums_ptr + 2 * K + i, mask=i < K, other=0.0)
    if PAIRS:
        if SUMS:
            rank, wrong, pairs, right, earlier, ahead = _pairs(
                p, score, prompt, candidate, i, p, score, prompt, candidate, i, DTYPE
            )
        else:
            rank, wrong, pairs = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
            right, earlier, ahead = rank, rank, rank
            for first in range(0, K, RIVALS):
                j = first + tl.arange(0, RIVALS)
                other_p, other_score, other_prompt, other_candidate = _load_responses(scores, prompts, sums_ptr, j, K)
                a, b, c, d, e, f = _pairs(
                    p, score, prompt, candidate, i, other_p, other_score, other_prompt, other_candidate, j, DTYPE
                )
                rank, wrong, pairs, right, earlier, ahead = (
                    rank + a,
                    wrong + b,
                    pairs + c,
                    right + d,
                    earlier + e,
                    ahead + f,
                )
        best = candidate & (ahead == 0)
        prompts_ = tl.sum((candidate & (earlier == 0)).to(DTYPE), 0)
        ranks, likelihood = tl.sum(rank, 0), tl.sum(tl.where(best, summed, 0.0), 0)
        pairs_, rights = tl.sum(pairs, 0), tl.sum(right, 0)
        slope = number(rank_coef, DTYPE) * wrong * scale - tl.where(best, number(sft_coef, DTYPE), 0.0)
        if not GRADIENT:
            tl.store(slopes_ptr + i, slope, mask=i < K)
            tl.store(partials_ptr + tile, prompts_)
            tl.store(partials_ptr + TILES + tile, ranks)
            tl.store(partials_ptr + 2 * TILES + tile, likelihood)
            tl.store(partials_ptr + 3 * TILES + tile, pairs_)
            tl.store(partials_ptr + 4 * TILES + tile, rights)
    if GRADIENT:
        if not PAIRS:
            part = tl.arange(0, BLOCK_TILES)
            there = part < TILES
            prompts_ = tl.sum(tl.load(partials_ptr + part, mask=there, other=0.0), 0)
            ranks = tl.sum(tl.load(partials_ptr + TILES + part, mask=there, other=0.0), 0)
            likelihood = tl.sum(tl.load(partials_ptr + 2 * TILES + part, mask=there, other=0.0), 0)
            pairs_ = tl.sum(tl.load(partials_ptr + 3 * TILES + part, mask=there, other=0.0), 0)
            rights = tl.sum(tl.load(partials_ptr + 4 * TILES + part, mask=there, other=0.0), 0)
            slope = tl.load(slopes_ptr + i, mask=i < K, other=0.0)
        count = tl.maximum(prompts_, 1.0)
        if dlogprobs_ptr is not None:
            for start in range(0, T, BLOCK_T):
                t = start + tl.arange(0, BLOCK_T)
                inside = (i < K)[:, None] & (t < T)[None, :]
                counts = tl.load(at(mask, i[:, None], t[None, :]), mask=inside, other=0) != 0
                gradient = tl.where(counts, (slope / count)[:, None], 0.0)
                target = dlogprobs_ptr + i.to(tl.int64)[:, None] * T + t[None, :]
                tl.store(target, gradient.to(dlogprobs_ptr.dtype.element_ty), mask=inside)
        if tile == 0:
            rank_loss, sft_loss = ranks / count, -likelihood / count
            tl.store(loss_ptr, number(rank_coef, DTYPE) * rank_loss + number(sft_coef, DTYPE) * sft_loss)
            tl.store(stats_ptr, rank_loss)
            tl.store(stats_ptr + 1, sft_loss)
            tl.store(stats_ptr + 2, rights / tl.maximum(pairs_, 1.0))
            tl.store(stats_ptr + 3, prompts_)


def fwd(
    logprobs: Tensor,
    scores: Tensor,
    prompts: Tensor,
    mask: Tensor,
    rank_coef: float,
    sft_coef: float,
    length_power: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    (k, columns), dtype = logprobs.shape, compute_dtype(logprobs)
    loss, stats = logprobs.new_empty((), dtype=dtype), logprobs.new_empty(len(RRHFStats._fields), dtype=dtype)
    dlogprobs = logprobs.new_empty(logprobs.shape if with_grad else 0)
    tiles = max(triton.cdiv(k, BLOCK.value), 1)
    single = tiles == 1 and logprobs.numel() <= SINGLE
    sums = loss.new_empty(4, 0 if single else k)
    slopes, partials = loss.new_empty(sums.shape[1]), loss.new_empty(5, tiles)
    steps = ((True, True, True),) if single else ((True, False, False), (False, True, False), (False, False, True))
    for with_sums, with_pairs, with_gradient in steps:
        launch(
            _rrhf_loss_fwd_kernel,
            (tiles,),
            rows(logprobs),
            (scores, scores.stride(0)),
            (prompts, prompts.stride(0)),
            rows(mask),
            k,
            columns,
            rank_coef,
            sft_coef,
            length_power,
            sums,
            slopes,
            partials,
            tiles,
            loss,
            stats,
            dlogprobs if with_grad else None,
            warps=8,
            SUMS=with_sums,
            PAIRS=with_pairs,
            GRADIENT=with_gradient,
            BLOCK_T=power_of_2(columns, 16, 64),
            BLOCK_TILES=power_of_2(tiles, 1, 1 << 20),
        )
    return loss, stats, dlogprobs

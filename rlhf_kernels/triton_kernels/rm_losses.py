"""Reward-model losses: comparisons of all with all in tiles, in one launch where one tile holds everything.

The kernels have two steps, SUMS over tiles of pairs or responses, and GRADIENT over tiles of scores, which needs the
sums of all tiles. A launch that does both keeps everything in registers.
"""

import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from ..stats import RMListwiseStats, RMPairwiseStats, RMRegressionStats
from .common import block_moments, launch, merge_moments, number, power_of_2, sigmoid, softplus

BLOCK = tl.constexpr(64)
RIVALS = tl.constexpr(32)  # of a listwise tile at a time


@triton.jit
def _load(x, i, N, DTYPE: tl.constexpr):
    return tl.load(x[0] + i.to(tl.int64) * x[1], mask=i < N, other=0).to(DTYPE)


@triton.jit
def _sum_partials(partials_ptr, channel, TILES, BLOCK_TILES: tl.constexpr):
    tile = tl.arange(0, BLOCK_TILES)
    return tl.sum(tl.load(partials_ptr + channel * TILES + tile, mask=tile < TILES, other=0.0), 0)


def _strided(*tensors: Tensor | None) -> list[tuple[Tensor, int] | None]:
    return [None if x is None else (x, x.stride(0)) for x in tensors]


@triton.jit
def _score_at(scores, index, there, K, DTYPE: tl.constexpr):
    """The scores of pairs; NaN for an index that is none."""
    inside = (index >= 0) & (index < K)
    score = tl.load(scores[0] + index * scores[1], mask=there & inside, other=0.0).to(DTYPE)
    return tl.where(there & ~inside, float("nan"), score)


@triton.jit
def _rm_pairwise_loss_fwd_kernel(
    scores,
    chosen,
    rejected,
    prompts,
    margin,
    center_coef: tl.float64,
    K,
    P,
    pushes_ptr,
    centers_ptr,
    partials_ptr,
    TILES,
    loss_ptr,
    stats_ptr,
    dscores_ptr,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    tile = tl.program_id(0)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    if SUMS:
        there = i < P
        winner, loser = _load(chosen, i, P, tl.int64), _load(rejected, i, P, tl.int64)
        better, worse = _score_at(scores, winner, there, K, DTYPE), _score_at(scores, loser, there, K, DTYPE)
        difference, both, required = better - worse, better + worse, better - worse
        if margin is not None:
            required = difference - _load(margin, i, P, DTYPE)
        weight, distinct = tl.where(there, 1.0, 0.0).to(DTYPE), there.to(DTYPE)
        if prompts is not None:  # each pair weighs 1 / the pairs of its prompt; the first of them stands for the prompt
            prompt = _load(prompts, i, P, tl.int64)
            count = tl.zeros((BLOCK,), DTYPE)
            earlier = tl.zeros((BLOCK,), DTYPE)
            for first in range(0, P, BLOCK):
                j = first + tl.arange(0, BLOCK)
                same = (prompt[:, None] == _load(prompts, j, P, tl.int64)[None, :]) & (j < P)[None, :]
                count += tl.sum(same.to(DTYPE), 1)
                earlier += tl.sum((same & (j[None, :] < i[:, None])).to(DTYPE), 1)
            weight = tl.where(there, 1.0 / tl.maximum(count, 1.0), 0.0)
            distinct = tl.where(there & (earlier == 0), 1.0, 0.0).to(DTYPE)
        coef = number(center_coef, DTYPE)
        push, center = -sigmoid(-required) * weight, 2.0 * coef * both * weight
        n = tl.sum(distinct, 0)
        loss = tl.sum(weight * (softplus(-required) + coef * both * both), 0)
        right = tl.sum(tl.where(difference > 0, weight, 0.0), 0)
        differences, betters, worses = (
            tl.sum(weight * difference, 0),
            tl.sum(weight * better, 0),
            tl.sum(weight * worse, 0),
        )
        if not GRADIENT:
            tl.store(pushes_ptr + i, push, mask=there)
            tl.store(centers_ptr + i, center, mask=there)
            tl.store(partials_ptr + tile, n)
            tl.store(partials_ptr + TILES + tile, loss)
            tl.store(partials_ptr + 2 * TILES + tile, right)
            tl.store(partials_ptr + 3 * TILES + tile, differences)
            tl.store(partials_ptr + 4 * TILES + tile, betters)
            tl.store(partials_ptr + 5 * TILES + tile, worses)
    elif GRADIENT:
        n = _sum_partials(partials_ptr, 0, TILES, BLOCK_TILES)
        loss = _sum_partials(partials_ptr, 1, TILES, BLOCK_TILES)
        right = _sum_partials(partials_ptr, 2, TILES, BLOCK_TILES)
        differences = _sum_partials(partials_ptr, 3, TILES, BLOCK_TILES)
        betters = _sum_partials(partials_ptr, 4, TILES, BLOCK_TILES)
        worses = _sum_partials(partials_ptr, 5, TILES, BLOCK_TILES)
    if GRADIENT:
        total = tl.maximum(n, 1.0)
        if dscores_ptr is not None:
            gradient = tl.zeros((BLOCK,), DTYPE)
            if SUMS:
                won = (winner[None, :] == i[:, None]) & there[None, :]
                lost = (loser[None, :] == i[:, None]) & there[None, :]
                gradient += tl.sum(tl.where(won, (center + push)[None, :], 0.0), 1)
                gradient += tl.sum(tl.where(lost, (center - push)[None, :], 0.0), 1)
            else:
                for first in range(0, P, BLOCK):
                    j = first + tl.arange(0, BLOCK)
                    push = tl.load(pushes_ptr + j, mask=j < P, other=0.0)
                    center = tl.load(centers_ptr + j, mask=j < P, other=0.0)
                    won = _load(chosen, j, P, tl.int64)[None, :] == i[:, None]
                    lost = _load(rejected, j, P, tl.int64)[None, :] == i[:, None]
                    gradient += tl.sum(tl.where(won, (center + push)[None, :], 0.0), 1)
                    gradient += tl.sum(tl.where(lost, (center - push)[None, :], 0.0), 1)
            tl.store(dscores_ptr + i, (gradient / total).to(dscores_ptr.dtype.element_ty), mask=i < K)
        if tile == 0:
            tl.store(loss_ptr, loss / total)
            tl.store(stats_ptr, right / total)
            tl.store(stats_ptr + 1, differences / total)
            tl.store(stats_ptr + 2, betters / total)
            tl.store(stats_ptr + 3, worses / total)


def pairwise_fwd(
    scores: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    prompts: Tensor | None,
    margin: Tensor | None,
    center_coef: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    k, p = len(scores), len(chosen)
    dtype = compute_dtype(scores)
    loss, stats = scores.new_empty((), dtype=dtype), scores.new_empty(len(RMPairwiseStats._fields), dtype=dtype)
    dscores = scores.new_empty(scores.shape if with_grad else 0)
    tiles, score_tiles = max(triton.cdiv(p, BLOCK.value), 1), max(triton.cdiv(k, BLOCK.value), 1)
    single = tiles == score_tiles == 1
    pushes, centers = loss.new_empty(2, 0 if single else p).unbind()
    partials = loss.new_empty(6, tiles)
    for sums, gradient in ((True, True),) if single else ((True, False), (False, True)):
        launch(
            _rm_pairwise_loss_fwd_kernel,
            (tiles if sums else score_tiles if with_grad else 1,),
            *_strided(scores, chosen, rejected, prompts, margin),
            center_coef,
            k,
            p,
            pushes,
            centers,
            partials,
            tiles,
            loss,
            stats,
            dscores if with_grad else None,
            warps=8,
            SUMS=sums,
            GRADIENT=gradient,
            BLOCK_TILES=power_of_2(tiles, 1, 1 << 20),
        )
    return loss, stats, dscores


@triton.jit
def _rivals(rank, prompt, i, other_rank, other_prompt, j, K):
    """[i, j]: of one prompt; and i was ranked above j. Padding is no one's rival."""
    same = (prompt[:, None] == other_prompt[None, :]) & (i < K)[:, None] & (j < K)[None, :]
    return same, same & (rank[:, None] < other_rank[None, :])


@triton.jit
def _rm_listwise_loss_fwd_kernel(
    scores,
    ranks,
    prompts,
    K,
    lse_ptr,
    partials_ptr,
    TILES,
    loss_ptr,
    stats_ptr,
    dscores_ptr,
    SUMS: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK_TILES: tl.constexpr,
):
    tile = tl.program_id(0)
    i = tile * BLOCK + tl.arange(0, BLOCK)
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    score, rank, prompt = _load(scores, i, K, DTYPE), _load(ranks, i, K, tl.int64), _load(prompts, i, K, tl.int64)
    if SUMS:
        highest = score  # a response is in its own denominator, a tie is in neither's
        total, right = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
        above, below, higher, earlier = total, total, total, total
        for first in range(0, K, RIVALS):
            j = first + tl.arange(0, RIVALS)
            other, other_rank = _load(scores, j, K, DTYPE), _load(ranks, j, K, tl.int64)
            same, beats = _rivals(rank, prompt, i, other_rank, _load(prompts, j, K, tl.int64), j, K)
            highest = tl.maximum(highest, tl.max(tl.where(beats, other[None, :], float("-inf")), 1))
        for first in range(0, K, RIVALS):
            j = first + tl.arange(0, RIVALS)
            other, other_rank = _load(scores, j, K, DTYPE), _load(ranks, j, K, tl.int64)
            same, beats = _rivals(rank, prompt, i, other_rank, _load(prompts, j, K, tl.int64), j, K)
            total += tl.sum(tl.where(beats, tl.exp(other[None, :] - highest[:, None]), 0.0), 1)
            right += tl.sum((beats & (score[:, None] > other[None, :])).to(DTYPE), 1)
            above += tl.sum(beats.to(DTYPE), 1)
            below += tl.sum((same & (other_rank[None, :] < rank[:, None])).to(DTYPE), 1)
            higher += tl.sum((same & (other[None, :] > score[:, None])).to(DTYPE), 1)
            earlier += tl.sum((same & (j[None, :] < i[:, None])).to(DTYPE), 1)
        there = i < K
        lse = highest + tl.log(total + tl.exp(score - highest))
        best = there & (above > 0) & (below == 0)
        n = tl.sum((there & (earlier == 0)).to(DTYPE), 0)
        loss = tl.sum(tl.where(there, lse - score, 0.0), 0)
        rights, pairs_ = tl.sum(right, 0), tl.sum(above, 0)
        bests, tops = tl.sum(best.to(DTYPE), 0), tl.sum((best & (higher == 0)).to(DTYPE), 0)
        if not GRADIENT:
            tl.store(lse_ptr + i, lse, mask=there)
            tl.store(partials_ptr + tile, n)
            tl.store(partials_ptr + TILES + tile, loss)
            tl.store(partials_ptr + 2 * TILES + tile, rights)
            tl.store(partials_ptr + 3 * TILES + tile, pairs_)
            tl.store(partials_ptr + 4 * TILES + tile, bests)
            tl.store(partials_ptr + 5 * TILES + tile, tops)
    elif GRADIENT:
        n = _sum_partials(partials_ptr, 0, TILES, BLOCK_TILES)
        loss = _sum_partials(partials_ptr, 1, TILES, BLOCK_TILES)
        rights = _sum_partials(partials_ptr, 2, TILES, BLOCK_TILES)
        pairs_ = _sum_partials(partials_ptr, 3, TILES, BLOCK_TILES)
        bests = _sum_partials(partials_ptr, 4, TILES, BLOCK_TILES)
        tops = _sum_partials(partials_ptr, 5, TILES, BLOCK_TILES)
    if GRADIENT:
        count = tl.maximum(n, 1.0)
        if dscores_ptr is not None:
            share = tl.zeros((BLOCK,), DTYPE)  # of response i in the denominators of those that beat it, and its own
            if SUMS:
                _, beaten = _rivals(rank, prompt, i, rank, prompt, i, K)
                stands = beaten | (i[:, None] == i[None, :])
                share += tl.sum(tl.where(stands, tl.exp(score[None, :] - lse[:, None]), 0.0), 0)
            else:
                for first in range(0, K, RIVALS):
                    j = first + tl.arange(0, RIVALS)
                    other_rank, other_prompt = _load(ranks, j, K, tl.int64), _load(prompts, j, K, tl.int64)
                    other_lse = tl.load(lse_ptr + j, mask=j < K, other=0.0)
                    same, beaten = _rivals(other_rank, other_prompt, j, rank, prompt, i, K)
                    stands = beaten | ((j[:, None] == i[None, :]) & (j < K)[:, None])
                    share += tl.sum(tl.where(stands, tl.exp(score[None, :] - other_lse[:, None]), 0.0), 0)
            gradient = (share - 1.0) / count
            tl.store(dscores_ptr + i, gradient.to(dscores_ptr.dtype.element_ty), mask=i < K)
        if tile == 0:
            tl.store(loss_ptr, loss / count)
            tl.store(stats_ptr, rights / tl.maximum(pairs_, 1.0))
            tl.store(stats_ptr + 1, tops / tl.maximum(bests, 1.0))


def listwise_fwd(scores: Tensor, ranks: Tensor, prompts: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    k, dtype = len(scores), compute_dtype(scores)
    loss, stats = scores.new_empty((), dtype=dtype), scores.new_empty(len(RMListwiseStats._fields), dtype=dtype)
    dscores = scores.new_empty(scores.shape if with_grad else 0)
    tiles = max(triton.cdiv(k, BLOCK.value), 1)
    lse, partials = loss.new_empty(0 if tiles == 1 else k), loss.new_empty(6, tiles)
    for sums, gradient in ((True, True),) if tiles == 1 else ((True, False), (False, True)):
        launch(
            _rm_listwise_loss_fwd_kernel,
            (tiles if sums or with_grad else 1,),
            *_strided(scores, ranks, prompts),
            k,
            lse,
            partials,
            tiles,
            loss,
            stats,
            dscores if with_grad else None,
            warps=8,
            SUMS=sums,
            GRADIENT=gradient,
            BLOCK_TILES=power_of_2(tiles, 1, 1 << 20),
        )
    return loss, stats, dscores


@triton.jit
def _rm_regression_loss_fwd_kernel(scores, targets, K, loss_ptr, stats_ptr, dscores_ptr, BLOCK_K: tl.constexpr):
    """One program: two walks for the moments and the covariance, the gradient on the second."""
    DTYPE: tl.constexpr = loss_ptr.dtype.element_ty
    zero = number(0.0, DTYPE)
    n, mean, m2, target_n, target_mean, target_m2, squares, errors = zero, zero, zero, zero, zero, zero, zero, zero
    for first in range(0, K, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        score, target = _load(scores, i, K, DTYPE), _load(targets, i, K, DTYPE)
        n_tile, mean_tile, m2_tile = block_moments(score, i < K)
        n, mean, m2 = merge_moments(n, mean, m2, n_tile, mean_tile, m2_tile)
        n_tile, mean_tile, m2_tile = block_moments(target, i < K)
        target_n, target_mean, target_m2 = merge_moments(target_n, target_mean, target_m2, n_tile, mean_tile, m2_tile)
        squares += tl.sum((score - target) * (score - target), 0)
        errors += tl.sum(score - target, 0)
    count, covariance = tl.maximum(n, 1.0), zero
    for first in range(0, K, BLOCK_K):
        i = first + tl.arange(0, BLOCK_K)
        score, target = _load(scores, i, K, DTYPE), _load(targets, i, K, DTYPE)
        covariance += tl.sum(tl.where(i < K, (score - mean) * (target - target_mean), 0.0), 0)
        if dscores_ptr is not None:
            gradient = 2.0 * (score - target) / count
            tl.store(dscores_ptr + i, gradient.to(dscores_ptr.dtype.element_ty), mask=i < K)
    spread = tl.sqrt(m2 * target_m2)
    tl.store(loss_ptr, squares / count)
    tl.store(stats_ptr, tl.where(spread > 0, covariance / tl.where(spread > 0, spread, 1.0), 0.0))
    tl.store(stats_ptr + 1, errors / count)


def regression_fwd(scores: Tensor, targets: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    k, dtype = len(scores), compute_dtype(scores)
    loss, stats = scores.new_empty((), dtype=dtype), scores.new_empty(len(RMRegressionStats._fields), dtype=dtype)
    dscores = scores.new_empty(scores.shape if with_grad else 0)
    outputs = (loss, stats, dscores if with_grad else None)
    block = power_of_2(k, 32, 1024)
    launch(_rm_regression_loss_fwd_kernel, (1,), *_strided(scores, targets), k, *outputs, BLOCK_K=block)
    return loss, stats, dscores

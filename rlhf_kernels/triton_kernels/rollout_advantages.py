"""rollout_advantages: rewards, KL and the reverse scan of a row in one program; whitening over the batch after it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from .common import all_moments, at_place, block_moments, launch, merge_moments, number, power_of_2, rows
from .gae import block_of, load_valid, scan_tile
from .token_rewards import row_credit, row_score, score_rows, tile_rewards

MAX_PROGRAMS = 512  # each leaves its moments behind, and whoever whitens reads them all


@triton.jit
def _rollout_advantages_kernel(
    scores,
    logprobs,
    ref_logprobs,
    attention,
    values,
    mask,
    tokens,
    B,
    T,
    kl_coef: tl.float64,
    beta: tl.float64,
    gamma: tl.float64,
    lam: tl.float64,
    advantages_ptr,
    returns_ptr,
    rewards_ptr,
    kl_ptr,
    moments_ptr,
    KL_ESTIMATOR: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    program, programs = tl.program_id(0), tl.num_programs(0)
    DTYPE: tl.constexpr = advantages_ptr.dtype.element_ty
    zero = number(0.0, DTYPE)
    coef, mix, g, decay = number(kl_coef, DTYPE), number(beta, DTYPE), number(gamma, DTYPE), number(lam, DTYPE)
    n, mean, m2 = zero, zero, zero
    tiles = tl.cdiv(T, BLOCK_T)
    for step in range(tl.cdiv(B - program, programs)):
        row = program + step * programs
        total, count, last = row_credit(attention, mask, tokens, row, T, DTYPE, BLOCK_T)
        score = row_score(scores, row, DTYPE, PER_TOKEN)
        next_value, next_advantage = zero, zero
        for k in range(tiles):
            t = (tiles - 1 - k) * BLOCK_T + tl.arange(0, BLOCK_T)
            valid = load_valid(mask, tokens, row, t, T)
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
            advantage, value, valid, next_value, next_advantage = scan_tile(
                reward, values, mask, tokens, row, t, T, g, decay, next_value, next_advantage, DTYPE
            )
            target = row.to(tl.int64) * T + t
            tl.store(advantages_ptr + target, advantage, mask=t < T)
            tl.store(returns_ptr + target, advantage + value, mask=t < T)
            if rewards_ptr is not None:
                tl.store(rewards_ptr + target, reward, mask=t < T)
                tl.store(kl_ptr + target, kl, mask=t < T)
            if moments_ptr is not None:
                n_tile, mean_tile, m2_tile = block_moments(advantage, valid)
                n, mean, m2 = merge_moments(n, mean, m2, n_tile, mean_tile, m2_tile)
    if moments_ptr is not None:
        tl.store(moments_ptr + program, n)
        tl.store(moments_ptr + programs + program, mean)
        tl.store(moments_ptr + 2 * programs + program, m2)


@triton.jit
def batch_moments(moments_ptr, PROGRAMS, BLOCK_P: tl.constexpr):
    """Number, mean and 1 / standard deviation of the advantages of the whole batch."""
    p = tl.arange(0, BLOCK_P)
    n = tl.load(moments_ptr + p, mask=p < PROGRAMS, other=0.0)
    mean = tl.load(moments_ptr + PROGRAMS + p, mask=p < PROGRAMS, other=0.0)
    m2 = tl.load(moments_ptr + 2 * PROGRAMS + p, mask=p < PROGRAMS, other=0.0)
    n, mean, m2 = all_moments(n, mean, m2)
    return n, mean, 1.0 / tl.sqrt(m2 / tl.maximum(n, 1.0) + 1e-8)


@triton.jit
def _whiten_kernel(advantages_ptr, mask, inner, N, moments_ptr, PROGRAMS, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr):
    _, mean, scale = batch_moments(moments_ptr, PROGRAMS, BLOCK_P)
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = tl.load(at_place(mask, place, inner), mask=place < N, other=0) != 0
    advantage = tl.load(advantages_ptr + place, mask=valid, other=0.0)
    tl.store(advantages_ptr + place, (advantage - mean) * scale, mask=valid)


def by_rows(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    values: Tensor,
    mask: Tensor,
    tokens: Tensor | None,
    kl_coef: float,
    beta: float,
    gamma: float,
    lam: float,
    kl_estimator: str,
    dtype: torch.dtype,
    with_rewards: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]:
    """One launch: raw advantages, returns, rewards, kl, and the advantages' moments [3, programs]."""
    batch, columns = logprobs.shape
    advantages = logprobs.new_empty(logprobs.shape, dtype=dtype)
    returns = torch.empty_like(advantages)
    rewards, kl = (torch.empty_like(advantages), torch.empty_like(advantages)) if with_rewards else (None, None)
    programs = min(batch, MAX_PROGRAMS) if logprobs.numel() else 0
    moments = advantages.new_empty(3, programs)
    block, warps = block_of(columns)
    launch(
        _rollout_advantages_kernel,
        (programs,),
        score_rows(scores),
        rows(logprobs),
        rows(ref_logprobs),
        rows(attention),
        rows(values),
        rows(mask),
        rows(tokens),
        batch,
        columns,
        kl_coef,
        beta,
        gamma,
        lam,
        advantages,
        returns,
        rewards,
        kl,
        moments,
        warps=warps,
        KL_ESTIMATOR=kl_estimator,
        PER_TOKEN=scores.ndim == 2,
        BLOCK_T=block,
    )
    return advantages, returns, rewards, kl, moments


def rollout_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    beta: float,
    gamma: float,
    lam: float,
    kl_estimator: str,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages, returns, rewards, kl, moments = by_rows(
        scores,
        logprobs,
        ref_logprobs,
        attention,
        values,
        mask,
        None,
        kl_coef,
        beta,
        gamma,
        lam,
        kl_estimator,
        compute_dtype(logprobs),
        True,
    )
    assert rewards is not None and kl is not None
    if whiten:  # needs the moments of every row: one more launch, over what the first has left in the L2 cache
        programs, block = moments.shape[1], 1024
        launch(
            _whiten_kernel,
            (triton.cdiv(advantages.numel(), block),),
            advantages,
            rows(mask),
            max(mask.shape[1], 1),
            advantages.numel(),
            moments,
            programs,
            warps=4,
            BLOCK=block,
            BLOCK_P=power_of_2(programs, 16, MAX_PROGRAMS),
        )
    return advantages, returns, rewards, kl

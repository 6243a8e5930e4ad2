"""gae: one program a row, a reverse scan over tiles of the row."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from .common import Rows, at, launch, number, power_of_2, rows

MAX_BLOCK_T = 1024


def block_of(columns: int) -> tuple[int, int]:
    """BLOCK_T and the number of warps for rows of this length."""
    block = power_of_2(columns, 32, MAX_BLOCK_T)
    return block, max(1, block // 128)


@triton.jit
def _after(c, d, c_left, d_left):
    """x → c·x + d, then the same of the place to the left."""
    return c * c_left, d * c_left + d_left


@triton.jit
def load_valid(mask, tokens, row, t, T):
    """Where the mask is True, within the row, and (if there are tokens) the token is not negative."""
    valid = tl.load(at(mask, row, t), mask=(t >= 0) & (t < T), other=0) != 0
    if tokens is not None:
        valid = valid & (tl.load(at(tokens, row, t), mask=valid, other=-1) >= 0)
    return valid


@triton.jit
def scan_tile(reward, values, mask, tokens, row, t, T, gamma, lam, next_value, next_advantage, DTYPE: tl.constexpr):
    """Advantages, values and mask of one tile, and the two carries for the tile to its left.

    Both recurrences are chains of x → c·x + d: the value of the next counting place (c = 0 where a place counts, 1
    where it is stepped over), and the advantage (c = γλ or 1).
    """
    valid = load_valid(mask, tokens, row, t, T)
    value = tl.load(at(values, row, t), mask=valid, other=0.0).to(DTYPE)
    right = load_valid(mask, tokens, row, t + 1, T)
    value_right = tl.load(at(values, row, t + 1), mask=right, other=0.0).to(DTYPE)
    c, d = tl.associative_scan((tl.where(right, 0.0, 1.0).to(DTYPE), value_right), 0, _after, reverse=True)
    following = c * next_value + d
    delta = tl.where(valid, reward + gamma * following - value, 0.0)
    c, d = tl.associative_scan((tl.where(valid, gamma * lam, 1.0).to(DTYPE), delta), 0, _after, reverse=True)
    advantage = c * next_advantage + d
    first = t == tl.min(t, 0)
    next_value = tl.sum(tl.where(first, following, 0.0), 0)
    next_advantage = tl.sum(tl.where(first, advantage, 0.0), 0)
    return tl.where(valid, advantage, 0.0), value, valid, next_value, next_advantage


@triton.jit
def _gae_kernel(
    rewards, values, mask, T, gamma: tl.float64, lam: tl.float64, advantages_ptr, returns_ptr, BLOCK_T: tl.constexpr
):
    row = tl.program_id(0)
    DTYPE: tl.constexpr = advantages_ptr.dtype.element_ty
    next_value, next_advantage = number(0.0, DTYPE), number(0.0, DTYPE)
    g, decay = number(gamma, DTYPE), number(lam, DTYPE)
    tiles = tl.cdiv(T, BLOCK_T)
    for k in range(tiles):
        t = (tiles - 1 - k) * BLOCK_T + tl.arange(0, BLOCK_T)
        reward = tl.load(at(rewards, row, t), mask=load_valid(mask, None, row, t, T), other=0.0).to(DTYPE)
        advantage, value, _, next_value, next_advantage = scan_tile(
            reward, values, mask, None, row, t, T, g, decay, next_value, next_advantage, DTYPE
        )
        target = row.to(tl.int64) * T + t
        tl.store(advantages_ptr + target, advantage, mask=t < T)
        tl.store(returns_ptr + target, advantage + value, mask=t < T)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages = rewards.new_empty(rewards.shape, dtype=compute_dtype(rewards))
    returns = torch.empty_like(advantages)
    block, warps = block_of(rewards.shape[1])
    inputs: list[Rows | None] = [rows(x) for x in (rewards, values, mask)]
    grid = (rewards.shape[0] if rewards.numel() else 0,)
    launch(_gae_kernel, grid, *inputs, rewards.shape[1], gamma, lam, advantages, returns, warps=warps, BLOCK_T=block)
    return advantages, returns

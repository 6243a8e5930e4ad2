"""group_advantages: every response against all others, tile by tile; no sort."""

import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from .common import launch

BLOCK = tl.constexpr(64)


@triton.jit
def _load_tile(scores, groups, j, B, DTYPE: tl.constexpr):
    """Scores, groups, and which are there and not NaN."""
    score = tl.load(scores[0] + j.to(tl.int64) * scores[1], mask=j < B, other=float("nan")).to(DTYPE)
    group = tl.load(groups[0] + j.to(tl.int64) * groups[1], mask=j < B, other=0)
    scored = score == score
    return tl.where(scored, score, 0.0), group, scored


@triton.jit
def _group_advantages_kernel(scores, groups, B, advantages_ptr, KIND: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    DTYPE: tl.constexpr = advantages_ptr.dtype.element_ty
    score, group, scored = _load_tile(scores, groups, i, B, DTYPE)
    count, total = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for first in range(0, B, BLOCK):
        other, other_group, there = _load_tile(scores, groups, first + tl.arange(0, BLOCK), B, DTYPE)
        same = (group[:, None] == other_group[None, :]) & there[None, :]
        count += tl.sum(same.to(DTYPE), 1)
        total += tl.sum(tl.where(same, other[None, :], 0.0), 1)
    mean = total / tl.maximum(count, 1.0)
    centered = tl.where(scored, score - mean, 0.0)
    if KIND == "rloo":
        # R − mean of the others = G / (G − 1) · (R − mean); alone in its group a response has nothing to beat.
        centered = centered * count / tl.maximum(count - 1.0, 1.0)
    if KIND == "grpo":
        squares = tl.zeros((BLOCK,), DTYPE)
        for first in range(0, B, BLOCK):
            other, other_group, there = _load_tile(scores, groups, first + tl.arange(0, BLOCK), B, DTYPE)
            same = (group[:, None] == other_group[None, :]) & there[None, :]
            deviation = tl.where(same, other[None, :] - mean[:, None], 0.0)
            squares += tl.sum(deviation * deviation, 1)
        std = tl.sqrt(squares / tl.maximum(count - 1.0, 1.0))
        # Equal scores leave only rounding in the deviation; dividing by it would blow noise up to advantages of one.
        flat = std < 1e-6 * tl.maximum(tl.abs(mean), 1.0)
        centered = tl.where(flat, 0.0, centered / (std + 1e-4))
    tl.store(advantages_ptr + i, centered, mask=i < B)


def group_advantages(scores: Tensor, groups: Tensor, kind: str) -> Tensor:
    advantages = scores.new_empty(scores.shape, dtype=compute_dtype(scores))
    inputs = ((scores, scores.stride(0)), (groups, groups.stride(0)))
    launch(
        _group_advantages_kernel,
        (triton.cdiv(len(scores), BLOCK.value),),
        *inputs,
        len(scores),
        advantages,
        warps=8,
        KIND=kind,
    )
    return advantages

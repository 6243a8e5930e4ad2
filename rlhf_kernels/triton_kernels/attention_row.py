"""attention_row: scores with every key read once for all its query heads, then the mean of the probabilities."""

import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from .common import at, finite_or_zero, launch, number, power_of_2, rows, tanh

PROGRAMS = 512  # rows are split over T until there are about this many


@triton.jit
def _attention_row_scores_kernel(
    query_ptr,
    query_b,
    query_h,
    query_d,
    key_ptr,
    key_b,
    key_h,
    key_t,
    key_d,
    key_mask,
    HEADS,
    GROUP,
    T,
    D,
    scale: tl.float64,
    softcap: tl.float64,
    window,
    TILES,
    scores_ptr,
    sums_ptr,
    SOFTCAP: tl.constexpr,
    WINDOW: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Scores [B, Hkv, G, T] of one key head's TILES tiles, −inf where not attended, and their max and Σ exp."""
    b, head, split = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
    DTYPE: tl.constexpr = scores_ptr.dtype.element_ty
    g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D)
    q_row = query_ptr + b.to(tl.int64) * query_b + (head * GROUP + g[:, None]).to(tl.int64) * query_h
    q = tl.load(q_row + d[None, :] * query_d, mask=(g[:, None] < GROUP) & (d[None, :] < D), other=0.0)
    key_row = key_ptr + b.to(tl.int64) * key_b + head.to(tl.int64) * key_h
    first = tl.full([], 0, tl.int32)
    if WINDOW:  # the query's own column is the last that it may look at
        for start in range(0, T, 1024):
            t = start + tl.arange(0, 1024)
            there = tl.load(at(key_mask, b, t), mask=t < T, other=0) != 0
            first = tl.maximum(first, tl.max(tl.where(there, t + 1, 0), 0))
        first = first - window
    score_row = tl.program_id(0).to(tl.int64) * GROUP + g[:, None]
    m = tl.full((BLOCK_G,), float("-inf"), DTYPE)
    s = tl.zeros((BLOCK_G,), DTYPE)
    for tile in tl.range(split * TILES, (split + 1) * TILES, num_stages=3):
        t = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        attended = tl.load(at(key_mask, b, t), mask=(t < T) & (t >= first), other=0) != 0
        place = key_row + t[:, None].to(tl.int64) * key_t + d[None, :] * key_d
        k = tl.load(place, mask=attended[:, None] & (d[None, :] < D), other=0.0)
        x = tl.dot(q, tl.trans(k)) if DOT else tl.sum(q.to(DTYPE)[:, None, :] * k.to(DTYPE)[None, :, :], 2)
        x *= number(scale, DTYPE)
        if SOFTCAP:
            x = number(softcap, DTYPE) * tanh(x / number(softcap, DTYPE))
        x = tl.where(attended[None, :], x, float("-inf"))
        tl.store(scores_ptr + score_row * T + t[None, :], x, mask=(g[:, None] < GROUP) & (t[None, :] < T))
        highest = tl.maximum(m, tl.max(x, 1))
        top = finite_or_zero(highest)
        s = s * tl.exp(m - top) + tl.sum(tl.exp(x - top[:, None]), 1)
        m = highest
    sums = sums_ptr + ((tl.program_id(0).to(tl.int64) * GROUP + g) * tl.num_programs(1) + split) * 2
    tl.store(sums, m, mask=g < GROUP)
    tl.store(sums + 1, s, mask=g < GROUP)


@triton.jit
def _attention_row_mean_kernel(
    scores_ptr, sums_ptr, sink, HEADS, T, SPLITS, row_ptr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr
):
    b, t = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    DTYPE: tl.constexpr = row_ptr.dtype.element_ty
    part = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_T,), DTYPE)
    for head in range(HEADS):  # in order: the same bits every time
        sums = sums_ptr + ((b * HEADS + head) * SPLITS + part) * 2
        m = tl.load(sums, mask=part < SPLITS, other=float("-inf"))
        s = tl.load(sums + 1, mask=part < SPLITS, other=0.0)
        highest = tl.max(m, 0)
        extra = number(float("-inf"), DTYPE)
        if sink is not None:
            extra = tl.load(sink[0] + head * sink[1]).to(DTYPE)
            highest = tl.maximum(highest, extra)
        top = finite_or_zero(highest)
        mass = tl.sum(s * tl.exp(m - top), 0) + tl.exp(extra - top)
        x = tl.load(scores_ptr + (b * HEADS + head) * T + t, mask=t < T, other=float("-inf"))
        total += tl.exp(x - top) / tl.where(mass > 0, mass, 1.0)
    tl.store(row_ptr + b * T + t, total / HEADS, mask=t < T)


def attention_row(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor,
    sink: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    batch, query_heads, dim = query.shape
    heads, columns = key.shape[1:3]
    group, dtype = query_heads // heads, compute_dtype(query)
    row = query.new_empty(key_mask.shape, dtype=dtype)
    dot = query.element_size() == 2  # exact products of 16-bit numbers, summed in fp32 by the tensor cores
    block_d = power_of_2(dim, 16, 1024)
    block_g = power_of_2(group, 16 if dot else 1, 1024)
    block_t = 64 if dot else power_of_2(8192 // (block_d * block_g), 1, 64)
    tiles = triton.cdiv(columns, block_t)
    per_split = triton.cdiv(tiles, min(triton.cdiv(PROGRAMS, max(batch * heads, 1)), max(tiles, 1)))
    splits = triton.cdiv(tiles, max(per_split, 1))
    scores = row.new_empty(batch, query_heads, columns)
    sums = row.new_empty(batch, query_heads, splits, 2)
    launch(
        _attention_row_scores_kernel,
        (batch * heads, splits),
        query,
        *query.stride(),
        key,
        *key.stride(),
        rows(key_mask),
        heads,
        group,
        columns,
        dim,
        scale,
        softcap or 0.0,
        window or 0,
        per_split,
        scores,
        sums,
        warps=4,
        SOFTCAP=softcap is not None,
        WINDOW=window is not None,
        DOT=dot,
        BLOCK_G=block_g,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
    )
    block = power_of_2(columns, 32, 512)
    launch(
        _attention_row_mean_kernel,
        (batch, triton.cdiv(columns, block)),
        scores,
        sums,
        None if sink is None else (sink, sink.stride(0)),
        query_heads,
        columns,
        splits,
        row,
        warps=max(1, block // 128),
        BLOCK_S=power_of_2(splits, 1, 1 << 20),
        BLOCK_T=block,
    )
    return row

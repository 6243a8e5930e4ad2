"""attention_row: the attention probabilities of the last query of a layer, mean over heads.

Limit: the keys are read once, B·Hkv·T·D elements, with 2·B·Hq·T·D FLOP on them; at a few query heads a key head, memory
decides. Ours also writes the scores and reads them back for the mean, 8 bytes per query head and column. "full T×T map"
is what a model with output_attentions=True computes to have that one row.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .harness import Case, Work

GRAPHED = True


def cases() -> list[Case]:
    return [
        Case({"B": 8, "Hq": 16, "Hkv": 4, "D": 64, "T": 2048}),
        Case({"B": 2, "Hq": 4, "Hkv": 2, "D": 16, "T": 64}, quick=True),
        Case({"B": 64, "Hq": 32, "Hkv": 8, "D": 128, "T": 2048}, torch.bfloat16, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    """All queries [B, Hq, T, D] (ours takes the last), keys [B, Hkv, T, D], the mask of prompts padded on the left."""
    batch, heads, groups, dim, columns = case.sizes.values()
    queries, keys = torch.randn(batch, heads, columns, dim), torch.randn(batch, groups, columns, dim)
    mask = torch.arange(columns) >= torch.randint(columns // 4, (batch, 1))
    return queries.to(case.dtype), keys.to(case.dtype), mask


def work(case: Case) -> dict[str, Work]:
    batch, heads, groups, dim, columns = case.sizes.values()
    read = case.dtype.itemsize * batch * dim * (groups * columns + heads) + batch * columns
    least, flops = read + 4 * batch * columns, 2 * batch * heads * columns * dim
    return {"fwd": Work(least, flops, moved=least + 8 * batch * heads * columns)}


def ours(case: Case):
    return lambda queries, keys, mask: rk.attention_row(queries[:, :, -1], keys, mask)


def formula(case: Case):
    return last_row


def peers(case: Case):
    return {
        "torch eager": last_row,
        "torch.compile": torch.compile(last_row, dynamic=False),
        "full T×T map": full_map,
    }


def last_row(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    return _probabilities(queries[:, :, -1:], keys, mask[:, None, None])[:, :, 0].mean(1)


def full_map(queries: Tensor, keys: Tensor, mask: Tensor) -> Tensor:
    columns = keys.shape[2]
    causal = torch.ones(columns, columns, dtype=torch.bool, device=keys.device).tril()
    return _probabilities(queries, keys, causal & mask[:, None, None])[:, :, -1].mean(1)


def _probabilities(queries: Tensor, keys: Tensor, allowed: Tensor) -> Tensor:
    repeated = keys.repeat_interleave(queries.shape[1] // keys.shape[1], dim=1)
    scores = queries @ repeated.transpose(-1, -2) * keys.shape[-1] ** -0.5
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    return scores.softmax(-1)

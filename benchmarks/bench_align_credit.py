"""align_credit: credit of B responses carried from Tr tokens of one tokenizer to Tp of another.

Limit: 16 bytes of span a token of either and 4 of credit in and out are nothing; on a GPU two launches. Ours compares
all tokens of a response with all of the other tokenizer, B·Tr·Tp overlaps.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .harness import Case, Work


def cases() -> list[Case]:
    return [
        Case({"B": 64, "Tr": 256, "Tp": 300}),
        Case({"B": 3, "Tr": 12, "Tp": 14}, quick=True),
        Case({"B": 256, "Tr": 1024, "Tp": 1200}, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    """Both cut the same text of 4·Tr bytes: the reward model every 4 bytes, the policy anywhere."""
    batch, rm_columns, columns = case.sizes.values()
    length = 4 * rm_columns
    cuts = torch.stack([torch.randperm(length - 1)[: columns - 1] + 1 for _ in range(batch)]).sort(1).values
    edges = torch.cat([torch.zeros(batch, 1).long(), cuts, torch.full((batch, 1), length)], 1)
    rm_edges = (4 * torch.arange(rm_columns + 1)).expand(batch, -1)
    spans = (torch.stack([x[:, :-1], x[:, 1:]], -1) for x in (rm_edges, edges))
    return torch.randn(batch, rm_columns).to(case.dtype), *spans


def work(case: Case) -> dict[str, Work]:
    batch, rm_columns, columns = case.sizes.values()
    return {"fwd": Work(batch * (rm_columns * (16 + case.dtype.itemsize) + columns * (16 + 4)))}


def ours(case: Case):
    return rk.align_credit


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(credit: Tensor, rm_spans: Tensor, policy_spans: Tensor) -> Tensor:
    start, end = rm_spans[:, None, :, 0], rm_spans[:, None, :, 1]
    overlap = torch.minimum(end, policy_spans[:, :, None, 1]) - torch.maximum(start, policy_spans[:, :, None, 0])
    shares = overlap.clamp(min=0).to(credit.dtype) / (end - start)
    return (shares * credit[:, None]).sum(-1)

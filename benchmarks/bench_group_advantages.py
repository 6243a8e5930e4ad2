"""group_advantages: each of B responses against the others of its prompt.

Limit: 16 bytes a response in fp32 are nothing; what takes time is finding the responses of a prompt, which stand in any
order. The Triton kernel compares all with all (B² comparisons, no sort), the torch backend sorts.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .harness import Case, Work

GROUP = 8


def cases() -> list[Case]:
    return [Case({"B": 8192}), Case({"B": 32}, quick=True), Case({"B": 8192}, device="cuda")]


def inputs(case: Case) -> tuple[Tensor, ...]:
    responses = case.sizes["B"]
    return torch.randn(responses).to(case.dtype), torch.arange(responses) // GROUP


def work(case: Case) -> dict[str, Work]:
    return {"fwd": Work(case.sizes["B"] * (case.dtype.itemsize + 8 + 4))}


def ours(case: Case):
    return lambda scores, groups: rk.group_advantages(scores, groups, kind="grpo")


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(scores: Tensor, groups: Tensor) -> Tensor:
    """Groups of GROUP that stand together, as the trainers have them."""
    score = scores.view(-1, GROUP)
    return ((score - score.mean(1, keepdim=True)) / (score.std(1, keepdim=True) + 1e-4)).view(-1)

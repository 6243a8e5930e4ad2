"""rm_listwise_loss: Plackett–Luce over the ranked responses of each prompt, K scores in all.

Limit: score, rank and prompt of a response are read once and its gradient written once, 24 bytes in fp32; on a GPU a
launch. Ours compares all responses with all, K² comparisons, so prompts may stand in any order.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .harness import Case, Work

GROUP = 8


def cases() -> list[Case]:
    return [Case({"K": 1024}), Case({"K": 32}, quick=True), Case({"K": 1024}, device="cuda")]


def inputs(case: Case) -> tuple[Tensor, ...]:
    responses = case.sizes["K"]
    ranks = torch.stack([torch.randperm(GROUP) for _ in range(responses // GROUP)]).view(-1)
    return torch.randn(responses).to(case.dtype).requires_grad_(), ranks, torch.arange(responses) // GROUP


def work(case: Case) -> dict[str, Work]:
    responses, size = case.sizes["K"], case.dtype.itemsize
    return {"fwd": Work(responses * (size + 16)), "fwd+bwd": Work(responses * (2 * size + 16))}


def ours(case: Case):
    return lambda *tensors: rk.rm_listwise_loss(*tensors)[0]


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(scores: Tensor, ranks: Tensor, prompts: Tensor) -> Tensor:
    """Prompts of GROUP responses that stand together, ranked without ties."""
    ordered = scores.view(-1, GROUP).gather(1, ranks.view(-1, GROUP).argsort(1))
    return (ordered.flip(1).logcumsumexp(1).flip(1) - ordered).sum(1).mean()

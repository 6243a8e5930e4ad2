"""rm_pairwise_loss: Bradley–Terry over P pairs of K scores.

Limit: scores and two indices a pair are read once and a gradient a score written once, 16 bytes a pair and 8 a score in
fp32; on a GPU a launch. Ours adds up each score's gradient in a fixed order, without atomics: the Triton kernel by K·P
comparisons.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from .harness import Case, Work


def cases() -> list[Case]:
    return [
        Case({"K": 4096, "P": 8192}),
        Case({"K": 32, "P": 16}, quick=True),
        Case({"K": 4096, "P": 8192}, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    responses, pairs = case.sizes.values()
    chosen, rejected = torch.randint(responses, (2, pairs))
    return torch.randn(responses).to(case.dtype).requires_grad_(), chosen, rejected


def work(case: Case) -> dict[str, Work]:
    responses, pairs = case.sizes.values()
    read = responses * case.dtype.itemsize + pairs * 16
    return {"fwd": Work(read), "fwd+bwd": Work(read + responses * case.dtype.itemsize)}


def ours(case: Case):
    return lambda *tensors: rk.rm_pairwise_loss(*tensors)[0]


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(scores: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    return -F.logsigmoid(scores[chosen] - scores[rejected]).mean()

"""rm_regression_loss: mean squared error of K scores.

Limit: scores and targets are read once and the gradient written once, 12 bytes a response in fp32; on a GPU a launch.
Ours reads both twice, since the correlation that it reports needs the means first.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .harness import Case, Work


def cases() -> list[Case]:
    return [Case({"K": 1 << 20}), Case({"K": 32}, quick=True), Case({"K": 1 << 24}, device="cuda")]


def inputs(case: Case) -> tuple[Tensor, ...]:
    targets = torch.randn(case.sizes["K"])
    return (targets + torch.randn_like(targets)).to(case.dtype).requires_grad_(), targets.to(case.dtype)


def work(case: Case) -> dict[str, Work]:
    read, size = 2 * case.sizes["K"] * case.dtype.itemsize, case.sizes["K"] * case.dtype.itemsize
    return {"fwd": Work(read, moved=2 * read), "fwd+bwd": Work(read + size, moved=2 * read + size)}


def ours(case: Case):
    return lambda *tensors: rk.rm_regression_loss(*tensors)[0]


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(scores: Tensor, targets: Tensor) -> Tensor:
    return (scores - targets).square().mean()

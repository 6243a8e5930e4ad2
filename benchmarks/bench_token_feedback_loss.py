"""token_feedback_loss: the bandit update from marked tokens, N rows of V logits.

Limit: logits and reference logits are read once and the gradient written once, 2·N·V elements forward and 3·N·V with
the gradient. Ours reads both rows a second time for the gradient, from a cache.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .bench_token_logprobs import log_softmax
from .harness import Case, Work

BETA = 0.5


def cases() -> list[Case]:
    return [
        Case({"N": 256, "V": 50257}),
        Case({"N": 16, "V": 1009}, quick=True),
        Case({"N": 2048, "V": 128256}, torch.bfloat16, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    rows, vocabulary = case.sizes.values()
    ref_logits = 3 * torch.randn(rows, vocabulary)
    logits = (ref_logits + torch.randn(rows, vocabulary)).to(case.dtype)
    labels = torch.randint(-1, 2, (rows,)).to(case.dtype)
    return logits.requires_grad_(), ref_logits.to(case.dtype), torch.randint(vocabulary, (rows,)), labels


def work(case: Case) -> dict[str, Work]:
    logits = case.sizes["N"] * case.sizes["V"] * case.dtype.itemsize
    beside = case.sizes["N"] * (8 + 4)
    return {"fwd": Work(2 * logits + beside), "fwd+bwd": Work(3 * logits + beside, moved=5 * logits + beside)}


def ours(case: Case):
    return lambda *tensors: rk.token_feedback_loss(*tensors, beta=BETA)[0]


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(logits: Tensor, ref_logits: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
    """KL of the reference tilted at the labelled token from the policy."""
    logp = log_softmax(logits)
    tilted = log_softmax(ref_logits).scatter_add(-1, tokens[:, None], (labels / BETA).to(logp.dtype)[:, None])
    target = tilted.log_softmax(-1)
    return (target.exp() * (target - logp)).sum(-1).mean()

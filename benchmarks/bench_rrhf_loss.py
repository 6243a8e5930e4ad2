"""rrhf_loss: the ranking and likelihood loss of K responses of T tokens.

Limit: log-probabilities and mask are read once; with the gradient written, 9 bytes a token in fp32. Ours reads the mask
again for the gradient. The K² comparisons are short beside it.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .bench_gae import padded_mask
from .harness import Case, Work

GROUP = 4  # responses of a prompt


def cases() -> list[Case]:
    return [
        Case({"K": 256, "T": 1024}),
        Case({"K": 16, "T": 32}, quick=True),
        Case({"K": 1024, "T": 2048}, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    responses, columns = case.sizes.values()
    logprobs = (-torch.rand(responses, columns) * 4).to(case.dtype)
    prompts = torch.arange(responses) // GROUP
    return logprobs.requires_grad_(), torch.randn(responses), prompts, padded_mask(responses, columns)


def work(case: Case) -> dict[str, Work]:
    tokens, size = case.sizes["K"] * case.sizes["T"], case.dtype.itemsize
    beside = case.sizes["K"] * 12
    return {
        "fwd": Work(tokens * (size + 1) + beside),
        "fwd+bwd": Work(tokens * (2 * size + 1) + beside, moved=tokens * (2 * size + 2) + beside),
    }


def ours(case: Case):
    return lambda *tensors: rk.rrhf_loss(*tensors)[0]


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(logprobs: Tensor, scores: Tensor, prompts: Tensor, mask: Tensor) -> Tensor:
    """Prompts of GROUP responses that stand together."""
    summed = (logprobs * mask).sum(-1)
    p, score = (summed / mask.sum(-1)).view(-1, GROUP), scores.view(-1, GROUP)
    gaps = (p[:, :, None] - p[:, None, :]).clamp(min=0) * (score[:, :, None] < score[:, None, :])
    best = summed.view(-1, GROUP).gather(1, score.argmax(1, keepdim=True))
    return gaps.sum() / len(p) - best.mean()

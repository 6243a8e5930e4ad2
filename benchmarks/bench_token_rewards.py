"""token_rewards: redistributed score minus KL penalty over [B, T].

Limit: log-probabilities of policy and reference, attention and mask are read once and two results written once, 21
bytes a token in fp32. Attention has to be summed over the row first: ours reads it and the mask again, from a cache.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .bench_gae import padded_mask
from .bench_rollout_advantages import BETA, KL_COEF
from .harness import Case, Work

GRAPHED = True


def cases() -> list[Case]:
    return [
        Case({"B": 512, "T": 2048}),
        Case({"B": 8, "T": 64}, quick=True),
        Case({"B": 64, "T": 2048}, device="cuda"),
        Case({"B": 1024, "T": 32768}, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    shape = case.sizes["B"], case.sizes["T"]
    logprobs = -torch.rand(shape) * 4
    floats = torch.randn(shape[0]), logprobs, logprobs + 0.1 * torch.randn(shape), torch.rand(shape)
    return *(x.to(case.dtype) for x in floats), padded_mask(*shape)


def work(case: Case) -> dict[str, Work]:
    tokens, size = case.sizes["B"] * case.sizes["T"], case.dtype.itemsize
    return {"fwd": Work(tokens * (3 * size + 1 + 2 * 4), moved=tokens * (4 * size + 2 + 2 * 4))}


def ours(case: Case):
    return lambda *tensors: rk.token_rewards(*tensors, kl_coef=KL_COEF, beta=BETA)


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, attention: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:
    weight = mask.to(logprobs.dtype)
    kl = (logprobs - ref_logprobs) * weight
    shares = attention * weight
    credit = BETA * shares / shares.sum(-1, keepdim=True) * scores[:, None]
    last = torch.arange(mask.shape[1], device=mask.device) == mask.sum(-1, keepdim=True) - 1
    return credit + (1 - BETA) * last * scores[:, None] - KL_COEF * kl, kl

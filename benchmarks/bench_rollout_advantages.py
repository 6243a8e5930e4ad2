"""rollout_advantages: rewards, GAE and whitening of a rollout [B, T].

Limit: log-probabilities of policy and reference, attention, values and mask are read once and four results written
once, 33 bytes a token in fp32. Whitening needs the mean of the whole batch before it can write, so a batch that does
not fit a cache costs 8 bytes a token more; the limit leaves them out. Ours reads attention and mask twice as well, for
the attention's sum.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import rlhf_kernels as rk

from . import peers as peers_
from .bench_gae import GAMMA, LAM, UNROLLED, loop, padded_mask
from .harness import Case, Work

KL_COEF, BETA = 0.05, 0.8
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
    ref_logprobs = logprobs + 0.1 * torch.randn(shape)
    floats = torch.randn(shape[0]), logprobs, ref_logprobs, torch.rand(shape), torch.randn(shape)
    return *(x.to(case.dtype) for x in floats), padded_mask(*shape)


def work(case: Case) -> dict[str, Work]:
    tokens, size = case.sizes["B"] * case.sizes["T"], case.dtype.itemsize
    return {"fwd": Work(tokens * (4 * size + 1 + 4 * 4), moved=tokens * (5 * size + 3 + 6 * 4))}


def ours(case: Case):
    return lambda *tensors: rk.rollout_advantages(*tensors, kl_coef=KL_COEF, beta=BETA, gamma=GAMMA, lam=LAM)


def formula(case: Case):
    return plain_with_loop


def peers(case: Case):
    """The same lines of torch around each package's GAE."""
    torchrl = {
        name: gae if isinstance(gae, str) else functools.partial(plain_with_loop, gae=gae)
        for name, gae in peers_.gae_of_torchrl(GAMMA, LAM).items()
    }
    return {"loop as in verl": plain_with_loop, "torch.compile": UNROLLED} | torchrl


def plain_with_loop(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor,
    values: Tensor,
    mask: Tensor,
    gae: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]] = loop,
) -> tuple[Tensor, ...]:
    """One line of torch after another around the loop of bench_gae."""
    weight = mask.to(logprobs.dtype)
    kl = (logprobs - ref_logprobs) * weight
    shares = attention * weight
    shares = shares / shares.sum(-1, keepdim=True)
    rewards = BETA * shares * scores[:, None] - KL_COEF * kl
    last = mask.sum(-1) - 1
    rewards[torch.arange(len(scores), device=mask.device), last] += (1 - BETA) * scores
    advantages, returns = gae(rewards, values, mask)
    count = weight.sum()
    mean = advantages.sum() / count
    variance = ((advantages - mean).square() * weight).sum() / count
    return (advantages - mean) * torch.rsqrt(variance + 1e-8) * weight, returns, rewards, kl

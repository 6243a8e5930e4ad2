"""fused_ppo_loss: rewards, GAE, whitening, log-probabilities and the PPO loss from logits [B, T, V].

Limit: the logits are read once, B·T·V elements, and their gradient is written once, so twice that with it; ours reads
each row a second time, from a cache as long as the rows that are worked on at once fit one. Everything else is
B·T-sized. With a "given buffer" the gradient goes to memory that the caller has used before.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import rlhf_kernels as rk

from .bench_gae import padded_mask
from .bench_ppo_loss import plain as ppo_loss
from .bench_rollout_advantages import plain_with_loop
from .bench_token_logprobs import logprobs, logprobs_in_slices
from .harness import Case, Work

KL_COEF, BETA = 0.05, 0.8


def cases() -> list[Case]:
    return [
        Case({"B": 16, "T": 64, "V": 50257}),
        Case({"B": 16, "T": 64, "V": 50257}, variant="given buffer"),
        Case({"B": 16, "T": 64, "V": 50257}, torch.bfloat16),
        Case({"B": 4, "T": 8, "V": 1009}, quick=True),
        Case({"B": 4, "T": 8, "V": 1009}, variant="given buffer", quick=True),
        Case({"B": 16, "T": 512, "V": 128256}, torch.bfloat16, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    """Ratios and values lie off the clip bounds, where rounding would decide what is clipped."""
    batch, columns, vocabulary = case.sizes.values()
    shape = batch, columns
    logits, tokens = (3 * torch.randn(*shape, vocabulary)).to(case.dtype), torch.randint(vocabulary, shape)
    now, values = logprobs(logits, tokens), torch.randn(shape)

    def steps() -> Tensor:
        return ((0.2 * torch.randn(shape)).mul(10).round() + 0.5) / 10

    old_logprobs, old_values = now - steps(), values - steps()
    ref_logprobs = old_logprobs + 0.1 * torch.randn(shape)
    per_token = (old_logprobs, ref_logprobs, torch.rand(shape), values.requires_grad_(), old_values)
    return logits.requires_grad_(), tokens, torch.randn(batch), *per_token, padded_mask(*shape)


def work(case: Case) -> dict[str, Work]:
    tokens = case.sizes["B"] * case.sizes["T"]
    logits, beside = tokens * case.sizes["V"] * case.dtype.itemsize, tokens * (8 + 5 * 4 + 1)
    return {"fwd": Work(logits + beside), "fwd+bwd": Work(2 * logits + beside, moved=3 * logits + beside)}


def ours(case: Case):
    given = {"kl_coef": KL_COEF, "beta": BETA, "gamma": 1.0, "lam": 0.95}
    if case.variant == "given buffer":
        given["grad_buffer"] = torch.zeros(tuple(case.sizes.values()), dtype=case.dtype)  # its pages are there
    return lambda *tensors: rk.fused_ppo_loss(*tensors, **given)[0]


def formula(case: Case):
    return functools.partial(plain, logprobs=logprobs_in_slices)


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(
    logits: Tensor,
    tokens: Tensor,
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor,
    values: Tensor,
    old_values: Tensor,
    mask: Tensor,
    logprobs: Callable[[Tensor, Tensor], Tensor] = logprobs,
) -> Tensor:
    advantages, returns, _, _ = plain_with_loop(scores, old_logprobs, ref_logprobs, attention, old_values, mask)
    now = logprobs(logits, tokens)
    return ppo_loss(now, old_logprobs, advantages, values, old_values, returns, mask)

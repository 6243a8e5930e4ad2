"""linear_ppo_loss: the clipped policy loss from N hidden states of size H and a head [V, H].

Limit: a token's coefficient depends on its own log-probability only, so three matrix products of 2·N·V·H FLOP do
forward and backward together. Beside them ours writes each chunk of fp32 logits, reads it twice (once from a cache) and
writes the gradient over it, which two products read: 12 bytes an element and 3 times the gradient's size.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor

import rlhf_kernels as rk

from . import peers as peers_
from .bench_linear_logprobs import inputs as linear_inputs
from .bench_linear_logprobs import plain as linear_logprobs
from .bench_linear_logprobs import plain_in_slices as linear_logprobs_in_slices
from .bench_ppo_loss import CLIPRANGE
from .harness import Case, Work


def cases() -> list[Case]:
    return [
        Case({"N": 1024, "H": 1024, "V": 50257}, torch.bfloat16),
        Case({"N": 512, "H": 1024, "V": 50257}),
        Case({"N": 32, "H": 16, "V": 1009}, quick=True),
        Case({"N": 8192, "H": 4096, "V": 128256}, torch.bfloat16, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    """Ratios lie off the clip bounds, where rounding would decide what is clipped."""
    hidden, weight, tokens = linear_inputs(case)
    with torch.no_grad():
        now = linear_logprobs(hidden.float(), weight.float(), tokens)
    steps = ((0.2 * torch.randn_like(now)).mul(10).round() + 0.5) / 10
    return hidden, weight, tokens, now - steps, torch.randn_like(now), torch.rand(len(now)) < 0.9


def work(case: Case) -> dict[str, Work]:
    rows, width, vocabulary = case.sizes.values()
    product, size = 2 * rows * width * vocabulary, case.dtype.itemsize
    given, logits = size * (rows + vocabulary) * width, rows * vocabulary
    return {
        "fwd": Work(given, product, given + 8 * logits),
        "fwd+bwd": Work(2 * given, 3 * product, 4 * given + (12 + 3 * size) * logits),
    }


def ours(case: Case):
    return lambda *tensors: rk.linear_ppo_loss(*tensors, cliprange=CLIPRANGE)[0]


def formula(case: Case):
    return functools.partial(plain, linear_logprobs=linear_logprobs_in_slices)


def peers(case: Case):
    return {
        "torch eager": plain,
        "torch.compile": torch.compile(plain, dynamic=False),
        "Liger GRPO loss": peers_.of("liger_kernel", functools.partial(peers_.liger_grpo, CLIPRANGE)),
    }


def plain(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    linear_logprobs: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_logprobs,
) -> Tensor:
    ratio = (linear_logprobs(hidden, weight, tokens) - old_logprobs).exp()
    loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIPRANGE, 1 + CLIPRANGE))
    return (loss * mask).sum() / mask.sum()

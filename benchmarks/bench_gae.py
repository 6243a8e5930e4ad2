"""gae: a reverse scan over [B, T].

Limit: rewards, values and mask are read once and two results written once, 17 bytes a token in fp32. The chain of T
dependent steps is short against that as long as rows are worked on side by side. The default batch (18 MB) stays in a
large cache, which can be faster than the memory that the limit is taken from.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from . import peers as peers_
from .harness import Case, Work

GAMMA, LAM = 1.0, 0.95
GRAPHED = True
UNROLLED = "it unrolls the loop over T, which takes it minutes"


def cases() -> list[Case]:
    return [
        Case({"B": 512, "T": 2048}),
        Case({"B": 8, "T": 64}, quick=True),
        Case({"B": 64, "T": 2048}, device="cuda"),
        Case({"B": 512, "T": 2048}, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    shape = case.sizes["B"], case.sizes["T"]
    return torch.randn(shape).to(case.dtype), torch.randn(shape).to(case.dtype), padded_mask(*shape)


def padded_mask(rows: int, columns: int) -> Tensor:
    """Responses of half the length to the full length, padded on the right."""
    lengths = torch.randint(columns // 2, columns + 1, (rows, 1))
    return torch.arange(columns) < lengths


def work(case: Case) -> dict[str, Work]:
    tokens = case.sizes["B"] * case.sizes["T"]
    return {"fwd": Work(tokens * (2 * case.dtype.itemsize + 1 + 2 * 4))}


def ours(case: Case):
    return lambda rewards, values, mask: rk.gae(rewards, values, mask, gamma=GAMMA, lam=LAM)


def formula(case: Case):
    return loop


def peers(case: Case):
    return {"loop as in verl": loop, "torch.compile": UNROLLED} | peers_.gae_of_torchrl(GAMMA, LAM)


def loop(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A Python loop over T whose state is carried unchanged over masked tokens."""
    weight = mask.to(rewards.dtype)
    next_value = next_advantage = torch.zeros_like(rewards[:, 0])
    advantages = []
    for t in reversed(range(rewards.shape[1])):
        counts = weight[:, t]
        delta = rewards[:, t] + GAMMA * next_value - values[:, t]
        advantage = delta + GAMMA * LAM * next_advantage
        next_value = counts * values[:, t] + (1 - counts) * next_value
        next_advantage = counts * advantage + (1 - counts) * next_advantage
        advantages.append(next_advantage)
    stacked = torch.stack(advantages[::-1], dim=1)
    return stacked * weight, (stacked + values) * weight

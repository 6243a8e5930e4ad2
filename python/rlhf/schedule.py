"""Learning-rate schedules: a function of the step, so that there is no state to save or to lose."""

import math

import torch

KINDS = ("linear", "cosine", "constant")


def schedule(step: int, total: int, *, warmup: float, kind: str) -> float:
    """The factor of the peak learning rate at optimiser step `step` of `total`, counted from 0.

    It climbs linearly over the first `warmup` (a share of all steps), then falls to 0 ("linear", "cosine") or stays.
    """
    warmup_steps = round(warmup * total)
    if step < warmup_steps:
        return (step + 1) / (warmup_steps + 1)
    left = 1 - (step - warmup_steps) / max(total - warmup_steps, 1)
    if kind == "linear":
        return left
    if kind == "cosine":
        return (1 - math.cos(math.pi * left)) / 2
    if kind == "constant":
        return 1.0
    raise ValueError(f"schedule: kind must be one of {', '.join(KINDS)}, got {kind!r}")


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate

"""The KL of the policy to its reference, token by token: as a penalty in the reward or as a term of the loss."""

from __future__ import annotations

import torch
from torch import Tensor

from .policy_losses import MAX_LOG_RATIO, log_ratio

IN_REWARD = ("k1", "k2", "k3", "abs", "pos", "full")
IN_LOSS = ("k1", "k2", "k3", "abs", "full", "k1+", "k3+", "k3-is")
KINDS = tuple(dict.fromkeys(IN_REWARD + IN_LOSS))


def kl_penalty(
    kind: str,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    mask: Tensor,
    *,
    old_logprobs: Tensor | None = None,
    full: Tensor | None = None,
    clip: float | None = None,
) -> Tensor:
    """An estimate of KL(π ‖ ref) at each token, [B, T] in nats, 0 where masked; differentiable in `logprobs`.

    With D = logprobs − ref_logprobs:

        "k1"     D                        unbiased; as a loss its expected gradient is 0 on samples of π
        "k2"     ½·D²                     as a loss its gradient is the KL's own, unbiased
        "k3"     exp(−D) − 1 + D          unbiased, never negative; as a loss its gradient is that of KL(ref ‖ π)
        "abs"    |D|
        "pos"    max(D, 0)                biased upwards; never pays for being below the reference
        "full"   Σ_v π(v)·(log π(v) − log ref(v)), which is `full`
        "k1+", "k3+"   the value of k1 or k3 with the gradient of k2
        "k3-is"  ρ·k3 with ρ = exp(logprobs − old_logprobs): the gradient of the KL also off policy

    Args:
        old_logprobs: [B, T] of the policy that sampled, for "k3-is". full: [B, T], for "full".
        clip: bound of each estimate on either side, with no gradient beyond it.

    Source: Schulman, "Approximating KL divergence", 2020; Tang and Munos 2025 (arXiv 2506.09477) for the gradients.
    """
    difference = log_ratio(logprobs, ref_logprobs, mask)
    if kind == "full":
        if full is None:
            raise ValueError("kl_penalty: full must be given for kind 'full', got None")
        estimate = torch.where(mask, full, 0)
    elif kind == "k3-is":
        if old_logprobs is None:
            raise ValueError("kl_penalty: old_logprobs must be given for kind 'k3-is', got None")
        moved = log_ratio(logprobs, old_logprobs, mask).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        estimate = _estimate("k3", difference) * moved.exp()
    elif kind in ("k1+", "k3+"):
        gradient = difference.square() / 2
        estimate = gradient - gradient.detach() + _estimate(kind[:2], difference).detach()
    else:
        estimate = _estimate(kind, difference)
    return estimate if clip is None else estimate.clamp(-clip, clip)


def _estimate(kind: str, difference: Tensor) -> Tensor:
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        clamped = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-clamped) + clamped
    if kind == "abs":
        return difference.abs()
    if kind == "pos":
        return difference.clamp(min=0)
    raise ValueError(f"kl_penalty: kind must be one of {', '.join(KINDS)}, got {kind!r}")

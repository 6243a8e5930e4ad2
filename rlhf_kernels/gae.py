"""Generalised advantage estimation over masked [B, T] rewards and values."""

import torch
from torch import Tensor

from . import backend, checks, reference

_triton = backend.import_triton("gae")


def _fake(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    advantages = rewards.new_empty(rewards.shape, dtype=reference.compute_dtype(rewards))
    return advantages, torch.empty_like(advantages)


_gae = backend.register(
    "gae(Tensor rewards, Tensor values, Tensor mask, float gamma, float lam) -> (Tensor advantages, Tensor returns)",
    fake=_fake,
    torch_impl=reference.gae,
    triton=_triton and _triton.gae,
)


def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Advantages and returns from a reverse scan over the places that count.

        δ_t = r_t + γ·V_next − V_t;   A_t = δ_t + γ·λ·A_next;   returns_t = A_t + V_t

    "next" is the next True place of the mask: padding and holes (a tool's tokens) are stepped over, and nothing
    follows the last one (V_next = A_next = 0).

    Args:
        rewards, values: [B, T] float; values_t is the value before token t. mask: [B, T] bool.
        gamma: discount, 0 to 1. lam: λ, 0 to 1.

    Returns:
        (advantages [B, T], returns [B, T]) in fp32 (fp64 for fp64 rewards), not whitened, 0 where masked; not
        differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.

    Source: Schulman et al. 2016 (arXiv 1506.02438).
    """
    op = "gae"
    checks.ndim(op, "rewards", rewards, "[B, T]")
    mask = checks.as_mask(op, "mask", mask)
    checks.same_shape(op, {"rewards": rewards}, values=values, mask=mask)
    checks.floating(op, rewards=rewards, values=values)
    checks.fraction(op, gamma=gamma, lam=lam)
    with torch.no_grad():
        return _gae(rewards, values, mask, gamma, lam)

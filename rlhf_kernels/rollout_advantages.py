"""From scores to advantages in one pass: `token_rewards`, `gae` and `masked_whiten` fused."""

import torch
from torch import Tensor

from . import backend, checks, reference
from .token_rewards import check_rewards

_triton = backend.import_triton("rollout_advantages")


def _fake(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    beta: float,
    gamma: float,
    lam: float,
    kl_estimator: str,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    advantages = logprobs.new_empty(logprobs.shape, dtype=reference.compute_dtype(logprobs))
    return advantages, torch.empty_like(advantages), torch.empty_like(advantages), torch.empty_like(advantages)


_rollout_advantages = backend.register(
    "rollout_advantages(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor? attention, Tensor values, "
    "Tensor mask, float kl_coef, float beta, float gamma, float lam, str kl_estimator, bool whiten) "
    "-> (Tensor advantages, Tensor returns, Tensor rewards, Tensor kl)",
    fake=_fake,
    torch_impl=reference.rollout_advantages,
    triton=_triton and _triton.rollout_advantages,
)


def rollout_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    beta: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    whiten: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`token_rewards`, then `gae` on them, then the advantages whitened over the whole batch.

    Args:
        scores, logprobs, ref_logprobs, attention, mask, kl_coef, beta, kl_estimator: as in `token_rewards`.
        values: [B, T] float. gamma, lam: as in `gae`.
        whiten: `masked_whiten` the advantages (biased variance); returns are never whitened.

    Returns:
        (advantages, returns, rewards, kl), each [B, T] in fp32 (fp64 for fp64 logprobs), 0 where masked; not
        differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.
    """
    op = "rollout_advantages"
    mask = check_rewards(op, scores, logprobs, ref_logprobs, attention, mask, beta, kl_estimator)
    checks.same_shape(op, {"logprobs": logprobs}, values=values)
    checks.floating(op, values=values)
    checks.fraction(op, gamma=gamma, lam=lam)
    with torch.no_grad():
        return _rollout_advantages(
            scores, logprobs, ref_logprobs, attention, values, mask, kl_coef, beta, gamma, lam, kl_estimator, whiten
        )

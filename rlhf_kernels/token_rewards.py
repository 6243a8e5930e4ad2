"""Score and KL penalty as one reward per token, the score spread by the reward model's attention."""

import torch
from torch import Tensor

from . import backend, checks, reference

_triton = backend.import_triton("token_rewards")


def _fake(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    mask: Tensor,
    kl_coef: float,
    beta: float,
    kl_estimator: str,
) -> tuple[Tensor, Tensor]:
    rewards = logprobs.new_empty(logprobs.shape, dtype=reference.compute_dtype(logprobs))
    return rewards, torch.empty_like(rewards)


_token_rewards = backend.register(
    "token_rewards(Tensor scores, Tensor logprobs, Tensor ref_logprobs, Tensor? attention, Tensor mask, float kl_coef, "
    "float beta, str kl_estimator) -> (Tensor rewards, Tensor kl)",
    fake=_fake,
    torch_impl=reference.token_rewards,
    triton=_triton and _triton.token_rewards,
)


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    mask: Tensor,
    *,
    kl_coef: float,
    beta: float,
    kl_estimator: str = "k1",
) -> tuple[Tensor, Tensor]:
    """Per-token rewards: redistributed score minus the KL penalty.

        α_t = attention_t / Σ_mask attention          (uniform where that sum is below 1e-12 or not finite)
        r_t = β·α_t·R + (1 − β)·R·1[t = last] − kl_coef · kl_t,      Σ_t (r_t + kl_coef · kl_t) = R

    Args:
        scores: [B] R, one per response; or [B, T], what each token earns by itself, of any sign: signed credit,
            penalties, a score for each token. Those count as they stand, r_t = scores_t − kl_coef · kl_t: there is
            nothing to spread, attention must be None and β has no effect.
        logprobs: [B, T] of the policy that sampled (a detached snapshot). ref_logprobs: [B, T].
        attention: [B, T] non-negative weights, or None: the whole score on the last True of the mask.
        mask: [B, T] bool, True where a sampled response token counts.
        kl_coef: weight of the penalty. beta: share of the score that is redistributed, 0 to 1.
        kl_estimator: of D = logprobs − ref_logprobs: "k1" D, "k2" D²/2, "k3" exp(−D) − 1 + D with D clamped to ±20,
            "abs" |D|, "pos" max(D, 0).

    Returns:
        (rewards [B, T], kl [B, T]) in fp32 (fp64 for fp64 logprobs), 0 where masked; not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.

    Source: Chan et al. 2024 (arXiv 2402.00782) for α and β; Ziegler et al. 2019 (arXiv 1909.08593) for the penalty.
    """
    mask = check_rewards("token_rewards", scores, logprobs, ref_logprobs, attention, mask, beta, kl_estimator)
    with torch.no_grad():
        return _token_rewards(scores, logprobs, ref_logprobs, attention, mask, kl_coef, beta, kl_estimator)


def check_rewards(
    op: str,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    mask: Tensor,
    beta: float,
    kl_estimator: str,
) -> Tensor:
    """The checks shared by the ops that make rewards; returns the mask as bool."""
    checks.ndim(op, "logprobs", logprobs, "[B, T]")
    mask = checks.as_mask(op, "mask", mask)
    checks.same_shape(op, {"logprobs": logprobs}, ref_logprobs=ref_logprobs, attention=attention, mask=mask)
    checks.is_tensor(op, scores=scores)
    if scores.ndim == 2:
        checks.same_shape(op, {"logprobs": logprobs}, scores=scores)
        if attention is not None:
            checks.fail(op, "attention", "be None where scores has one for each token", tuple(attention.shape))
    else:
        checks.shape(op, "scores", scores, logprobs.shape[:1], checks.to_match("logprobs", logprobs))
    checks.same_device(op, {"logprobs": logprobs}, scores=scores)
    checks.floating(op, scores=scores, logprobs=logprobs, ref_logprobs=ref_logprobs, attention=attention)
    checks.fraction(op, beta=beta)
    checks.one_of(op, "kl_estimator", kl_estimator, reference.KL_ESTIMATORS)
    return mask

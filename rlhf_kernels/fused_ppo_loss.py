"""PPO from logits and scores to a loss and the gradient of the logits: the whole chain as one op."""

from typing import Any

import torch
from torch import Tensor

from . import backend, checks, reference_losses
from .ppo_loss import as_normalizer, check_clips, grad_fake, loss_fake, needs_grad
from .stats import FusedPPOStats
from .token_logprobs import check_grad_buffer, check_logits
from .token_rewards import check_rewards

_triton = backend.import_triton("fused_ppo_loss")


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, with_grad = rest[5], rest[-1]
    loss, stats = loss_fake(logits, len(FusedPPOStats._fields))
    return loss, stats, grad_fake(logits, with_grad), grad_fake(values, with_grad)


def _out_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    loss, stats, _, dvalues = _fake(*arguments[:-1], True)
    return loss, stats, dvalues


_ARGUMENTS = (
    "Tensor logits, Tensor tokens, Tensor scores, Tensor old_logprobs, Tensor ref_logprobs, Tensor? attention, "
    "Tensor values, Tensor old_values, Tensor mask, Tensor? normalizer, float temperature, float? softcap, "
    "float kl_coef, float beta, float gamma, float lam, str kl_estimator, bool whiten, float cliprange, "
    "float cliprange_high, float? cliprange_value, float vf_coef, float? dual_clip, float entropy_coef"
)
_fwd = backend.register(
    f"fused_ppo_loss_fwd({_ARGUMENTS}, bool with_grad) -> (Tensor loss, Tensor stats, Tensor dlogits, Tensor dvalues)",
    fake=_fake,
    torch_impl=reference_losses.fused_ppo_loss_fwd,
    triton=_triton and _triton.fwd,
)
_fwd_out = backend.register(
    f"fused_ppo_loss_fwd_out({_ARGUMENTS}, Tensor(a!) dlogits) -> (Tensor loss, Tensor stats, Tensor dvalues)",
    fake=_out_fake,
    torch_impl=reference_losses.fused_ppo_loss_fwd_out,
    triton=_triton and _triton.fwd_out,
)
backend.register_loss_autograd("fused_ppo_loss_fwd", {0: 2, 6: 3})


def fused_ppo_loss(
    logits: Tensor,
    tokens: Tensor,
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    values: Tensor,
    old_values: Tensor,
    mask: Tensor,
    *,
    kl_coef: float,
    beta: float,
    gamma: float = 1.0,
    lam: float = 0.95,
    kl_estimator: str = "k1",
    whiten: bool = True,
    temperature: float = 1.0,
    softcap: float | None = None,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    cliprange_value: float | None = 0.2,
    vf_coef: float = 0.1,
    dual_clip: float | None = None,
    normalizer: float | Tensor | None = None,
    entropy_coef: float = 0.0,
    grad_buffer: Tensor | None = None,
) -> tuple[Tensor, FusedPPOStats]:
    """`token_logprobs_entropy`, `rollout_advantages` and `ppo_loss` composed, gradient included.

        advantages, returns = rollout_advantages(scores, old_logprobs, ref_logprobs, attention, old_values, mask)
        loss = ppo_loss(token_logprobs(logits, tokens), …) − entropy_coef · Σ_mask entropy / normalizer

    Advantages are computed from, and whitened over, the rows given here: call it on whole optimiser batches.

    Args:
        logits: [B, T, V] float, differentiable, already shifted: logits[:, t] predicts tokens[:, t].
        tokens: [B, T] int64. scores: [B] or [B, T]. old_logprobs, ref_logprobs, old_values: [B, T], constants.
        attention: [B, T] or None. values: [B, T], differentiable. mask: [B, T] bool.
        The scalars are those of the three ops.
        grad_buffer: contiguous memory of logits' shape and dtype for their gradient. This call writes it and the
            backward pass scales it, once: it must stay as it is until then, and a second backward pass may raise. It
            may be `logits` itself, if nothing else needs them.

    Returns:
        (loss 0-d, FusedPPOStats), fp32 (fp64 for fp64 logits).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit, a token that is not below V.
    """
    op = "fused_ppo_loss"
    checks.ndim(op, "logits", logits, "[B, T, V]")
    check_logits(op, logits, tokens, mask)
    checks.same_shape(op, {"tokens": tokens}, old_logprobs=old_logprobs, values=values, old_values=old_values)
    mask = check_rewards(op, scores, old_logprobs, ref_logprobs, attention, mask, beta, kl_estimator)
    checks.floating(op, values=values, old_values=old_values)
    checks.fraction(op, gamma=gamma, lam=lam)
    checks.positive(op, temperature=temperature, softcap=softcap)
    high = check_clips(op, cliprange, cliprange_high, dual_clip)
    checks.not_negative(op, cliprange_value=cliprange_value, vf_coef=vf_coef)
    grad_buffer = check_grad_buffer(op, logits, grad_buffer)
    arguments = (
        logits,
        tokens,
        scores.detach(),
        old_logprobs.detach(),
        ref_logprobs.detach(),
        attention if attention is None else attention.detach(),
        values,
        old_values.detach(),
        mask,
        as_normalizer(op, normalizer, logits),
        temperature,
        softcap,
        kl_coef,
        beta,
        gamma,
        lam,
        kl_estimator,
        whiten,
        cliprange,
        high,
        cliprange_value,
        vf_coef,
        dual_clip,
        entropy_coef,
    )
    with_grad = needs_grad(logits, values)
    if grad_buffer is None or not with_grad:
        loss, stats, _, _ = _fwd(*arguments, with_grad)
    else:
        with torch.no_grad():
            loss, stats, dvalues = _fwd_out(*arguments, grad_buffer)
        loss = backend.attach_gradient(loss, logits, grad_buffer)
        loss = backend.attach_gradient(loss, values, dvalues)
    return loss, FusedPPOStats(*stats.unbind())

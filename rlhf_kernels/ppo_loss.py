"""The clipped PPO loss of policy and value, with its gradient from the same pass."""

from typing import Any

import torch
from torch import Tensor

from . import backend, checks, reference, reference_losses
from .stats import PPOStats

_triton = backend.import_triton("ppo_loss")


def _fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    values, with_grad = rest[2], rest[-1]
    loss, stats = loss_fake(logprobs, len(PPOStats._fields))
    return loss, stats, grad_fake(logprobs, with_grad), grad_fake(values, with_grad)


def loss_fake(like: Tensor, stats: int) -> tuple[Tensor, Tensor]:
    dtype = reference.compute_dtype(like)
    return like.new_empty((), dtype=dtype), like.new_empty(stats, dtype=dtype)


def grad_fake(tensor: Tensor, needed: bool) -> Tensor:
    return tensor.new_empty(tensor.shape if needed else 0)


_fwd = backend.register(
    "ppo_loss_fwd(Tensor logprobs, Tensor old_logprobs, Tensor advantages, Tensor values, Tensor old_values, "
    "Tensor returns, Tensor mask, Tensor? normalizer, float cliprange, float cliprange_high, float? cliprange_value, "
    "float vf_coef, float? dual_clip, bool with_grad) "
    "-> (Tensor loss, Tensor stats, Tensor dlogprobs, Tensor dvalues)",
    fake=_fake,
    torch_impl=reference_losses.ppo_loss_fwd,
    triton=_triton and _triton.fwd,
)
backend.register_loss_autograd("ppo_loss_fwd", {0: 2, 3: 3})


def ppo_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    *,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    cliprange_value: float | None = 0.2,
    vf_coef: float = 0.1,
    dual_clip: float | None = None,
    normalizer: float | Tensor | None = None,
) -> tuple[Tensor, PPOStats]:
    """Clipped policy loss plus clipped value loss.

        ρ = exp(clamp(logprobs − old_logprobs, ±20))
        policy = max(−A·ρ, −A·clip(ρ, 1 − cliprange, 1 + cliprange_high)),   for A < 0 at most −dual_clip·A
        value = ½ max((V − returns)², (V_old + clip(V − V_old, ±cliprange_value) − returns)²)
        loss = (Σ_mask policy + vf_coef · Σ_mask value) / normalizer

    Args:
        logprobs, values: [...] float, differentiable. old_logprobs, advantages, old_values, returns: the same shape,
            constants. mask: [...] bool.
        cliprange: lower bound of the ratio is 1 − cliprange. cliprange_high: upper bound, cliprange unless given.
        cliprange_value: None for no value clipping. dual_clip: greater than 1, or None.
        normalizer: number of tokens to divide by, a number or a 0-d tensor; the mask's own unless given. With
            micro-batches or several ranks give the optimiser step's total.

    Returns:
        (loss 0-d, PPOStats), fp32 (fp64 for fp64 logprobs). Two −inf log-probabilities take their token out. An
        empty mask gives loss 0 with zero gradients.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.

    Source: Schulman et al. 2017 (arXiv 1707.06347); dual clip: Ye et al. 2020 (arXiv 1912.09729).
    """
    op = "ppo_loss"
    checks.is_tensor(op, logprobs=logprobs, mask=mask)
    mask = checks.as_mask(op, "mask", mask)
    constants = {"old_logprobs": old_logprobs, "advantages": advantages, "old_values": old_values, "returns": returns}
    checks.same_shape(op, {"logprobs": logprobs}, **constants, values=values, mask=mask)
    checks.floating(op, logprobs=logprobs, values=values, **constants)
    high = check_clips(op, cliprange, cliprange_high, dual_clip)
    checks.not_negative(op, cliprange_value=cliprange_value, vf_coef=vf_coef)
    loss, stats, _, _ = _fwd(
        logprobs,
        old_logprobs.detach(),
        advantages.detach(),
        values,
        old_values.detach(),
        returns.detach(),
        mask,
        as_normalizer(op, normalizer, logprobs),
        cliprange,
        high,
        cliprange_value,
        vf_coef,
        dual_clip,
        needs_grad(logprobs, values),
    )
    return loss, PPOStats(*stats.unbind())


def check_clips(op: str, cliprange: float, cliprange_high: float | None, dual_clip: float | None) -> float:
    """The checks shared by the PPO losses; returns the upper clip range."""
    checks.not_negative(op, cliprange=cliprange, cliprange_high=cliprange_high)
    if dual_clip is not None and not dual_clip > 1:
        checks.fail(op, "dual_clip", "be greater than 1", dual_clip)
    return cliprange if cliprange_high is None else cliprange_high


def as_normalizer(op: str, normalizer: float | Tensor | None, like: Tensor) -> Tensor | None:
    if normalizer is None:
        return None
    if not isinstance(normalizer, Tensor):
        checks.positive(op, normalizer=normalizer)
        return torch.full((), normalizer, dtype=reference.compute_dtype(like), device=like.device)
    checks.shape(op, "normalizer", normalizer, ())
    checks.same_device(op, {"logprobs": like}, normalizer=normalizer)
    return normalizer.detach()


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)

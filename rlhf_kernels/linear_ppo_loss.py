"""The clipped policy loss from hidden states and the head: three matrix products and no [N, V] tensor."""

from typing import Any

from torch import Tensor

from . import backend, checks, reference_losses
from .linear_logprobs import check_linear, linear_grads_fake
from .ppo_loss import as_normalizer, check_clips, loss_fake, needs_grad
from .stats import LinearPPOStats

_triton = backend.import_triton("linear_ppo_loss")


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, needs = rest[4], rest[-3]
    return *loss_fake(hidden, len(LinearPPOStats._fields)), *linear_grads_fake(hidden, weight, bias, needs)


_fwd = backend.register(
    "linear_ppo_loss_fwd(Tensor hidden, Tensor weight, Tensor tokens, Tensor old_logprobs, Tensor advantages, "
    "Tensor mask, Tensor? bias, Tensor? ref_logprobs, Tensor? normalizer, float temperature, float cliprange, "
    "float cliprange_high, float? dual_clip, float entropy_coef, float kl_coef, bool[3] needs, "
    "int? memory_budget, int? max_tokens) -> (Tensor loss, Tensor stats, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake,
    torch_impl=reference_losses.linear_ppo_loss_fwd,
    triton=_triton and _triton.fwd,
)
backend.register_loss_autograd("linear_ppo_loss_fwd", {0: 2, 1: 3, 6: 4})


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    cliprange: float = 0.2,
    cliprange_high: float | None = None,
    dual_clip: float | None = None,
    entropy_coef: float = 0.0,
    ref_logprobs: Tensor | None = None,
    kl_coef: float = 0.0,
    normalizer: float | Tensor | None = None,
    memory_budget: int | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, LinearPPOStats]:
    """The policy part of `ppo_loss` on `linear_logprobs(hidden, weight, tokens)`, plus entropy and KL terms.

        loss = Σ_mask (policy − entropy_coef · entropy + kl_coef · k3(logprobs − ref_logprobs)) / normalizer

    The gradients are computed in the forward pass, so this must be the last op before `backward()`: they live from
    one to the other, and a forward that activation checkpointing runs again is paid twice.

    Args:
        hidden: [..., H] float. weight: [V, H]. bias: [V] or None. All three differentiable.
        tokens: [...] int64. old_logprobs, advantages: [...], constants. mask: [...] bool.
        ref_logprobs: [...] or None, for the KL term in the loss (k3, as in GRPO).
        memory_budget, max_tokens: as in `linear_logprobs`.
        The other scalars are those of `ppo_loss` and `token_logprobs`.

    Returns:
        (loss 0-d, LinearPPOStats), fp32 (fp64 for fp64 hidden).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit, a token that is not below V, a
            kl_coef other than 0 without ref_logprobs.
    """
    op = "linear_ppo_loss"
    hidden, weight, bias, _ = check_linear(op, hidden, weight, tokens, mask, bias)
    mask = checks.as_mask(op, "mask", mask)
    checks.same_shape(
        op, {"tokens": tokens}, old_logprobs=old_logprobs, advantages=advantages, ref_logprobs=ref_logprobs
    )
    checks.floating(op, old_logprobs=old_logprobs, advantages=advantages, ref_logprobs=ref_logprobs)
    checks.positive(op, temperature=temperature, memory_budget=memory_budget)
    checks.not_negative(op, max_tokens=max_tokens)
    high = check_clips(op, cliprange, cliprange_high, dual_clip)
    if ref_logprobs is None and kl_coef != 0:
        checks.fail(op, "ref_logprobs", f"be given for kl_coef {kl_coef}", None)
    grads = [needs_grad(tensor) for tensor in (hidden, weight, bias)]
    loss, stats, *_ = _fwd(
        hidden,
        weight,
        tokens,
        old_logprobs.detach(),
        advantages.detach(),
        mask,
        bias,
        ref_logprobs if ref_logprobs is None else ref_logprobs.detach(),
        as_normalizer(op, normalizer, hidden),
        temperature,
        cliprange,
        high,
        dual_clip,
        entropy_coef,
        kl_coef,
        grads,
        memory_budget,
        max_tokens,
    )
    return loss, LinearPPOStats(*stats.unbind())

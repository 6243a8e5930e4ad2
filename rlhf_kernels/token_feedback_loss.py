"""Learning from marked tokens: the bounded bandit update, or unlikelihood."""

from typing import Any

import torch
from torch import Tensor

from . import backend, checks, reference_losses
from .ppo_loss import grad_fake, loss_fake, needs_grad
from .stats import TokenFeedbackStats
from .token_logprobs import check_grad_buffer, check_logits

_triton = backend.import_triton("token_feedback_loss")

KINDS = ("bandit", "unlikelihood")


def _fake(logits: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *loss_fake(logits, len(TokenFeedbackStats._fields)), grad_fake(logits, rest[-1])


_ARGUMENTS = "Tensor logits, Tensor ref_logits, Tensor tokens, Tensor labels, float beta, str kind"
_fwd = backend.register(
    f"token_feedback_loss_fwd({_ARGUMENTS}, bool with_grad) -> (Tensor loss, Tensor stats, Tensor dlogits)",
    fake=_fake,
    torch_impl=reference_losses.token_feedback_loss_fwd,
    triton=_triton and _triton.fwd,
)
_fwd_out = backend.register(
    f"token_feedback_loss_fwd_out({_ARGUMENTS}, Tensor(a!) dlogits) -> (Tensor loss, Tensor stats)",
    fake=lambda logits, *_: loss_fake(logits, len(TokenFeedbackStats._fields)),
    torch_impl=reference_losses.token_feedback_loss_fwd_out,
    triton=_triton and _triton.fwd_out,
)
backend.register_loss_autograd("token_feedback_loss_fwd", {0: 2})


def token_feedback_loss(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    labels: Tensor,
    *,
    beta: float,
    kind: str = "bandit",
    grad_buffer: Tensor | None = None,
) -> tuple[Tensor, TokenFeedbackStats]:
    """Loss for tokens that a person marked good or bad, averaged over all tokens given.

        "bandit"        KL(π* ‖ π) with π*(v) = ref(v)·exp(label/beta · 1[v = token]) / Z, the exact optimum of
                        E_π[label · 1[v = token]] − beta·KL(π ‖ ref): bounded, and undone by the opposite label
        "unlikelihood"  −label·log π(token) for a good token, −|label|·log(1 − π(token)) for a bad one,
                        beta·KL(ref ‖ π) for an unlabelled one

    Args:
        logits: [..., V] float, differentiable. ref_logits: [..., V], constants.
        tokens: [...] int64; negative ones (padding) are left out. labels: [...] float, sign and weight, 0 unlabelled
            (in both kinds an anchor to the reference).
        beta: strength of the anchor, greater than 0.
        grad_buffer: memory for the gradient of `logits`, as in `fused_ppo_loss`.

    Returns:
        (loss 0-d, TokenFeedbackStats), fp32 (fp64 for fp64 logits).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit, a token that is not below V.

    Source: closed form of KL-regularised control (Ziebart 2010) at horizon one; unlikelihood: Welleck et al. 2020
    (arXiv 1908.04319).
    """
    op = "token_feedback_loss"
    check_logits(op, logits, tokens, None)
    checks.same_shape(op, {"logits": logits}, ref_logits=ref_logits)
    checks.same_shape(op, {"tokens": tokens}, labels=labels)
    checks.floating(op, ref_logits=ref_logits, labels=labels)
    checks.positive(op, beta=beta)
    checks.one_of(op, "kind", kind, KINDS)
    grad_buffer = check_grad_buffer(op, logits, grad_buffer)
    arguments = (logits, ref_logits.detach(), tokens, labels.detach(), beta, kind)
    with_grad = needs_grad(logits)
    if grad_buffer is None or not with_grad:
        loss, stats, _ = _fwd(*arguments, with_grad)
    else:
        with torch.no_grad():
            loss, stats = _fwd_out(*arguments, grad_buffer)
        loss = backend.attach_gradient(loss, logits, grad_buffer)
    return loss, TokenFeedbackStats(*stats.unbind())

"""Policy and reference in one pass over both logits: log-probabilities, entropy and the exact KL."""

from typing import Any

import torch
from torch import Tensor

from . import backend, checks, reference
from .token_logprobs import check_grad_buffer, check_logits

_triton = backend.import_triton("policy_ref_logprobs")


def _fwd_fake(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    grad_buffer: Tensor | None,
) -> tuple[Tensor, ...]:
    row = logits.new_empty(tokens.shape, dtype=reference.compute_dtype(logits))
    ref_row = ref_logits.new_empty(tokens.shape, dtype=reference.compute_dtype(ref_logits))
    return row, ref_row, torch.empty_like(row), torch.empty_like(row), torch.empty_like(row), torch.empty_like(ref_row)


def _bwd_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_fwd = backend.register(
    "policy_ref_logprobs_fwd(Tensor logits, Tensor ref_logits, Tensor tokens, Tensor? mask, float temperature, "
    "Tensor? grad_buffer) "
    "-> (Tensor logprobs, Tensor ref_logprobs, Tensor entropy, Tensor kl, Tensor lse, Tensor ref_lse)",
    fake=_fwd_fake,
    torch_impl=reference.policy_ref_logprobs_fwd,
    triton=_triton and _triton.fwd,
)
_bwd = backend.register(
    "policy_ref_logprobs_bwd(Tensor logits, Tensor ref_logits, Tensor tokens, Tensor? mask, Tensor lse, "
    "Tensor ref_lse, Tensor entropy, Tensor kl, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_kl, "
    "float temperature) -> Tensor",
    fake=_bwd_fake,
    torch_impl=reference.policy_ref_logprobs_bwd,
    triton=_triton and _triton.bwd,
)
_bwd_out = backend.register(
    "policy_ref_logprobs_bwd_out(Tensor logits, Tensor ref_logits, Tensor tokens, Tensor? mask, Tensor lse, "
    "Tensor ref_lse, Tensor entropy, Tensor kl, Tensor? grad_logprobs, Tensor? grad_entropy, Tensor? grad_kl, "
    "float temperature, Tensor(a!) dlogits) -> ()",
    fake=lambda *_: None,
    torch_impl=reference.policy_ref_logprobs_bwd_out,
    triton=_triton and _triton.bwd_out,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, ref_logits, tokens, mask, ctx.temperature, ctx.grad_buffer = inputs
    _, ref_logprobs, entropy, kl, lse, ref_lse = output
    ctx.save_for_backward(logits, ref_logits, tokens, mask, lse, ref_lse, entropy, kl)
    ctx.mark_non_differentiable(ref_logprobs, lse, ref_lse)
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, _: Any, grad_entropy: Tensor | None, grad_kl: Tensor | None, *__: Any
) -> tuple[Tensor | None, ...]:
    if grad_logprobs is None and grad_entropy is None and grad_kl is None:
        return (None,) * 6
    arguments = (*ctx.saved_tensors, grad_logprobs, grad_entropy, grad_kl, ctx.temperature)
    if ctx.grad_buffer is None:
        return _bwd(*arguments), *(None,) * 5
    _bwd_out(*arguments, ctx.grad_buffer)
    return ctx.grad_buffer, *(None,) * 5


backend.register_autograd("policy_ref_logprobs_fwd", _backward, _setup_context)


def policy_ref_logprobs(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    grad_buffer: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Log-probabilities under policy π and reference, entropy of π, and their exact KL over the vocabulary.

        kl_t = Σ_v π_t(v) · (log π_t(v) − log ref_t(v))

    Args:
        logits, ref_logits: [..., V] float, both divided by `temperature`.
        tokens: [...] int64. mask: [...] bool, True where the token counts.
        grad_buffer: memory for the gradient of `logits`, as in `token_logprobs`.

    Returns:
        (logprobs, ref_logprobs, entropy, kl), each [...] in fp32 (fp64 for fp64 logits), in nats; differentiable in
        `logits` only: the reference is a constant.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a token that is not below V.
    """
    op = "policy_ref_logprobs"
    mask = check_logits(op, logits, tokens, mask)
    checks.same_shape(op, {"logits": logits}, ref_logits=ref_logits)
    checks.floating(op, ref_logits=ref_logits)
    checks.positive(op, temperature=temperature)
    grad_buffer = check_grad_buffer(op, logits, grad_buffer)
    return _fwd(logits, ref_logits.detach(), tokens, mask, temperature, grad_buffer)[:4]

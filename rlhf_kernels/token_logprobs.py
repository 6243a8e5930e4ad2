"""log π(a_t | s_t) and the entropy of π(· | s_t) from logits, without a log-softmax tensor."""

from typing import Any

import torch
from torch import Tensor

from . import backend, checks, reference

_triton = backend.import_triton("token_logprobs")


def _fwd_fake(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    grad_buffer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    logprobs = logits.new_empty(tokens.shape, dtype=reference.compute_dtype(logits))
    return logprobs, torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0), torch.empty_like(logprobs)


def _bwd_fake(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


_fwd = backend.register(
    "token_logprobs_fwd(Tensor logits, Tensor tokens, Tensor? mask, float temperature, float? softcap, "
    "bool with_entropy, Tensor? grad_buffer) -> (Tensor logprobs, Tensor entropy, Tensor lse)",
    fake=_fwd_fake,
    torch_impl=reference.token_logprobs_fwd,
    triton=_triton and _triton.fwd,
)
_bwd = backend.register(
    "token_logprobs_bwd(Tensor logits, Tensor tokens, Tensor? mask, Tensor lse, Tensor entropy, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, float? softcap) -> Tensor",
    fake=_bwd_fake,
    torch_impl=reference.token_logprobs_bwd,
    triton=_triton and _triton.bwd,
)
_bwd_out = backend.register(
    "token_logprobs_bwd_out(Tensor logits, Tensor tokens, Tensor? mask, Tensor lse, Tensor entropy, "
    "Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, float? softcap, Tensor(a!) dlogits) -> ()",
    fake=lambda *_: None,
    torch_impl=reference.token_logprobs_bwd_out,
    triton=_triton and _triton.bwd_out,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits, tokens, mask, ctx.temperature, ctx.softcap, with_entropy, ctx.grad_buffer = inputs
    _, entropy, lse = output
    ctx.save_for_backward(logits, tokens, mask, lse, entropy)
    ctx.mark_non_differentiable(lse, *([] if with_entropy else [entropy]))
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad_logprobs is None and grad_entropy is None:
        return (None,) * 7
    arguments = (*ctx.saved_tensors, grad_logprobs, grad_entropy, ctx.temperature, ctx.softcap)
    if ctx.grad_buffer is None:
        return _bwd(*arguments), *(None,) * 6
    _bwd_out(*arguments, ctx.grad_buffer)
    return ctx.grad_buffer, *(None,) * 6


backend.register_autograd("token_logprobs_fwd", _backward, _setup_context)


def token_logprobs(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    grad_buffer: Tensor | None = None,
) -> Tensor:
    """Log-probability of each token under the softmax of its logits.

        u = softcap · tanh(logits / softcap)  (if softcap);   z = u / temperature
        logprobs_t = z_t[tokens_t] − logsumexp_v z_t[v]

    Args:
        logits: [..., V] float, any strides; −inf entries are excluded from the softmax and get no gradient.
        tokens: [...] int64. A negative token (−100) counts as masked.
        mask: [...] bool, True where the token counts. Masked rows are not read, give 0 and a zero gradient.
        temperature: divides the logits; must be the one the tokens were sampled with.
        softcap: bound of the tanh soft cap, None for none.
        grad_buffer: contiguous memory of logits' shape and dtype for their gradient, which the backward pass returns
            instead of fresh memory: yours again when the gradient has been used. It may be `logits` itself, if nothing
            needs them after the backward pass; a second backward pass then raises.

    Returns:
        logprobs [...] in fp32 (fp64 for fp64 logits), differentiable in `logits`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit; a token that is not below V (on the CPU;
            on a GPU its log-probability is NaN).

    Source: Ziegler et al. 2019 (arXiv 1909.08593) for its use as a policy's log-probability.
    """
    return _token_logprobs("token_logprobs", logits, tokens, mask, temperature, softcap, False, grad_buffer)[0]


def token_logprobs_entropy(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float = 1.0,
    softcap: float | None = None,
    grad_buffer: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` and, from the same pass, the entropy of each softmax in nats.

        entropy_t = logsumexp_v z_t[v] − Σ_v p_t[v] · z_t[v]

    Arguments and errors as in `token_logprobs`.

    Returns:
        (logprobs [...], entropy [...]) in fp32 (fp64 for fp64 logits), both differentiable in `logits`.
    """
    return _token_logprobs("token_logprobs_entropy", logits, tokens, mask, temperature, softcap, True, grad_buffer)[:2]


def _token_logprobs(
    op: str,
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    grad_buffer: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    mask = check_logits(op, logits, tokens, mask)
    checks.positive(op, temperature=temperature, softcap=softcap)
    grad_buffer = check_grad_buffer(op, logits, grad_buffer)
    return _fwd(logits, tokens, mask, temperature, softcap, with_entropy, grad_buffer)


def check_grad_buffer(op: str, logits: Tensor, grad_buffer: Tensor | None) -> Tensor | None:
    """The checks of memory for the gradient of the logits; returns it outside of any graph."""
    if grad_buffer is None:
        return None
    checks.same_shape(op, {"logits": logits}, grad_buffer=grad_buffer)
    if grad_buffer.dtype != logits.dtype or not grad_buffer.is_contiguous():
        got = f"{grad_buffer.dtype} with strides {grad_buffer.stride()}"
        checks.fail(op, "grad_buffer", f"be contiguous and {logits.dtype} like logits", got)
    return grad_buffer.detach()


def check_logits(op: str, logits: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor | None:
    """The checks shared by the ops that take logits and tokens; returns the mask as bool."""
    checks.is_tensor(op, logits=logits, tokens=tokens)
    checks.floating(op, logits=logits)
    checks.index(op, tokens=tokens)
    if logits.ndim == 0 or logits.shape[-1] == 0:
        checks.fail(op, "logits", "have shape [..., V]", tuple(logits.shape))
    checks.shape(op, "tokens", tokens, logits.shape[:-1], checks.to_match("logits", logits))
    checks.same_device(op, {"logits": logits}, tokens=tokens)
    if mask is not None:
        mask = checks.as_mask(op, "mask", mask)
        checks.same_shape(op, {"tokens": tokens}, mask=mask)
    return mask

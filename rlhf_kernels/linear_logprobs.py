"""log π(a_t | s_t) and entropy from hidden states and the head, without an [N, V] tensor."""

from typing import Any

import torch
from torch import Tensor

from . import backend, checks, reference
from .ppo_loss import needs_grad

_triton = backend.import_triton("linear_logprobs")

KEPT_LOGITS = 256 << 20  # bytes that a CPU keeps for the backward pass, unless a budget is given


def _fwd_fake(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    with_unit: bool,
    memory_budget: int | None,
    max_tokens: int | None,
    keep_logits: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs = hidden.new_empty(tokens.shape, dtype=reference.compute_dtype(hidden))
    entropy = torch.empty_like(logprobs) if with_entropy else logprobs.new_empty(0)
    unit = hidden.new_empty(hidden.shape if with_unit else 0)
    kept = logprobs.new_empty((tokens.numel(), weight.shape[0]) if keep_logits else 0)
    return logprobs, entropy, torch.empty_like(logprobs), unit, kept


def linear_grads_fake(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """∂hidden, ∂weight, ∂bias as the linear ops return them: an empty tensor for what is not needed."""
    return (
        hidden.new_empty(hidden.shape if needs[0] else 0),
        weight.new_empty(weight.shape if needs[1] else 0),
        (hidden if bias is None else bias).new_empty(weight.shape[0] if needs[2] else 0),
    )


def _bwd_fake(
    hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor | None, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return linear_grads_fake(hidden, weight, bias, rest[-4])


_fwd = backend.register(
    "linear_logprobs_fwd(Tensor hidden, Tensor weight, Tensor tokens, Tensor? mask, Tensor? bias, float temperature, "
    "float? softcap, bool with_entropy, bool with_unit, int? memory_budget, int? max_tokens, bool keep_logits) "
    "-> (Tensor logprobs, Tensor entropy, Tensor lse, Tensor unit, Tensor kept)",
    fake=_fwd_fake,
    torch_impl=reference.linear_logprobs_fwd,
    triton=_triton and _triton.fwd,
)
_bwd = backend.register(
    "linear_logprobs_bwd(Tensor hidden, Tensor weight, Tensor tokens, Tensor? mask, Tensor? bias, Tensor lse, "
    "Tensor entropy, Tensor? grad_logprobs, Tensor? grad_entropy, float temperature, float? softcap, bool[3] needs, "
    "int? memory_budget, int? max_tokens, Tensor? kept) -> (Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_bwd_fake,
    torch_impl=reference.linear_logprobs_bwd,
    triton=_triton and _triton.bwd,
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    hidden, weight, tokens, mask, bias, ctx.temperature, ctx.softcap, with_entropy, ctx.with_unit, *rest = inputs
    *ctx.limits, keep_logits = rest
    _, entropy, lse, unit, kept = output
    if ctx.with_unit:
        ctx.save_for_backward(tokens, mask, unit)
    else:
        ctx.save_for_backward(hidden, weight, tokens, mask, bias, lse, entropy, kept if keep_logits else None)
    ctx.mark_non_differentiable(lse, unit, kept, *([] if with_entropy else [entropy]))
    ctx.set_materialize_grads(False)


def _backward(
    ctx: Any, grad_logprobs: Tensor | None, grad_entropy: Tensor | None, *_: Any
) -> tuple[Tensor | None, ...]:
    result: list[Tensor | None] = [None] * 12
    if grad_logprobs is None and grad_entropy is None:
        return tuple(result)
    if ctx.with_unit:
        # A row's gradient is its upstream gradient times what the forward pass has found: no product is left to do.
        tokens, mask, unit = ctx.saved_tensors
        assert grad_logprobs is not None
        valid = reference.valid_tokens(tokens, mask)
        result[0] = (unit * torch.where(valid, grad_logprobs, 0)[..., None]).to(unit.dtype)
        return tuple(result)
    positions = (0, 1, 4)
    needs = [ctx.needs_input_grad[position] for position in positions]
    *saved, kept = ctx.saved_tensors
    grads = _bwd(*saved, grad_logprobs, grad_entropy, ctx.temperature, ctx.softcap, needs, *ctx.limits, kept)
    for position, need, grad in zip(positions, needs, grads):
        result[position] = grad if need else None
    return tuple(result)


backend.register_autograd("linear_logprobs_fwd", _backward, _setup_context)


def linear_logprobs(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
    max_tokens: int | None = None,
) -> Tensor:
    """`token_logprobs(hidden @ weight.T + bias, tokens, mask)` with only a chunk of the logits in memory at a time.

    Four matrix products forward and backward together; two, all in the forward pass, if only hidden needs a gradient.
    On a CPU three, where the fp32 logits of all tokens fit the budget: they are then kept for the backward pass.

    Args:
        hidden: [..., H] float. weight: [V, H], the language-model head. bias: [V] or None.
        tokens: [...] int64. mask: [...] bool. temperature, softcap: as in `token_logprobs`.
        memory_budget: bytes that a chunk of logits may take, and beside it the kept ones; the backend's own choice
            unless given (2 GiB on a GPU; on a CPU 64 MiB, 256 MiB in bf16, and 256 MiB of kept logits).
        max_tokens: no more than so many tokens count, so products are made for no more. A GPU cannot see the number
            without waiting; the CPU does, and needs no hint. Where more count, it is an error (on a GPU: NaN).

    Returns:
        logprobs [...] in fp32 (fp64 for fp64 hidden), differentiable in hidden, weight and bias; the logits are kept
        in fp32 also for bf16 inputs. Under autocast hidden, weight and bias are cast as in `F.linear`.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit, a token that is not below V.
    """
    return _linear_logprobs(
        "linear_logprobs", hidden, weight, tokens, mask, bias, temperature, softcap, False, memory_budget, max_tokens
    )[0]


def linear_logprobs_entropy(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    memory_budget: int | None = None,
    max_tokens: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_logprobs` and the entropy of each softmax in nats, from the same pass.

    Arguments and errors as in `linear_logprobs`.

    Returns:
        (logprobs [...], entropy [...]) in fp32 (fp64 for fp64 hidden), both differentiable.
    """
    return _linear_logprobs(
        "linear_logprobs_entropy",
        hidden,
        weight,
        tokens,
        mask,
        bias,
        temperature,
        softcap,
        True,
        memory_budget,
        max_tokens,
    )[:2]


def _linear_logprobs(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    memory_budget: int | None,
    max_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    hidden, weight, bias, mask = check_linear(op, hidden, weight, tokens, mask, bias)
    checks.positive(op, temperature=temperature, softcap=softcap, memory_budget=memory_budget)
    checks.not_negative(op, max_tokens=max_tokens)
    # With a frozen head ∂logprob/∂hidden is ready before any upstream gradient is; an entropy would need a second one.
    with_unit = needs_grad(hidden) and not needs_grad(weight, bias) and not with_entropy
    size = tokens.numel() * weight.shape[0] * reference.compute_dtype(hidden).itemsize
    keep_logits = (
        needs_grad(hidden, weight, bias)
        and not with_unit
        and hidden.device.type == "cpu"
        and size <= (memory_budget or KEPT_LOGITS)
    )
    limits = (memory_budget, max_tokens, keep_logits)
    return _fwd(hidden, weight, tokens, mask, bias, temperature, softcap, with_entropy, with_unit, *limits)


def check_linear(
    op: str, hidden: Tensor, weight: Tensor, tokens: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The checks shared by the ops that take a head; returns hidden, weight, bias (autocast applied) and the mask."""
    checks.is_tensor(op, hidden=hidden, weight=weight, tokens=tokens)
    checks.floating(op, hidden=hidden, weight=weight, bias=bias)
    checks.index(op, tokens=tokens)
    checks.ndim(op, "weight", weight, "[V, H]")
    if hidden.ndim == 0 or hidden.shape[-1] != weight.shape[1]:
        wanted = f"have shape [..., {weight.shape[1]}] {checks.to_match('weight', weight)}"
        checks.fail(op, "hidden", wanted, tuple(hidden.shape))
    checks.shape(op, "tokens", tokens, hidden.shape[:-1], checks.to_match("hidden", hidden))
    if bias is not None:
        checks.shape(op, "bias", bias, weight.shape[:1], checks.to_match("weight", weight))
    checks.same_device(op, {"hidden": hidden}, weight=weight, tokens=tokens, bias=bias)
    if mask is not None:
        mask = checks.as_mask(op, "mask", mask)
        checks.same_shape(op, {"tokens": tokens}, mask=mask)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != hidden.dtype:
            checks.fail(op, name, f"be {hidden.dtype} like hidden", tensor.dtype, TypeError)
    return hidden, weight, bias, mask

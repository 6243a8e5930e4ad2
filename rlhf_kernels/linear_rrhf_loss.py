"""RRHF from hidden states and the head: whole prompts at a time, no [K, T, V] tensor."""

from typing import Any

from torch import Tensor

from . import backend, checks, reference_losses
from .linear_logprobs import check_linear, linear_grads_fake
from .ppo_loss import loss_fake, needs_grad
from .rrhf_loss import check_prompts
from .stats import RRHFStats

_triton = backend.import_triton("linear_rrhf_loss")


def _fake(hidden: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    bias, needs = rest[4], rest[-3]
    return *loss_fake(hidden, len(RRHFStats._fields)), *linear_grads_fake(hidden, weight, bias, needs)


_fwd = backend.register(
    "linear_rrhf_loss_fwd(Tensor hidden, Tensor weight, Tensor tokens, Tensor scores, Tensor prompts, Tensor mask, "
    "Tensor? bias, float temperature, float rank_coef, float sft_coef, float length_power, bool[3] needs, "
    "int? group_size, int? memory_budget) "
    "-> (Tensor loss, Tensor stats, Tensor dhidden, Tensor dweight, Tensor dbias)",
    fake=_fake,
    torch_impl=reference_losses.linear_rrhf_loss_fwd,
    triton=_triton and _triton.fwd,
)
backend.register_loss_autograd("linear_rrhf_loss_fwd", {0: 2, 1: 3, 6: 4})


def linear_rrhf_loss(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    scores: Tensor,
    prompts: Tensor,
    mask: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    rank_coef: float = 1.0,
    sft_coef: float = 1.0,
    length_power: float = 1.0,
    group_size: int | None = None,
    memory_budget: int | None = None,
) -> tuple[Tensor, RRHFStats]:
    """`rrhf_loss(linear_logprobs(hidden, weight, tokens, mask), scores, prompts, mask)`, gradient included.

    A token's gradient depends on all responses of its prompt. Where whole prompts fit the memory budget three matrix
    products do forward and backward together; otherwise the logits are made twice, four products. Like
    `linear_ppo_loss` it must be the last op before `backward()`.

    Args:
        hidden: [K, T, H] float. weight: [V, H]. bias: [V] or None. All three differentiable.
        tokens: [K, T] int64. scores, prompts, mask, rank_coef, sft_coef, length_power: as in `rrhf_loss`.
        temperature: as in `token_logprobs`.
        group_size: the responses of a prompt stand together, so many of them: chunks are then cut between prompts.
            Without it there is one chunk or no cut. Where it is not so, it is an error (on a GPU: NaN).
        memory_budget: as in `linear_logprobs`.

    Returns:
        (loss 0-d, RRHFStats), fp32 (fp64 for fp64 hidden).

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit, a token that is not below V.

    Source: Yuan et al. 2023 (arXiv 2304.05302).
    """
    op = "linear_rrhf_loss"
    checks.ndim(op, "hidden", hidden, "[K, T, H]")
    hidden, weight, bias, _ = check_linear(op, hidden, weight, tokens, mask, bias)
    mask = checks.as_mask(op, "mask", mask)
    check_prompts(op, "hidden", hidden, scores, prompts)
    checks.positive(op, temperature=temperature, memory_budget=memory_budget, group_size=group_size)
    checks.not_negative(op, rank_coef=rank_coef, sft_coef=sft_coef, length_power=length_power)
    if group_size is not None and hidden.shape[0] % group_size:
        checks.fail(op, "group_size", f"divide the {hidden.shape[0]} responses", group_size)
    grads = [needs_grad(tensor) for tensor in (hidden, weight, bias)]
    loss, stats, *_ = _fwd(
        hidden,
        weight,
        tokens,
        scores.detach(),
        prompts,
        mask,
        bias,
        temperature,
        rank_coef,
        sft_coef,
        length_power,
        grads,
        group_size,
        memory_budget,
    )
    return loss, RRHFStats(*stats.unbind())

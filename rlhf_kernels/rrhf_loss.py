"""RRHF: rank the responses of a prompt by their length-normalised log-probability as their scores do."""

from typing import Any

from torch import Tensor

from . import backend, checks, reference_losses
from .ppo_loss import grad_fake, loss_fake, needs_grad
from .stats import RRHFStats

_triton = backend.import_triton("rrhf_loss")


def _fake(logprobs: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return *loss_fake(logprobs, len(RRHFStats._fields)), grad_fake(logprobs, rest[-1])


_fwd = backend.register(
    "rrhf_loss_fwd(Tensor logprobs, Tensor scores, Tensor prompts, Tensor mask, float rank_coef, float sft_coef, "
    "float length_power, bool with_grad) -> (Tensor loss, Tensor stats, Tensor dlogprobs)",
    fake=_fake,
    torch_impl=reference_losses.rrhf_loss_fwd,
    triton=_triton and _triton.fwd,
)
backend.register_loss_autograd("rrhf_loss_fwd", {0: 2})


def rrhf_loss(
    logprobs: Tensor,
    scores: Tensor,
    prompts: Tensor,
    mask: Tensor,
    *,
    rank_coef: float = 1.0,
    sft_coef: float = 1.0,
    length_power: float = 1.0,
) -> tuple[Tensor, RRHFStats]:
    """Ranking loss plus the log-likelihood of the best response, as published.

        p_i = Σ_t logprobs_it / n_i^length_power        n_i: the response's own number of tokens
        rank = Σ_{i,j of one prompt: score_i < score_j} max(0, p_i − p_j)
        sft = −Σ_t logprobs of the highest-scored response (the first of equals)
        loss = mean over prompts of rank_coef · rank + sft_coef · sft

    Args:
        logprobs: [K, T] float, differentiable; K responses of any number of prompts, end of sequence included.
        scores: [K] float; a NaN score or an empty mask takes the response out. prompts: [K] int64, the prompt of each
            response. mask: [K, T] bool.
        length_power: 1 is the mean log-probability, 0 the sum.

    Returns:
        (loss 0-d, RRHFStats), fp32 (fp64 for fp64 logprobs). Equal scores carry no ranking loss.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.

    Source: Yuan et al. 2023 (arXiv 2304.05302). Their released code divides by the padded length and averages the
    second term over padding; this is the paper's formula.
    """
    op = "rrhf_loss"
    checks.ndim(op, "logprobs", logprobs, "[K, T]")
    checks.floating(op, logprobs=logprobs)
    mask = checks.as_mask(op, "mask", mask)
    checks.same_shape(op, {"logprobs": logprobs}, mask=mask)
    check_prompts(op, "logprobs", logprobs, scores, prompts)
    checks.not_negative(op, rank_coef=rank_coef, sft_coef=sft_coef, length_power=length_power)
    loss, stats, _ = _fwd(
        logprobs, scores.detach(), prompts, mask, rank_coef, sft_coef, length_power, needs_grad(logprobs)
    )
    return loss, RRHFStats(*stats.unbind())


def check_prompts(op: str, like_name: str, like: Tensor, scores: Tensor, prompts: Tensor) -> None:
    checks.is_tensor(op, scores=scores, prompts=prompts)
    because = checks.to_match(like_name, like)
    checks.shape(op, "scores", scores, like.shape[:1], because)
    checks.shape(op, "prompts", prompts, like.shape[:1], because)
    checks.floating(op, scores=scores)
    checks.index(op, prompts=prompts)
    checks.same_device(op, {like_name: like}, scores=scores, prompts=prompts)

"""Reward-model losses: pairs, rankings, absolute scores."""

from typing import Any

from torch import Tensor

from . import backend, checks, reference_losses
from .ppo_loss import grad_fake, loss_fake, needs_grad
from .rrhf_loss import check_prompts
from .stats import RMListwiseStats, RMPairwiseStats, RMRegressionStats

_triton = backend.import_triton("rm_losses")


def _fake(stats: int) -> Any:
    def fake(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        return *loss_fake(scores, stats), grad_fake(scores, rest[-1])

    return fake


_pairwise = backend.register(
    "rm_pairwise_loss_fwd(Tensor scores, Tensor chosen, Tensor rejected, Tensor? prompts, Tensor? margin, "
    "float center_coef, bool with_grad) -> (Tensor loss, Tensor stats, Tensor dscores)",
    fake=_fake(len(RMPairwiseStats._fields)),
    torch_impl=reference_losses.rm_pairwise_loss_fwd,
    triton=_triton and _triton.pairwise_fwd,
)
_listwise = backend.register(
    "rm_listwise_loss_fwd(Tensor scores, Tensor ranks, Tensor prompts, bool with_grad) "
    "-> (Tensor loss, Tensor stats, Tensor dscores)",
    fake=_fake(len(RMListwiseStats._fields)),
    torch_impl=reference_losses.rm_listwise_loss_fwd,
    triton=_triton and _triton.listwise_fwd,
)
_regression = backend.register(
    "rm_regression_loss_fwd(Tensor scores, Tensor targets, bool with_grad) "
    "-> (Tensor loss, Tensor stats, Tensor dscores)",
    fake=_fake(len(RMRegressionStats._fields)),
    torch_impl=reference_losses.rm_regression_loss_fwd,
    triton=_triton and _triton.regression_fwd,
)
for _op in ("rm_pairwise_loss_fwd", "rm_listwise_loss_fwd", "rm_regression_loss_fwd"):
    backend.register_loss_autograd(_op, {0: 2})


def rm_pairwise_loss(
    scores: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    prompts: Tensor | None = None,
    *,
    margin: Tensor | None = None,
    center_coef: float = 0.0,
) -> tuple[Tensor, RMPairwiseStats]:
    """Bradley–Terry loss over pairs of scores, each response scored once however many pairs it stands in.

        loss = mean_p softplus(R_rejected − R_chosen + margin) + center_coef · (R_chosen + R_rejected)²

    Args:
        scores: [K] float, differentiable. chosen, rejected: [P] int64 indices into scores.
        prompts: [P] int64, the prompt of each pair: the mean is first taken within a prompt, so that the C(K, 2)
            pairs of one prompt weigh as one. None: the mean over all pairs.
        margin: [P] float or None, subtracted from the difference.
        center_coef: pulls the scores' mean towards 0 (0.01 is usual).

    Returns:
        (loss 0-d, RMPairwiseStats), fp32 (fp64 for fp64 scores). No pair gives loss 0 with zero gradients.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or values that do not fit.

    Source: Ouyang et al. 2022 (arXiv 2203.02155) for C(K, 2); Touvron et al. 2023 (arXiv 2307.09288) for the margin;
    Eisenstein et al. 2023 (arXiv 2312.09244) for centering.
    """
    op = "rm_pairwise_loss"
    checks.ndim(op, "scores", scores, "[K]")
    checks.floating(op, scores=scores, margin=margin)
    checks.ndim(op, "chosen", chosen, "[P]")
    checks.same_shape(op, {"chosen": chosen}, rejected=rejected, prompts=prompts, margin=margin)
    checks.index(op, chosen=chosen, rejected=rejected, prompts=prompts)
    checks.same_device(op, {"scores": scores}, chosen=chosen)
    checks.not_negative(op, center_coef=center_coef)
    loss, stats, _ = _pairwise(scores, chosen, rejected, prompts, margin, center_coef, needs_grad(scores))
    return loss, RMPairwiseStats(*stats.unbind())


def rm_listwise_loss(scores: Tensor, ranks: Tensor, prompts: Tensor) -> tuple[Tensor, RMListwiseStats]:
    """Plackett–Luce negative log-likelihood of each prompt's ranking, averaged over prompts.

        loss_x = Σ_i ( logsumexp_{j = i or ranked below i} R_j − R_i )

    Args:
        scores: [K] float, differentiable. ranks: [K] int64, 0 is best; equal ranks are not compared with each other,
            so a ranking may stop early by giving all the rest one rank. prompts: [K] int64.

    Returns:
        (loss 0-d, RMListwiseStats), fp32 (fp64 for fp64 scores).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Plackett 1975, "The analysis of permutations"; two responses give the Bradley–Terry loss.
    """
    op = "rm_listwise_loss"
    checks.ndim(op, "scores", scores, "[K]")
    checks.same_shape(op, {"scores": scores}, ranks=ranks)
    check_prompts(op, "scores", scores, scores, prompts)
    checks.index(op, ranks=ranks)
    loss, stats, _ = _listwise(scores, ranks, prompts, needs_grad(scores))
    return loss, RMListwiseStats(*stats.unbind())


def rm_regression_loss(scores: Tensor, targets: Tensor) -> tuple[Tensor, RMRegressionStats]:
    """Mean squared error against absolute scores: mean (R − target)².

    Args:
        scores: [K] float, differentiable. targets: [K] float, constants.

    Returns:
        (loss 0-d, RMRegressionStats), fp32 (fp64 for fp64 scores).

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), scalar ratings.
    """
    op = "rm_regression_loss"
    checks.ndim(op, "scores", scores, "[K]")
    checks.same_shape(op, {"scores": scores}, targets=targets)
    checks.floating(op, scores=scores, targets=targets)
    loss, stats, _ = _regression(scores, targets.detach(), needs_grad(scores))
    return loss, RMRegressionStats(*stats.unbind())

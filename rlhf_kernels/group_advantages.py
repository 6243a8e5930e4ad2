"""Critic-free advantages: each response against the others of its prompt."""

import torch
from torch import Tensor

from . import backend, checks, reference

_triton = backend.import_triton("group_advantages")

KINDS = ("grpo", "rloo", "dr_grpo")


def _fake(scores: Tensor, groups: Tensor, kind: str) -> Tensor:
    return scores.new_empty(scores.shape, dtype=reference.compute_dtype(scores))


_group_advantages = backend.register(
    "group_advantages(Tensor scores, Tensor groups, str kind) -> Tensor",
    fake=_fake,
    torch_impl=reference.group_advantages,
    triton=_triton and _triton.group_advantages,
)


def group_advantages(scores: Tensor, groups: Tensor, *, kind: str) -> Tensor:
    """Advantage of each response within its group of G responses to one prompt.

        "grpo"     (R − mean) / (std + 1e-4), std unbiased; 0 where the group's scores are all equal
        "rloo"     R − mean of the other responses = G / (G − 1) · (R − mean)
        "dr_grpo"  R − mean

    Args:
        scores: [B] float; NaN marks a response that could not be scored: left out of its group, advantage 0.
        groups: [B] int64, any ids in any order, equal for the responses of one prompt.

    Returns:
        advantages [B] in fp32 (fp64 for fp64 scores), 0 for a group of one; not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or a kind that do not fit.

    Source: Shao et al. 2024 (arXiv 2402.03300), Ahmadian et al. 2024 (arXiv 2402.14740), Liu et al. 2025 (arXiv
    2503.20783).
    """
    op = "group_advantages"
    checks.ndim(op, "scores", scores, "[B]")
    checks.floating(op, scores=scores)
    checks.same_shape(op, {"scores": scores}, groups=groups)
    checks.index(op, groups=groups)
    checks.one_of(op, "kind", kind, KINDS)
    with torch.no_grad():
        return _group_advantages(scores, groups, kind)

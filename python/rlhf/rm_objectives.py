"""The losses of a reward model: what a ranking is held to say about the scores."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

import rlhf_kernels as rk

from .rm_data import RankingBatch

OBJECTIVES = ("pairwise", "listwise", "top1", "per-token", "absolute", "compare")
HELP = (
    "pairwise: Bradley–Terry on every pair; listwise: Plackett–Luce; top1: the best against all; per-token: pairs at "
    "every position from the first that differs; absolute: the scores themselves; compare: their differences"
)
OF_ORDER = ("pairwise", "listwise", "top1", "per-token")
"""Objectives that a ranking without two unequal scores says nothing to."""


class ObjectiveConfig(Protocol):
    @property
    def objective(self) -> str: ...
    @property
    def margin(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def center_coef(self) -> float: ...
    @property
    def pair_reduction(self) -> str: ...


def loss_of(
    predicted: Tensor, batch: RankingBatch, config: ObjectiveConfig, token_scores: Tensor | None = None
) -> Tensor:
    """The loss of scores [K], raw (not normalised), differentiable; 0-d.

        pairwise    softplus(−D) + doubt · D + center_coef · (R_chosen + R_rejected)²
                    D = R_chosen − R_rejected − margin
        per-token   softplus(−D_t) + doubt · D_t, mean over the positions t from the first token that differs to the end
                    of the shorter text
        compare     (R_chosen − R_rejected − the given difference)²
        top1        logsumexp_j R_j − R_best;  listwise: the same for each place of the ranking, among what is left

    doubt = 1 − probability, or label_smoothing where the data has no probability: the soft label q = 1 − doubt gives
    −q log σ(D) − (1 − q) log σ(−D).

    Args:
        token_scores: [K, L] scores at every position; for per-token.
    """
    if config.objective == "absolute":
        return rk.rm_regression_loss(predicted, batch.targets)[0]
    if config.objective in ("listwise", "top1"):
        # One rank for all but the best leaves one choice: the best among all.
        ranks = batch.ranks if config.objective == "listwise" else batch.ranks.clamp(max=1)
        return rk.rm_listwise_loss(predicted, ranks, batch.rankings)[0]
    if config.objective == "compare":
        difference = predicted[batch.chosen] - predicted[batch.rejected]
        given = batch.targets[batch.chosen] - batch.targets[batch.rejected]
        return pair_mean((difference - given).square(), batch.prompts, config)
    if config.objective == "per-token":
        assert token_scores is not None  # what `predict` gives for it
        return per_token_loss(token_scores, batch, config)
    margin, doubt = margins(batch, config), doubts(batch, config)
    loss = rk.rm_pairwise_loss(
        predicted,
        batch.chosen,
        batch.rejected,
        batch.prompts if config.pair_reduction == "per_prompt" else None,
        margin=margin,
        center_coef=config.center_coef,
    )[0]
    if not doubt.any():
        return loss
    difference = predicted[batch.chosen] - predicted[batch.rejected] - margin
    return loss + pair_mean(doubt * difference, batch.prompts, config)


def per_token_loss(token_scores: Tensor, batch: RankingBatch, config: ObjectiveConfig) -> Tensor:
    """Pairs of equal texts carry no loss."""
    lengths = batch.attention_mask.sum(1)
    end = torch.minimum(lengths[batch.chosen], lengths[batch.rejected])
    columns = torch.arange(batch.tokens.shape[1], device=batch.tokens.device)
    differs = (batch.tokens[batch.chosen] != batch.tokens[batch.rejected]) & (columns < end[:, None])
    first = differs.int().argmax(1)
    counted = (columns >= first[:, None]) & (columns < end[:, None]) & differs.any(1, keepdim=True)
    difference = token_scores[batch.chosen] - token_scores[batch.rejected] - margins(batch, config)[:, None]
    each = F.softplus(-difference) + doubts(batch, config)[:, None] * difference
    mean = torch.where(counted, each, 0).sum(1) / counted.sum(1).clamp(min=1)
    kept = counted.any(1)
    return pair_mean(mean[kept], batch.prompts[kept], config)


def margins(batch: RankingBatch, config: ObjectiveConfig) -> Tensor:
    """[P]: the data's own margin or, where it has none, `margin` times the given difference."""
    given = batch.targets[batch.chosen] - batch.targets[batch.rejected]
    return torch.where(batch.margins.isnan(), config.margin * given, batch.margins)


def doubts(batch: RankingBatch, config: ObjectiveConfig) -> Tensor:
    """[P]: the probability that the rejected response is the better one."""
    return torch.where(batch.probabilities < 1, 1 - batch.probabilities, config.label_smoothing)


def pair_mean(values: Tensor, prompts: Tensor, config: ObjectiveConfig) -> Tensor:
    """The mean over pairs, or over prompts of the means of their pairs; 0 for no pair."""
    if config.pair_reduction == "global" or not len(values):
        return values.sum() / max(len(values), 1)
    _, place, count = prompts.unique(return_inverse=True, return_counts=True)
    return (values / count[place]).sum() / len(count)

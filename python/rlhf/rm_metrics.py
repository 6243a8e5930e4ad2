"""How well scores order what people ordered: accuracy, margin, calibration, correlation, of each data set."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .rm_data import RankingBatch

CALIBRATION_BINS = 10
LOGGED = {"pair_accuracy": "accuracy", "top1_accuracy": "top1_accuracy", "loss": "loss", "margin": "margin"}
LOGGED |= {"ece": "ece", "correlation": "correlation"}


@dataclass
class Judged:
    """Held-out pairs and rankings of one data set: score differences, and each by its prompt."""

    differences: list[Tensor]
    by_prompt: list[float]
    best_first: list[float]


@torch.no_grad()
def evaluate(
    batches: Sequence[RankingBatch],
    predict: Callable[[RankingBatch], tuple[Tensor, Tensor]],
    *,
    correlated: bool = False,
) -> dict[str, Any]:
    """How well a model orders held-out responses.

    Args:
        predict: scores [K] and the loss (0-d) of a batch. correlated: also Pearson's r with the given scores.

    Returns:
        loss, pair_accuracy and its standard error over prompts, margin (mean score difference), top1_accuracy (share of
        the rankings whose best response scores highest), calibration and ece; with several data sets the same of each
        in "sources". Nothing where there are no batches.
    """
    if not batches:
        return {}
    losses, predictions = [], []
    found: dict[str, Judged] = {}
    for batch in batches:
        predicted, loss = predict(batch)
        losses.append(loss.item())
        predictions.append(torch.stack([predicted, batch.targets]))
        difference = predicted[batch.chosen] - predicted[batch.rejected]
        for number, source in enumerate(batch.sources):
            pairs = difference[batch.prompts == number]
            if not len(pairs):
                continue
            own = batch.rankings == number
            judged = found.setdefault(source, Judged([], [], []))
            judged.differences.append(pairs)
            judged.by_prompt.append((pairs > 0).float().mean().item())
            judged.best_first.append(float(batch.ranks[own][predicted[own].argmax()] == 0))
    result: dict[str, Any] = {"loss": sum(losses) / len(losses)}
    if found:
        result |= describe(list(found.values()))
    if len(found) > 1:
        result["sources"] = {name: describe([judged]) for name, judged in sorted(found.items())}
    if correlated:
        result["correlation"] = torch.corrcoef(torch.cat(predictions, 1))[0, 1].item()
    return result


def describe(judged: Sequence[Judged]) -> dict[str, Any]:
    difference = torch.cat([pairs for each in judged for pairs in each.differences])
    prompts = torch.tensor([value for each in judged for value in each.by_prompt], dtype=torch.float64)
    best = [value for each in judged for value in each.best_first]
    return {
        "pair_accuracy": (difference > 0).float().mean().item(),
        "pair_accuracy_sem": prompts.std(unbiased=False).item() / math.sqrt(len(prompts)),
        "margin": difference.mean().item(),
        "top1_accuracy": sum(best) / len(best),
        "pairs": len(difference),
        **calibration(difference),
    }


def calibration(difference: Tensor) -> dict[str, Any]:
    """Is a pair that the model holds p likely ordered as it says in a share p of the cases?

    Args:
        difference: [P] score(chosen) − score(rejected); the model's confidence in its own order is σ(|difference|).

    Returns:
        calibration: for each non-empty tenth of [0.5, 1] the mean confidence ("bins"), the share of pairs in the right
        order ("accuracy") and their number ("count"); ece: the mean of |accuracy − confidence| weighted by the counts.
    """
    confidence = difference.abs().sigmoid().double()
    right = (difference > 0).double()
    place = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    count = torch.bincount(place, minlength=CALIBRATION_BINS)
    kept = count > 0
    mean_confidence = torch.bincount(place, confidence, CALIBRATION_BINS)[kept] / count[kept]
    accuracy = torch.bincount(place, right, CALIBRATION_BINS)[kept] / count[kept]
    error = ((accuracy - mean_confidence).abs() * count[kept]).sum() / count.sum()
    bins = {"bins": mean_confidence.tolist(), "accuracy": accuracy.tolist(), "count": count[kept].tolist()}
    return {"calibration": bins, "ece": error.item()}


def score_metrics(predicted: Tensor, batch: RankingBatch) -> dict[str, float]:
    """Of a training batch."""
    difference = predicted[batch.chosen] - predicted[batch.rejected]
    rewards = {
        "mean_reward": predicted.mean().item(),
        "min_reward": predicted.min().item(),
        "max_reward": predicted.max().item(),
    }
    if not len(difference):
        return rewards
    return {"accuracy": (difference > 0).float().mean().item(), "margin": difference.mean().item(), **rewards}


def eval_metrics(result: dict[str, Any]) -> dict[str, float]:
    """An evaluation as one step's metrics: eval/accuracy, eval/loss …, and eval/accuracy/<source>."""
    metrics = {f"eval/{LOGGED[key]}": value for key, value in result.items() if key in LOGGED}
    for name, each in result.get("sources", {}).items():
        metrics |= {f"eval/{LOGGED[key]}/{name}": each[key] for key in ("pair_accuracy", "margin", "ece")}
    return metrics

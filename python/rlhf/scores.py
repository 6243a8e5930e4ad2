"""What happens to a score between the reward model and the rewards: normalisation, clipping, the missing-EOS rule.

In this order: the reward model's own normalisation and the fitted ones ("affine", "bias-only", "delta"), which belong
to the reward model; the missing-EOS rule; the running ones, which belong to the rollouts; the clip (before the running
ones with `clip_before`, as trlx does).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FITTED = ("affine", "bias-only", "delta")
RUNNING = ("running-std", "ref-std", "running-z")
NORMALIZATIONS = ("none", *FITTED, *RUNNING)

MISSING_EOS = ("subtract", "replace", "scale", "soft-overlong", "mask")


def missing_eos(
    rule: str,
    scores: Tensor,
    terminated: Tensor,
    lengths: Tensor,
    *,
    penalty: float,
    response_length: int,
    buffer: int,
) -> Tensor:
    """scores [B] after the rule for responses that were cut off.

        "subtract"       score − penalty
        "replace"        −penalty
        "scale"          score · penalty, which lies between 0 and 1
        "soft-overlong"  score − penalty · min(max(length − (response_length − buffer), 0) / buffer, 1), also for a
                         response that ended, as DAPO has it
        "mask"           score: the response is left out of the losses

    Args:
        terminated: [B] bool, True where EOS was sampled. lengths: [B] tokens, EOS included.
        penalty: at least 0. response_length: tokens a response may have. buffer: its last tokens, which cost.

    Source: Yu et al. 2025 (arXiv 2503.14476) for "soft-overlong" and "mask".
    """
    if rule == "soft-overlong":
        return scores - penalty * ((lengths - (response_length - buffer)) / buffer).clamp(0, 1)
    if rule == "mask":
        return scores
    if rule == "subtract":
        cut_off = scores - penalty
    elif rule == "replace":
        cut_off = torch.where(scores.isnan(), scores, -penalty)
    elif rule == "scale":
        cut_off = scores * penalty
    else:
        raise ValueError(f"missing_eos: rule must be one of {', '.join(MISSING_EOS)}, got {rule!r}")
    return torch.where(terminated, scores, cut_off)


class ScoreNormalizer:
    """Scores on a scale that the updates can rely on. A checkpoint carries `state_dict()`.

        "none"         as they are
        "affine"       (R − mean) / std of reference responses, population deviation (Ziegler et al. 2019)
        "bias-only"    R − mean of reference responses
        "delta"        R − R(the reference response to the same prompt)
        "running-std"  R / std of all scores so far, n − 1; the mean stays (trlx)
        "ref-std"      R / std of the first rollout's scores, n − 1 (trlx)
        "running-z"    (R − mean) / std of all scores so far (TRL 0.7)

    NaN, a response that could not be scored, stays NaN and is part of no statistic.
    """

    def __init__(self, kind: str = "none", clip: float | None = None, clip_before: bool = False) -> None:
        if kind not in NORMALIZATIONS:
            raise ValueError(f"ScoreNormalizer: kind must be one of {', '.join(NORMALIZATIONS)}, got {kind!r}")
        self.kind, self.clip, self.clip_before = kind, clip, clip_before
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: Σ (R − mean)²
        self.fitted = False

    @property
    def std(self) -> float:
        """The deviation that scores are divided by: n − 1 but for "affine"; 1 where it is 0 or not known."""
        degrees = self.count if self.kind == "affine" else self.count - 1
        variance = self.squares / degrees if degrees > 0 else 0.0
        return variance**0.5 or 1.0

    def fit(self, scores: Tensor) -> None:
        """Take the statistics of reference responses; needed once, before "affine" and "bias-only"."""
        self._add(scores)
        self.fitted = True

    def fixed(self, scores: Tensor, reference: Tensor | None = None) -> tuple[Tensor, float]:
        """(scores [B] under a fitted normalisation, the factor of the score in it).

        reference: [B], the scores of the reference responses, for "delta".
        """
        if self.kind == "delta":
            if reference is None:
                raise ValueError("ScoreNormalizer: reference must be given for kind 'delta', got None")
            return scores - reference, 1.0
        if self.kind not in ("affine", "bias-only"):
            return scores, 1.0
        if not self.fitted:
            raise ValueError(f"ScoreNormalizer: {self.kind} must be fitted before it is used")
        gain = 1 / self.std if self.kind == "affine" else 1.0
        return (scores - self.mean) * gain, gain

    def observe(self, scores: Tensor) -> None:
        """Let a rollout's scores into the statistics of the running kinds, before they are normalised themselves."""
        if self.kind in RUNNING and not (self.kind == "ref-std" and self.fitted):
            self.fit(self._bounded(scores) if self.clip_before else scores)

    def running(self, scores: Tensor) -> tuple[Tensor, float]:
        """(scores [B] under a running normalisation and the clip, the factor of the score in it)."""
        gain = 1 / self.std if self.kind in RUNNING else 1.0
        shift = self.mean if self.kind == "running-z" else 0.0
        if self.clip_before:
            return (self._bounded(scores) - shift) * gain, gain
        return self._bounded((scores - shift) * gain), gain

    def _bounded(self, scores: Tensor) -> Tensor:
        return scores if self.clip is None else scores.clamp(-self.clip, self.clip)

    def _add(self, scores: Tensor) -> None:
        """Chan et al.'s merge of two sets of moments: E[x²] − E[x]² would cancel."""
        new = scores[scores.isfinite()].double()
        if not len(new):
            return
        mean, squares = new.mean().item(), (new - new.mean()).square().sum().item()
        count, difference = self.count + len(new), mean - self.mean
        self.squares += squares + difference**2 * self.count * len(new) / count
        self.mean += difference * len(new) / count
        self.count = count

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares, "fitted": self.fitted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
        self.fitted = state["fitted"]

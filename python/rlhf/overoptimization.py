"""Over-optimisation: gold reward against the distance from the start, its published forms, and when to stop.

The proxy reward keeps rising while the policy exploits the reward model's mistakes; gold, which training never sees,
turns down. With d = √KL(policy ‖ start), KL in nats a response, Gao et al. 2022 (arXiv 2210.10760) found

    best-of-n                 gold − start = d (a − b d)            highest at d = a / 2b
    reinforcement learning    gold − start = d (a − b log d)        highest at d = exp(a / b − 1)
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .files import read_lines
from .run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STOP_ON_GOLD = (
    "stop where gold's 95 % interval lay below its highest mean for this many evaluations in a row; the policy of the "
    "highest is kept in best/, unless that is the start"
)
FITTED = 5
"""Evaluations that a fit of three numbers wants."""
INTERVAL = 1.96
"""Standard errors from the mean to the end of a 95 % interval."""


@dataclass(frozen=True)
class Fit:
    """gold(d) of one form. start: gold at d = 0. rmse: of the points it was fitted to."""

    form: str
    a: float
    b: float
    start: float
    rmse: float

    def __call__(self, distance: float) -> float:
        return self.start + _terms(self.form, distance)[0] * self.a - _terms(self.form, distance)[1] * self.b

    @property
    def peak(self) -> float | None:
        """The distance at which gold is highest; None where the form has no maximum or starts to fall at once."""
        if self.b <= 0 or self.a <= 0:
            return None
        return self.a / (2 * self.b) if self.form == "best_of_n" else math.exp(min(self.a / self.b - 1, 700.0))


def _terms(form: str, distance: float) -> tuple[float, float]:
    """What a and −b multiply."""
    if form == "best_of_n":
        return distance, distance * distance
    if form != "rl":
        raise ValueError(f"fit: form must be best_of_n or rl, got {form!r}")
    return distance, distance * math.log(distance) if distance > 0 else 0.0


def fit(distances: Sequence[float], gold: Sequence[float], form: str, start: float | None = None) -> Fit | None:
    """Least squares of a form ("best_of_n" or "rl") through points (d, gold); None for points that do not determine it.

    start: gold at d = 0, where it is known; fitted with a and b unless given.
    """
    if len(distances) != len(gold):
        raise ValueError(f"fit: wanted one gold reward for each distance, got {len(gold)} and {len(distances)}")
    columns = [[first, -second, 1.0] for first, second in (_terms(form, distance) for distance in distances)]
    matrix = torch.tensor(columns, dtype=torch.float64).view(-1, 3)
    target = torch.tensor(gold, dtype=torch.float64)
    if start is not None:
        matrix, target = matrix[:, :2], target - start
    if len(matrix) < matrix.shape[1] or torch.linalg.matrix_rank(matrix) < matrix.shape[1]:
        return None
    solution = torch.linalg.lstsq(matrix, target[:, None], driver="gelsd").solution[:, 0]
    error = (matrix @ solution - target).square().mean().sqrt().item()
    a, b, *rest = solution.tolist()
    return Fit(form, a, b, rest[0] if start is None else start, error)


def gold_fell(levels: Sequence[tuple[float, float]], checks: int) -> bool:
    """Whether, in each of the last `checks` evaluations, gold's 95 % interval lay below its highest mean before.

    levels: (mean, standard error) of each evaluation so far.
    """
    fallen = [
        mean + INTERVAL * sem < max((earlier for earlier, _ in levels[:place]), default=-math.inf)
        for place, (mean, sem) in enumerate(levels)
    ]
    return len(fallen) >= checks and all(fallen[-checks:])


def watch_gold(run: Run, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, checks: int | None) -> bool:
    """After a logged step: keep the policy of the highest gold in best/, and say whether it is time to stop.

    Everything is read from metrics.jsonl, so a resumed run decides as an uninterrupted one.
    """
    if checks is None:
        return False
    lines = read_lines(run.folder / "metrics.jsonl")
    levels = [(line["eval/gold"], line["eval/gold_sem"]) for line in lines if line.get("eval/gold") is not None]
    if lines[-1].get("eval/gold") is None:
        return False
    if levels[-1][0] > max((mean for mean, _ in levels[:-1]), default=-math.inf):
        run.save_model(policy, tokenizer, "best")
    return gold_fell(levels, checks)


def overoptimization(folder: Path) -> dict[str, Any]:
    """For a run's summary: the fit of the RL form to its evaluations; nothing for fewer than FITTED of them."""
    lines = read_lines(folder / "metrics.jsonl")
    points = [
        (math.sqrt(max(line["eval/kl"], 0.0)), line["eval/gold"])
        for line in lines
        if line.get("eval/gold") is not None and line.get("eval/kl") is not None
    ]
    if len(points) < FITTED:
        return {}
    found = fit([distance for distance, _ in points], [gold for _, gold in points], "rl")
    return {"overoptimization": {**asdict(found), "peak": found.peak}} if found else {}

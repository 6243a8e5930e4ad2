"""Means over seeds with 95 % confidence intervals (Student's t), and paired differences."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

# Two-sided 95 % quantiles of Student's t for 1, 2, 3 … degrees of freedom (any table of the distribution).
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131),
    *(2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)


class Interval(NamedTuple):
    mean: float
    half: float  # of the 95 % interval; infinite for one value
    count: int

    def __str__(self) -> str:
        return f"{self.mean:.3f} ± {self.half:.3f}" if math.isfinite(self.half) else f"{self.mean:.3f}"

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half


def interval(values: Sequence[float]) -> Interval:
    n = len(values)
    mean = sum(values) / n
    if n < 2:
        return Interval(mean, math.inf, n)
    deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1))
    return Interval(mean, (T95[n - 2] if n - 2 < len(T95) else 1.96) * deviation / math.sqrt(n), n)


def difference(first: dict[int, float], second: dict[int, float]) -> Interval | None:
    """first − second, seed by seed; None where they share no seed."""
    shared = sorted(first.keys() & second.keys())
    return interval([first[seed] - second[seed] for seed in shared]) if shared else None


def by_seed(records: Sequence[dict[str, Any]], arm: str, value: Any) -> dict[int, float]:
    """seed → value(record) of an arm."""
    return {record["seed"]: value(record) for record in records if record["arm"] == arm}


def mean_score(record: dict[str, Any], share: float = 1.0) -> float:
    """Mean reward of the training samples over the whole of training, or over its first share."""
    points = record["series"]["objective/scores"]
    points = points[: max(1, round(share * len(points)))]
    return sum(value for _, value in points) / len(points)


def curve(records: Sequence[dict[str, Any]], arm: str, name: str) -> list[tuple[int, Interval]]:
    """step → interval over the seeds, at the steps that every seed has."""
    columns = [dict(map(tuple, record["series"].get(name, ()))) for record in records if record["arm"] == arm]
    steps = [step for step in columns[0] if all(step in column for column in columns)] if columns else []
    return [(step, interval([column[step] for column in columns])) for step in steps]

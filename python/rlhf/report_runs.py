"""What the report reads: run folders, and runs of one configuration under several seeds as one group."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import UserError
from .evaluate import mean_and_sem
from .files import read_lines

INPUTS = ("init", "ref", "rm")  # config fields that name other runs, whose seeds may stand in their names


@dataclass(frozen=True)
class RunData:
    """What a run folder holds."""

    name: str
    info: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    rollouts: list[dict[str, Any]]
    evaluation: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.info["stage"]

    @property
    def seed(self) -> Any:
        return self.info["config"].get("seed")

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, without the steps that lack it."""
        lines = [line for line in self.metrics if line.get(metric) is not None]
        return [line["step"] for line in lines], [line[metric] for line in lines]


@dataclass(frozen=True)
class Group:
    """Runs of one configuration that differ in their seed; most groups have one run. style: decides the colour."""

    name: str
    style: int
    runs: tuple[RunData, ...]

    @property
    def stage(self) -> str:
        return self.runs[0].stage

    @property
    def label(self) -> str:
        return self.name if len(self.runs) == 1 else f"{self.name} ({len(self.runs)} seeds)"

    def series(self, metric: str) -> tuple[list[int], list[float], list[float] | None]:
        """Steps, values and standard errors of a metric.

        One run: its values, with the errors it logged as <metric>_sem. Several: means over the seeds at the steps that
        all of them have, with the standard error over the seeds.
        """
        if len(self.runs) == 1:
            steps, values = self.runs[0].series(metric)
            _, errors = self.runs[0].series(f"{metric}_sem")
            return steps, values, errors if len(errors) == len(values) else None
        columns = [dict(zip(*run.series(metric))) for run in self.runs]
        steps = [step for step in columns[0] if all(step in column for column in columns)]
        means = [mean_and_sem([column[step] for column in columns]) for step in steps]
        return steps, [mean["mean"] for mean in means], [mean["sem"] for mean in means]

    def measured(self, name: str) -> dict[str, float] | None:
        """Mean and standard error of an evaluated quantity: over responses for one run, over seeds for several.

        A plain number (length, EOS rate …) has the standard error NaN for one run. None where a run lacks it.
        """
        found = [run.evaluation[name] for run in self.runs if run.evaluation.get(name) is not None]
        if len(found) < len(self.runs):
            return None
        if len(found) > 1:
            return mean_and_sem([value["mean"] if isinstance(value, dict) else value for value in found])
        return found[0] if isinstance(found[0], dict) else {"mean": found[0], "sem": math.nan}


def read_runs(folders: Iterable[str]) -> list[RunData]:
    """The runs in the folders given, in order; a folder of run folders stands for the runs in it, oldest first."""
    found: list[Path] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise FileNotFoundError(f"there is no folder {folder}")
        inside = [path.parent for path in folder.glob("*/run.json")]
        if not inside and not (folder / "run.json").exists():
            raise UserError(f"{folder} is no run folder, and no folder of run folders: there is no run.json in it")
        found += sorted(inside, key=lambda path: read_json(path / "run.json")["started"]) or [folder]
    found = list(dict.fromkeys(path.resolve() for path in found))
    names = [path.name for path in found]
    return [
        RunData(
            name=path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}",
            info=read_json(path / "run.json"),
            metrics=read_optional_lines(path / "metrics.jsonl"),
            samples=read_optional_lines(path / "samples.jsonl"),
            rollouts=read_optional_lines(path / "rollouts.jsonl"),
            evaluation=read_json(path / "evaluation.json") if (path / "evaluation.json").exists() else {},
        )
        for path in found
    ]


def grouped(runs: Sequence[RunData]) -> list[Group]:
    """Runs that differ in nothing but their seed, and in the seed's number in the names of their inputs, together."""
    together: dict[tuple[str, int], list[RunData]] = {}
    for run in runs:
        key, copy = configuration(run), 0
        while any(run.seed == other.seed for other in together.get((key, copy), ())):
            copy += 1
        together.setdefault((key, copy), []).append(run)
    members = list(together.values())
    # Policies come first in the order of colours: a reward model has no line in the shared figures.
    colors = sorted(range(len(members)), key=lambda i: members[i][0].stage == "rm")
    return [Group(group_name(group), colors.index(i), tuple(group)) for i, group in enumerate(members)]


def configuration(run: RunData) -> str:
    """Everything of the run's configuration but its seed, as text to compare."""
    settings = {key: value for key, value in run.info["config"].items() if key not in ("out", "seed", "resume")}
    settings.pop("overwrite", None)
    for key in INPUTS:
        if isinstance(settings.get(key), str):
            settings[key] = without_number(settings[key], run.seed)
    return json.dumps([run.stage, settings], sort_keys=True)


def without_number(text: str, number: Any) -> str:
    return re.sub(rf"(?<!\d){re.escape(str(number))}(?!\d)", "", text)


def group_name(runs: Sequence[RunData]) -> str:
    """The run's name; of several seeds that name without the seed's number."""
    if len(runs) == 1:
        return runs[0].name
    shared = {re.sub(r"[-_. ]?(seed|s)?[-_=. ]*$", "", without_number(run.name, run.seed)) for run in runs}
    return shared.pop() if len(shared) == 1 and "" not in shared else runs[0].name


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_optional_lines(path: Path) -> list[dict[str, Any]]:
    return read_lines(path) if path.exists() else []

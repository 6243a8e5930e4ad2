"""The finished runs: one JSON object a line, appended as they finish, so that a stopped experiment goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlhf.files import append_line, read_lines

FOLDER = Path(__file__).parents[1] / "results" / "experiments"


def path(experiment: str, folder: Path = FOLDER) -> Path:
    return folder / f"{experiment}.jsonl"


def records(experiment: str, folder: Path = FOLDER) -> list[dict[str, Any]]:
    file = path(experiment, folder)
    return read_lines(file) if file.exists() else []


def done(experiment: str, folder: Path = FOLDER) -> set[tuple[str, str, int]]:
    return {(record["task"], record["arm"], record["seed"]) for record in records(experiment, folder)}


def append(experiment: str, record: dict[str, Any], folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    append_line(path(experiment, folder), record)

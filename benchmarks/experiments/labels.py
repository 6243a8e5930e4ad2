"""At equal labels, pairwise or absolute reward models, and what does an annotator's bias do to each?"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf.data import load_task
from rlhf.files import write_atomically

from . import plots
from .experiment import Arm, Experiment, Task
from .statistics import by_seed, difference, interval

RANKINGS = 200  # of four rated responses each
ANNOTATORS, BIAS = 5, 0.5  # each adds a constant of this standard deviation to its ratings; gold lies in −1 to 1
BIASES = ("no bias", "an annotator a prompt", "an annotator a response")
MODELS: dict[str, dict[str, Any]] = {
    "pairwise": {"objective": "pairwise"},
    "absolute": {"objective": "absolute"},
    "absolute, bias removed": {"objective": "absolute", "debias_annotators": True},
}


def arms(task: Task) -> list[Arm]:
    settings = {"epochs": 6, "batch_size": 16, "eval_every": 0}
    return [
        Arm(f"{model}; {bias}", "rm", settings | changes, data=functools.partial(write_labels, task.data, bias))
        for bias in BIASES
        for model, changes in MODELS.items()
    ]


def write_labels(data: str, bias: str, seed: int, folder: Path) -> Path:
    """Rated responses of the task as rows, each rating with its annotator and the annotator's bias on it."""
    rng = random.Random(seed)
    offsets = [rng.gauss(0, BIAS) if bias != "no bias" else 0.0 for _ in range(ANNOTATORS)]
    rows = []
    for each in random.Random(seed).sample(load_task(data, 0).rankings, RANKINGS):
        whole = rng.randrange(ANNOTATORS)
        who = [rng.randrange(ANNOTATORS) if bias == BIASES[2] else whole for _ in each.responses]
        scores = [score + offsets[annotator] for score, annotator in zip(each.scores, who)]
        names = [f"annotator {annotator}" for annotator in who]
        rows.append({"prompt": each.prompt, "responses": each.responses, "scores": scores, "annotators": names})
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"labels-{bias.replace(' ', '-')}-{seed}.jsonl"
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def report(records: list[dict[str, Any]]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    for task in dict.fromkeys(record["task"] for record in records):
        found = [record for record in records if record["task"] == task]
        names = list(dict.fromkeys(record["arm"] for record in found))
        lines = [
            "| reward model; bias | seeds | pairs in gold's order | r with gold | gold of the best of 16 |",
            "|---|--:|--:|--:|--:|",
        ]
        for name in names:
            cells = [values(found, name, key) for key in ("accuracy", "correlation", "best_of_16")]
            lines.append(f"| {name} | {cells[0].count} | {' | '.join(map(str, cells))} |")
        lines += ["", f"{RANKINGS * 4} rated responses each. Means over the seeds with 95 % confidence intervals."]
        bars = {name: values(found, name, "accuracy") for name in names}
        figures = {f"labels-{task}-accuracy": plots.bars(bars, "held-out pairs in gold's order")}
        yield f"Pairwise and absolute labels, {task}", "\n".join([*lines, "", finding(found)]), figures


def values(records: list[dict[str, Any]], name: str, key: str) -> Any:
    return interval(list(seeds(records, name, key).values()))


def seeds(records: list[dict[str, Any]], name: str, key: str = "accuracy") -> dict[int, float]:
    return by_seed(records, name, lambda record: record["final"][key])


def finding(records: list[dict[str, Any]]) -> str:
    sentences = []
    for bias in BIASES:
        gain = difference(seeds(records, f"pairwise; {bias}"), seeds(records, f"absolute; {bias}"))
        if gain:
            sentences.append(f"With {bias}, pairwise − absolute is {gain} in accuracy: {said(gain, 'pairwise')}.")
        cured = difference(seeds(records, f"absolute, bias removed; {bias}"), seeds(records, f"absolute; {bias}"))
        if cured and bias != "no bias":
            sentences.append(f"Removing each annotator's mean brings {cured}: {said(cured, 'removing it')}.")
    return " ".join(sentences)


def answer(records: list[dict[str, Any]]) -> str:
    """Accuracy of each kind of model under each bias."""
    parts = []
    for bias in BIASES:
        found = {name: seeds(records, f"{name}; {bias}") for name in MODELS}
        shares = [f"{name} {sum(each.values()) / len(each):.1%}" for name, each in found.items() if each]
        if shares:
            parts.append(f"{bias}: {', '.join(shares)}")
    return f"Held-out pairs in gold's order, {'; '.join(parts)}."


def said(gain: Any, what: str) -> str:
    if not gain.excludes_zero:
        return "these seeds do not tell them apart"
    return f"{what} is better" if gain.mean > 0 else f"{what} is worse"


EXPERIMENT = Experiment("labels", str(__doc__), ("reviews",), arms, report, answer)

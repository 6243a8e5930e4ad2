"""The page of the experiments: `results/experiments/README.md` with its plots, and the findings in the README."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rlhf.files import write_atomically

from . import plots, store
from .experiment import Experiment

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- experiments:begin -->", "<!-- experiments:end -->"


def write(experiments: Mapping[str, Experiment], folder: Path = store.FOLDER, readme: Path = README) -> None:
    """Every page and plot anew from the results, and nothing else: the same results give the same bytes."""
    text, figures = contents(experiments, folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        write_atomically(folder / f"{name}.svg", figure)
    write_atomically(folder / "README.md", text)
    whole = readme.read_text(encoding="utf-8")
    before, after = whole[: whole.index(BEGIN)], whole[whole.index(END) :]
    write_atomically(readme, f"{before}{BEGIN}\n{summary(experiments, folder)}\n{after}")


def contents(experiments: Mapping[str, Experiment], folder: Path) -> tuple[str, dict[str, str]]:
    """(the page's Markdown, its plots by name)."""
    parts = ["# Experiments", "", "Written by `python -m benchmarks.experiments report` from the `.jsonl` files here."]
    figures: dict[str, str] = {}
    for name, experiment in experiments.items():
        records = store.records(name, folder)
        parts += ["", f"## {experiment.question}"]
        if not records:
            parts += ["", f"Not run yet: `python -m benchmarks.experiments {name}`."]
        for title, markdown, drawn in experiment.report(records) if records else ():
            figures |= {key: plots.svg(figure, key) for key, figure in drawn.items()}
            images = "\n\n".join(f"![{key}]({key}.svg)" for key in drawn)
            parts += ["", f"### {title}", "", markdown, *(["", images] if images else [])]
    return "\n".join(parts) + "\n", figures


def summary(experiments: Mapping[str, Experiment], folder: Path) -> str:
    """Each question with its answer, and where the rest is."""
    lines = []
    for name, experiment in experiments.items():
        records = store.records(name, folder)
        seeds = len({record["seed"] for record in records})
        state = f"{len(records)} runs, {seeds} seeds" if records else "not run yet"
        answer = f" {experiment.answer(records)}" if records else ""
        lines.append(f"- **{experiment.question}**{answer} ({state}; `python -m benchmarks.experiments {name}`)")
    lines += [
        "",
        "Tables, plots and findings: [benchmarks/results/experiments](benchmarks/results/experiments/README.md).",
    ]
    return "\n".join(lines)

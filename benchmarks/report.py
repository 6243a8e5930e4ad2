"""Results as JSON, as Markdown with plots, and as the README's part between its markers."""

import json
import os
import re
from pathlib import Path
from typing import Any

from . import curves, plots, targets

FOLDER = Path(__file__).parent / "results"
README = Path(__file__).parent.parent / "README.md"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
# Every other provider shares a column.
COLUMNS = {
    "cpu": ("ours native", "ours torch", "torch eager", "torch.compile"),
    "cuda": ("ours triton", "ours native", "ours torch", "torch eager", "torch.compile"),
}
VERBS = {"read": "reading", "copy": "copying"}
NO_GPU = "GPU speed is not yet measured."
PLOTTED = (
    "Time and extra memory as one size grows, both axes logarithmic. The limit of time is the work that cannot be "
    "avoided at the measured ceiling, that of memory is what the call returns."
)


def write(path: Path, results: dict[str, Any]) -> None:
    """As JSON with an entry of a list a line."""
    parts = []
    for name, value in results.items():
        entries = [value] if not isinstance(value, list) else value
        lines = ",\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
        parts.append(f'"{name}": ' + (f"[\n{lines}\n]" if isinstance(value, list) else lines))
    replace(path, "{\n" + ",\n".join(parts) + "\n}\n")


def replace(path: Path, text: str) -> None:
    """All of it or nothing: an old file stays whole until the new one is there."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def introduction(results: dict[str, Any]) -> str:
    """The machine and its ceilings."""
    machine, ceilings = results["machine"], results["ceilings"]
    rates = [f"{verb} {ceilings[name] / 1e9:.1f} GB/s" for name, verb in VERBS.items() if name in ceilings]
    rates += [f"{name} {_digits(rate / 1e12)} TFLOP/s" for name, rate in ceilings.items() if name not in VERBS]
    return (
        f"{_hardware(machine)}, torch {machine['torch']}, Python {machine['python']}, commit {machine['commit']}, "
        f"{machine['date'][:10]}. Ceilings measured in the same run: {', '.join(rates)}."
    )


def table(results: dict[str, Any]) -> str:
    """Markdown: a line per op, case and pass, and who is missing or was refused."""
    there = {row["provider"] for row in results["rows"]}
    columns = tuple(name for name in COLUMNS[results["machine"]["device"]] if name in there)
    lines = [
        introduction(results),
        "",
        "Milliseconds, median ± half the interquartile range. GB/s (TFLOP/s) and share of the limit are ours, for the "
        "work that cannot be avoided at the measured ceiling; over 100 % means from a cache. Extra memory is the peak "
        "of the whole call above what stood before it, results included: ours, and the leanest peer's.",
        "",
        f"| op | case | pass | {' | '.join(columns)} | other | × the fastest peer | rate | of the limit | extra MiB |",
        f"|---|---|---|{'--:|' * len(columns)}---|--:|--:|--:|--:|",
    ]
    lines += [_line(columns, *key, found) for key, found in groups(results["rows"]).items()]
    notes = {f"- {row['op']}, {row['provider']}: {row['status']}" for row in results["rows"] if row["status"] != "ok"}
    for row in results["curves"]:
        if row["status"] != "ok":
            notes.add(f"- {row['op']}, {row['provider']}, {row['axis']}={row['x']}: {row['status']}")
    notes.update(f"- {name}" for name in results["failed"])
    notes.update(f"- {name}: no time was left" for name in results["not_reached"])
    return "\n".join([*lines, *(["", "Not timed:", "", *sorted(notes)] if notes else [])])


def summary(results: dict[str, Any]) -> str:
    """Markdown: the last pass of each op's first case, and what has a target; ours and the fastest peer."""
    found = groups(results["rows"])
    main: dict[str, tuple[str, str, str]] = {}
    for op, case, phase in found:
        if phase != "graph" and main.get(op, (op, case))[1] == case:
            main[op] = op, case, phase
    wanted = {*main.values(), *((target.op, target.case, target.phase) for target in targets.TARGETS)}
    lines = [
        "| op | case | pass | ours, ms | fastest peer, ms | × | of the limit | extra MiB: ours / leanest peer |",
        "|---|---|---|--:|--:|--:|--:|--:|",
    ]
    for key in found:
        ours, peers = split(found[key])
        if key in wanted and ours and peers:
            best = min(peers, key=lambda row: row["median_ms"])
            cells = [_digits(ours["median_ms"]), f"{_digits(best['median_ms'])} {best['provider']}"]
            cells += [
                f"{_digits(best['median_ms'] / ours['median_ms'])}×",
                f"{ours['share']:.0%}",
                _memory(ours, peers),
            ]
            lines.append(f"| `{key[0]}` | {key[1]} | {key[2]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def groups(rows: list[dict[str, Any]]) -> dict[tuple[str, str, str], dict[str, dict[str, Any]]]:
    """(op, case, phase) → the timed rows by provider."""
    found: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for row in rows:
        if row["status"] == "ok":
            found.setdefault((row["op"], row["case"], row["phase"]), {})[row["provider"]] = row
    return found


def split(found: dict[str, dict[str, Any]]) -> tuple[dict[str, Any] | None, list[dict[str, Any]]]:
    """Ours on the backend that would run, and the peers."""
    ours = next((row for name, row in found.items() if name.startswith("ours")), None)
    return ours, [row for name, row in found.items() if not name.startswith("ours")]


def gain(found: dict[str, dict[str, Any]]) -> float | None:
    """How many times as fast as the fastest peer ours is."""
    ours, peers = split(found)
    return min(row["median_ms"] for row in peers) / ours["median_ms"] if ours and peers else None


def _hardware(machine: dict[str, Any]) -> str:
    if machine["device"] == "cuda":
        return (
            f"{machine['gpu']} ({machine['memory_gib']:.0f} GiB, L2 {machine['l2_mib']} MiB, "
            f"{machine['power_limit']}), driver {machine['driver']}, CUDA {machine['cuda']}, Triton {machine['triton']}"
        )
    return f"{machine['cpu']} ({machine['instructions']}), {machine['threads']} threads on {machine['cores']} cores"


def _line(columns: tuple[str, ...], op: str, case: str, phase: str, found: dict[str, dict[str, Any]]) -> str:
    cells = [_milliseconds(found[name]) if name in found else "–" for name in columns]
    others = [f"{_milliseconds(row)} {name}" for name, row in found.items() if name not in columns]
    line = [f"`{op}`", case, phase, *cells, "<br>".join(others) or "–"]
    ours, peers = split(found)
    times = gain(found)
    if ours is None or times is None:
        return f"| {' | '.join([*line, *['–'] * 4])} |"
    rate = (
        f"{_digits(ours['tflop_per_s'])} TFLOP/s" if ours["gb_per_s"] is None else f"{_digits(ours['gb_per_s'])} GB/s"
    )
    return f"| {' | '.join([*line, f'{_digits(times)}×', rate, format(ours['share'], '.0%'), _memory(ours, peers)])} |"


def _memory(ours: dict[str, Any], peers: list[dict[str, Any]]) -> str:
    known = [row["peak_extra_mib"] for row in (ours, *peers) if row["peak_extra_mib"] is not None]
    return f"{_digits(known[0])} / {_digits(min(known[1:]))}" if len(known) == 1 + len(peers) else "–"


def _milliseconds(row: dict[str, Any]) -> str:
    low, high = row["quartiles_ms"]
    return f"{_digits(row['median_ms'])} ± {_digits((high - low) / 2)}"


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}" if number < 1 else f"{number:.1f}"


# ---------------------------------------------------------------------------------------------------------- the README


def split_readme(begin: str = BEGIN, end: str = END) -> tuple[str, str, str]:
    """The README before a pair of markers, between them and after them."""
    if not README.exists():
        raise FileNotFoundError(f"{README} must exist, with a line {begin} and a line {end}")
    text = README.read_text()
    for marker in (begin, end):
        if text.count(marker) != 1:
            raise ValueError(f"{README} must have one line {marker}, got {text.count(marker)}")
    before, rest = text.split(begin)
    part, after = rest.split(end)
    return before, part, after


def measured() -> dict[str, dict[str, Any]]:
    """The results in the folder by the file's name without its ending, a device's."""
    found = {path.stem: read(path) for path in sorted(FOLDER.glob("*.json"))}
    return {name: results for name, results in found.items() if "ceilings" in results}


def rendered() -> str:
    """What should stand between the markers: of every device the short tables and a plot an op."""
    parts = []
    for name, results in measured().items():
        parts += [f"\n### {_title(results)}\n\n{introduction(results)}\n\n{summary(results)}\n"]
        where = f"benchmarks/results/{name}.md"
        parts += [f"\nEvery case, pass and peer, and what could not be timed: [{where}]({where}).\n"]
        parts += _targets(results)
        first: dict[str, str] = {}
        for op, axis, _ in curves.drawable(results["curves"]):
            first.setdefault(op, axis)
        if first:
            images = [_image("benchmarks/results/", name, op, axis) for op, axis in first.items()]
            parts += ["\n", PLOTTED, "\n\n", "\n".join(images), "\n"]
    if all(results["machine"]["device"] == "cpu" for results in measured().values()):
        parts.append(f"\n### GPU\n\n{NO_GPU}\n")
    return "".join(parts)


def document(name: str, results: dict[str, Any]) -> str:
    """results/<name>.md: the full table, the targets and every plot."""
    parts = [f"# {_title(results)}\n\n", "Written by `python -m benchmarks --readme`.\n\n", table(results), "\n"]
    parts += _targets(results)
    images = [_image("", name, op, axis) for op, axis, _ in curves.drawable(results["curves"])]
    if images:
        parts += ["\n## Growth\n\n", PLOTTED, "\n\n", "\n".join(images), "\n"]
    return "".join(parts)


def device_name(machine: dict[str, Any]) -> str:
    """As part of a file's name."""
    return re.sub("[^a-z0-9]+", "-", machine.get("gpu", "cpu").lower())


def _title(results: dict[str, Any]) -> str:
    return results["machine"].get("gpu") or "CPU"


def _targets(results: dict[str, Any]) -> list[str]:
    if results["machine"]["device"] != "cpu":
        return []
    return [f"\nThe project's targets ({targets.MACHINE}):\n\n{targets.table(groups(results['rows']))}\n"]


def _image(folder: str, name: str, op: str, axis: str) -> str:
    return f"![{op} over {axis}]({folder}{plots.file_name(name, op, axis)})"


def update() -> None:
    """README.md, and of every file of results its document and plots."""
    before, _, after = split_readme()
    for name, results in measured().items():
        replace(FOLDER / f"{name}.md", document(name, results))
        plots.write(FOLDER, name, results)
    replace(README, f"{before}{BEGIN}{rendered()}{END}{after}")


def out_of_step() -> list[str]:
    """Which files do not show the results in the folder."""
    wrong = [] if split_readme()[1] == rendered() else [README.name]
    for name, results in measured().items():
        path = FOLDER / f"{name}.md"
        wrong += [] if path.exists() and path.read_text() == document(name, results) else [path.name]
        wrong += plots.complaints(FOLDER, name, results)
    return wrong

"""Results as JSON, as Markdown, and as the README's part between its markers."""

import json
import os
from pathlib import Path
from typing import Any

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


def write(path: Path, results: dict[str, Any]) -> None:
    _replace(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    """All of it or nothing: an old file stays whole until the new one is there."""
    unfinished = path.with_name(path.name + ".tmp")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def table(results: dict[str, Any]) -> str:
    """Markdown: the machine, a line per op, case and pass, and who is missing or was refused."""
    machine, ceilings = results["machine"], results["ceilings"]
    columns = COLUMNS[machine["device"]]
    rates = [f"{verb} {ceilings[name] / 1e9:.1f} GB/s" for name, verb in VERBS.items() if name in ceilings]
    rates += [f"{name} {_digits(rate / 1e12)} TFLOP/s" for name, rate in ceilings.items() if name not in VERBS]
    lines = [
        f"{_hardware(machine)}, torch {machine['torch']}, Python {machine['python']}, commit {machine['commit']}, "
        f"{machine['date'][:10]}. Ceilings measured in the same run: {', '.join(rates)}.",
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
    return "\n".join([*lines, *(["", "Not timed:", "", *sorted(notes)] if notes else [])])


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
    memory = [row["peak_extra_mib"] for row in (ours, *peers) if row["peak_extra_mib"] is not None]
    extra = f"{_digits(memory[0])} / {_digits(min(memory[1:]))}" if len(memory) == 1 + len(peers) else "–"
    return f"| {' | '.join([*line, f'{_digits(times)}×', rate, format(ours['share'], '.0%'), extra])} |"


def _milliseconds(row: dict[str, Any]) -> str:
    low, high = row["quartiles_ms"]
    return f"{_digits(row['median_ms'])} ± {_digits((high - low) / 2)}"


def _digits(number: float) -> str:
    return f"{number:.0f}" if number >= 100 else f"{number:.2g}" if number < 1 else f"{number:.1f}"


# ---------------------------------------------------------------------------------------------------------- the README


def split_readme() -> tuple[str, str, str]:
    """The README before its markers, between them and after them."""
    if not README.exists():
        raise FileNotFoundError(f"{README} must exist, with a line {BEGIN} and a line {END}")
    text = README.read_text()
    for marker in (BEGIN, END):
        if text.count(marker) != 1:
            raise ValueError(f"{README} must have one line {marker}, got {text.count(marker)}")
    before, rest = text.split(BEGIN)
    part, after = rest.split(END)
    return before, part, after


def rendered() -> str:
    """What should stand between the markers: the table of every file in results/ under the name of its device."""
    found = [read(path) for path in sorted(FOLDER.glob("*.json"))]
    parts = [f"\n### {results['machine'].get('gpu') or 'CPU'}\n\n{table(results)}\n" for results in found]
    if all(results["machine"]["device"] == "cpu" for results in found):
        parts.append(f"\n### GPU\n\n{NO_GPU}\n")
    return "".join(parts)


def update_readme() -> None:
    before, _, after = split_readme()
    _replace(README, f"{before}{BEGIN}{rendered()}{END}{after}")

"""A curve as an SVG file: time and extra memory against one size, log-log, with the limit drawn in."""

import hashlib
import io
import json
from pathlib import Path
from typing import Any

from . import curves

INK = {"ours": "#1a56b0", "torch eager": "#b04a1a", "torch.compile": "#2f8f4e"}
OTHERS = ("#8a5fb0", "#b08d1a", "#5c6670")
LIMIT = "#999999"
PAGE = 4 / 1024  # MiB: the least that resident memory can tell, and a place for nothing on a log axis
Rows = list[dict[str, Any]]


def file_name(stem: str, op: str, axis: str) -> str:
    return f"{stem}-{op}-{axis}.svg"


def digest(rows: Rows) -> str:
    """Of what a plot shows; it stands in the file, so that a plot of other numbers can be told without drawing it."""
    return hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:16]


def write(folder: Path, stem: str, results: dict[str, Any]) -> None:
    """All curves of the results, and none that they do not have any more."""
    wanted = {file_name(stem, op, axis): (op, axis, rows) for op, axis, rows in curves.drawable(results["curves"])}
    for name, (op, axis, rows) in wanted.items():
        (folder / name).write_text(drawn(op, axis, rows))
    for path in folder.glob(f"{stem}-*.svg"):
        if path.name not in wanted:
            path.unlink()


def complaints(folder: Path, stem: str, results: dict[str, Any]) -> list[str]:
    """Which files do not show these results."""
    wrong = {path.name for path in folder.glob(f"{stem}-*.svg")}
    for op, axis, rows in curves.drawable(results["curves"]):
        name = file_name(stem, op, axis)
        if (folder / name).exists() and digest(rows) in (folder / name).read_text():
            wrong.remove(name)
        else:
            wrong.add(name)
    return sorted(wrong)


def drawn(op: str, axis: str, rows: Rows) -> str:
    """The SVG, the same bytes for the same rows."""
    import matplotlib  # here, since benchmarks run without it
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, LogLocator, NullLocator

    said = digest(rows)
    phase = [row["phase"] for row in rows if row["phase"] != "graph"][-1]
    rows = [row for row in rows if row["phase"] == phase]
    lines: dict[str, Rows] = {}
    for row in sorted(rows, key=lambda row: row["x"]):
        lines.setdefault(row["provider"], []).append(row)
    places = sorted({row["x"] for row in rows})
    with matplotlib.rc_context({"svg.hashsalt": "rlhf_kernels", "svg.fonttype": "none", "font.size": 8}):
        figure = Figure(figsize=(7.2, 2.9), layout="constrained")
        time, memory = figure.subplots(1, 2)
        others = iter(OTHERS * len(lines))
        for name, found in lines.items():
            ours = name.startswith("ours")
            color = INK.get("ours" if ours else name) or next(others)
            style = {"color": color, "label": name, "marker": "o", "markersize": 3, "linewidth": 2.2 if ours else 1.1}
            style["zorder"] = 3 if ours else 2
            time.plot([row["x"] for row in found], [row["median_ms"] for row in found], **style)
            known = [row for row in found if row["peak_extra_mib"] is not None]
            memory.plot([row["x"] for row in known], [max(PAGE, row["peak_extra_mib"]) for row in known], **style)
        first = next(iter(lines.values()))  # the limits are the same for all
        dashed = {"color": LIMIT, "linestyle": "--", "linewidth": 1.1, "label": "limit"}
        time.plot([row["x"] for row in first], [row["limit_ms"] for row in first], **dashed)
        memory.plot([row["x"] for row in first], [max(PAGE, row["results_mib"]) for row in first], **dashed)
        for axes, title in ((time, f"{phase}, ms"), (memory, "extra memory, MiB")):
            axes.set(xscale="log", yscale="log", xlabel=axis, title=title)
            axes.set_xticks(places, [str(x) for x in places])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
            axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(1.5, 1.5)))
            axes.grid(color="#dddddd", linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        figure.suptitle(f"{op}  {_beside(axis, rows[0]['case'])}")
        figure.legend(*time.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
        text = io.StringIO()
        described = {"Date": None, "Creator": None, "Title": f"{op} over {axis}", "Description": said}
        figure.savefig(text, format="svg", metadata=described)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"


def _beside(axis: str, case: str) -> str:
    """The case without the size that varies."""
    return " ".join(word for word in case.split() if not word.startswith(f"{axis}="))

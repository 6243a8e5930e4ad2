"""The report's figures: functions from plain numbers to a matplotlib Figure, to be called under rc_context(STYLE)."""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.ticker import MaxNLocator

from .page import duration, number

INK = "#1f2328"  # text and axes; becomes currentColor in the SVG, so that a dark page gets light axes
# Okabe and Ito's palette, which colour-blind readers can tell apart, without its black and yellow.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
DASHES = ("-", "--", ":", "-.")
PANEL, LARGE = (4.2, 2.9), (7.2, 4.2)  # inches
TICK_STEPS = [1, 2, 2.5, 5, 10]

STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.7,
    "xtick.color": INK,
    "ytick.color": INK,
    "text.color": INK,
    "text.parse_math": False,  # a run may be called "$"
    "legend.frameon": False,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "svg.fonttype": "none",
    "figure.constrained_layout.use": True,
}


class Curve(NamedTuple):
    """One run's line. sem: standard errors drawn as a band. points: mark each value (few, evaluated ones)."""

    label: str
    style: int  # the run's place in the report: decides colour and dashes
    x: Sequence[float]
    y: Sequence[float]
    sem: Sequence[float] | None = None
    points: bool = False


class Reference(NamedTuple):
    """A horizontal line to compare with."""

    label: str
    y: float


def render(figure: Figure, name: str, title: str) -> tuple[str, bytes]:
    """(SVG to put into a page, under its caption; PNG file, with the title); the same figure gives the same bytes."""
    svg, png = io.StringIO(), io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        figure.legends[0].set_title(title, prop=FontProperties(weight="bold"))
        figure.savefig(png, format="png", dpi=160, facecolor="white", metadata={"Software": None})
    text = svg.getvalue()
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = re.sub(r"(\d+px) [^;\"]*DejaVu Sans[^;\"]*", r"\1 system-ui, sans-serif", text)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" height="[^"]*"|height="[^"]*" width="[^"]*"', r"\1", text, count=1)
    # Element ids are only unique within one figure; references (clip paths, markers) use hashed ids.
    text = re.sub(r'<g id="[^"]*">', "<g>", text)
    return text, png.getvalue()


def curves(
    lines: Sequence[Curve],
    ylabel: str,
    reference: Reference | None = None,
    floor: float | None = None,
    columns: int = 3,
) -> Figure:
    """Lines over training steps. floor: the axis is cut below it. columns: of the legend."""
    figure, axes = _panel("training step", ylabel)
    for line in lines:
        _draw(axes, line)
    if reference:
        axes.axhline(reference.y, color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7, label=reference.label)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS, integer=True))
    if floor is not None and axes.get_ylim()[0] < floor:
        axes.set_ylim(bottom=floor)
        axes.set_ylabel(f"{ylabel} (cut at {number(floor, 0)})")
    _legend(figure, axes, columns)
    return figure


def plane(
    lines: Sequence[Curve],
    start: tuple[float, float] | None,
    fits: Sequence[tuple[Curve, Callable[[float], float]]] = (),
) -> Figure:
    """Gold reward over √KL: a line that falls while KL grows is over-optimisation.

    start: the SFT model's point. fits: a function of √KL for some of the lines, drawn as far as the line goes.
    """
    figure, axes = _panel("√KL to the start model (√nats)", "gold reward", LARGE)
    for line in lines:
        color = COLORS[line.style % len(COLORS)]
        axes.plot(line.x, line.y, DASHES[line.style // len(COLORS) % len(DASHES)], color=color, label=line.label)
        axes.plot(line.x[:-1], line.y[:-1], "o", color=color, markersize=3.5)
        axes.plot(line.x[-1:], line.y[-1:], "o", color=color, markersize=7)
    for line, function in fits:
        xs = [max(line.x) * i / 100 for i in range(101)]
        axes.plot(xs, [function(x) for x in xs], ":", color=COLORS[line.style % len(COLORS)], linewidth=1)
    if start:
        axes.plot(*start, "D", color=INK, markersize=6, label="start (SFT)")
    axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
    _legend(figure, axes, columns=6)
    return figure


def calibration(predicted: Sequence[float], observed: Sequence[float], counts: Sequence[int]) -> Figure:
    """Share of pairs in the right order against the model's confidence in its order, with binomial standard errors."""
    figure, axes = _panel("confidence in the order of a pair", "share in the right order")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle=(0, (4, 3)), alpha=0.7, label="perfectly calibrated")
    errors = [(p * (1 - p) / max(n, 1)) ** 0.5 for p, n in zip(observed, counts)]
    axes.errorbar(predicted, observed, yerr=errors, color=COLORS[0], linewidth=1.4, elinewidth=1, capsize=2)
    largest = max(counts, default=1)
    areas = [12 + 70 * n / max(largest, 1) for n in counts]
    axes.scatter(predicted, observed, s=areas, color=COLORS[0], zorder=3, label="model (area: pairs)")
    low = 0.5 if min(predicted) >= 0.5 else 0.0
    axes.set_xlim(low, 1.02)
    axes.set_ylim(min(low, *(p - e for p, e in zip(observed, errors))) - 0.02, 1.04)
    _legend(figure, axes)
    return figure


def histogram(samples: Sequence[tuple[str, Sequence[float]]], xlabel: str, style: int) -> Figure:
    """Distributions as outlines on the same bins, the last one filled."""
    figure, axes = _panel(xlabel, "share of responses")
    low, high = min(min(values) for _, values in samples), max(max(values) for _, values in samples)
    width = (high - low) / 20 or 1.0
    edges = [low + width * i for i in range(21)]
    color = COLORS[style % len(COLORS)]
    for place, (label, values) in enumerate(samples, 1):
        last = place == len(samples)
        weights = [1 / len(values)] * len(values)
        axes.hist(
            values,
            bins=edges,
            weights=weights,
            histtype="stepfilled" if last else "step",
            color=color if last else INK,
            alpha=0.5 if last else 0.8,
            label=label,
        )
    _legend(figure, axes)
    return figure


def by_position(rows: Mapping[int, Sequence[float | None]], style: int) -> Figure:
    """KL of each position in the response, one line a training step, later ones stronger."""
    figure, axes = _panel("token of the response", "KL to the start model, nats")
    color = COLORS[style % len(COLORS)]
    for order, (step, values) in enumerate(rows.items(), 1):
        points = [(position, value) for position, value in enumerate(values, 1) if value is not None]
        axes.plot(*zip(*points), color=color, alpha=0.15 + 0.85 * order / len(rows), label=f"step {step}")
    axes.axhline(0, color=INK, linewidth=0.8, alpha=0.5)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS, integer=True))
    _legend(figure, axes, columns=4)
    return figure


def by_length(lengths: Sequence[int], kl: Sequence[float], terminated: Sequence[bool], style: int) -> Figure:
    """Each response's KL against its length, those that were cut off as crosses."""
    figure, axes = _panel("tokens of the response", "KL to the start model, nats")
    for ended, marker, label in ((True, "o", "ended with EOS"), (False, "x", "cut off")):
        points = [(n, d) for n, d, done in zip(lengths, kl, terminated) if bool(done) == ended]
        if points:
            axes.plot(*zip(*points), marker, color=COLORS[style % len(COLORS)], markersize=4, alpha=0.6, label=label)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS, integer=True))
    _legend(figure, axes)
    return figure


def timings(labels: Sequence[str], phases: Mapping[str, Sequence[float]]) -> Figure:
    """Stacked bars: seconds of each phase (its list follows `labels`) for each run, the first run on top."""
    figure = Figure(figsize=(9.4, 1.1 + 0.42 * len(labels)))
    axes = figure.subplots()
    left = [0.0] * len(labels)
    for index, (phase, seconds) in enumerate(phases.items()):
        color, hatch = COLORS[index % len(COLORS)], ("", "///", "...")[index // len(COLORS) % 3]
        axes.barh(labels, seconds, left=left, color=color, hatch=hatch, edgecolor="white", linewidth=0.6, label=phase)
        left = [a + b for a, b in zip(left, seconds)]
    for row, total in enumerate(left):
        axes.annotate(duration(total), (total, row), xytext=(4, 0), textcoords="offset points", va="center")
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds")
    axes.set_xlim(0, 1.1 * max(left, default=1.0) or 1.0)
    _legend(figure, axes, columns=6)
    return figure


def _panel(xlabel: str, ylabel: str, size: tuple[float, float] = PANEL) -> tuple[Figure, Any]:
    figure = Figure(figsize=size)
    axes = figure.subplots()
    axes.set_xlabel(xlabel)
    axes.set_ylabel(ylabel)
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
    axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
    return figure, axes


def _draw(axes: Any, line: Curve) -> None:
    color, dashes = COLORS[line.style % len(COLORS)], DASHES[line.style // len(COLORS) % len(DASHES)]
    if line.points or len(line.y) < 20:
        axes.plot(line.x, line.y, dashes, color=color, label=line.label, marker="o", markersize=3.5)
    else:
        axes.plot(line.x, line.y, color=color, linewidth=0.8, alpha=0.3)
        axes.plot(line.x, rolling_mean(line.y), dashes, color=color, label=line.label)
    if line.sem:
        low, high = ([y + sign * s for y, s in zip(line.y, line.sem)] for sign in (-1, 1))
        axes.fill_between(line.x, low, high, color=color, alpha=0.15, linewidth=0)


def rolling_mean(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about a tenth of the values, cut off at the ends."""
    half = len(values) // 20
    windows = [values[max(index - half, 0) : index + half + 1] for index in range(len(values))]
    return [sum(window) / len(window) for window in windows]


def _legend(figure: Figure, axes: Any, columns: int = 3) -> None:
    handles, labels = axes.get_legend_handles_labels()
    legend = figure.legend(
        handles, labels, loc="outside upper left", ncols=columns, columnspacing=1.2, handlelength=1.8
    )
    legend.set_alignment("left")

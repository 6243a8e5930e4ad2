"""The experiments' figures, as SVG that does not change unless the results do."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

from rlhf.plots import COLORS, DASHES, STYLE

from .statistics import Interval


def curves(lines: Mapping[str, Sequence[tuple[int, Interval]]], ylabel: str) -> Figure:
    """Means over the seeds with their 95 % bands, over training steps."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6))
        axes = figure.subplots()
        for place, (name, points) in enumerate(lines.items()):
            if not points:
                continue
            color, dashes = COLORS[place % len(COLORS)], DASHES[place // len(COLORS) % len(DASHES)]
            steps = [step for step, _ in points]
            axes.plot(steps, [point.mean for _, point in points], dashes, color=color, label=name)
            low, high = ([point.mean + sign * point.half for _, point in points] for sign in (-1, 1))
            if points[0][1].count > 1:
                axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)
        axes.set_xlabel("training step")
        axes.set_ylabel(ylabel)
        figure.legend(loc="outside upper left", ncols=4)
        return figure


def bars(values: Mapping[str, Interval], xlabel: str) -> Figure:
    """A mean and its 95 % interval a row, the first on top."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.28 * len(values)))
        axes = figure.subplots()
        means = [value.mean for value in values.values()]
        halves = [value.half if value.count > 1 else 0.0 for value in values.values()]
        axes.errorbar(means, list(values), xerr=halves, fmt="o", color=COLORS[0], capsize=3)
        axes.invert_yaxis()
        axes.set_xlabel(xlabel)
        return figure


def plane(xs: Mapping[str, Interval], ys: Mapping[str, Interval], xlabel: str, ylabel: str) -> Figure:
    """Each name's two means with their 95 % intervals."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0))
        axes = figure.subplots()
        for place, name in enumerate(xs):
            x, y = xs[name], ys[name]
            halves = [[each.half if each.count > 1 else 0.0] for each in (x, y)]
            color = COLORS[place % len(COLORS)]
            axes.errorbar(
                [x.mean], [y.mean], xerr=halves[0], yerr=halves[1], fmt="o", color=color, capsize=3, label=name
            )
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        figure.legend(loc="outside upper left", ncols=3)
        return figure


def svg(figure: Figure, name: str) -> str:
    """The figure on a white ground, so that it can be read on a dark page too."""
    text = io.StringIO()
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": name}):
        figure.savefig(text, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text.getvalue(), flags=re.S)

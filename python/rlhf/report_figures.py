"""The report's sections of figures: learning curves, the over-optimisation plane, diagnostics, distributions, time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from . import plots
from .overoptimization import fit
from .page import Page, escape, file_name, percent
from .plots import Curve
from .report_runs import Group
from .report_tables import sft_baseline

PPO_STAGES = ("ppo", "online")

# Title, unit, metric, lower end of the axis.
DIAGNOSTICS = (
    ("Probability ratio new / old policy", "mean over tokens", "val/ratio", None),
    ("Change of the policy in one step", "approx. KL, nats a token", "policy/approxkl_avg", None),
    ("Clipped values", "share of tokens", "val/clipfrac_avg", None),
    ("Value loss", "squared error", "loss/value_avg", None),
    ("Explained variance of the returns", "share", "ppo/val/var_explained", -1.0),
    ("Entropy of the policy", "nats a token", "policy/entropy_avg", None),
    ("Responses that ended by themselves", "responses a step", "val/num_eos_tokens", None),
    ("Length of the responses", "tokens", "tokens/mean_length", None),
)

# What the clip held back, by the sign of the advantage: the three bounds that can act.
CLIPS = (
    ("A > 0, at the upper bound", "policy/clipfrac_high"),
    ("A < 0, at the lower bound", "policy/clipfrac_low"),
    ("A < 0, at the dual bound", "policy/clipfrac_dual"),
)


def training_curves(page: Page, groups: Sequence[Group]) -> None:
    several = any(len(group.runs) > 1 for group in groups)
    bands = "bands are standard errors" + (", between the seeds where a run was repeated" if several else "")
    page.section(
        "Training",
        f"Thin lines are the values of single steps, thick lines a rolling mean; {bands}. "
        "A step is one batch of rollouts in PPO and one batch of ranked candidates in RRHF.",
    )
    baseline = sft_baseline(groups)
    figures = []
    for name, metric, caption, unit, evaluated in (
        ("proxy_reward", "objective/scores", "Proxy reward of the training samples", "score", "proxy"),
        ("gold_reward", "eval/gold", "Gold reward, held-out prompts", "gold reward", "gold"),
        ("kl", "objective/kl", "KL to the start model", "nats a response", None),
    ):
        lines = curves_of(groups, metric)
        if lines:
            level = baseline.measured(evaluated) if baseline and evaluated else None
            reference = plots.Reference(f"level of {baseline.name}", level["mean"]) if baseline and level else None
            figures.append((name, caption, plots.curves(lines, unit, reference)))
        else:
            page.missing(f"No run logged {metric}, so its curve is left out.")
    page.figures(figures)


def curves_of(groups: Sequence[Group], metric: str) -> list[Curve]:
    """A curve for each group that logged the metric, with the standard errors that are known."""
    lines = []
    for group in groups:
        steps, values, errors = group.series(metric)
        if values:
            lines.append(Curve(group.label, group.style, steps, values, errors, points=metric.startswith("eval/")))
    return lines


def over_optimisation(page: Page, groups: Sequence[Group]) -> None:
    page.section(
        "Gold reward against distance",
        "Every evaluation of every run, joined in the order of training; the large dot is the last. Where a line turns "
        "down while the distance grows, the policy exploits the reward model instead of improving. Dotted: forms of "
        "Gao et al. 2022 fitted to the points, d (a − b log d) for training and d (a − b d) for best of n, d = √KL.",
    )
    lines, fits = [], []
    for group in groups:
        steps, gold, _ = group.series("eval/gold")
        for metric in ("eval/kl", "objective/kl"):
            distance = dict(zip(*group.series(metric)[:2]))
            both = [step for step in steps if step in distance]
            if both:
                levels, far = dict(zip(steps, gold)), [math.sqrt(max(distance[step], 0.0)) for step in both]
                lines.append(Curve(group.label, group.style, far, [levels[step] for step in both]))
                fits.append(("rl", lines[-1]))
                break
        picked = [row for row in group.runs[0].info["summary"].get("best_of_n", ()) if "gold" in row]
        if picked:
            distances = [math.sqrt(row["kl_bound"]) for row in picked]
            golds = [row["gold"]["mean"] for row in picked]
            lines.append(Curve("best of n, picked", group.style + len(plots.COLORS), distances, golds))
            fits.append(("best_of_n", lines[-1]))
            sizes = ", ".join(str(row["n"]) for row in picked)
            page.add(
                f"<p>Dashed: the best of {sizes} answers by the reward model, without training, at the bound "
                "log n − (n − 1)/n on its KL.</p>"
            )
    if not lines:
        return page.missing("No run logged eval/gold together with a KL, so the figure is left out.")
    baseline = sft_baseline(groups)
    start = baseline.measured("gold") if baseline else None
    # Three points are met exactly by the three numbers of a fit, and say nothing of the form.
    enough = [(form, line) for form, line in fits if len(line.x) > 3]
    fitted = [(line, found) for form, line in enough if (found := fit(line.x, line.y, form)) is not None]
    for line, found in fitted:
        peak = f", highest at √KL {found.peak:.2f}" if found.peak else ""
        page.add(
            f'<p class="small">{escape(line.label)}: a = {found.a:.3f}, b = {found.b:.3f}, start {found.start:.3f}, '
            f"r.m.s. error {found.rmse:.3f}{peak}.</p>"
        )
    figure = plots.plane(lines, (0.0, start["mean"]) if start else None, fitted)
    page.figures([("gold_vs_kl", "Gold reward over √KL", figure)], large=True)


def reward_model(page: Page, groups: Sequence[Group]) -> None:
    page.section("Reward model")
    rated = [run for group in groups for run in group.runs if "pair_accuracy" in run.info["summary"]]
    if not rated:
        return page.missing("No finished reward-model run among these folders.")
    figures = []
    for run in rated:
        summary = run.info["summary"]
        sem = summary.get("pair_accuracy_sem")
        page.add(
            f"<p><strong>{escape(run.name)}</strong> orders <strong>{percent(summary['pair_accuracy'], 1)}"
            f"{f' ± {percent(sem, 1)}' if sem is not None else ''}</strong> of the held-out pairs as the labels do.</p>"
        )
        bins = summary.get("calibration", {})
        filled = [
            row for row in zip(bins.get("bins", ()), bins.get("accuracy", ()), bins.get("count", ())) if None not in row
        ]
        filled = [row for row in filled if row[2] > 0]
        if filled:
            caption = f"{run.name}: calibration on held-out pairs"
            figures.append((f"calibration_{file_name(run.name)}", caption, plots.calibration(*zip(*filled))))
    page.figures(figures)


def losses(page: Page, groups: Sequence[Group]) -> None:
    page.section("Learning curves")
    figures = []
    for group in (group for group in groups if group.stage not in PPO_STAGES):
        logged = dict.fromkeys(name for run in group.runs for line in run.metrics for name in line if is_loss(name))
        lines = [
            Curve(name, index, *series, points=name.startswith("eval/"))
            for index, name in enumerate(logged)
            if (series := group.series(name))[1]
        ]
        if lines:
            figures.append((f"loss_{file_name(group.name)}", f"{group.label}: losses", plots.curves(lines, "loss")))
    if not figures:
        page.missing("No run but PPO logged a loss.")
    page.figures(figures)


def is_loss(metric: str) -> bool:
    return "loss" in metric.split("/") or metric.endswith("_loss")


def diagnostics(page: Page, groups: Sequence[Group]) -> None:
    groups = [group for group in groups if group.stage in PPO_STAGES]
    page.section("PPO diagnostics")
    if not groups:
        return page.missing("No PPO run among these folders.")
    figures = []
    for title, unit, metric, floor in DIAGNOSTICS:
        lines = curves_of(groups, metric)
        if lines:
            figures.append((file_name(metric), title, plots.curves(lines, unit, floor=floor)))
        else:
            page.missing(f"No PPO run logged {metric}.")
    page.figures(figures)


def clipping(page: Page, groups: Sequence[Group]) -> None:
    groups = [group for group in groups if group.stage in PPO_STAGES]
    page.section(
        "What the clip held back",
        "Share of tokens whose gradient a bound of the ratio stopped. The upper bound can act only on tokens with a "
        "positive advantage, the lower and the dual bound only on those with a negative one.",
    )
    figures = []
    for group in groups:
        lines = [
            Curve(label, index, *series)
            for index, (label, metric) in enumerate(CLIPS)
            if (series := group.series(metric))[1]
        ]
        if lines:
            figure = plots.curves(lines, "share of tokens", columns=1)
            figures.append((f"clip_{file_name(group.name)}", f"{group.label}: clipped ratios", figure))
    if not figures:
        return page.missing("No PPO run logged policy/clipfrac_high or policy/clipfrac_low.")
    page.figures(figures)


def distributions(page: Page, groups: Sequence[Group]) -> None:
    """From rollouts.jsonl: what a mean over the batch hides."""
    page.section(
        "Inside the rollouts",
        "Scores of the responses at the first and the last step written down; where in a response the policy has moved "
        "away from its start; and the distance of each response of the last step against its length.",
    )
    figures = []
    for group in groups:
        rollouts = group.runs[0].rollouts
        if not rollouts:
            continue
        first, last = rollouts[0], rollouts[-1]
        ends = list({f"step {line['step']}": line for line in (first, last)}.items())
        name, style = file_name(group.name), group.style
        scores = plots.histogram([(label, line["scores"]) for label, line in ends], "score", style)
        figures.append((f"scores_{name}", f"{group.name}: scores of the responses", scores))
        chosen = [rollouts[round(i * (len(rollouts) - 1) / 3)] for i in range(4)]
        by_step = {line["step"]: line["kl_by_position"] for line in chosen}
        figures.append((f"kl_position_{name}", f"{group.name}: KL by position", plots.by_position(by_step, style)))
        spread = plots.by_length(last["lengths"], last["kl"], last["terminated"], style)
        figures.append((f"kl_length_{name}", f"{group.name}: KL by length, step {last['step']}", spread))
    if not figures:
        return page.missing("No run wrote rollouts.jsonl.")
    page.figures(figures)


def phase_timings(page: Page, groups: Sequence[Group]) -> None:
    page.section("Time by phase", "Seconds of the timed phases over the whole run.")
    seconds: dict[str, dict[str, float]] = {}
    runs = [run for group in groups for run in group.runs]
    for run in runs:
        for name in {name for line in run.metrics for name in line if name.startswith("time/")}:
            phase = seconds.setdefault(name.removeprefix("time/"), {})
            phase[run.name] = sum(run.series(name)[1])
    if not seconds:
        return page.missing("No run logged time/… metrics.")
    timed = [run.name for run in runs if any(run.name in phase for phase in seconds.values())]
    longest_first = sorted(seconds, key=lambda phase: -sum(seconds[phase].values()))
    phases: dict[str, Any] = {phase: [seconds[phase].get(name, 0.0) for name in timed] for phase in longest_first}
    page.figures([("timings", "Time by phase", plots.timings(timed, phases))], large=True)

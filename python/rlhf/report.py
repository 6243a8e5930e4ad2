"""One self-contained report.html from run folders: no network, no script; the PNG of each figure lies beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any

from .config import UserError, option
from .page import Page, document, duration, escape, file_name, number, percent, with_error

SHOWN_PROMPTS = 4

# Title, unit, metric, lower end of the axis.
DIAGNOSTICS = (
    ("Probability ratio new / old policy", "mean over tokens", "val/ratio", None),
    ("Change of the policy in one step", "approx. KL, nats a token", "policy/approxkl_avg", None),
    ("Clipped policy ratios", "share of tokens", "policy/clipfrac_avg", None),
    ("Clipped values", "share of tokens", "val/clipfrac_avg", None),
    ("Value loss", "squared error", "loss/value_avg", None),
    ("Explained variance of the returns", "share", "ppo/val/var_explained", -1.0),
    ("Entropy of the policy", "nats a token", "policy/entropy_avg", None),
    ("Responses that ended by themselves", "responses a step", "val/num_eos_tokens", None),
)


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    runs: tuple[str, ...] = option(MISSING, "run folders, or folders of run folders")
    out: str = option(MISSING, "folder to write report.html and the figures' PNG files to")
    title: str = option("RLHF report", "heading of the page")
    overwrite: bool = option(False, "replace the report.html that is in --out")


@dataclass(frozen=True)
class RunData:
    """What a run folder holds. style: its place in the report, which decides its colour."""

    name: str
    style: int
    info: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    evaluation: dict[str, Any]

    @property
    def stage(self) -> str:
        return self.info["stage"]

    def series(self, metric: str) -> tuple[list[int], list[float]]:
        """Steps and values of a metric, without the steps that lack it."""
        lines = [line for line in self.metrics if line.get(metric) is not None]
        return [line["step"] for line in lines], [line[metric] for line in lines]


def main(config: ReportConfig) -> Path:
    """Write report.html and its PNG files; returns the path of report.html.

    Raises UserError or FileNotFoundError for a folder without runs, FileExistsError where a report is there already.
    """
    import matplotlib

    from . import plots
    from .files import write_atomically

    target = Path(config.out) / "report.html"
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"{target} is there; --overwrite replaces it")
    runs = read_runs(config.runs)
    page = Page()
    page.add(f"<p>{len(runs)} runs: {escape(', '.join(run.name for run in runs))}</p>")
    with matplotlib.rc_context(plots.STYLE):
        for part in (
            headline,
            training_curves,
            over_optimisation,
            reward_model,
            losses,
            diagnostics,
            credit,
            responses,
            phase_timings,
            configurations,
        ):
            part(page, runs)
    target.parent.mkdir(parents=True, exist_ok=True)
    for name, png in page.pngs.items():
        write_atomically(target.parent / name, png)
    write_atomically(target, document(config.title, page.parts))
    return target


# ---------------------------------------------------------------------------------------------------- reading


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
    infos = [read_json(path / "run.json") for path in found]
    # Policies come first in the order of colours: a reward model has no line in the shared figures.
    colors = sorted(range(len(found)), key=lambda i: infos[i]["stage"] == "rm")
    return [
        RunData(
            name=path.name if names.count(path.name) == 1 else f"{path.parent.name}/{path.name}",
            style=colors.index(i),
            info=infos[i],
            metrics=read_optional_lines(path / "metrics.jsonl"),
            samples=read_optional_lines(path / "samples.jsonl"),
            evaluation=read_json(path / "evaluation.json") if (path / "evaluation.json").exists() else {},
        )
        for i, path in enumerate(found)
    ]


def read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def read_optional_lines(path: Path) -> list[dict[str, Any]]:
    from .files import read_lines

    return read_lines(path) if path.exists() else []


# ---------------------------------------------------------------------------------------------------- numbers


def headline(page: Page, runs: list[RunData]) -> None:
    evaluated = [run for run in runs if run.evaluation]
    page.section("Methods")
    if not evaluated:
        return page.missing("None of these runs has an evaluation.json yet; rlhf evaluate makes one.")
    baseline = sft_baseline(evaluated)
    if baseline and (best := best_gain(evaluated, baseline)):
        run, gain, errors = best
        page.add(
            f"<p>Highest gold reward: <strong>{escape(run.name)}</strong>, {gain:+.3f} over {escape(baseline.name)} "
            f"({errors:.1f} standard errors).</p>"
        )
    rows = [headline_row(run, baseline) for run in evaluated]
    columns = [name for name in rows[0] if any(row[name] for row in rows)]
    page.add('<div class="scroll"><table class="numbers"><thead><tr>')
    page.add(*(f"<th>{escape(name)}</th>" for name in columns), "</tr></thead><tbody>")
    for run, row in zip(evaluated, rows):
        cells = "".join(f"<td>{escape(row[name]) or '–'}</td>" for name in columns[1:])
        page.add(f"<tr><th>{chip(run)}</th>{cells}</tr>")
    page.add("</tbody></table></div>")
    counts = sorted({run.evaluation.get("n", 0) for run in evaluated})
    page.add(
        f'<p class="small">Means over {" or ".join(map(str, counts))} held-out prompts ± standard error. '
        "Proxy reward: the reward model that training used. Gold reward: a judge that training never saw. "
        "Gain: difference of the gold rewards over √(s.e.² + s.e.²). KL: to the start model, summed over a "
        "response.</p>"
    )


def headline_row(run: RunData, baseline: RunData | None) -> dict[str, str]:
    evaluation, seconds = run.evaluation, run.info.get("seconds")
    against = evaluation.get("against", {})
    wins = against.get("gold") or against.get("proxy")
    return {
        "Run": run.name,
        "Proxy reward": with_error(evaluation.get("proxy")),
        "Gold reward": with_error(evaluation.get("gold")),
        "Gain over SFT": gain_text(run, baseline),
        "KL (nats)": with_error(evaluation.get("kl"), 2),
        "Length (tokens)": number(evaluation.get("length"), 1),
        "Ends with EOS": percent(evaluation.get("eos_rate")),
        "distinct-2": number(evaluation.get("distinct_2"), 3),
        "Wins": f"{percent(wins['mean'])} over {against['run']}" if wins else "",
        "Wall time": duration(seconds) if seconds is not None else "unfinished",
    }


def sft_baseline(runs: list[RunData]) -> RunData | None:
    return next((run for run in runs if run.stage == "sft"), None)


def gain_over(run: RunData, baseline: RunData) -> tuple[float, float] | None:
    """(difference of the gold rewards, the same in standard errors); None where one of them has no gold reward."""
    ours, theirs = run.evaluation.get("gold"), baseline.evaluation.get("gold")
    if not ours or not theirs:
        return None
    difference, error = ours["mean"] - theirs["mean"], math.hypot(ours["sem"], theirs["sem"])
    return difference, difference / error if error else math.copysign(math.inf, difference)


def gain_text(run: RunData, baseline: RunData | None) -> str:
    if run is baseline:
        return "baseline"
    gain = gain_over(run, baseline) if baseline else None
    return f"{gain[0]:+.3f} ({gain[1]:.1f} s.e.)" if gain else ""


def best_gain(runs: list[RunData], baseline: RunData) -> tuple[RunData, float, float] | None:
    gains = [(run, *gain) for run in runs if run is not baseline and (gain := gain_over(run, baseline))]
    return max(gains, key=lambda item: item[1], default=None)


# ---------------------------------------------------------------------------------------------------- figures


def training_curves(page: Page, runs: list[RunData]) -> None:
    from . import plots

    page.section(
        "Training",
        "Thin lines are the values of single steps, thick lines a rolling mean; bands are standard errors. "
        "A step is one batch of rollouts in PPO and one batch of ranked candidates in RRHF.",
    )
    baseline = sft_baseline(runs)
    figures = []
    for name, metric, caption, unit, evaluated in (
        ("proxy_reward", "objective/scores", "Proxy reward of the training samples", "score", "proxy"),
        ("gold_reward", "eval/gold", "Gold reward, held-out prompts", "gold reward", "gold"),
        ("kl", "objective/kl", "KL to the start model", "nats a response", None),
    ):
        lines = curves_of(runs, metric)
        if lines:
            level = baseline.evaluation.get(evaluated) if baseline and evaluated else None
            reference = plots.Reference(f"level of {baseline.name}", level["mean"]) if baseline and level else None
            figures.append((name, caption, plots.curves(lines, unit, reference)))
        else:
            page.missing(f"No run logged {metric}, so its curve is left out.")
    page.figures(figures)


def curves_of(runs: list[RunData], metric: str) -> list[Any]:
    """A curve for each run that logged the metric, with its standard errors where they were logged too."""
    from .plots import Curve

    lines = []
    for run in runs:
        steps, values = run.series(metric)
        if values:
            _, errors = run.series(f"{metric}_sem")
            sem = errors if len(errors) == len(values) else None
            lines.append(Curve(run.name, run.style, steps, values, sem, points=metric.startswith("eval/")))
    return lines


def over_optimisation(page: Page, runs: list[RunData]) -> None:
    from . import plots

    page.section(
        "Gold reward against distance",
        "Every evaluation of every run, joined in the order of training; the large dot is the last. Where a line turns "
        "down while the distance grows, the policy exploits the reward model instead of improving.",
    )
    lines = []
    for run in runs:
        points = [line for line in run.metrics if line.get("eval/gold") is not None and evaluated_kl(line) is not None]
        if points:
            distance = [math.sqrt(max(evaluated_kl(line) or 0.0, 0.0)) for line in points]
            lines.append(plots.Curve(run.name, run.style, distance, [line["eval/gold"] for line in points]))
        picked = [row for row in run.info["summary"].get("best_of_n", ()) if "gold" in row]
        if picked:
            distance = [math.sqrt(row["kl_bound"]) for row in picked]
            gold = [row["gold"]["mean"] for row in picked]
            lines.append(plots.Curve("best of n, picked", run.style + len(plots.COLORS), distance, gold))
            sizes = ", ".join(str(row["n"]) for row in picked)
            page.add(
                f"<p>Dashed: the best of {sizes} answers by the reward model, without training, at the bound "
                "log n − (n − 1)/n on its KL.</p>"
            )
    if not lines:
        return page.missing("No run logged eval/gold together with a KL, so the figure is left out.")
    baseline = sft_baseline(runs)
    start = baseline.evaluation.get("gold") if baseline else None
    figure = plots.plane(lines, (0.0, start["mean"]) if start else None)
    page.figures([("gold_vs_kl", "Gold reward over √KL", figure)], large=True)


def evaluated_kl(line: dict[str, Any]) -> float | None:
    return line.get("eval/kl", line.get("objective/kl"))


def reward_model(page: Page, runs: list[RunData]) -> None:
    from . import plots

    page.section("Reward model")
    rated = [run for run in runs if "pair_accuracy" in run.info["summary"]]
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


def losses(page: Page, runs: list[RunData]) -> None:
    from . import plots

    page.section("Learning curves")
    figures = []
    for run in (run for run in runs if run.stage != "ppo"):
        logged = {name: run.series(name) for line in run.metrics for name in line if is_loss(name)}
        lines = [
            plots.Curve(name, index, *series, points=name.startswith("eval/"))
            for index, (name, series) in enumerate(logged.items())
            if series[1]
        ]
        if lines:
            figures.append((f"loss_{file_name(run.name)}", f"{run.name}: losses", plots.curves(lines, "loss")))
    if not figures:
        page.missing("No run but PPO logged a loss.")
    page.figures(figures)


def is_loss(metric: str) -> bool:
    return "loss" in metric.split("/") or metric.endswith("_loss")


def diagnostics(page: Page, runs: list[RunData]) -> None:
    from . import plots

    runs = [run for run in runs if run.stage == "ppo"]
    page.section("PPO diagnostics")
    if not runs:
        return page.missing("No PPO run among these folders.")
    figures = []
    for title, unit, metric, floor in DIAGNOSTICS:
        lines = curves_of(runs, metric)
        if lines:
            figures.append((file_name(metric), title, plots.curves(lines, unit, floor=floor)))
        else:
            page.missing(f"No PPO run logged {metric}.")
    page.figures(figures)


def phase_timings(page: Page, runs: list[RunData]) -> None:
    from . import plots

    page.section("Time by phase", "Seconds of the timed phases over the whole run.")
    seconds: dict[str, dict[str, float]] = {}
    for run in runs:
        for name in {name for line in run.metrics for name in line if name.startswith("time/")}:
            phase = seconds.setdefault(name.removeprefix("time/"), {})
            phase[run.name] = sum(run.series(name)[1])
    if not seconds:
        return page.missing("No run logged time/… metrics.")
    timed = [run.name for run in runs if any(run.name in phase for phase in seconds.values())]
    longest_first = sorted(seconds, key=lambda phase: -sum(seconds[phase].values()))
    phases = {phase: [seconds[phase].get(name, 0.0) for name in timed] for phase in longest_first}
    page.figures([("timings", "Time by phase", plots.timings(timed, phases))], large=True)


# ---------------------------------------------------------------------------------------------------- texts


def credit(page: Page, runs: list[RunData]) -> None:
    page.section(
        "Credit of each token",
        "How the score of a response was spread over its tokens. Colours are relative to the largest credit of the "
        "response, which stands above it; hover over a token for its numbers.",
    )
    by_run = {run.name: {record["prompt"]: record for record in run.samples if record.get("credit")} for run in runs}
    prompts = shared_first([list(records) for records in by_run.values()])[:SHOWN_PROMPTS]
    if not prompts:
        return page.missing("No run wrote samples with credit (samples.jsonl).")
    page.add('<p class="scale">takes score away <span></span> adds to the score</p>')
    for prompt in prompts:
        page.add(f'<h3>“{escape(prompt)} …”</h3><div class="grid cards">')
        for run in runs:
            if record := by_run[run.name].get(prompt):
                page.add(credit_card(run, record))
        page.add("</div>")


def credit_card(run: RunData, record: dict[str, Any]) -> str:
    largest = max(map(abs, record["credit"]))
    rewards = record.get("rewards") or [None] * len(record["credit"])
    tokens = "".join(token_span(*row, largest) for row in zip(record["tokens"], record["credit"], rewards))
    return (
        f'<article><p class="small">{chip(run)} score {number(record.get("score"), 2)}, gold '
        f"{number(record.get('gold'), 2) or '–'}, largest credit {number(largest, 3)}, step {record['step']}</p>"
        f'<p class="tokens">{tokens}</p></article>'
    )


def token_span(token: str, value: float, reward: float | None, largest: float) -> str:
    """A token on its credit's colour: vermilion with a dotted line below zero, bluish green above."""
    strength = min(abs(value) / largest, 1.0) if largest else 0.0
    red_green_blue = "213,94,0" if value < 0 else "0,158,115"
    minus = ' class="minus"' if value < 0 and strength > 0.02 else ""
    tooltip = f"credit {value:+.4f}" + (f", reward {reward:+.4f}" if reward is not None else "")
    word = token.lstrip(" ") or token
    style = f"background:rgba({red_green_blue},{0.85 * strength:.2f})"
    text = escape(word.replace("\n", "↵\n"))
    return f'{token.removesuffix(word)}<span{minus} style="{style}" title="{tooltip}">{text}</span>'


def responses(page: Page, runs: list[RunData]) -> None:
    page.section("Responses", "The first held-out prompts, not chosen by hand, each answered by every method.")
    by_run: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        for sample in run.evaluation.get("samples", ()):
            by_run.setdefault(run.name, {}).setdefault(sample["prompt"], sample)
    prompts = shared_first([list(samples) for samples in by_run.values()])[:SHOWN_PROMPTS]
    if not prompts:
        return page.missing("No evaluation.json with samples among these runs.")
    for prompt in prompts:
        page.add(f'<h3>“{escape(prompt)} …”</h3><div class="scroll"><table class="texts responses"><thead><tr>')
        page.add("<th>Run</th><th>Response</th><th>Proxy</th><th>Gold</th></tr></thead><tbody>")
        for run in runs:
            if sample := by_run.get(run.name, {}).get(prompt):
                judged = "".join(f"<td>{number(sample.get(judge), 2) or '–'}</td>" for judge in ("proxy", "gold"))
                page.add(f"<tr><th>{chip(run)}</th><td>{escape(sample['response'])}</td>{judged}</tr>")
        page.add("</tbody></table></div>")


def shared_first(lists: list[list[str]]) -> list[str]:
    """All different items, those that more lists have first, else in order of appearance."""
    items = list(dict.fromkeys(item for items in lists for item in items))
    return sorted(items, key=lambda item: -sum(item in items for items in lists))


def configurations(page: Page, runs: list[RunData]) -> None:
    page.section("Configuration")
    for run in runs:
        facts = {
            "stage": run.stage,
            "started": run.info.get("started"),
            "seconds": run.info.get("seconds"),
            **run.info["config"],
            **{f"version of {name}": version for name, version in run.info.get("versions", {}).items()},
        }
        rows = "".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items())
        state = "" if run.info.get("finished") else ", unfinished"
        page.add(
            f"<details><summary>{chip(run)} ({escape(run.stage)}{state})</summary>"
            f'<div class="scroll"><table class="texts">{rows}</table></div></details>'
        )


def chip(run: RunData) -> str:
    from .plots import COLORS

    return f'<span class="chip" style="--color:{COLORS[run.style % len(COLORS)]}">{escape(run.name)}</span>'

"""Does a dense reward from attention learn faster than the score on the last token, and do long responses gain most?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf import demo

from . import plots
from .experiment import Arm, Experiment, Task
from .statistics import by_seed, curve, difference, interval, mean_score

PPO = demo.PPO | {"steps": 30, "kl_coef": 0.05, "eval_every": 10, "num_samples": 0}
STEPS = {"rt-polarity": 50}  # where the curve still climbs after those
WIDE = "reviews"  # the task of every shaping; responses of about 15 tokens
SPREADING = ("abc", "abc-d", "prefix-diff", "grad-x-input", "value-attention")
PAIR, CONTROL = ("abc 0.8", "terminal"), "abc 0.8, total return"
MAIN = ("terminal", "uniform", "abc 0.8", CONTROL)


def arms(task: Task) -> list[Arm]:
    kinds = {"terminal": {"reward_shaping": "terminal"}, "uniform": {"reward_shaping": "uniform", "beta": 1.0}}
    kinds["abc 0.8"] = {"reward_shaping": "abc", "beta": 0.8}
    kinds[CONTROL] = kinds["abc 0.8"] | {"estimator": "total_return"}
    if task.name == WIDE:
        for kind in SPREADING:
            kinds |= {f"{kind} {beta}": {"reward_shaping": kind, "beta": beta} for beta in (0.5, 1.0)}
    elif task.name in ("reviews-96", "rt-polarity"):  # the slowest
        del kinds[CONTROL]
    settings = PPO | {"steps": STEPS.get(task.name, PPO["steps"])}
    return [Arm(name, "ppo", settings | changes) for name, changes in kinds.items()]


def report(records: list[dict[str, Any]]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    tasks = list(dict.fromkeys(record["task"] for record in records))
    for task in tasks:
        found = [record for record in records if record["task"] == task]
        names = in_order(found)
        shown = [name for name in names if name in MAIN]
        curves = {name: curve(found, name, "objective/scores") for name in shown}
        golds = {name: curve(found, name, "eval/gold") for name in shown}
        figures = {
            f"dense-{task}-proxy": plots.curves(curves, "proxy reward of the samples"),
            f"dense-{task}-gold": plots.curves(golds, "gold reward, held-out prompts"),
        }
        if len(names) > len(shown):
            bars = {name: interval(list(by_seed(found, name, mean_score).values())) for name in names}
            figures[f"dense-{task}-arms"] = plots.bars(bars, "mean proxy reward over training")
        yield f"Dense rewards, {task}", "\n\n".join([table(found, names), finding(found, names)]), figures
    if len(tasks) > 1:
        yield "Dense rewards and the length of the responses", lengths(records, tasks), {}


def in_order(records: list[dict[str, Any]]) -> list[str]:
    """The shapings that have runs, as `arms` has them; the runs are in the order in which they ended."""
    there = list(dict.fromkeys(record["arm"] for record in records))
    task = records[0]["task"]
    wanted = [arm.name for arm in arms(Task(task, task))]
    return sorted(there, key=lambda name: wanted.index(name) if name in wanted else len(wanted))


def table(records: list[dict[str, Any]], names: list[str]) -> str:
    lines = [
        "| shaping, β | n | mean proxy over training | − terminal (paired) | final proxy | final gold | KL | tokens |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    terminal = by_seed(records, "terminal", mean_score)
    for name in names:
        means = by_seed(records, name, mean_score)
        gain = difference(means, terminal) if name != "terminal" else None
        finals = [
            interval(list(by_seed(records, name, lambda record, key=key: record["final"][key]).values()))
            for key in ("proxy", "gold", "kl", "length")
        ]
        cells = [name, str(len(means)), str(interval(list(means.values()))), str(gain or "–"), *map(str, finals)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", "Means over the seeds with 95 % confidence intervals."])


def finding(records: list[dict[str, Any]], names: list[str]) -> str:
    """The published claims, each with what was measured here."""
    terminal = by_seed(records, "terminal", mean_score)
    abc, uniform = by_seed(records, "abc 0.8", mean_score), by_seed(records, "uniform", mean_score)
    sentences = []
    gain = difference(abc, terminal)
    if gain:
        sentences.append(
            f"The published claim is that attention credit has a higher mean reward over training than the score on "
            f"the last token. Here the paired difference is {gain} over {gain.count} seeds: {verdict(gain)}."
        )
        early = difference(*(by_seed(records, name, lambda record: mean_score(record, 0.25)) for name in PAIR))
        sentences.append(f"Over the first quarter of the steps it is {early}: {verdict(early)}.")
    curves = {name: curve(records, name, "objective/scores") for name in ("terminal", "abc 0.8") if name in names}
    if len(curves) == 2:
        peak = max(point.mean for _, point in curves["terminal"])
        peak_step = next(step for step, point in curves["terminal"] if point.mean == peak)
        reached = next((step for step, point in curves["abc 0.8"] if point.mean >= peak - 1e-9), None)
        there = (
            f"gets there at step {reached}, {reached / peak_step:.0%} of the way" if reached else "does not get there"
        )
        sentences.append(
            f"The mean curve of the terminal reward peaks at {peak:.3f} in step {peak_step}; attention credit {there} "
            "(published: in under half of the steps)."
        )
    close = difference(abc, uniform)
    if close:
        sentences.append(f"Against an even spread attention credit gains {close}: {verdict(close, 'higher', 'lower')}.")
    costs = [
        difference(*(by_seed(records, name, lambda record, key=key: record["final"][key]) for name in PAIR))
        for key in ("length", "kl")
    ]
    if all(costs):
        sentences.append(f"Its responses end up longer by {costs[0]} tokens and its KL higher by {costs[1]} nats.")
    control = difference(by_seed(records, CONTROL, mean_score), terminal)
    if control:
        sentences.append(
            "With `--estimator total_return` every token gets the whole return, so that spreading it plays no part: "
            f"{control} over the terminal score under GAE with λ = 0.95, {verdict(control, 'higher', 'lower')}."
        )
    gains = {name: difference(by_seed(records, name, mean_score), terminal) for name in names if name != "terminal"}
    apart = [f"{name} ({gain})" for name, gain in gains.items() if gain and gain.excludes_zero and gain.mean > 0]
    if len(gains) > 3:
        sentences.append(
            f"Ahead of the terminal score beyond their intervals: {', '.join(apart) or 'none'}, of {len(gains)} "
            f"shapings; {len(gains) / 20:.1f} intervals of 95 % would exclude zero by chance."
        )
    return " ".join(sentences)


def answer(records: list[dict[str, Any]]) -> str:
    """How attention credit compares with the score on the last token, task by task."""
    better, worse, level = [], [], []
    for task in dict.fromkeys(record["task"] for record in records):
        found = [record for record in records if record["task"] == task]
        gain = difference(*(by_seed(found, name, mean_score) for name in PAIR))
        if gain:
            group = level if not gain.excludes_zero else better if gain.mean > 0 else worse
            group.append(f"{task} ({gain})")
    said = [
        f"{text} {', '.join(group)}"
        for text, group in (("higher on", better), ("lower on", worse), ("not told apart on", level))
        if group
    ]
    return f"Mean proxy over training, attention credit − last token: {'; '.join(said)}." if said else ""


def verdict(gain: Any, more: str = "it holds here", less: str = "the opposite holds here") -> str:
    if not gain.excludes_zero:
        return "no difference that these seeds could show"
    return more if gain.mean > 0 else less


def lengths(records: list[dict[str, Any]], tasks: list[str]) -> str:
    """Tasks by the length of the responses that the start model writes, the first evaluation's."""
    rows = []
    for task in tasks:
        found = [record for record in records if record["task"] == task]
        means = {name: by_seed(found, name, mean_score) for name in ("terminal", "abc 0.8", "uniform")}
        gains = " | ".join(str(difference(means[name], means["terminal"]) or "–") for name in ("abc 0.8", "uniform"))
        starts = [record["series"]["eval/length"][0][1] for record in found]
        shared = means["abc 0.8"].keys() & means["terminal"].keys()
        by_length = {seed: means["abc 0.8"][seed] - means["terminal"][seed] for seed in shared}
        rows.append((sum(starts) / len(starts), task, gains, by_length))
    rows.sort(key=lambda row: row[0])
    lines = [
        "| task | tokens at the start | attention credit − terminal, mean proxy over training | uniform − terminal |",
        "|---|--:|--:|--:|",
        *(f"| {task} | {start:.1f} | {gains} |" for start, task, gains, _ in rows),
        "",
    ]
    (_, shortest, _, first), (_, longest, _, last) = rows[0], rows[-1]
    change = difference(last, first)
    claim = "The published claim is that long responses gain most."
    if change:
        claim += f" Here {longest} gains {change} more than {shortest}: {verdict(change)}."
    return "\n".join([*lines, claim])


TASKS = ("reviews-16", WIDE, "reviews-48", "reviews-96", "rt-polarity")
EXPERIMENT = Experiment("dense", str(__doc__), TASKS, arms, report, answer)

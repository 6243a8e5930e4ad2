"""RRHF, PPO, best-of-n, rejection-sampling fine-tuning and DPO: what does each make of the same number of samples?"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rlhf.demo import BUDGET, METHODS

from . import plots
from .experiment import Arm, Experiment, Task
from .statistics import by_seed, difference, interval

COLUMNS = ("proxy", "gold", "kl", "perplexity", "length", "distinct_2")


def arms(task: Task) -> list[Arm]:
    """The demo's. Each learning rate, and DPO's β, is the best of four that were tried with a seed of its own (100)."""
    ppo = {"eval_every": 10, "num_samples": 0}
    return [
        Arm("ppo terminal", "ppo", {**METHODS["ppo-terminal"].settings, **ppo}),
        Arm("ppo abc", "ppo", {**METHODS["ppo-abc"].settings, **ppo}),
        Arm("rrhf, 4 rounds", "rrhf", METHODS["rrhf"].settings),
        Arm("best of 4, SFT on it", "best_of_n", METHODS["best-of-n"].settings),
        Arm("rft, 4 rounds", "rft", METHODS["rft"].settings),
        Arm("dpo on samples", "dpo", METHODS["dpo"].settings),
    ]


def report(records: list[dict[str, Any]]) -> Iterable[tuple[str, str, dict[str, Any]]]:
    for task in dict.fromkeys(record["task"] for record in records):
        found = [record for record in records if record["task"] == task]
        names = list(dict.fromkeys(record["arm"] for record in found))
        lines = [
            f"| method, {BUDGET} samples | seeds | proxy | gold | KL | perplexity | tokens | distinct-2 | s | MiB |",
            f"|---|{'--:|' * 9}",
        ]
        for name in names:
            cells = [values(found, name, lambda record, key=key: record["final"][key]) for key in COLUMNS]
            seconds = values(found, name, lambda record: record["seconds"])
            memory = values(found, name, lambda record: float(record["peak_rss_mib"]))
            count = str(cells[0].count)
            lines.append(
                f"| {' | '.join([name, count, *map(str, cells), f'{seconds.mean:.0f}', f'{memory.mean:.0f}'])} |"
            )
        machines = " and ".join(sorted({record["machine"] for record in found}))
        lines += [
            "",
            "Means over the seeds with 95 % confidence intervals; perplexity is the start model's. Two runs at a time, "
            f"each one thread of {machines}.",
        ]
        golds = {name: values(found, name, lambda record: record["final"]["gold"]) for name in names}
        kls = {name: values(found, name, lambda record: record["final"]["kl"]) for name in names}
        figures = {
            f"methods-{task}-gold": plots.bars(golds, "gold reward, held-out prompts"),
            f"methods-{task}-plane": plots.plane(kls, golds, "KL to the start, nats a response", "gold reward"),
        }
        yield f"Methods at an equal number of samples, {task}", "\n".join([*lines, "", finding(found, names)]), figures


def values(records: list[dict[str, Any]], name: str, value: Any) -> Any:
    return interval(list(by_seed(records, name, value).values()))


def finding(records: list[dict[str, Any]], names: list[str]) -> str:
    """The best by gold, and which of the others it beats beyond the intervals."""
    golds = {name: by_seed(records, name, lambda record: record["final"]["gold"]) for name in names}
    best = max(names, key=lambda name: sum(golds[name].values()) / len(golds[name]))
    beaten, level = [], []
    for name in names:
        gap = difference(golds[best], golds[name]) if name != best else None
        if gap:
            (beaten if gap.excludes_zero else level).append(f"{name} ({gap})")
    text = f"Highest gold reward: {best}. Paired by seed it is ahead of {', '.join(beaten) or 'none of the others'}"
    return f"{text}; not told apart from {', '.join(level)}." if level else f"{text}."


def answer(records: list[dict[str, Any]]) -> str:
    return " ".join(
        finding(found, list(dict.fromkeys(record["arm"] for record in found)))
        for task in dict.fromkeys(record["task"] for record in records)
        if (found := [record for record in records if record["task"] == task])
    )


EXPERIMENT = Experiment("methods", str(__doc__), ("reviews",), arms, report, answer)

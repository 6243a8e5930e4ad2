"""The whole pipeline on one task: SFT, reward model, every method at an equal number of samples, report."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import best_of_n, dpo, evaluate, ppo, report, rft, rm, rrhf, sft
from .config import check_options, option
from .ppo_config import PpoConfig

BUDGET = 2560
"""Responses that each method samples for its training."""

# The learning rates, passes and beta are those that did best in short trials with a tiny model from scratch; a
# pretrained one wants learning rates a hundred to a thousand times smaller.
PPO: dict[str, Any] = {"batch_size": 64, "num_mini_batches": 1, "num_ppo_epochs": 2, "learning_rate": 1e-3}
PPO |= {"steps": BUDGET // 64}


@dataclass(frozen=True)
class Method:
    """title: in the tables. settings: what differs from the stage's defaults."""

    title: str
    stage: Callable[[Any], Path]
    config: type
    settings: Mapping[str, Any]


METHODS = {
    "best-of-n": Method(
        "SFT on best of n",
        best_of_n.main,
        best_of_n.BestOfNConfig,
        {"n": 4, "num_prompts": BUDGET // 4, "learning_rate": 2e-3},
    ),
    "rft": Method(
        "rejection-sampling SFT",
        rft.main,
        rft.RftConfig,
        {"num_candidates": 8, "rounds": 4, "num_prompts": BUDGET // 32, "learning_rate": 2e-3},
    ),
    "dpo": Method(
        "DPO on own samples",
        dpo.main,
        dpo.DpoConfig,
        {"pairs": "sampled", "num_candidates": 4, "num_prompts": BUDGET // 4, "learning_rate": 5e-4, "beta": 0.5},
    ),
    "rrhf": Method(
        "RRHF",
        rrhf.main,
        rrhf.RrhfConfig,
        {"num_candidates": 4, "rounds": 4, "num_prompts": BUDGET // 16, "learning_rate": 2e-3},
    ),
    "ppo-terminal": Method("PPO terminal score", ppo.main, PpoConfig, {**PPO, "reward_shaping": "terminal"}),
    "ppo-abc": Method("PPO attention credit", ppo.main, PpoConfig, {**PPO, "reward_shaping": "abc"}),
}

# Whose credit for the same responses the report shows side by side.
SHAPINGS = ("terminal", "uniform", "abc", "abc-d", "prefix-diff", "grad-x-input", "value-attention")

# A few thousand human-labelled texts: a reward model learns them by heart unless tokens are hidden from it.
SMALL_DATA: dict[str, Any] = {"epochs": 4, "token_dropout": 0.4, "batch_size": 8}


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    out: str = option("runs/demo", "folder for the runs and the report")
    data: str = option("reviews", '"reviews", the generated task; or a folder or file, as in the stages')
    seed: int = option(0, "seed of every stage", low=0)
    device: str = option("auto", "cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    eval_samples: int = option(512, "responses in each method's final evaluation", low=1)
    overwrite: bool = option(False, "replace the runs that are in --out")

    def __post_init__(self) -> None:
        check_options(self)


def main(config: DemoConfig) -> Path:
    """Run every stage and print the table; returns the report."""
    started = time.monotonic()
    out = Path(config.out)
    folders = {name: out / name for name in ("sft", "rm", *METHODS)}
    taken = [str(folder) for folder in folders.values() if folder.exists()]
    if taken and not config.overwrite:
        raise FileExistsError(f"{', '.join(taken)} are there; --overwrite replaces them")
    common: dict[str, Any] = {"seed": config.seed, "device": config.device, "overwrite": config.overwrite}
    task: dict[str, Any] = {**common, "data": config.data}
    start: dict[str, Any] = {**task, "init": str(folders["sft"]), "rm": str(folders["rm"])}

    count = len(METHODS) + 3
    say(f"1/{count}  supervised fine-tuning of a tiny Llama from scratch")
    sft.main(sft.SftConfig(out=str(folders["sft"]), **task))
    say(f"2/{count}  reward model on ranked responses")
    settings = {} if config.data == "reviews" else SMALL_DATA
    rm.main(rm.RmConfig(out=str(folders["rm"]), init=str(folders["sft"]), **task, **settings))
    for number, (name, method) in enumerate(METHODS.items(), 3):
        say(f"{number}/{count}  {method.title}")
        shown = {"compare_shapings": SHAPINGS} if name == "ppo-abc" else {}
        method.stage(method.config(out=str(folders[name]), **start, **method.settings, **shown))
    say(f"{count}/{count}  evaluation on held-out prompts, and the report")
    for name in ("sft", *METHODS):
        evaluate.main(
            evaluate.EvaluateConfig(
                run=str(folders[name]),
                ref=str(folders["sft"]),
                rm=str(folders["rm"]),
                samples=config.eval_samples,
                **{**task, "overwrite": True},
            )
        )
    page = report.main(
        report.ReportConfig(runs=tuple(map(str, folders.values())), out=str(out / "report"), overwrite=config.overwrite)
    )
    show_table(folders)
    print(f"\n{time.monotonic() - started:.0f} s in all. The report: {page}")
    return page


def say(text: str) -> None:
    print(f"\n{text}", file=sys.stderr, flush=True)


def gain_in_errors(result: dict[str, Any], baseline: dict[str, Any], judge: str) -> float:
    """(mean − the baseline's mean) / the standard error of the difference."""
    error = math.hypot(result[judge]["sem"], baseline[judge]["sem"])
    difference = result[judge]["mean"] - baseline[judge]["mean"]
    return difference / error if error > 0 else math.copysign(math.inf, difference) if difference else 0.0


def show_table(folders: dict[str, Path]) -> None:
    """The closing table: every method against SFT on the same held-out prompts."""
    from rich.console import Console
    from rich.table import Table

    results = {name: json.loads((folders[name] / "evaluation.json").read_text()) for name in ("sft", *METHODS)}
    info = {name: json.loads((folder / "run.json").read_text()) for name, folder in folders.items()}
    judge = "gold" if "gold" in results["sft"] else "proxy"
    console = Console()
    if not console.is_terminal:  # a log file has no width; 80 columns would break every cell
        console = Console(width=132)
    accuracy = info["rm"]["summary"]["pair_accuracy"]
    console.print(f"\nReward model: {accuracy:.1%} of held-out pairs ordered as the annotator did.")
    table = Table(title=f"{results['sft']['n']} held-out responses a method, mean ± standard error")
    table.add_column("method")
    for column in (
        "proxy reward",
        "gold reward",
        f"{judge} gain / s.e.",
        "KL to SFT",
        "tokens",
        "EOS",
        "distinct-2",
        "s",
    ):
        table.add_column(column, justify="right")
    for name in ("sft", *METHODS):
        result = results[name]
        gain = "" if name == "sft" else f"{gain_in_errors(result, results['sft'], judge):+.1f}"
        rewards = [
            f"{result[j]['mean']:.3f} ± {result[j]['sem']:.3f}" if j in result else "–" for j in ("proxy", "gold")
        ]
        table.add_row(
            "SFT" if name == "sft" else METHODS[name].title,
            *rewards,
            gain,
            f"{result['kl']['mean']:.2f}",
            f"{result['length']:.1f}",
            f"{result['eos_rate']:.0%}",
            f"{result['distinct_2']:.2f}",
            f"{info[name]['seconds']:.0f}",
        )
    for row in info["best-of-n"]["summary"]["best_of_n"][1:]:
        rewards = [f"{row[j]['mean']:.3f} ± {row[j]['sem']:.3f}" if j in row else "–" for j in ("proxy", "gold")]
        table.add_row(f"best of {row['n']} samples", *rewards, "", f"≤ {row['kl_bound']:.2f}", "", "", "", "")
    console.print(table)

"""The whole pipeline on one task: SFT, reward model, best-of-n, RRHF, PPO with sparse and dense rewards, report."""

from __future__ import annotations

import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import best_of_n, evaluate, ppo, report, rm, rrhf, sft
from .config import check_options, option

METHODS = {
    "sft": "SFT",
    "best-of-n": "SFT on best of n",
    "rrhf": "RRHF",
    "ppo-terminal": "PPO terminal score",
    "ppo-abc": "PPO attention credit",
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
    folders = {name: out / name for name in ("sft", "rm", *list(METHODS)[1:])}
    taken = [str(folder) for folder in folders.values() if folder.exists()]
    if taken and not config.overwrite:
        raise FileExistsError(f"{', '.join(taken)} are there; --overwrite replaces them")
    common: dict[str, Any] = {"seed": config.seed, "device": config.device, "overwrite": config.overwrite}
    task: dict[str, Any] = {**common, "data": config.data}
    start: dict[str, Any] = {**task, "init": str(folders["sft"]), "rm": str(folders["rm"])}

    say("1/7  supervised fine-tuning of a tiny Llama from scratch")
    sft.main(sft.SftConfig(out=str(folders["sft"]), **task))
    say("2/7  reward model on ranked responses")
    settings = {} if config.data == "reviews" else SMALL_DATA
    rm.main(rm.RmConfig(out=str(folders["rm"]), init=str(folders["sft"]), **task, **settings))
    say("3/7  best of n, and supervised training on the best")
    best_of_n.main(best_of_n.BestOfNConfig(out=str(folders["best-of-n"]), **start))
    say("4/7  RRHF")
    rrhf.main(rrhf.RrhfConfig(out=str(folders["rrhf"]), **start))
    for number, shaping in ((5, "terminal"), (6, "abc")):
        say(f"{number}/7  {METHODS[f'ppo-{shaping}']}")
        shown = SHAPINGS if shaping == "abc" else ()
        target = str(folders[f"ppo-{shaping}"])
        ppo.main(ppo.PpoConfig(out=target, reward_shaping=shaping, compare_shapings=shown, **start))
    say("7/7  evaluation on held-out prompts, and the report")
    for name in METHODS:
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

    results = {name: json.loads((folders[name] / "evaluation.json").read_text()) for name in METHODS}
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
    for name, title in METHODS.items():
        result = results[name]
        gain = "" if name == "sft" else f"{gain_in_errors(result, results['sft'], judge):+.1f}"
        rewards = [
            f"{result[j]['mean']:.3f} ± {result[j]['sem']:.3f}" if j in result else "–" for j in ("proxy", "gold")
        ]
        table.add_row(
            title,
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

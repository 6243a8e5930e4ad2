"""What an experiment is, and how one of its runs is made and measured."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import os
import resource
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from rlhf import evaluate
from rlhf.data import collate, encode_text, load_task
from rlhf.env import cpu_name
from rlhf.evaluate import eval_prompts
from rlhf.files import read_lines, write_atomically
from rlhf.model import load_policy, load_reward_model, response_logprobs, scores
from rlhf.report_runs import read_json
from rlhf.rollout import generate

CONFIGS = {"rm": "RmConfig", "sft": "SftConfig", "ppo": "PpoConfig", "rrhf": "RrhfConfig", "dpo": "DpoConfig"}
CONFIGS |= {"best_of_n": "BestOfNConfig", "rft": "RftConfig", "online": "OnlineConfig"}
SERIES = ("objective/scores", "eval/proxy", "eval/gold", "eval/kl", "eval/length")
EVAL_SAMPLES = 256  # responses in the final evaluation of a run
BEST_OF_PROMPTS = 64


@dataclass(frozen=True)
class Task:
    """Where the prompts, the labels and the gold judge come from, and what its start models need."""

    name: str  # as it is asked for: "reviews-16"
    data: str  # --data of the stages
    sft: Mapping[str, Any] = field(default_factory=dict)
    rm: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """One way to train.

    stage: a module of rlhf with a `main`. changes: of its configuration's defaults; "{rankings}" in one is the file of
    what the reward model was trained on. rankings: how many that were, all of the task's unless given. data: (seed,
    folder) → --data, for an arm that has data of its own.
    """

    name: str
    stage: str
    changes: Mapping[str, Any]
    rankings: int | None = None
    data: Callable[[int, Path], Path] | None = None


@dataclass(frozen=True)
class Experiment:
    """arms: of a task. report: (title, Markdown, figures) from the finished runs, in the page's order. answer: of the
    same runs, in a sentence or two."""

    name: str
    question: str
    tasks: tuple[str, ...]
    arms: Callable[[Task], list[Arm]]
    report: Callable[[list[dict[str, Any]]], Iterable[tuple[str, str, dict[str, Any]]]]
    answer: Callable[[list[dict[str, Any]]], str]


def task(name: str) -> Task:
    """`reviews-<tokens>`, the generated task; or `rt-polarity`, the sentences in the folder $RLHF_DATA has it in."""
    if name.startswith("reviews"):
        return Task(name, name)
    folder = Path(os.environ.get("RLHF_DATA") or Path(__file__).parents[3] / "shared" / "data") / name
    if not folder.is_dir():
        raise FileNotFoundError(f"task {name} needs the folder {folder}; RLHF_DATA names the folder it is in")
    return Task(name, str(folder), rm={"epochs": 4, "token_dropout": 0.4, "batch_size": 8})


def prepare(task: Task, folder: Path, rankings: int | None = None) -> tuple[Path, Path]:
    """(supervised model, reward model) of a task, trained once; every arm and seed starts from them."""
    sft, rm = folder / task.name / "sft", folder / task.name / f"rm-{rankings or 'all'}"
    data = task.data
    if not (sft / "model").exists():
        shutil.rmtree(sft, ignore_errors=True)
        _run_stage("sft", {"out": str(sft), "data": data, "seed": 0, **task.sft})
    if not (rm / "model").exists():
        shutil.rmtree(rm, ignore_errors=True)
        if rankings is not None:
            data = str(write_rankings(rankings_file(sft, rankings), task, rankings))
        _run_stage("rm", {"out": str(rm), "data": data, "seed": 0, "init": str(sft), **task.rm})
    return sft, rm


def rankings_file(sft: Path, count: int | None) -> Path:
    return sft.parent / f"rankings-{count}.jsonl"


def write_rankings(file: Path, task: Task, count: int) -> Path:
    """The first rankings of the task as a file of rows."""
    rows = [
        {"prompt": each.prompt, "responses": each.responses, "scores": each.scores}
        for each in load_task(task.data, 0).rankings[:count]
    ]
    write_atomically(file, "".join(json.dumps(row) + "\n" for row in rows))
    return file


def measured_run(arm: Arm, seed: int, task: Task, start: tuple[Path, Path], folder: Path) -> dict[str, Any]:
    """Train one arm with one seed; its curves and a final evaluation on held-out prompts. The run folder goes again."""
    sft, rm = start
    rankings = rankings_file(sft, arm.rankings)
    out = folder / f"{task.name}-{arm.name}-{seed}".replace("/", "-").replace(" ", "-")
    shutil.rmtree(out, ignore_errors=True)
    data = str(arm.data(seed, folder)) if arm.data else task.data
    changes = {
        key: value.format(rankings=rankings) if isinstance(value, str) else value for key, value in arm.changes.items()
    }
    begin = time.monotonic()
    settings = {"init": str(sft), "rm": str(rm), "data": data, "seed": seed, "out": str(out), **changes}
    if arm.stage == "rm":
        del settings["rm"]
    _run_stage(arm.stage, settings)
    seconds = time.monotonic() - begin
    lines = read_lines(out / "metrics.jsonl")
    series = {
        name: [[line["step"], _short(line[name])] for line in lines if line.get(name) is not None] for name in SERIES
    }
    record = {
        "task": task.name,
        "arm": arm.name,
        "seed": seed,
        "machine": f"{cpu_name()}, torch {torch.__version__}",
        "seconds": round(seconds, 1),
        "phases": {
            name.removeprefix("time/"): round(sum(line.get(name) or 0.0 for line in lines), 2)
            for name in sorted({name for line in lines for name in line if name.startswith("time/")})
        },
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "series": {name: points for name, points in series.items() if points},
        "final": (final_reward_model if arm.stage == "rm" else final)(out, seed, task, start),
    }
    shutil.rmtree(out)
    return record


def final(run: Path, seed: int, task: Task, start: tuple[Path, Path]) -> dict[str, float]:
    """Proxy, gold, KL, length, EOS rate, distinct-2 and the perplexity of responses to the run's held-out prompts."""
    settings = {"ref": str(start[0]), "rm": str(start[1]), "data": task.data, "seed": seed, "samples": EVAL_SAMPLES}
    evaluation = evaluate.main(evaluate.EvaluateConfig(run=str(run), out=str(run / "final.json"), **settings))
    result = read_json(evaluation)
    means = {name: _short(result[name]["mean"]) for name in ("proxy", "gold", "kl") if name in result}
    means |= {name: _short(result[name]) for name in ("length", "eos_rate", "distinct_2")}
    loaded = load_task(task.data, 0)
    policy, tokenizer = load_policy(str(run))
    ref, _ = load_policy(str(start[0]))
    torch.manual_seed(seed)
    prompts = eval_prompts(loaded.eval_prompts, EVAL_SAMPLES)
    rollout = generate(policy, tokenizer, prompts, response_length=loaded.response_length)
    with torch.no_grad():
        logprobs = response_logprobs(ref, rollout.batch)
    return means | {"perplexity": _short(math.exp(-logprobs.sum() / rollout.batch.mask.sum()))}


def final_reward_model(run: Path, seed: int, task: Task, start: tuple[Path, Path]) -> dict[str, float]:
    """Of a reward model, on held-out texts: pairs in gold's order, Pearson's r with gold, gold of its best of 16."""
    loaded = load_task(task.data, 0)
    assert loaded.gold is not None
    model, tokenizer = load_reward_model(str(run))

    def scored(prompts: list[str], responses: list[str]) -> torch.Tensor:
        texts = [encode_text(tokenizer, prompt, response) for prompt, response in zip(prompts, responses)]
        batch = collate(texts, [[]] * len(texts), tokenizer.pad_token_id)
        with torch.no_grad():
            return scores(model, batch.tokens, batch.attention_mask, micro_batch=256)

    pairs = [(each.prompt, response) for each in loaded.heldout_rankings for response in each.responses]
    prompts, responses = map(list, zip(*pairs))
    ours, gold = scored(prompts, responses), torch.tensor(loaded.gold(prompts, responses))
    right = total = place = 0
    for each in loaded.heldout_rankings:
        for i, j in itertools.combinations(range(place, place + len(each.responses)), 2):
            if gold[i] != gold[j]:
                right += int((ours[i] > ours[j]) == (gold[i] > gold[j]))
                total += 1
        place += len(each.responses)
    policy, policy_tokenizer = load_policy(str(start[0]))
    torch.manual_seed(seed)
    asked = [prompt for prompt in eval_prompts(loaded.eval_prompts, BEST_OF_PROMPTS) for _ in range(16)]
    rollout = generate(policy, policy_tokenizer, asked, response_length=loaded.response_length)
    best = scored(rollout.prompts, rollout.responses).view(-1, 16).argmax(1, keepdim=True)
    found = torch.tensor(loaded.gold(rollout.prompts, rollout.responses)).view(-1, 16)
    return {
        "accuracy": _short(right / total),
        "correlation": _short(torch.corrcoef(torch.stack([ours, gold]))[0, 1].item()),
        "best_of_16": _short(found.gather(1, best).mean().item()),
    }


def configure(stage: str, settings: Mapping[str, Any]) -> Any:
    """The configuration of a stage; refuses settings that are none of its flags."""
    return getattr(importlib.import_module(f"rlhf.{stage}"), CONFIGS[stage])(**settings)


def _run_stage(stage: str, settings: Mapping[str, Any]) -> None:
    importlib.import_module(f"rlhf.{stage}").main(configure(stage, settings))


def _short(value: float) -> float:
    return float(f"{float(value):.5g}")

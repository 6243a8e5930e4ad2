"""What a policy is worth: proxy reward, gold reward, distance from the start model, length, diversity, win rate."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import (
    DATA,
    GOLD,
    REWARD_FN,
    RM_CHAT_TEMPLATE,
    TRUST_REMOTE_CODE,
    DataConfig,
    UserError,
    check_options,
    check_scorer,
    option,
)
from .data import Gold, Task, task_of
from .files import plain, write_atomically
from .gold_model import with_gold
from .model import load_policy, load_reference, load_reward_model, loading_options, response_logits
from .rollout import Rollout, generate
from .run import Run
from .scorer import Scorer, scorer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DESCRIBED = ("length", "eos_rate", "entropy", "distinct_1", "distinct_2")
"""What a measurement says of a sample as a whole, without an error."""


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(DataConfig):
    run: str = option(MISSING, "run folder (or model) to evaluate")
    ref: str | None = option(None, "start model for the KL; the run's own --init unless given")
    rm: str | None = option(None, "reward model for the proxy reward; the run's own --rm unless given")
    reward_fn: str | None = option(None, REWARD_FN)
    rm_chat_template: bool = option(False, RM_CHAT_TEMPLATE)
    data: str = option("reviews", DATA + "the held-out prompts and the gold judge")
    gold: str | None = option(None, GOLD)
    against: str | None = option(None, "another run folder (or model): print the win rate over it")
    out: str | None = option(None, "file to write; <run>/evaluation.json unless given")
    samples: int = option(256, "responses to sample, one a held-out prompt; prompts repeat if there are fewer", low=1)
    response_length: int | None = option(None, "tokens a response may have; the task's own unless given", low=1)
    temperature: float = option(1.0, "sampling temperature", above=0)
    micro_batch: int | None = option(None, "rows through a model at a time; all unless given", low=1)
    seed: int = option(0, "seed of the sampling", low=0)
    device: str = option("auto", "cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    dtype: str = option("float32", "dtype of the models' weights", choices=("float32", "bfloat16"))
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    overwrite: bool = option(False, "replace the file if it is there")

    def __post_init__(self) -> None:
        check_options(self)
        check_scorer(self, needed=False)


@dataclass
class Judges:
    """What responses are measured with. A judge that is None is left out of the measurement."""

    ref: PreTrainedModel | None
    scorer: Scorer | None
    gold: Gold | None


def measure(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    judges: Judges,
    prompts: list[str],
    *,
    response_length: int,
    temperature: float,
    seed: int,
    micro_batch: int | None = None,
) -> dict[str, Any]:
    """Sample one response a prompt with a fixed seed and measure them; torch's own random stream is left as it was.

    Returns the content of evaluation.json: {"proxy", "gold", "kl": {"mean", "sem"}}, "length" (tokens, EOS included),
    "eos_rate", "distinct_1", "distinct_2", "n" and "samples"; with a reference also "entropy", nats a token. The KL is
    the exact per-token KL(policy ‖ ref), summed over each response, in nats.
    """
    devices = [policy.device] if policy.device.type == "cuda" else []
    with torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        rollout = generate(
            policy,
            tokenizer,
            prompts,
            response_length=response_length,
            temperature=temperature,
            micro_batch=micro_batch,
        )
        result = describe(rollout)
        per_sample: dict[str, list[float]] = {}
        if judges.scorer is not None:
            per_sample["proxy"] = judges.scorer(rollout).scores.tolist()
        if judges.gold is not None:
            per_sample["gold"] = judges.gold(rollout.prompts, rollout.responses)
        if judges.ref is not None:
            kl, entropy = distance(policy, judges.ref, rollout, temperature, micro_batch)
            per_sample["kl"] = kl.sum(1).tolist()
            result["entropy"] = rk.masked_mean(entropy, rollout.batch.mask).item()
    result |= {name: mean_and_sem(values) for name, values in per_sample.items()}
    result["samples"] = [
        {"prompt": prompt, "response": response, **{name: values[i] for name, values in per_sample.items()}}
        for i, (prompt, response) in enumerate(zip(rollout.prompts, rollout.responses))
    ]
    return result


@dataclass
class Evaluator:
    """`measure` on the same held-out prompts with the same seed, however often a training run asks for it."""

    judges: Judges
    prompts: list[str]
    response_length: int
    temperature: float
    seed: int
    micro_batch: int | None

    @classmethod
    def of(cls, config: Any, task: Task, judges: Judges) -> Evaluator:
        """From a training stage's config, which has eval_samples and the sampling flags."""
        return cls(
            judges=judges,
            prompts=eval_prompts(task.eval_prompts, config.eval_samples),
            response_length=config.response_length or task.response_length,
            temperature=config.temperature,
            seed=config.seed,
            micro_batch=config.micro_batch,
        )

    def metrics(self, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, run: Run) -> dict[str, float]:
        """eval/proxy, eval/gold, eval/kl … of the policy as it is; the seconds go to time/evaluate."""
        with run.timer("evaluate"):
            result = measure(
                policy,
                tokenizer,
                self.judges,
                self.prompts,
                response_length=self.response_length,
                temperature=self.temperature,
                seed=self.seed,
                micro_batch=self.micro_batch,
            )
        return eval_metrics(result)


def describe(rollout: Rollout) -> dict[str, Any]:
    """Length, EOS rate and diversity of a rollout."""
    return {
        "n": len(rollout.prompts),
        "length": rollout.batch.mask.sum(1).float().mean().item(),
        "eos_rate": rollout.terminated.float().mean().item(),
        "distinct_1": distinct(rollout.batch.responses, rollout.batch.mask, 1),
        "distinct_2": distinct(rollout.batch.responses, rollout.batch.mask, 2),
    }


def distinct(responses: Tensor, mask: Tensor, n: int) -> float:
    """distinct-n (Li et al. 2016, arXiv 1510.03055): different n-grams over all n-grams of the responses, in tokens."""
    grams: list[tuple[int, ...]] = []
    for row, count in zip(responses.tolist(), mask.sum(1).tolist()):
        grams += [tuple(row[i : i + n]) for i in range(count - n + 1)]
    return len(set(grams)) / max(len(grams), 1)


def distance(
    policy: PreTrainedModel, ref: PreTrainedModel, rollout: Rollout, temperature: float, micro_batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """(KL(policy ‖ ref), entropy of the policy), both [B, T]: of each next token, exact over the vocabulary, nats."""
    parts = []
    for part in rollout.batch.split(micro_batch):
        _, _, entropy, kl = rk.policy_ref_logprobs(
            response_logits(policy, part),
            response_logits(ref, part),
            part.responses,
            part.mask,
            temperature=temperature,
        )
        parts.append(torch.stack([kl, entropy]))
    kl, entropy = torch.cat(parts, 1)
    return kl, entropy


def mean_and_sem(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard error of the mean; NaN, of a response that could not be scored, is left out."""
    values = [value for value in values if not math.isnan(value)]
    n = len(values)
    if not n:
        return {"mean": math.nan, "sem": math.nan}
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(n - 1, 1)
    return {"mean": mean, "sem": math.sqrt(variance / n)}


def eval_metrics(result: dict[str, Any]) -> dict[str, float]:
    """A measurement as one step's metrics: eval/gold, eval/gold_sem, eval/kl …"""
    metrics = {}
    for name in ("proxy", "gold", "kl"):
        if name in result:
            metrics[f"eval/{name}"] = result[name]["mean"]
            metrics[f"eval/{name}_sem"] = result[name]["sem"]
    return metrics | {f"eval/{name}": result[name] for name in DESCRIBED if name in result}


def win_rate(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], judge: str) -> dict[str, float]:
    """Share of prompts on which our response scores higher; a tie counts half, a missing score (NaN) not at all.

    Both lists are of the same prompts.
    """
    outcomes = []
    for a, b in zip(ours, theirs):
        if a["prompt"] != b["prompt"]:
            raise ValueError(f"win_rate: samples must be of the same prompts, got {a['prompt']!r} and {b['prompt']!r}")
        missing = math.isnan(a[judge]) or math.isnan(b[judge])
        outcomes.append(math.nan if missing else 0.5 + 0.5 * ((a[judge] > b[judge]) - (a[judge] < b[judge])))
    return mean_and_sem(outcomes)


def eval_prompts(prompts: list[str], count: int) -> list[str]:
    """The first `count` held-out prompts, from the start again where there are fewer."""
    if not prompts:
        raise UserError("the data has no held-out prompts to evaluate on")
    return [prompts[i % len(prompts)] for i in range(count)]


def main(config: EvaluateConfig) -> Path:
    """Evaluate a run's model and write evaluation.json; returns the file."""
    folder = Path(config.run)
    if config.out is None and not (folder / "run.json").exists():
        raise UserError(f"{config.run} is not a run folder: say with --out where the evaluation goes")
    target = Path(config.out) if config.out else folder / "evaluation.json"
    if target.exists() and not config.overwrite:
        raise FileExistsError(f"{target} is there; --overwrite replaces it")
    own = json.loads((folder / "run.json").read_text())["config"] if (folder / "run.json").exists() else {}
    where = loading_options(config)
    task = with_gold(task_of(config, config.run), config)
    policy, tokenizer = load_policy(config.run, **where)
    ref = config.ref or own.get("init")
    if config.rm is None and config.reward_fn is None:
        config = replace(config, rm=own.get("rm"), rm_chat_template=own.get("rm_chat_template", False))
        if own.get("reward_fn"):  # run.json may be anybody's: no file that it names is run
            print(f"no proxy reward: --reward-fn {own['reward_fn']} gives the one that the run had", file=sys.stderr)
    reward_model = load_reward_model(config.rm, **where) if config.rm else None
    judges = Judges(
        ref=None if ref is None else load_reference(ref, tokenizer, **where),
        scorer=scorer_of(config, reward_model, tokenizer, task),
        gold=task.gold,
    )
    prompts = eval_prompts(task.eval_prompts, config.samples)
    settings: dict[str, Any] = {
        "response_length": config.response_length or task.response_length,
        "temperature": config.temperature,
        "seed": config.seed,
        "micro_batch": config.micro_batch,
    }
    result = measure(policy, tokenizer, judges, prompts, **settings)
    if config.against:
        other, other_tokenizer = load_policy(config.against, **where)
        judges.scorer = scorer_of(config, reward_model, other_tokenizer, task)
        theirs = measure(other, other_tokenizer, judges, prompts, **settings)
        judges_there = [name for name in ("gold", "proxy") if name in result]
        result["against"] = {
            "run": config.against,
            **{name: win_rate(result["samples"], theirs["samples"], name) for name in judges_there},
        }
    write_atomically(target, json.dumps(plain(result), indent=1) + "\n")
    print_result(config.run, result)
    return target


def print_result(name: str, result: dict[str, Any]) -> None:
    print(f"{name}: {result['n']} responses")
    for key in ("proxy", "gold", "kl"):
        if key in result:
            print(f"  {key:10} {result[key]['mean']:8.3f} ± {result[key]['sem']:.3f}")
    for key in DESCRIBED:
        if key in result:
            print(f"  {key:10} {result[key]:8.3f}")
    against = result.get("against", {})
    for key in ("gold", "proxy"):
        if key in against:
            print(f"  wins over {against['run']} by {key}: {against[key]['mean']:.1%} ± {against[key]['sem']:.1%}")

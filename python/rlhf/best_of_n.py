"""Best-of-n: the highest-scored of n samples, as an answer by itself and as data to train on.

The second is pseudo-labelling: supervised training on the best response to each prompt (rejection-sampling
fine-tuning), the baseline that answers whether reinforcement learning is worth its trouble. The first trains nothing.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .candidates import Candidates, draw_candidates, own_source
from .config import CommonConfig, SampledConfig, UserError, check_scorer, option
from .data import Task, collate, epoch_order, task_of
from .evaluate import Evaluator, Judges, eval_prompts, mean_and_sem
from .files import write_atomically
from .gold_model import with_gold
from .guard import Guard, Values
from .model import load_policy, load_reference, load_reward_model, loading_options
from .run import Run, seed_everything
from .schedule import schedule, set_learning_rate
from .scorer import Scorer, scorer_of
from .sft import train_step

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class BestOfNConfig(SampledConfig, CommonConfig):
    init: str = option(MISSING, "policy that samples and is then trained: run folder, model folder or hub name")
    n: int = option(4, "responses sampled for each prompt, of which the best is kept", low=2)
    num_prompts: int = option(768, "prompts sampled for; they repeat if there are fewer", low=1)
    epochs: int = option(2, "passes over the kept responses", low=1)
    batch_size: int = option(64, "responses in an optimiser step", low=1)
    micro_batch: int | None = option(None, "rows through a model when sampling and scoring; all unless given", low=1)
    temperature: float = option(1.0, "sampling temperature; the same one scores the tokens", above=0)
    learning_rate: float = option(
        1e-3, "peak learning rate, falling linearly to 0; pretrained models want about 1e-5", above=0
    )
    max_grad_norm: float = option(1.0, "gradient norm at which the gradient is clipped", above=0)
    eval_every: int = option(
        6, "steps between evaluations on held-out prompts; 0 for only the first and the last", low=0
    )
    eval_samples: int = option(128, "responses in an evaluation; also those of the best-of-n estimate", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorer(self)


# -------------------------------------------------------------------------------------------------------- estimates


def expected_best(proxy: Sequence[float], value: Sequence[float], n: int) -> float:
    """Unbiased estimate, from N ≥ n samples, of the mean value of the sample that has the highest proxy of n.

        E_n = Σ_i w_i · value of the i-th sample by ascending proxy,   w_i = C(i − 1, n − 1) / C(N, n)
        w_N = n / N,   w_i = w_{i+1} · (i + 1 − n) / i                which needs no binomial, however large N is

    Source: the estimator of Nakano et al. 2021 (arXiv 2112.09332), appendix I.
    """
    if not 1 <= n <= len(proxy):
        raise ValueError(f"expected_best: n must lie between 1 and the {len(proxy)} samples, got {n}")
    # A tie goes to the first sample, as best-of-n takes it: among equals the first stands highest.
    order = sorted(range(len(proxy)), key=lambda i: (proxy[i], -i))
    total, weight = 0.0, n / len(proxy)
    for place in range(len(proxy), n - 1, -1):
        total += weight * value[order[place - 1]]
        weight *= (place - n) / max(place - 1, 1)
    return total


def kl_bound(n: int) -> float:
    """log n − (n − 1)/n nats: an upper bound of KL(best-of-n ‖ policy), exact where no two scores are equal."""
    return math.log(n) - (n - 1) / n


def estimate(groups: list[Candidates], gold: list[list[float]] | None, largest: int) -> list[dict[str, Any]]:
    """Proxy and gold reward of best-of-n for n = 1, 2, 4 … `largest`, each with its standard error over prompts.

    A prompt of which fewer than n responses could be scored is left out.
    """
    rows = []
    sizes = [2**power for power in range(largest.bit_length()) if 2**power <= largest]
    for n in sizes:
        row: dict[str, Any] = {"n": n, "kl_bound": kl_bound(n)}
        enough = [i for i, group in enumerate(groups) if len(group.scores) >= n]
        row["proxy"] = mean_and_sem([expected_best(groups[i].scores, groups[i].scores, n) for i in enough])
        if gold is not None:
            row["gold"] = mean_and_sem([expected_best(groups[i].scores, gold[i], n) for i in enough])
        rows.append(row)
    return rows


# -------------------------------------------------------------------------------------------------------------- main


def main(config: BestOfNConfig) -> Path:
    """Sample, keep the best, train on them; returns the run folder, with the kept responses in selected.jsonl."""
    run = Run.create(config.out, "best-of-n", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = with_gold(task_of(config, config.init), config)
    checkpoint = run.load_checkpoint()
    where = loading_options(config)
    sampler, tokenizer = load_policy(config.init, frozen=True, **where)
    reward_model = load_reward_model(config.rm, frozen=True, **where) if config.rm else None
    scorer = scorer_of(config, reward_model, tokenizer, task)
    assert scorer is not None  # the config refuses a run without one
    ref = load_reference(config.ref, tokenizer, **where) if config.ref else sampler
    policy, _ = load_policy(str(checkpoint.folder / "model") if checkpoint else config.init, lora=config.lora, **where)
    evaluator = Evaluator.of(config, task, Judges(ref, scorer, task.gold))

    found = Values()
    if checkpoint is None:
        with run.timer("generate"):
            groups = sample(config, task, sampler, tokenizer, scorer, training_prompts(config, task))
        with run.timer("evaluate"):
            found["inference"] = estimate_on_heldout(config, task, sampler, tokenizer, scorer)
        found["groups"] = [asdict(group) for group in groups]

    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    per_epoch = math.ceil(config.num_prompts / config.batch_size)
    total = config.epochs * per_epoch
    with Guard(
        run,
        config,
        total,
        models={"model": (policy, tokenizer)},
        parts={"optimizer": optimizer, "found": found},
        constants={"data": task, "tokenizer": tokenizer, "reference": ref, "scorer": scorer},
        checkpoint=checkpoint,
    ) as guard:
        groups = [Candidates(**group) for group in found["groups"]]
        write_selected(run, groups)
        if guard.step == 0:
            run.log(0, evaluator.metrics(policy, tokenizer, run))
        for step in guard.steps("best-of-n"):
            epoch, position = divmod(step - 1, per_epoch)
            order = epoch_order(len(groups), config.seed, epoch)
            chosen = [groups[i] for i in order[position * config.batch_size : (position + 1) * config.batch_size]]
            batch = collate(
                [group.prompt_tokens for group in chosen],
                [group.responses[group.best] for group in chosen],
                tokenizer.pad_token_id,
            ).to(policy.device)
            learning_rate = config.learning_rate * schedule(step - 1, total, warmup=0.0, kind="linear")
            set_learning_rate(optimizer, learning_rate)
            metrics = {
                "lr": learning_rate,
                "objective/scores": sum(max(group.scores) for group in chosen) / len(chosen),
            }
            with guard.attempt(batch=batch), run.timer("train"):
                metrics |= train_step(policy, optimizer, batch, config)
            if step == total or (config.eval_every and step % config.eval_every == 0):
                metrics |= evaluator.metrics(policy, tokenizer, run)
            guard.log(metrics, "loss")
    run.save_model(policy, tokenizer)
    return run.finish({"steps": total, "best_of_n": found["inference"]})


def write_selected(run: Run, groups: list[Candidates]) -> None:
    """selected.jsonl: the best response to each prompt."""
    rows = [
        {"prompt": group.prompt, "response": group.texts[group.best], "score": max(group.scores)} for group in groups
    ]
    write_atomically(run.folder / "selected.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def training_prompts(config: BestOfNConfig, task: Task) -> list[str]:
    if not task.prompts:
        raise UserError(f"{config.data}: the data has no prompts to sample from")
    order = epoch_order(len(task.prompts), config.seed, 0)
    return [task.prompts[order[i % len(order)]] for i in range(config.num_prompts)]


def sample(
    config: BestOfNConfig,
    task: Task,
    sampler: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    prompts: list[str],
    count: int | None = None,
) -> list[Candidates]:
    source = own_source(
        sampler,
        tokenizer,
        "sample",
        count=count or config.n,
        response_length=config.response_length or task.response_length,
        temperature=config.temperature,
        micro_batch=config.micro_batch,
    )
    return draw_candidates([source], tokenizer, scorer, prompts)


def estimate_on_heldout(
    config: BestOfNConfig,
    task: Task,
    sampler: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
) -> list[dict[str, Any]]:
    """What picking the best of n would give on held-out prompts, without any training; 2n samples a prompt."""
    count = 2 * config.n
    prompts = eval_prompts(task.eval_prompts, max(config.eval_samples // count, 1))
    groups = sample(config, task, sampler, tokenizer, scorer, prompts, count)
    gold = None
    if task.gold is not None:
        gold = [task.gold([group.prompt] * len(group.texts), group.texts) for group in groups]
    return estimate(groups, gold, config.n)

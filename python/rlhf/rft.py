"""Rejection-sampling fine-tuning: sample, keep what the reward model scores high, train on it, and again.

A round samples from the policy as it is (a growth step) and trains on what is kept (improvement steps). One round with
the best of each prompt is best-of-n distillation, several rounds are expert iteration; `select weighted` keeps
everything and weighs it by its score (reward-weighted regression).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from .candidates import Candidates, draw_candidates, mean_score, own_source
from .config import CommonConfig, SampledConfig, UserError, check_scorer, option
from .data import Batch, collate, epoch_order, task_of
from .evaluate import Evaluator, Judges
from .gold_model import with_gold
from .guard import Guard, Values, check_finite
from .model import load_policy, load_reference, load_reward_model, loading_options
from .overoptimization import STOP_ON_GOLD, overoptimization, watch_gold
from .rollout import check_prompts
from .run import Run, seed_everything
from .schedule import schedule, set_learning_rate
from .scorer import scorer_of
from .sft import train_step

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUANTILE_EDGE = 1e-3
"""How far thresholds stay inside the lowest and the highest of a round, so that equal scores are neither all kept nor
all lost."""


@dataclass(frozen=True, kw_only=True)
class RftConfig(SampledConfig, CommonConfig):
    rounds: int = option(3, "times that responses are sampled anew from the policy", low=1)
    num_prompts: int = option(256, "prompts sampled for in each round; they repeat if there are fewer", low=1)
    num_candidates: int = option(8, "responses sampled for each prompt", low=2)
    accumulate: bool = option(True, "keep the samples of earlier rounds, of which later thresholds choose too")
    select: str = option(
        "top_k",
        "what is trained on: the top_k of each prompt; those above a quantile of their prompt; or all, weighted",
        choices=("top_k", "quantile", "weighted"),
    )
    top_k: int = option(1, "select top_k: responses kept of each prompt", low=1)
    quantile_start: float = option(0.7, "select quantile: the first threshold after sampling", low=0, high=1)
    quantile_end: float = option(0.95, "select quantile: what the thresholds of a round rise towards", low=0, high=1)
    tau: float = option(1.0, "select weighted: a response weighs softmax(score / tau) within its prompt", above=0)
    improve_steps: int = option(2, "passes over what is kept between two samplings; each has its own threshold", low=1)
    loss_on: str = option("response", "tokens that are trained on; all includes the prompt", ("response", "all"))
    batch_size: int = option(64, "responses in an optimiser step", low=1)
    micro_batch: int | None = option(None, "rows through a model at a time; all unless given", low=1)
    temperature: float = option(1.0, "sampling temperature; the loss is the policy's own, at temperature 1", above=0)
    learning_rate: float = option(
        1e-3, "peak learning rate, falling linearly to 0; pretrained models want about 1e-5", above=0
    )
    max_grad_norm: float = option(1.0, "gradient norm at which the gradient is clipped", above=0)
    eval_every: int = option(
        6, "steps between evaluations on held-out prompts; 0 for only the first and the last", low=0
    )
    stop_on_gold: int | None = option(None, STOP_ON_GOLD, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorer(self)
        if self.quantile_start > self.quantile_end:
            raise UserError(
                f"quantile_end must be at least quantile_start {self.quantile_start}, got {self.quantile_end}"
            )


# -------------------------------------------------------------------------------------------------------- selection


@dataclass(frozen=True)
class Kept:
    """A response to train on, as tokens, and how much it weighs."""

    prompt: list[int]
    response: list[int]
    score: float
    weight: float


def merge(pool: Sequence[Candidates], groups: Sequence[Candidates]) -> list[Candidates]:
    """One group a prompt with every different response once, in the order of their coming."""
    by_prompt: dict[str, dict[tuple[int, ...], tuple[Candidates, int]]] = {}
    for group in [*pool, *groups]:
        found = by_prompt.setdefault(group.prompt, {})
        for place, response in enumerate(group.responses):
            found.setdefault(tuple(response), (group, place))
    return [
        Candidates(
            prompt,
            next(iter(found.values()))[0].prompt_tokens,
            [group.responses[i] for group, i in found.values()],
            [group.texts[i] for group, i in found.values()],
            tuple(group.scores[i] for group, i in found.values()),
            tuple(group.sources[i] for group, i in found.values()),
        )
        for prompt, found in by_prompt.items()
    ]


def quantile_at(step: int, config: RftConfig) -> float:
    """The quantile of a round's improvement step, from 0: steps of (end − start) / improve_steps above the start."""
    return config.quantile_start + (config.quantile_end - config.quantile_start) / config.improve_steps * step


def thresholds(groups: Sequence[Candidates], quantile: float) -> list[float]:
    """The quantile of each prompt's scores, kept QUANTILE_EDGE inside the range of all prompts' (as trlx does)."""
    each = [torch.tensor(group.scores, dtype=torch.float64).quantile(quantile).item() for group in groups]
    low, high = min(each) + QUANTILE_EDGE, max(each) - QUANTILE_EDGE
    return [min(max(value, low), high) for value in each]


def select(groups: Sequence[Candidates], config: RftConfig, step: int) -> list[Kept]:
    """What an improvement step trains on. A prompt of which nothing passes its threshold gives nothing."""
    limits = thresholds(groups, quantile_at(step, config)) if config.select == "quantile" else [-math.inf] * len(groups)
    kept = []
    for group, limit in zip(groups, limits):
        order = sorted(range(len(group.scores)), key=lambda i: (-group.scores[i], i))
        weights = [1.0] * len(order)
        if config.select == "top_k":
            order = order[: config.top_k]
        elif config.select == "weighted":
            weights = (torch.tensor(group.scores) / config.tau).softmax(0).tolist()
        kept += [
            Kept(group.prompt_tokens, group.responses[i], group.scores[i], weights[i])
            for i in order
            if group.scores[i] >= limit
        ]
    return kept


def batch_of(kept: Sequence[Kept], tokenizer: PreTrainedTokenizerBase, loss_on: str) -> Batch:
    """loss_on all: the prompt's tokens after its first stand among those that are trained on."""
    border = 1 if loss_on == "all" else None
    prompts = [each.prompt[:border] for each in kept]
    responses = [[*(each.prompt[1:] if border else []), *each.response] for each in kept]
    return collate(prompts, responses, tokenizer.pad_token_id)


# -------------------------------------------------------------------------------------------------------------- main


def main(config: RftConfig) -> Path:
    """Train and return the run folder."""
    run = Run.create(config.out, "rft", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = with_gold(task_of(config, config.init), config)
    if not task.prompts:
        raise UserError(f"{config.data}: the data has no prompts to sample from")
    checkpoint = run.load_checkpoint()
    where = loading_options(config)
    policy, tokenizer = load_policy(
        str(checkpoint.folder / "model") if checkpoint else config.init, lora=config.lora, **where
    )
    ref = load_reference(config.ref or config.init, tokenizer, **where)
    reward_model = load_reward_model(config.rm, frozen=True, **where) if config.rm else None
    scorer = scorer_of(config, reward_model, tokenizer, task)
    assert scorer is not None  # the config refuses a run without one
    check_prompts(policy, tokenizer, task.prompts, config.response_length or task.response_length)
    evaluator = Evaluator.of(config, task, Judges(ref, scorer, task.gold))
    source = own_source(
        policy,
        tokenizer,
        "sample",
        count=config.num_candidates,
        response_length=config.response_length or task.response_length,
        temperature=config.temperature,
        micro_batch=config.micro_batch,
    )
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    passes = config.rounds * config.improve_steps
    # The pass that is under way, its first step and its number of steps, which is known when it begins.
    at = Values(number=-1, first=1, steps=0, scores=0.0, pool=[])
    with Guard(
        run,
        config,
        passes,
        models={"model": (policy, tokenizer)},
        parts={"optimizer": optimizer, "at": at},
        constants={"data": task, "tokenizer": tokenizer, "reference": ref, "scorer": scorer},
        checkpoint=checkpoint,
    ) as guard:
        pool = [Candidates(**each) for each in at["pool"]]
        if guard.step == 0:
            run.log(0, evaluator.metrics(policy, tokenizer, run))
        else:
            kept = select(pool, config, at["number"] % config.improve_steps)
            guard.total = at["first"] - 1 + at["steps"] * (passes - at["number"])
        for step in guard.steps("rft"):
            if step == at["first"] + at["steps"]:
                at |= {"number": at["number"] + 1, "first": step}
                number, improvement = divmod(at["number"], config.improve_steps)
                if improvement == 0:
                    order = epoch_order(len(task.prompts), config.seed, number)
                    prompts = [task.prompts[order[i % len(order)]] for i in range(config.num_prompts)]
                    with run.timer("generate"):
                        groups = draw_candidates([source], tokenizer, scorer, prompts)
                    pool = merge(pool if config.accumulate else [], groups)
                    at |= {"scores": mean_score(groups), "pool": [asdict(each) for each in pool]}
                kept = select(pool, config, improvement)
                if not kept:
                    raise UserError("select quantile: no response passes its threshold; are all scores equal?")
                at["steps"] = math.ceil(len(kept) / config.batch_size)
                guard.total = step - 1 + at["steps"] * (passes - at["number"])
            order, position = epoch_order(len(kept), config.seed, at["number"]), step - at["first"]
            chosen = [kept[i] for i in order[position * config.batch_size : (position + 1) * config.batch_size]]
            done = at["number"] * at["steps"] + position
            learning_rate = config.learning_rate * schedule(done, passes * at["steps"], warmup=0.0, kind="linear")
            set_learning_rate(optimizer, learning_rate)
            weights = torch.tensor([each.weight for each in chosen], device=policy.device)
            batch = batch_of(chosen, tokenizer, config.loss_on).to(policy.device)
            metrics = {
                "lr": learning_rate,
                "objective/scores": at["scores"],
                "selected/scores": sum(each.score for each in chosen) / len(chosen),
                "selected/responses": len(kept),
                "selected/share": len(kept) / sum(len(group.responses) for group in pool),
            }
            with guard.attempt(batch=batch, weights=weights), run.timer("train"):
                check_finite(score=metrics["selected/scores"])
                metrics |= train_step(policy, optimizer, batch, config, weights)
            if step == guard.total or (config.eval_every and step % config.eval_every == 0):
                metrics |= evaluator.metrics(policy, tokenizer, run)
            guard.log(metrics, "loss", "objective/scores")
            if watch_gold(run, policy, tokenizer, config.stop_on_gold):
                guard.total = step
    run.save_model(policy, tokenizer)
    return run.finish({"steps": guard.total, **overoptimization(run.folder)})

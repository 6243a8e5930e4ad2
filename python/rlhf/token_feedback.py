"""Token-level feedback: people mark spans of a response good or bad, and the policy learns the marked tokens.

The feedback is offline: rows of a prompt, the response that was marked, and byte spans of it. There is no reward model
and no value, and nothing is sampled. The bandit loss is bounded and undone by the opposite label.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from .config import CommonConfig, SampledConfig, check_scorer, option
from .data import epoch_order, split, task_of
from .evaluate import Evaluator, Judges
from .feedback_data import Marked, batch_of, read_feedback
from .feedback_loss import LOSSES, LossConfig, feedback_backward
from .gold_model import with_gold
from .guard import Guard, Values, check_finite
from .model import load_policy, load_reference, load_reward_model, loading_options, response_logprobs
from .run import Run, seed_everything
from .schedule import KINDS, schedule, set_learning_rate
from .scorer import scorer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class TokenFeedbackConfig(SampledConfig, CommonConfig):
    feedback: str = option(MISSING, 'file or folder of rows {"prompt", "response", "spans"}')
    ref: str | None = option(None, "reference policy of the anchor; --init unless given")
    rm: str | None = option(None, "reward model that the evaluations report")
    data: str = option("reviews", '"reviews", a folder or a file: held-out prompts and gold judge of the evaluations')
    loss: str = option("bandit", "how marked tokens are learnt; bandit is bounded", choices=LOSSES)
    overlap: float = option(
        0.0, "share of a token's bytes that a span must cover to mark it; 0 for any byte", low=0, high=1
    )
    beta: float = option(0.5, "strength of the anchor to the reference, in units of a span's weight", above=0)
    anchor: bool = option(True, "hold the unmarked tokens of a response to the reference too")
    cliprange: float = option(0.2, "loss ppo: the ratio's bounds are 1 ± cliprange", low=0)
    epochs: int = option(3, "passes over the feedback", low=1)
    max_steps: int | None = option(None, "stop after this many optimiser steps; the epochs decide unless given", low=1)
    batch_size: int = option(32, "responses in an optimiser step", low=1)
    micro_batch: int | None = option(None, "rows through a model at a time; the whole batch unless given", low=1)
    temperature: float = option(1.0, "temperature of the policy, in training and in the evaluations", above=0)
    learning_rate: float = option(2e-4, "peak learning rate; pretrained models want about 3e-6", above=0)
    lr_scheduler: str = option("linear", "how the learning rate falls after the warm-up", choices=KINDS)
    warmup: float = option(0.0, "share of the steps in which the learning rate climbs", low=0, high=1)
    max_grad_norm: float = option(1.0, "gradient norm at which the gradient is clipped", above=0)
    eval_fraction: float = option(0.1, "share of the feedback held out of training, 0 for none", low=0, below=1)
    eval_every: int = option(10, "steps between evaluations; 0 for only the first and the last", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorer(self, needed=False)

    def loss_config(self) -> LossConfig:
        return LossConfig(self.loss, self.beta, self.anchor, self.temperature, self.cliprange, self.micro_batch)


@torch.no_grad()
def logprobs_of(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Marked], config: TokenFeedbackConfig
) -> list[Tensor]:
    """log π of each response's tokens, on the CPU."""
    found: list[Tensor] = []
    for start in range(0, len(rows), config.batch_size):
        batch, _ = batch_of(rows[start : start + config.batch_size], tokenizer)
        logprobs = response_logprobs(
            policy, batch.to(policy.device), config.temperature, micro_batch=config.micro_batch
        ).cpu()
        found += [row[kept].clone() for row, kept in zip(logprobs, batch.mask)]
    return found


@torch.no_grad()
def mean_logprobs(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[Marked], config: TokenFeedbackConfig
) -> dict[str, float]:
    """Means of log π over the good and over the bad tokens of held-out feedback; only what there is."""
    if not rows:
        return {}
    logprobs = torch.cat(logprobs_of(policy, tokenizer, rows, config))
    labels = torch.tensor([label for each in rows for label in each.labels])
    means = {"eval/logprob_good": logprobs[labels > 0], "eval/logprob_bad": logprobs[labels < 0]}
    return {name: values.mean().item() for name, values in means.items() if len(values)}


def main(config: TokenFeedbackConfig) -> Path:
    """Train and return the run folder."""
    run = Run.create(config.out, "token-feedback", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = with_gold(task_of(config, config.init), config)
    checkpoint = run.load_checkpoint()
    where = loading_options(config)
    policy, tokenizer = load_policy(
        str(checkpoint.folder / "model") if checkpoint else config.init, lora=config.lora, **where
    )
    ref = load_reference(config.ref or config.init, tokenizer, **where)
    reward_model = load_reward_model(config.rm, frozen=True, **where) if config.rm else None
    evaluator = Evaluator.of(config, task, Judges(ref, scorer_of(config, reward_model, tokenizer, task), task.gold))
    everything = read_feedback(config.feedback, tokenizer, config.overlap)
    heldout, rows = split(everything, config.seed, config.eval_fraction) if config.eval_fraction else ([], everything)

    def evaluation() -> dict[str, float]:
        return evaluator.metrics(policy, tokenizer, run) | mean_logprobs(policy, tokenizer, heldout, config)

    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    start_of_pass = Values(logprobs=[])  # loss ppo: of each response's tokens
    per_epoch = math.ceil(len(rows) / config.batch_size)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    with Guard(
        run,
        config,
        total,
        models={"model": (policy, tokenizer)},
        parts={"optimizer": optimizer, "start_of_pass": start_of_pass},
        constants={"data": task, "feedback": everything, "tokenizer": tokenizer, "reference": ref},
        checkpoint=checkpoint,
    ) as guard:
        if guard.step == 0:
            run.log(0, evaluation())
        for step in guard.steps("token-feedback"):
            epoch, position = divmod(step - 1, per_epoch)
            if config.loss == "ppo" and position == 0:
                start_of_pass["logprobs"] = logprobs_of(policy, tokenizer, rows, config)
            order = epoch_order(len(rows), config.seed, epoch)
            chosen = order[position * config.batch_size : (position + 1) * config.batch_size]
            batch, labels = batch_of([rows[i] for i in chosen], tokenizer)
            old = [start_of_pass["logprobs"][i] for i in chosen] if start_of_pass["logprobs"] else None
            factor = schedule(step - 1, total, warmup=config.warmup, kind=config.lr_scheduler)
            set_learning_rate(optimizer, config.learning_rate * factor)
            metrics: dict[str, Any] = {"lr": config.learning_rate * factor, "epoch": step / per_epoch}
            with guard.attempt(batch=batch), run.timer("train"):
                optimizer.zero_grad(set_to_none=True)
                metrics |= feedback_backward(
                    policy,
                    ref,
                    batch.to(policy.device),
                    labels.to(policy.device),
                    config.loss_config(),
                    old_logprobs=None if old is None else pad_sequence(old, batch_first=True).to(policy.device),
                )
                norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
                check_finite(gradient=norm)
                optimizer.step()
                metrics["grad_norm"] = norm.item()
            if step == total or (config.eval_every and step % config.eval_every == 0):
                metrics |= evaluation()
            guard.log(metrics, "loss")
    run.save_model(policy, tokenizer)
    return run.finish({"steps": total, "responses": len(rows)})

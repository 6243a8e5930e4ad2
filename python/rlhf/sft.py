"""Supervised fine-tuning: the policy learns to answer as the demonstrations do."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import DATA, CommonConfig, DataConfig, UserError, option
from .data import Batch, Demonstration, Task, collate, encode_prompt, encode_response, epoch_order, split, task_of
from .guard import Guard, check_finite
from .head import head_for, likeliest, logprobs_of, response_states
from .model import check_context, load_policy, loading_options, response_logits
from .run import Run, seed_everything
from .schedule import KINDS, schedule, set_learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class SftConfig(DataConfig, CommonConfig):
    model: str = option("tiny", '"tiny" (a small Llama from scratch), a run or model folder, or a hub name')
    data: str = option("reviews", DATA + "the demonstrations")
    epochs: int = option(5, "passes over the demonstrations", low=1)
    max_steps: int | None = option(None, "stop after this many optimiser steps; the epochs decide unless given", low=1)
    batch_size: int = option(64, "demonstrations in an optimiser step", low=1)
    micro_batch: int | None = option(None, "rows through the model at a time; the whole batch unless given", low=1)
    learning_rate: float = option(2e-3, "peak learning rate; pretrained models want about 1e-5", above=0)
    lr_scheduler: str = option("cosine", "how the learning rate falls after the warm-up", choices=KINDS)
    warmup: float = option(0.05, "share of the steps in which the learning rate climbs", low=0, high=1)
    weight_decay: float = option(0.01, "AdamW's weight decay", low=0)
    max_grad_norm: float = option(1.0, "gradient norm at which the gradient is clipped", above=0)
    max_length: int = option(512, "tokens of a text; a longer one loses the start of its prompt, then its end", low=2)
    eval_fraction: float = option(0.05, "share of the demonstrations held out for evaluation", low=0, below=1)
    eval_every: int = option(50, "steps between evaluations; 0 for only the last", low=0)


class StepConfig(Protocol):
    @property
    def micro_batch(self) -> int | None: ...
    @property
    def max_grad_norm(self) -> float: ...


Example = tuple[list[int], list[int]]
"""Token ids of a prompt and of its response."""


# ------------------------------------------------------------------------------------------------------------- data


def demonstrations(task: Task) -> list[Demonstration]:
    """The task's demonstrations or, where the data has none, the best response of each ranking."""
    ranked = [Demonstration(each.prompt, each.responses[each.scores.index(max(each.scores))]) for each in task.rankings]
    found = task.demonstrations or ranked
    if not found:
        raise UserError(f"{task.name}: supervised fine-tuning needs responses to learn from, got none")
    return found


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Demonstration], max_length: int) -> list[Example]:
    examples = []
    for text in texts:
        response = encode_response(tokenizer, text.response)[: max_length - 1]
        prompt = encode_prompt(tokenizer, text.prompt)[len(response) - max_length :]
        examples.append((prompt, response))
    return examples


def batch_of(examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase) -> Batch:
    return collate([prompt for prompt, _ in examples], [response for _, response in examples], tokenizer.pad_token_id)


# ------------------------------------------------------------------------------------------------------------- step


def train_step(
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    config: StepConfig,
    weights: Tensor | None = None,
) -> dict[str, float]:
    """One optimiser step on −mean log π(response token): the mean over all response tokens of the batch, each weighing
    as its row does in `weights` [B], 1 unless given.

    Raises NonFinite, before the weights change, if the loss or the gradient is not finite.
    """
    tokens = batch.mask.sum()
    weights = torch.ones(len(batch), device=tokens.device) if weights is None else weights
    weight = (batch.mask.sum(1) * weights).sum()
    optimizer.zero_grad(set_to_none=True)
    totals = []
    size = config.micro_batch or max(1, len(batch))
    for part, part_weights in zip(batch.split(size), weights.split(size)):
        loss, right = loss_and_right(model, part, part_weights)
        (loss / weight).backward()
        totals.append(torch.stack([loss.detach() / weight, right / tokens]))
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    loss, right = torch.stack(totals).sum(0).tolist()
    check_finite(loss=loss, gradient=grad_norm)
    optimizer.step()
    return {"loss": loss, "mean_token_accuracy": right, "grad_norm": grad_norm.item(), "num_tokens": tokens.item()}


def loss_and_right(model: PreTrainedModel, batch: Batch, weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """−Σ log π, rows weighted by `weights` [B] if given, and the number of tokens that the model holds for the
    likeliest; both 0-d fp32."""
    if head := head_for(model, batch):
        hidden = response_states(model, batch)
        logprobs, likely = logprobs_of(head, hidden, batch), likeliest(head, hidden)
    else:
        logits = response_logits(model, batch)
        logprobs, likely = rk.token_logprobs(logits, batch.responses, batch.mask), logits.detach().argmax(-1)
    right = (likely == batch.responses) & batch.mask
    rows = logprobs.sum(1)
    return -(rows if weights is None else rows * weights).sum(), right.sum().to(logprobs.dtype)


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Sequence[Batch], micro_batch: int | None) -> dict[str, float]:
    """Token means over held-out batches; nothing where there are none."""
    parts = [part.to(model.device) for batch in batches for part in batch.split(micro_batch)]
    if not parts:
        return {}
    totals = torch.stack([torch.stack(loss_and_right(model, part)) for part in parts]).sum(0)
    loss, right = (totals / sum(part.mask.sum() for part in parts)).tolist()
    return {
        "eval/loss": loss,
        "eval/perplexity": math.exp(min(loss, 700.0)),
        "eval/mean_token_accuracy": right,
    }


# ------------------------------------------------------------------------------------------------------------- main


def main(config: SftConfig) -> Path:
    """Train, evaluate, save; returns the run folder."""
    run = Run.create(config.out, "sft", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = task_of(config, config.model)
    texts = demonstrations(task)
    heldout, train = split(texts, config.seed, config.eval_fraction) if config.eval_fraction else ([], texts)

    checkpoint = run.load_checkpoint()
    model, tokenizer = load_policy(
        str(checkpoint.folder / "model") if checkpoint else config.model,
        tokenizer_texts=task.texts(),
        lora=config.lora,
        **loading_options(config),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)

    examples = encode(tokenizer, train, config.max_length)
    checks = encode(tokenizer, heldout, config.max_length)
    eval_batches = [
        batch_of(checks[start : start + config.batch_size], tokenizer)
        for start in range(0, len(checks), config.batch_size)
    ]
    longest = max(len(prompt) + len(response) for prompt, response in examples + checks)
    check_context(model, longest, f"the longest text within --max-length {config.max_length}")
    per_epoch = math.ceil(len(examples) / config.batch_size)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    with Guard(
        run,
        config,
        total,
        models={"model": (model, tokenizer)},
        parts={"optimizer": optimizer},
        constants={"data": task, "tokenizer": tokenizer},
        checkpoint=checkpoint,
    ) as guard:
        for step in guard.steps("sft"):
            epoch, position = divmod(step - 1, per_epoch)
            order = epoch_order(len(examples), config.seed, epoch)
            chosen = order[position * config.batch_size : (position + 1) * config.batch_size]
            batch = batch_of([examples[i] for i in chosen], tokenizer).to(model.device)
            factor = schedule(step - 1, total, warmup=config.warmup, kind=config.lr_scheduler)
            set_learning_rate(optimizer, config.learning_rate * factor)
            metrics: dict[str, Any] = {"lr": config.learning_rate * factor, "epoch": step / per_epoch}
            start = time.perf_counter()
            with guard.attempt(batch=batch), run.timer("train"):
                metrics |= train_step(model, optimizer, batch, config)
                metrics["tokens_per_second"] = metrics["num_tokens"] / (time.perf_counter() - start)
            if step < total and config.eval_every and step % config.eval_every == 0:
                with run.timer("evaluate"):
                    metrics |= evaluate(model, eval_batches, config.micro_batch)
            guard.log(metrics, "loss")
    with run.timer("evaluate"):
        final = evaluate(model, eval_batches, config.micro_batch)
    run.log(total, final)
    run.save_model(model, tokenizer)
    return run.finish({"steps": total, "demonstrations": len(train), **final})

"""The reward model: one score for a text, from rankings of responses or from absolute scores.

A ranking of K responses gives up to C(K, 2) pairs, but each response goes through the model once; ties carry no pair.
The score is read at the last token of prompt + response + EOS. The losses are in `rm_objectives.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import DATA, CommonConfig, DataConfig, UserError, option
from .data import Ranking, Task, collate, encode_text, epoch_order, task_of
from .guard import Guard, check_finite
from .model import (
    NORMALIZATIONS,
    check_context,
    last_attended,
    load_policy,
    load_reward_model,
    loading_options,
    scores,
    set_score_normalization,
    token_scores,
)
from .rm_data import RankingBatch, annotator_biases, batch_of, batches_of, encode, without_biases
from .rm_metrics import eval_metrics, evaluate, score_metrics
from .rm_objectives import HELP as OBJECTIVE
from .rm_objectives import OBJECTIVES, OF_ORDER, loss_of
from .rollout import generate
from .run import Run, seed_everything
from .schedule import KINDS, schedule, set_learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMALIZATION_TEXTS = 512


@dataclass(frozen=True, kw_only=True)
class RmConfig(DataConfig, CommonConfig):
    init: str = option(
        MISSING, 'start weights: run or model folder, hub name or "tiny"; a causal model gets a new head'
    )
    data: str = option("reviews", DATA + "the rankings")
    objective: str = option("pairwise", OBJECTIVE, choices=OBJECTIVES)
    pair_reduction: str = option(
        "per_prompt", "mean over pairs: within each prompt first, or global", choices=("per_prompt", "global")
    )
    epochs: int = option(3, "passes over the rankings", low=1)
    max_steps: int | None = option(None, "stop after this many optimiser steps; the epochs decide unless given", low=1)
    batch_size: int = option(16, "rankings (prompts) in an optimiser step", low=1)
    micro_batch: int | None = option(None, "responses through the model at a time; the whole batch unless given", low=1)
    learning_rate: float = option(1e-3, "peak learning rate; pretrained models want about 1e-5", above=0)
    lr_scheduler: str = option("linear", "how the learning rate falls after the warm-up", choices=KINDS)
    warmup: float = option(0.05, "share of the steps in which the learning rate climbs", low=0, high=1)
    weight_decay: float = option(0.1, "AdamW's weight decay", low=0)
    max_grad_norm: float = option(1.0, "gradient norm at which the gradient is clipped", above=0)
    center_coef: float = option(
        0.0, "pairwise: weight of (score + score)² of each pair; 0.01 keeps the mean near 0", low=0
    )
    margin: float = option(
        0.0, "wanted score difference of a pair for each unit of its given one; a margin in the data wins", low=0
    )
    label_smoothing: float = option(
        0.0, "probability that a pair is the wrong way round; one in the data wins", low=0, below=0.5
    )
    debias_annotators: bool = option(False, "take each annotator's mean score (as far as it is off) out of the scores")
    token_dropout: float = option(
        0.0, "share of the tokens hidden at random in training; helps on small data sets", low=0, below=1
    )
    max_length: int = option(512, "tokens of a text; a longer one loses its start", low=1)
    normalize: str = option(
        "affine",
        "scores of reference responses get mean 0 and deviation 1; bias-only: mean 0; or stay as they are",
        choices=NORMALIZATIONS,
    )
    normalize_policy: str | None = option(
        None,
        "policy whose samples are the reference; the data's demonstrations, else its ranked responses, unless given",
    )
    eval_every: int = option(50, "steps between evaluations; 0 for only the last", low=0)


# ------------------------------------------------------------------------------------------------------------- step


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: RankingBatch, config: RmConfig
) -> dict[str, float]:
    """One optimiser step; raises NonFinite, before the weights change, if the loss or the gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    predicted, loss = predict(model, batch, config, drop_tokens(batch.attention_mask, config.token_dropout))
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    check_finite(loss=loss.detach(), gradient=grad_norm)
    optimizer.step()
    return {"loss": loss.item(), "grad_norm": grad_norm.item(), **score_metrics(predicted.detach(), batch)}


def predict(
    model: PreTrainedModel, batch: RankingBatch, config: RmConfig, attention_mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Raw scores [K], read at the last token, and the loss; differentiable. A response goes through the model once."""
    seen = batch.attention_mask if attention_mask is None else attention_mask
    if config.objective != "per-token":
        predicted = scores(model, batch.tokens, seen, normalized=False, micro_batch=config.micro_batch)
        return predicted, loss_of(predicted, batch, config)
    each = token_scores(model, batch.tokens, seen, normalized=False, micro_batch=config.micro_batch)
    predicted = each[torch.arange(len(each), device=each.device), last_attended(seen)]
    return predicted, loss_of(predicted, batch, config, each)


def evaluation(model: PreTrainedModel, batches: Sequence[RankingBatch], config: RmConfig) -> dict[str, Any]:
    """`evaluate` of held-out rankings."""

    def predicted(batch: RankingBatch) -> tuple[Tensor, Tensor]:
        score, loss = predict(model, batch.to(model.device), config)
        return score.cpu(), loss

    return evaluate(batches, predicted, correlated=config.objective in ("absolute", "compare"))


def drop_tokens(attention_mask: Tensor, share: float) -> Tensor:
    """The mask without a random share of the tokens; the one that the score is read at always stays."""
    if not share:
        return attention_mask
    kept = torch.rand(attention_mask.shape, device=attention_mask.device) >= share
    kept[torch.arange(len(kept), device=kept.device), last_attended(attention_mask)] = True
    return attention_mask & kept


# ---------------------------------------------------------------------------------------------------- normalisation


def fit_normalization(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: RmConfig) -> None:
    """Fits what `scores` subtracts and divides by on reference responses, and stores it in the model's config."""
    texts = reference_texts(task, config)
    order = epoch_order(len(texts), config.seed, 0)[:NORMALIZATION_TEXTS]
    with torch.no_grad():
        raw = score_texts(
            model,
            tokenizer,
            [texts[i] for i in order],
            config.max_length,
            normalized=False,
            micro_batch=config.micro_batch,
        )
    set_score_normalization(model, raw, config.normalize)


def reference_texts(task: Task, config: RmConfig) -> list[tuple[str, str]]:
    """(prompt, response): samples of `normalize_policy`; else the demonstrations; else the ranked responses."""
    if config.normalize_policy is not None:
        if not task.prompts:
            raise UserError(f"{config.data}: the data has no prompts that normalize_policy could answer")
        policy, tokenizer = load_policy(config.normalize_policy, **loading_options(config))
        order = epoch_order(len(task.prompts), config.seed, 0)[:NORMALIZATION_TEXTS]
        rollout = generate(
            policy,
            tokenizer,
            [task.prompts[i] for i in order],
            response_length=task.response_length,
            micro_batch=config.micro_batch,
        )
        return list(zip(rollout.prompts, rollout.responses))
    texts = [(each.prompt, each.response) for each in task.demonstrations]
    return texts or [(each.prompt, response) for each in task.rankings for response in each.responses]


def score_texts(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[tuple[str, str]],
    max_length: int,
    *,
    normalized: bool = True,
    micro_batch: int | None = None,
) -> Tensor:
    """scores [B] fp32 of (prompt, response) texts, each ended by EOS."""
    ids = [encode_text(tokenizer, prompt, response)[-max_length:] for prompt, response in texts]
    batch = collate([[]] * len(ids), ids, tokenizer.pad_token_id).to(model.device)
    return scores(model, batch.tokens, batch.attention_mask, normalized=normalized, micro_batch=micro_batch)


# ------------------------------------------------------------------------------------------------------------- main


def main(config: RmConfig) -> Path:
    """Train, normalise, evaluate, save; returns the run folder."""
    run = Run.create(config.out, "rm", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = task_of(config, config.init)
    rankings, heldout = usable(config, task)

    checkpoint = run.load_checkpoint()
    model, tokenizer = load_reward_model(
        str(checkpoint.folder / "model") if checkpoint else config.init,
        tokenizer_texts=task.texts(),
        lora=config.lora,
        **loading_options(config),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)

    aligned = config.objective == "per-token"
    examples = encode(tokenizer, rankings, config.max_length, aligned=aligned)
    checks = encode(tokenizer, heldout, config.max_length, aligned=aligned)
    eval_batches = batches_of(checks, config.batch_size, tokenizer.pad_token_id)
    longest = max(len(text) for each in examples + checks for text in each.texts)
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
        for step in guard.steps("rm"):
            epoch, position = divmod(step - 1, per_epoch)
            order = epoch_order(len(examples), config.seed, epoch)
            chosen = order[position * config.batch_size : (position + 1) * config.batch_size]
            batch = batch_of([examples[i] for i in chosen], tokenizer.pad_token_id).to(model.device)
            learning_rate = config.learning_rate * schedule(
                step - 1, total, warmup=config.warmup, kind=config.lr_scheduler
            )
            set_learning_rate(optimizer, learning_rate)
            metrics = {"lr": learning_rate, "epoch": step / per_epoch}
            with guard.attempt(batch=batch), run.timer("train"):
                metrics |= train_step(model, optimizer, batch, config)
            if step < total and config.eval_every and step % config.eval_every == 0:
                with run.timer("evaluate"):
                    metrics |= eval_metrics(evaluation(model, eval_batches, config))
            guard.log(metrics, "loss")
    fit_normalization(model, tokenizer, task, config)
    with run.timer("evaluate"):
        final = evaluation(model, eval_batches, config)
    run.log(total, eval_metrics(final))
    run.save_model(model, tokenizer)
    return run.finish({"steps": total, "rankings": len(rankings), **final})


def usable(config: RmConfig, task: Task) -> tuple[list[Ranking], list[Ranking]]:
    """The rankings that carry a loss, and the held-out ones; without annotators' biases if that is asked for."""
    rankings, heldout = task.rankings, task.heldout_rankings
    if config.debias_annotators:
        biases = annotator_biases(rankings)
        if not biases:
            raise UserError(f"{config.data}: debias_annotators needs rows that say who gave a score (--annotator-key)")
        rankings, heldout = without_biases(rankings, biases), without_biases(heldout, biases)
    if config.objective in OF_ORDER:
        rankings = [each for each in rankings if len(set(each.scores)) > 1]
    if not rankings:
        raise UserError(f"{config.data}: a reward model needs scored, or chosen and rejected, responses")
    return rankings, heldout

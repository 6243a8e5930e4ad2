"""The reward model: one score for a text, from rankings of responses or from absolute scores.

A ranking of K responses gives up to C(K, 2) pairs, but each response goes through the model once; ties carry no pair.
The score is read at the last token of prompt + response + EOS.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import DATA, CommonConfig, DataConfig, UserError, option
from .data import Ranking, Task, collate, encode_text, epoch_order, task_of
from .guard import Guard, check_finite
from .model import check_context, last_attended, load_reward_model, loading_options, scores, set_score_normalization
from .run import Run, seed_everything
from .schedule import KINDS, schedule, set_learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

NORMALIZATION_TEXTS = 512
CALIBRATION_BINS = 10


@dataclass(frozen=True, kw_only=True)
class RmConfig(DataConfig, CommonConfig):
    init: str = option(
        MISSING, 'start weights: run or model folder, hub name or "tiny"; a causal model gets a new head'
    )
    data: str = option("reviews", DATA + "the rankings")
    objective: str = option(
        "pairwise", "pairwise: order of the scores; absolute: their values", choices=("pairwise", "absolute")
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
        0.0, "pairwise: wanted score difference of a pair, as a multiple of its given difference", low=0
    )
    token_dropout: float = option(
        0.0, "share of the tokens hidden at random in training; helps on small data sets", low=0, below=1
    )
    max_length: int = option(512, "tokens of a text; a longer one loses its start", low=1)
    eval_every: int = option(50, "steps between evaluations; 0 for only the last", low=0)


# ------------------------------------------------------------------------------------------------------------- data


@dataclass
class RankingBatch:
    """The responses of some rankings, all K of them in a row, and the pairs among them.

    tokens, attention_mask: [K, L]. targets: [K] fp32, the given scores. chosen, rejected: [P] indices into K.
    prompts: [P], the ranking of each pair.
    """

    tokens: Tensor
    attention_mask: Tensor
    targets: Tensor
    chosen: Tensor
    rejected: Tensor
    prompts: Tensor

    def to(self, device: torch.device | str) -> RankingBatch:
        return RankingBatch(*(getattr(self, name).to(device) for name in self.__dataclass_fields__))


Example = tuple[list[list[int]], tuple[float, ...]]
"""Token ids of each response's whole text, and the scores."""


def encode(tokenizer: PreTrainedTokenizerBase, rankings: Sequence[Ranking], max_length: int) -> list[Example]:
    return [
        ([encode_text(tokenizer, each.prompt, response)[-max_length:] for response in each.responses], each.scores)
        for each in rankings
    ]


def batch_of(examples: Sequence[Example], pad_id: int) -> RankingBatch:
    texts = [text for texts, _ in examples for text in texts]
    batch = collate([[]] * len(texts), texts, pad_id)
    pairs: list[tuple[int, int, int]] = []
    first = 0
    for prompt, (_, given) in enumerate(examples):
        pairs += [(first + better, first + worse, prompt) for better, worse in ordered_pairs(given)]
        first += len(given)
    chosen, rejected, prompts = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).unbind(1)
    targets = torch.tensor([score for _, given in examples for score in given])
    return RankingBatch(batch.tokens, batch.attention_mask, targets, chosen, rejected, prompts)


def ordered_pairs(given: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) for each pair of unequal scores."""
    pairs = itertools.combinations(range(len(given)), 2)
    return [(i, j) if given[i] > given[j] else (j, i) for i, j in pairs if given[i] != given[j]]


def batches_of(examples: Sequence[Example], size: int, pad_id: int) -> list[RankingBatch]:
    return [batch_of(examples[start : start + size], pad_id) for start in range(0, len(examples), size)]


# ------------------------------------------------------------------------------------------------------------- step


def train_step(
    model: PreTrainedModel, optimizer: torch.optim.Optimizer, batch: RankingBatch, config: RmConfig
) -> dict[str, float]:
    """One optimiser step; raises NonFinite, before the weights change, if the loss or the gradient is not finite."""
    optimizer.zero_grad(set_to_none=True)
    seen = drop_tokens(batch.attention_mask, config.token_dropout)
    predicted = scores(model, batch.tokens, seen, normalized=False, micro_batch=config.micro_batch)
    loss = loss_of(predicted, batch, config)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
    check_finite(loss=loss.detach(), gradient=grad_norm)
    optimizer.step()
    return {"loss": loss.item(), "grad_norm": grad_norm.item(), **score_metrics(predicted.detach(), batch)}


def drop_tokens(attention_mask: Tensor, share: float) -> Tensor:
    """The mask without a random share of the tokens; the one that the score is read at always stays."""
    if not share:
        return attention_mask
    kept = torch.rand(attention_mask.shape, device=attention_mask.device) >= share
    kept[torch.arange(len(kept), device=kept.device), last_attended(attention_mask)] = True
    return attention_mask & kept


def loss_of(predicted: Tensor, batch: RankingBatch, config: RmConfig) -> Tensor:
    if config.objective == "absolute":
        return rk.rm_regression_loss(predicted, batch.targets)[0]
    margin = config.margin * (batch.targets[batch.chosen] - batch.targets[batch.rejected]) if config.margin else None
    return rk.rm_pairwise_loss(
        predicted, batch.chosen, batch.rejected, batch.prompts, margin=margin, center_coef=config.center_coef
    )[0]


def score_metrics(predicted: Tensor, batch: RankingBatch) -> dict[str, float]:
    difference = predicted[batch.chosen] - predicted[batch.rejected]
    rewards = {
        "mean_reward": predicted.mean().item(),
        "min_reward": predicted.min().item(),
        "max_reward": predicted.max().item(),
    }
    if not len(difference):
        return rewards
    return {"accuracy": (difference > 0).float().mean().item(), "margin": difference.mean().item(), **rewards}


# ------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def evaluate(model: PreTrainedModel, batches: Sequence[RankingBatch], config: RmConfig) -> dict[str, Any]:
    """How well the model orders held-out responses.

    Returns loss, pair_accuracy and its standard error over prompts, margin (mean score difference), calibration and
    ece; for absolute scores also the correlation with them. Nothing where there are no batches.
    """
    if not batches:
        return {}
    losses, differences, by_prompt, predictions = [], [], [], []
    for batch in (each.to(model.device) for each in batches):
        predicted = scores(model, batch.tokens, batch.attention_mask, normalized=False, micro_batch=config.micro_batch)
        losses.append(loss_of(predicted, batch, config).item())
        predictions.append(torch.stack([predicted, batch.targets]))
        difference = predicted[batch.chosen] - predicted[batch.rejected]
        differences.append(difference)
        for prompt in batch.prompts.unique():
            by_prompt.append((difference[batch.prompts == prompt] > 0).float().mean().item())
    result: dict[str, Any] = {"loss": sum(losses) / len(losses)}
    difference = torch.cat(differences)
    if len(difference):
        prompts = torch.tensor(by_prompt, dtype=torch.float64)
        result |= {
            "pair_accuracy": (difference > 0).float().mean().item(),
            "pair_accuracy_sem": prompts.std(unbiased=False).item() / math.sqrt(len(prompts)),
            "margin": difference.mean().item(),
            "pairs": len(difference),
            **calibration(difference),
        }
    if config.objective == "absolute":
        result["correlation"] = torch.corrcoef(torch.cat(predictions, 1))[0, 1].item()
    return result


def calibration(difference: Tensor) -> dict[str, Any]:
    """Is a pair that the model holds p likely ordered as it says in a share p of the cases?

    Args:
        difference: [P] score(chosen) − score(rejected); the model's confidence in its own order is σ(|difference|).

    Returns:
        calibration: for each non-empty tenth of [0.5, 1] the mean confidence ("bins"), the share of pairs in the right
        order ("accuracy") and their number ("count"); ece: the mean of |accuracy − confidence| weighted by the counts.
    """
    confidence = difference.abs().sigmoid().double()
    right = (difference > 0).double()
    place = ((confidence - 0.5) * 2 * CALIBRATION_BINS).long().clamp(max=CALIBRATION_BINS - 1)
    count = torch.bincount(place, minlength=CALIBRATION_BINS)
    kept = count > 0
    mean_confidence = torch.bincount(place, confidence, CALIBRATION_BINS)[kept] / count[kept]
    accuracy = torch.bincount(place, right, CALIBRATION_BINS)[kept] / count[kept]
    error = ((accuracy - mean_confidence).abs() * count[kept]).sum() / count.sum()
    bins = {"bins": mean_confidence.tolist(), "accuracy": accuracy.tolist(), "count": count[kept].tolist()}
    return {"calibration": bins, "ece": error.item()}


def fit_normalization(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: Task, config: RmConfig) -> None:
    """Scores of the demonstrations (of the ranked responses, where there are none) get mean 0 and deviation 1."""
    texts = [(each.prompt, each.response) for each in task.demonstrations]
    texts = texts or [(each.prompt, response) for each in task.rankings for response in each.responses]
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
    set_score_normalization(model, raw)


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
    rankings = usable(config, task)

    checkpoint = run.load_checkpoint()
    model, tokenizer = load_reward_model(
        str(checkpoint.folder / "model") if checkpoint else config.init,
        tokenizer_texts=task.texts(),
        lora=config.lora,
        **loading_options(config),
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)

    examples = encode(tokenizer, rankings, config.max_length)
    checks = encode(tokenizer, task.heldout_rankings, config.max_length)
    eval_batches = batches_of(checks, config.batch_size, tokenizer.pad_token_id)
    longest = max(len(text) for texts, *_ in examples + checks for text in texts)
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
                    metrics |= eval_metrics(evaluate(model, eval_batches, config))
            guard.log(metrics, "loss")
    fit_normalization(model, tokenizer, task, config)
    with run.timer("evaluate"):
        final = evaluate(model, eval_batches, config)
    run.log(total, eval_metrics(final))
    run.save_model(model, tokenizer)
    return run.finish({"steps": total, "rankings": len(rankings), **final})


def usable(config: RmConfig, task: Task) -> list[Ranking]:
    """The rankings that carry a loss: for pairs, those with two unequal scores."""
    rankings = [each for each in task.rankings if config.objective == "absolute" or len(set(each.scores)) > 1]
    if not rankings:
        raise UserError(f"{config.data}: a reward model needs scored, or chosen and rejected, responses")
    return rankings


def eval_metrics(result: dict[str, Any]) -> dict[str, float]:
    names = {
        "pair_accuracy": "accuracy",
        "loss": "loss",
        "margin": "margin",
        "ece": "ece",
        "correlation": "correlation",
    }
    return {f"eval/{names[key]}": value for key, value in result.items() if key in names}

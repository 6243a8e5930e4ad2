"""Direct preference optimisation: the policy learns pairs of responses without a reward model or sampling.

The pairs come from the data's rankings, or from the policy's own samples that a reward model has scored. The
reference's log-probabilities are computed once, before training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from .candidates import Candidates, draw_candidates, own_source, provided_candidates
from .config import DATA, CommonConfig, SampledConfig, UserError, check_scorer, option
from .data import Batch, Task, collate, epoch_order, task_of
from .evaluate import Evaluator, Judges
from .gold_model import with_gold
from .guard import Guard, Values, check_finite
from .model import load_policy, load_reference, load_reward_model, loading_options, response_logprobs
from .overoptimization import STOP_ON_GOLD, overoptimization, watch_gold
from .rm_data import ordered_pairs
from .run import Run, seed_everything
from .schedule import KINDS, schedule, set_learning_rate
from .scorer import Scorer, scorer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class DpoConfig(SampledConfig, CommonConfig):
    ref: str | None = option(None, "reference policy; --init unless given")
    rm: str | None = option(None, "reward model that scores the samples of --pairs sampled, and the evaluations")
    data: str = option("reviews", DATA + "the rankings, the prompts and the gold judge")
    pairs: str = option("data", "the data's rankings, or samples of --init scored by --rm", choices=("data", "sampled"))
    pairing: str = option(
        "all", "pairs of a prompt: all of unequal score, or only the best with the worst", choices=("all", "extremes")
    )
    num_prompts: int = option(512, "pairs sampled: prompts that are sampled for; they repeat if there are fewer", low=1)
    num_candidates: int = option(4, "pairs sampled: responses to each prompt", low=2)
    loss: str = option("sigmoid", "DPO's, or the square of IPO", choices=("sigmoid", "ipo"))
    beta: float = option(0.1, "strength of the tie to the reference; the implicit reward is beta · log-ratio", above=0)
    label_smoothing: float = option(0.0, "loss sigmoid: share of the labels held for wrong (cDPO)", low=0, below=0.5)
    length_average: bool = option(False, "log-probabilities are means over a response's tokens, not sums")
    epochs: int = option(1, "passes over the pairs", low=1)
    max_steps: int | None = option(None, "stop after this many optimiser steps; the epochs decide unless given", low=1)
    batch_size: int = option(64, "pairs in an optimiser step", low=1)
    micro_batch: int | None = option(None, "rows through a model at a time, two a pair; all unless given", low=1)
    response_length: int | None = option(None, "tokens a sampled response may have; the task's own unless given", low=1)
    temperature: float = option(1.0, "sampling temperature; the same one scores the tokens", above=0)
    learning_rate: float = option(2e-4, "peak learning rate; pretrained models want about 1e-6", above=0)
    lr_scheduler: str = option("linear", "how the learning rate falls after the warm-up", choices=KINDS)
    warmup: float = option(0.1, "share of the steps in which the learning rate climbs", low=0, high=1)
    max_grad_norm: float = option(1.0, "gradient norm at which the gradient is clipped", above=0)
    eval_every: int = option(
        10, "steps between evaluations on held-out prompts; 0 for only the first and the last", low=0
    )
    stop_on_gold: int | None = option(None, STOP_ON_GOLD, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss == "ipo" and self.label_smoothing:
            raise UserError("label_smoothing belongs to loss sigmoid, got loss ipo")
        check_scorer(self, needed=False)
        if self.pairs == "sampled" and self.rm is None and self.reward_fn is None:
            raise UserError("pairs sampled needs --rm or --reward-fn to score the samples")


# ------------------------------------------------------------------------------------------------------------- loss


def dpo_loss(log_ratio: Tensor, *, beta: float, loss: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """[P] losses of pairs.

        log_ratio = (log π(chosen) − log π_ref(chosen)) − (log π(rejected) − log π_ref(rejected))
        sigmoid: −(1 − label_smoothing) log σ(beta log_ratio) − label_smoothing log σ(−beta log_ratio)
        ipo:     (log_ratio − 1 / (2 beta))²

    Args:
        log_ratio: [P] float, nats, differentiable.

    Sources: Rafailov et al. 2023 (arXiv 2305.18290); Azar et al. 2023 (arXiv 2310.12036).
    """
    if loss == "ipo":
        return (log_ratio - 1 / (2 * beta)).square()
    if loss != "sigmoid":
        raise ValueError(f"dpo_loss: loss must be one of sigmoid, ipo, got {loss!r}")
    right, wrong = F.logsigmoid(beta * log_ratio), F.logsigmoid(-beta * log_ratio)
    return -(1 - label_smoothing) * right - label_smoothing * wrong


# ------------------------------------------------------------------------------------------------------------ pairs


@dataclass(frozen=True)
class Pair:
    """Token ids; the responses end with EOS unless they were cut off."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]


def pairs_of(group: Candidates, pairing: str) -> list[Pair]:
    """The pairs of a prompt with unequal scores."""
    ordered = ordered_pairs(group.scores)
    if pairing == "extremes":
        ordered = sorted(ordered, key=lambda pair: group.scores[pair[1]] - group.scores[pair[0]])[:1]
    return [Pair(group.prompt_tokens, group.responses[better], group.responses[worse]) for better, worse in ordered]


def load_pairs(
    config: DpoConfig,
    task: Task,
    scorer: Scorer | None,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> list[Pair]:
    """The pairs to train on."""
    if config.pairs == "data":
        groups = [provided_candidates(ranking, tokenizer) for ranking in task.rankings]
    else:
        assert scorer is not None  # the config wants one
        if not task.prompts:
            raise UserError(f"{config.data}: the data has no prompts to sample from")
        order = epoch_order(len(task.prompts), config.seed, 0)
        source = own_source(
            policy,
            tokenizer,
            "sample",
            count=config.num_candidates,
            response_length=config.response_length or task.response_length,
            temperature=config.temperature,
            micro_batch=config.micro_batch,
        )
        prompts = [task.prompts[order[i % len(order)]] for i in range(config.num_prompts)]
        groups = draw_candidates([source], tokenizer, scorer, prompts)
    pairs = [pair for group in groups for pair in pairs_of(group, config.pairing)]
    if not pairs:
        raise UserError(f"{config.data}: dpo needs pairs of responses with unequal scores, got none")
    return pairs


def batch_of(pairs: Sequence[Pair], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Two rows a pair, the chosen response first."""
    prompts = [pair.prompt for pair in pairs for _ in range(2)]
    responses = [response for pair in pairs for response in (pair.chosen, pair.rejected)]
    return collate(prompts, responses, tokenizer.pad_token_id)


def pair_logprobs(model: PreTrainedModel, batch: Batch, config: DpoConfig) -> Tensor:
    """[P, 2] fp32: log π of the chosen and of the rejected response; differentiable."""
    logprobs = response_logprobs(model, batch, config.temperature).sum(1)
    if config.length_average:
        logprobs = logprobs / batch.mask.sum(1).clamp(min=1)
    return logprobs.view(-1, 2)


@torch.no_grad()
def reference_logprobs(
    ref: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[Pair], config: DpoConfig
) -> Tensor:
    """[pairs, 2] on the CPU: `pair_logprobs` of the reference."""
    size = rows_to_pairs(config.micro_batch) or config.batch_size
    parts = [batch_of(pairs[start : start + size], tokenizer) for start in range(0, len(pairs), size)]
    return torch.cat([pair_logprobs(ref, part.to(ref.device), config).cpu() for part in parts])


def rows_to_pairs(rows: int | None) -> int | None:
    return rows and max(1, rows // 2)


# ------------------------------------------------------------------------------------------------------------- step


def update(
    policy: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    ref_logprobs: Tensor,
    config: DpoConfig,
) -> dict[str, float]:
    """One optimiser step on some pairs. batch: two rows a pair. ref_logprobs: [P, 2]."""
    optimizer.zero_grad(set_to_none=True)
    size = rows_to_pairs(config.micro_batch) or len(ref_logprobs)
    losses, logprobs = [], []
    for part, ref in zip(batch.split(2 * size), ref_logprobs.split(size)):
        ours = pair_logprobs(policy, part, config)
        ratio = ours - ref
        loss = dpo_loss(
            ratio[:, 0] - ratio[:, 1], beta=config.beta, loss=config.loss, label_smoothing=config.label_smoothing
        )
        (loss.sum() / len(ref_logprobs)).backward()
        losses.append(loss.detach())
        logprobs.append(ours.detach())
    mean_loss = torch.cat(losses).mean().item()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    check_finite(loss=mean_loss, gradient=grad_norm)
    optimizer.step()
    ours = torch.cat(logprobs)
    chosen, rejected = (config.beta * (ours - ref_logprobs)).unbind(1)
    return {
        "loss": mean_loss,
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        "rewards/accuracies": (chosen > rejected).float().mean().item(),
        "logps/chosen": ours[:, 0].mean().item(),
        "logps/rejected": ours[:, 1].mean().item(),
        "grad_norm": grad_norm.item(),
    }


# -------------------------------------------------------------------------------------------------------------- main


def main(config: DpoConfig) -> Path:
    """Train and return the run folder."""
    run = Run.create(config.out, "dpo", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = with_gold(task_of(config, config.init), config)
    where = loading_options(config)
    policy, tokenizer = load_policy(config.init, lora=config.lora, **where)
    ref = load_reference(config.ref or config.init, tokenizer, **where)
    reward_model = load_reward_model(config.rm, frozen=True, **where) if config.rm else None
    scorer = scorer_of(config, reward_model, tokenizer, task)
    evaluator = Evaluator.of(config, task, Judges(ref, scorer, task.gold))
    checkpoint = run.load_checkpoint()
    sampled = Values()
    if config.pairs == "data" or checkpoint is None:
        with run.timer("generate"):
            pairs = load_pairs(config, task, scorer, policy, tokenizer)
        if config.pairs == "sampled":
            sampled["pairs"] = [asdict(pair) for pair in pairs]
    else:
        pairs = [Pair(**pair) for pair in checkpoint.state["parts"]["sampled"]["pairs"]]
    with run.timer("logprobs"):
        ref_logprobs = reference_logprobs(ref, tokenizer, pairs, config)

    if checkpoint:
        policy, _ = load_policy(str(checkpoint.folder / "model"), lora=config.lora, **where)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    per_epoch = math.ceil(len(pairs) / config.batch_size)
    total = min(config.epochs * per_epoch, config.max_steps or config.epochs * per_epoch)
    with Guard(
        run,
        config,
        total,
        models={"model": (policy, tokenizer)},
        parts={"optimizer": optimizer, "sampled": sampled},
        constants={"data": task, "tokenizer": tokenizer, "reference": ref, "scorer": scorer},
        checkpoint=checkpoint,
    ) as guard:
        if guard.step == 0:
            run.log(0, evaluator.metrics(policy, tokenizer, run))
        for step in guard.steps("dpo"):
            epoch, position = divmod(step - 1, per_epoch)
            order = epoch_order(len(pairs), config.seed, epoch)
            chosen = order[position * config.batch_size : (position + 1) * config.batch_size]
            batch = batch_of([pairs[i] for i in chosen], tokenizer).to(policy.device)
            factor = schedule(step - 1, total, warmup=config.warmup, kind=config.lr_scheduler)
            set_learning_rate(optimizer, config.learning_rate * factor)
            metrics = {"lr": config.learning_rate * factor, "epoch": step / per_epoch}
            with guard.attempt(batch=batch), run.timer("train"):
                metrics |= update(policy, optimizer, batch, ref_logprobs[chosen].to(policy.device), config)
            if step == total or (config.eval_every and step % config.eval_every == 0):
                metrics |= evaluator.metrics(policy, tokenizer, run)
            guard.log(metrics, "loss", "rewards/accuracies")
            if watch_gold(run, policy, tokenizer, config.stop_on_gold):
                guard.total = step
    run.save_model(policy, tokenizer)
    return run.finish({"steps": guard.total, "pairs": len(pairs), **overoptimization(run.folder)})

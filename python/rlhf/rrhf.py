"""RRHF: rank candidate responses by their length-normalised log-probability as their scores do.

Candidates come from any sources (`candidates.py`) and are scored by the reward model; then `rk.rrhf_loss` on whole
prompts. Each round draws them anew from the policy as it then is: iterated RRHF with whole passes over the prompts,
online RRHF with `refresh_every` steps a round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .candidates import (
    DECODINGS,
    PROVIDED,
    Candidates,
    Source,
    candidate_batch,
    draw_candidates,
    mean_score,
    model_source,
    own_source,
    penalize_distance,
    read_candidates,
    score_candidates,
    source_metrics,
)
from .config import CommonConfig, SampledConfig, UserError, check_scorer, option
from .data import Task, epoch_order, task_of
from .evaluate import Evaluator, Judges
from .gold_model import with_gold
from .guard import Guard, Values, check_finite
from .model import load_policy, load_reference, load_reward_model, loading_options, response_logprobs
from .overoptimization import STOP_ON_GOLD, overoptimization, watch_gold
from .rollout import check_prompts
from .run import Run, seed_everything
from .schedule import KINDS, schedule, set_learning_rate
from .scorer import scorer_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RrhfConfig(SampledConfig, CommonConfig):
    rm: str | None = option(None, "reward model that scores the candidates; --candidates alone can do without")
    ref: str | None = option(None, "start model of the KL; --init unless given")
    candidates: str | None = option(
        None, "file or folder of rows with responses and scores, or chosen and rejected: provided candidates"
    )
    sources: str = option(
        "all", "which candidates to train on: provided by --candidates, sampled or both", ("all", "provided", "sampled")
    )
    rescore: bool = option(True, "the reward model scores the provided candidates too; else they keep their own scores")
    decoding: tuple[str, ...] = option(("sample",), "how the policy's candidates are drawn", choices=DECODINGS)
    source: tuple[str, ...] = option((), "other models that give candidates, as name=run, folder or hub name")
    source_weight: tuple[str, ...] = option(
        (), "name=weight of a source (a decoding, a --source or provided): a pair weighs the product of its two; else 1"
    )
    num_prompts: int = option(256, "prompts in each round; 0 for all there are", low=0)
    num_candidates: int = option(4, "responses to each prompt from each decoding and each --source", low=1)
    rounds: int = option(4, "times that candidates are drawn anew from the policy", low=1)
    refresh_every: int | None = option(None, "online: optimiser steps in a round, instead of --num-prompts", low=1)
    epochs: int = option(1, "passes over the candidates of a round", low=1)
    batch_size: int = option(32, "prompts in an optimiser step", low=1)
    micro_batch: int | None = option(
        None, "rows through a model at a time, all unless given; training then runs the model forward twice", low=1
    )
    temperature: float = option(1.0, "sampling temperature", above=0)
    score_temperature: float | None = option(
        None, "temperature at which the loss scores the tokens; --temperature unless given", above=0
    )
    top_p: float = option(0.9, "decoding top_p: probability of the tokens that may be sampled", above=0, high=1)
    diversity: float = option(
        1.0, "decoding diverse_beam: nats that a token loses for each beam that has just taken it", low=0
    )
    kl_coef: float = option(
        0.0, "subtracted from a score: this times log policy/reference, summed over the response", low=0
    )
    learning_rate: float = option(1e-3, "peak learning rate; pretrained models want about 1e-5", above=0)
    lr_scheduler: str = option("linear", "how the learning rate falls after the warm-up", choices=KINDS)
    warmup: float = option(0.0, "share of the steps in which the learning rate climbs", low=0, high=1)
    max_grad_norm: float = option(1.0, "gradient norm at which the gradient is clipped", above=0)
    rank_coef: float = option(1.0, "weight of the ranking loss", low=0)
    margin: float = option(0.0, "wanted gap of a pair for each rank between its scores, as in BRIO", low=0)
    length_power: float = option(1.0, "power of its length that a response's log-probability is divided by", low=0)
    sft_coef: float = option(1.0, "weight of the supervised loss, the negative log-likelihood of its target", low=0)
    sft_target: str = option(
        "best",
        "best score; the chosen of the data; or all_weighted by softmax(score / sft_tau)",
        choices=("best", "chosen", "all_weighted"),
    )
    sft_tau: float = option(1.0, "temperature of all_weighted, in units of the score", above=0)
    sft_reduction: str = option("sum", "over the target's tokens", choices=("sum", "mean"))
    compat_padded_norm: bool = option(
        False, "the released code's lengths: of prompt and longest candidate, the same for every candidate of a prompt"
    )
    eval_every: int = option(
        4, "steps between evaluations on held-out prompts; 0 for only the first and the last", low=0
    )
    stop_on_gold: int | None = option(None, STOP_ON_GOLD, low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorer(self, needed=False)
        scored = self.rm is not None or self.reward_fn is not None
        if self.candidates is None and (not scored or self.sources == "provided"):
            raise UserError(
                "rrhf needs --candidates with scores, or --rm or --reward-fn to score what it samples"
                if not scored
                else "sources provided needs --candidates"
            )
        if not scored and self.sources == "sampled":
            raise UserError("sources sampled needs --rm or --reward-fn to score the samples")
        if self.sampled and self.candidates is None and self.num_candidates * self.num_sources < 2:
            raise UserError(f"num_candidates must be at least 2 to rank, got {self.num_candidates}")
        if self.sampled and self.uses_provided and not self.rescore:
            raise UserError("rescore must be on where provided and sampled candidates are ranked together")
        if self.sft_target == "chosen" and not self.uses_provided:
            raise UserError("sft_target chosen needs --candidates: samples have no chosen response")
        if self.kl_coef and not scored:
            raise UserError("kl_coef needs --rm or --reward-fn: it is subtracted from their scores")
        if self.refresh_every and not self.sampled:
            raise UserError("refresh_every draws candidates from the policy; sources provided has none of them")
        if self.refresh_every and self.epochs != 1:
            raise UserError(f"refresh_every draws new candidates for each step and wants epochs 1, got {self.epochs}")
        names = {*self.decoding, *self.others, PROVIDED}
        if len(names) != len(self.decoding) + len(self.others) + 1:
            raise UserError("decoding and source must give every source a name of its own")
        for name, weight in self.weights.items():
            if name not in names or not 0 <= weight < math.inf:
                raise UserError(f"source_weight must be one of {', '.join(sorted(names))} =number, got {name}={weight}")

    @property
    def sampled(self) -> bool:
        return (self.rm is not None or self.reward_fn is not None) and self.sources != "provided"

    @property
    def uses_provided(self) -> bool:
        return self.candidates is not None and self.sources != "sampled"

    @property
    def num_sources(self) -> int:
        return len(self.decoding) + len(self.source)

    @property
    def others(self) -> dict[str, str]:
        return dict(_pair("source", each) for each in self.source)

    @property
    def weights(self) -> dict[str, float]:
        weights = {}
        for each in self.source_weight:
            name, value = _pair("source_weight", each)
            try:
                weights[name] = float(value)
            except ValueError:
                raise UserError(f"source_weight must be name=number, got {each!r}") from None
        return weights


def _pair(flag: str, text: str) -> tuple[str, str]:
    name, equals, value = text.partition("=")
    if not (name and equals and value):
        raise UserError(f"{flag} must be name=value, got {text!r}")
    return name, value


# ------------------------------------------------------------------------------------------------------------- loss


def loss_of(
    logprobs: Tensor, mask: Tensor, groups: Sequence[Candidates], config: RrhfConfig
) -> tuple[Tensor, dict[str, float]]:
    """The loss of some prompts' candidates, the mean over prompts, and its parts.

        p_i = Σ_t logprobs_it / n_i^length_power
        rank = Σ_{i,j: score_i < score_j} w_i w_j max(0, p_i − p_j + margin · (rank_i − rank_j))
        sft = −Σ_i target_i w_i Σ_t logprobs_it (/ n_i with sft_reduction mean)

    w: the weights of the sources. rank_i: the number of different scores above i's. target: 1 for the best or the
    chosen, or the softmax of the scores. n_i: the response's tokens or, with compat_padded_norm, the tokens of the
    prompt and of its longest candidate.

    Args:
        logprobs: [K, T] float, differentiable, the candidates of every group in order. mask: [K, T] bool.

    Source: Yuan et al. 2023 (arXiv 2304.05302); the margin, Liu et al. 2022 (arXiv 2203.16804).
    """
    device = logprobs.device
    score = torch.tensor([score for group in groups for score in group.scores], device=device)
    prompts = torch.tensor([i for i, group in enumerate(groups) for _ in group.responses], device=device)
    as_published = (config.margin, config.compat_padded_norm, config.sft_target, config.sft_reduction) == (
        0.0,
        False,
        "best",
        "sum",
    )
    if as_published and not config.source_weight:
        loss, stats = rk.rrhf_loss(
            logprobs,
            score,
            prompts,
            mask,
            rank_coef=config.rank_coef,
            sft_coef=config.sft_coef,
            length_power=config.length_power,
        )
        rank, sft, accuracy = stats.rank_loss, stats.sft_loss, stats.accuracy
    else:
        weights = config.weights
        weight = torch.tensor([weights.get(name, 1.0) for group in groups for name in group.sources], device=device)
        length = mask.sum(1).clamp(min=1).to(logprobs.dtype)
        if config.compat_padded_norm:
            longest = [len(group.prompt_tokens) + max(map(len, group.responses)) for group in groups]
            length = torch.tensor(longest, device=device)[prompts].to(logprobs.dtype)
        total = torch.where(mask, logprobs, 0).sum(1)
        # The margin of a pair is the difference of two numbers, one of each candidate, so it can be added to p.
        p = total / length**config.length_power + config.margin * ranks(groups).to(device)
        rank, accuracy = ranking_loss(p, score, prompts, weight)
        target = sft_target(groups, config).to(device) * weight
        each = total / length if config.sft_reduction == "mean" else total
        sft = -(target * each).sum() / len(groups)
        loss = config.rank_coef * rank + config.sft_coef * sft
    return loss, {
        "loss": loss.item(),
        "loss/rank": rank.item(),
        "loss/sft": sft.item(),
        "accuracy": accuracy.item(),
    }


def ranking_loss(p: Tensor, score: Tensor, prompts: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(Σ w_i w_j max(0, p_i − p_j) over the pairs of a prompt with score_i < score_j, mean over prompts; the share of
    the pairs in the right order), both 0-d. p, score, prompts, weight: [K]."""
    worse = (prompts[:, None] == prompts) & (score[:, None] < score)
    gap = p[:, None] - p
    lost = torch.where(worse, gap.clamp(min=0), 0) * weight[:, None] * weight
    right = (worse & (gap < 0)).sum() / worse.sum().clamp(min=1)
    return lost.sum() / prompts.unique().numel(), right


def ranks(groups: Sequence[Candidates]) -> Tensor:
    """[K] fp32: how many different scores of its prompt lie above each candidate's."""
    return torch.tensor(
        [float(len({other for other in group.scores if other > own})) for group in groups for own in group.scores]
    )


def sft_target(groups: Sequence[Candidates], config: RrhfConfig) -> Tensor:
    """[K] fp32: the weight of each candidate in the supervised loss; 1 in sum for each prompt."""
    parts = []
    for group in groups:
        part = torch.zeros(len(group.responses))
        if config.sft_target == "all_weighted":
            part = (torch.tensor(group.scores) / config.sft_tau).softmax(0)
        elif config.sft_target == "best":
            part[group.best] = 1
        else:
            assert group.chosen is not None  # the config wants provided candidates, and each has one
            part[group.chosen] = 1
        parts.append(part)
    return torch.cat(parts)


def update(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    groups: Sequence[Candidates],
    config: RrhfConfig,
) -> dict[str, float]:
    """One optimiser step on the candidates of some prompts.

    In micro-batches the log-probabilities are computed twice: without a graph for the loss, which compares candidates
    of different micro-batches, then part by part with the loss's gradient. The result is the whole batch's.
    """
    batch = candidate_batch(groups, tokenizer).to(policy.device)
    parts = batch.split(config.micro_batch)
    temperature = config.score_temperature or config.temperature
    optimizer.zero_grad(set_to_none=True)
    with torch.set_grad_enabled(len(parts) == 1):
        logprobs = response_logprobs(policy, batch, temperature, micro_batch=config.micro_batch)
    if len(parts) > 1:
        logprobs.requires_grad_()
    loss, metrics = loss_of(logprobs, batch.mask, groups, config)
    loss.backward()
    if len(parts) > 1:
        assert logprobs.grad is not None  # a leaf of the loss
        for part, gradient in zip(parts, logprobs.grad.split(len(parts[0]))):
            response_logprobs(policy, part, temperature).backward(gradient)
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    check_finite(loss=metrics["loss"], gradient=grad_norm)
    optimizer.step()
    return metrics | {"grad_norm": grad_norm.item()}


# ------------------------------------------------------------------------------------------------------- candidates


def sources_of(
    policy: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, config: RrhfConfig, response_length: int, **where: Any
) -> list[Source]:
    """The policy's decodings and the other models; the policy is read when a source draws."""
    if not config.sampled:
        return []
    settings: dict[str, Any] = {
        "count": config.num_candidates,
        "response_length": response_length,
        "temperature": config.temperature,
        "micro_batch": config.micro_batch,
    }
    own = [
        own_source(policy, tokenizer, name, top_p=config.top_p, diversity=config.diversity, **settings)
        for name in config.decoding
    ]
    return own + [model_source(name, path, tokenizer, **settings, **where) for name, path in config.others.items()]


def provided_of(config: RrhfConfig, task: Task, tokenizer: PreTrainedTokenizerBase) -> list[Candidates]:
    """The provided candidates, without those of prompts that are held out for evaluation."""
    if config.candidates is None or not config.uses_provided:
        return []
    heldout = set(task.eval_prompts)
    read = read_candidates(config.candidates, tokenizer, config.columns)
    found = [each for each in read if each.prompt not in heldout]
    if not found:
        raise UserError(f"{config.candidates}: every prompt is held out for evaluation")
    return found


# -------------------------------------------------------------------------------------------------------------- main


def main(config: RrhfConfig) -> Path:
    """Train and return the run folder."""
    run = Run.create(config.out, "rrhf", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = with_gold(task_of(config, config.init), config)
    checkpoint = run.load_checkpoint()
    where = loading_options(config)
    policy, tokenizer = load_policy(
        str(checkpoint.folder / "model") if checkpoint else config.init, lora=config.lora, **where
    )
    ref = load_reference(config.ref or config.init, tokenizer, **where)
    reward_model = load_reward_model(config.rm, frozen=True, **where) if config.rm else None
    scorer = scorer_of(config, reward_model, tokenizer, task)
    check_prompts(policy, tokenizer, task.prompts, config.response_length or task.response_length)
    evaluator = Evaluator.of(config, task, Judges(ref, scorer, task.gold))
    provided = provided_of(config, task, tokenizer)
    sources = sources_of(policy, tokenizer, config, config.response_length or task.response_length, **where)
    available = len(provided) or len(task.prompts)
    if not available:
        raise UserError(f"{config.data}: the data has no prompts to sample from")

    rounds = config.rounds if sources else 1
    in_round = config.num_prompts or available if sources else available
    if config.refresh_every:
        in_round = config.refresh_every * config.batch_size
    per_round = math.ceil(in_round / config.batch_size) * config.epochs
    total = rounds * per_round
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)

    def round_candidates(number: int) -> list[Candidates]:
        order = epoch_order(available, config.seed, number)
        chosen = [order[i % available] for i in range(in_round)]
        given = [provided[i] for i in chosen] if provided else []
        prompts = [each.prompt for each in given] or [task.prompts[i] for i in chosen]
        size = config.micro_batch
        with run.timer("generate"):
            if sources:
                assert scorer is not None  # the config samples only with one
                groups = draw_candidates(sources, tokenizer, scorer, prompts, provided=given)
            elif scorer is not None and config.rescore:
                groups = score_candidates(given, tokenizer, scorer)
            else:
                groups = given
            if config.kl_coef:
                settings: dict[str, Any] = {"kl_coef": config.kl_coef, "temperature": config.temperature}
                groups = penalize_distance(groups, tokenizer, policy, ref, micro_batch=size, **settings)
        return groups

    current = Values()
    with Guard(
        run,
        config,
        total,
        models={"model": (policy, tokenizer)},
        parts={"optimizer": optimizer, "current": current},
        constants={
            "data": task,
            "candidates": provided,
            "tokenizer": tokenizer,
            "reference": ref,
            "scorer": scorer,
        },
        checkpoint=checkpoint,
    ) as guard:
        candidates = [Candidates(**each) for each in current.get("candidates", [])]
        if guard.step == 0:
            run.log(0, evaluator.metrics(policy, tokenizer, run))
        for step in guard.steps("rrhf"):
            number, place = divmod(step - 1, per_round)
            if place == 0:
                candidates = round_candidates(number)
                current["candidates"] = [asdict(each) for each in candidates]
            epoch, position = divmod(place, per_round // config.epochs)
            order = epoch_order(len(candidates), config.seed, 1000 * number + epoch)
            groups = [candidates[i] for i in order[position * config.batch_size : (position + 1) * config.batch_size]]
            factor = schedule(step - 1, total, warmup=config.warmup, kind=config.lr_scheduler)
            set_learning_rate(optimizer, config.learning_rate * factor)
            metrics = {"lr": config.learning_rate * factor}
            with guard.attempt(candidates=groups), run.timer("train"):
                check_finite(score=torch.tensor([score for group in groups for score in group.scores]))
                metrics |= {"objective/scores": mean_score(groups), **source_metrics(groups)}
                metrics |= update(policy, tokenizer, optimizer, groups, config)
            if step == total or (config.eval_every and step % config.eval_every == 0):
                metrics |= evaluator.metrics(policy, tokenizer, run)
            guard.log(metrics, "loss", "accuracy")
            if watch_gold(run, policy, tokenizer, config.stop_on_gold):
                guard.total = step
    run.save_model(policy, tokenizer)
    return run.finish({"steps": guard.total, **overoptimization(run.folder)})

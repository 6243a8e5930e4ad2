"""PPO with a critic: sparse or dense rewards, KL penalty in the reward, one process.

One step, in this order: sample → score (missing-EOS penalty) → old and reference log-probabilities, values → rewards
and advantages (`rk.rollout_advantages`) → epochs of minibatches (`rk.ppo_loss`) → KL controller.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import CommonConfig, UserError, option
from .credit import KINDS, credit_weights, last_attention_row
from .data import Batch, Task, decode_tokens, epoch_order, load_task
from .evaluate import Evaluator, Judges, eval_prompts
from .model import load_policy, load_reward_model, response_logprobs, scores, values, zero_head
from .rollout import Rollout, generate
from .run import Run, resolve_device, rng_state, seed_everything, set_rng_state
from .schedule import schedule

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

MIN_SEQUENCE_KL = -1.0  # nats: below it the estimate says that scoring and sampling disagree


@dataclass(frozen=True, kw_only=True)
class PpoConfig(CommonConfig):
    init: str = option(MISSING, "start policy: run folder, model folder or hub name")
    rm: str = option(MISSING, "reward model: run folder, model folder or hub name")
    ref: str | None = option(None, "reference policy of the KL penalty; --init unless given")
    data: str = option("reviews", '"reviews", a folder or a file: gives the prompts and the gold judge')
    steps: int = option(25, "rollouts, each followed by its updates")
    batch_size: int = option(128, "responses sampled a step, one a prompt")
    num_ppo_epochs: int = option(4, "passes over each rollout")
    num_mini_batches: int = option(2, "optimiser steps in a pass")
    micro_batch: int | None = option(None, "rows through a model at a time; all of a minibatch unless given")
    response_length: int | None = option(None, "tokens a response may have; the task's own unless given")
    temperature: float = option(1.0, "sampling temperature; the same one scores the tokens")
    learning_rate: float = option(2e-4, "policy's peak learning rate, falling linearly to 0; pretrained: about 3e-6")
    value_learning_rate: float | None = option(None, "the value model's; the policy's unless given")
    adam_eps: float = option(1e-5, "Adam's epsilon")
    max_grad_norm: float = option(1.0, "gradient norm at which each model's gradient is clipped")
    reward_shaping: str = option("terminal", "how the score is spread over the tokens", choices=KINDS)
    beta: float = option(0.8, "share of the score that is spread, 0 to 1; the rest stays on the last token")
    missing_eos_penalty: float = option(1.0, "subtracted from the score of a response that was cut off; not spread")
    kl_coef: float = option(0.05, "weight of the KL penalty in the reward")
    kl_estimator: str = option("k1", "estimate of the KL in the reward", choices=("k1", "k2", "k3", "abs", "pos"))
    kl_control: str = option("fixed", "adaptive moves kl_coef towards kl_target", choices=("fixed", "adaptive"))
    kl_target: float = option(6.0, "target of the adaptive control: nats a response, summed over its tokens")
    kl_horizon: float = option(10_000.0, "responses over which the adaptive control may change kl_coef e-fold")
    cliprange: float = option(0.2, "the ratio's lower bound is 1 − cliprange")
    cliprange_high: float | None = option(None, "the ratio's upper bound is 1 + cliprange_high; cliprange unless given")
    cliprange_value: float = option(0.2, "how far a value may move from its old one")
    dual_clip: float | None = option(None, "bound of the ratio for negative advantages, greater than 1")
    vf_coef: float = option(0.1, "weight of the value loss")
    gamma: float = option(1.0, "discount, 0 to 1")
    lam: float = option(0.95, "λ of GAE, 0 to 1")
    whiten_advantages: bool = option(True, "whiten the advantages over the rollout")
    value_init: str = option("rm", "weights the value model starts from; its head starts at 0", choices=("rm", "init"))
    eval_every: int = option(5, "steps between evaluations on held-out prompts; 0 for only the first and the last")
    eval_samples: int = option(128, "responses in an evaluation")
    num_samples: int = option(8, "held-out responses whose credit is written to samples.jsonl at the end")
    save_steps: int = option(0, "steps between checkpoints; 0 for none")
    save_total_limit: int = option(2, "checkpoints to keep")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.batch_size % self.num_mini_batches:
            raise UserError(
                f"batch_size must be a multiple of num_mini_batches {self.num_mini_batches}, got {self.batch_size}"
            )
        if self.missing_eos_penalty < 0:
            raise UserError(f"missing_eos_penalty is subtracted and must be at least 0, got {self.missing_eos_penalty}")


@dataclass
class Models:
    """policy and value train; ref and reward_model are constants. All share one tokenizer."""

    policy: PreTrainedModel
    value: PreTrainedModel
    ref: PreTrainedModel
    reward_model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


@dataclass
class Experience:
    """A rollout and what was worked out about it once, before the updates. Per-token tensors are [B, T]."""

    rollout: Rollout
    scores: Tensor  # [B], penalty included
    old_logprobs: Tensor
    old_values: Tensor
    entropy: Tensor
    advantages: Tensor
    returns: Tensor
    rewards: Tensor
    kl: Tensor

    @property
    def batch(self) -> Batch:
        return self.rollout.batch


# ------------------------------------------------------------------------------------------------------- experience


@torch.no_grad()
def make_experience(models: Models, rollout: Rollout, config: PpoConfig, kl_coef: float, run: Run) -> Experience:
    """Score a rollout and turn the scores into advantages."""
    batch, size = rollout.batch, config.micro_batch
    with run.timer("score"):
        reward, attention = score_rollout(models, rollout, config)
    with run.timer("logprobs"):
        old_logprobs, entropy = response_logprobs(
            models.policy, batch, config.temperature, entropy=True, micro_batch=size
        )
        ref_logprobs = response_logprobs(models.ref, batch, config.temperature, micro_batch=size)
    with run.timer("values"):
        old_values = torch.cat([values(models.value, part) for part in batch.split(size)])
    with run.timer("advantages"):
        advantages, returns, rewards, kl = rk.rollout_advantages(
            reward,
            old_logprobs,
            ref_logprobs,
            attention,
            old_values,
            batch.mask,
            kl_coef=kl_coef,
            beta=config.beta,
            gamma=config.gamma,
            lam=config.lam,
            kl_estimator=config.kl_estimator,
            whiten=config.whiten_advantages,
        )
    return Experience(rollout, reward, old_logprobs, old_values, entropy, advantages, returns, rewards, kl)


def score_rollout(models: Models, rollout: Rollout, config: PpoConfig) -> tuple[Tensor, Tensor | None]:
    """(scores [B] with the missing-EOS penalty, attention [B, T] that spreads them or None)."""
    batch, row = rollout.batch, None
    if config.reward_shaping == "abc":
        score, row = last_attention_row(
            models.reward_model, batch.tokens, batch.attention_mask, micro_batch=config.micro_batch
        )
    else:
        score = scores(models.reward_model, batch.tokens, batch.attention_mask, micro_batch=config.micro_batch)
    attention = credit_weights(config.reward_shaping, batch, attention_row=row, policy=models.policy)
    if config.missing_eos_penalty:
        score = torch.where(rollout.terminated, score, score - config.missing_eos_penalty)
        if attention is not None:
            # A penalty belongs to the token that was not an EOS, so a cut-off response keeps its score in one place.
            last = batch.mask.cumsum(1) == batch.mask.sum(1, keepdim=True)
            attention = torch.where(rollout.terminated[:, None], attention, (last & batch.mask).to(attention.dtype))
    return score, attention


def check_kl(sequence_kl: float, config: PpoConfig) -> None:
    """The alarm for a penalty that has turned into a reward."""
    if config.kl_estimator == "k1" and sequence_kl < MIN_SEQUENCE_KL:
        raise UserError(
            f"the mean KL of the policy to the reference is {sequence_kl:.2f} nats a response, and a KL is never "
            "negative: the tokens were not sampled from the distribution that scores them. Usual causes: a temperature "
            "other than the sampler's, top-k or top-p, a minimum length that suppresses EOS, dropout, a wrong "
            "attention mask. The last checkpoint and model are as they were."
        )


def adapt_kl_coef(kl_coef: float, sequence_kl: float, config: PpoConfig) -> float:
    """Ziegler et al. 2019 (arXiv 1909.08593): a proportional controller, its error clipped to ±0.2."""
    if config.kl_control == "fixed":
        return kl_coef
    error = min(max(sequence_kl / config.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * config.batch_size / config.kl_horizon)


# ---------------------------------------------------------------------------------------------------------- updates


def update(
    models: Models, optimizer: torch.optim.Optimizer, experience: Experience, config: PpoConfig
) -> dict[str, float]:
    """The epochs of minibatches over one rollout; returns the statistics averaged over all minibatches.

    Raises UserError if the first minibatch, whose policy is still the one that sampled, has a ratio other than one.
    """
    history: list[dict[str, Tensor]] = []
    for _ in range(config.num_ppo_epochs):
        order = torch.randperm(len(experience.batch))
        for index in order.chunk(config.num_mini_batches):
            optimizer.zero_grad(set_to_none=True)
            stats = minibatch_backward(models, experience, index, config, check_ratio=not history)
            for model in (models.policy, models.value):
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            history.append(stats)
    means = {name: torch.stack([stats[name] for stats in history]).mean().item() for name in history[0]}
    means["ratio_max"] = max(stats["ratio_max"].item() for stats in history)
    ratios = torch.stack([stats["ratio_mean"] for stats in history])
    return means | {"ratio_var": ratios.var(unbiased=False).item()}


def minibatch_backward(
    models: Models, experience: Experience, index: Tensor, config: PpoConfig, *, check_ratio: bool = False
) -> dict[str, Tensor]:
    """Gradients of one minibatch, micro-batch by micro-batch, all divided by the minibatch's number of tokens."""
    index = index.to(experience.batch.mask.device)
    normalizer = experience.batch.mask[index].sum().clamp(min=1).float()
    parts: list[tuple[Any, Tensor]] = []
    for rows in index.split(config.micro_batch or len(index)):
        batch = experience.batch.rows(rows)
        logprobs, entropy = response_logprobs(models.policy, batch, config.temperature, entropy=True)
        old_logprobs = experience.old_logprobs[rows]
        if check_ratio:
            check_ratio_is_one(logprobs.detach() - old_logprobs, batch.mask, models.policy.dtype)
        loss, stats = rk.ppo_loss(
            logprobs,
            old_logprobs,
            experience.advantages[rows],
            values(models.value, batch),
            experience.old_values[rows],
            experience.returns[rows],
            batch.mask,
            cliprange=config.cliprange,
            cliprange_high=config.cliprange_high,
            cliprange_value=config.cliprange_value,
            vf_coef=config.vf_coef,
            dual_clip=config.dual_clip,
            normalizer=normalizer,
        )
        if not math.isfinite(loss.item()):
            raise UserError(f"the loss is {loss.item()}; the last checkpoint and model are as they were")
        loss.backward()
        parts.append((stats, rk.masked_mean(entropy.detach(), batch.mask)))
    return combine(parts)


def combine(parts: list[tuple[Any, Tensor]]) -> dict[str, Tensor]:
    """The statistics of a minibatch from those of its micro-batches: sums add up, means weigh by tokens."""
    weights = torch.stack([stats.tokens for stats, _ in parts])
    weights = weights / weights.sum().clamp(min=1)
    combined = {}
    for name in parts[0][0]._fields:
        column = torch.stack([getattr(stats, name) for stats, _ in parts])
        if name in ("policy_loss", "value_loss", "tokens"):
            combined[name] = column.sum()
        else:
            combined[name] = column.max() if name == "ratio_max" else (weights * column).sum()
    combined["entropy"] = (weights * torch.stack([entropy for _, entropy in parts])).sum()
    return combined


def check_ratio_is_one(log_ratio: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
    """Before the first update the policy is the one that sampled: a ratio other than 1 is a mistake, not learning."""
    largest = torch.where(mask, log_ratio.abs(), 0).max().item()
    # A minibatch rounds its matrix products otherwise than the rollout did; in bf16 that alone is percents.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    if not largest < tolerance:
        raise UserError(
            f"the ratio of the first minibatch must be 1 to {tolerance:g}, got a log-ratio of {largest:.2g}: the "
            "policy that is trained does not give the log-probabilities of the one that sampled (dropout, another "
            "dtype, padding or temperature)"
        )


# -------------------------------------------------------------------------------------------------------------- main


def main(config: PpoConfig) -> Path:
    """Train and return the run folder: model/, value/, metrics.jsonl, samples.jsonl."""
    run = Run.create(config.out, "ppo", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = load_task(config.data, config.seed)
    response_length = config.response_length or task.response_length
    models, optimizer, start, kl_coef = prepare(run, config)
    evaluator = Evaluator.of(config, task, Judges(models.ref, models.reward_model, task.gold))

    if start == 0:
        run.log(0, evaluator.metrics(models.policy, models.tokenizer, run))
    with run.progress(config.steps, f"ppo {config.reward_shaping}", initial=start) as progress:
        for step in range(start + 1, config.steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(step - 1, config.steps, warmup=0.0, kind="linear")
            prompts = step_prompts(task, config, step)
            with run.timer("generate"):
                rollout = generate(
                    models.policy,
                    models.tokenizer,
                    prompts,
                    response_length=response_length,
                    temperature=config.temperature,
                    micro_batch=config.micro_batch,
                )
            experience = make_experience(models, rollout, config, kl_coef, run)
            metrics = rollout_metrics(experience, kl_coef)
            check_kl(metrics["objective/kl"], config)
            with run.timer("train"):
                stats = update(models, optimizer, experience, config)
            kl_coef = adapt_kl_coef(kl_coef, metrics["objective/kl"], config)
            metrics |= update_metrics(stats) | {
                "lr": optimizer.param_groups[0]["lr"],
                "episode": step * config.batch_size,
            }
            if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                metrics |= evaluator.metrics(models.policy, models.tokenizer, run)
            run.log(step, metrics)
            progress.update(1)
            progress.set_postfix(score=metrics["objective/scores"], kl=metrics["objective/kl"])
            if config.save_steps and step % config.save_steps == 0 and step < config.steps:
                save_checkpoint(run, models, optimizer, step, kl_coef)
    for record in credit_samples(models, task, config, response_length, config.steps, kl_coef, run):
        run.sample(record)
    run.save_model(models.policy, models.tokenizer)
    run.save_model(models.value, models.tokenizer, "value")
    return run.finish({"kl_coef": kl_coef, "steps": config.steps})


def prepare(run: Run, config: PpoConfig) -> tuple[Models, torch.optim.Optimizer, int, float]:
    """Models and optimiser, fresh or as the last checkpoint left them, the step they are at and the KL coefficient."""
    device = resolve_device(config.device)
    checkpoint = run.load_checkpoint() if config.resume else None
    folder = checkpoint[1] if checkpoint else None
    where: dict[str, Any] = {"device": device, "dtype": config.dtype}
    policy, tokenizer = load_policy(str(folder / "model") if folder else config.init, **where)
    ref, _ = load_policy(config.ref or config.init, **where)
    reward_model, rm_tokenizer = load_reward_model(config.rm, **where)
    if rm_tokenizer.get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"policy {config.init} and reward model {config.rm} must share a tokenizer: the reward model scores the "
            f"policy's tokens (rlhf_kernels.align_credit carries credit between tokenizers)"
        )
    if folder:
        value, _ = load_reward_model(str(folder / "value"), **where)
    else:
        value, _ = load_reward_model(config.rm if config.value_init == "rm" else config.init, **where)
        zero_head(value)
        value.config.score_mean, value.config.score_std = 0.0, 1.0
    for frozen in (ref, reward_model):
        frozen.requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [
            {"params": list(policy.parameters()), "peak": config.learning_rate},
            {"params": list(value.parameters()), "peak": config.value_learning_rate or config.learning_rate},
        ],
        lr=config.learning_rate,
        eps=config.adam_eps,
        weight_decay=0.0,
    )
    start, kl_coef = 0, config.kl_coef
    if checkpoint:
        start, _, state = checkpoint
        optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])
        kl_coef = state["kl_coef"]
    return Models(policy, value, ref, reward_model, tokenizer), optimizer, start, kl_coef


def save_checkpoint(run: Run, models: Models, optimizer: torch.optim.Optimizer, step: int, kl_coef: float) -> None:
    folders = {"model": (models.policy, models.tokenizer), "value": (models.value, models.tokenizer)}
    state = {"optimizer": optimizer.state_dict(), "rng": rng_state(), "kl_coef": kl_coef}
    run.save_checkpoint(step, folders, state)


def step_prompts(task: Task, config: PpoConfig, step: int) -> list[str]:
    """The prompts of a step, a function of (seed, step): a resumed run goes on where it was."""
    if not task.prompts:
        raise UserError(f"{config.data}: the data has no prompts to sample from")
    first, chosen = (step - 1) * config.batch_size, []
    order: dict[int, list[int]] = {}
    for position in range(first, first + config.batch_size):
        epoch, place = divmod(position, len(task.prompts))
        order.setdefault(epoch, epoch_order(len(task.prompts), config.seed, epoch))
        chosen.append(task.prompts[order[epoch][place]])
    return chosen


# ----------------------------------------------------------------------------------------------- metrics and samples


def rollout_metrics(experience: Experience, kl_coef: float) -> dict[str, float]:
    """What is known of a rollout before its updates; sums run over the tokens of a response, means over responses."""
    mask = experience.batch.mask
    kl, entropy = experience.kl.sum(1).mean(), experience.entropy.sum(1).mean()
    return {
        "objective/kl": kl.item(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": entropy.item(),
        "objective/scores": experience.scores.mean().item(),
        "objective/scores_std": experience.scores.std(unbiased=False).item(),
        "objective/non_score_reward": -kl_coef * kl.item(),
        "objective/rlhf_reward": experience.rewards.sum(1).mean().item(),
        "policy/entropy_avg": rk.masked_mean(experience.entropy, mask).item(),
        "ppo/returns/mean": rk.masked_mean(experience.returns, mask).item(),
        "val/num_eos_tokens": experience.rollout.terminated.sum().item(),
        "tokens/mean_length": mask.sum(1).float().mean().item(),
    }


def update_metrics(stats: dict[str, float]) -> dict[str, float]:
    return {
        "loss/policy_avg": stats["policy_loss"],
        "loss/value_avg": stats["value_loss"],
        "policy/approxkl_avg": stats["approx_kl"],
        "policy/clipfrac_avg": stats["clipfrac_high"] + stats["clipfrac_low"],
        "policy/clipfrac_high": stats["clipfrac_high"],
        "policy/clipfrac_low": stats["clipfrac_low"],
        "val/clipfrac_avg": stats["clipfrac_value"],
        "val/ratio": stats["ratio_mean"],
        "val/ratio_var": stats["ratio_var"],
        "val/ratio_max": stats["ratio_max"],
        "ppo/val/var_explained": stats["explained_variance"],
    }


def credit_samples(
    models: Models, task: Task, config: PpoConfig, response_length: int, step: int, kl_coef: float, run: Run
) -> Iterator[dict[str, Any]]:
    """Records for samples.jsonl: held-out responses with what each token got of the score and of the reward."""
    prompts = eval_prompts(task.eval_prompts, config.num_samples) if config.num_samples else []
    if not prompts:
        return
    rollout = generate(
        models.policy,
        models.tokenizer,
        prompts,
        response_length=response_length,
        temperature=config.temperature,
        micro_batch=config.micro_batch,
    )
    experience = make_experience(models, rollout, config, kl_coef, run)
    credit = experience.rewards + kl_coef * experience.kl
    gold = task.gold(rollout.prompts, rollout.responses) if task.gold else [None] * len(prompts)
    for row, prompt in enumerate(prompts):
        mask = rollout.batch.mask[row]
        yield {
            "step": step,
            "prompt": prompt,
            "tokens": decode_tokens(models.tokenizer, rollout.batch.responses[row][mask].tolist()),
            "credit": credit[row][mask].tolist(),
            "rewards": experience.rewards[row][mask].tolist(),
            "score": experience.scores[row].item(),
            "gold": gold[row],
        }

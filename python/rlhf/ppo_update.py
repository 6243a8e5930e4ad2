"""The updates of PPO: passes over one rollout in minibatches, each minibatch in micro-batches."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import UserError
from .data import Batch
from .experience import Experience, Models
from .feedback_loss import FeedbackTerm
from .guard import check_finite
from .kl_penalty import kl_penalty
from .lora import trainable
from .model import head_scores, policy_ref_logprobs, response_logprobs, trunk_states, values
from .policy_losses import Weights, policy_loss, token_weights, value_loss
from .ppo_config import PpoConfig
from .ptx import Demonstrations

Stats = dict[str, Tensor]

SUMS = ("policy_loss", "value_loss", "kl_loss", "tokens")
MAXIMA = ("ratio_max",)


def update(
    models: Models,
    optimizer: torch.optim.Optimizer,
    experience: Experience,
    config: PpoConfig,
    kl_coef: float,
    *,
    demonstrations: Demonstrations | None = None,
    feedback: FeedbackTerm | None = None,
    step: int = 1,
) -> dict[str, float]:
    """The passes over one rollout; returns the statistics averaged over all minibatches, and the number of `passes`.

    demonstrations: what config.ptx_coef weighs. feedback: marked responses, one more loss. Which of either are taken is
    a function of `step`, the rollout's number from 1.

    Raises UserError if the first minibatch, whose policy is still the one that sampled, has a ratio other than one, and
    NonFinite before a minibatch whose loss or gradient is not finite would change the weights.
    """
    history: list[Stats] = []
    first = (step - 1) * config.num_ppo_epochs * config.num_mini_batches
    passes = 0
    while passes < config.num_ppo_epochs:
        order = torch.randperm(len(experience.batch))
        for index in order.chunk(config.num_mini_batches):
            optimizer.zero_grad(set_to_none=True)
            stats = minibatch_backward(models, experience, index, config, kl_coef, check_ratio=not history)
            if demonstrations is not None:
                stats["ptx_loss"] = demonstrations.backward(
                    models.policy, first + len(history), config.ptx_coef, micro_batch=config.micro_batch
                )
            if feedback is not None:
                stats["token_feedback_loss"] = feedback.backward(models.policy, first + len(history))
            norms = {
                f"gradient_of_{name}": torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm or math.inf)
                for name, parameters in trained_parameters(models).items()
            }
            check_finite(**{name: stats[name] for name in stats if name.endswith("_loss")}, **norms)
            optimizer.step()
            history.append(stats)
        passes += 1
        moved = torch.stack([stats["k1"] for stats in history[-config.num_mini_batches :]]).mean()
        if config.early_stop_kl is not None and moved > config.early_stop_kl:
            break
    means = {name: torch.stack([stats[name] for stats in history]).mean().item() for name in history[0]}
    means["ratio_max"] = max(stats["ratio_max"].item() for stats in history)
    ratios = torch.stack([stats["ratio_mean"] for stats in history])
    return means | {"ratio_var": ratios.var(unbiased=False).item(), "passes": passes}


def trained_parameters(models: Models) -> dict[str, list[torch.nn.Parameter]]:
    """The parameters of the policy and of the value model; of a head on the policy's trunk its own alone."""
    policy = trainable(models.policy)
    if models.value is None:
        return {"policy": policy}
    known = set(policy)
    return {"policy": policy, "value": [each for each in trainable(models.value) if each not in known]}


def minibatch_backward(
    models: Models,
    experience: Experience,
    index: Tensor,
    config: PpoConfig,
    kl_coef: float,
    *,
    check_ratio: bool = False,
) -> Stats:
    """Gradients of one minibatch, micro-batch by micro-batch, under the weights of the whole minibatch."""
    index = index.to(experience.mask.device)
    length = config.loss_length or experience.rollout.response_length
    weights = token_weights(config.aggregation, experience.mask[index], length, experience.value_mask[index])
    advantages, returns = experience.targets(index, config)
    parts = []
    for place in torch.arange(len(index), device=index.device).split(config.micro_batch or len(index)):
        rows, part = index[place], Weights(weights.rows[place], weights.values)
        loss, stats = rows_loss(
            models,
            experience,
            rows,
            advantages[place],
            returns[place],
            part,
            config,
            kl_coef,
            check_ratio=check_ratio,
        )
        loss.backward()
        if models.value is not None and not shares_trunk(models):
            # One model after the other: the policy's activations are gone before the value model makes its own.
            found = values(models.value, experience.batch.rows(rows))
            loss, of_value = rows_value_loss(found, experience, rows, returns[place], part, config)
            loss.backward()
            stats |= of_value
        parts.append(stats)
    return combine(parts)


def rows_loss(
    models: Models,
    experience: Experience,
    rows: Tensor,
    advantages: Tensor,
    returns: Tensor,
    weights: Weights,
    config: PpoConfig,
    kl_coef: float,
    *,
    check_ratio: bool = False,
) -> tuple[Tensor, Stats]:
    """The policy's loss of some rows, and its statistics:

    policy_loss + kl_coef · Σ w·KL (with the KL in the loss) − entropy_coef · Σ w·entropy, and the value loss where the
    value head stands on the policy's trunk
    """
    batch, mask, old_logprobs = experience.batch.rows(rows), experience.mask[rows], experience.old_logprobs[rows]
    logprobs, entropy, found, full = forward(models, batch, config)
    if check_ratio:
        check_ratio_is_one(logprobs.detach() - old_logprobs, batch.mask, models.policy.dtype)
    loss, stats = policy_loss(config.policy_loss, logprobs, old_logprobs, advantages, mask, weights.rows, config.clips)
    stats["entropy"] = rk.masked_mean(entropy.detach(), mask)
    if found is not None:
        value, of_value = rows_value_loss(found, experience, rows, returns, weights, config)
        loss, stats = loss + value, stats | of_value
    if config.kl_in == "loss":
        kl = kl_penalty(
            config.kl_estimator,
            logprobs,
            experience.ref_logprobs[rows],
            mask,
            old_logprobs=old_logprobs,
            full=full,
            clip=config.kl_clip,
        )
        penalty = (weights.rows[:, None] * kl).sum()
        loss = loss + kl_coef * penalty
        stats["kl_loss"] = penalty.detach()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (weights.rows[:, None] * torch.where(mask, entropy, 0)).sum()
    return loss, stats


def rows_value_loss(
    found: Tensor, experience: Experience, rows: Tensor, returns: Tensor, weights: Weights, config: PpoConfig
) -> tuple[Tensor, Stats]:
    """vf_coef · value_loss of some rows whose values are `found` [B, T+1], and its statistics."""
    loss, stats = value_loss(
        found,
        experience.parts.values[rows],
        returns,
        experience.value_mask[rows],
        weights.values,
        config.cliprange_value,
    )
    return config.vf_coef * loss, stats


def shares_trunk(models: Models) -> bool:
    return models.value is not None and models.value.base_model is models.policy.base_model


def forward(models: Models, batch: Batch, config: PpoConfig) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(logprobs [B, T], entropy [B, T], values [B, T+1] or None, exact KL [B, T] or None), differentiable.

    The values are those of a head on the policy's trunk, from the policy's own pass. The KL is there where the loss
    has it.
    """
    full = None
    with trunk_states(models.policy) as states:
        if config.kl_in == "loss" and config.kl_estimator == "full":
            logprobs, _, entropy, full = policy_ref_logprobs(models.policy, models.ref, batch, config.temperature)
        else:
            logprobs, entropy = response_logprobs(models.policy, batch, config.temperature, entropy=True)
    found = None
    if models.value is not None and shares_trunk(models):
        found = head_scores(models.value, states[-1][:, batch.prompt_width - 1 :], normalized=False)
    return logprobs, entropy, found, full


def combine(parts: list[Stats]) -> Stats:
    """The statistics of a minibatch from those of its micro-batches: sums add up, means weigh by tokens."""
    weights = torch.stack([stats["tokens"] for stats in parts]).float()
    weights = weights / weights.sum().clamp(min=1)
    combined = {}
    for name in parts[0]:
        column = torch.stack([stats[name] for stats in parts])
        if name in SUMS:
            combined[name] = column.sum()
        else:
            combined[name] = column.max() if name in MAXIMA else (weights * column).sum()
    return combined


def check_ratio_is_one(log_ratio: Tensor, mask: Tensor, dtype: torch.dtype) -> None:
    """Before the first update the policy is the one that sampled: a ratio other than 1 is a mistake, not learning."""
    largest = torch.where(mask, log_ratio.abs(), 0).max().item()
    # A minibatch rounds its matrix products otherwise than the rollout did; in bf16 that alone is percents.
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    if not largest < tolerance:
        raise UserError(
            f"the ratio of the first minibatch must be 1 to {tolerance:g}, got a log-ratio of {largest:.2g}: the "
            "policy that is trained does not give the log-probabilities of the one that sampled; rlhf/RATIO.md has the "
            "usual causes (dropout, another dtype, padding, temperature) and how to tell them apart"
        )


METRICS = {
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
    "kl_loss": "loss/kl_avg",
    "ptx_loss": "loss/ptx_avg",
    "token_feedback_loss": "loss/token_feedback_avg",
    "approx_kl": "policy/approxkl_avg",
    "k1": "policy/k1_avg",
    "k3": "policy/k3_avg",
    "clipfrac_high": "policy/clipfrac_high",
    "clipfrac_low": "policy/clipfrac_low",
    "clipfrac_dual": "policy/clipfrac_dual",
    "clipfrac_ratio": "policy/clipfrac_ratio",
    "clipfrac_value": "val/clipfrac_avg",
    "ratio_mean": "val/ratio",
    "ratio_var": "val/ratio_var",
    "ratio_max": "val/ratio_max",
    "explained_variance": "ppo/val/var_explained",
    "passes": "ppo/passes",
}
"""The names of the updates' statistics in metrics.jsonl: TRL's where it has one."""


def update_metrics(stats: dict[str, float]) -> dict[str, float]:
    named = {METRICS[name]: value for name, value in stats.items() if name in METRICS}
    return named | {"policy/clipfrac_avg": stats["clipfrac_high"] + stats["clipfrac_low"]}

"""The updates of PPO: passes over one rollout in minibatches, each minibatch in micro-batches."""

from __future__ import annotations

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import UserError
from .experience import Experience, Models
from .guard import check_finite
from .kl_penalty import kl_penalty
from .model import policy_ref_logprobs, response_logprobs, values
from .policy_losses import Weights, policy_loss, token_weights, value_loss
from .ppo_config import PpoConfig

Stats = dict[str, Tensor]

SUMS = ("policy_loss", "value_loss", "kl_loss", "tokens")
MAXIMA = ("ratio_max",)


def update(
    models: Models, optimizer: torch.optim.Optimizer, experience: Experience, config: PpoConfig, kl_coef: float
) -> dict[str, float]:
    """The passes over one rollout; returns the statistics averaged over all minibatches, and the number of `passes`.

    Raises UserError if the first minibatch, whose policy is still the one that sampled, has a ratio other than one, and
    NonFinite before a minibatch whose loss or gradient is not finite would change the weights.
    """
    history: list[Stats] = []
    passes = 0
    while passes < config.num_ppo_epochs:
        order = torch.randperm(len(experience.batch))
        for index in order.chunk(config.num_mini_batches):
            optimizer.zero_grad(set_to_none=True)
            stats = minibatch_backward(models, experience, index, config, kl_coef, check_ratio=not history)
            norms = [
                torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
                for model in (models.policy, models.value)
            ]
            check_finite(
                policy_loss=stats["policy_loss"],
                value_loss=stats["value_loss"],
                policy_gradient=norms[0],
                value_gradient=norms[1],
            )
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
    index = index.to(experience.batch.mask.device)
    length = config.loss_length or experience.rollout.response_length
    weights = token_weights(config.aggregation, experience.batch.mask[index], length)
    parts = []
    for place in torch.arange(len(index), device=index.device).split(config.micro_batch or len(index)):
        part = Weights(weights.rows[place], weights.values)
        rows = index[place]
        loss, stats = rows_loss(models, experience, rows, part, config, kl_coef, check_ratio=check_ratio)
        # One model after the other: the policy's activations are gone before the value model makes its own.
        loss.backward()
        loss, of_value = rows_value_loss(models, experience, rows, part, config)
        loss.backward()
        parts.append(stats | of_value)
    return combine(parts)


def rows_loss(
    models: Models,
    experience: Experience,
    rows: Tensor,
    weights: Weights,
    config: PpoConfig,
    kl_coef: float,
    *,
    check_ratio: bool = False,
) -> tuple[Tensor, Stats]:
    """The policy's loss of some rows, and its statistics:

    policy_loss + kl_coef · Σ w·KL (with the KL in the loss) − entropy_coef · Σ w·entropy
    """
    batch, old_logprobs = experience.batch.rows(rows), experience.old_logprobs[rows]
    full = None
    if config.kl_in == "loss" and config.kl_estimator == "full":
        logprobs, _, entropy, full = policy_ref_logprobs(models.policy, models.ref, batch, config.temperature)
    else:
        logprobs, entropy = response_logprobs(models.policy, batch, config.temperature, entropy=True)
    if check_ratio:
        check_ratio_is_one(logprobs.detach() - old_logprobs, batch.mask, models.policy.dtype)
    loss, stats = policy_loss(
        config.policy_loss,
        logprobs,
        old_logprobs,
        experience.advantages[rows],
        batch.mask,
        weights.rows,
        config.clips,
    )
    stats["entropy"] = rk.masked_mean(entropy.detach(), batch.mask)
    if config.kl_in == "loss":
        kl = kl_penalty(
            config.kl_estimator,
            logprobs,
            experience.ref_logprobs[rows],
            batch.mask,
            old_logprobs=old_logprobs,
            full=full,
            clip=config.kl_clip,
        )
        penalty = (weights.rows[:, None] * kl).sum()
        loss = loss + kl_coef * penalty
        stats["kl_loss"] = penalty.detach()
    if config.entropy_coef:
        loss = loss - config.entropy_coef * (weights.rows[:, None] * torch.where(batch.mask, entropy, 0)).sum()
    return loss, stats


def rows_value_loss(
    models: Models, experience: Experience, rows: Tensor, weights: Weights, config: PpoConfig
) -> tuple[Tensor, Stats]:
    """vf_coef · value_loss of some rows, and its statistics."""
    batch = experience.batch.rows(rows)
    loss, stats = value_loss(
        values(models.value, batch),
        experience.old_values[rows],
        experience.returns[rows],
        batch.mask,
        weights.values,
        config.cliprange_value,
    )
    return config.vf_coef * loss, stats


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
            "policy that is trained does not give the log-probabilities of the one that sampled (dropout, another "
            "dtype, padding or temperature)"
        )


METRICS = {
    "policy_loss": "loss/policy_avg",
    "value_loss": "loss/value_avg",
    "kl_loss": "loss/kl_avg",
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

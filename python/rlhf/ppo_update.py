"""The updates of PPO: epochs of minibatches over one rollout, each minibatch in micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import UserError
from .experience import Experience, Models
from .guard import check_finite
from .model import response_logprobs, values
from .ppo_config import PpoConfig


def update(
    models: Models, optimizer: torch.optim.Optimizer, experience: Experience, config: PpoConfig
) -> dict[str, float]:
    """The epochs of minibatches over one rollout; returns the statistics averaged over all minibatches.

    Raises UserError if the first minibatch, whose policy is still the one that sampled, has a ratio other than one, and
    NonFinite before a minibatch whose loss or gradient is not finite would change the weights.
    """
    history: list[dict[str, Tensor]] = []
    for _ in range(config.num_ppo_epochs):
        order = torch.randperm(len(experience.batch))
        for index in order.chunk(config.num_mini_batches):
            optimizer.zero_grad(set_to_none=True)
            stats = minibatch_backward(models, experience, index, config, check_ratio=not history)
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

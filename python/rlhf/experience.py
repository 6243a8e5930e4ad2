"""From a rollout to advantages: scores, log-probabilities, values, rewards. Worked out once, before the updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .credit import credit_weights, last_attention_row
from .data import Batch
from .model import response_logprobs, scores, values
from .ppo_config import PpoConfig
from .rollout import Rollout
from .run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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


def rollout_record(experience: Experience, step: int) -> dict[str, Any]:
    """One line of rollouts.jsonl: what the means of a step hide. KL in nats, null at positions that no response has."""
    mask, kl = experience.batch.mask, experience.kl
    counts = mask.sum(0)
    by_position = torch.where(counts > 0, kl.sum(0) / counts.clamp(min=1), torch.nan)
    return {
        "step": step,
        "scores": experience.scores.tolist(),
        "lengths": mask.sum(1).tolist(),
        "terminated": experience.rollout.terminated.tolist(),
        "kl": kl.sum(1).tolist(),
        "kl_by_position": by_position.tolist(),
    }

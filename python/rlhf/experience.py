"""From a rollout to advantages: scores, log-probabilities, values, rewards. Worked out once, before the updates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import UserError
from .credit import credit_weights, last_attention_row
from .data import Batch
from .guard import check_finite
from .model import response_logprobs, scores, values
from .ppo_config import PpoConfig
from .rollout import Rollout
from .run import Run
from .scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Models:
    """policy and value train; ref and reward_model are constants. All share one tokenizer.

    scorer: what scores instead of the reward model, which is then None.
    """

    policy: PreTrainedModel
    value: PreTrainedModel
    ref: PreTrainedModel
    reward_model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer | None = None


@dataclass
class Experience:
    """A rollout and what was worked out about it once, before the updates. Per-token tensors are [B, T]."""

    rollout: Rollout
    scores: Tensor  # [B], penalty included; NaN where a response cannot be scored: its mask is all False then
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
    """Score a rollout and turn the scores into advantages. Raises NonFinite where one of them is NaN or infinite."""
    batch, size = rollout.batch, config.micro_batch
    with run.timer("score"):
        reward, attention, credit = score_rollout(models, rollout, config)
    if models.scorer is not None:  # it may leave responses unscored, which then count nowhere
        rollout = replace(rollout, batch=replace(batch, mask=batch.mask & ~reward.isnan()[:, None]))
        batch = rollout.batch
    else:
        check_finite(reward=reward)
    with run.timer("logprobs"):
        old_logprobs, entropy = response_logprobs(
            models.policy, batch, config.temperature, entropy=True, micro_batch=size
        )
        ref_logprobs = response_logprobs(models.ref, batch, config.temperature, micro_batch=size)
    with run.timer("values"):
        old_values = torch.cat([values(models.value, part) for part in batch.split(size)])
    with run.timer("advantages"):
        if credit is None:
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
        else:
            penalty, kl = rk.token_rewards(
                torch.zeros_like(reward),
                old_logprobs,
                ref_logprobs,
                None,
                batch.mask,
                kl_coef=kl_coef,
                beta=0.0,
                kl_estimator=config.kl_estimator,
            )
            rewards = torch.where(batch.mask, credit + penalty, 0)
            advantages, returns = rk.gae(rewards, old_values, batch.mask, gamma=config.gamma, lam=config.lam)
            if config.whiten_advantages:
                advantages = rk.masked_whiten(advantages, batch.mask)
    check_finite(log_probability=old_logprobs, advantage=advantages)
    return Experience(rollout, reward, old_logprobs, old_values, entropy, advantages, returns, rewards, kl)


def score_rollout(models: Models, rollout: Rollout, config: PpoConfig) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(scores [B] with the missing-EOS penalty, attention [B, T] that spreads them or None, credit [B, T] or None).

    Credit is what each token has of its score, where the scorer itself says so.
    """
    batch, row, credit = rollout.batch, None, None
    if models.scorer is not None:
        scored = models.scorer(rollout)
        score, credit = scored.scores, scored.credit
        if credit is not None and config.reward_shaping != "terminal":
            raise UserError(
                f"reward_fn says what each token is worth: reward_shaping must be terminal, got {config.reward_shaping}"
            )
    elif models.reward_model is None:
        raise ValueError("score_rollout: models must have a reward model or a scorer, got neither")
    elif config.reward_shaping == "abc":
        score, row = last_attention_row(
            models.reward_model, batch.tokens, batch.attention_mask, micro_batch=config.micro_batch
        )
    else:
        score = scores(models.reward_model, batch.tokens, batch.attention_mask, micro_batch=config.micro_batch)
    attention = credit_weights(config.reward_shaping, batch, attention_row=row, policy=models.policy)
    if config.missing_eos_penalty:
        score = torch.where(rollout.terminated, score, score - config.missing_eos_penalty)
        # A penalty belongs to the token that was not an EOS, so a cut-off response keeps its score in one place.
        last = batch.mask & (batch.mask.cumsum(1) == batch.mask.sum(1, keepdim=True))
        if attention is not None:
            attention = torch.where(rollout.terminated[:, None], attention, last.to(attention.dtype))
        if credit is not None:
            credit = torch.where(rollout.terminated[:, None] | ~last, credit, credit - config.missing_eos_penalty)
    return score, attention, credit


def rollout_metrics(experience: Experience, kl_coef: float) -> dict[str, float]:
    """What is known of a rollout before its updates; sums run over the tokens of a response, means over responses."""
    mask, scored = experience.batch.mask, ~experience.scores.isnan()
    score = experience.scores[scored]
    kl, entropy = experience.kl[scored].sum(1).mean(), experience.entropy[scored].sum(1).mean()
    return {
        "objective/kl": kl.item(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": entropy.item(),
        "objective/scores": score.mean().item(),
        "objective/scores_std": score.std(unbiased=False).item(),
        "objective/non_score_reward": -kl_coef * kl.item(),
        "objective/rlhf_reward": experience.rewards[scored].sum(1).mean().item(),
        "policy/entropy_avg": rk.masked_mean(experience.entropy, mask).item(),
        "ppo/returns/mean": rk.masked_mean(experience.returns, mask).item(),
        "val/num_eos_tokens": experience.rollout.terminated.sum().item(),
        "tokens/mean_length": mask[scored].sum(1).float().mean().item(),
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

"""From a rollout to advantages: scores, log-probabilities, values, rewards. Worked out once, before the updates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import UserError
from .credit import OF_REWARD_MODEL, token_scores
from .data import Batch
from .guard import check_finite
from .kl_penalty import kl_penalty
from .model import exact_kl, response_logprobs, values
from .ppo_config import PpoConfig
from .returns import total_return
from .rollout import Rollout
from .run import Run
from .scorer import RewardModelScorer, Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass
class Models:
    """policy, which the tokenizer belongs to, and value train; ref and reward_model are constants.

    scorer: what scores, the reward model or a function; reward_model is then None.
    """

    policy: PreTrainedModel
    value: PreTrainedModel
    ref: PreTrainedModel
    reward_model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer


@dataclass
class Experience:
    """A rollout and what was worked out about it once, before the updates. Per-token tensors are [B, T]."""

    rollout: Rollout
    scores: Tensor  # [B], penalty included; NaN where a response cannot be scored: its mask is all False then
    old_logprobs: Tensor
    ref_logprobs: Tensor
    old_values: Tensor
    entropy: Tensor
    advantages: Tensor
    returns: Tensor
    credit: Tensor  # what each token has of the score
    rewards: Tensor  # credit, and the KL penalty where it is part of the reward
    kl: Tensor

    @property
    def batch(self) -> Batch:
        return self.rollout.batch


@torch.no_grad()
def make_experience(models: Models, rollout: Rollout, config: PpoConfig, kl_coef: float, run: Run) -> Experience:
    """Score a rollout and turn the scores into advantages. Raises NonFinite where one of them is NaN or infinite."""
    batch, size = rollout.batch, config.micro_batch
    with run.timer("score"):
        reward, earned = score_rollout(models, rollout, config)
    if reward.isnan().any():  # a response that cannot be scored counts nowhere
        rollout = replace(rollout, batch=replace(batch, mask=batch.mask & ~reward.isnan()[:, None]))
        batch = rollout.batch
    with run.timer("logprobs"):
        full = None
        if config.kl_estimator == "full":
            old_logprobs, ref_logprobs, entropy, full = exact_kl(
                models.policy, models.ref, batch, config.temperature, micro_batch=size
            )
        else:
            old_logprobs, entropy = response_logprobs(
                models.policy, batch, config.temperature, entropy=True, micro_batch=size
            )
            ref_logprobs = response_logprobs(models.ref, batch, config.temperature, micro_batch=size)
        kl = kl_penalty(
            config.kl_estimator,
            old_logprobs,
            ref_logprobs,
            batch.mask,
            old_logprobs=old_logprobs,
            full=full,
            clip=config.kl_clip,
        )
    with run.timer("values"):
        old_values = torch.cat([values(models.value, part) for part in batch.split(size)])
    with run.timer("advantages"):
        credit = torch.where(batch.mask, earned, 0)
        rewards = credit - kl_coef * kl if config.kl_in == "reward" else credit
        advantages, returns = estimate(rewards, old_values, batch.mask, config)
    check_finite(log_probability=old_logprobs, advantage=advantages)
    return Experience(
        rollout=rollout,
        scores=reward,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        old_values=old_values,
        entropy=entropy,
        advantages=advantages,
        returns=returns,
        credit=credit,
        rewards=rewards,
        kl=kl,
    )


def score_rollout(models: Models, rollout: Rollout, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """(scores [B] with the missing-EOS penalty, what each token earns of them [B, T]); NaN where there is no score."""
    shaping, mask = config.shaping(), rollout.batch.mask
    if shaping.kind in OF_REWARD_MODEL:
        if not isinstance(models.scorer, RewardModelScorer):
            raise UserError(f"reward_shaping {shaping.kind} is what the reward model says, so it needs rm")
        scored = models.scorer.with_credit(rollout, shaping)
    else:
        scored = models.scorer(rollout)
    earned = token_scores(shaping, rollout, scored.scores, scored.credit, models.policy, micro_batch=config.micro_batch)
    # The penalty belongs to the token that was not an EOS, so it is not spread.
    penalty = torch.where(rollout.terminated, 0.0, config.missing_eos_penalty)
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    return scored.scores - penalty, torch.where(last, earned - penalty[:, None], earned)


def estimate(rewards: Tensor, old_values: Tensor, mask: Tensor, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """(advantages, returns), each [B, T], of rewards [B, T]."""
    if config.estimator == "gae":
        advantages, returns = rk.gae(rewards, old_values, mask, gamma=config.gamma, lam=config.lam)
    else:
        advantages, returns = total_return(rewards, old_values, mask, config.gamma)
    return rk.masked_whiten(advantages, mask) if config.whiten_advantages else advantages, returns


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
        "objective/non_score_reward": (experience.rewards - experience.credit)[scored].sum(1).mean().item(),
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

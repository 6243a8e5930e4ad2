"""From a rollout to advantages: scores, log-probabilities, values, rewards. Worked out once, before the updates."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .advantages import Rewards, advantages_and_returns, place_rewards, score_column, through, whiten
from .config import UserError
from .credit import OF_REWARD_MODEL, token_scores
from .data import Batch
from .guard import check_finite
from .kl_penalty import kl_penalty
from .model import exact_kl, response_logprobs, values
from .ppo_config import PpoConfig
from .rollout import Rollout, generate, given_rollout
from .run import Run
from .scorer import FunctionScorer, RewardModelScorer, Scorer
from .scores import ScoreNormalizer, missing_eos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


GREEDY = 1e-6
"""A temperature at which the likeliest token is all that is sampled."""


@dataclass
class Models:
    """policy, which the tokenizer belongs to, and value train; ref and reward_model are constants.

    value: None where the estimator needs none. scorer: what scores, the reward model or a function; reward_model is
    then None. normalizer: what the scores go through. references: prompt → reference response, for score_norm delta.
    token_scorer: what says beside the scorer what single tokens are worth.
    """

    policy: PreTrainedModel
    value: PreTrainedModel | None
    ref: PreTrainedModel
    reward_model: PreTrainedModel | None
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    normalizer: ScoreNormalizer = field(default_factory=ScoreNormalizer)
    references: dict[str, str] = field(default_factory=dict)
    token_scorer: FunctionScorer | None = None
    rm_tokenizer: PreTrainedTokenizerBase | None = None


@dataclass
class Experience:
    """A rollout and what was worked out about it once, before the updates. Per-token tensors are [B, T].

    scores: [B], after normalisation, clip and the missing-EOS rule; NaN where a response cannot be scored: the batch's
    mask is all False there. mask: the tokens that are trained. credit: what each token has of the score.
    parts: rewards and values [B, T+1], the KL penalty included where it is part of the reward. value_mask: [B, T+1],
    the places of the value loss. advantages, returns [B, T+1]: of the whole rollout.
    """

    rollout: Rollout
    scores: Tensor
    mask: Tensor
    old_logprobs: Tensor
    ref_logprobs: Tensor
    entropy: Tensor
    kl: Tensor
    credit: Tensor
    parts: Rewards
    value_mask: Tensor
    advantages: Tensor
    returns: Tensor

    @property
    def batch(self) -> Batch:
        return self.rollout.batch

    @property
    def rewards(self) -> Tensor:
        """[B, T]: of the tokens, without what a score_position puts after them."""
        return self.parts.tokens[:, : self.mask.shape[1]]

    def targets(self, index: Tensor, config: PpoConfig) -> tuple[Tensor, Tensor]:
        """(advantages, returns) of a minibatch, whitened over the rollout or, if asked, over itself."""
        if config.whiten_scope == "minibatch" and config.has_critic:
            return advantages_and_returns(self.parts.rows(index), config)
        advantages = self.advantages[index]
        if config.whiten_scope == "minibatch" and config.whitens_advantages:
            advantages = whiten(advantages, self.mask[index], config)
        return advantages, self.returns[index]


@torch.no_grad()
def make_experience(
    models: Models, rollout: Rollout, config: PpoConfig, kl_coef: float, run: Run, *, observe: bool = True
) -> Experience:
    """Score a rollout and turn the scores into advantages. Raises NonFinite where one of them is NaN or infinite.

    observe: let the scores into the statistics of a running score_norm.
    """
    batch, size = rollout.batch, config.micro_batch
    with run.timer("score"):
        score, credit = score_rollout(models, rollout, config, observe=observe)
        if models.token_scorer is not None:
            extra = config.token_reward_weight * token_rewards_of(models.token_scorer, rollout)
            score, credit = score + extra.sum(1), credit + extra
        baseline = greedy_scores(models, rollout, config) if config.estimator == "remax" else None
    if score.isnan().any():  # a response that cannot be scored counts nowhere
        rollout = replace(rollout, batch=replace(batch, mask=batch.mask & ~score.isnan()[:, None]))
        batch = rollout.batch
    with run.timer("logprobs"):
        old_logprobs, ref_logprobs, entropy, kl = policy_and_reference(models, batch, config)
    with run.timer("values"):
        old_values = torch.zeros(len(batch), batch.mask.shape[1] + 1, device=batch.mask.device)
        if models.value is not None:
            old_values = torch.cat([values(models.value, part) for part in batch.split(size)])
    with run.timer("advantages"):
        credit = torch.where(batch.mask, credit, 0)
        penalty = kl_coef * kl if config.kl_in == "reward" else torch.zeros_like(kl)
        pad_is_eos = models.tokenizer.pad_token_id == models.tokenizer.eos_token_id
        column = score_column(
            config.score_position, batch.mask, response_length=rollout.response_length, pad_is_eos=pad_is_eos
        )
        mask = batch.mask & rollout.terminated[:, None] if config.missing_eos == "mask" else batch.mask
        parts = Rewards(
            tokens=place_rewards(credit, penalty, column, config.score_position),
            values=old_values,
            mask=mask,
            counted=through(column, batch.mask),
            groups=torch.arange(len(batch), device=mask.device) // config.num_generations,
            bootstrap=bootstrap(old_values, rollout, config.gamma) if config.bootstrap_truncated else None,
            baseline=baseline,
        )
        whole = config.whiten_scope == "rollout" or config.has_critic
        advantages, returns = advantages_and_returns(
            parts, config if whole else replace(config, whiten_advantages=False)
        )
    check_finite(log_probability=old_logprobs, advantage=advantages)
    # trlx gives the values after EOS a part in the advantages, but does not train them.
    trained = mask.any(1, keepdim=True) & parts.counted
    if config.score_position == "trlx":
        trained = torch.cat([mask, torch.zeros_like(mask[:, :1])], 1)
    return Experience(
        rollout=rollout,
        scores=score,
        mask=mask,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        entropy=entropy,
        kl=kl,
        credit=credit,
        parts=parts,
        value_mask=trained,
        advantages=advantages,
        returns=returns,
    )


def policy_and_reference(models: Models, batch: Batch, config: PpoConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logprobs, ref_logprobs, entropy, the config's KL estimate), each [B, T]."""
    size, full = config.micro_batch, None
    if config.kl_estimator == "full":
        logprobs, ref_logprobs, entropy, full = exact_kl(
            models.policy, models.ref, batch, config.temperature, micro_batch=size
        )
    else:
        logprobs, entropy = response_logprobs(models.policy, batch, config.temperature, entropy=True, micro_batch=size)
        ref_logprobs = response_logprobs(models.ref, batch, config.temperature, micro_batch=size)
    kl = kl_penalty(
        config.kl_estimator,
        logprobs,
        ref_logprobs,
        batch.mask,
        old_logprobs=logprobs,
        full=full,
        clip=config.kl_clip,
    )
    return logprobs, ref_logprobs, entropy, kl


# Scores


def score_rollout(
    models: Models, rollout: Rollout, config: PpoConfig, *, observe: bool = False
) -> tuple[Tensor, Tensor]:
    """(scores [B], what each token earns of them [B, T]); NaN where there is no score.

    The scores are normalised and clipped, and the missing-EOS rule is applied. What that does beside scaling them,
    stands on the last token: it is not spread.
    """
    shaping, mask = config.shaping(), rollout.batch.mask
    if shaping.kind in OF_REWARD_MODEL:
        if not isinstance(models.scorer, RewardModelScorer):
            raise UserError(f"reward_shaping {shaping.kind} is what the reward model says, so it needs rm")
        scored = models.scorer.with_credit(rollout, shaping)
    else:
        scored = models.scorer(rollout)
    earned = token_scores(shaping, rollout, scored.scores, scored.credit, models.policy, micro_batch=config.micro_batch)
    final, gain = adjusted_scores(models, rollout, scored.scores, config, observe=observe)
    last = mask & (mask.cumsum(1) == mask.sum(1, keepdim=True))
    rest = (final - gain * scored.scores)[:, None]
    return final, torch.where(last, gain * earned + rest, gain * earned)


def token_rewards_of(judge: FunctionScorer, rollout: Rollout) -> Tensor:
    """[B, T]: what a judge of tokens or spans gives the tokens, 0 where it says nothing of a response (None)."""
    judged = judge(rollout)
    if judged.credit is None:
        raise UserError(f"token_reward_fn {judge.name} must say what tokens or spans are worth, got one number each")
    return torch.where(rollout.batch.mask & ~judged.scores.isnan()[:, None], judged.credit, 0)


def adjusted_scores(
    models: Models, rollout: Rollout, scores: Tensor, config: PpoConfig, *, observe: bool = False
) -> tuple[Tensor, float]:
    """(scores [B] after normalisation, clip and the missing-EOS rule, the factor of the score in them)."""
    normalizer, reference = models.normalizer, None
    if normalizer.kind == "delta":
        missing = next((prompt for prompt in rollout.prompts if prompt not in models.references), None)
        if missing is not None:
            raise UserError(f"score_norm delta needs a reference response to each prompt, got none to {missing!r:.60}")
        responses = [models.references[prompt] for prompt in rollout.prompts]
        given = given_rollout(models.tokenizer, rollout.prompts, responses, scores.device)
        reference = models.scorer(given).scores
    if observe and normalizer.kind == "affine" and not normalizer.fitted:
        normalizer.fit(scores)  # the first rollout is of the policy that the training starts from
    fixed, gain = normalizer.fixed(scores, reference)
    ruled = missing_eos(
        config.missing_eos,
        fixed,
        rollout.terminated,
        rollout.batch.mask.sum(1),
        penalty=config.missing_eos_penalty,
        response_length=rollout.response_length,
        buffer=config.overlong_buffer,
    )
    if observe:
        normalizer.observe(ruled)
    final, running_gain = normalizer.running(ruled)
    return final, gain * running_gain


def greedy_scores(models: Models, rollout: Rollout, config: PpoConfig) -> Tensor:
    """[B]: the score of the policy's greedy response to each prompt."""
    prompts = list(dict.fromkeys(rollout.prompts))
    greedy = generate(
        models.policy,
        models.tokenizer,
        prompts,
        response_length=rollout.response_length,
        temperature=GREEDY,
        micro_batch=config.micro_batch,
    )
    scores, _ = adjusted_scores(models, greedy, models.scorer(greedy).scores, config)
    place = {prompt: i for i, prompt in enumerate(prompts)}
    return scores[[place[prompt] for prompt in rollout.prompts]]


def bootstrap(old_values: Tensor, rollout: Rollout, gamma: float) -> Tensor:
    """[B]: γ times the value after the last token of a response that was cut off, 0 for one that ended."""
    lengths = rollout.batch.mask.sum(1, keepdim=True)
    return torch.where(rollout.terminated, 0, gamma * old_values.gather(1, lengths)[:, 0])


def rollout_metrics(experience: Experience, kl_coef: float, config: PpoConfig) -> dict[str, float]:
    """What is known of a rollout before its updates; sums run over the tokens of a response, means over responses."""
    mask, scored = experience.batch.mask, ~experience.scores.isnan()
    score, total = experience.scores[scored], experience.parts.tokens.sum(1)
    groups = {}
    if config.num_generations > 1:
        of_prompt = experience.scores.view(-1, config.num_generations)
        groups["frac_reward_zero_std"] = (of_prompt.amax(1) == of_prompt.amin(1)).float().mean().item()
    kl, entropy = experience.kl[scored].sum(1).mean(), experience.entropy[scored].sum(1).mean()
    return groups | {
        "objective/kl": kl.item(),
        "objective/kl_coef": kl_coef,
        "objective/entropy": entropy.item(),
        "objective/scores": score.mean().item(),
        "objective/scores_std": score.std(unbiased=False).item(),
        "objective/non_score_reward": (total - experience.credit.sum(1))[scored].mean().item(),
        "objective/rlhf_reward": total[scored].mean().item(),
        "policy/entropy_avg": rk.masked_mean(experience.entropy, mask).item(),
        "ppo/returns/mean": rk.masked_mean(experience.returns, experience.value_mask).item(),
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

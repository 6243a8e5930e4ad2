"""Losses of marked tokens, each token a decision of its own (horizon one): bandit, unlikelihood, or PPO with γ = 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import rlhf_kernels as rk

from .data import Batch, epoch_order
from .feedback_data import Marked, batch_of, read_feedback
from .guard import check_finite
from .model import response_logits, response_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .ppo_config import PpoConfig

LOSSES = ("bandit", "unlikelihood", "ppo")


@dataclass(frozen=True)
class LossConfig:
    """What the loss needs of a stage's flags; see TokenFeedbackConfig."""

    loss: str = "bandit"
    beta: float = 0.5
    anchor: bool = True
    temperature: float = 1.0
    cliprange: float = 0.2
    micro_batch: int | None = None


def feedback_backward(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    batch: Batch,
    labels: Tensor,
    config: LossConfig,
    *,
    old_logprobs: Tensor | None = None,
    weight: float = 1.0,
) -> dict[str, float]:
    """Adds the gradient of weight · loss of a batch to the policy's, micro-batch by micro-batch. May raise NonFinite.

    labels: [B, T]. old_logprobs: [B, T], of the policy at the start of the pass, for loss ppo; the present ones unless
    given. The loss is the mean over the tokens that count: all of the responses, or with anchor off the marked ones.
    """
    counted = batch.mask if config.anchor else batch.mask & (labels != 0)
    total = counted.sum().clamp(min=1)
    size = config.micro_batch or max(1, len(batch))
    sums: dict[str, float] = {"loss": 0.0, "kl": 0.0}
    for start in range(0, len(batch), size):
        rows = slice(start, start + size)
        old = None if old_logprobs is None else old_logprobs[rows]
        loss, kl = feedback_loss(policy, ref, batch.rows(rows), labels[rows], counted[rows], config, old)
        share = counted[rows].sum() / total
        if torch.is_grad_enabled() and loss.requires_grad:
            (weight * share * loss).backward()
        sums["loss"] += (share * loss.detach()).item()
        sums["kl"] += (share * kl).item()
    check_finite(feedback_loss=sums["loss"])
    return sums


@dataclass(frozen=True)
class FeedbackTerm:
    """Marked responses as one more loss of another stage's steps: `weight` times `feedback_loss`, on batches of them.

    They were written before, by another policy than the one that trains: they cannot be rewards of its rollouts.
    """

    rows: list[Marked]
    tokenizer: PreTrainedTokenizerBase
    ref: PreTrainedModel
    config: LossConfig
    weight: float
    batch_size: int
    seed: int

    def backward(self, policy: PreTrainedModel, number: int) -> Tensor:
        """Adds the gradient of batch `number` (from 0, a function of it and the seed) and returns the loss, 0-d."""
        first, chosen = number * self.batch_size, []
        for position in range(first, first + self.batch_size):
            epoch, place = divmod(position, len(self.rows))
            chosen.append(self.rows[epoch_order(len(self.rows), self.seed, epoch)[place]])
        batch, labels = batch_of(chosen, self.tokenizer)
        device = policy.device
        found = feedback_backward(
            policy, self.ref, batch.to(device), labels.to(device), self.config, weight=self.weight
        )
        return torch.tensor(found["loss"], device=device)


def feedback_term(config: PpoConfig, tokenizer: PreTrainedTokenizerBase, ref: PreTrainedModel) -> FeedbackTerm | None:
    """The term that a PPO run's flags ask for, None where they do not."""
    if config.token_feedback is None:
        return None
    settings = LossConfig(
        config.token_feedback_loss,
        config.token_feedback_beta,
        temperature=config.temperature,
        micro_batch=config.micro_batch,
    )
    return FeedbackTerm(
        read_feedback(config.token_feedback, tokenizer),
        tokenizer,
        ref,
        settings,
        weight=config.token_feedback_weight,
        batch_size=config.token_feedback_batch_size,
        seed=config.seed,
    )


def feedback_loss(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    batch: Batch,
    labels: Tensor,
    counted: Tensor,
    config: LossConfig,
    old_logprobs: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, KL(ref ‖ policy)) as means over the counted tokens; for loss ppo the KL is its estimate log π / ref."""
    if config.loss == "ppo":
        return horizon_one_loss(policy, ref, batch, labels, counted, config, old_logprobs)
    with torch.no_grad():
        ref_logits = response_logits(ref, batch) / config.temperature
    loss, stats = rk.token_feedback_loss(
        response_logits(policy, batch) / config.temperature,
        ref_logits,
        torch.where(counted, batch.responses, -1),
        labels,
        beta=config.beta,
        kind=config.loss,
    )
    return loss, stats.kl


def horizon_one_loss(
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    batch: Batch,
    labels: Tensor,
    counted: Tensor,
    config: LossConfig,
    old_logprobs: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """PPO with γ = 0 and no value: the advantage of a token is its own reward, label − beta · log(π_old / ref).

    The responses were written by whoever was marked, not by π_old: the ratio counts from the start of the pass, as if
    they had been sampled then.
    """
    logprobs = response_logprobs(policy, batch, config.temperature)
    old_logprobs = logprobs.detach() if old_logprobs is None else old_logprobs
    zeros = torch.zeros_like(old_logprobs)
    with torch.no_grad():
        ref_logprobs = response_logprobs(ref, batch, config.temperature)
    advantages, returns, _, kl = rk.rollout_advantages(
        labels,
        old_logprobs,
        ref_logprobs,
        None,
        zeros,
        counted,
        kl_coef=config.beta,
        beta=0.0,
        gamma=0.0,
        whiten=False,
    )
    loss, _ = rk.ppo_loss(
        logprobs, old_logprobs, advantages, zeros, zeros, returns, counted, cliprange=config.cliprange, vf_coef=0.0
    )
    return loss, kl.sum() / counted.sum().clamp(min=1)

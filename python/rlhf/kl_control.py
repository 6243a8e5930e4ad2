"""The KL coefficient from one rollout to the next, and the alarm for a KL that cannot be one."""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import UserError
from .ppo_config import PpoConfig

MIN_SEQUENCE_KL = -1.0  # nats: below it the estimate says that scoring and sampling disagree


def check_kl(sequence_kl: float, config: PpoConfig) -> None:
    """The alarm for a penalty that has turned into a reward. sequence_kl: nats a response, of config.kl_estimator."""
    if config.kl_estimator in ("k1", "k1+") and sequence_kl < MIN_SEQUENCE_KL:
        raise UserError(
            f"the mean KL of the policy to the reference is {sequence_kl:.2f} nats a response, and a KL is never "
            "negative: the tokens were not sampled from the distribution that scores them. Usual causes: a temperature "
            "other than the sampler's, top-k or top-p, a minimum length that suppresses EOS, dropout, a wrong "
            "attention mask. The last checkpoint and model are as they were."
        )


def measured_kl(kl: Tensor, mask: Tensor, measure: str) -> float:
    """What the adaptive controls compare with their target, from the penalty kl [B, T] of a rollout.

    "seq_sum": mean over responses of the sum over tokens (lm-human-preferences, TRL 0.7). "token_mean": mean over
    responses of the mean over tokens (verl). A response without tokens is no part of either.
    """
    lengths = mask.sum(1)
    per_response = torch.where(mask, kl, 0).sum(1)
    if measure == "token_mean":
        per_response = per_response / lengths.clamp(min=1)
    return rk.masked_mean(per_response, lengths > 0).item()


def adapt_kl_coef(kl_coef: float, kl: float, config: PpoConfig) -> float:
    """kl_coef for the next rollout, from the `measured_kl` of this one: a proportional controller with a clipped error.

        e = clip(kl / kl_target − 1, ±0.2);   kl_coef · (1 + e · batch_size / kl_horizon) or kl_coef · (1 + kl_gain · e)

    Source: Ziegler et al. 2019 (arXiv 1909.08593), whose text has the second form and whose code the first.
    """
    if config.kl_control == "fixed":
        return kl_coef
    error = min(max(kl / config.kl_target - 1, -0.2), 0.2)
    gain = config.kl_gain if config.kl_control == "adaptive-paper" else config.batch_size / config.kl_horizon
    return kl_coef * (1 + gain * error)

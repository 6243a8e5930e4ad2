"""What the losses report beside their value: detached 0-d tensors, no host sync.

"mean" is over the True places of the mask.
"""

from typing import NamedTuple

from torch import Tensor


class PPOStats(NamedTuple):
    policy_loss: Tensor  # Σ clipped policy loss / normalizer
    value_loss: Tensor  # Σ ½·clipped squared error / normalizer
    approx_kl: Tensor  # ½ · mean (log π − log π_old)², as in OpenAI's code and TRL
    clipfrac_high: Tensor  # share with A > 0 held by the upper bound
    clipfrac_low: Tensor  # share with A < 0 held by the lower bound
    clipfrac_value: Tensor  # share whose clipped value error was the larger one
    ratio_mean: Tensor
    ratio_max: Tensor
    explained_variance: Tensor  # 1 − var(returns − values) / var(returns); 0 for constant returns
    tokens: Tensor  # number of tokens that counted


class FusedPPOStats(NamedTuple):
    policy_loss: Tensor
    value_loss: Tensor
    entropy: Tensor  # mean, in nats
    approx_kl: Tensor
    clipfrac_high: Tensor
    clipfrac_low: Tensor
    clipfrac_value: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    explained_variance: Tensor
    tokens: Tensor


class LinearPPOStats(NamedTuple):
    policy_loss: Tensor
    entropy: Tensor
    kl: Tensor  # mean k3 estimate against ref_logprobs; 0 without them
    approx_kl: Tensor
    clipfrac_high: Tensor
    clipfrac_low: Tensor
    ratio_mean: Tensor
    ratio_max: Tensor
    tokens: Tensor


class RRHFStats(NamedTuple):
    rank_loss: Tensor  # mean over prompts, before rank_coef
    sft_loss: Tensor  # mean over prompts, before sft_coef
    accuracy: Tensor  # share of the scored pairs that the policy orders as the scores do
    prompts: Tensor  # number of prompts with a candidate


class RMPairwiseStats(NamedTuple):
    accuracy: Tensor  # share of pairs with score(chosen) > score(rejected)
    margin: Tensor  # mean score(chosen) − score(rejected)
    chosen_score: Tensor  # mean
    rejected_score: Tensor  # mean


class RMListwiseStats(NamedTuple):
    accuracy: Tensor  # share of the ranked pairs in the right order
    top1_accuracy: Tensor  # share of the best-ranked responses that also have the highest score of their prompt


class RMRegressionStats(NamedTuple):
    correlation: Tensor  # Pearson's r of scores and targets; 0 where either is constant
    bias: Tensor  # mean score − target


class TokenFeedbackStats(NamedTuple):
    logprob_good: Tensor  # mean log π of the tokens with a positive label
    logprob_bad: Tensor  # … with a negative label
    kl: Tensor  # mean KL(ref ‖ π) over all tokens, exact
    tokens: Tensor  # number of tokens that counted

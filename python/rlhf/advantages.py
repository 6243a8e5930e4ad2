"""From token rewards to advantages: where the score lands, whitening, GAE, and the estimators without a critic.

Rewards and values stand in columns 0 … T − 1, those of the response's tokens, and T, the place after the longest
response: a score that lands after EOS needs it, and so does the value with which a cut-off response is continued.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import rlhf_kernels as rk

if TYPE_CHECKING:
    from .ppo_config import PpoConfig

OF_GROUPS = ("grpo", "dr_grpo", "rloo", "opo", "reinforce++-baseline")
WITH_CRITIC = ("gae", "total_return")
ESTIMATORS = (*WITH_CRITIC, *OF_GROUPS, "reinforce++", "remax")
SCORE_POSITIONS = ("eos", "after_eos", "last_column", "trlx")


def last_token(mask: Tensor) -> Tensor:
    """[B] int64: the column of the last True of each row, −1 for a row without one."""
    columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    return torch.where(mask, columns, 0).amax(1) - 1


def score_column(position: str, mask: Tensor, *, response_length: int, pad_is_eos: bool = False) -> Tensor:
    """[B] int64: the column where the score of each response lands, −1 for a row without tokens.

        "eos"          the last token
        "after_eos"    the place after it, where the response is not as long as it may be (N+, TRL's PPOTrainer)
        "last_column"  the last column of the rollout (lm-human-preferences)
        "trlx"         two places after it, one where EOS is the pad token, as far as the longest response reaches

    Args:
        mask: [B, T] bool. response_length: tokens a response may have, at least T.
    """
    last = last_token(mask)
    if position == "eos":
        return last
    if position == "after_eos":
        column = torch.where(last + 1 < response_length, last + 1, last)
    elif position == "last_column":
        column = torch.full_like(last, mask.shape[1] - 1)
    elif position == "trlx":
        column = (last + (1 if pad_is_eos else 2)).clamp(max=mask.shape[1] - 1)
    else:
        raise ValueError(f"score_column: position must be one of {', '.join(SCORE_POSITIONS)}, got {position!r}")
    return torch.where(last >= 0, column, -1)


def through(column: Tensor, mask: Tensor) -> Tensor:
    """[B, T+1] bool: the mask and every place after it up to `column`, which is where rewards and values count."""
    columns = torch.arange(mask.shape[1] + 1, device=mask.device)
    after = (columns > last_token(mask)[:, None]) & (columns <= column[:, None])
    return torch.cat([mask, torch.zeros_like(mask[:, :1])], 1) | after


def place_rewards(credit: Tensor, penalty: Tensor, column: Tensor, position: str) -> Tensor:
    """[B, T+1]: what each place earns. credit, penalty: [B, T]; off "eos" a response's credit stands in `column`."""
    after = torch.zeros_like(credit[:, :1])
    if position != "eos":
        columns = torch.arange(credit.shape[1] + 1, device=credit.device)
        placed = torch.where(columns == column[:, None], credit.sum(1, keepdim=True), 0)
    else:
        placed = torch.cat([credit, after], 1)
    return placed - torch.cat([penalty, after], 1)


@dataclass
class Rewards:
    """What advantages are made of.

    tokens, values: [B, T+1]. mask: [B, T] bool, the tokens that are trained. counted: [B, T+1] bool, where rewards and
    values count. groups: [B] int64, equal for the responses to one prompt. bootstrap: [B], what stands for the rewards
    after a response that was cut off, added to its last token; None for nothing. baseline: [B], the score of the greedy
    response to the same prompt, for "remax".
    """

    tokens: Tensor
    values: Tensor
    mask: Tensor
    counted: Tensor
    groups: Tensor
    bootstrap: Tensor | None = None
    baseline: Tensor | None = None

    def rows(self, index: Tensor) -> Rewards:
        parts = {name: None if part is None else part[index] for name, part in vars(self).items()}
        return Rewards(**parts)  # type: ignore[arg-type]


def whiten(x: Tensor, mask: Tensor, config: PpoConfig, *, shift_mean: bool = True) -> Tensor:
    """`rk.masked_whiten` under the config's variance and mask; with "all" the padding counts as zeros."""
    where = torch.ones_like(mask) if config.whiten_mask == "all" else mask
    unbiased = config.whiten_variance == "unbiased"
    whitened = rk.masked_whiten(torch.where(mask, x, 0), where, shift_mean=shift_mean, unbiased=unbiased)
    return torch.where(mask, whitened, 0)


def advantages_and_returns(rewards: Rewards, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """(advantages [B, T], returns [B, T+1]) of some rows, whitened as the config says; 0 where masked.

        "gae"                   `rk.gae` of the rewards, which are whitened first, without their mean, if asked
        "total_return"          `total_return`
        "grpo", "rloo", "dr_grpo"  `rk.group_advantages` of each response's return
        "opo"                   return − Σ n·return / Σ n over the group, n the lengths
        "reinforce++"           the discounted reward to go
        "reinforce++-baseline"  return − the group's mean
        "remax"                 the reward to go − the greedy response's score

    The last six need no value model; their returns are 0.

    Sources: Schulman et al. 2016 (arXiv 1506.02438); Yuan et al. 2025 (arXiv 2503.01491) for a λ of the returns' own;
    Hu et al. 2025 (arXiv 2501.03262) reinforce++; Li et al. 2023 (arXiv 2310.10505) remax; Hao et al. 2025 (arXiv
    2505.23585) opo.
    """
    if config.estimator in WITH_CRITIC:
        advantages, returns = _with_critic(rewards, config)
    else:
        advantages, returns = _without_critic(rewards, config), torch.zeros_like(rewards.tokens)
    if config.whitens_advantages:
        advantages = whiten(advantages, rewards.mask, config)
    return advantages, returns


def _with_critic(rewards: Rewards, config: PpoConfig) -> tuple[Tensor, Tensor]:
    tokens, values, counted = rewards.tokens, rewards.values, rewards.counted
    if config.whiten_rewards:
        tokens = whiten(tokens, counted, config, shift_mean=False)
    if rewards.bootstrap is not None:
        columns = torch.arange(tokens.shape[1], device=tokens.device)
        ends = columns == last_token(rewards.mask)[:, None]
        tokens = torch.where(ends, tokens + rewards.bootstrap[:, None], tokens)
    if config.estimator == "total_return":
        advantages, returns = total_return(tokens, values, counted, config.gamma)
    else:
        advantages, returns = rk.gae(tokens, values, counted, gamma=config.gamma, lam=config.lam)
        if config.lam_value is not None:
            _, returns = rk.gae(tokens, values, counted, gamma=config.gamma, lam=config.lam_value)
    return torch.where(rewards.mask, advantages[:, : rewards.mask.shape[1]], 0), returns


def _without_critic(rewards: Rewards, config: PpoConfig) -> Tensor:
    mask, tokens = rewards.mask, rewards.tokens
    if config.estimator in ("reinforce++", "remax"):
        gamma = config.gamma if config.estimator == "reinforce++" else 1.0
        to_go, _ = rk.gae(tokens, torch.zeros_like(tokens), rewards.counted, gamma=gamma, lam=1.0)
        if config.estimator == "remax":
            if rewards.baseline is None:
                raise ValueError("advantages_and_returns: remax needs rewards.baseline, got None")
            to_go = to_go - rewards.baseline[:, None]
        return torch.where(mask, to_go[:, : mask.shape[1]], 0)
    lengths = rewards.counted.sum(1)
    total = torch.where(lengths > 0, torch.where(rewards.counted, tokens, 0).sum(1), torch.nan)
    if config.estimator == "opo":
        advantage = total - group_mean(total, rewards.groups, lengths)
    else:
        kind = "dr_grpo" if config.estimator == "reinforce++-baseline" else config.estimator
        advantage = rk.group_advantages(total, rewards.groups, kind=kind)
    return torch.where(mask, advantage[:, None], 0)


def group_mean(x: Tensor, groups: Tensor, weights: Tensor) -> Tensor:
    """[B]: for each response the weighted mean over its group; NaN, what could not be scored, is left out."""
    _, place = groups.unique(return_inverse=True)
    weights = torch.where(x.isnan(), 0, weights.to(x.dtype))
    zeros = x.new_zeros(len(x))
    total = zeros.index_add(0, place, torch.where(x.isnan(), 0, x * weights))
    count = zeros.index_add(0, place, weights)
    return (total / count.clamp(min=1e-12))[place]


def total_return(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """(advantages, returns) [B, T]: every token is weighted with the discounted reward of its whole response.

        G = Σ_t γ^t r_t,   A_t = G − v_t

    GAE drops what came before a token, which is right where rewards depend on the past alone. Credit by attention
    depends on later tokens: what it gives to earlier ones is correlated with a token, and dropping it biases the
    gradient. This keeps all of it, at the price of more variance. 0 where masked.
    """
    places = (mask.cumsum(1) - 1).clamp(min=0)
    total = torch.where(mask, rewards * gamma**places, 0).sum(1, keepdim=True)
    return torch.where(mask, total - values, 0), torch.where(mask, total, 0)

"""The losses of PPO and its relatives on log-probabilities, and how a loss per token becomes a number.

Each loss is of degree one in the advantages, so the weight of a token in the sum is a factor of its advantage: a
minibatch gives Σ of `rows[b]` · loss[b, t], whatever the aggregation. "ppo" and the value loss are `rk.ppo_loss`; the
others are plain torch, with gradients by autograd.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

import rlhf_kernels as rk

POLICY_LOSSES = ("ppo", "gspo", "gspo_token", "cispo", "sapo", "gmpo", "gpg")

AGGREGATIONS = (
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "constant-length",
    "seq-mean-token-sum-norm",
)

MAX_LOG_RATIO = 20.0
"""Where a log-ratio is clamped before exp; no gradient beyond it."""

MAX_LOG_SEQUENCE_RATIO = 10.0
"""The same for the ratio of a whole response, from above only, as in verl."""


class Weights(NamedTuple):
    """rows: [B] fp32, what each token of a row weighs in the policy's loss, in its KL and in its entropy. values: 0-d,
    the same for a token of the value loss."""

    rows: Tensor
    values: Tensor


def token_weights(aggregation: str, mask: Tensor, length: int, value_mask: Tensor | None = None) -> Weights:
    """The weights of the tokens of a minibatch; over its B rows, of which S have tokens, n_b in row b and N in all:

        "token-mean"               1 / N
        "seq-mean-token-mean"      1 / (S · n_b); the value loss is a mean over tokens
        "seq-mean-token-sum"       1 / S
        "constant-length"          1 / (B · length), Dr.GRPO's
        "seq-mean-token-sum-norm"  1 / length, verl's: no mean over responses

    Args:
        mask: [B, T] bool, the whole minibatch's, also where micro-batches go through the model.
        length: tokens that a response may have. value_mask: [B, ·] bool, the places of the value loss, `mask` unless
            given; a mean over tokens is over these.
    """
    counts = mask.sum(1).float()
    filled = (counts > 0).sum().clamp(min=1).float()
    values = 1 / (mask if value_mask is None else value_mask).sum().clamp(min=1).float()
    if aggregation == "seq-mean-token-mean":
        return Weights(1 / (filled * counts.clamp(min=1)), values)
    if aggregation == "token-mean":
        return Weights((1 / counts.sum().clamp(min=1)).expand(len(mask)), values)
    if aggregation == "seq-mean-token-sum":
        weight = 1 / filled
    elif aggregation == "constant-length":
        weight = counts.new_tensor(1 / (max(len(mask), 1) * length))
    elif aggregation == "seq-mean-token-sum-norm":
        weight = counts.new_tensor(1 / length)
    else:
        raise ValueError(f"token_weights: aggregation must be one of {', '.join(AGGREGATIONS)}, got {aggregation!r}")
    return Weights(weight.expand(len(mask)), weight)


@dataclass(frozen=True)
class Clips:
    """low, high: the ratio's bounds are 1 − low and 1 + high. dual: its bound for negative advantages. cispo_cap: bound
    of cispo's weight in place of both. tau_pos, tau_neg: sapo's temperatures."""

    low: float = 0.2
    high: float = 0.2
    dual: float | None = None
    cispo_cap: float | None = None
    tau_pos: float = 1.0
    tau_neg: float = 1.05


def policy_loss(
    kind: str, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, rows: Tensor, clips: Clips
) -> tuple[Tensor, dict[str, Tensor]]:
    """Σ rows[b] · loss[b, t] over the mask, and its statistics (detached 0-d tensors, means over the mask).

    With u = clamp(logprobs − old_logprobs, ±20), ρ = exp u and A the advantages, loss[b, t] is

        "ppo"         max(−A·ρ, −A·clip(ρ, 1 − low, 1 + high)), for A < 0 at most −dual·A. A two-sided clip of the
                      unclipped branch at δ > 1 + high is dual = δ: for A ≥ 0 the upper bound already stands below δ
        "gspo"        the same with s_b = exp(mean over t of u) for ρ
        "gspo_token"  the same with s_bt = s_b in value whose gradient is that of token t alone
        "cispo"       −sg(clip(ρ, 1 − low, 1 + high)) · A · logprobs: no gradient is dropped. cispo_cap: −sg(min(ρ,
                      cap)) · A · logprobs
        "sapo"        −A · (4 / τ) · sigmoid(τ·(ρ − 1)), τ = tau_pos where A > 0, tau_neg elsewhere
        "gmpo"        −Ā_b · exp(mean over t of u'), u' = min(u, high) where A > 0, max(u, −low) where A < 0; Ā_b the
                      mean advantage of the response
        "gpg"         −A · logprobs

    The sequence losses ("gspo", "gmpo") give each token its response's loss: they want "seq-mean-token-mean".

    Args:
        logprobs: [B, T], differentiable. old_logprobs, advantages: [B, T], constants. mask: [B, T] bool.
        rows: [B], of `token_weights`.

    Sources: Schulman et al. 2017 (arXiv 1707.06347), Ye et al. 2020 (arXiv 1912.09729) for dual; Zheng et al. 2025
    (arXiv 2507.18071) gspo; MiniMax 2025 (arXiv 2506.13585) cispo; Gao et al. 2025 (arXiv 2511.20347)
    sapo; Zhao et al. 2025 (arXiv 2507.20673) gmpo; Chu et al. 2025 (arXiv 2504.02546) gpg.
    """
    weighted = torch.where(mask, advantages * rows[:, None], 0)
    difference = log_ratio(logprobs, old_logprobs, mask)
    if kind == "ppo":
        none = torch.zeros_like(old_logprobs)
        loss, stats = rk.ppo_loss(
            logprobs,
            old_logprobs,
            weighted,
            none,
            none,
            none,
            mask,
            cliprange=clips.low,
            cliprange_high=clips.high,
            dual_clip=clips.dual,
            vf_coef=0.0,
            normalizer=1.0,
        )
        held = (stats.clipfrac_high, stats.clipfrac_low)
    else:
        per_token, high, low = _per_token(kind, logprobs, difference, weighted, mask, clips)
        loss = torch.where(mask, per_token, 0).sum()
        held = (rk.masked_mean(high.float(), mask), rk.masked_mean(low.float(), mask))
    return loss, ratio_stats(difference.detach(), weighted, mask, clips) | {
        "policy_loss": loss.detach(),
        "clipfrac_high": held[0],
        "clipfrac_low": held[1],
    }


def _per_token(
    kind: str, logprobs: Tensor, difference: Tensor, advantages: Tensor, mask: Tensor, clips: Clips
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, held by the upper bound, held by the lower bound), each [B, T]."""
    nothing = torch.zeros_like(mask)
    clamped = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    counts = mask.sum(1, keepdim=True).clamp(min=1)
    if kind in ("gspo", "gspo_token"):
        mean = (difference.sum(1, keepdim=True) / counts).expand_as(difference)
        if kind == "gspo_token":
            mean = torch.where(mask, logprobs - logprobs.detach(), 0) + mean.detach()
        return _clipped(mean.clamp(max=MAX_LOG_SEQUENCE_RATIO).exp(), advantages, clips)
    if kind == "cispo":
        ratio = clamped.detach().exp()
        lower, upper = 1 - clips.low, 1 + clips.high
        if clips.cispo_cap is not None:
            lower, upper = 0.0, clips.cispo_cap
        return -ratio.clamp(lower, upper) * advantages * logprobs, mask & (ratio > upper), mask & (ratio < lower)
    if kind == "sapo":
        tau = torch.where(advantages > 0, clips.tau_pos, clips.tau_neg)
        return -advantages * 4 / tau * torch.sigmoid(tau * (clamped.exp() - 1)), nothing, nothing
    if kind == "gmpo":
        bounded = torch.where(advantages > 0, difference.clamp(max=clips.high), difference.clamp(min=-clips.low))
        bounded = torch.where(advantages == 0, 0, bounded)
        ratio = (bounded.sum(1, keepdim=True) / counts).clamp(max=MAX_LOG_SEQUENCE_RATIO).exp()
        mean_advantage = advantages.sum(1, keepdim=True) / counts
        high, low = (difference > clips.high) & (advantages > 0), (difference < -clips.low) & (advantages < 0)
        return (-mean_advantage * ratio).expand_as(difference), high, low
    if kind == "gpg":
        return -advantages * logprobs, nothing, nothing
    raise ValueError(f"policy_loss: kind must be one of {', '.join(POLICY_LOSSES)}, got {kind!r}")


def _clipped(ratio: Tensor, advantages: Tensor, clips: Clips) -> tuple[Tensor, Tensor, Tensor]:
    bounded = ratio.clamp(1 - clips.low, 1 + clips.high)
    loss = torch.maximum(-advantages * ratio, -advantages * bounded)
    if clips.dual is not None:
        loss = torch.where(advantages < 0, torch.minimum(loss, -clips.dual * advantages), loss)
    return loss, (advantages > 0) & (ratio > 1 + clips.high), (advantages < 0) & (ratio < 1 - clips.low)


def log_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor) -> Tensor:
    """logprobs − old_logprobs; 0, without a gradient, where masked and where both are −inf."""
    counted = mask & ~((logprobs == -torch.inf) & (old_logprobs == -torch.inf))
    return torch.where(counted, logprobs, 0) - torch.where(counted, old_logprobs, 0)


def ratio_stats(difference: Tensor, advantages: Tensor, mask: Tensor, clips: Clips) -> dict[str, Tensor]:
    """How far the policy has moved from the one that sampled, from D = log π − log π_old [B, T].

    approx_kl is ½·mean D² (OpenAI, TRL), k1 is mean −D (verl, OpenRLHF), k3 is mean ρ − 1 − D (trlx, CleanRL): the last
    two estimate KL(π_old ‖ π). clipfrac_dual: share with A < 0 held by the dual clip; clipfrac_ratio: share whose
    log-ratio was clamped.
    """
    clamped = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = clamped.exp()
    beyond = (advantages < 0) & (ratio > clips.dual) if clips.dual is not None else torch.zeros_like(mask)
    means = {
        "approx_kl": difference.square() / 2,
        "k1": -difference,
        "k3": torch.expm1(clamped) - clamped,
        "ratio_mean": ratio,
        "clipfrac_dual": beyond,
        "clipfrac_ratio": clamped != difference,
    }
    stats = {name: rk.masked_mean(x.float(), mask) for name, x in means.items()}
    return stats | {"ratio_max": torch.where(mask, ratio, 0).amax(), "tokens": mask.sum().float()}


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, weight: Tensor, clip: float | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """weight · Σ ½·max((V − returns)², (V_old + clip(V − V_old, ±clip) − returns)²) over the mask; statistics as above.

    Args:
        values: [B, T], differentiable. old_values, returns: [B, T]. weight: 0-d, of `token_weights`.
    """
    none = torch.zeros_like(old_values)
    loss, stats = rk.ppo_loss(
        none,
        none,
        none,
        values,
        old_values,
        returns,
        mask,
        cliprange_value=clip,
        vf_coef=1.0,
        normalizer=1 / weight,
    )
    names = ("value_loss", "clipfrac_value", "explained_variance")
    return loss, {name: getattr(stats, name) for name in names}

"""Credit: how a response's score is spread over its tokens, so that the credit of a response sums to its score.

Kinds of reward shaping:

    terminal         all of it on the last token
    uniform          the same on each token
    abc              by the reward model's attention (Chan et al. 2024, arXiv 2402.00782)
    abc-d            by the policy's own attention while it wrote
    prefix-diff      what each token changed in the reward model's score of the text so far; signed, causal
    grad-x-input     gradient times input embedding of the reward model; signed
    value-attention  what the reward model's last attention block brought from each token into the score; signed
    span             as the reward function says, with a number for each token or for spans of bytes

The weights of a sum are normalised by it. Signed attributions never are, their sum may be nothing: what they leave of
the score is added to them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import rlhf_kernels as rk

from .attention import LAST_LAYER, REDUCTIONS, AttentionChoice, policy_attention
from .attribution import Attribution, attention, grad_x_input, prefix_differences, value_attention
from .config import UserError
from .reading import Reading

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .rollout import Rollout

KINDS = ("terminal", "uniform", "abc", "abc-d", "prefix-diff", "grad-x-input", "value-attention", "span")
OF_REWARD_MODEL = ("abc", "prefix-diff", "grad-x-input", "value-attention")
QUERIES = ("pooled", "response")

__all__ = ["KINDS", "OF_REWARD_MODEL", "QUERIES", "REDUCTIONS", "AttentionChoice", "Shaping"]


@dataclass(frozen=True)
class Shaping:
    """How scores are spread.

    kind: one of KINDS. beta: share that is spread; the rest stays on the last token. gamma: see `shaped_scores`.
    attention: whose attention counts, for abc, abc-d and value-attention. query: the token whose attention it is, for
    abc; "pooled", where the score is read, or "response", the last of the response. shift: abc-d's, see
    `policy_attention`. smoothing: prefix-diff's, see `prefix_differences`. scale: bound of a signed attribution, see
    `complete`.
    """

    kind: str = "terminal"
    beta: float = 1.0
    gamma: float = 1.0
    attention: AttentionChoice = LAST_LAYER
    query: str = "pooled"
    shift: int = 0
    smoothing: float = 0.0
    scale: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(f"reward_shaping must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.kind == "value-attention" and self.attention.layers != (-1,):
            raise UserError("attention_layers must be -1 for value-attention: earlier layers do not reach the score")


def spread(scores: Tensor, weights: Tensor | None, mask: Tensor) -> Tensor:
    """credit [B, T] of scores [B] by non-negative weights [B, T], all of it on the last token where they are None.

    Uniform where the weights of a response are nothing.
    """
    zeros = torch.zeros(mask.shape, device=mask.device)
    return rk.token_rewards(scores, zeros, zeros, weights, mask, kl_coef=0.0, beta=1.0)[0]


def complete(attribution: Tensor, scores: Tensor, weights: Tensor | None, mask: Tensor, scale: float = 1.0) -> Tensor:
    """credit [B, T] of signed attributions [B, T], made to sum to the scores by addition.

        c_t = s·a_t + (R − s·Σa)·u_t,      s = min(1, scale·|R| / Σ|a|)

    u are the weights, normalised; uniform where they are None.
    """
    attribution = torch.where(mask, attribution, 0)
    bound = scale * scores.abs() / (attribution.abs().sum(1) + 1e-8)
    scaled = bound.clamp(max=1)[:, None] * attribution
    return scaled + spread(scores - scaled.sum(1), mask.float() if weights is None else weights, mask)


def reward_model_credit(
    model: PreTrainedModel, reading: Reading, shaping: Shaping, *, micro_batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """(scores [B] fp32, credit [B, T] fp32) of a rollout's texts, for the kinds OF_REWARD_MODEL; one forward pass."""
    found = [_reward_model_credit(model, part, shaping) for part in reading.split(micro_batch)]
    return torch.cat([scores for scores, _ in found]), torch.cat([credit for _, credit in found])


def _reward_model_credit(model: PreTrainedModel, reading: Reading, shaping: Shaping) -> tuple[Tensor, Tensor]:
    attributions: dict[str, Callable[[], Attribution]] = {
        "abc": lambda: attention(model, reading, shaping.attention, from_response=shaping.query == "response"),
        "prefix-diff": lambda: prefix_differences(model, reading, shaping.smoothing),
        "grad-x-input": lambda: grad_x_input(model, reading),
        "value-attention": lambda: value_attention(model, reading, shaping.attention),
    }
    found = attributions[shaping.kind]()
    # A difference belongs to the response as a whole, where an attribution has a part in the prompt.
    tokens = reading.carry(found.tokens, whole=shaping.kind == "prefix-diff")
    if shaping.kind == "abc":
        return found.scores, spread(found.scores, tokens, reading.mask)
    if shaping.kind == "prefix-diff":
        return found.scores, tokens
    weights = None if found.weights is None else reading.carry(found.weights)
    return found.scores, complete(tokens, found.scores, weights, reading.mask, shaping.scale)


def token_scores(
    shaping: Shaping,
    rollout: Rollout,
    scores: Tensor,
    credit: Tensor | None,
    policy: PreTrainedModel,
    *,
    micro_batch: int | None = None,
) -> Tensor:
    """[B, T] fp32: what each token of a rollout earns of its score; rows sum to the scores.

    Args:
        credit: [B, T], what the reward model's attribution or a reward function gives each token; None where neither
            says anything. A function's own numbers count as they are, β is for what is spread.
        policy: whose attention abc-d reads.
    """
    mask = rollout.batch.mask
    if shaping.kind == "span" or (shaping.kind == "terminal" and credit is not None):
        if credit is None:
            raise UserError("reward_shaping span needs a reward function that scores tokens or spans, got one score")
        return torch.where(mask, credit, 0)
    if shaping.kind == "terminal":
        return spread(scores, None, mask)
    if shaping.kind == "uniform":
        credit = spread(scores, mask.float(), mask)
    elif shaping.kind == "abc-d":
        weights = policy_attention(
            policy, rollout.batch, shaping.attention, shift=shaping.shift, micro_batch=micro_batch
        )
        credit = spread(scores, weights, mask)
    assert credit is not None  # whoever scores for one of OF_REWARD_MODEL has made it
    return shaped_scores(credit, mask, beta=shaping.beta, gamma=shaping.gamma)


def shaped_scores(credit: Tensor, mask: Tensor, *, beta: float, gamma: float = 1.0) -> Tensor:
    """[B, T]: what each token earns when a share `beta` of the score is spread as `credit` [B, T] says.

        r_t = γ·Φ_{t+1} − Φ_t + R·1[t = last],      Φ_{t+1} = β·Σ_{i ≤ t} credit_i,   Φ = 0 at both ends

    With γ = 1 that is β·credit_t and (1 − β)·R on the last token more. With the γ of the returns it is the exact
    potential form (Ng, Harada and Russell 1999): every response keeps its discounted return, whatever the credit.
    """
    credit = torch.where(mask, credit, 0)
    places = mask.cumsum(1)
    last = mask & (places == places[:, -1:])
    after = beta * credit.cumsum(1)
    before = after - beta * credit
    total = credit.sum(1, keepdim=True)
    return torch.where(mask, torch.where(last, total, gamma * after) - before, 0)

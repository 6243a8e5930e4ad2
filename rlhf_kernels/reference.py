"""Every op in eager torch, forward and backward: the specification, the oracle of the tests, the `torch` backend.

Log-probabilities, attention and rewards stand here, losses in reference_losses.py, both in data-flow order. A
function has the arguments of the registered op of its name. Arithmetic is fp32, fp64 for fp64 inputs.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .masked import masked_whiten

KL_ESTIMATORS = ("k1", "k2", "k3", "abs", "pos")
MAX_LOG_RATIO = 20.0  # exp(20) = 4.9e8: beyond it one token would be the whole batch
MEMORY_BUDGET = 64 << 20  # bytes of logits held at a time by the linear ops


def compute_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def upcast(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """The tensor in its own compute dtype, or in that of the op's leading input, which outputs follow."""
    return tensor.to(compute_dtype(tensor if like is None else like))


# ---------------------------------------------------------------------------------------------- log-probabilities


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    u = upcast(logits)
    if softcap is not None:
        # tanh would turn a forbidden token's −inf into −softcap.
        u = torch.where(u == -torch.inf, u, softcap * torch.tanh(u / softcap))
    return u / temperature


def valid_tokens(tokens: Tensor, mask: Tensor | None) -> Tensor:
    return tokens >= 0 if mask is None else mask & (tokens >= 0)


def check_range(op: str, tokens: Tensor, valid: Tensor, vocabulary: int) -> None:
    """An error for tokens out of range on the CPU; a GPU would have to be waited for, there the result is NaN."""
    if tokens.device.type == "cpu" and (outside := valid & (tokens >= vocabulary)).any():
        raise ValueError(f"{op}: tokens must be below V = {vocabulary}, got {int(tokens[outside].max())}")


def _token_index(op: str, tokens: Tensor, valid: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Tokens that can be gathered with, and where they are out of range."""
    check_range(op, tokens, valid, vocabulary)
    index = torch.where(valid, tokens, 0).long()
    return index.clamp(max=vocabulary - 1), index >= vocabulary


def token_logprobs_fwd(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    grad_buffer: Tensor | None = None,  # for the backward pass
) -> tuple[Tensor, Tensor, Tensor]:
    valid = valid_tokens(tokens, mask)
    index, outside = _token_index("token_logprobs", tokens, valid, logits.shape[-1])
    z = _scaled(torch.where(valid[..., None], logits, 0), temperature, softcap)
    # Everything is taken relative to the highest logit: near 1e4 an fp32 logsumexp is off by 5e-4, and Σ p·z by nats.
    highest = z.amax(-1, keepdim=True)
    highest = torch.where(highest == -torch.inf, 0, highest)
    z = z - highest
    log_total = z.logsumexp(-1)
    chosen = z.gather(-1, index[..., None]).squeeze(-1)
    logprobs = torch.where(chosen == -torch.inf, chosen, chosen - log_total).masked_fill(outside, torch.nan)
    entropy = log_total.new_empty(0)
    if with_entropy:
        p = _probabilities(z, log_total)
        entropy = log_total - torch.where(p > 0, p * z, 0).sum(-1)
        entropy = torch.where(valid & (log_total != -torch.inf), entropy, 0)
    lse = log_total + highest.squeeze(-1)
    return torch.where(valid, logprobs, 0), entropy, torch.where(valid, lse, 0)


def _probabilities(z: Tensor, lse: Tensor) -> Tensor:
    return torch.where(z == -torch.inf, 0, (z - lse[..., None]).exp())


def token_logprobs_bwd(
    logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    valid = valid_tokens(tokens, mask)
    index, _ = _token_index("token_logprobs", tokens, valid, logits.shape[-1])
    safe_logits = torch.where(valid[..., None], logits, 0)
    z = _scaled(safe_logits, temperature, softcap)
    p = _probabilities(z, lse)
    dz = torch.zeros_like(z)
    if grad_logprobs is not None:
        g = torch.where(valid, grad_logprobs, 0).to(z.dtype)[..., None]
        dz += (-p * g).scatter_add(-1, index[..., None], g)
    if grad_entropy is not None:
        g = torch.where(valid, grad_entropy, 0).to(z.dtype)[..., None]
        logp = z - lse[..., None]
        dz -= g * torch.where(p > 0, p * (logp + entropy[..., None]), 0)
    return _unscaled_grad(dz, safe_logits, valid & (lse != -torch.inf), temperature, softcap)


def token_logprobs_bwd_out(*arguments: Any) -> None:
    *given, dlogits = arguments
    dlogits.copy_(token_logprobs_bwd(*given))


def _unscaled_grad(dz: Tensor, logits: Tensor, valid: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """∂L/∂logits from ∂L/∂z; zero on rows that do not count and at forbidden (−inf) tokens."""
    du = dz / temperature
    if softcap is not None:
        du = du * (1 - torch.tanh(upcast(logits) / softcap).square())
    return torch.where(valid[..., None] & (logits != -torch.inf), du, 0).to(logits.dtype)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """hidden · weightᵀ + bias, kept in fp32: rounding logits to bf16 alone costs 0.03 nats."""
    dtype = compute_dtype(hidden)
    return F.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def counted_rows(hidden: Tensor, tokens: Tensor, mask: Tensor | None) -> Tensor:
    """hidden as [N, H] with masked rows zeroed: 0 · NaN would reach ∂L/∂weight."""
    return torch.where(valid_tokens(tokens, mask)[..., None], hidden, 0).reshape(-1, hidden.shape[-1])


def row_chunks(rows: Tensor, vocabulary: int, memory_budget: int | None) -> list[slice]:
    row_bytes = vocabulary * compute_dtype(rows).itemsize
    size, n = max(1, (memory_budget or MEMORY_BUDGET) // max(row_bytes, 1)), rows.shape[0]
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def without_room(op: str, valid: Tensor, max_tokens: int | None) -> Tensor:
    """Places that count beyond the first `max_tokens`: an error on the CPU; on a GPU the caller makes them NaN."""
    if max_tokens is None:
        return torch.zeros_like(valid)
    missed = valid & (valid.reshape(-1).cumsum(0).view(valid.shape) > max_tokens)
    if valid.device.type == "cpu" and missed.any():
        raise ValueError(
            f"{op}: max_tokens must be at least {int(valid.sum())}, the tokens that count, got {max_tokens}"
        )
    return missed


def _rows(tensor: Tensor | None, part: slice) -> Tensor | None:
    return None if tensor is None else tensor.reshape(-1)[part]


def linear_logprobs_fwd(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    temperature: float,
    softcap: float | None,
    with_entropy: bool,
    with_unit: bool,
    memory_budget: int | None,
    max_tokens: int | None,
    keep_logits: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    missed = without_room("linear_logprobs", valid_tokens(tokens, mask), max_tokens)
    rows = counted_rows(hidden, tokens, mask)
    outputs = hidden.new_zeros(3, rows.shape[0], dtype=compute_dtype(hidden))
    units = LinearGrads(hidden, rows, weight, bias, [with_unit, False, False])
    logprobs, entropy, lse = outputs.unbind()
    kept = outputs.new_empty((rows.shape[0], weight.shape[0]) if keep_logits else 0)
    for part in row_chunks(rows, weight.shape[0], memory_budget):
        logits = project(rows[part], weight, bias)
        if keep_logits:
            kept[part] = logits
        chosen, chunk_mask = tokens.reshape(-1)[part], _rows(mask, part)
        a, b, c = token_logprobs_fwd(logits, chosen, chunk_mask, temperature, softcap, with_entropy)
        logprobs[part], lse[part] = a, c
        if with_entropy:
            entropy[part] = b
        if with_unit:
            ones = torch.ones_like(a)
            units.add(part, token_logprobs_bwd(logits, chosen, chunk_mask, c, b, ones, None, temperature, softcap))
    shape = tokens.shape
    return (
        logprobs.clone().view(shape).masked_fill(missed, torch.nan),
        entropy.clone().view(shape).masked_fill(missed, torch.nan) if with_entropy else entropy.new_empty(0),
        lse.clone().view(shape),
        units.result()[0],
        kept,
    )


def linear_logprobs_bwd(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    lse: Tensor,
    entropy: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    temperature: float,
    softcap: float | None,
    needs: list[bool],
    memory_budget: int | None,
    max_tokens: int | None,
    kept: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    rows = counted_rows(hidden, tokens, mask)
    grads = LinearGrads(hidden, rows, weight, bias, needs)
    for part in row_chunks(rows, weight.shape[0], memory_budget):
        dlogits = token_logprobs_bwd(
            project(rows[part], weight, bias) if kept is None else kept[part],
            tokens.reshape(-1)[part],
            _rows(mask, part),
            lse.reshape(-1)[part],
            entropy if entropy.numel() == 0 else entropy.reshape(-1)[part],
            _rows(grad_logprobs, part),
            _rows(grad_entropy, part),
            temperature,
            softcap,
        )
        grads.add(part, dlogits)
    return grads.result()


class LinearGrads:
    """∂L/∂hidden, ∂L/∂weight and ∂L/∂bias gathered chunk by chunk in fp32, rounded once at the end."""

    def __init__(self, hidden: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None, needs: list[bool]) -> None:
        self.inputs = (hidden, weight, bias)
        self.rows = rows
        dtype = compute_dtype(hidden)
        shapes = (self.rows.shape, weight.shape, (weight.shape[0],))
        self.sums = [hidden.new_zeros(shape if need else 0, dtype=dtype) for shape, need in zip(shapes, needs)]
        self.needs = needs

    def add(self, part: slice, dlogits: Tensor) -> None:
        dhidden, dweight, dbias = self.sums
        if self.needs[0]:
            dhidden[part] = dlogits @ self.inputs[1].to(dlogits.dtype)
        if self.needs[1]:
            dweight.addmm_(dlogits.T, self.rows[part].to(dlogits.dtype))
        if self.needs[2]:
            dbias += dlogits.sum(0)

    def result(self) -> tuple[Tensor, Tensor, Tensor]:
        hidden, weight, bias = self.inputs
        dhidden, dweight, dbias = self.sums
        if self.needs[0]:
            dhidden = dhidden.view(hidden.shape)
        return (
            dhidden.to(hidden.dtype),
            dweight.to(weight.dtype),
            dbias.to(hidden.dtype if bias is None else bias.dtype),
        )


def policy_ref_logprobs_fwd(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    temperature: float,
    grad_buffer: Tensor | None = None,  # for the backward pass
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    logprobs, entropy, lse = token_logprobs_fwd(logits, tokens, mask, temperature, None, True)
    ref_logprobs, _, ref_lse = token_logprobs_fwd(ref_logits, tokens, mask, temperature, None, False)
    valid = valid_tokens(tokens, mask)
    p, log_ratio = _log_ratio(logits, ref_logits, valid, lse, ref_lse, temperature)
    kl = torch.where(p > 0, p * log_ratio, 0).sum(-1)
    return logprobs, ref_logprobs, entropy, torch.where(valid, kl, 0).to(entropy.dtype), lse, ref_lse


def _log_ratio(
    logits: Tensor, ref_logits: Tensor, valid: Tensor, lse: Tensor, ref_lse: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """p_v and log p_v − log q_v."""
    z = _scaled(torch.where(valid[..., None], logits, 0), temperature, None)
    ref_z = _scaled(torch.where(valid[..., None], ref_logits, 0), temperature, None)
    return _probabilities(z, lse), (z - lse[..., None]) - (ref_z - ref_lse[..., None])


def policy_ref_logprobs_bwd(
    logits: Tensor,
    ref_logits: Tensor,
    tokens: Tensor,
    mask: Tensor | None,
    lse: Tensor,
    ref_lse: Tensor,
    entropy: Tensor,
    kl: Tensor,
    grad_logprobs: Tensor | None,
    grad_entropy: Tensor | None,
    grad_kl: Tensor | None,
    temperature: float,
) -> Tensor:
    dlogits = upcast(
        token_logprobs_bwd(upcast(logits), tokens, mask, lse, entropy, grad_logprobs, grad_entropy, temperature, None)
    )
    if grad_kl is not None:
        valid = valid_tokens(tokens, mask)
        p, log_ratio = _log_ratio(logits, ref_logits, valid, lse, ref_lse, temperature)
        dz = torch.where(p > 0, p * (log_ratio - kl[..., None]), 0) * torch.where(valid, grad_kl, 0)[..., None]
        safe_logits = torch.where(valid[..., None], logits, 0)
        dlogits = dlogits + upcast(
            _unscaled_grad(dz, upcast(safe_logits), valid & (lse != -torch.inf), temperature, None)
        )
    return dlogits.to(logits.dtype)


def policy_ref_logprobs_bwd_out(*arguments: Any) -> None:
    *given, dlogits = arguments
    dlogits.copy_(policy_ref_logprobs_bwd(*given))


# ------------------------------------------------------------------------------------------------ attention, rewards


def attention_row(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor,
    sink: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    batch, heads, dim = query.shape
    groups = key.shape[1]
    grouped = upcast(query).view(batch, groups, heads // groups, dim)
    scores = scale * torch.einsum("bkgd,bktd->bkgt", grouped, upcast(key)).flatten(1, 2)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    attended = key_mask
    if window is not None:
        column = torch.arange(key.shape[2], device=key.device)
        attended = attended & (column > _last_true(key_mask)[:, None] - window)
    scores = torch.where(attended[:, None], scores, -torch.inf)
    highest = scores.amax(-1, keepdim=True) if key.shape[2] else scores.new_full((*scores.shape[:2], 1), -torch.inf)
    if sink is not None:
        highest = torch.maximum(highest, sink.to(scores.dtype)[None, :, None])
    highest = torch.where(highest == -torch.inf, 0, highest)
    weights = (scores - highest).exp()
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink.to(scores.dtype)[None, :, None] - highest).exp()
    return torch.where(attended, (weights / torch.where(total > 0, total, 1)).mean(1), 0)


def _last_true(mask: Tensor) -> Tensor:
    """Column of the last True of each row, −1 where there is none."""
    columns = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    return (mask * columns).amax(-1) - 1 if mask.shape[-1] else mask.new_full(mask.shape[:-1], -1, dtype=torch.long)


def log_difference(logprobs: Tensor, other: Tensor, mask: Tensor) -> Tensor:
    """logprobs − other; 0 where masked and where both are −inf."""
    difference = upcast(logprobs) - upcast(other, logprobs)
    both = (logprobs == -torch.inf) & (other == -torch.inf)
    return torch.where(mask & ~both, difference, 0)


def kl_estimate(difference: Tensor, kind: str) -> Tensor:
    """Per-token estimate of KL(π ‖ ref) from D = log π − log ref (Schulman, "Approximating KL divergence", 2020)."""
    if kind == "k1":
        return difference
    if kind == "k2":
        return difference.square() / 2
    if kind == "k3":
        clamped = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        return torch.expm1(-clamped) + clamped
    return difference.abs() if kind == "abs" else difference.clamp(min=0)


def token_rewards(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    mask: Tensor,
    kl_coef: float,
    beta: float,
    kl_estimator: str,
) -> tuple[Tensor, Tensor]:
    kl = torch.where(mask, kl_estimate(log_difference(logprobs, ref_logprobs, mask), kl_estimator), 0)
    if scores.ndim == 2:
        return torch.where(mask, upcast(scores, logprobs), 0) - kl_coef * kl, kl
    last = torch.arange(mask.shape[-1], device=mask.device) == _last_true(mask)[:, None]
    score = upcast(scores, logprobs)[:, None]
    credit = torch.where(last, score, 0)
    if attention is not None:
        weights = _normalized(upcast(attention, logprobs), mask)
        credit = (1 - beta) * credit + torch.where(mask, beta * weights * score, 0)
    return credit - kl_coef * kl, kl


def _normalized(attention: Tensor, mask: Tensor) -> Tensor:
    """Attention renormalised over the mask; uniform where its mass is nothing or not a number."""
    weights = torch.where(mask, attention, 0)
    total = weights.sum(-1, keepdim=True)
    usable = (total >= 1e-12) & (total < torch.inf)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    return torch.where(usable, weights / torch.where(usable, total, 1), mask / count)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    rewards, values = (torch.where(mask, upcast(x, rewards), 0) for x in (rewards, values))
    advantages = torch.zeros_like(rewards)
    next_value = next_advantage = rewards.new_zeros(rewards.shape[0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        advantages[:, t] = torch.where(mask[:, t], advantage, 0)
        # A masked place (padding, a tool's tokens) is stepped over: what comes after it is carried unchanged.
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        next_value = torch.where(mask[:, t], values[:, t], next_value)
    return advantages, torch.where(mask, advantages + values, 0)


def rollout_advantages(
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    values: Tensor,
    mask: Tensor,
    kl_coef: float,
    beta: float,
    gamma: float,
    lam: float,
    kl_estimator: str,
    whiten: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rewards, kl = token_rewards(scores, logprobs, ref_logprobs, attention, mask, kl_coef, beta, kl_estimator)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    return masked_whiten(advantages, mask) if whiten else advantages, returns, rewards, kl


def group_advantages(scores: Tensor, groups: Tensor, kind: str) -> Tensor:
    scored = ~scores.isnan()
    raw = torch.where(scored, upcast(scores), 0)
    count = group_sum(scored.to(raw.dtype), groups)
    mean = group_sum(raw, groups) / count.clamp(min=1)
    centered = torch.where(scored, raw - mean, 0)
    if kind == "rloo":
        # R − mean of the others = G / (G − 1) · (R − mean); alone in its group a response has nothing to beat.
        centered = centered * count / (count - 1).clamp(min=1)
    elif kind == "grpo":
        std = (group_sum(centered.square(), groups) / (count - 1).clamp(min=1)).sqrt()
        # Equal scores leave only rounding in the deviation; dividing by it would blow noise up to advantages of one.
        flat = std < 1e-6 * mean.abs().clamp(min=1)
        centered = torch.where(flat, 0, centered / (std + 1e-4))
    return centered


def group_sum(x: Tensor, groups: Tensor) -> Tensor:
    """For each element the sum of x over its group, in a fixed order and without a host sync."""
    order = groups.argsort(stable=True)
    ordered = groups[order]
    changes = torch.ones_like(ordered, dtype=torch.bool)
    changes[1:] = ordered[1:] != ordered[:-1]
    segment = changes.cumsum(0) - 1
    offsets = torch.searchsorted(segment, torch.arange(len(x) + 1, device=x.device))
    sums = torch.segment_reduce(x[order], "sum", offsets=offsets, unsafe=True, initial=0)
    return torch.empty_like(x).index_copy(0, order, sums[segment])


def align_credit(credit: Tensor, rm_spans: Tensor, policy_spans: Tensor) -> Tensor:
    dtype = compute_dtype(credit)
    start, end = (rm_spans[:, None, :, side] for side in (0, 1))  # [B, 1, Tr]
    policy_start, policy_end = (policy_spans[:, :, None, side] for side in (0, 1))  # [B, Tp, 1]
    overlap = (torch.minimum(end, policy_end) - torch.maximum(start, policy_start)).clamp(min=0)
    overlap = torch.where(policy_end >= 0, overlap, 0).to(dtype)
    covered = overlap.sum(1, keepdim=True)
    shares = overlap / torch.where(covered > 0, covered, 1)
    # Credit that no policy token covers (an end-of-sequence token of zero length, cut-off text) goes to the last
    # zero-length policy token, or else to the last token.
    present = policy_spans[..., 1] >= 0
    empty = present & (policy_spans[..., 0] == policy_spans[..., 1])
    home = torch.where(empty.any(-1), _last_true(empty), _last_true(present))
    at_home = torch.arange(policy_spans.shape[1], device=credit.device)[:, None] == home[:, None, None]
    shares = torch.where(covered > 0, shares, at_home.to(dtype))
    # A token of the reward model that begins in the prompt brings only the part that lies in the response.
    length = (end - start).to(dtype)
    inside = torch.where(length > 0, (end - start.clamp(min=0)).clamp(min=0) / torch.where(length > 0, length, 1), 1)
    inside = torch.where(end >= 0, inside, 0)
    weighted = torch.where(inside > 0, credit[:, None].to(dtype) * inside, 0)
    return (shares * weighted).sum(-1)

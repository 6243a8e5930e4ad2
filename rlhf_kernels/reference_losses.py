"""The losses in eager torch, each with its gradient for an upstream gradient of one; see reference.py."""

from typing import Any

import torch
from torch import Tensor

from .reference import (
    MAX_LOG_RATIO,
    LinearGrads,
    compute_dtype,
    counted_rows,
    group_sum,
    kl_estimate,
    linear_logprobs_bwd,
    linear_logprobs_fwd,
    log_difference,
    project,
    rollout_advantages,
    row_chunks,
    token_logprobs_bwd,
    token_logprobs_fwd,
    upcast,
    without_room,
)
from .stats import FusedPPOStats, LinearPPOStats, PPOStats


def _mean(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


def normalizer_of(mask: Tensor, normalizer: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (mask.sum().clamp(min=1) if normalizer is None else normalizer).to(dtype)


def _largest(x: Tensor) -> Tensor:
    return x.max() if x.numel() else x.new_zeros(())


# ---------------------------------------------------------------------------------------------------------------- PPO


def _policy_terms(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    cliprange: float,
    cliprange_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor, dict[str, Tensor], Tensor]:
    """Per-token clipped loss, its derivative by the log-probability, the statistics, and the mask that counted."""
    # Two −inf have no ratio: such a token could not be sampled, so it is taken out.
    mask = mask & ~((logprobs == -torch.inf) & (old_logprobs == -torch.inf))
    difference = log_difference(logprobs, old_logprobs, mask)
    log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = torch.where(mask, upcast(advantages, logprobs), 0)
    gain = advantages > 0
    clipped = ratio.clamp(1 - cliprange, 1 + cliprange_high)
    loss = torch.maximum(-advantages * ratio, -advantages * clipped)
    active = torch.where(advantages >= 0, ratio <= 1 + cliprange_high, ratio >= 1 - cliprange)
    if dual_clip is not None:
        bounded = (advantages < 0) & (ratio > dual_clip)
        loss = torch.where(bounded, -dual_clip * advantages, loss)
        active = active & ~bounded
    active = active & (difference.abs() <= MAX_LOG_RATIO)
    derivative = torch.where(mask & active, -advantages * ratio, 0)
    stats = {
        "approx_kl": 0.5 * _mean(log_ratio.square(), mask),
        "clipfrac_high": _mean((gain & (ratio > 1 + cliprange_high)).to(ratio.dtype), mask),
        "clipfrac_low": _mean(((advantages < 0) & (ratio < 1 - cliprange)).to(ratio.dtype), mask),
        "ratio_mean": _mean(ratio, mask),
        "ratio_max": _largest(torch.where(mask, ratio, 0)),
        "tokens": mask.sum().to(ratio.dtype),
    }
    return torch.where(mask, loss, 0), derivative, stats, mask


def _value_terms(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, cliprange_value: float | None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    values, old_values, returns = (torch.where(mask, x, 0) for x in (values, old_values, returns))
    error = values - returns
    loss, derivative, clipfrac = error.square(), error, torch.zeros_like(error)
    if cliprange_value is not None:
        change = values - old_values
        clipped = (old_values + change.clamp(-cliprange_value, cliprange_value) - returns).square()
        inside = change.abs() <= cliprange_value
        derivative = torch.where(inside | (loss >= clipped), error, 0)
        clipfrac = (~inside & (clipped > loss)).to(error.dtype)
        loss = torch.maximum(loss, clipped)
    residual, spread = (_mean((x - _mean(x, mask)).square(), mask) for x in (returns - values, returns))
    stats = {
        "clipfrac_value": _mean(clipfrac, mask),
        "explained_variance": torch.where(spread > 0, 1 - residual / torch.where(spread > 0, spread, 1), 0),
    }
    return 0.5 * loss, torch.where(mask, derivative, 0), stats


def ppo_loss_fwd(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    cliprange: float,
    cliprange_high: float,
    cliprange_value: float | None,
    vf_coef: float,
    dual_clip: float | None,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    policy, dpolicy, stats, counted = _policy_terms(
        logprobs, old_logprobs, advantages, mask, cliprange, cliprange_high, dual_clip
    )
    v, old_v, target = (upcast(x, logprobs) for x in (values, old_values, returns))
    value, dvalue, value_stats = _value_terms(v, old_v, target, counted, cliprange_value)
    total = normalizer_of(counted, normalizer, policy.dtype)
    stats |= value_stats
    stats["policy_loss"], stats["value_loss"] = policy.sum() / total, value.sum() / total
    loss = stats["policy_loss"] + vf_coef * stats["value_loss"]
    stacked = torch.stack([stats[name].to(policy.dtype) for name in PPOStats._fields])
    if not with_grad:
        return loss, stacked, logprobs.new_empty(0), values.new_empty(0)
    return loss, stacked, (dpolicy / total).to(logprobs.dtype), (vf_coef * dvalue / total).to(values.dtype)


def fused_ppo_loss_fwd(
    logits: Tensor,
    tokens: Tensor,
    scores: Tensor,
    old_logprobs: Tensor,
    ref_logprobs: Tensor,
    attention: Tensor | None,
    values: Tensor,
    old_values: Tensor,
    mask: Tensor,
    normalizer: Tensor | None,
    temperature: float,
    softcap: float | None,
    kl_coef: float,
    beta: float,
    gamma: float,
    lam: float,
    kl_estimator: str,
    whiten: bool,
    cliprange: float,
    cliprange_high: float,
    cliprange_value: float | None,
    vf_coef: float,
    dual_clip: float | None,
    entropy_coef: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mask = mask & (tokens >= 0)
    advantages, returns, _, _ = rollout_advantages(
        scores, old_logprobs, ref_logprobs, attention, old_values, mask, kl_coef, beta, gamma, lam, kl_estimator, whiten
    )
    logprobs, entropy, lse = token_logprobs_fwd(logits, tokens, mask, temperature, softcap, True)
    # The mask's own count divides, which no logit can change: a token's gradient follows from its own row.
    total = normalizer_of(mask, normalizer, entropy.dtype)
    loss, stats, dlogprobs, dvalues = ppo_loss_fwd(
        logprobs,
        old_logprobs,
        advantages,
        values,
        old_values,
        returns,
        mask,
        total,
        cliprange,
        cliprange_high,
        cliprange_value,
        vf_coef,
        dual_clip,
        with_grad,
    )
    loss = loss - entropy_coef * entropy.sum() / total
    position = FusedPPOStats._fields.index("entropy")
    stats = torch.cat([stats[:position], _mean(entropy, mask)[None], stats[position:]])
    if not with_grad:
        return loss, stats, logits.new_empty(0), values.new_empty(0)
    dentropy = None if entropy_coef == 0 else (-entropy_coef / total).expand_as(entropy)
    dlogits = token_logprobs_bwd(logits, tokens, mask, lse, entropy, dlogprobs, dentropy, temperature, softcap)
    return loss, stats, dlogits, dvalues


def fused_ppo_loss_fwd_out(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *given, out = arguments
    loss, stats, dlogits, dvalues = fused_ppo_loss_fwd(*[*given, True])
    out.copy_(dlogits)
    return loss, stats, dvalues


def linear_ppo_loss_fwd(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    ref_logprobs: Tensor | None,
    normalizer: Tensor | None,
    temperature: float,
    cliprange: float,
    cliprange_high: float,
    dual_clip: float | None,
    entropy_coef: float,
    kl_coef: float,
    needs: list[bool],
    memory_budget: int | None,
    max_tokens: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    mask = mask & (tokens >= 0)
    missed = without_room("linear_ppo_loss", mask, max_tokens)
    flat = [x.reshape(-1) for x in (tokens, old_logprobs, advantages, mask)]
    flat_ref = None if ref_logprobs is None else ref_logprobs.reshape(-1)
    rows = counted_rows(hidden, tokens, mask)
    dtype = compute_dtype(hidden)
    total = torch.where(missed.any(), torch.nan, normalizer_of(mask, normalizer, dtype))
    all_logprobs, all_entropy = hidden.new_zeros(2, rows.shape[0], dtype=dtype)
    grads = LinearGrads(hidden, rows, weight, bias, needs)
    for part in row_chunks(rows, weight.shape[0], memory_budget):
        # A token's coefficient depends on its own log-probability only, so three products do forward and backward.
        logits = project(rows[part], weight, bias)
        chunk_tokens, chunk_old, chunk_advantages, chunk_mask = (x[part] for x in flat)
        logprobs, entropy, lse = token_logprobs_fwd(logits, chunk_tokens, chunk_mask, temperature, None, True)
        all_logprobs[part], all_entropy[part] = logprobs, entropy
        if any(needs):
            _, dlogprobs, _, _ = _policy_terms(
                logprobs, chunk_old, chunk_advantages, chunk_mask, cliprange, cliprange_high, dual_clip
            )
            if flat_ref is not None:
                dlogprobs = dlogprobs + kl_coef * _k3_derivative(log_difference(logprobs, flat_ref[part], chunk_mask))
            dentropy = None if entropy_coef == 0 else (-entropy_coef / total).expand_as(entropy)
            grads.add(
                part,
                token_logprobs_bwd(
                    logits, chunk_tokens, chunk_mask, lse, entropy, dlogprobs / total, dentropy, temperature, None
                ),
            )
    policy, _, stats, counted = _policy_terms(
        all_logprobs, flat[1], flat[2], flat[3], cliprange, cliprange_high, dual_clip
    )
    kl = torch.zeros_like(all_logprobs)
    if flat_ref is not None:
        kl = torch.where(counted, kl_estimate(log_difference(all_logprobs, flat_ref, counted), "k3"), 0)
    stats["policy_loss"] = policy.sum() / total
    stats["entropy"], stats["kl"] = _mean(all_entropy, flat[3]), _mean(kl, counted)
    loss = stats["policy_loss"] - entropy_coef * all_entropy.sum() / total + kl_coef * kl.sum() / total
    return loss, torch.stack([stats[name].to(dtype) for name in LinearPPOStats._fields]), *grads.result()


def _k3_derivative(difference: Tensor) -> Tensor:
    return torch.where(difference.abs() <= MAX_LOG_RATIO, -torch.expm1(-difference), 0)


# --------------------------------------------------------------------------------------------------------------- RRHF


def rrhf_loss_fwd(
    logprobs: Tensor,
    scores: Tensor,
    prompts: Tensor,
    mask: Tensor,
    rank_coef: float,
    sft_coef: float,
    length_power: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    length = mask.sum(-1)
    candidate = (length > 0) & ~scores.isnan()
    summed = torch.where(mask, upcast(logprobs), 0).sum(-1)
    scale = length.clamp(min=1).to(summed.dtype) ** -length_power
    p = summed * scale
    rivals = (prompts[:, None] == prompts) & candidate[:, None] & candidate
    earlier = torch.arange(len(scores), device=scores.device)[:, None] > torch.arange(len(scores), device=scores.device)
    worse = rivals & (scores[:, None] < scores)  # [i, j]: i scored below j
    gap = p[:, None] - p
    wrong = worse & (gap > 0)
    count = (candidate & ~(rivals & earlier).any(1)).sum().clamp(min=1).to(p.dtype)
    beaten = (rivals & ((scores[:, None] < scores) | ((scores[:, None] == scores) & earlier))).any(1)
    best = candidate & ~beaten
    rank_loss = torch.where(wrong, gap, 0).sum() / count
    sft_loss = -torch.where(best, summed, 0).sum() / count
    pairs = worse.sum().clamp(min=1).to(p.dtype)
    accuracy = (worse & (gap < 0)).sum() / pairs
    stats = torch.stack([rank_loss, sft_loss, accuracy, count * candidate.any()])
    loss = rank_coef * rank_loss + sft_coef * sft_loss
    if not with_grad:
        return loss, stats, logprobs.new_empty(0)
    dp = (wrong.sum(1) - wrong.sum(0)).to(p.dtype)
    dsummed = (rank_coef * dp * scale - sft_coef * best.to(p.dtype)) / count
    return loss, stats, torch.where(mask, dsummed[:, None], 0).to(logprobs.dtype)


def split_groups(op: str, prompts: Tensor, group_size: int | None) -> Tensor:
    """Whether a block of `group_size` responses is not exactly one prompt: an error on the CPU."""
    if group_size is None:
        return torch.zeros((), dtype=torch.bool, device=prompts.device)
    blocks = prompts.view(-1, group_size)
    first = blocks[:, 0].sort().values
    broken = (blocks != blocks[:, :1]).any() | (first[1:] == first[:-1]).any()
    if prompts.device.type == "cpu" and broken:
        wanted = f"be blocks of group_size {group_size} equal ids, each id in one block"
        raise ValueError(f"{op}: prompts must {wanted}, got {prompts.tolist()[:16]}")
    return broken


def linear_rrhf_loss_fwd(
    hidden: Tensor,
    weight: Tensor,
    tokens: Tensor,
    scores: Tensor,
    prompts: Tensor,
    mask: Tensor,
    bias: Tensor | None,
    temperature: float,
    rank_coef: float,
    sft_coef: float,
    length_power: float,
    needs: list[bool],
    group_size: int | None,
    memory_budget: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    broken = split_groups("linear_rrhf_loss", prompts, group_size)
    limits = (memory_budget, None)
    valid = mask & (tokens >= 0)
    logprobs, entropy, lse, *_ = linear_logprobs_fwd(
        hidden, weight, tokens, mask, bias, temperature, None, False, False, *limits
    )
    loss, stats, dlogprobs = rrhf_loss_fwd(
        logprobs, scores, prompts, valid, rank_coef, sft_coef, length_power, any(needs)
    )
    if any(needs):
        upstream = torch.where(broken, torch.nan, dlogprobs)
        grads = linear_logprobs_bwd(
            hidden, weight, tokens, mask, bias, lse, entropy, upstream, None, temperature, None, needs, *limits
        )
    else:
        grads = LinearGrads(hidden, counted_rows(hidden, tokens, mask), weight, bias, needs).result()
    return torch.where(broken, torch.nan, loss), stats, *grads


# ------------------------------------------------------------------------------------------------------- reward model


def rm_pairwise_loss_fwd(
    scores: Tensor,
    chosen: Tensor,
    rejected: Tensor,
    prompts: Tensor | None,
    margin: Tensor | None,
    center_coef: float,
    with_grad: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    s = upcast(scores)
    better, worse = s[chosen], s[rejected]
    difference = better - worse
    required = difference if margin is None else difference - upcast(margin, scores)
    weight = _pair_weights(better, prompts)
    total = better + worse
    loss = (weight * (_softplus(-required) + center_coef * total.square())).sum()
    stats = torch.stack(
        [
            (weight * (difference > 0)).sum(),
            (weight * difference).sum(),
            (weight * better).sum(),
            (weight * worse).sum(),
        ]
    )
    if not with_grad:
        return loss, stats, scores.new_empty(0)
    push = -torch.sigmoid(-required) * weight
    center = 2 * center_coef * total * weight
    grad = torch.zeros_like(s).index_add(0, chosen, push + center).index_add(0, rejected, center - push)
    return loss, stats, grad.to(scores.dtype)


def _softplus(x: Tensor) -> Tensor:
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


def _pair_weights(pairs: Tensor, prompts: Tensor | None) -> Tensor:
    """Weights of a mean over pairs, or of a mean within each prompt and then over prompts."""
    ones = torch.ones_like(pairs)
    if prompts is None:
        return ones / max(pairs.numel(), 1)
    per_prompt = group_sum(ones, prompts)
    return 1 / (per_prompt * _distinct(prompts).to(pairs.dtype))


def _distinct(ids: Tensor) -> Tensor:
    ordered = ids.sort().values
    return ((ordered[1:] != ordered[:-1]).sum() + 1).clamp(min=1)


def rm_listwise_loss_fwd(
    scores: Tensor, ranks: Tensor, prompts: Tensor, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    s = upcast(scores)
    same = prompts[:, None] == prompts
    beats = same & (ranks[:, None] < ranks)  # [i, j]: i was ranked above j
    rivals = beats | torch.eye(len(s), dtype=torch.bool, device=s.device)
    count = _distinct(prompts).to(s.dtype)
    # A tie says nothing about its two responses, so neither stands in the other's denominator.
    logits = torch.where(rivals, s, -torch.inf)
    lse = logits.logsumexp(-1) if len(s) else s
    loss = (lse - s).sum() / count
    pairs = beats.sum().clamp(min=1).to(s.dtype)
    accuracy = (beats & (s[:, None] > s)).sum() / pairs
    first = beats.any(1) & ~beats.any(0)
    top1 = (first & ~(same & (s > s[:, None])).any(1)).sum() / first.sum().clamp(min=1).to(s.dtype)
    stats = torch.stack([accuracy, top1])
    if not with_grad:
        return loss, stats, scores.new_empty(0)
    grad = ((logits - lse[:, None]).exp().sum(0) - 1) / count
    return loss, stats, grad.to(scores.dtype)


def rm_regression_loss_fwd(scores: Tensor, targets: Tensor, with_grad: bool) -> tuple[Tensor, Tensor, Tensor]:
    s, target = upcast(scores), upcast(targets, scores)
    error = s - target
    count = max(s.numel(), 1)
    x, y = s - s.sum() / count, target - target.sum() / count
    spread = (x.square().sum() * y.square().sum()).sqrt()
    correlation = torch.where(spread > 0, (x * y).sum() / torch.where(spread > 0, spread, 1), 0)
    stats = torch.stack([correlation, error.sum() / count])
    loss = error.square().sum() / count
    return loss, stats, (2 * error / count).to(scores.dtype) if with_grad else scores.new_empty(0)


# ----------------------------------------------------------------------------------------------------- token feedback


def token_feedback_loss_fwd(
    logits: Tensor, ref_logits: Tensor, tokens: Tensor, labels: Tensor, beta: float, kind: str, with_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    ref_logits = upcast(ref_logits, logits)
    logprobs, _, lse = token_logprobs_fwd(logits, tokens, None, 1.0, None, False)
    ref_logprobs, _, ref_lse = token_logprobs_fwd(ref_logits, tokens, None, 1.0, None, False)
    valid = tokens >= 0
    label = torch.where(valid, upcast(labels, logits), 0)
    count = valid.sum().clamp(min=1).to(logprobs.dtype)
    forbidden = logits == -torch.inf
    logp = torch.where(valid[..., None], upcast(logits), 0) - lse[..., None]
    logq = torch.where(valid[..., None], ref_logits, 0) - ref_lse[..., None]
    p, chosen = logp.exp(), _one_hot(tokens, valid, logits.shape[-1])

    # Where the target distribution is: the reference, tilted at the labelled token by exp(label / beta).
    tilt = label / beta if kind == "bandit" else torch.zeros_like(label)
    log_total = torch.logaddexp(_log1mexp(ref_logprobs), ref_logprobs + tilt)
    log_target = logq + torch.where(chosen, tilt[..., None], 0) - log_total[..., None]
    target = log_target.exp()
    to_target = torch.where(target > 0, target * (log_target - logp), 0).sum(-1)
    to_ref = torch.where(logq > -torch.inf, logq.exp() * (logq - logp), 0).sum(-1)
    if kind == "bandit":
        terms, dz = to_target, p - target
    else:
        bounded = logprobs.clamp(max=-1e-6)
        odds = (bounded - _log1mexp(bounded)).exp()  # p / (1 − p)
        terms = torch.where(label > 0, -label * logprobs, label * _log1mexp(bounded))
        push = torch.where(label > 0, -label, -label * odds)[..., None]
        dz = push * (chosen.to(p.dtype) - p)
        unlabelled = label == 0
        terms = torch.where(unlabelled, beta * to_ref, terms)
        dz = torch.where(unlabelled[..., None], beta * (p - logq.exp()), dz)
    loss = torch.where(valid, terms, 0).sum() / count
    stats = torch.stack(
        [
            _mean(logprobs, valid & (label > 0)),
            _mean(logprobs, valid & (label < 0)),
            _mean(to_ref, valid),
            valid.sum().to(logprobs.dtype),
        ]
    )
    if not with_grad:
        return loss, stats, logits.new_empty(0)
    return loss, stats, torch.where(valid[..., None] & ~forbidden, dz / count, 0).to(logits.dtype)


def token_feedback_loss_fwd_out(*arguments: Any) -> tuple[Tensor, Tensor]:
    *given, out = arguments
    loss, stats, dlogits = token_feedback_loss_fwd(*[*given, True])
    out.copy_(dlogits)
    return loss, stats


def _one_hot(tokens: Tensor, valid: Tensor, vocabulary: int) -> Tensor:
    return valid[..., None] & (tokens[..., None] == torch.arange(vocabulary, device=tokens.device))


def _log1mexp(logprob: Tensor) -> Tensor:
    """log(1 − exp(x)) for x ≤ 0 without cancellation (Mächler 2012)."""
    near_zero = logprob > -0.6931471805599453
    return torch.where(
        near_zero,
        torch.log(-torch.expm1(torch.where(near_zero, logprob, -1))),
        torch.log1p(-torch.exp(torch.where(near_zero, -1, logprob))),
    )

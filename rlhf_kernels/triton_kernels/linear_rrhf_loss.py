"""linear_rrhf_loss: whole prompts in a chunk, so that the gradient is known while the chunk's logits are there."""

import torch
from torch import Tensor

from ..reference import check_range, compute_dtype, valid_tokens
from ..reference_losses import split_groups
from . import linear_logprobs, rrhf_loss, token_logprobs
from .linear_logprobs import MEMORY_BUDGET, Chunk, LinearGrads, LiveRows, launch_gradient


def _sequences(live: LiveRows, shape: torch.Size, rows: int, group_size: int | None) -> list[tuple[int, int]]:
    """Ranges of responses of no more than `rows` rows each that do not cut a prompt; none if there is no such cut."""
    responses, columns = shape
    if len(live.places) <= rows:
        return [(0, responses)] if len(live.places) else []
    most = rows // columns
    if group_size is None or most < group_size:
        return []
    step = most // group_size * group_size
    return [(first, min(first + step, responses)) for first in range(0, responses, step)]


def fwd(
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
    valid = valid_tokens(tokens, mask)
    check_range("token_logprobs", tokens, valid, weight.shape[0])
    broken = split_groups("linear_rrhf_loss", prompts, group_size)
    live = LiveRows.of("linear_rrhf_loss", hidden, tokens, mask, None)
    dtype, columns = compute_dtype(hidden), tokens.shape[1]
    row_bytes = weight.shape[0] * dtype.itemsize
    ranges = _sequences(live, tokens.shape, (memory_budget or MEMORY_BUDGET) // row_bytes, group_size)
    coefs = (rank_coef, sft_coef, length_power)
    if not ranges or not any(needs):
        # No cut between prompts fits the budget (or no gradient is wanted): the logits are made a second time.
        logprobs, _, lse, *_ = linear_logprobs.fwd(
            hidden, weight, tokens, mask, bias, temperature, None, False, False, memory_budget, None
        )
        loss, stats, dlogprobs = rrhf_loss.fwd(logprobs, scores, prompts, valid, *coefs, any(needs))
        if any(needs):
            grads = linear_logprobs.bwd(
                hidden,
                weight,
                tokens,
                mask,
                bias,
                lse,
                lse.new_empty(0),
                torch.where(broken, torch.nan, dlogprobs),
                None,
                temperature,
                None,
                needs,
                memory_budget,
                None,
            )
        else:
            grads = LinearGrads(live, hidden, weight, bias, needs, 1).result()
        return torch.where(broken, torch.nan, loss), stats, *grads
    # Where the host has counted the rows they lie closer than their places.
    bounds = [
        last if len(live.places) == tokens.numel() else int((live.places < last).sum())
        for last in (end * columns for _, end in ranges)
    ]
    parts = [slice(first, last) for first, last in zip([0, *bounds], bounds)]
    compact = torch.zeros(len(live.places), dtype=dtype, device=hidden.device)
    count = rrhf_loss.fwd(live.scatter(compact), scores, prompts, valid, *coefs, False)[1][3].clamp(min=1)
    count = torch.where(broken, torch.nan, count)
    grads_ = LinearGrads(live, hidden, weight, bias, needs, len(parts))
    chunk = Chunk(weight, bias, max(part.stop - part.start for part in parts))
    for (first, last), part in zip(ranges, parts):
        logits = chunk.logits(live.hidden[part])
        compact[part], _, lse = token_logprobs.fwd(logits, live.tokens[part], None, temperature, None, False)
        own = (live.scatter(compact)[first:last], scores[first:last], prompts[first:last], valid[first:last])
        _, stats, dlogprobs = rrhf_loss.fwd(*own, *coefs, True)
        everywhere = torch.zeros(tokens.shape, dtype=dtype, device=hidden.device)
        everywhere[first:last] = dlogprobs * (stats[3].clamp(min=1) / count)
        upstream = live.gather(everywhere)[part]
        dlogits = chunk.gradient(logits)
        launch_gradient(logits, live.tokens[part], temperature, None, lse, None, upstream, None, dlogits)
        grads_.add(part, dlogits)
    loss, stats, _ = rrhf_loss.fwd(live.scatter(compact), scores, prompts, valid, *coefs, False)
    return torch.where(broken, torch.nan, loss), stats, *grads_.result()

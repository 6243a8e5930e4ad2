"""linear_ppo_loss: a chunk's coefficients come from its own row kernel, so three products do forward and backward."""

import torch
from torch import Tensor

from ..reference import check_range, compute_dtype, valid_tokens
from ..reference_losses import normalizer_of
from ..stats import LinearPPOStats
from .fused_ppo_loss import launch_rows
from .linear_logprobs import Chunk, LinearGrads, LiveRows
from .ppo_loss import reduce_tokens


def fwd(
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
    valid = valid_tokens(tokens, mask)
    check_range("token_logprobs", tokens, valid, weight.shape[0])
    live = LiveRows.of("linear_ppo_loss", hidden, tokens, mask, max_tokens)
    chunks = live.chunks(weight.shape[0], memory_budget)
    total = normalizer_of(valid, normalizer, compute_dtype(hidden))
    total = torch.where(live.missed.any(), torch.nan, total)
    old, advantage = live.gather(old_logprobs), live.gather(advantages)
    ref = None if ref_logprobs is None else live.gather(ref_logprobs)
    logprobs, entropy = hidden.new_empty(2, len(live.places), dtype=compute_dtype(hidden)).unbind()
    nonzero = torch.empty(len(live.places), dtype=torch.int8, device=hidden.device)
    grads = LinearGrads(live, hidden, weight, bias, needs, len(chunks))
    chunk = Chunk(weight, bias, chunks[0].stop if chunks else 0)
    for part in chunks:
        logits = chunk.logits(live.hidden[part])
        dlogits = chunk.gradient(logits) if any(needs) else None
        launch_rows(
            logits,
            live.tokens[part],
            None,
            temperature,
            None,
            logprobs[part],
            entropy[part],
            dlogits,
            old_logprobs=old[part],
            advantages=advantage[part],
            ref_logprobs=None if ref is None else ref[part],
            cliprange=cliprange,
            cliprange_high=cliprange_high,
            dual_clip=dual_clip,
            entropy_coef=entropy_coef,
            kl_coef=kl_coef,
            normalizer=total,
            live=nonzero[part],
        )
        if dlogits is not None:
            grads.add(part, dlogits, nonzero[part])
    loss, stats = reduce_tokens(
        logprobs,
        old,
        advantage,
        None,
        None,
        None,
        live.tokens >= 0,
        None,
        entropy,
        ref,
        total,
        cliprange,
        cliprange_high,
        None,
        0.0,
        dual_clip,
        entropy_coef,
        kl_coef,
        None,
        None,
        len(LinearPPOStats._fields),
        with_kl=True,
    )
    return loss, stats, *grads.result()

"""The attention probabilities of one query row of a layer, without the T×T map."""

import torch
from torch import Tensor

from . import backend, checks, reference

_triton = backend.import_triton("attention_row")


def _fake(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor,
    sink: Tensor | None,
    scale: float,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    return query.new_empty(key_mask.shape, dtype=reference.compute_dtype(query))


_attention_row = backend.register(
    "attention_row(Tensor query, Tensor key, Tensor key_mask, Tensor? sink, float scale, float? softcap, int? window) "
    "-> Tensor",
    fake=_fake,
    torch_impl=reference.attention_row,
    triton=_triton and _triton.attention_row,
)


def attention_row(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    sink: Tensor | None = None,
) -> Tensor:
    """Mean over heads of softmax_j(scale · q · k_j), for one query per sequence.

        row_j = 1/Hq Σ_h softmax_j(cap(scale · ⟨q_h, k_{h // (Hq/Hkv), j}⟩))   over the j with key_mask

    O(Hq·T·D) work and no [T, T] tensor: what a reward model's last layer looked at when it gave its score.

    Args:
        query: [B, Hq, D], the chosen row, position encoding applied.
        key: [B, Hkv, T, D], Hq a multiple of Hkv; position encoding applied.
        key_mask: [B, T] bool, True where the query may look: no padding, nothing after the query.
        scale: D**-0.5 unless given. softcap: tanh bound of the scaled scores.
        window: only the last `window` columns up to the query's own (the last True of key_mask) are seen.
        sink: [Hq] logits that join the denominator only.

    Returns:
        row [B, T] in fp32 (fp64 for fp64 query), 0 where not attended; not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.

    Source: the attention weights of Chan et al. 2024, "Dense Reward for Free in RLHF" (arXiv 2402.00782).
    """
    op = "attention_row"
    checks.ndim(op, "query", query, "[B, Hq, D]")
    checks.ndim(op, "key", key, "[B, Hkv, T, D]")
    checks.floating(op, query=query, key=key, sink=sink)
    batch, heads, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim:
        wanted = f"have shape ({batch}, Hkv, T, {dim}) {checks.to_match('query', query)}"
        checks.fail(op, "key", wanted, tuple(key.shape))
    if key.shape[1] == 0 or heads % key.shape[1]:
        checks.fail(op, "key", f"have a number of heads that divides the query's {heads}", key.shape[1])
    key_mask = checks.as_mask(op, "key_mask", key_mask)
    checks.shape(op, "key_mask", key_mask, (batch, key.shape[2]), checks.to_match("key", key))
    if sink is not None:
        checks.shape(op, "sink", sink, (heads,), checks.to_match("query", query))
    checks.same_device(op, {"query": query}, key=key, key_mask=key_mask, sink=sink)
    checks.positive(op, softcap=softcap, window=window)
    if key.dtype != query.dtype:
        checks.fail(op, "key", f"be {query.dtype} like query", key.dtype, TypeError)
    with torch.no_grad():
        return _attention_row(query, key, key_mask, sink, dim**-0.5 if scale is None else scale, softcap, window)

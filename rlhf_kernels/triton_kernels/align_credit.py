"""align_credit: what each reward-model token gives per byte that it covers, then what each policy token receives."""

import triton
import triton.language as tl
from torch import Tensor

from ..reference import compute_dtype
from .common import launch

BLOCK = tl.constexpr(32)


@triton.jit
def _span(spans, b, t, T):
    """Start and end of tokens t of row b; an end of −1 beyond the last."""
    place = spans[0] + b.to(tl.int64) * spans[1] + t.to(tl.int64) * spans[2]
    return tl.load(place, mask=t < T, other=0), tl.load(place + spans[3], mask=t < T, other=-1)


@triton.jit
def _overlap(start, end, policy_start, policy_end, DTYPE: tl.constexpr):
    """Bytes shared by tokens [BLOCK, 1] of one tokenizer and [1, BLOCK] of the other."""
    shared = tl.minimum(end, policy_end) - tl.maximum(start, policy_start)
    return tl.where(policy_end >= 0, tl.maximum(shared, 0), 0).to(DTYPE)


@triton.jit
def _align_credit_give_kernel(credit, rm_spans, policy_spans, RM_T, T, per_byte_ptr, homeless_ptr):
    b, r = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    DTYPE: tl.constexpr = per_byte_ptr.dtype.element_ty
    start, end = _span(rm_spans, b, r, RM_T)
    covered = tl.zeros((BLOCK,), DTYPE)
    for first in range(0, T, BLOCK):
        policy_start, policy_end = _span(policy_spans, b, first + tl.arange(0, BLOCK), T)
        shared = _overlap(start[:, None], end[:, None], policy_start[None, :], policy_end[None, :], DTYPE)
        covered += tl.sum(shared, 1)
    length = (end - start).to(DTYPE)
    # A token that begins in the prompt brings only the part that lies in the response.
    part = tl.maximum(end - tl.maximum(start, 0), 0).to(DTYPE)
    inside = tl.where(length > 0, part / tl.where(length > 0, length, 1.0), 1.0)
    inside = tl.where(end >= 0, inside, 0.0)
    place = credit[0] + b.to(tl.int64) * credit[1] + r.to(tl.int64) * credit[2]
    given = tl.load(place, mask=inside > 0, other=0.0).to(DTYPE) * inside
    out = b.to(tl.int64) * RM_T + r
    tl.store(per_byte_ptr + out, tl.where(covered > 0, given / tl.where(covered > 0, covered, 1.0), 0.0), mask=r < RM_T)
    tl.store(homeless_ptr + out, tl.where(covered > 0, 0.0, given), mask=r < RM_T)


@triton.jit
def _align_credit_take_kernel(rm_spans, policy_spans, RM_T, T, per_byte_ptr, homeless_ptr, out_ptr):
    b, p = tl.program_id(0), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    DTYPE: tl.constexpr = out_ptr.dtype.element_ty
    # Credit that no policy token covers goes to the last token of zero length, or else to the last token.
    last, last_empty = tl.full([], -1, tl.int32), tl.full([], -1, tl.int32)
    for first in range(0, T, BLOCK):
        t = first + tl.arange(0, BLOCK)
        policy_start, policy_end = _span(policy_spans, b, t, T)
        last = tl.maximum(last, tl.max(tl.where(policy_end >= 0, t, -1), 0))
        last_empty = tl.maximum(
            last_empty, tl.max(tl.where((policy_end >= 0) & (policy_start == policy_end), t, -1), 0)
        )
    home = tl.where(last_empty >= 0, last_empty, last)
    policy_start, policy_end = _span(policy_spans, b, p, T)
    taken, homeless = tl.zeros((BLOCK,), DTYPE), tl.zeros((BLOCK,), DTYPE)
    for first in range(0, RM_T, BLOCK):
        r = first + tl.arange(0, BLOCK)
        start, end = _span(rm_spans, b, r, RM_T)
        place = b.to(tl.int64) * RM_T + r
        per_byte = tl.load(per_byte_ptr + place, mask=r < RM_T, other=0.0)
        shared = _overlap(start[None, :], end[None, :], policy_start[:, None], policy_end[:, None], DTYPE)
        taken += tl.sum(tl.where(shared > 0, shared * per_byte[None, :], 0.0), 1)
        homeless += tl.load(homeless_ptr + place, mask=r < RM_T, other=0.0)
    taken += tl.where(p == home, tl.sum(homeless, 0), 0.0)
    tl.store(out_ptr + b.to(tl.int64) * T + p, taken, mask=p < T)


def align_credit(credit: Tensor, rm_spans: Tensor, policy_spans: Tensor) -> Tensor:
    (batch, rm_columns), columns = credit.shape, policy_spans.shape[1]
    out = credit.new_empty(batch, columns, dtype=compute_dtype(credit))
    per_byte, homeless = out.new_empty(2, batch, rm_columns).unbind()
    spans = ((rm_spans, *rm_spans.stride()), (policy_spans, *policy_spans.stride()))
    sizes = (rm_columns, columns, per_byte, homeless)
    source = (credit, *credit.stride())
    launch(_align_credit_give_kernel, (batch, triton.cdiv(rm_columns, BLOCK.value)), source, *spans, *sizes)
    launch(_align_credit_take_kernel, (batch, triton.cdiv(columns, BLOCK.value)), *spans, *sizes, out)
    return out

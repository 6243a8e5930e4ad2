"""Credit carried from one tokenizer's tokens to another's, through byte offsets."""

import torch
from torch import Tensor

from . import backend, checks, reference

_triton = backend.import_triton("align_credit")


def _fake(credit: Tensor, rm_spans: Tensor, policy_spans: Tensor) -> Tensor:
    return credit.new_empty(policy_spans.shape[:2], dtype=reference.compute_dtype(credit))


_align_credit = backend.register(
    "align_credit(Tensor credit, Tensor rm_spans, Tensor policy_spans) -> Tensor",
    fake=_fake,
    torch_impl=reference.align_credit,
    triton=_triton and _triton.align_credit,
)


def align_credit(credit: Tensor, rm_spans: Tensor, policy_spans: Tensor) -> Tensor:
    """Credit of the reward model's tokens on the policy's tokens of the same response text.

        out_t = Σ_j credit_j · |span_t ∩ span_j| / Σ_t' |span_t' ∩ span_j|

    A reward-model token of zero length (end of sequence) or with no policy token under it goes to the policy's last
    zero-length token (its end of sequence) if there is one, else to its last token. The sum is kept; a token that
    begins in the prompt (negative start) brings the share of its bytes that lie in the response.

    Args:
        credit: [B, Tr] float, any sign.
        rm_spans: [B, Tr, 2] int64 (start, end) byte offsets from the start of the response; padding is (−1, −1).
        policy_spans: [B, Tp, 2] int64, the same for the policy's tokens.

    Returns:
        credit [B, Tp] in fp32 (fp64 for fp64 credit), 0 on padding; not differentiable.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    op = "align_credit"
    checks.ndim(op, "credit", credit, "[B, Tr]")
    checks.floating(op, credit=credit)
    checks.ndim(op, "policy_spans", policy_spans, "[B, Tp, 2]")
    checks.is_tensor(op, rm_spans=rm_spans)
    checks.shape(op, "rm_spans", rm_spans, (*credit.shape, 2), checks.to_match("credit", credit))
    wanted = (credit.shape[0], policy_spans.shape[1], 2)
    checks.shape(op, "policy_spans", policy_spans, wanted, checks.to_match("credit", credit))
    checks.index(op, rm_spans=rm_spans, policy_spans=policy_spans)
    checks.same_device(op, {"credit": credit}, rm_spans=rm_spans, policy_spans=policy_spans)
    with torch.no_grad():
        return _align_credit(credit, rm_spans, policy_spans)

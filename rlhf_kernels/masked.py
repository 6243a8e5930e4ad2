"""Mean and whitening over the places that count. Plain torch, differentiable, any shape."""

import torch
from torch import Tensor

from . import checks


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Σ x·mask / max(Σ mask, 1): the mean over the True places, 0 when there are none.

    Args:
        x: float, any shape; what stands at False places is never read into the result, NaN included.
        mask: bool, the shape of x.

    Returns:
        0-d tensor, fp32 (fp64 for fp64 x).
    """
    mask = _checked_mask("masked_mean", x, mask)
    return _masked_sum(x, mask) / mask.sum().clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, *, shift_mean: bool = True, unbiased: bool = False) -> Tensor:
    """(x − μ) · rsqrt(σ² + 1e-8) over the n True places; 0 at the others.

    Args:
        x: float, any shape. mask: bool, the shape of x.
        shift_mean: False adds μ back, which rescales x without moving its mean.
        unbiased: σ² is the sum of squares over n − 1 rather than over n.

    Returns:
        the shape of x, fp32 (fp64 for fp64 x). A single True place gives 0 (μ with shift_mean=False), none gives 0.

    Source: Ziegler et al. 2019 (arXiv 1909.08593), which whitens advantages (and rewards without the shift).
    """
    mask = _checked_mask("masked_whiten", x, mask)
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    count = mask.sum().clamp(min=1)
    mean = _masked_sum(x, mask) / count
    centered = torch.where(mask, x - mean, 0)
    # Two passes: E[x²] − E[x]² cancels in fp32.
    variance = centered.square().sum() / ((count - 1).clamp(min=1) if unbiased else count)
    whitened = centered * torch.rsqrt(variance + 1e-8)
    return whitened if shift_mean else torch.where(mask, whitened + mean, 0)


def _masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, x, 0).sum(dtype=torch.promote_types(x.dtype, torch.float32))


def _checked_mask(op: str, x: Tensor, mask: Tensor) -> Tensor:
    checks.is_tensor(op, x=x)
    checks.floating(op, x=x)
    mask = checks.as_mask(op, "mask", mask)
    checks.same_shape(op, {"x": x}, mask=mask)
    return mask

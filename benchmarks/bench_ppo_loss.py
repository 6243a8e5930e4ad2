"""ppo_loss: the clipped policy and value loss over [B, T].

Limit: six tensors and the mask are read once, 25 bytes a token in fp32; with the two gradients written, 33. Ours gives
ten statistics as well, the formula beside it only the loss; the gradient needs the number of tokens first, so ours
reads everything a second time for it. There is no "bwd" alone: an op may compute its gradients in
the forward pass (ours does), so only the sum of both says anything.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .bench_gae import padded_mask
from .harness import Case, Work

CLIPRANGE, CLIPRANGE_VALUE, VF_COEF = 0.2, 0.2, 0.1
GRAPHED = True


def cases() -> list[Case]:
    return [
        Case({"B": 512, "T": 2048}),
        Case({"B": 8, "T": 64}, quick=True),
        Case({"B": 64, "T": 2048}, device="cuda"),
        Case({"B": 1024, "T": 32768}, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    """In the order of the op. Steps lie on a grid off the clip bounds, where rounding would decide what is clipped."""
    shape = case.sizes["B"], case.sizes["T"]
    logprobs, values, advantages = -torch.rand(shape) * 4, torch.randn(shape), torch.randn(shape)
    old_logprobs, old_values = logprobs - _grid(0.2, shape), values - _grid(0.2, shape)
    returns = old_values + _grid(0.5, shape)
    floats = [x.to(case.dtype) for x in (logprobs, old_logprobs, advantages, values, old_values, returns)]
    for differentiable in (floats[0], floats[3]):
        differentiable.requires_grad_()
    return *floats, padded_mask(*shape)


def _grid(scale: float, shape: tuple[int, int]) -> Tensor:
    return ((scale * torch.randn(shape)).mul(100).round() + 0.5) / 100


def work(case: Case) -> dict[str, Work]:
    tokens, size = case.sizes["B"] * case.sizes["T"], case.dtype.itemsize
    read = tokens * (6 * size + 1)
    return {"fwd": Work(read), "fwd+bwd": Work(read + 2 * tokens * size, moved=2 * read + 2 * tokens * size)}


def ours(case: Case):
    def loss(*tensors: Tensor) -> Tensor:
        clips = {"cliprange": CLIPRANGE, "cliprange_value": CLIPRANGE_VALUE}
        return rk.ppo_loss(*tensors, **clips, vf_coef=VF_COEF)[0]

    return loss


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
) -> Tensor:
    weight = mask.to(logprobs.dtype)
    ratio = (logprobs - old_logprobs).exp()
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIPRANGE, 1 + CLIPRANGE))
    clipped = old_values + (values - old_values).clamp(-CLIPRANGE_VALUE, CLIPRANGE_VALUE)
    value = 0.5 * torch.max((values - returns).square(), (clipped - returns).square())
    return ((policy + VF_COEF * value) * weight).sum() / weight.sum()

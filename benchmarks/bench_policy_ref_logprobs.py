"""policy_ref_logprobs: log-probabilities under policy and reference, entropy and exact KL of N rows of V logits.

Limit: both logits are read once, 2·N·V elements; backward reads them again and writes one gradient, so 3·N·V, and 5·N·V
for both. Ours moves just that.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from .bench_token_logprobs import log_softmax
from .harness import Case, Work, sliced


def cases() -> list[Case]:
    return [
        Case({"N": 512, "V": 50257}),
        Case({"N": 512, "V": 50257}, torch.bfloat16),
        Case({"N": 16, "V": 1009}, quick=True),
        Case({"N": 4096, "V": 128256}, torch.bfloat16, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    rows, vocabulary = case.sizes["N"], case.sizes["V"]
    logits = (3 * torch.randn(rows, vocabulary)).to(case.dtype)
    ref_logits = (logits + torch.randn(rows, vocabulary)).to(case.dtype)
    return logits.requires_grad_(), ref_logits, torch.randint(vocabulary, (rows,))


def work(case: Case) -> dict[str, Work]:
    logits = case.sizes["N"] * case.sizes["V"] * case.dtype.itemsize
    beside = case.sizes["N"] * (8 + 4 * 4)  # tokens, and results or their gradients
    return {
        "fwd": Work(2 * logits + beside),
        "bwd": Work(3 * logits + beside),
        "fwd+bwd": Work(5 * logits + 2 * beside),
    }


def ours(case: Case):
    def differentiable(*tensors: Tensor) -> tuple[Tensor, ...]:
        logprobs, _, entropy, kl = rk.policy_ref_logprobs(*tensors)
        return logprobs, entropy, kl

    return differentiable


def formula(case: Case):
    return lambda *tensors: sliced(plain, case.sizes["V"], *tensors)


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(logits: Tensor, ref_logits: Tensor, tokens: Tensor) -> tuple[Tensor, ...]:
    logp, logq = log_softmax(logits), log_softmax(ref_logits)
    p = logp.exp()
    return logp.gather(-1, tokens[..., None])[..., 0], -(p * logp).sum(-1), (p * (logp - logq)).sum(-1)

"""token_logprobs: log π(token) (and the entropy) of N rows of V logits.

Limit: forward reads the logits once, N·V elements; backward reads them again and writes as many gradients, so 2·N·V,
and 3·N·V for both. Memory decides as long as an exp costs less than reading its operand. The tokens and the results are
a rounding error beside it. With a "given buffer" the gradient goes to memory that the caller has used before: on a CPU
the pages of fresh memory cost more than the arithmetic.
"""

import torch
from torch import Tensor

import rlhf_kernels as rk

from . import peers as peers_
from .harness import Case, Work, sliced


def cases() -> list[Case]:
    return [
        Case({"N": 1024, "V": 50257}),
        Case({"N": 1024, "V": 50257}, torch.bfloat16),
        Case({"N": 1024, "V": 50257}, variant="given buffer"),
        Case({"N": 1024, "V": 50257}, variant="entropy"),
        Case({"N": 64, "V": 1009}, quick=True),
        Case({"N": 64, "V": 1009}, torch.bfloat16, "entropy", quick=True),
        Case({"N": 64, "V": 1009}, variant="given buffer", quick=True),
        Case({"N": 8192, "V": 128256}, torch.bfloat16, device="cuda"),
        Case({"N": 2048, "V": 128256}, device="cuda"),
        Case({"N": 8192, "V": 128256}, torch.bfloat16, "entropy", device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    rows, vocabulary = case.sizes["N"], case.sizes["V"]
    logits = (3 * torch.randn(rows, vocabulary)).to(case.dtype)
    return logits.requires_grad_(), torch.randint(vocabulary, (rows,))


def work(case: Case) -> dict[str, Work]:
    rows, vocabulary = case.sizes["N"], case.sizes["V"]
    logits = rows * vocabulary * case.dtype.itemsize
    beside = rows * (8 + 4 * (2 if case.variant == "entropy" else 1))  # tokens, and results or their gradients
    return {"fwd": Work(logits + beside), "bwd": Work(2 * logits + beside), "fwd+bwd": Work(3 * logits + 2 * beside)}


def ours(case: Case):
    if case.variant == "given buffer":
        shape = case.sizes["N"], case.sizes["V"]
        buffer = torch.zeros(shape, dtype=case.dtype)  # written once: its pages are there
        return lambda logits, tokens: rk.token_logprobs(logits, tokens, grad_buffer=buffer)
    return rk.token_logprobs_entropy if case.variant == "entropy" else rk.token_logprobs


def formula(case: Case):
    return logprobs_entropy_in_slices if case.variant == "entropy" else logprobs_in_slices


def peers(case: Case):
    plain = logprobs_entropy if case.variant == "entropy" else logprobs
    found = {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}
    if case.variant != "entropy":
        found["F.cross_entropy"] = peers_.cross_entropy
        found["TRL selective_log_softmax"] = peers_.of("trl", peers_.trl_selective_log_softmax)
        found["Liger cross entropy"] = peers_.of("liger_kernel", peers_.liger_cross_entropy)
    return found


def logprobs(logits: Tensor, tokens: Tensor) -> Tensor:
    return log_softmax(logits).gather(-1, tokens[..., None]).squeeze(-1)


def logprobs_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    everything = log_softmax(logits)
    return everything.gather(-1, tokens[..., None]).squeeze(-1), -(everything.exp() * everything).sum(-1)


def logprobs_in_slices(logits: Tensor, tokens: Tensor) -> Tensor:
    return sliced(logprobs, logits[0].numel(), logits, tokens)


def logprobs_entropy_in_slices(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    return sliced(logprobs_entropy, logits[0].numel(), logits, tokens)


def log_softmax(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)

"""linear_logprobs: log π(token) from N hidden states of size H and a head [V, H].

Limit: one matrix product of 2·N·V·H FLOP forward and two backward; with a "frozen head" two forward, the second for the
gradient of hidden, and none backward. Ours makes the logits a second time where it does not keep them (on a GPU, or
beyond a CPU's budget), a fourth product. Beside the products it writes each chunk of fp32 logits and reads it back, 8
bytes an element forward and 12 backward.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from . import peers as peers_
from .bench_token_logprobs import logprobs
from .harness import Case, Work, sliced


def cases() -> list[Case]:
    return [
        Case({"N": 1024, "H": 1024, "V": 50257}, torch.bfloat16),
        Case({"N": 1024, "H": 1024, "V": 50257}, torch.bfloat16, "frozen head"),
        Case({"N": 512, "H": 1024, "V": 50257}),
        Case({"N": 32, "H": 16, "V": 1009}, quick=True),
        Case({"N": 32, "H": 16, "V": 1009}, variant="frozen head", quick=True),
        Case({"N": 8192, "H": 4096, "V": 128256}, torch.bfloat16, device="cuda"),
        Case({"N": 8192, "H": 4096, "V": 128256}, torch.bfloat16, "frozen head", device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    rows, width, vocabulary = case.sizes.values()
    hidden, weight = (
        torch.randn(rows, width).to(case.dtype),
        (torch.randn(vocabulary, width) / width**0.5).to(case.dtype),
    )
    frozen = case.variant == "frozen head"
    return hidden.requires_grad_(), weight.requires_grad_(not frozen), torch.randint(vocabulary, (rows,))


def work(case: Case) -> dict[str, Work]:
    rows, width, vocabulary = case.sizes.values()
    product, size = 2 * rows * width * vocabulary, case.dtype.itemsize
    given, logits = size * (rows + vocabulary) * width, rows * vocabulary
    if case.variant == "frozen head":
        return {
            "fwd": Work(given, product, given + 8 * logits),
            "fwd+bwd": Work(given + size * rows * width, 2 * product, given + 12 * logits),
        }
    return {
        "fwd": Work(given, product, given + 8 * logits),
        "bwd": Work(2 * given, 2 * product, 2 * given + 12 * logits),
        "fwd+bwd": Work(3 * given, 3 * product, 3 * given + 20 * logits),
    }


def ours(case: Case):
    return rk.linear_logprobs


def formula(case: Case):
    return plain_in_slices


def peers(case: Case):
    peers = {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}
    if hasattr(F, "linear_cross_entropy"):
        peers["F.linear_cross_entropy"] = cross_entropy
    else:
        peers["F.linear_cross_entropy"] = f"torch {torch.__version__} does not have it"
    peers["TRL ChunkedLogProbFunction"] = peers_.of("trl", peers_.trl_chunked_logprob)
    return peers


def plain(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return logprobs(F.linear(hidden, weight), tokens)


def plain_in_slices(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return sliced(lambda x, y, w: plain(x, w, y), weight.shape[0], hidden, tokens, whole=(weight,))


def cross_entropy(hidden: Tensor, weight: Tensor, tokens: Tensor) -> Tensor:
    return -F.linear_cross_entropy(hidden, weight, tokens, reduction="none")

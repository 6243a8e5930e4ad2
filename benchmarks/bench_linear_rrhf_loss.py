"""linear_rrhf_loss: RRHF from the hidden states [K, T, H] of K responses and a head [V, H].

Limit: as in linear_ppo_loss three matrix products of 2·K·T·V·H FLOP, where whole prompts fit a chunk. Beside them ours
writes each chunk of fp32 logits, reads it twice, and writes the gradient over it, which two products read.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import rlhf_kernels as rk

from .bench_gae import padded_mask
from .bench_rrhf_loss import GROUP
from .bench_rrhf_loss import plain as rrhf
from .bench_token_logprobs import logprobs
from .harness import Case, Work


def cases() -> list[Case]:
    return [
        Case({"K": 16, "T": 64, "H": 1024, "V": 50257}, torch.bfloat16),
        Case({"K": 8, "T": 4, "H": 16, "V": 1009}, quick=True),
        Case({"K": 32, "T": 128, "H": 4096, "V": 128256}, torch.bfloat16, device="cuda"),
    ]


def inputs(case: Case) -> tuple[Tensor, ...]:
    responses, columns, width, vocabulary = case.sizes.values()
    hidden = torch.randn(responses, columns, width).to(case.dtype)
    weight = (torch.randn(vocabulary, width) / width**0.5).to(case.dtype)
    tokens, prompts = torch.randint(vocabulary, (responses, columns)), torch.arange(responses) // GROUP
    mask = padded_mask(responses, columns)
    return hidden.requires_grad_(), weight.requires_grad_(), tokens, torch.randn(responses), prompts, mask


def work(case: Case) -> dict[str, Work]:
    responses, columns, width, vocabulary = case.sizes.values()
    rows, size = responses * columns, case.dtype.itemsize
    product, given, logits = 2 * rows * width * vocabulary, size * (rows + vocabulary) * width, rows * vocabulary
    return {
        "fwd": Work(given, product, given + 8 * logits),
        "fwd+bwd": Work(2 * given, 3 * product, 4 * given + (12 + 3 * size) * logits),
    }


def ours(case: Case):
    return lambda *tensors: rk.linear_rrhf_loss(*tensors, group_size=GROUP)[0]


def formula(case: Case):
    return plain


def peers(case: Case):
    return {"torch eager": plain, "torch.compile": torch.compile(plain, dynamic=False)}


def plain(hidden: Tensor, weight: Tensor, tokens: Tensor, scores: Tensor, prompts: Tensor, mask: Tensor) -> Tensor:
    return rrhf(logprobs(F.linear(hidden, weight), tokens), scores, prompts, mask)

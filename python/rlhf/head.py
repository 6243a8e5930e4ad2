"""The language-model head apart from its trunk: log-probabilities where whole logits would take too much memory.

Logits of up to WHOLE_LOGITS bytes are made whole, which is fastest. Where they would be larger, as with 128,000 tokens
in the vocabulary they soon are, the last hidden states go into `rk.linear_logprobs`, which has a chunk of them at a
time. That needs a head that is a matrix product, and perhaps a softcap, and nothing more; whether it is, is tried out.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from .data import Batch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

WHOLE_LOGITS = 256 << 20
"""Bytes, counted in fp32."""

_PLAIN: WeakKeyDictionary[nn.Module, bool] = WeakKeyDictionary()


class Head(NamedTuple):
    """logits = softcap · tanh((hidden · weightᵀ + bias) / softcap); without a softcap what is in the brackets first."""

    weight: Tensor  # [V, H]
    bias: Tensor | None
    softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        found = nn.functional.linear(hidden, self.weight, self.bias)
        return found if self.softcap is None else self.softcap * torch.tanh(found / self.softcap)


def head_for(model: PreTrainedModel, batch: Batch) -> Head | None:
    """The head, where the logits of the batch's response tokens would be too large to be made whole; None elsewhere."""
    from .cpu import OneDnnLinear

    module = model.get_output_embeddings()
    if type(module) not in (nn.Linear, OneDnnLinear):  # an adapter on the head does more than the product
        return None
    if 4 * batch.mask.numel() * module.out_features <= WHOLE_LOGITS:
        return None
    head = Head(module.weight, module.bias, getattr(model.config, "final_logit_softcapping", None))
    if model not in _PLAIN:
        _PLAIN[model] = is_plain(model, head)
    return head if _PLAIN[model] else None


@torch.no_grad()
def is_plain(model: PreTrainedModel, head: Head) -> bool:
    """Whether the head gives the model's logits of two tokens: some models scale theirs too."""
    tokens = torch.tensor([[0, 1]], device=model.device)
    wanted = model(input_ids=tokens, use_cache=False).logits.float()
    found = head.logits(model.base_model(input_ids=tokens, use_cache=False).last_hidden_state).float()
    scale, tolerance = wanted.abs().max().item(), 1e-4 if model.dtype == torch.float32 else 3e-2
    return scale > 0 and (found - wanted).abs().max().item() <= tolerance * scale


def response_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """[B, T, H]: the last hidden states from which each response token is predicted, those of the position before."""
    states = model.base_model(
        input_ids=batch.tokens,
        attention_mask=batch.attention_mask,
        position_ids=batch.position_ids,
        use_cache=False,
    ).last_hidden_state
    return states[:, -batch.mask.shape[1] - 1 : -1]


def logprobs_of(head: Head, hidden: Tensor, batch: Batch, temperature: float = 1.0) -> Tensor:
    """[B, T] fp32, 0 outside the mask; differentiable."""
    return rk.linear_logprobs(hidden, head.weight, batch.responses, batch.mask, **_rest(head, temperature))


def logprobs_entropy_of(head: Head, hidden: Tensor, batch: Batch, temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    return rk.linear_logprobs_entropy(hidden, head.weight, batch.responses, batch.mask, **_rest(head, temperature))


def _rest(head: Head, temperature: float) -> dict[str, Any]:
    return {"bias": head.bias, "softcap": head.softcap, "temperature": temperature}


@torch.no_grad()
def likeliest(head: Head, hidden: Tensor) -> Tensor:
    """[...] int64: the token with the largest logit."""
    rows = hidden.reshape(-1, hidden.shape[-1])
    size = max(1, WHOLE_LOGITS // (4 * len(head.weight)))
    return torch.cat([head.logits(part).argmax(-1) for part in rows.split(size)]).view(hidden.shape[:-1])

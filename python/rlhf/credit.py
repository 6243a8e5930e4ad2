"""Credit: how a response's score is spread over its tokens.

The attention of a model's last layer comes through transformers' AttentionInterface: every layer runs as it always
does (SDPA; the model's own eager function for the few architectures that SDPA cannot do), and the last layer's query
and key are kept on the side. `rk.attention_row` then makes the one row that is wanted; there is no [T, T] map.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .data import Batch
from .model import head_scores, hidden_states, last_attended

if TYPE_CHECKING:
    from transformers import PreTrainedModel

KINDS = ("terminal", "abc", "abc-policy", "uniform")


@dataclass
class LastLayer:
    """What one forward pass of a model left of its last attention layer: query [B, Hq, L, D], key [B, Hkv, L, D]."""

    index: int
    query: Tensor | None = None
    key: Tensor | None = None
    layer_mask: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    sink: Tensor | None = None

    def keep(self, query: Tensor, key: Tensor, layer_mask: Tensor | None, options: dict[str, Any]) -> None:
        if options.get("position_bias") is not None:
            raise ValueError("attention_row: a layer with a position bias is not supported")
        self.query, self.key, self.layer_mask = query.detach(), key.detach(), layer_mask
        self.scale = options.get("scaling")
        self.softcap = options.get("softcap")
        self.window = options.get("sliding_window")
        self.sink = None if options.get("s_aux") is None else options["s_aux"].detach()

    def row(self, index: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] fp32: the attention of position index[b] over all keys up to it, mean over heads."""
        if self.query is None or self.key is None:
            raise ValueError(
                "attention_row: the model's last layer did not go through transformers' AttentionInterface"
            )
        rows = torch.arange(len(index), device=index.device)
        columns = torch.arange(attention_mask.shape[1], device=index.device)
        key_mask = attention_mask & (columns <= index[:, None])
        if self.layer_mask is not None:
            # The layer's own mask also knows what no option tells, such as chunks: True, or 0 where it is additive.
            allowed = self.layer_mask.expand(len(index), -1, -1, -1)[rows, 0, index]
            key_mask = key_mask & (allowed if allowed.dtype == torch.bool else allowed == 0)
        return rk.attention_row(
            self.query[rows, :, index],
            self.key,
            key_mask,
            scale=self.scale,
            softcap=self.softcap,
            window=self.window,
            sink=self.sink,
        )


_listening: ContextVar[LastLayer | None] = ContextVar("rlhf_last_layer", default=None)


def _sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _keep(module, query, key, attention_mask, options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    _keep(module, query, key, attention_mask, options)
    forward = sys.modules[type(module).__module__].eager_attention_forward
    return forward(module, query, key, value, attention_mask, **options)


def _keep(module: Any, query: Tensor, key: Tensor, attention_mask: Tensor | None, options: dict[str, Any]) -> None:
    layer = _listening.get()
    if layer is not None and module.layer_idx == layer.index:
        layer.keep(query, key, attention_mask, options)


@contextmanager
def last_layer(model: PreTrainedModel) -> Iterator[LastLayer]:
    """Keeps query and key of the last attention layer of the forward pass made inside; may be nested.

    The model's attention implementation is set back on leaving, also after an error.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register("rlhf_row_sdpa", _sdpa)
    AttentionInterface.register("rlhf_row_eager", _eager)
    AttentionMaskInterface.register("rlhf_row_sdpa", sdpa_mask)
    AttentionMaskInterface.register("rlhf_row_eager", eager_mask)
    before = model.config._attn_implementation
    layer = LastLayer(index=model.config.get_text_config().num_hidden_layers - 1)
    token = _listening.set(layer)
    try:
        if not before.startswith("rlhf_row_"):
            model.set_attn_implementation("rlhf_row_eager" if before == "eager" else "rlhf_row_sdpa")
        yield layer
    finally:
        model.set_attn_implementation(before)
        _listening.reset(token)


@torch.no_grad()
def last_attention_row(
    model: PreTrainedModel, tokens: Tensor, attention_mask: Tensor, *, micro_batch: int | None = None
) -> tuple[Tensor, Tensor]:
    """A reward model's scores and the attention that its last layer paid from the place where they are read.

    Args:
        tokens: [B, L] int64, padded on either side. attention_mask: [B, L] bool.
        micro_batch: rows at a time, None for all.

    Returns:
        scores [B] fp32, normalised, as `scores` gives them, and row [B, L] fp32: the probabilities of the last attended
        token over all tokens, mean over the heads of the last layer. One forward pass gives both.
    """
    size = micro_batch or max(1, len(tokens))
    results = []
    for part, mask in zip(tokens.split(size), attention_mask.bool().split(size)):
        last = last_attended(mask)
        with last_layer(model) as layer:
            hidden = hidden_states(model, part, mask)
        pooled = hidden[torch.arange(len(part), device=part.device), last]
        results.append((head_scores(model, pooled), layer.row(last, mask)))
    return torch.cat([score for score, _ in results]), torch.cat([row for _, row in results])


@torch.no_grad()
def policy_attention(model: PreTrainedModel, batch: Batch, *, micro_batch: int | None = None) -> Tensor:
    """[B, T] fp32: the attention that a policy's last layer paid to each response token while it wrote on.

    For response token t the mean over the later steps of the same response, s = t+1 … n−1, of the attention from the
    position that predicts token s. The last token is seen by no step and gets 0.
    """
    return torch.cat([_policy_attention(model, part) for part in batch.split(micro_batch)])


def _policy_attention(model: PreTrainedModel, batch: Batch) -> Tensor:
    with last_layer(model) as layer:
        hidden_states(model, batch.tokens, batch.attention_mask)
    length = batch.mask.shape[1]
    total = torch.zeros(batch.mask.shape, device=batch.mask.device)
    for step in range(1, length):
        index = torch.full((len(batch),), batch.prompt_width + step - 1, device=batch.mask.device)
        row = layer.row(index, batch.attention_mask)[:, batch.prompt_width :]
        total += torch.where(batch.mask[:, step, None], row, 0)
    lengths = batch.mask.sum(1, keepdim=True)
    seen_by = (lengths - 1 - torch.arange(length, device=batch.mask.device)).clamp(min=1)
    return torch.where(batch.mask, total / seen_by, 0)


def credit_weights(
    kind: str, batch: Batch, *, attention_row: Tensor | None = None, policy: PreTrainedModel | None = None
) -> Tensor | None:
    """The `attention` [B, T] that `rk.token_rewards` spreads a score by; None for all of it on the last token.

    Args:
        kind: "terminal"; "abc", the reward model's attention; "abc-policy", the policy's own; "uniform".
        attention_row: [B, P+T], what `last_attention_row` gave for this batch; needed by "abc".
        policy: needed by "abc-policy".
    """
    if kind == "terminal":
        return None
    if kind == "uniform":
        return batch.mask.float()
    if kind == "abc" and attention_row is not None:
        return attention_row[:, batch.prompt_width :]
    if kind == "abc-policy" and policy is not None:
        return policy_attention(policy, batch)
    if kind in KINDS:
        needed = "attention_row" if kind == "abc" else "policy"
        raise ValueError(f"credit_weights: {needed} must be given for kind {kind!r}, got None")
    raise ValueError(f"credit_weights: kind must be one of {', '.join(KINDS)}, got {kind!r}")

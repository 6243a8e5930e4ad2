"""What a model's attention layers looked at, one row at a time.

Query, key and value of the chosen layers come through transformers' AttentionInterface: every layer runs as it always
does (SDPA; the model's own eager function for the few architectures that SDPA cannot do), and what is wanted is kept
on the side. `rk.attention_row` then makes the one row that is wanted; there is no [T, T] map.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import rlhf_kernels as rk

from .config import UserError
from .data import Batch
from .model import hidden_states

if TYPE_CHECKING:
    from transformers import PreTrainedModel

REDUCTIONS = ("mean", "renorm", "max")


@dataclass(frozen=True)
class AttentionChoice:
    """Which attention counts.

    layers: indices, negative ones from the end; their rows are averaged. heads: indices; none for all of them.
    reduction: of a layer's heads; "mean", "renorm" (each head normalised over the response, then the mean), "max".
    """

    layers: tuple[int, ...] = (-1,)
    heads: tuple[int, ...] = ()
    reduction: str = "mean"


LAST_LAYER = AttentionChoice()


@dataclass
class AttentionLayer:
    """What a forward pass left of an attention layer: query [B, Hq, L, D], key [B, Hkv, L, D], value like key."""

    module: nn.Module | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    layer_mask: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    window: int | None = None
    sink: Tensor | None = None

    def keep(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any]
    ) -> None:
        if options.get("position_bias") is not None:
            raise UserError("attention: a layer with a position bias is not supported")
        self.module, self.layer_mask = module, mask
        self.query, self.key, self.value = query.detach(), key.detach(), value.detach()
        self.scale = options.get("scaling")
        self.softcap = options.get("softcap")
        self.window = options.get("sliding_window")
        self.sink = None if options.get("s_aux") is None else options["s_aux"].detach()

    def row(self, index: Tensor, attention_mask: Tensor) -> Tensor:
        """[B, L] fp32: the attention of position index[b] over all keys up to it, mean over heads."""
        query, key = self._kept()
        return self._row(query, key, self.sink, index, self._key_mask(index, attention_mask))

    def head_rows(self, index: Tensor, attention_mask: Tensor, heads: Sequence[int] = ()) -> Tensor:
        """[B, H, L] fp32: the same of each of these heads, or of all."""
        query, key = self._kept()
        count, shared = query.shape[1], query.shape[1] // key.shape[1]
        key_mask = self._key_mask(index, attention_mask)
        rows = []
        for head in heads or range(count):
            if not -count <= head < count:
                raise UserError(f"attention_heads must lie in 0 to {count - 1}, the model's heads, got {head}")
            head %= count
            group = head // shared
            sink = None if self.sink is None else self.sink[head : head + 1]
            rows.append(self._row(query[:, head : head + 1], key[:, group : group + 1], sink, index, key_mask))
        return torch.stack(rows, 1)

    def reduced_row(self, index: Tensor, attention_mask: Tensor, choice: AttentionChoice, response: Tensor) -> Tensor:
        """[B, L] fp32: one row as `choice` wants it. response: [B, L] bool, what "renorm" normalises over."""
        if choice.reduction == "mean" and not choice.heads:
            return self.row(index, attention_mask)
        rows = self.head_rows(index, attention_mask, choice.heads)
        if choice.reduction == "max":
            return rows.amax(1)
        if choice.reduction == "renorm":
            rows = torch.where(response[:, None], rows, 0)
            mass = rows.sum(-1, keepdim=True)
            rows = rows / torch.where(mass > 0, mass, 1)
        return rows.mean(1)

    def _kept(self) -> tuple[Tensor, Tensor]:
        if self.query is None or self.key is None:
            raise UserError("attention: the model's layers do not go through transformers' AttentionInterface")
        return self.query, self.key

    def _key_mask(self, index: Tensor, attention_mask: Tensor) -> Tensor:
        columns = torch.arange(attention_mask.shape[1], device=index.device)
        key_mask = attention_mask & (columns <= index[:, None])
        if self.layer_mask is None:
            return key_mask
        # The layer's own mask also knows what no option tells, such as chunks: True, or 0 where it is additive.
        rows = torch.arange(len(index), device=index.device)
        allowed = self.layer_mask.expand(len(index), -1, -1, -1)[rows, 0, index]
        return key_mask & (allowed if allowed.dtype == torch.bool else allowed == 0)

    def _row(self, query: Tensor, key: Tensor, sink: Tensor | None, index: Tensor, key_mask: Tensor) -> Tensor:
        rows = torch.arange(len(index), device=index.device)
        return rk.attention_row(
            query[rows, :, index], key, key_mask, scale=self.scale, softcap=self.softcap, window=self.window, sink=sink
        )


def mean_row(
    layers: Sequence[AttentionLayer], index: Tensor, attention_mask: Tensor, choice: AttentionChoice, response: Tensor
) -> Tensor:
    """[B, L] fp32: `AttentionLayer.reduced_row`, mean over the layers."""
    rows = [layer.reduced_row(index, attention_mask, choice, response) for layer in layers]
    return torch.stack(rows).mean(0)


_listening: ContextVar[dict[int, AttentionLayer] | None] = ContextVar("rlhf_attention_layers", default=None)


def _sdpa(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    _keep(module, query, key, value, attention_mask, options)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def _eager(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> Any:
    _keep(module, query, key, value, attention_mask, options)
    forward = sys.modules[type(module).__module__].eager_attention_forward
    return forward(module, query, key, value, attention_mask, **options)


def _keep(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, options: dict[str, Any]
) -> None:
    layer = (_listening.get() or {}).get(module.layer_idx)
    if layer is not None:
        layer.keep(module, query, key, value, attention_mask, options)


@contextmanager
def attention_layers(model: PreTrainedModel, indices: Sequence[int] = (-1,)) -> Iterator[list[AttentionLayer]]:
    """Keeps query, key and value of these layers in the forward pass made inside; may be nested.

    The model's attention implementation is set back on leaving, also after an error.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask, sdpa_mask

    AttentionInterface.register("rlhf_row_sdpa", _sdpa)
    AttentionInterface.register("rlhf_row_eager", _eager)
    AttentionMaskInterface.register("rlhf_row_sdpa", sdpa_mask)
    AttentionMaskInterface.register("rlhf_row_eager", eager_mask)
    before = model.config._attn_implementation
    count = model.config.get_text_config().num_hidden_layers
    for index in indices:
        if not -count <= index < count:
            raise UserError(f"attention_layers must lie in {-count} to {count - 1}, the model's layers, got {index}")
    layers = {index % count: AttentionLayer() for index in indices}
    token = _listening.set(layers)
    try:
        if not before.startswith("rlhf_row_"):
            model.set_attn_implementation("rlhf_row_eager" if before == "eager" else "rlhf_row_sdpa")
        yield [layers[index % count] for index in indices]
    finally:
        model.set_attn_implementation(before)
        _listening.reset(token)


@torch.no_grad()
def policy_attention(
    model: PreTrainedModel,
    batch: Batch,
    choice: AttentionChoice = LAST_LAYER,
    *,
    shift: int = 0,
    micro_batch: int | None = None,
) -> Tensor:
    """[B, T] fp32: the attention that a policy paid to each response token while it wrote on.

    For response token t the mean over the later steps of the same response, s = t+1 … n−1, of the attention from the
    position that predicts token s. The last token is seen by no step and gets 0.

    shift: 1 gives each token's attention to the token after it, as the code published with Chan et al. 2024 (arXiv
    2402.00782) does; the first token then gets 0.
    """
    return torch.cat([_policy_attention(model, part, choice, shift) for part in batch.split(micro_batch)])


def _policy_attention(model: PreTrainedModel, batch: Batch, choice: AttentionChoice, shift: int) -> Tensor:
    with attention_layers(model, choice.layers) as layers:
        hidden_states(model, batch.tokens, batch.attention_mask)
    length = batch.mask.shape[1]
    response = torch.cat([torch.zeros_like(batch.attention_mask[:, : batch.prompt_width]), batch.mask], 1)
    total = torch.zeros(batch.mask.shape, device=batch.mask.device)
    for step in range(1, length):
        index = torch.full((len(batch),), batch.prompt_width + step - 1, device=batch.mask.device)
        row = mean_row(layers, index, batch.attention_mask, choice, response)[:, batch.prompt_width :]
        total += torch.where(batch.mask[:, step, None], row, 0)
    lengths = batch.mask.sum(1, keepdim=True)
    seen_by = (lengths - 1 - torch.arange(length, device=batch.mask.device)).clamp(min=1)
    mean = total / seen_by
    if shift:
        mean = torch.cat([torch.zeros_like(mean[:, :shift]), mean[:, :-shift]], 1)
    return torch.where(batch.mask, mean, 0)

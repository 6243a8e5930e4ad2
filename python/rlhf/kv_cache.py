"""The keys and values of a policy while it samples, in buffers with room to grow."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class GrowingLayer(DynamicLayer):
    """A DynamicLayer copies all keys and values for each new token; this one copies them when its buffers are full."""

    buffers: tuple[Tensor | None, Tensor | None] = (None, None)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        length = self.get_seq_length()
        keys = appended(self.buffers[0], self.keys, length, key_states)
        values = appended(self.buffers[1], self.values, length, value_states)
        end = length + key_states.shape[-2]
        self.buffers, self.keys, self.values = (keys, values), keys[..., :end, :], values[..., :end, :]
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)
        self.buffers = (None, None)


def appended(buffer: Tensor | None, held: Tensor | None, length: int, new: Tensor) -> Tensor:
    """The buffer with `new` after its first `length` places; a larger one, with what was held, where it is full."""
    end = length + new.shape[-2]
    if buffer is None or end > buffer.shape[-2]:
        buffer = new.new_empty(*new.shape[:-2], end + end // 2, new.shape[-1])
        if held is not None and length:
            buffer[..., :length, :] = held
    buffer[..., length:end, :] = new
    return buffer


def growing_cache(model: PreTrainedModel) -> dict[str, DynamicCache]:
    """An empty cache of the model's own layer types (sliding windows …), those that keep everything growing in place.

    Under the name that the model's forward has for it: "cache", in older transformers "past_key_values".
    """
    cache = DynamicCache(config=model.config)
    cache.layers = [GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return {"cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values": cache}

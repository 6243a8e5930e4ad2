"""Triton's interpreter: what it does differently from a GPU with bf16, put right, and a count of what kernels move."""

import contextlib

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

_builder = interpreter.InterpreterBuilder
_convert, _dot = interpreter._convert_float, _builder.create_dot


def _rounded(x, source, target, mode):
    """It truncates fp32 to bf16."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(x, source, target, mode)
    return torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.uint16).numpy()


def _multiplied(self, a, b, *rest):
    """It multiplies the bits of bf16."""
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


interpreter._convert_float = _rounded
_builder.create_dot = _multiplied


class Traffic:
    """Kernels launched, and the elements that they load and store where the mask is True."""

    def __init__(self):
        self.launches = []
        self.accesses = {"loaded": [], "stored": []}

    def bytes(self, kind, tensor=None):
        """Bytes "loaded" or "stored", within a tensor's memory or at all."""
        total = 0
        for addresses, size in self.accesses[kind]:
            if tensor is not None:
                low = tensor.data_ptr()
                addresses = addresses[(addresses >= low) & (addresses < low + tensor.untyped_storage().nbytes())]
            total += len(addresses) * size
        return total


@contextlib.contextmanager
def traffic():
    counted = Traffic()
    load, store, run = _builder.create_masked_load, _builder.create_masked_store, interpreter.GridExecutor.__call__

    def note(kind, pointers, mask):
        there = np.broadcast_to(mask.data, pointers.data.shape)
        size = pointers.get_element_ty().primitive_bitwidth // 8 or 1
        counted.accesses[kind].append((pointers.data[there].astype(np.int64), size))

    def counting_load(self, pointers, mask, *rest):
        note("loaded", pointers, mask)
        return load(self, pointers, mask, *rest)

    def counting_store(self, pointers, value, mask, *rest):
        note("stored", pointers, mask)
        return store(self, pointers, value, mask, *rest)

    def counting_run(self, *args, **kwargs):
        counted.launches.append(self.fn.__name__)
        return run(self, *args, **kwargs)

    try:
        _builder.create_masked_load, _builder.create_masked_store = counting_load, counting_store
        interpreter.GridExecutor.__call__ = counting_run
        yield counted
    finally:
        _builder.create_masked_load, _builder.create_masked_store = load, store
        interpreter.GridExecutor.__call__ = run

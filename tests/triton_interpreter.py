"""What Triton's interpreter does differently from a GPU with bf16, put right: it truncates, and multiplies the bits."""

import torch
import triton.language as tl
from triton.runtime import interpreter

_convert, _dot = interpreter._convert_float, interpreter.InterpreterBuilder.create_dot


def _rounded(x, source, target, mode):
    if (source, target) != (tl.float32, tl.bfloat16):
        return _convert(x, source, target, mode)
    return torch.from_numpy(x.copy()).to(torch.bfloat16).view(torch.uint16).numpy()


def _multiplied(self, a, b, *rest):
    a, b = (self.cast_impl(x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _dot(self, a, b, *rest)


interpreter._convert_float = _rounded
interpreter.InterpreterBuilder.create_dot = _multiplied

"""Every error message of the Python side: op, argument, what was wanted and why, what came."""

from collections.abc import Sequence

import torch
from torch import Tensor


def fail(op: str, name: str, wanted: str, got: object, kind: type[Exception] = ValueError) -> None:
    raise kind(f"{op}: {name} must {wanted}, got {got}")


def is_tensor(op: str, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            fail(op, name, "be a Tensor", type(tensor).__name__, TypeError)


def shape(op: str, name: str, tensor: Tensor, wanted: Sequence[int], because: str = "") -> None:
    if tuple(tensor.shape) != tuple(wanted):
        fail(op, name, f"have shape {tuple(wanted)}{because and f' {because}'}", tuple(tensor.shape))


def to_match(name: str, tensor: Tensor) -> str:
    return f"to match {name} {tuple(tensor.shape)}"


def same_shape(op: str, like: dict[str, Tensor], **tensors: Tensor | None) -> None:
    """Each of `tensors` that is not None is a Tensor shaped like the single entry of `like`, on its device."""
    (like_name, reference), *_ = like.items()
    is_tensor(op, **like)
    for name, tensor in tensors.items():
        if tensor is not None:
            is_tensor(op, **{name: tensor})
            shape(op, name, tensor, reference.shape, to_match(like_name, reference))
            same_device(op, like, **{name: tensor})


def same_device(op: str, like: dict[str, Tensor], **tensors: Tensor | None) -> None:
    (like_name, reference), *_ = like.items()
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != reference.device:
            fail(op, name, f"be on {reference.device} like {like_name}", tensor.device)


def ndim(op: str, name: str, tensor: Tensor, dims: str) -> None:
    """`dims` names the dimensions: "[B, T]"."""
    is_tensor(op, **{name: tensor})
    if tensor.ndim != dims.count(",") + 1:
        fail(op, name, f"have shape {dims}", tuple(tensor.shape))


def floating(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            fail(op, name, "be floating point", tensor.dtype, TypeError)


def index(op: str, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in (torch.int64, torch.int32):
            fail(op, name, "be int64 indices", tensor.dtype, TypeError)


def as_mask(op: str, name: str, mask: Tensor) -> Tensor:
    """A mask as bool; 0/1 in any other dtype is accepted."""
    is_tensor(op, **{name: mask})
    return mask if mask.dtype == torch.bool else mask != 0


def positive(op: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value > 0:
            fail(op, name, "be greater than 0", value)


def not_negative(op: str, **values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not value >= 0:
            fail(op, name, "be at least 0", value)


def fraction(op: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            fail(op, name, "lie between 0 and 1", value)


def one_of(op: str, name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        fail(op, name, f"be one of {', '.join(choices)}", repr(value))

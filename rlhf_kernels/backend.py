"""Which implementation of an op runs: the only place in the package that decides.

    triton   rlhf_kernels/triton_kernels/<stem>.py           on CUDA, or anywhere under TRITON_INTERPRET=1
    native   csrc/cpu/<stem>.cpp, csrc/cuda/<stem>.cu        where the extension was built with it
    torch    rlhf_kernels/reference.py                       always

Automatic choice takes the first of `PREFERENCE` that exists. An explicit choice, `RLHF_KERNELS_BACKEND=native` or
`with use_backend("native"):`, raises where that backend lacks the op and never falls back.
"""

import contextlib
import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

BACKENDS = ("triton", "native", "torch")

# Per device, then per (device, op) where a measurement in benchmarks/results/ says otherwise. None has been made on a
# GPU yet: there Triton comes first because it has every op.
PREFERENCE: dict[str | tuple[str, str], tuple[str, ...]] = {
    "cuda": ("triton", "native", "torch"),
    "cpu": ("native", "torch"),
}

LIBRARY = torch.library.Library("rlhf_kernels", "DEF")
_NATIVE = torch.library.Library("rlhf_kernels_native", "DEF")  # the empty twin that C++ fills

_pickers: dict[str, Callable[[str, str | None], tuple[str, Callable[..., Any]]]] = {}


def _checked(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, got {name!r}")
    return name


_forced: str | None = os.environ.get("RLHF_KERNELS_BACKEND") or None
if _forced:
    _checked(_forced, "RLHF_KERNELS_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the block on one backend: "triton", "native" or "torch".

    Process-wide, not per thread: autograd runs backward passes on threads of its own. An op that the backend lacks
    raises NotImplementedError.
    """
    global _forced
    previous, _forced = _forced, _checked(name, "use_backend: name")
    try:
        yield
    finally:
        _forced = previous


def register(
    schema: str, *, fake: Callable[..., Any], torch_impl: Callable[..., Any], triton: Callable[..., Any] | None = None
) -> Callable[..., Any]:
    """Define `rlhf_kernels::<op>` and its native twin from one schema string; returns the callable op.

    The schema's first argument must be a Tensor: its device decides the row of `PREFERENCE`. Only the last argument
    may be written to.
    """
    name = schema[: schema.index("(")]
    writes = "(a!)" in schema
    LIBRARY.define(schema)
    _NATIVE.define(schema)
    implementations = {
        "triton": triton,
        "native": getattr(torch.ops.rlhf_kernels_native, name).default,
        "torch": torch_impl,
    }

    @functools.cache
    def pick(device: str, forced: str | None) -> tuple[str, Callable[..., Any]]:
        order = PREFERENCE.get((device, name)) or PREFERENCE.get(device, ("torch",))
        candidates = (forced,) if forced else order
        for backend in candidates:
            implementation = implementations[backend]
            if implementation is not None and _runs(name, backend, device):
                return backend, implementation
        raise NotImplementedError(f"{name}: no {' or '.join(candidates)} implementation on {device}")

    def dispatch(*args: Any) -> Any:
        device = args[0].device.type
        implementation = pick(device, _forced)[1]
        if writes and not args[-1].is_inference():
            torch.autograd.graph.increment_version(args[-1])  # what was saved of it must not be used again
        if torch.is_autocast_enabled(device):  # it was applied to the op's inputs; what happens inside stays in fp32
            with torch.autocast(device, enabled=False):
                return implementation(*args)
        return implementation(*args)

    _pickers[name] = pick
    LIBRARY.impl(name, dispatch, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rlhf_kernels::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.rlhf_kernels, name).default


def register_autograd(op: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    """Differentiate `rlhf_kernels::<op>`, once and above the backends; a second derivative raises."""

    def backward_once(ctx: Any, *grads: Tensor | None) -> Any:
        if torch.is_grad_enabled():  # only under create_graph=True
            raise RuntimeError(f"{op.removesuffix('_fwd')}: double backward (create_graph=True) is not supported")
        return backward(ctx, *grads)

    torch.library.register_autograd(f"rlhf_kernels::{op}", backward_once, setup_context=setup_context, lib=LIBRARY)


def register_loss_autograd(op: str, grads: dict[int, int]) -> None:
    """Autograd of an op that returns (loss, stats, gradients …) with the gradients at an upstream gradient of one.

    `grads` maps the position of a differentiable input to the position of its gradient among the outputs.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*(output[position] for position in grads.values()))
        ctx.mark_non_differentiable(*output[1:])
        ctx.set_materialize_grads(False)
        ctx.arity = len(inputs)

    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        result: list[Tensor | None] = [None] * ctx.arity
        for position, unit in zip(grads, ctx.saved_tensors):
            if grad_loss is not None and ctx.needs_input_grad[position]:
                factor = grad_loss.to(unit.dtype)
                once = is_one(factor, unit) and not graph_is_kept()
                result[position] = unit if once else unit * factor
        return tuple(result)

    register_autograd(op, backward, setup_context)


def is_one(factor: Tensor, unit: Tensor) -> bool:
    """Whether unit · factor is unit, where that can be known: on a CPU, and not while torch traces."""
    return type(unit) is Tensor and factor.device.type == "cpu" and factor.item() == 1


def graph_is_kept() -> bool:
    """Whether another backward pass may want what this one has saved; True where torch does not tell."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or tell()


def _setup_attached(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2])
    ctx.set_materialize_grads(False)


def _attached_backward(ctx: Any, grad_loss: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_loss is None or not ctx.needs_input_grad[1]:
        return grad_loss, None, None
    (unit,) = ctx.saved_tensors
    factor = grad_loss.to(unit.dtype)
    if is_one(factor, unit):
        return grad_loss, unit, None
    return grad_loss, unit.mul_(factor) if type(unit) is Tensor else unit * factor, None


# `loss` with `gradient` as its derivative by `input`: for a gradient in memory that the caller gave, which the backward
# pass scales where it stands. What writes to its arguments cannot have an autograd formula of its own.
LIBRARY.define("attach_gradient(Tensor loss, Tensor input, Tensor gradient) -> Tensor")
LIBRARY.impl("attach_gradient", lambda loss, _, __: loss.clone(), "CompositeExplicitAutograd")
torch.library.register_fake("rlhf_kernels::attach_gradient", lambda loss, _, __: torch.empty_like(loss), lib=LIBRARY)
register_autograd("attach_gradient", _attached_backward, _setup_attached)
attach_gradient = torch.ops.rlhf_kernels.attach_gradient.default


def _runs(op: str, backend: str, device: str) -> bool:
    if backend == "native":
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"rlhf_kernels_native::{op}", device.upper())
    if backend == "triton":
        return device == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return True


def has(stem: str, backend: str, device: str) -> bool:
    """True if every op of the stem (`<stem>`, `<stem>_fwd`, `<stem>_bwd`) has this backend on this device."""
    ops = [op for op in (stem, f"{stem}_fwd", f"{stem}_bwd") if op in _pickers]
    if not ops:
        raise ValueError(f"backend.has: no op is called {stem!r}")
    for op in ops:
        try:
            _pickers[op](device, _checked(backend, "backend.has: backend"))
        except NotImplementedError:
            return False
    return True


def table(device: str) -> dict[str, str]:
    """Op → the backend that runs it on `device` ("cpu", "cuda") as things stand now."""
    chosen = {}
    for op, pick in _pickers.items():
        try:
            chosen[op] = pick(device, _forced)[0]
        except NotImplementedError:
            chosen[op] = "none"
    return chosen


def import_triton(stem: str) -> Any:
    """The stem's Triton module, or None where Triton is not installed or the stem has no Triton kernel."""
    path = f"{__package__}.triton_kernels.{stem}"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(f"{__package__}.triton_kernels") is None:
        return None
    return importlib.import_module(path) if importlib.util.find_spec(path) else None


# Modules of native kernels by what the CPU can do; a build for this machine has `_C` alone.
_CPU_MODULES = {"AVX512": ("_C_avx512", "_C_avx2", "_C"), "AVX2": ("_C_avx2", "_C")}


def extension_modules() -> list[str]:
    """The C++ modules that were built and that this machine can run: one of CPU kernels, and `_cuda`."""
    capability = torch.backends.cpu.get_cpu_capability()
    wanted = _CPU_MODULES.get(capability, ("_C",))
    found = [f"{__package__}.{name}" for name in wanted if importlib.util.find_spec(f"{__package__}.{name}")][:1]
    if importlib.util.find_spec(f"{__package__}._cuda"):
        found.append(f"{__package__}._cuda")
    return found


def load_extension() -> bool:
    """Import the C++ extension, which registers its kernels; warns once and returns False where it was not built."""
    modules = extension_modules()
    if not modules:
        warnings.warn(
            "rlhf_kernels: the C++ extension is not built, so ops run on the slower torch backend. "
            "To build it: pip install --no-build-isolation with a C++ compiler and torch installed.",
            stacklevel=3,
        )
    for module in modules:
        importlib.import_module(module)
    return bool(modules)


def extension_info() -> str:
    """What the loaded modules were built with, for a bug report."""
    parts = []
    for module in extension_modules():
        info = importlib.import_module(module).build_info()
        parts.append(f"{module.split('.')[1]} ({', '.join(f'{key} {value}' for key, value in info.items())})")
    return " ".join(parts) or "not built"

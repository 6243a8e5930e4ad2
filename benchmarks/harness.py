"""Runs one bench_<stem> module: every provider is checked against fp64, and only what is right is timed."""

import contextlib
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from . import machine

MIN_ROUNDS, MAX_ROUNDS = 5, 50


@dataclass(frozen=True)
class Case:
    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    variant: str = ""
    quick: bool = False  # run by --quick, and only by it

    def __str__(self) -> str:
        sizes = (f"{name}={size}" for name, size in self.sizes.items())
        return " ".join([*sizes, machine.short(self.dtype), *([self.variant] if self.variant else [])])


@dataclass(frozen=True)
class Work:
    """What a pass cannot avoid: inputs read once, results written once, matrix products. The same for all providers."""

    bytes: int
    flops: int = 0
    moved: int | None = None  # bytes that the algorithm of our Triton kernels moves, where that is more


@dataclass(frozen=True)
class Provider:
    name: str
    call: Callable[..., Any] | None
    backend: str | None = None  # of ours
    missing: str = ""  # why it cannot run

    def context(self) -> contextlib.AbstractContextManager:
        return rk.use_backend(self.backend) if self.backend else contextlib.nullcontext()


@dataclass
class Row:
    """One provider in one pass of one case; also the form of a row in the JSON."""

    op: str
    case: str
    provider: str
    status: str  # "ok", or "missing: …", "failed: …", "wrong: …" of a provider that was not timed
    phase: str = ""
    median_ms: float | None = None
    quartiles_ms: list[float] = field(default_factory=list)
    rounds: int = 0
    bytes: int = 0
    flops: int = 0
    moved: int = 0  # bytes that our algorithm moves on a GPU, those that it finds in a cache included
    gb_per_s: float | None = None  # one of the two, by which of them sets the limit
    tflop_per_s: float | None = None
    limit_ms: float | None = None  # the work at the measured ceiling
    share: float | None = None  # limit_ms / median_ms; above 1 where the data came from a cache
    peak_extra_mib: float | None = None  # of the whole call: fwd, or fwd+bwd where it is differentiable


def load(stem: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.bench_{stem}")


def providers(stem: str, bench: ModuleType, case: Case, device: str) -> list[Provider]:
    """Ours on every backend that this device could have, then the peers."""
    found = []
    for backend in rk.backend.PREFERENCE[device]:
        there = rk.backend.has(stem, backend, device)
        missing = "" if there else f"this build has no {backend} kernel of {stem} on {device}"
        found.append(Provider(f"ours {backend}", bench.ours(case), backend, missing))
    for name, peer in bench.peers(case).items():  # what to call, or why it cannot be
        found.append(Provider(name, None, missing=peer) if isinstance(peer, str) else Provider(name, peer))
    return found


# ------------------------------------------------------------------------------------------------------------ the gate


def outputs_of(call: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    result = call(*inputs)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def leaves_of(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in inputs if x.requires_grad]


def results_of(call: Callable[..., Any], inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> list[Tensor]:
    """The outputs, then the gradients of the differentiable inputs."""
    outputs = outputs_of(call, inputs)
    leaves = leaves_of(inputs)
    grads = torch.autograd.grad(outputs, leaves, upstream) if leaves else ()
    return [x.detach() for x in (*outputs, *grads)]


def truth_of(formula: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """`results_of` the formula in fp64 on the very inputs that are timed; and the upstream gradient, drawn here."""
    exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
    upstream: list[Tensor] = []

    def drawing(*tensors: Tensor) -> tuple[Tensor, ...]:
        outputs = outputs_of(formula, tensors)
        upstream.extend(torch.randn_like(x, dtype=torch.float32) for x in outputs)
        return outputs

    return results_of(drawing, exact, upstream), upstream


def fault(provider: Provider, inputs: Sequence[Tensor], upstream: Sequence[Tensor], truth: Sequence[Tensor]) -> str:
    """What is wrong with the provider's results and gradients; empty if nothing is."""
    try:
        with provider.context():
            results = results_of(provider.call, inputs, upstream)
    except RuntimeError as error:  # no C++ compiler for torch.compile, no memory for a T×T map
        return f"failed: {str(error).strip().splitlines()[0]}" if str(error).strip() else "failed: RuntimeError"
    if [x.shape for x in results] != [x.shape for x in truth]:
        return f"wrong: shapes {[tuple(x.shape) for x in results]} should be {[tuple(x.shape) for x in truth]}"
    for number, (got, exact) in enumerate(zip(results, truth)):
        if places := places_off(got, exact):
            return f"wrong: result {number} is off in {places} of {exact.numel()} places"
    return ""


def places_off(got: Tensor, exact: Tensor) -> int:
    """How many elements are wrong: NaN, or off by more than 1e-5 of the true value or the rounding of their own dtype,
    if that is coarser, and by more than 1e-5 of the root mean square (for values near zero).
    """
    relative = max(1e-5, torch.finfo(got.dtype).eps)
    near_zero = 1e-5 * exact.norm() / max(exact.numel(), 1) ** 0.5
    size = 1 << 15  # the temporaries stay in the cache: seven times as fast as the whole at once
    parts = zip(got.reshape(-1).split(size), exact.reshape(-1).split(size))
    return sum(int((~((a.double() - b).abs() <= relative * b.abs() + near_zero)).sum()) for a, b in parts)


# ---------------------------------------------------------------------------------------------------------- the timing


def timed(provider: Provider, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> dict[str, float]:
    """Seconds of one run of each pass; results are freed outside the measured time."""
    leaves = leaves_of(inputs)
    with provider.context():
        with torch.no_grad():
            start = time.perf_counter()
            outputs = outputs_of(provider.call, inputs)
            seconds = {"fwd": time.perf_counter() - start}
        del outputs
        if leaves:
            start = time.perf_counter()
            outputs = outputs_of(provider.call, inputs)
            middle = time.perf_counter()
            grads = torch.autograd.grad(outputs, leaves, upstream)
            end = time.perf_counter()
            seconds |= {"bwd": end - middle, "fwd+bwd": end - start}
            del outputs, grads
    return seconds


def interleaved(
    runners: Sequence[Provider], inputs: Sequence[Tensor], upstream: Sequence[Tensor], budget: float
) -> dict[str, list[dict[str, float]]]:
    """Rounds in which every provider runs once, each round led by another one: noise hits all of them alike."""
    samples: dict[str, list[dict[str, float]]] = {provider.name: [] for provider in runners}
    for provider in runners:  # warm-up; compiles the pass without gradients, which the gate may not have run
        timed(provider, inputs, upstream)
    start = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - start > budget:
            break
        first = number % max(len(runners), 1)
        for provider in (*runners[first:], *runners[:first]):
            samples[provider.name].append(timed(provider, inputs, upstream))
    return samples


def peak_extra_mib(provider: Provider, inputs: Sequence[Tensor], upstream: Sequence[Tensor]) -> float | None:
    with provider.context():
        rise = machine.peak_extra_bytes(lambda: results_of(provider.call, inputs, upstream))
    return None if rise is None else rise / 2**20


def run_case(
    stem: str, bench: ModuleType, case: Case, device: str, ceilings: dict[str, float], budget: float
) -> list[Row]:
    """Check, warm up and time every provider of one case; `budget` is seconds of timing."""
    torch.compiler.reset()  # a case is compiled for its own shape, whatever was compiled before
    torch.manual_seed(0)
    inputs = [x.to(device) for x in bench.inputs(case)]
    truth, upstream = truth_of(bench.formula(case), inputs)
    rows, runners = [], []
    for provider in providers(stem, bench, case, device):
        status = f"missing: {provider.missing}" if provider.missing else fault(provider, inputs, upstream, truth)
        if status:
            rows.append(Row(stem, str(case), provider.name, status))
            print(f"  {provider.name}: {status}", file=sys.stderr)
        else:
            runners.append(provider)
    del truth
    memory = {provider.name: peak_extra_mib(provider, inputs, upstream) for provider in runners}
    samples = interleaved(runners, inputs, upstream, budget)
    for provider in runners:
        for phase, work in bench.work(case).items():
            row = Row(stem, str(case), provider.name, "ok", phase, peak_extra_mib=memory[provider.name])
            rows.append(measured(row, [sample[phase] for sample in samples[provider.name]], work, case, ceilings))
    return rows


def measured(row: Row, seconds: list[float], work: Work, case: Case, ceilings: dict[str, float]) -> Row:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    reading = work.bytes / ceilings["read"]
    products = work.flops / ceilings.get(f"matmul {machine.short(case.dtype)}", ceilings["matmul fp32"])
    limit = max(reading, products)
    row.median_ms, row.quartiles_ms, row.rounds = 1e3 * median, [1e3 * low, 1e3 * high], len(seconds)
    row.bytes, row.flops, row.moved = work.bytes, work.flops, work.moved or work.bytes
    if reading >= products:
        row.gb_per_s = work.bytes / median / 1e9
    else:
        row.tflop_per_s = work.flops / median / 1e12
    row.limit_ms, row.share = 1e3 * limit, limit / median
    return row

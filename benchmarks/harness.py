"""Runs one bench_<stem> module: every provider is checked against fp64, and only what is right is timed."""

import contextlib
import functools
import importlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import rlhf_kernels as rk

from . import machine
from .clock import Clock, clock_of

MIN_ROUNDS, MAX_ROUNDS = 5, 50
SLICE_ELEMENTS = {"cpu": 1 << 26, "cuda": 1 << 25}  # of the largest tensor of a formula in fp64: 512, 256 MiB
PIECE_ELEMENTS = {"cpu": 1 << 15, "cuda": 1 << 26}  # compared at a time; the CPU's stay in the cache: 7 × as fast
PEERS_SHARE = 2e-5  # of a row's largest value, which a peer may be off: returns as differences of larger fp32 terms
GRAPHED_BELOW = 0.25  # seconds; what takes longer is not bound by its launches, or has too many for a graph


@dataclass(frozen=True)
class Case:
    sizes: dict[str, int]
    dtype: torch.dtype = torch.float32
    variant: str = ""
    quick: bool = False  # run by --quick, and only by it
    device: str = "cpu"  # the one it is sized for; a quick case runs on any

    def __str__(self) -> str:
        sizes = (f"{name}={size}" for name, size in self.sizes.items())
        return " ".join([*sizes, machine.short(self.dtype), *([self.variant] if self.variant else [])])

    def runs(self, device: str, quick: bool) -> bool:
        return self.quick if quick else not self.quick and self.device == device


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
    phase: str = ""  # "fwd", "bwd", "fwd+bwd", or "graph": the last of the others as replay of a CUDA graph
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
    results_mib: float | None = None  # what the call returns and its gradients: no call can take less


def load(stem: str) -> ModuleType:
    return importlib.import_module(f"{__package__}.bench_{stem}")


def providers(stem: str, bench: ModuleType, case: Case, device: str, fallback: bool = True) -> list[Provider]:
    """Ours on every backend that this device could have, the one that would run first, then the peers.

    Without `fallback` not on the torch backend, as long as another one runs: it is what is there without a compiler,
    and takes most of the time of a measurement.
    """
    found = []
    table = rk.backend.table(device)
    chosen = next(table[op] for op in (stem, f"{stem}_fwd") if op in table)
    for backend in sorted(rk.backend.PREFERENCE[device], key=lambda backend: backend != chosen):
        if backend == "torch" != chosen and not fallback:
            continue
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
    leaves = leaves_of(inputs)
    with torch.set_grad_enabled(bool(leaves)):  # as it is timed: torch.compile compiles anew where this differs
        outputs = outputs_of(call, inputs)
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


def sliced(function: Callable[..., Any], width: int, *rows: Tensor, whole: Sequence[Tensor] = ()) -> Any:
    """`function(*rows, *whole)` of independent rows, a slice of them at a time, computed again for the gradient.

    The same results in less memory: what the formula keeps would not fit a GPU in fp64. `width`: how many elements a
    row has in the formula's largest tensor.
    """
    size = max(1, SLICE_ELEMENTS[rows[0].device.type] // width)
    if len(rows[0]) <= size:
        return function(*rows, *whole)
    parts = [
        checkpoint(function, *part, *whole, use_reentrant=False, preserve_rng_state=False)
        for part in zip(*(x.split(size) for x in rows))
    ]
    return torch.cat(parts) if isinstance(parts[0], Tensor) else tuple(map(torch.cat, zip(*parts)))


def fault(
    provider: Provider,
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    truth: Sequence[Tensor],
    rough: Callable[[], Sequence[Tensor]] | None = None,
    relative: float = 0.0,
) -> str:
    """What is wrong with the provider's results and gradients; empty if nothing is.

    `rough` gives the results of the formula in the case's own dtype; it is asked only where `truth` is missed.
    """
    try:
        with provider.context():
            results = results_of(provider.call, inputs, upstream)
    except torch.OutOfMemoryError as error:  # of a GPU: for a T×T map, for a reference that keeps everything
        return f"missing: {first_line(error)}"
    except RuntimeError as error:  # no C++ compiler for torch.compile, no memory of the host
        return f"failed: {first_line(error)}"
    if [x.shape for x in results] != [x.shape for x in truth]:
        return f"wrong: shapes {[tuple(x.shape) for x in results]} should be {[tuple(x.shape) for x in truth]}"
    for number, (got, exact) in enumerate(zip(results, truth)):
        of_row = 0.0 if provider.backend else max(PEERS_SHARE, torch.finfo(got.dtype).eps, 8 * relative)
        places = places_off(got, exact, None, relative, of_row)
        if places and rough is not None:
            places = places_off(got, exact, rough()[number], relative, of_row)
        if places:
            return f"wrong: result {number} is off in {places} of {exact.numel()} places"
    return ""


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def places_off(
    got: Tensor, exact: Tensor, rough: Tensor | None = None, relative: float = 0.0, of_row: float = 0.0
) -> int:
    """How many elements are wrong: NaN, or off by more than `relative` (at least 1e-5, and the rounding of their own
    dtype) of the true value and 1e-5 of the root mean square (for values near zero).

    `relative` is the rounding of the operands of matrix products: what tensor cores make of bf16 is off by a share of
    the terms, not of their sum, and some peers round the terms twice or the sum of every chunk again. So a row of a
    gradient may also be off by four times that share of its own largest value (3 % in bf16); its own, since another
    row's may be a thousand times as large.
    `of_row` allows that share of the row's largest value in any case, to peers. In 16 bits it is one rounding: they
    take probabilities from log-probabilities that are already rounded, which puts small ones off by some per cent; with
    products twice what ours may be off (one place of 51 million in a head's gradient needs that).
    `rough`, plain torch in the case's own dtype, shows what else rounding does (logits in bf16, differences of large
    fp32 terms): twice its largest error in the same row is allowed.
    """
    of_row = max(4 * relative, of_row) if got.ndim > 1 else 0.0
    relative = max(1e-5, torch.finfo(got.dtype).eps, relative)
    near_zero = float(1e-5 * exact.norm() / max(exact.numel(), 1) ** 0.5)
    wrong = 0
    for a, b, c in zip(pieces(got), pieces(exact), pieces(exact if rough is None else rough)):
        allowed = b.abs().mul_(relative).add_(near_zero)
        if float(torch.sub(a, b).abs_().sub_(allowed).max()) <= 0:  # all are right; NaN is not ≤ 0
            continue
        if of_row:
            allowed += of_row * b.abs().amax(-1, keepdim=True)
        if rough is not None:
            allowed += 2 * (c.double() - b).abs().nan_to_num(0, 0, 0).amax(-1, keepdim=True)
        wrong += int((~((a.double() - b).abs() <= allowed)).sum())
    return wrong


def pieces(x: Tensor) -> Iterator[Tensor]:
    """The rows of x, so many at a time that temporaries are small."""
    if x.numel():
        rows = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x.reshape(1, -1)
        yield from rows.split(max(1, PIECE_ELEMENTS[x.device.type] // rows.shape[1]))


# ---------------------------------------------------------------------------------------------------------- the timing


def timed(
    provider: Provider,
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    clock: Clock,
    graph: "torch.cuda.CUDAGraph | None" = None,
) -> dict[str, float]:
    """Seconds of one run of each pass; results are freed outside the measured time."""
    leaves = leaves_of(inputs)
    with provider.context():
        with torch.no_grad():
            clock.evict()
            start = clock.mark()
            outputs = outputs_of(provider.call, inputs)
            seconds = {"fwd": clock.seconds(start, clock.mark())}
        del outputs
        if leaves:
            clock.evict()
            start = clock.mark()
            outputs = outputs_of(provider.call, inputs)
            middle = clock.mark()
            grads = torch.autograd.grad(outputs, leaves, upstream)
            end = clock.mark()
            seconds |= {"bwd": clock.seconds(middle, end), "fwd+bwd": clock.seconds(start, end)}
            del outputs, grads
    if graph:
        clock.evict()
        start = clock.mark()
        graph.replay()
        seconds["graph"] = clock.seconds(start, clock.mark())
    return seconds


def captured(
    provider: Provider, inputs: Sequence[Tensor], upstream: Sequence[Tensor], clock: Clock
) -> "torch.cuda.CUDAGraph | None":
    """The whole call (with its backward pass) as a CUDA graph; None for a slow one, a RuntimeError if it cannot be."""
    main, side = torch.cuda.current_stream(), torch.cuda.Stream()
    with torch.cuda.stream(main), provider.context():  # a capture that fails leaves its stream current
        start = clock.mark()
        results_of(provider.call, inputs, upstream)
        if clock.seconds(start, clock.mark()) > GRAPHED_BELOW:
            return None
        side.wait_stream(main)
        with torch.cuda.stream(side):
            results_of(provider.call, inputs, upstream)
        main.wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results_of(provider.call, inputs, upstream)
    return graph


def interleaved(
    runners: Sequence[Provider],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor],
    budget: float,
    clock: Clock,
    graphs: "dict[str, torch.cuda.CUDAGraph]",
) -> dict[str, list[dict[str, float]]]:
    """Rounds in which every provider runs once, each round led by another one: noise hits all of them alike.

    One that has had enough leaves: after its share of `budget` seconds and `MIN_ROUNDS`, or sooner if it is slow.
    """
    if leaves_of(inputs):  # the rest is warm: the gate and the memory's measurement have run it
        for provider in runners:
            with provider.context(), torch.no_grad():
                outputs_of(provider.call, inputs)
    samples: dict[str, list[dict[str, float]]] = {provider.name: [] for provider in runners}
    spent = dict.fromkeys(samples, 0.0)
    for number in range(MAX_ROUNDS):
        left = [x for x in runners if not enough(len(samples[x.name]), spent[x.name], budget, len(runners))]
        if not left:
            break
        first = number % len(left)
        for provider in (*left[first:], *left[:first]):
            start = time.perf_counter()
            samples[provider.name].append(timed(provider, inputs, upstream, clock, graphs.get(provider.name)))
            spent[provider.name] += time.perf_counter() - start
    return samples


def enough(rounds: int, spent: float, budget: float, runners: int) -> bool:
    """Five rounds and a share of the budget; three that took all of the budget; two that took three times that."""
    fewest = MIN_ROUNDS if spent < budget else 3 if spent < 3 * budget else 2
    return rounds >= fewest and spent >= budget / runners


def peak_extra_mib(
    provider: Provider, inputs: Sequence[Tensor], upstream: Sequence[Tensor], device: str
) -> float | None:
    with provider.context():
        rise = machine.peak_extra_bytes(lambda: results_of(provider.call, inputs, upstream), device)
    return None if rise is None else rise / 2**20


def run_case(
    stem: str,
    bench: ModuleType,
    case: Case,
    device: str,
    ceilings: dict[str, float],
    budget: float,
    fallback: bool = True,
    only: Sequence[str] | None = None,
) -> list[Row]:
    """Check, warm up and time every provider of one case; `budget` is seconds of timing, `only` names the peers."""
    torch.compiler.reset()  # a case is compiled for its own shape, whatever was compiled before
    torch.manual_seed(0)
    clock = clock_of(device)
    with torch.device(device):  # only here: a default device costs time in every call of torch
        inputs = bench.inputs(case)
        candidates = providers(stem, bench, case, device, fallback)
    if only is not None:
        candidates = [provider for provider in candidates if provider.backend or provider.name in only]
    works = bench.work(case)
    formula = bench.formula(case)
    truth, upstream = truth_of(formula, inputs)
    rough = functools.cache(lambda: results_of(formula, inputs, upstream))
    relative = torch.finfo(case.dtype).eps if any(work.flops for work in works.values()) else 0.0
    rows, runners = [], []
    for provider in candidates:
        if provider.missing:
            status = f"missing: {provider.missing}"
        else:
            status = fault(provider, inputs, upstream, truth, rough, relative)
        if status:
            rows.append(Row(stem, str(case), provider.name, status))
            print(f"  {provider.name}: {status}", file=sys.stderr)
        else:
            runners.append(provider)
    del truth, rough
    memory = {provider.name: peak_extra_mib(provider, inputs, upstream, device) for provider in runners}
    results_mib = sum(x.nbytes for x in (*upstream, *leaves_of(inputs))) / 2**20
    graphs = {}
    for provider in runners if clock.captures and getattr(bench, "GRAPHED", False) else ():
        try:
            if graph := captured(provider, inputs, upstream, clock):
                graphs[provider.name] = graph
        except RuntimeError as error:
            status = f"failed: it cannot be captured in a CUDA graph: {first_line(error)}"
            rows.append(Row(stem, str(case), provider.name, status, "graph"))
    samples = interleaved(runners, inputs, upstream, budget, clock, graphs)
    for provider in runners:
        whole = {"graph": list(works.values())[-1]} if provider.name in graphs else {}
        for phase, work in (works | whole).items():
            row = Row(stem, str(case), provider.name, "ok", phase)
            row.peak_extra_mib, row.results_mib = memory[provider.name], results_mib
            rows.append(measured(row, [sample[phase] for sample in samples[provider.name]], work, case, ceilings))
    return rows


def measured(row: Row, seconds: list[float], work: Work, case: Case, ceilings: dict[str, float]) -> Row:
    low, median, high = statistics.quantiles(seconds, n=4, method="inclusive")
    reading = work.bytes / max(ceilings["read"], ceilings.get("copy", 0.0))
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

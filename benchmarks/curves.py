"""How time and memory grow: an op over one of its sizes, or over the number of threads, beside its main peers.

A point is a case like any other: it is checked first, and its rows say which curve they belong to. Points are run in
the order of CURVES, so that a run that is out of time leaves whole curves.
"""

import functools
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from . import harness, machine
from .harness import Case

THREADS = "threads"


@dataclass(frozen=True)
class Curve:
    op: str
    axis: str  # a size of the case, or THREADS
    values: tuple[int, ...]  # none for THREADS: they are the machine's
    base: Case
    peers: tuple[str, ...]

    def case(self, x: int) -> Case:
        return self.base if self.axis == THREADS else replace(self.base, sizes=self.base.sizes | {self.axis: x})

    def point(self, x: int) -> str:
        return f"{self.op} over {self.axis}: {self.case(x)}" + (f" {THREADS}={x}" if self.axis == THREADS else "")


TORCH = ("torch eager", "torch.compile")
GAE = ("loop as in verl", "torchrl vectorised")
LOGPROBS = (*TORCH, "F.cross_entropy", "TRL selective_log_softmax")
MAP = (*TORCH, "full T×T map")
ROLLOUT, LINEAR = {"B": 256, "T": 2048}, {"N": 512, "H": 512, "V": 32000}
HEADS = {"B": 2, "Hq": 16, "Hkv": 4, "D": 64, "T": 2048}

# The first curve of an op is shown in the README.
CURVES = (
    Curve("token_logprobs", "V", (1000, 8000, 50257, 256000), Case({"N": 128, "V": 0}), LOGPROBS),
    Curve("rollout_advantages", "T", (64, 256, 1024, 4096), Case(ROLLOUT), GAE),
    Curve("attention_row", "T", (128, 512, 2048), Case(HEADS), MAP),
    Curve("linear_ppo_loss", "V", (1000, 8000, 64000), Case(LINEAR, torch.bfloat16), TORCH),
    Curve("fused_ppo_loss", "V", (1000, 8000, 50257), Case({"B": 8, "T": 64, "V": 0}), TORCH),
    Curve("token_logprobs", "N", (16, 128, 1024), Case({"N": 0, "V": 50257}), LOGPROBS),
    Curve("token_logprobs", THREADS, (), Case({"N": 512, "V": 50257}), LOGPROBS),
    Curve("rollout_advantages", THREADS, (), Case(ROLLOUT), GAE),
    Curve("attention_row", THREADS, (), Case(HEADS), TORCH),
    Curve("linear_ppo_loss", THREADS, (), Case(LINEAR, torch.bfloat16), TORCH),
    Curve("linear_ppo_loss", "N", (64, 256, 1024), Case(LINEAR, torch.bfloat16), TORCH),
    Curve("gae", "T", (64, 256, 1024, 4096), Case(ROLLOUT), (*GAE, "torchrl loop")),
)


def points(stems: list[str], threads: int, quick: bool) -> Iterator[tuple[Curve, int]]:
    for curve in CURVES:
        if curve.op not in stems or (quick and curve.axis == THREADS):
            continue
        if quick:
            curve = tiny(curve)
        for x in curve.values if curve.axis != THREADS else counts(threads):
            yield curve, x


def counts(threads: int) -> list[int]:
    """Powers of two up to all of them, and all of them; none of none."""
    return sorted({*(2**k for k in range(threads.bit_length())), threads} - {0})


def tiny(curve: Curve) -> Curve:
    """Two points from the op's first quick case: does it run at all?"""
    base = next(case for case in harness.load(curve.op).cases() if case.quick)
    size = base.sizes.get(curve.axis, 0)
    return replace(
        curve, base=base, values=(size, 2 * size), peers=tuple(name for name in curve.peers if name != "torch.compile")
    )


def measure(curve: Curve, x: int, device: str, seconds: float, ceilings: dict[str, float]) -> list[dict[str, Any]]:
    """The rows of one point, with the curve's axis and where on it they lie."""
    before = torch.get_num_threads()
    if curve.axis == THREADS and x != before:
        torch.set_num_threads(x)
        ceilings = _ceilings_with_threads(device, x)
    try:
        bench = harness.load(curve.op)
        rows = harness.run_case(curve.op, bench, curve.case(x), device, ceilings, seconds, False, curve.peers)
    finally:
        torch.set_num_threads(before)
    return [asdict(row) | {"axis": curve.axis, "x": x} for row in rows]


@functools.cache
def _ceilings_with_threads(device: str, threads: int) -> dict[str, float]:
    return machine.ceilings(device)


def drawable(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str, list[dict[str, Any]]]]:
    """(op, axis, its timed rows) of every curve with two points or more, in the order of CURVES."""
    for curve in CURVES:
        found = [r for r in rows if (r["op"], r["axis"], r["status"]) == (curve.op, curve.axis, "ok")]
        if len({row["x"] for row in found}) > 1:
            yield curve.op, curve.axis, found

"""What to look at first, and one call of it for a profiler.

python -m benchmarks.profile worst FILE COUNT   op and case where ours is furthest behind its fastest peer, a line each
python -m benchmarks.profile run OP CASE        ours once, between cudaProfilerStart and cudaProfilerStop on a GPU
"""

import sys
from pathlib import Path
from typing import Any

import torch

from . import harness, report


def worst(rows: list[dict[str, Any]], count: int) -> list[tuple[str, str]]:
    gains: dict[tuple[str, str], float] = {}
    for (op, case, _), found in report.groups(rows).items():
        if (gain := report.gain(found)) is not None:
            gains[op, case] = min(gain, gains.get((op, case), gain))
    return sorted(gains, key=lambda place: gains[place])[:count]


def run(stem: str, name: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bench = harness.load(stem)
    case = next(case for case in bench.cases() if str(case) == name and device in (case.device, "cpu"))
    torch.manual_seed(0)
    with torch.device(device):
        inputs = bench.inputs(case)
        ours = harness.providers(stem, bench, case, device)[0]
    with ours.context():
        upstream = [torch.randn_like(x, dtype=torch.float32) for x in harness.outputs_of(ours.call, inputs)]
        harness.results_of(ours.call, inputs, upstream)  # compiles
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        harness.results_of(ours.call, inputs, upstream)
        if device == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.stop()


if __name__ == "__main__":
    command, first, second = sys.argv[1:]
    if command == "worst":
        for op, case in worst(report.read(Path(first))["rows"], int(second)):
            print(f"{op}\t{case}")
    else:
        run(first, second)

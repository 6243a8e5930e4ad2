"""`python -m benchmarks [op …]`: the ops beside their peers, on the same tensors in one process."""

import argparse
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

import rlhf_kernels as rk

from . import harness, machine, report

STEMS = sorted(
    (path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py")), key=rk.__all__.index
)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Times the ops beside their peers.")
    parser.add_argument("ops", nargs="*", metavar="op", help=f"which ones, all by default: {', '.join(STEMS)}")
    parser.add_argument("--device", default="cpu", choices=["cpu"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s here)")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: does it run at all?")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there as well")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of these results")
    parser.add_argument("--readme", action="store_true", help="only write benchmarks/results/*.json into README.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(STEMS):
        parser.error(f"op must be one of {', '.join(STEMS)}, got {', '.join(sorted(unknown))}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.json and not options.json.parent.is_dir():  # now, not after minutes of timing
        parser.error(f"--json: {options.json.parent} must be an existing folder")
    if options.table and not options.table.is_file():
        parser.error(f"--table: {options.table} must be a file that --json wrote")
    if options.table:
        print(report.table(report.read(options.table)))
        return 0
    if options.readme:
        report.update_readme()
        return 0
    results = run(options.ops or STEMS, options.device, options.threads, options.quick)
    print(report.table(results))
    if options.json:
        report.write(options.json, results)
    return 1 if any(refused(row) for row in results["rows"]) else 0


def run(stems: list[str], device: str, threads: int, quick: bool) -> dict:
    torch.set_num_threads(threads)
    results = {"machine": machine.environment(device), "ceilings": machine.ceilings(device), "rows": []}
    for stem in stems:
        bench = harness.load(stem)
        for case in bench.cases():
            if case.quick == quick:
                start = time.perf_counter()
                rows = harness.run_case(stem, bench, case, device, results["ceilings"], budget=0.3 if quick else 4.0)
                results["rows"] += map(asdict, rows)
                print(f"{stem} {case}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
    return results


def refused(row: dict) -> bool:
    """One of ours that was not right; a peer that fails here is only named."""
    return row["provider"].startswith("ours") and row["status"].startswith(("wrong", "failed"))


if __name__ == "__main__":
    sys.exit(main())

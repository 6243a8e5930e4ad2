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
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s here)")
    parser.add_argument("--quick", action="store_true", help="small shapes and few rounds: does it run at all?")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no case is begun after so many")
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
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU here")
    stems = [stem for stem in STEMS if stem in options.ops] or STEMS
    results = run(stems, options.device, options.threads, options.quick, options.seconds, options.json)
    print(report.table(results))
    return 1 if any(refused(row) for row in results["rows"]) else 0


def run(
    stems: list[str], device: str, threads: int, quick: bool, seconds: float = float("inf"), json: Path | None = None
) -> dict:
    """The first case of every op, then the second of those that have one …; `json` is written anew after each."""
    begin = time.perf_counter()
    torch.set_num_threads(threads)
    results = {"machine": machine.environment(device), "ceilings": machine.ceilings(device), "rows": []}
    listed = {stem: [case for case in harness.load(stem).cases() if case.runs(device, quick)] for stem in stems}
    jobs = [(number, stem, case) for stem, cases in listed.items() for number, case in enumerate(cases)]
    budget = 0.3 if quick else {"cpu": 4.0, "cuda": 1.5}[device]
    for _, stem, case in sorted(jobs, key=lambda job: job[0]):
        start = time.perf_counter()
        if start - begin > seconds:
            rows = [harness.Row(stem, str(case), f"{case}", "missing: no time was left")]
        else:
            try:
                rows = harness.run_case(stem, harness.load(stem), case, device, results["ceilings"], budget)
            except torch.OutOfMemoryError as error:  # of the inputs or the fp64 truth; a provider's is its own failure
                rows = [harness.Row(stem, str(case), f"{case}", f"missing: {harness.first_line(error)}")]
        results["rows"] += map(asdict, rows)
        results["rows"].sort(key=lambda row: stems.index(row["op"]))
        print(f"{stem} {case}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if json:
            report.write(json, results)
    return results


def refused(row: dict) -> bool:
    """One of ours that was not right; a peer that fails here is only named."""
    return row["provider"].startswith("ours") and row["status"].startswith(("wrong", "failed"))


if __name__ == "__main__":
    sys.exit(main())

"""`python -m benchmarks [op …]`: the ops beside their peers, on the same tensors in one process."""

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import rlhf_kernels as rk

from . import curves, harness, machine, plots, report, targets

SAME = ("device", "cpu", "threads", "torch", "commit")  # in every part of one measurement
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
    parser.add_argument(
        "--curves", action=argparse.BooleanOptionalAction, default=True, help="growth over sizes and threads as well"
    )
    parser.add_argument("--fallback", action="store_true", help="time the torch backend too where another one runs")
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path(),
        metavar="FILE",
        help="write the results there as well; benchmarks/results/<device>.json without a name",
    )
    parser.add_argument("--plot", action="store_true", help="draw the curves beside the JSON file")
    parser.add_argument("--resume", action="store_true", help="add to the JSON file what it says was not reached")
    parser.add_argument("--table", type=Path, metavar="FILE", help="only print the table of these results")
    parser.add_argument(
        "--readme", action="store_true", help="only write README.md, tables and plots from benchmarks/results/*.json"
    )
    options = parser.parse_args(arguments)
    if unknown := set(options.ops) - set(STEMS):
        parser.error(f"op must be one of {', '.join(STEMS)}, got {', '.join(sorted(unknown))}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    if options.json and not options.json.parent.is_dir():  # now, not after minutes of timing
        parser.error(f"--json: {options.json.parent} must be an existing folder")
    if options.table and not options.table.is_file():
        parser.error(f"--table: {options.table} must be a file that --json wrote")
    for flag in ("plot", "resume"):
        if getattr(options, flag) and options.json is None:
            parser.error(f"--{flag} needs --json, the file that it belongs to")
    if (options.plot or options.readme) and importlib.util.find_spec("matplotlib") is None:
        parser.error(f"--{'plot' if options.plot else 'readme'} draws with matplotlib, which is not installed")
    if options.table:
        print(report.table(report.read(options.table)))
        return 0
    if options.readme:
        report.update()
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device cuda: torch {torch.__version__} sees no GPU here")
    stems = [stem for stem in STEMS if stem in options.ops] or STEMS
    torch.set_num_threads(options.threads)
    here = machine.environment(options.device)
    if options.json == Path():
        options.json = report.FOLDER / f"{report.device_name(here)}.json"
    if options.resume and not options.json.is_file():
        parser.error(f"--resume: {options.json} must be a file that --json wrote")
    work = jobs(stems, options.device, options.threads, options.quick, options.curves, options.fallback)
    if options.resume:
        results = report.read(options.json)
        if other := [name for name in SAME if not same(results["machine"][name], here[name])]:
            parser.error(f"--resume: {options.json} was measured with another {', '.join(other)}")
        work = [job for job in work if job.name in results["not_reached"]]
    else:
        rates = machine.ceilings(options.device, 2 if options.quick else 10)
        results = {"machine": here, "ceilings": rates, "rows": [], "curves": [], "failed": [], "not_reached": []}
    run(work, results, options.seconds, options.json)
    if options.plot:
        plots.write(options.json.parent, options.json.stem, results)
    print(report.table(results))
    if options.device == "cpu" and not options.quick:
        print("", targets.table(report.groups(results["rows"])), sep="\n")
    return 1 if any(refused(row) for row in (*results["rows"], *results["curves"])) else 0


@dataclass(frozen=True)
class Job:
    """A case, or a point of a curve."""

    name: str
    rank: int  # what is of most interest first: the time may end
    part: str  # of the results, to which its rows belong
    measure: Callable[[dict[str, float]], list[dict[str, Any]]]  # from the ceilings


def jobs(stems: list[str], device: str, threads: int, quick: bool, with_curves: bool, fallback: bool) -> list[Job]:
    """The cases that have a target, the first case of every op, the curves, the other cases; curves last on a GPU."""
    found = []
    seconds = 0.3 if quick else {"cpu": 3.0, "cuda": 1.5}[device]
    for stem in stems:
        for number, case in enumerate(case for case in harness.load(stem).cases() if case.runs(device, quick)):
            rank = 0 if (stem, str(case)) in targets.CASES else 3 if number else 1
            measure = functools.partial(measured, stem, case, device, seconds, fallback)
            found.append(Job(f"{stem} {case}", rank, "rows", measure))
    for curve, x in curves.points(stems, threads if device == "cpu" else 0, quick) if with_curves else ():
        measure = functools.partial(curves.measure, curve, x, device, seconds / 4)
        found.append(Job(curve.point(x), 2 if device == "cpu" else 4, "curves", measure))
    return sorted(found, key=lambda job: job.rank)


def same(first: str | int, second: str | int) -> bool:
    """A commit is the same with changed files: the results are among them."""
    return str(first).removesuffix("-dirty") == str(second).removesuffix("-dirty")


def measured(
    stem: str, case: harness.Case, device: str, seconds: float, fallback: bool, ceilings: dict[str, float]
) -> list[dict[str, Any]]:
    rows = harness.run_case(stem, harness.load(stem), case, device, ceilings, seconds, fallback)
    return [asdict(row) for row in rows]


def run(work: list[Job], results: dict[str, Any], seconds: float = float("inf"), json: Path | None = None) -> None:
    """Adds the jobs' rows to `results` and what found no time; `json` is written anew after each."""
    begin = time.perf_counter()
    names = [job.name for job in work]
    results["not_reached"] = [name for name in results["not_reached"] if name not in names] + names
    for job in work:
        start = time.perf_counter()
        if start - begin > seconds:
            break
        try:
            results[job.part] += job.measure(results["ceilings"])
        except RuntimeError as error:  # no memory for the inputs or the fp64 truth; a provider's is its own failure
            results["failed"].append(f"{job.name}: {harness.first_line(error)}")
        results["rows"].sort(key=place)
        results["not_reached"].remove(job.name)
        print(f"{job.name}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        if json:
            report.write(json, results)


def place(row: dict[str, Any]) -> tuple[int, int]:
    """In the order of the ops, and of their cases."""
    cases = [str(case) for case in harness.load(row["op"]).cases()]
    return STEMS.index(row["op"]), cases.index(row["case"])


def refused(row: dict) -> bool:
    """One of ours that was not right; a peer that fails here is only named."""
    return row["provider"].startswith("ours") and row["status"].startswith(("wrong", "failed"))


if __name__ == "__main__":
    sys.exit(main())

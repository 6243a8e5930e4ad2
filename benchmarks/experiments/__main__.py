"""`python -m benchmarks.experiments [experiment[:task] …]`, and `report`."""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from . import dense, labels, methods, online, page, store
from .experiment import Arm, Experiment, Task, measured_run, prepare, task

EXPERIMENTS = {each.EXPERIMENT.name: each.EXPERIMENT for each in (dense, methods, online, labels)}
WORK = Path(__file__).parents[2] / "build" / "experiments"  # start models, and runs that have not finished


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.experiments", description=str(__doc__))
    parser.add_argument(
        "what",
        nargs="*",
        default=list(EXPERIMENTS),
        metavar="experiment[:task]",
        help=f"{', '.join(EXPERIMENTS)} (all by default), or report: pages from the results that are there",
    )
    parser.add_argument("--seeds", type=int, default=8, help="seeds of each arm (%(default)s)")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, one thread each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after so many")
    parser.add_argument("--arms", nargs="*", help="only these arms")
    parser.add_argument("--out", type=Path, default=store.FOLDER, help="folder of the results (%(default)s)")
    options = parser.parse_args(arguments)
    if options.what == ["report"]:
        page.write(EXPERIMENTS, options.out)
        return 0
    jobs = []
    for what in options.what:
        name, _, only = what.partition(":")
        if name not in EXPERIMENTS:
            parser.error(f"there is no experiment {name}: {', '.join(EXPERIMENTS)}, report")
        experiment = EXPERIMENTS[name]
        if only and only not in experiment.tasks:
            parser.error(f"{name} has no task {only}: {', '.join(experiment.tasks)}")
        jobs += jobs_of(experiment, [only] if only else list(experiment.tasks), options)
    return run(jobs, options)


def jobs_of(experiment: Experiment, tasks: list[str], options: argparse.Namespace) -> list[tuple[str, Task, Arm, int]]:
    """What is not in the results yet, seed by seed, so that a stopped experiment has whole seeds."""
    finished = store.done(experiment.name, options.out)
    found = []
    for name in tasks:
        where = task(name)
        arms = [arm for arm in experiment.arms(where) if not options.arms or arm.name in options.arms]
        found += [(experiment.name, where, arm, seed) for seed in range(options.seeds) for arm in arms]
    return [job for job in found if (job[1].name, job[2].name, job[3]) not in finished]


def run(jobs: list[tuple[str, Task, Arm, int]], options: argparse.Namespace) -> int:
    """Each run in a process of its own, so that its memory is its own and a failure stops no other."""
    begin, failures = time.monotonic(), 0
    context = multiprocessing.get_context("fork")
    with context.Pool(options.jobs, initializer=torch.set_num_threads, initargs=(1,), maxtasksperchild=1) as pool:
        for where, rankings in dict.fromkeys((job[1].name, job[2].rankings) for job in jobs):
            pool.apply(prepare, (task(where), WORK, rankings))
        waiting = iter(jobs)
        running: list[tuple[tuple[str, Task, Arm, int], Any]] = []
        while True:
            late = time.monotonic() - begin > options.seconds
            while len(running) < options.jobs and not late and (job := next(waiting, None)):
                running.append((job, pool.apply_async(one, (job,))))
            if not running:
                return 1 if failures else 0
            for entry in [entry for entry in running if entry[1].ready()]:
                running.remove(entry)
                (name, where, arm, seed), record = entry[0], entry[1].get()
                said = f"{name} {where.name} {arm.name} seed {seed}"
                if "error" in record:
                    failures += 1
                    print(f"{said}: failed\n{record['error']}", file=sys.stderr, flush=True)
                else:
                    store.append(name, record, options.out)
                    print(f"{said}: {record['seconds']} s, {record['final']}", file=sys.stderr, flush=True)
            time.sleep(0.2)


def one(job: tuple[str, Task, Arm, int]) -> dict[str, Any]:
    _, where, arm, seed = job
    try:
        return measured_run(arm, seed, where, prepare(where, WORK, arm.rankings), WORK / "runs")
    except Exception:
        return {"error": traceback.format_exc()}


if __name__ == "__main__":
    sys.exit(main())

"""A run that is killed again and again, also while it writes, ends as the one that nobody touched, bit for bit."""

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest

import children
from mini_runs import STAGES, command
from rlhf.files import read_lines


@pytest.fixture(scope="module")
def server():
    """The context whose processes are forked from a server that has imported everything."""
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    os.environ["OMP_NUM_THREADS"] = "1"
    context = children.server()
    yield context
    os.environ.clear()
    os.environ.update(before)


class Child:
    """One run of a command."""

    def __init__(self, server, argv, log, **options):
        self.log = log
        self.process = server.Process(target=children.run, args=(argv, str(log)), kwargs=options)
        self.process.start()

    def status(self):
        self.process.join(120)
        assert self.process.exitcode is not None, "still running"
        return self.process.exitcode

    def text(self):
        return self.log.read_text()


def outcome(folder):
    """All that a run says and does, without the seconds."""

    def lines(name):
        path = folder / name
        found = read_lines(path) if path.exists() else []
        return [{k: v for k, v in line.items() if not k.startswith(("time/", "tokens_per_second"))} for line in found]

    weights = {path.parent.name: path.read_bytes() for path in folder.glob("*/*model.safetensors")}
    names = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "selected.jsonl", "labels.jsonl")
    summary = json.loads((folder / "run.json").read_text())["summary"]
    return {"weights": weights, "summary": summary, **{name: lines(name) for name in names}}


@pytest.fixture(scope="module")
def whole(server, mini, tmp_path_factory):
    """stage → (outcome, seconds, calls) of a run that nobody touches."""
    found = {}
    runs = tmp_path_factory.mktemp("whole")

    def of(stage):
        if stage not in found:
            start = time.monotonic()
            child = Child(server, command(mini, stage, runs / stage), runs / f"{stage}.log")
            assert child.status() == 0, child.text()
            seconds = time.monotonic() - start
            calls = json.loads(Path(f"{child.log}.calls").read_text())
            found[stage] = outcome(runs / stage), seconds, calls
        return found[stage]

    return of


@pytest.mark.parametrize("stage", STAGES)
def test_killed_runs_end_like_the_one_nobody_touched(server, mini, whole, stage):
    expected, seconds, calls = whole(stage)
    assert len(expected["metrics.jsonl"]) >= 5 and expected["weights"]
    assert bool(expected["labels.jsonl"]) == stage.startswith("online")
    chance = random.Random()  # other moments each time; each must do
    kills = [
        {"kill_at": chance.randrange(calls // 2)},
        {"after": chance.uniform(0.3, 0.9) * seconds},
    ]
    out, killed = mini / f"killed-{stage}", []
    for kill in kills:
        after = kill.pop("after", None)
        child = Child(server, command(mini, stage, out, "--resume"), mini / f"killed-{stage}.log", **kill)
        if after is not None:
            child.process.join(after)
            child.process.kill()
        status = child.status()
        assert status in (0, -9), child.text()
        killed.append(status == -9)
    assert killed[0], "the first kill must hit"
    child = Child(server, command(mini, stage, out, "--resume"), mini / f"killed-{stage}.log")
    assert child.status() == 0, child.text()
    assert outcome(out) == expected, (kills, child.text())
    assert not list(out.rglob(".*.tmp")) and not list(out.rglob(".*.old"))


def test_killed_at_many_calls_while_checkpoints_are_written(server, mini, whole):
    """Later and later in the writing of a checkpoint: before an fsync, a rename, the removal of an old one."""
    expected, _, calls = whole("sft")
    out, log, kills = mini / "each", mini / "each.log", 0
    per_step = calls // 5
    for call in range(0, 2 * per_step, max(1, per_step // 4)):
        child = Child(server, command(mini, "sft", out, "--resume"), log, kill_at=call)
        if child.status() != -9:
            break
        kills += 1
    assert kills >= 4 and child.status() in (0, -9), child.text()
    if child.status() == -9:
        child = Child(server, command(mini, "sft", out, "--resume"), log)
        assert child.status() == 0, child.text()
    assert outcome(out) == expected


def test_ctrl_c_ends_with_a_checkpoint_and_says_how_to_go_on(server, mini, whole):
    expected, *_ = whole("ppo")
    out, log = mini / "interrupted", mini / "interrupted.log"
    child = Child(server, [*command(mini, "ppo", out), "--save-steps", "0"], log, interrupt_at=3)
    assert child.status() == 130, child.text()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003"]
    assert "stopping after this step, with a checkpoint" in child.text()
    assert f"rlhf ppo: --resume continues from the last checkpoint in {out}" in child.text()
    assert "Traceback" not in child.text()
    child = Child(server, command(mini, "ppo", out, "--resume"), log)
    assert child.status() == 0, child.text()
    assert outcome(out) == expected

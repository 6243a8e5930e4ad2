"""A run that is killed again and again, also while it writes, ends as the one that nobody touched, bit for bit."""

import json
import os
import random
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import children
from rlhf.files import read_lines
from rlhf.model import load_reward_model, train_tokenizer

SMALL = {"--batch-size": 4, "--save-steps": 1, "--eval-every": 2}
SAMPLED = {"--response-length": 4, "--eval-samples": 4, "--micro-batch": 3}
STAGES = {
    "sft": {**SMALL, "--model": "policy", "--max-steps": 5, "--eval-fraction": 0.2},
    "rm": {**SMALL, "--init": "policy", "--max-steps": 5, "--token-dropout": 0.2},
    "ppo": {
        **SMALL,
        **SAMPLED,
        "--init": "policy",
        "--rm": "rm",
        "--steps": 5,
        "--kl-control": "adaptive",
        "--reward-shaping": "abc",
        "--num-samples": 2,
    },
    "rrhf": {**SMALL, **SAMPLED, "--init": "policy", "--rm": "rm", "--num-prompts": 8, "--rounds": 2, "--epochs": 2},
    "best-of-n": {**SMALL, **SAMPLED, "--init": "policy", "--rm": "rm", "--num-prompts": 12, "--n": 2},
    "rft": {**SMALL, **SAMPLED, "--init": "policy", "--rm": "rm", "--num-prompts": 6, "--rounds": 2},
    "dpo": {**SMALL, **SAMPLED, "--init": "policy", "--rm": "rm", "--pairs": "sampled", "--num-prompts": 6},
}


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


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with data and two models of a few thousand parameters."""
    folder = tmp_path_factory.mktemp("kill")
    words = ("red", "green", "blue", "white", "black")
    rows = [
        {"prompt": f"the {a} car and", "responses": [f" the {b} house .", f" {a} {b} .", " no"], "scores": [2, 1, 0]}
        for a in words
        for b in words
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = train_tokenizer([row["prompt"] + response for row in rows for response in row["responses"]])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **special))
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    reward_model, _ = load_reward_model(str(folder / "policy"))
    reward_model.save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return folder


def command(place, stage, out, *more):
    flags = {"--data": "rows.jsonl", **STAGES[stage]}
    for name in {"--data", "--model", "--init", "--rm"} & set(flags):
        flags[name] = place / str(flags[name])
    return [stage, "--out", str(out), *(str(word) for pair in flags.items() for word in pair), *more]


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

    weights = {path.parent.name: path.read_bytes() for path in folder.glob("*/model.safetensors")}
    names = ("metrics.jsonl", "samples.jsonl", "rollouts.jsonl", "selected.jsonl")
    summary = json.loads((folder / "run.json").read_text())["summary"]
    return {"weights": weights, "summary": summary, **{name: lines(name) for name in names}}


@pytest.fixture(scope="module")
def whole(server, place):
    """stage → (outcome, seconds, calls) of a run that nobody touches."""
    found = {}

    def of(stage):
        if stage not in found:
            start = time.monotonic()
            child = Child(server, command(place, stage, place / f"whole-{stage}"), place / f"whole-{stage}.log")
            assert child.status() == 0, child.text()
            seconds = time.monotonic() - start
            calls = json.loads(Path(f"{child.log}.calls").read_text())
            found[stage] = outcome(place / f"whole-{stage}"), seconds, calls
        return found[stage]

    return of


@pytest.mark.parametrize("stage", STAGES)
def test_killed_runs_end_like_the_one_nobody_touched(server, place, whole, stage):
    expected, seconds, calls = whole(stage)
    assert len(expected["metrics.jsonl"]) >= 5 and expected["weights"]
    chance = random.Random()  # other moments each time; each must do
    kills = [
        {"kill_at": chance.randrange(calls // 2)},
        {"after": chance.uniform(0.3, 0.9) * seconds},
    ]
    out, killed = place / f"killed-{stage}", []
    for kill in kills:
        after = kill.pop("after", None)
        child = Child(server, command(place, stage, out, "--resume"), place / f"killed-{stage}.log", **kill)
        if after is not None:
            child.process.join(after)
            child.process.kill()
        status = child.status()
        assert status in (0, -9), child.text()
        killed.append(status == -9)
    assert killed[0], "the first kill must hit"
    child = Child(server, command(place, stage, out, "--resume"), place / f"killed-{stage}.log")
    assert child.status() == 0, child.text()
    assert outcome(out) == expected, (kills, child.text())
    assert not list(out.rglob(".*.tmp")) and not list(out.rglob(".*.old"))


def test_killed_at_many_calls_while_checkpoints_are_written(server, place, whole):
    """Later and later in the writing of a checkpoint: before an fsync, a rename, the removal of an old one."""
    expected, _, calls = whole("sft")
    out, log, kills = place / "each", place / "each.log", 0
    per_step = calls // 5
    for call in range(0, 2 * per_step, max(1, per_step // 4)):
        child = Child(server, command(place, "sft", out, "--resume"), log, kill_at=call)
        if child.status() != -9:
            break
        kills += 1
    assert kills >= 4 and child.status() in (0, -9), child.text()
    if child.status() == -9:
        child = Child(server, command(place, "sft", out, "--resume"), log)
        assert child.status() == 0, child.text()
    assert outcome(out) == expected


def test_ctrl_c_ends_with_a_checkpoint_and_says_how_to_go_on(server, place, whole):
    expected, *_ = whole("ppo")
    out, log = place / "interrupted", place / "interrupted.log"
    child = Child(server, [*command(place, "ppo", out), "--save-steps", "0"], log, interrupt_at=3)
    assert child.status() == 130, child.text()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003"]
    assert "stopping after this step, with a checkpoint" in child.text()
    assert f"rlhf ppo: --resume continues from the last checkpoint in {out}" in child.text()
    assert "Traceback" not in child.text()
    child = Child(server, command(place, "ppo", out, "--resume"), log)
    assert child.status() == 0, child.text()
    assert outcome(out) == expected

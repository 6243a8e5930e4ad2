"""What goes wrong in a run is one clear line, and what was there before is still there."""

import errno
import json
import os

import pytest

from mini_runs import command
from rlhf import cli
from rlhf.files import read_lines


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    monkeypatch.delenv("RLHF_TRACEBACK", raising=False)


def refused(capfd, argv):
    """The last line of a command that must end with 2, without a traceback."""
    capfd.readouterr()
    assert cli.main(argv) == 2
    error = capfd.readouterr().err
    assert "Traceback" not in error
    return error.rstrip("\n").splitlines()[-1]


def metrics(folder):
    lines = read_lines(folder / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def checkpoints(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(mini, tmp_path_factory):
    """The metrics of a PPO run by a reward function that nothing goes wrong in."""
    (mini / "reward.py").write_text("def score(prompts, completions, **_):\n    return [len(c) for c in completions]\n")
    folder = tmp_path_factory.mktemp("whole") / "ppo"
    assert cli.main(by_function(mini, folder)) == 0
    return metrics(folder)


def by_function(mini, out, *more):
    argv = command(mini, "ppo", out, *more)
    place = argv.index("--rm")
    argv[place : place + 2] = ["--reward-fn", f"{mini / 'reward.py'}:score"]
    argv[argv.index("--reward-shaping") + 1] = "terminal"
    argv[argv.index("--save-steps") + 1] = "0"
    return argv


def test_a_reward_function_that_raises_loses_nothing(mini, tmp_path, whole, capfd):
    good = (mini / "reward.py").read_text()
    counter = tmp_path / "calls"
    bad = good.replace("    return", f"    open({str(counter)!r}, 'a').write('.')\n    return")
    bad = bad.replace("    return", f"    assert len(open({str(counter)!r}).read()) < 5, 'service is down'\n    return")
    try:
        (mini / "reward.py").write_text(bad)
        line = refused(capfd, by_function(mini, tmp_path / "run"))
        assert "reward.py:score raised AssertionError: service is down" in line
    finally:
        (mini / "reward.py").write_text(good)
    (saved,) = checkpoints(tmp_path / "run")
    assert saved >= "step-000001"
    assert cli.main(by_function(mini, tmp_path / "run", "--resume")) == 0
    assert metrics(tmp_path / "run") == whole


def test_a_full_disk(mini, tmp_path, capfd, monkeypatch):
    import safetensors.torch

    save, calls = safetensors.torch.save_file, []

    def full(tensors, path, *args, **options):
        calls.append(path)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return save(tensors, path, *args, **options)

    argv = command(mini, "sft", tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        line = refused(capfd, argv)
    assert "step-000003 could not be written, what was there before is as it was: [Errno 28] No space left" in line
    assert checkpoints(tmp_path / "run") == ["step-000001", "step-000002"]
    assert cli.main([*argv, "--resume"]) == 0
    assert cli.main(command(mini, "sft", tmp_path / "whole")) == 0
    drop = "tokens_per_second"
    found = [[{k: v for k, v in line.items() if k != drop} for line in metrics(tmp_path / n)] for n in ("run", "whole")]
    assert found[0] == found[1]


@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_empty_data(mini, tmp_path, capfd, stage):
    (tmp_path / "empty.jsonl").write_text("")
    argv = command(mini, stage, tmp_path / "run")
    argv[argv.index("--data") + 1] = str(tmp_path / "empty.jsonl")
    assert refused(capfd, argv).endswith("empty.jsonl: no rows")


def test_a_prompt_longer_than_the_context(mini, tmp_path, capfd):
    rows = [{"prompt": "the red car and " * (30 if i == 7 else 1) + str(i)} for i in range(12)]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = command(mini, "ppo", tmp_path / "run")
    argv[argv.index("--data") + 1] = str(tmp_path / "long.jsonl")
    line = refused(capfd, argv)
    assert "the prompt 'the red car and the red car" in line and "and the model's context is 64" in line
    argv = command(mini, "sft", tmp_path / "sft", "--max-length", "200")
    rows = [{**row, "response": " yes"} for row in rows]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv[argv.index("--data") + 1] = str(tmp_path / "long.jsonl")
    assert "the longest text within --max-length 200 has" in refused(capfd, argv)


def test_a_reference_of_another_tokenizer(mini, tmp_path, other_start, capfd):
    line = refused(capfd, command(mini, "ppo", tmp_path / "run", "--ref", other_start.policy))
    assert line.endswith("must have the policy's tokenizer: both score the same tokens")


def test_data_that_changed_is_no_continuation(mini, tmp_path, capfd):
    data = tmp_path / "rows.jsonl"
    data.write_text((mini / "rows.jsonl").read_text())
    argv = command(mini, "sft", tmp_path / "run")
    argv[argv.index("--data") + 1] = str(data)
    assert cli.main(argv) == 0
    data.write_text(data.read_text().replace("red", "pink"))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "cannot be continued: its data had other content then" in refused(capfd, [*argv, "--resume"])
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before

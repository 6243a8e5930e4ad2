"""The demo's own logic, and the whole chain in small on real reviews; `make demo` runs it at full size."""

import json
import math

import pytest

from rlhf import cli, demo


def result(mean, sem):
    return {"gold": {"mean": mean, "sem": sem}}


def test_gain_in_errors():
    assert demo.gain_in_errors(result(0.7, 0.03), result(0.2, 0.04), "gold") == pytest.approx(10.0)
    assert demo.gain_in_errors(result(0.2, 0.0), result(0.2, 0.0), "gold") == 0.0
    assert demo.gain_in_errors(result(0.1, 0.0), result(0.2, 0.0), "gold") == -math.inf


def test_runs_that_are_there_are_refused(tmp_path):
    (tmp_path / "rrhf").mkdir()
    with pytest.raises(FileExistsError, match=r"rrhf are there; --overwrite replaces them"):
        demo.main(demo.DemoConfig(out=str(tmp_path)))


def test_chain_on_real_reviews(tmp_path, data_folder, monkeypatch):
    """SFT → reward model → PPO with attention credit → evaluation against SFT → report, a few steps each."""
    monkeypatch.chdir(tmp_path)
    data = ["--data", str(data_folder / "rt-polarity")]
    small = ["--response-length", "8", "--eval-samples", "8"]
    start = ["--init", "sft", "--rm", "rm"]
    stages = [
        ["sft", "--out", "sft", *data, "--max-steps", "4"],
        ["rm", "--out", "rm", "--init", "sft", *data, "--max-steps", "4", "--batch-size", "4"],
        ["ppo", "--out", "ppo", *start, *data, *small, "--steps", "2", "--batch-size", "8", "--reward-shaping", "abc"],
        ["evaluate", "--run", "ppo", "--against", "sft", *data, "--samples", "8", "--response-length", "8"],
        ["report", "--runs", "sft", "rm", "ppo", "--out", "report"],
    ]
    for words in stages:
        assert cli.main(words) == 0, words
    evaluation = json.loads((tmp_path / "ppo/evaluation.json").read_text())
    assert evaluation["n"] == 8 and set(evaluation["against"]) == {"run", "gold", "proxy"}
    assert math.isfinite(evaluation["gold"]["mean"]) and evaluation["kl"]["mean"] > 0
    for sample in map(json.loads, (tmp_path / "ppo/samples.jsonl").read_text().splitlines()):
        assert sum(sample["credit"]) == pytest.approx(sample["score"], abs=1e-4)
    assert (tmp_path / "report/report.html").exists()

"""The end-to-end comparison: our side runs, TRL's clock counts what it should, README and plot show the results."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import end_to_end, end_to_end_ours, end_to_end_report, end_to_end_task, end_to_end_trl
from benchmarks.end_to_end_report import PHASES

SETTINGS = end_to_end.SETTINGS | {"iterations": 2, "batch_size": 4, "response_length": 4, "num_ppo_epochs": 1}


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    folder = tmp_path_factory.mktemp("task")
    end_to_end_task.make(folder, SETTINGS["response_length"], rm_steps=2, width=8)
    return folder


def test_our_side_runs_on_the_given_models(task, tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end_ours.Run, "log", end_to_end_ours.Run.log)  # what main() replaces is put back
    threads = torch.get_num_threads()
    end_to_end_ours.main(task, SETTINGS | {"seed": 1, "threads": threads}, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert len(result["iterations"]) == 2 and result["peak_rss_mib"] > 50
    for row in result["iterations"]:
        assert row["seconds"].keys() == {*PHASES[:-1], "total"} and min(row["seconds"].values()) > 0
        assert end_to_end_report.time_of(row["seconds"], "other") > 0
    found = end_to_end.heldout(task, tmp_path, SETTINGS)
    assert found["kl"]["mean"] >= 0 and found["score"]["sem"] > 0


def test_the_task_is_what_it_says(task):
    tokenizer = end_to_end_task.word_tokenizer()
    assert len(tokenizer) == 4096 and tokenizer("w2 w4095")["input_ids"] == [2, 4095]
    prompts = [json.loads(line)["prompt"] for line in (task / "prompts.jsonl").read_text().splitlines()]
    assert {len(prompt.split()) for prompt in prompts} == set(range(8, 17)) and len(prompts) == 1024
    assert not {*prompts} & {*json.loads((task / "heldout.json").read_text())}


def test_the_reward_model_learns_the_rule():
    torch.manual_seed(0)
    policy, model = end_to_end_task.models(32, 8)
    good = end_to_end_task.good_words(policy)
    assert good.sum() == 2047 and not good[:2].any()
    tokens, target = end_to_end_task.random_texts(good, 200, 8)
    torch.testing.assert_close(target, 8 * good[tokens].float().mean(1) - 4)
    assert tokens.min() >= 2 and target.min() < -3.5 and target.max() > 3.5
    assert end_to_end_task.train_reward_model(model, good, (6, 8), 40) > 0.5


def test_trl_is_timed_by_phase(monkeypatch):
    now = 0.0
    monkeypatch.setattr(end_to_end_trl.time, "perf_counter", lambda: now)

    def work(seconds):
        nonlocal now
        now += seconds

    clock = end_to_end_trl.Clock()
    sample = clock.timed(work, lambda *_: "generate")
    forward = clock.timed(work, lambda seconds: "logprobs and values" if seconds < 5 else None)
    for _ in range(2):
        work(1)
        sample(2)
        forward(3)
        forward(4)
        forward(5)  # the policy's: the training has begun, and what is called in it counts to it
        sample(6)
        work(7)
        assert clock.iteration() == {"generate": 2, "logprobs and values": 7, "train": 18, "total": 28}


def test_readme_and_plot_show_the_results():
    assert end_to_end_report.out_of_step() == []


def test_a_result_that_misses_its_target_is_said():
    def side(total, peak, score):
        seconds = dict.fromkeys(PHASES[:-1], total / 5) | {"total": total}
        held = {"score": {"mean": score, "sem": 0.1}, "kl": {"mean": 1.0, "sem": 0.1}}
        # The first iteration warms up and is left out.
        rows = [{"seconds": {**seconds, "total": 99.0}, "score": 0.0, "kl": 0.0}] + [{"seconds": seconds}] * 3
        versions = {"transformers": "5.0"}
        return {"versions": versions, "runs": [{"iterations": rows, "peak_rss_mib": peak, "heldout": held}]}

    machine = {"cpu": "a CPU", "instructions": "AVX2", "torch": "2", "commit": "c", "date": "2026-01-01T00:00:00"}
    results = {"settings": SETTINGS | {"threads": 2}, "machine": machine}
    text = end_to_end_report.text(results | {"sides": {"ours": side(2.0, 600, 0.5), "TRL": side(3.0, 1000, 0.7)}})
    assert "| episodes a second | 2.0 | 1.3 | 1.50 × |" in text and "| – other | 0.40 | 0.60 | 0.67 × |" in text
    assert "| ≥ 1.7 × the episodes a second | 1.50 × | no |" in text
    assert "| ≤ 0.7 × the memory | 0.60 × | yes |" in text
    assert "| held-out score equal or better | -0.20 | no |" in text


def test_a_folder_that_is_no_environment_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(SystemExit, match="must be a virtual environment or a new folder"):
        end_to_end.trl_python(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def test_without_a_package_index_the_message_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(end_to_end.venv, "create", lambda folder, with_pip: Path(folder).mkdir(parents=True))
    monkeypatch.setattr(end_to_end.subprocess, "run", lambda *_, **__: end_to_end.subprocess.CompletedProcess([], 1))
    with pytest.raises(SystemExit, match=r"pip could not install torch==2\.13\.0 .*needs a package index"):
        end_to_end.trl_python(tmp_path / "new")

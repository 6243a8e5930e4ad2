"""The refreshed reward model: labels, what it learns, its normalisation, resuming, a person's labels."""

import json
from dataclasses import replace

import pytest
import torch

from rlhf import online, rm
from rlhf.config import UserError
from rlhf.data import load_task
from rlhf.gold_model import RewardModelJudge
from rlhf.model import load_reward_model
from rlhf.run import Run


def config(out, start, **changes):
    settings = {
        "out": str(out),
        "init": start.policy,
        "rm": start.reward_model,
        "steps": 5,
        "batch_size": 8,
        "num_ppo_epochs": 1,
        "response_length": 8,
        "eval_samples": 4,
        "eval_every": 0,
        "num_samples": 0,
        "refresh_every": 2,
        "label_prompts": 12,
        "rm_mix": 2.0,
        "rm_learning_rate": 1e-3,
    }
    return online.OnlineConfig(**{**settings, **changes})


def lines_of(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


@pytest.fixture(scope="module")
def settings(tmp_path_factory, start, other_start):
    """Another reward model is the gold judge: the reviews' own finds all that an untrained policy writes equal."""
    out = tmp_path_factory.mktemp("online") / "whole"
    return config(out, start, gold=other_start.reward_model, save_steps=2)


@pytest.fixture(scope="module")
def whole(settings):
    return online.main(settings)


def test_labels_and_what_is_learned_from_them(whole, settings):
    lines = {line["step"]: line for line in lines_of(whole)}
    assert [step for step, line in lines.items() if "label/rankings" in line] == [3, 5]
    labels = lines_of(whole, "labels.jsonl")
    judge = RewardModelJudge(settings.gold)
    for label in labels[::5]:
        assert label["scores"] == pytest.approx(judge([label["prompt"]] * 2, label["responses"]), abs=1e-4)
    counts = [sum(label["step"] == step for label in labels) for step in (3, 5)]
    assert [lines[3]["label/rankings"], lines[5]["label/rankings"]] == counts and min(counts) > 0
    # All the labels so far, and two old rankings for each.
    assert [lines[3]["refresh/rankings"], lines[5]["refresh/rankings"]] == [3 * counts[0], 3 * sum(counts)]
    assert lines[3]["refresh/accuracy_after"] >= lines[3]["refresh/accuracy_before"]
    assert 0 <= lines[5]["refresh/heldout_after"] <= 1


def test_old_rankings_may_be_in_a_file_of_their_own(tmp_path, start, settings):
    known = [
        {"prompt": each.prompt, "responses": each.responses, "scores": each.scores}
        for each in load_task("reviews", 0).rankings[:10]
    ]
    file = tmp_path / "known.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in known))
    changes = {"gold": settings.gold, "steps": 3, "rm_mix": 100.0, "rm_data": str(file)}
    folder = online.main(config(tmp_path / "run", start, **changes))
    line = lines_of(folder)[-1]
    # Its nine that are not held out, once each, however many are wanted.
    assert line["refresh/rankings"] == line["label/rankings"] + 9


def test_old_rankings_that_are_not_there_are_named(tmp_path, start):
    with pytest.raises(UserError, match=r"rm_data .*absent\.jsonl: .*is not there"):
        online.main(config(tmp_path / "run", start, rm_data=str(tmp_path / "absent.jsonl")))
    assert not (tmp_path / "run").exists()


def test_the_refreshed_model_is_saved_with_a_normalisation_of_its_own(whole, start):
    model, tokenizer = load_reward_model(str(whole / "reward"))
    before, _ = load_reward_model(start.reward_model)
    assert not torch.equal(model.score.weight, before.score.weight)
    task = load_task("reviews", 0)
    fitted = (model.config.score_mean, model.config.score_std)
    assert fitted != (before.config.score_mean, before.config.score_std)
    rm.fit_normalization(model, tokenizer, task, rm.RmConfig(out="o", init="i"))
    assert (model.config.score_mean, model.config.score_std) == pytest.approx(fitted, rel=1e-4, abs=1e-5)


def test_resume_equals_an_uninterrupted_run(tmp_path, settings, whole, monkeypatch):
    """Killed in the step of the second refresh, after its labels were written."""
    log = Run.log

    def interrupted(self, step, values):
        if step == 5:
            raise KeyboardInterrupt
        return log(self, step, values)

    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        online.main(replace(settings, out=str(tmp_path / "parts")))
    monkeypatch.undo()
    assert {line["step"] for line in lines_of(tmp_path / "parts", "labels.jsonl")} == {3, 5}
    parts = online.main(replace(settings, out=str(tmp_path / "parts"), resume=True))
    for name in ("model", "value", "reward"):
        saved = [(folder / name / "model.safetensors").read_bytes() for folder in (whole, parts)]
        assert saved[0] == saved[1], name
    assert lines_of(parts, "labels.jsonl") == lines_of(whole, "labels.jsonl")


def test_a_refresh_without_labels_changes_nothing(tmp_path, start, capsys):
    folder = online.main(config(tmp_path / "run", start, steps=3, label_prompts=2, response_length=2))
    assert "step 3: no prompt got unequal scores, so the reward model stays as it is" in capsys.readouterr().err
    saved = [load_reward_model(path)[0].score.weight for path in (str(folder / "reward"), start.reward_model)]
    assert torch.equal(*saved) and lines_of(folder)[-1]["label/rankings"] == 0


def test_a_person_labels_and_the_run_goes_on(tmp_path, start):
    settings = {"labeler": "export", "steps": 3, "label_prompts": 3}
    out = tmp_path / "run"
    file = out / "to_label" / "step-000003.jsonl"
    with pytest.raises(UserError, match=r"the samples of step 2 are in .*step-000003\.jsonl.*go on with --resume"):
        online.main(config(out, start, **settings))
    with pytest.raises(UserError, match="go on with --resume"):
        online.main(config(out, start, **settings, resume=True))
    rows = lines_of(out / "to_label", file.name)
    assert len(rows) == 3 and rows[0]["scores"] == [None, None]
    rows[1]["scores"] = [0.0, 1.0]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = online.main(config(out, start, **settings, resume=True))
    assert [line["step"] for line in lines_of(folder)] == [0, 1, 2, 3]
    assert lines_of(folder)[-1]["label/rankings"] == 1
    assert lines_of(folder, "labels.jsonl") == [{"step": 3, **rows[1]}]


def test_a_local_judge(tmp_path, start):
    folder = online.main(config(tmp_path / "run", start, steps=3, labeler="judge", judge=start.policy, label_prompts=3))
    line = lines_of(folder)[-1]
    assert line["label/rankings"] == 3 and abs(line["label/position_bias"]) <= 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labeler": "judge"}, "labeler judge needs --judge"),
        ({"labeler": "endpoint", "endpoint": "http://127.0.0.1:1"}, "labeler endpoint needs --endpoint-model"),
        ({"label_responses": 1}, "label_responses must be at least 2, got 1"),
        ({"rm": None, "reward_fn": "f.py:g"}, "online needs --rm: the reward model is what is refreshed"),
    ],
)
def test_config_errors(tmp_path, start, change, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, start, **change)

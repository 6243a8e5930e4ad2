"""Rejection-sampling fine-tuning: what is kept and how it weighs, the loss, the stage, resuming."""

import json
import math

import pytest
import torch

from rlhf import rft
from rlhf.candidates import Candidates
from rlhf.config import UserError
from rlhf.model import load_policy, response_logprobs
from rlhf.run import Run
from rlhf.sft import train_step


def config(out="o", start=None, **changes):
    settings = {
        "out": str(out),
        "init": start.policy if start else "i",
        "rm": start.reward_model if start else "r",
        "rounds": 2,
        "num_prompts": 6,
        "num_candidates": 4,
        "batch_size": 4,
        "response_length": 8,
        "eval_samples": 8,
        "eval_every": 0,
    }
    return rft.RftConfig(**{**settings, **changes})


def group(prompt, scores, first=10):
    count = len(scores)
    return Candidates(
        prompt, [1, 2], [[first + i, 0] for i in range(count)], ["x"] * count, scores, ("sample",) * count
    )


def test_top_k_takes_the_first_of_equals():
    kept = rft.select([group("a", (0.5, 0.9, 0.9, 0.1)), group("b", (0.0, -1.0))], config(top_k=2), 0)
    assert [each.response[0] for each in kept] == [11, 12, 10, 11]
    assert {each.weight for each in kept} == {1.0}


def test_quantiles_rise_within_a_round_and_never_reach_the_end():
    """trlx's defaults between two samplings: .70, .7625, .825, .8875."""
    settings = config(select="quantile", improve_steps=4)
    assert [rft.quantile_at(step, settings) for step in range(4)] == pytest.approx([0.7, 0.7625, 0.825, 0.8875])


def test_thresholds_are_kept_inside_their_range():
    groups = [group("a", (0.0, 1.0, 2.0, 3.0, 4.0)), group("b", (1.0, 1.0, 1.0)), group("c", (5.0, 5.0, 6.0))]
    assert rft.thresholds(groups, 0.5) == pytest.approx([2.0, 1.0 + 1e-3, 5.0 - 1e-3])
    kept = rft.select(groups, config(select="quantile", quantile_start=0.5), 0)
    # The second prompt has nothing above the others' least; the third keeps what equals its threshold.
    assert [(each.score, each.response[0]) for each in kept] == [
        (4.0, 14), (3.0, 13), (2.0, 12), (6.0, 12), (5.0, 10), (5.0, 11)
    ]  # fmt: skip


def test_weights_are_a_softmax_within_the_prompt():
    kept = rft.select([group("a", (1.0, 0.0)), group("b", (3.0, 3.0, 3.0))], config(select="weighted", tau=0.5), 0)
    high = 1 / (1 + math.exp(-2))
    assert [each.weight for each in kept] == pytest.approx([high, 1 - high, *[1 / 3] * 3])


def test_merge_keeps_a_response_once():
    old = [group("a", (0.1, 0.2))]
    new = [group("b", (0.5,)), group("a", (0.1, 0.2, 0.3))]
    merged = rft.merge(old, new)
    assert [each.prompt for each in merged] == ["a", "b"]
    assert [len(each.responses) for each in merged] == [3, 1] and merged[0].scores == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_weighted_loss_and_its_tokens(start, loss_on):
    policy, tokenizer = load_policy(start.policy)
    kept = [rft.Kept([5, 6, 7], [8, 9], 0.0, 0.25), rft.Kept([5], [9, 8, 7, 6], 0.0, 2.0)]
    batch = rft.batch_of(kept, tokenizer, loss_on)
    counts = [2, 4] if loss_on == "response" else [4, 4]
    assert batch.mask.sum(1).tolist() == counts
    with torch.no_grad():
        nll = -response_logprobs(policy, batch).sum(1)
    expected = (0.25 * nll[0] + 2 * nll[1]) / (0.25 * counts[0] + 2 * counts[1])
    optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
    weights = torch.tensor([each.weight for each in kept])
    for micro_batch in (None, 1):
        metrics = train_step(policy, optimizer, batch, config(micro_batch=micro_batch), weights)
        assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, start):
    return rft.main(config(tmp_path_factory.mktemp("rft") / "whole", start))


def test_stage(whole):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    # The best of each prompt in batches of four, two passes a round: two steps a pass for the six prompts of the first
    # round, three for the twelve or so of both.
    assert [line["step"] for line in lines] == list(range(11))
    assert lines[4]["selected/responses"] == 6 and 9 <= lines[5]["selected/responses"] <= 12
    assert lines[1]["selected/scores"] > lines[1]["objective/scores"]
    assert lines[3]["loss"] < lines[1]["loss"]
    assert "eval/proxy" in lines[0] and "eval/proxy" in lines[-1]
    assert (whole / "model" / "model.safetensors").exists()


def test_resume_equals_an_uninterrupted_run(tmp_path, start, whole, monkeypatch):
    log = Run.log

    def interrupted(self, step, values):
        if step == 6:
            raise KeyboardInterrupt
        return log(self, step, values)

    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rft.main(config(tmp_path / "parts", start, save_steps=5))  # the first of a pass's three steps
    monkeypatch.undo()
    parts = rft.main(config(tmp_path / "parts", start, resume=True))
    saved = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, parts)]
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_candidates": 1}, "num_candidates must be at least 2, got 1"),
        ({"quantile_start": 0.9, "quantile_end": 0.5}, "quantile_end must be at least quantile_start 0.9, got 0.5"),
        ({"tau": 0.0}, "tau must be greater than 0, got 0.0"),
        ({"rounds": 0}, "rounds must be at least 1, got 0"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(UserError, match=message):
        config(**change)

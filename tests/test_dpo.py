"""DPO: the losses by hand and by autograd, pairs, micro-batches, the stage, resuming."""

import json
import math

import pytest
import torch

from rlhf import dpo
from rlhf.candidates import Candidates
from rlhf.config import UserError
from rlhf.model import load_policy, response_logprobs
from rlhf.run import Run

ROWS = [
    {"prompt": f"in this film the {aspect}", "chosen": " is brilliant .", "rejected": " is dull and weak ."}
    for aspect in ("plot", "music", "acting", "story", "cast", "humor", "camera", "hero")
]


def config(out="o", start=None, **changes):
    settings = {
        "out": str(out),
        "init": start.policy if start else "i",
        "rm": start.reward_model if start else "r",
        "batch_size": 4,
        "response_length": 8,
        "eval_samples": 8,
        "eval_every": 0,
    }
    return dpo.DpoConfig(**{**settings, **changes})


def test_known_values():
    """Hand numbers: β d = 0.1 · (0, 2, −3) nats."""
    ratio = torch.tensor([0.0, 2.0, -3.0], dtype=torch.float64)
    sigmoid = [math.log(2), math.log1p(math.exp(-0.2)), math.log1p(math.exp(0.3))]
    assert dpo.dpo_loss(ratio, beta=0.1).tolist() == pytest.approx(sigmoid)
    assert sigmoid == pytest.approx([0.693147, 0.598139, 0.854355], rel=1e-5)
    smooth = [0.9 * right + 0.1 * (right + 0.1 * d) for right, d in zip(sigmoid, (0, 2, -3))]
    assert dpo.dpo_loss(ratio, beta=0.1, label_smoothing=0.1).tolist() == pytest.approx(smooth)
    assert dpo.dpo_loss(ratio, beta=0.1, loss="ipo").tolist() == pytest.approx([25.0, 9.0, 64.0])
    with pytest.raises(ValueError, match="loss must be one of sigmoid, ipo, got 'hinge'"):
        dpo.dpo_loss(ratio, beta=0.1, loss="hinge")


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.2}, {"loss": "ipo"}], ids=str)
def test_gradients(settings):
    ratio = torch.tensor([0.0, 2.0, -3.0, 40.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: dpo.dpo_loss(x, beta=0.3, **settings), (ratio,))
    extreme = torch.tensor([-1e5, 1e5], requires_grad=True)
    loss = dpo.dpo_loss(extreme, beta=0.1, **settings)
    (gradient,) = torch.autograd.grad(loss.sum(), extreme)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_pairs_of_a_ranking():
    group = Candidates("p", [1], [[2], [3], [4]], ["x"] * 3, (0.5, 0.9, 0.5), ("sample",) * 3)
    assert [(pair.chosen, pair.rejected) for pair in dpo.pairs_of(group, "all")] == [([3], [2]), ([3], [4])]
    assert [(pair.chosen, pair.rejected) for pair in dpo.pairs_of(group, "extremes")] == [([3], [2])]


def test_micro_batches_and_the_length_average(start):
    policy, tokenizer = load_policy(start.policy)
    pairs = [dpo.Pair([5, 6], [7, 8, 9], [10]), dpo.Pair([5], [11, 12], [13, 14, 15, 16]), dpo.Pair([6], [7], [8])]
    batch = dpo.batch_of(pairs, tokenizer)
    ref = torch.tensor([[-20.0, -9.0], [-10.0, -30.0], [-5.0, -5.0]])
    with torch.no_grad():
        sums = response_logprobs(policy, batch).sum(1).view(-1, 2)
        lengths = torch.tensor([[3, 1], [2, 4], [1, 1]])
        torch.testing.assert_close(dpo.pair_logprobs(policy, batch, config(length_average=True)), sums / lengths)
    difference = (sums - ref)[:, 0] - (sums - ref)[:, 1]
    expected = -torch.nn.functional.logsigmoid(0.1 * difference).mean().item()
    gradients = []
    for micro_batch in (None, 2, 5):
        optimizer = torch.optim.SGD(policy.parameters(), lr=0.0)
        metrics = dpo.update(policy, optimizer, batch, ref, config(micro_batch=micro_batch, max_grad_norm=1e9))
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
        assert metrics["rewards/margins"] == pytest.approx(0.1 * difference.mean().item(), rel=1e-4)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def learned(tmp_path_factory, start):
    folder = tmp_path_factory.mktemp("dpo")
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return config(folder / "whole", start, rm=None, data=str(folder / "pairs.jsonl"), epochs=8, save_steps=5)


def test_stage_learns_the_pairs(learned):
    whole = dpo.main(learned)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert lines[1]["loss"] == pytest.approx(math.log(2), rel=1e-5)  # the policy is still the reference
    assert lines[1]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert lines[-1]["rewards/accuracies"] == 1.0 and lines[-1]["loss"] < 0.6
    assert lines[-1]["eval/kl"] > 0


def test_resume_equals_an_uninterrupted_run(tmp_path, learned, monkeypatch):
    log = Run.log

    def interrupted(self, step, values):
        if step == 8:
            raise KeyboardInterrupt
        return log(self, step, values)

    again = {**vars(learned), "out": str(tmp_path / "parts")}
    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        dpo.main(dpo.DpoConfig(**again))
    monkeypatch.undo()
    parts = dpo.main(dpo.DpoConfig(**{**again, "resume": True}))
    saved = [(folder / "model" / "model.safetensors").read_bytes() for folder in (dpo.Path(learned.out), parts)]
    assert saved[0] == saved[1]


def test_pairs_of_own_samples(tmp_path, start):
    folder = dpo.main(config(tmp_path / "run", start, pairs="sampled", pairing="extremes", num_prompts=8))
    info = json.loads((folder / "run.json").read_text())["summary"]
    assert info["pairs"] == 8 and info["steps"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": 0.0}, "beta must be greater than 0, got 0.0"),
        ({"label_smoothing": 0.5}, "label_smoothing must be at least 0 and less than 0.5, got 0.5"),
        ({"loss": "ipo", "label_smoothing": 0.1}, "label_smoothing belongs to loss sigmoid, got loss ipo"),
        ({"rm": None, "pairs": "sampled"}, "pairs sampled needs --rm"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(UserError, match=message):
        config(**change)

"""Evaluation: known values of the measures, the exact KL, no trace in the random stream, the files."""

import json

import pytest
import torch

from rlhf import evaluate
from rlhf.config import UserError
from rlhf.data import load_task
from rlhf.evaluate import Judges, distance, distinct, mean_and_sem, measure, win_rate
from rlhf.model import load_policy, load_reward_model, response_logits
from rlhf.rm import score_texts
from rlhf.rollout import generate
from rlhf.scorer import RewardModelScorer


def config(start, **changes):
    settings = {"run": start.policy, "ref": start.policy, "rm": start.reward_model, "samples": 8, "response_length": 6}
    return evaluate.EvaluateConfig(**{**settings, **changes})


def test_mean_and_sem():
    assert mean_and_sem([1.0, 2.0, 3.0, 4.0]) == {"mean": 2.5, "sem": pytest.approx((5 / 3 / 4) ** 0.5)}
    assert mean_and_sem([3.0]) == {"mean": 3.0, "sem": 0.0}


def test_distinct_counts_grams_of_the_mask_only():
    responses = torch.tensor([[1, 2, 1, 2], [1, 2, 9, 9]])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    assert distinct(responses, mask, 1) == pytest.approx(2 / 6)
    assert distinct(responses, mask, 2) == pytest.approx(2 / 4)  # 12, 21, 12 and 12


def test_win_rate_counts_a_tie_half():
    ours = [{"prompt": "a", "gold": 1.0}, {"prompt": "b", "gold": 0.0}, {"prompt": "c", "gold": 2.0}]
    theirs = [{"prompt": "a", "gold": 0.0}, {"prompt": "b", "gold": 0.0}, {"prompt": "c", "gold": 3.0}]
    assert win_rate(ours, theirs, "gold")["mean"] == pytest.approx(0.5)
    with pytest.raises(ValueError, match="must be of the same prompts, got 'a' and 'b'"):
        win_rate(ours, theirs[1:], "gold")


def test_distance_and_entropy_are_sums_over_the_vocabulary(start, other_start):
    policy, tokenizer = load_policy(start.policy)
    ref, _ = load_policy(start.policy)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in ref.parameters():
            parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
        rollout = generate(policy, tokenizer, ["in this film the plot", "as a fan the music is"], response_length=5)
        p, q = (response_logits(model, rollout.batch).double().log_softmax(-1) for model in (policy, ref))
        expected = torch.where(rollout.batch.mask, (p.exp() * (p - q)).sum(-1), 0)
        entropy = torch.where(rollout.batch.mask, -(p.exp() * p).sum(-1), 0)
        for micro_batch in (None, 1):
            ours = distance(policy, ref, rollout, 1.0, micro_batch)
            torch.testing.assert_close(ours[0].double(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(ours[1].double(), entropy, rtol=1e-4, atol=1e-5)
        assert (expected.sum(1) > 0.01).all()
        assert distance(policy, policy, rollout, 1.0)[0].abs().max() < 1e-5


def test_measure_is_repeatable_and_leaves_the_random_stream(start):
    policy, tokenizer = load_policy(start.policy)
    task = load_task("reviews", 0)
    judges = Judges(policy, RewardModelScorer(load_reward_model(start.reward_model)[0]), task.gold)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, second = (
        measure(
            policy, tokenizer, judges, task.eval_prompts[:6], response_length=6, temperature=1.0, seed=3, micro_batch=n
        )
        for n in (None, None)
    )
    assert torch.equal(torch.get_rng_state(), before)
    assert first == second
    assert first["n"] == 6 and len(first["samples"]) == 6
    assert first["proxy"]["mean"] == pytest.approx(sum(s["proxy"] for s in first["samples"]) / 6)
    assert first["kl"]["mean"] == pytest.approx(0, abs=1e-5)


def test_stage_writes_once_and_compares(tmp_path, start, capsys):
    out = tmp_path / "e.json"
    assert evaluate.main(config(start, out=str(out), against=start.policy)) == out
    result = json.loads(out.read_text())
    assert result["against"]["gold"]["mean"] == 0.5  # a model ties with itself on the same seed
    assert "wins over" in capsys.readouterr().out
    with pytest.raises(FileExistsError, match="--overwrite replaces it"):
        evaluate.main(config(start, out=str(out)))


def test_a_reward_model_as_the_gold_judge(tmp_path, start, other_start):
    """It reads texts with a tokenizer of its own."""
    result = json.loads(
        evaluate.main(config(start, out=str(tmp_path / "e.json"), gold=other_start.reward_model)).read_text()
    )
    model, tokenizer = load_reward_model(other_start.reward_model)
    texts = [(sample["prompt"], sample["response"]) for sample in result["samples"]]
    expected = score_texts(model, tokenizer, texts, 512).tolist()
    assert [sample["gold"] for sample in result["samples"]] == pytest.approx(expected, abs=1e-5)
    assert result["entropy"] > 0


def test_a_model_folder_needs_out(start):
    with pytest.raises(UserError, match="is not a run folder: say with --out where the evaluation goes"):
        evaluate.main(config(start))

"""Best-of-n: the estimator's known values, ties, and the stage."""

import itertools
import json

import pytest

from rlhf import best_of_n
from rlhf.best_of_n import estimate, expected_best, kl_bound
from rlhf.candidates import Candidates
from rlhf.config import UserError


def candidates(scores):
    return Candidates("p", [1], [[2]] * len(scores), ["x"] * len(scores), tuple(scores), ("sample",) * len(scores))


def test_known_values():
    scores = [0.1, 0.4, 0.2, 0.9]
    assert expected_best(scores, scores, 1) == pytest.approx(0.4)
    assert expected_best(scores, scores, 2) == pytest.approx(0.616667, rel=1e-5)
    assert expected_best(scores, scores, 4) == pytest.approx(0.9)
    assert [kl_bound(n) for n in (1, 2, 4)] == pytest.approx([0, 0.193147, 0.636294], rel=1e-5)


@pytest.mark.parametrize("proxy", [[0.3, 0.1, 0.2, 0.5, 0.4], [0.3, 0.3, 0.1, 0.3, 0.2]])
def test_expected_best_is_the_mean_over_all_subsets(proxy):
    """By enumeration, each subset answering with the first of its highest proxies."""
    value = [10.0, 20.0, 30.0, 40.0, 50.0]
    for n in (1, 2, 3, 5):
        answers = [
            value[max(subset, key=lambda i: (proxy[i], -i))] for subset in itertools.combinations(range(len(proxy)), n)
        ]
        assert expected_best(proxy, value, n) == pytest.approx(sum(answers) / len(answers))


def test_expected_best_of_very_many_samples():
    """Scores 1 … N: the best of n is (N + 1) n / (n + 1) in the mean; C(N, n) has 60 000 digits here."""
    count = 200_000
    scores = [float(i) for i in range(1, count + 1)]
    for n in (1, 7, 100_000, count):
        assert expected_best(scores, scores, n) == pytest.approx((count + 1) * n / (n + 1), rel=1e-9)


def test_expected_best_needs_n_samples():
    with pytest.raises(ValueError, match="n must lie between 1 and the 2 samples, got 3"):
        expected_best([1.0, 2.0], [1.0, 2.0], 3)


def test_best_takes_the_first_of_equals():
    assert candidates([0.1, 0.7, 0.7]).best == 1


def test_estimate_rises_with_n():
    groups = [candidates([0.1, 0.4, 0.2, 0.9]), candidates([1.0, 0.0, 0.5, 0.25])]
    rows = estimate(groups, [[0.0, 1.0, 2.0, 3.0]] * 2, 4)
    assert [row["n"] for row in rows] == [1, 2, 4]
    assert rows[2]["proxy"]["mean"] == pytest.approx(0.95)
    assert rows[2]["gold"]["mean"] == pytest.approx(1.5)
    assert rows[0]["proxy"]["mean"] < rows[1]["proxy"]["mean"] < rows[2]["proxy"]["mean"]


def test_stage(tmp_path, start):
    folder = best_of_n.main(
        best_of_n.BestOfNConfig(
            out=str(tmp_path / "run"),
            init=start.policy,
            rm=start.reward_model,
            n=4,
            num_prompts=16,
            batch_size=8,
            epochs=3,
            response_length=8,
            eval_samples=16,
            learning_rate=1e-3,
        )
    )
    selected = [json.loads(line) for line in (folder / "selected.jsonl").read_text().splitlines()]
    assert len(selected) == 16 and set(selected[0]) == {"prompt", "response", "score"}
    rows = json.loads((folder / "run.json").read_text())["summary"]["best_of_n"]
    assert rows[0]["proxy"]["mean"] < rows[-1]["proxy"]["mean"]
    losses = [json.loads(line).get("loss") for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 7 and losses[-1] < losses[1]
    assert (folder / "model" / "model.safetensors").exists()


def test_n_must_leave_a_choice(tmp_path, start):
    with pytest.raises(UserError, match="n must be at least 2, got 1"):
        best_of_n.BestOfNConfig(out=str(tmp_path), init=start.policy, rm=start.reward_model, n=1)

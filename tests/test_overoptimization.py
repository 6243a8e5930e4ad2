"""Over-optimisation: the fits on points of known forms, the stop rule by hand, a run that stops."""

import json
import math
import random

import pytest

from rlhf import rrhf
from rlhf.overoptimization import Fit, fit, gold_fell, overoptimization
from rlhf.run import Run

DISTANCES = [0.0, 0.5, 1.0, 2.0, 3.0, 5.0]


@pytest.mark.parametrize(("form", "peak"), [("best_of_n", 0.8 / (2 * 0.1)), ("rl", math.exp(0.8 / 0.1 - 1))], ids=str)
@pytest.mark.parametrize("start", [None, 0.25])
def test_fit_finds_the_numbers_it_was_made_with(form, peak, start):
    made = Fit(form, a=0.8, b=0.1, start=0.25, rmse=0.0)
    found = fit(DISTANCES, [made(d) for d in DISTANCES], form, start)
    assert (found.a, found.b, found.start) == pytest.approx((0.8, 0.1, 0.25))
    assert found.rmse == pytest.approx(0, abs=1e-12) and found.peak == pytest.approx(peak)
    assert made(peak) > max(made(0.9 * peak), made(1.1 * peak))


def test_known_values_of_the_forms():
    assert Fit("best_of_n", 1.0, 0.25, 0.5, 0.0)(2.0) == pytest.approx(0.5 + 2 * (1 - 0.5))
    assert Fit("rl", 1.0, 0.25, 0.5, 0.0)(2.0) == pytest.approx(0.5 + 2 * (1 - 0.25 * math.log(2)))
    assert Fit("rl", 1.0, 0.25, 0.5, 0.0)(0.0) == 0.5  # d log d → 0
    assert Fit("rl", 1.0, -0.25, 0.5, 0.0).peak is None  # it never falls


@pytest.mark.parametrize("form", ["best_of_n", "rl"])
def test_fit_is_least_squares(form):
    """No small change of a, b or start makes the error on noisy points smaller."""
    rng = random.Random(0)
    made = Fit(form, 0.8, 0.1, 0.0, 0.0)
    gold = [made(d) + rng.gauss(0, 0.05) for d in DISTANCES]
    found = fit(DISTANCES, gold, form)
    assert found.rmse == pytest.approx(error(found, gold)) and found.rmse > 0.01
    for name in ("a", "b", "start"):
        for change in (-1e-3, 1e-3):
            moved = Fit(**{**vars(found), name: getattr(found, name) + change})
            assert error(moved, gold) > found.rmse


def error(found, gold):
    return math.sqrt(sum((found(d) - g) ** 2 for d, g in zip(DISTANCES, gold)) / len(gold))


def test_points_that_determine_nothing():
    assert fit([0.0, 1.0], [0.1, 0.2], "rl") is None
    assert fit([1.0, 1.0, 1.0], [0.1, 0.2, 0.3], "rl") is None
    assert fit([2.0, 3.0], [0.1, 0.2], "rl", start=0.0) is not None
    with pytest.raises(ValueError, match="form must be best_of_n or rl, got 'ppo'"):
        fit([1.0], [1.0], "ppo")
    with pytest.raises(ValueError, match="wanted one gold reward for each distance, got 1 and 2"):
        fit([1.0, 2.0], [1.0], "rl")


def test_stop_rule():
    """Interval ± 1.96 · 0.05 = ± 0.098 below the highest mean so far."""
    rising = [(0.1, 0.05), (0.3, 0.05), (0.5, 0.05)]
    assert not gold_fell(rising, 1)
    assert not gold_fell([*rising, (0.41, 0.05)], 1)  # 0.508 is not below 0.5
    assert gold_fell([*rising, (0.40, 0.05)], 1)
    assert not gold_fell([*rising, (0.40, 0.05)], 2)
    assert gold_fell([*rising, (0.40, 0.05), (0.39, 0.05)], 2)
    assert not gold_fell([*rising, (0.40, 0.05), (0.45, 0.05), (0.3, 0.05)], 2)
    assert not gold_fell([], 1)


def test_a_run_stops_and_keeps_the_best_policy(tmp_path, start, monkeypatch):
    """Gold as an evaluation would report it is replaced; two falls in a row end the run, also after a resume."""
    gold = {0: 0.1, 1: 0.6, 2: 0.2, 3: 0.55, 4: 0.3, 5: 0.2, 6: 0.9}
    log = Run.log

    def replaced(self, step, metrics):
        if step == stop_at:
            raise KeyboardInterrupt
        return log(self, step, {**metrics, "eval/gold": gold[step], "eval/gold_sem": 0.05})

    monkeypatch.setattr(Run, "log", replaced)
    settings = {
        "out": str(tmp_path / "run"),
        "init": start.policy,
        "rm": start.reward_model,
        "num_prompts": 4,
        "batch_size": 4,
        "rounds": 6,
        "response_length": 6,
        "eval_samples": 4,
        "eval_every": 1,
        "stop_on_gold": 2,
    }
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        rrhf.main(rrhf.RrhfConfig(**settings))
    stop_at = None
    folder = rrhf.main(rrhf.RrhfConfig(**settings, resume=True))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4, 5]
    assert json.loads((folder / "run.json").read_text())["summary"]["steps"] == 5
    weights = [(folder / name / "model.safetensors").read_bytes() for name in ("best", "model")]
    assert weights[0] != weights[1]
    points = [(math.sqrt(max(line["eval/kl"], 0)), line["eval/gold"]) for line in lines]
    found = overoptimization(folder)["overoptimization"]
    expected = fit([d for d, _ in points], [g for _, g in points], "rl")
    assert found["a"] == pytest.approx(expected.a) and found["form"] == "rl"

"""benchmarks/experiments: its statistics and findings on records written by hand, one small real run, and the pages."""

import argparse
import json
import math
import re
from pathlib import Path

import pytest

from benchmarks.experiments import __main__ as command
from benchmarks.experiments import dense, experiment, labels, methods, online, page, statistics, store

EXPERIMENTS = command.EXPERIMENTS


def record(arm, seed, scores, task="reviews-16", **final):
    measured = {"proxy": 1.0, "gold": 0.1, "kl": 2.0, "length": 9.0, "distinct_2": 0.3, "perplexity": 7.0} | final
    series = {
        "objective/scores": [[step, value] for step, value in enumerate(scores, 1)],
        "eval/gold": [[0, 0.0], [2, measured["gold"]]],
        "eval/length": [[0, 5.0 if task == "reviews-16" else 50.0]],
    }
    return {
        "task": task,
        "arm": arm,
        "seed": seed,
        "machine": "a machine",
        "seconds": 3.0,
        "peak_rss_mib": 700,
        "series": series,
        "final": measured,
    }


def dense_records(gain, task="reviews-16"):
    """Terminal climbs to 1 in the fourth step; attention credit is higher by `gain`, with a little noise a seed."""
    records = []
    for seed in range(4):
        noise = 0.01 * (seed - 1.5)
        base = [0.0, 0.5, 0.8, 1.0]
        records.append(record("terminal", seed, [value + noise for value in base], task))
        records.append(record("uniform", seed, [value + noise for value in base], task))
        records.append(record("abc 0.8", seed, [value + gain - noise for value in base], task))
    return records


def test_interval_of_known_values():
    # 1, 2, 4: mean 7/3, sample standard deviation √(7/3), t(2) = 4.303.
    found = statistics.interval([1.0, 2.0, 4.0])
    assert found.mean == pytest.approx(7 / 3) and found.half == pytest.approx(4.303 * math.sqrt(7 / 3) / math.sqrt(3))
    assert not found.excludes_zero and statistics.interval([3.0, 3.1, 2.9]).excludes_zero
    assert statistics.interval([1.0]).half == math.inf and str(statistics.interval([1.0])) == "1.000"


def test_difference_is_paired_by_seed():
    first, second = {0: 1.0, 1: 5.0, 2: 9.0}, {0: 0.5, 1: 4.5, 7: 0.0}
    assert statistics.difference(first, second) == (0.5, 0.0, 2)
    assert statistics.difference(first, {9: 1.0}) is None


@pytest.mark.parametrize(
    ("gain", "said"),
    [(0.3, "it holds here"), (-0.3, "the opposite holds here"), (0.0, "no difference that these seeds could show")],
)
def test_the_finding_says_which_way_it_went(gain, said):
    text = dense.finding(dense_records(gain), list(dense.MAIN))
    assert f"{gain:.3f} ± 0.041 over 4 seeds: {said}" in text.replace("-0.000", "0.000")
    assert f"Over the first quarter of the steps it is {gain:.3f} ± 0.041" in text.replace("-0.000", "0.000")
    assert statistics.mean_score(dense_records(gain)[0], 0.5) == pytest.approx(0.25 - 0.015)
    assert "peaks at 1.000 in step 4" in text and "longer by 0.000 ± 0.000 tokens" in text
    assert ("at step 3, 75% of the way" in text) == (gain == 0.3) and ("does not get there" in text) == (gain < 0)


def test_shapings_ahead_are_named_in_the_order_of_the_arms():
    records = [record("value-attention 0.5", seed, [1.0 + 0.1 * seed]) for seed in range(4)]
    records += [record("abc 0.5", seed, [0.1 * seed + 0.01 * seed]) for seed in range(4)]
    records += [record("terminal", seed, [0.1 * seed]) for seed in range(4)]
    records += [record("uniform", seed, [0.1 * seed - 0.1]) for seed in range(4)]
    records += [record("abc-d 0.5", seed, [0.1 * seed]) for seed in range(4)]
    for each in records:
        each["task"] = dense.WIDE
    assert dense.in_order(records) == ["terminal", "uniform", "abc 0.5", "abc-d 0.5", "value-attention 0.5"]
    text = dense.finding(records, dense.in_order(records))
    assert "beyond their intervals: value-attention 0.5 (1.000 ± 0.000), of 4 shapings; 0.2 intervals" in text


def test_lengths_are_compared_between_tasks():
    records = dense_records(0.3) + dense_records(0.6, "reviews-96")
    *_, (title, text, _) = dense.report(records)
    assert title == "Dense rewards and the length of the responses"
    assert "| reviews-16 | 5.0 | 0.300 ± 0.041 | 0.000 ± 0.000 |" in text
    assert "| reviews-96 | 50.0 | 0.600 ± 0.041 |" in text
    assert "reviews-96 gains 0.300 ± 0.000 more than reviews-16: it holds here." in text


def test_methods_name_the_best_and_whom_it_beats():
    golds = {"rrhf": 0.5, "ppo abc": 0.45, "dpo on samples": 0.1}
    records = [
        record(arm, seed, [1.0], gold=gold + 0.1 * (seed - 1) * (arm == "ppo abc"))
        for arm, gold in golds.items()
        for seed in range(3)
    ]
    text = methods.finding(records, list(golds))
    assert text.startswith("Highest gold reward: rrhf. Paired by seed it is ahead of dpo on samples (0.400 ± 0.000)")
    assert "not told apart from ppo abc (0.050" in text


def test_every_arm_is_a_configuration_of_its_stage(tmp_path):
    for name, each in EXPERIMENTS.items():
        for where in each.tasks:
            arms = each.arms(experiment.Task(where, where))
            assert len({arm.name for arm in arms}) == len(arms) > 1, name
            for arm in arms:
                models = {"init": "a"} if arm.stage == "rm" else {"init": "a", "rm": "b"}
                experiment.configure(arm.stage, {**models, "out": str(tmp_path), **arm.changes})


def test_online_says_whether_gold_falls():
    records = []
    for arm, curve in (("offline", (0.2, 0.6, 0.1)), ("refreshed", (0.2, 0.5, 0.7))):
        for seed in range(3):
            each = record(arm, seed, [1.0], gold=curve[-1])
            each["series"]["eval/gold"] = [[step, value + 0.001 * seed] for step, value in zip((0, 10, 20), curve)]
            records.append(each)
    text = online.finding(records, ["offline", "refreshed"])
    assert "offline: gold peaks at 0.601 in step 10 and falls by 0.500 ± 0.000 by step 20." in text
    assert "refreshed: gold peaks at 0.701 in step 20 and does not fall by step 20." in text
    assert "At the end refreshing has 0.600 ± 0.000 of gold over offline." in text


def test_labels_carry_their_annotators_bias(tmp_path):
    plain, by_response = (
        [json.loads(line) for line in labels.write_labels("reviews", bias, 1, tmp_path).read_text().splitlines()]
        for bias in (labels.BIASES[0], labels.BIASES[2])
    )
    assert len(plain) == labels.RANKINGS
    offsets = {}
    for clean, biased in zip(plain, by_response):
        assert clean["responses"] == biased["responses"]
        for before, after, name in zip(clean["scores"], biased["scores"], biased["annotators"]):
            assert offsets.setdefault(name, after - before) == pytest.approx(after - before)
    assert len(offsets) == labels.ANNOTATORS and len({round(offset, 6) for offset in offsets.values()}) > 1
    assert all(len(set(row["annotators"])) == 1 for row in plain)


def test_what_is_done_is_not_run_again(tmp_path):
    options = argparse.Namespace(out=tmp_path, seeds=2, arms=["terminal", "abc 0.8"])
    assert len(command.jobs_of(EXPERIMENTS["dense"], ["reviews-16"], options)) == 4
    store.append("dense", record("terminal", 1, [1.0]), tmp_path)
    left = command.jobs_of(EXPERIMENTS["dense"], ["reviews-16"], options)
    assert [(arm.name, seed) for _, _, arm, seed in left] == [("terminal", 0), ("abc 0.8", 0), ("abc 0.8", 1)]


def test_a_run_is_measured_and_its_folder_goes(tmp_path, start, monkeypatch):
    monkeypatch.setattr(experiment, "EVAL_SAMPLES", 8)
    small = {"steps": 2, "batch_size": 8, "num_ppo_epochs": 1, "response_length": 6, "eval_every": 0}
    arm = experiment.Arm("abc", "ppo", {"reward_shaping": "abc", "eval_samples": 8, "num_samples": 0, **small})
    where = experiment.Task("reviews", "reviews")
    found = experiment.measured_run(arm, 3, where, (Path(start.policy), Path(start.reward_model)), tmp_path)
    assert (found["task"], found["arm"], found["seed"]) == ("reviews", "abc", 3)
    assert [step for step, _ in found["series"]["objective/scores"]] == [1, 2]
    assert [step for step, _ in found["series"]["eval/gold"]] == [0, 2]
    # An untrained model is close to a uniform choice among its tokens.
    assert 0 < found["final"]["kl"] < 1 and 100 < found["final"]["perplexity"] < 10_000
    assert "torch" in found["machine"] and found["phases"]["generate"] > 0 and found["peak_rss_mib"] > 100
    assert list(tmp_path.iterdir()) == [] and json.loads(json.dumps(found)) == found


def test_pages_are_in_step_with_the_results():
    text, figures = page.contents(EXPERIMENTS, store.FOLDER)
    assert (store.FOLDER / "README.md").read_text() == text, "python -m benchmarks.experiments report"
    drawn = {path.stem: path.read_text() for path in store.FOLDER.glob("*.svg")}
    assert drawn.keys() == figures.keys()
    for name in figures:  # matplotlib's versions differ in the last digits of a path; what is written does not
        assert re.findall(r"<!-- (.*?) -->", drawn[name]) == re.findall(r"<!-- (.*?) -->", figures[name])
    readme = page.README.read_text()
    assert page.summary(EXPERIMENTS, store.FOLDER) in readme


def test_a_page_of_fabricated_results(tmp_path):
    for each in dense_records(0.3):
        store.append("dense", each, tmp_path)
    readme = tmp_path / "top.md"
    readme.write_text(f"before\n{page.BEGIN}\nold\n{page.END}\nafter\n")
    page.write(EXPERIMENTS, tmp_path, readme)
    text = (tmp_path / "README.md").read_text()
    assert "Not run yet: `python -m benchmarks.experiments methods`" in text and "it holds here" in text
    assert all((tmp_path / name).stat().st_size < 60_000 for name in re.findall(r"\]\((.*?\.svg)\)", text))
    written = readme.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "12 runs, 4 seeds" in written
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    page.write(EXPERIMENTS, tmp_path, readme)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

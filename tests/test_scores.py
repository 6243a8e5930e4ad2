"""Score normalisation, clipping and the missing-EOS rules, in numbers."""

import math

import pytest
import torch

from rlhf.scores import ScoreNormalizer, missing_eos

ENDED = torch.tensor([True, False, True, False])
LENGTHS = torch.tensor([4, 10, 8, 10])


@pytest.mark.parametrize(
    ("rule", "penalty", "expected"),
    [
        ("subtract", 1.5, [1, 0.5, 3, -5.5]),
        ("replace", 1.0, [1, -1, 3, -1]),
        ("scale", 0.5, [1, 1, 3, -2]),
        ("mask", 1.0, [1, 2, 3, -4]),
        # Of ten tokens the last four cost a quarter of the penalty each, ended or not.
        ("soft-overlong", 2.0, [1, 0, 2, -6]),
    ],
)
def test_missing_eos(rule, penalty, expected):
    scores = torch.tensor([1.0, 2, 3, -4])
    got = missing_eos(rule, scores, ENDED, LENGTHS, penalty=penalty, response_length=10, buffer=4)
    assert got.tolist() == expected


def test_missing_eos_leaves_what_has_no_score():
    scores = torch.tensor([1.0, math.nan, 3, -4])
    for rule in ("subtract", "replace", "scale", "soft-overlong"):
        got = missing_eos(rule, scores, ENDED, LENGTHS, penalty=1.0, response_length=10, buffer=4)
        assert got.isnan().tolist() == [False, True, False, False]
    with pytest.raises(ValueError, match="rule must be one of subtract"):
        missing_eos("forget", scores, ENDED, LENGTHS, penalty=1.0, response_length=10, buffer=4)


def test_fitted():
    reference = torch.tensor([1.0, 2, 6])  # mean 3, population deviation √(14/3)
    affine, bias = ScoreNormalizer("affine"), ScoreNormalizer("bias-only")
    for each in (affine, bias):
        with pytest.raises(ValueError, match="must be fitted"):
            each.fixed(reference)
        each.fit(reference)
    scores, gain = affine.fixed(reference)
    assert scores.mean().item() == pytest.approx(0, abs=1e-6)
    assert scores.std(correction=0).item() == pytest.approx(1)
    assert gain == pytest.approx((3 / 14) ** 0.5)
    assert bias.fixed(reference)[0].tolist() == [-2, -1, 3]
    delta, gain = ScoreNormalizer("delta").fixed(torch.tensor([1.0, 5]), torch.tensor([3.0, 1]))
    assert delta.tolist() == [-2, 4] and gain == 1


def test_running_kinds_over_two_rollouts():
    first, second = torch.tensor([0.0, 2, 4, 6]), torch.tensor([10.0, 20])
    both = torch.cat([first, second])
    std, z, ref = (ScoreNormalizer(kind) for kind in ("running-std", "running-z", "ref-std"))
    for each in (std, z, ref):
        each.observe(first)
        each.observe(second)
    torch.testing.assert_close(std.running(second)[0], second / both.std())
    torch.testing.assert_close(z.running(second)[0], (second - both.mean()) / both.std())
    torch.testing.assert_close(ref.running(second)[0], second / first.std())


def test_clip_before_and_after():
    scores = torch.tensor([-20.0, 5, 30])
    after, before = ScoreNormalizer("running-std", 1.0), ScoreNormalizer("running-std", 10.0, clip_before=True)
    for each in (after, before):
        each.observe(scores)
    assert after.running(scores)[0].tolist() == pytest.approx([-20 / scores.std().item(), 5 / scores.std().item(), 1])
    clipped = torch.tensor([-10.0, 5, 10])
    torch.testing.assert_close(before.running(scores)[0], clipped / clipped.std())
    assert ScoreNormalizer(clip=2.0).running(scores)[0].tolist() == [-2, 2, 2]


def test_nothing_to_divide_by():
    for scores in (torch.tensor([3.0]), torch.tensor([3.0, 3, 3]), torch.tensor([math.nan])):
        normalizer = ScoreNormalizer("running-std")
        normalizer.observe(scores)
        torch.testing.assert_close(normalizer.running(scores)[0], scores, equal_nan=True)


def test_what_has_no_score_is_part_of_no_statistic():
    normalizer = ScoreNormalizer("running-z")
    normalizer.observe(torch.tensor([1.0, math.nan, 3, math.inf]))
    assert normalizer.mean == 2 and normalizer.std == pytest.approx(2**0.5)


def test_state():
    normalizer, resumed = ScoreNormalizer("running-std"), ScoreNormalizer("running-std")
    normalizer.observe(torch.tensor([1.0, 2, 3, 9]))
    resumed.load_state_dict(normalizer.state_dict())
    for each in (normalizer, resumed):
        each.observe(torch.tensor([5.0, 7]))
    assert normalizer.std == resumed.std
    with pytest.raises(ValueError, match="kind must be one of none"):
        ScoreNormalizer("median")

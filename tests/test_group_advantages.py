import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("group_advantages",)
KINDS = ("grpo", "rloo", "dr_grpo")


def formula(scores, groups, *, kind):
    advantages = torch.zeros_like(scores)
    for group in groups.unique():
        members = (groups == group).nonzero().flatten()
        for i in members:
            others = scores[members[members != i]]
            if len(others) == 0:
                continue
            if kind == "rloo":
                advantages[i] = scores[i] - others.mean()
            else:
                scale = scores[members].std() + 1e-4 if kind == "grpo" else 1
                advantages[i] = (scores[i] - scores[members].mean()) / scale
    return advantages


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    ("kind", "expected"),
    (
        ("rloo", [0, -1.333333, -1.333333, 2.666667]),
        ("grpo", [0, -0.707057, -0.707057, 1.414114]),
        ("dr_grpo", [0, -1, -1, 2]),
    ),
)
def test_known_values(backend_name, kind, expected, dtype):
    scores = torch.tensor([1, 0, 0, 3], dtype=dtype)
    close(rk.group_advantages(scores, torch.full((4,), 9), kind=kind), expected)
    # the same group spread among responses to other prompts, which are alone
    scattered = torch.tensor([5, 1, 0, 7, 0, 3], dtype=dtype)
    groups = torch.tensor([-3, 9, 9, 2**40, 9, 9])
    close(rk.group_advantages(scattered, groups, kind=kind), [0, *expected[:2], 0, *expected[2:]])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_matches_formula(backend_name, layout, dtype, kind):
    for count, prompts in ((0, 1), (1, 1), (16, 1), (33, 5), (40, 40)):
        given = {"scores": torch.randn(count, dtype=torch.float64), "groups": torch.randint(prompts, (count,))}
        compare(rk.group_advantages, formula, given, layout=layout, dtype=dtype, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("score", (0.0, 0.1, -3e4, 1e-20))
def test_equal_scores_have_no_advantage(backend_name, kind, score):
    for dtype in (torch.float32, torch.float64):
        scores = torch.full((7,), score, dtype=dtype)
        advantages = rk.group_advantages(scores, torch.zeros(7).long(), kind=kind)
        # rloo and dr_grpo keep the mean's rounding; grpo must not divide by it
        assert advantages.abs().max() <= (0 if kind == "grpo" else 4e-7 * abs(score))


@pytest.mark.parametrize("kind", KINDS)
def test_unscored_responses_are_left_out(backend_name, kind):
    scores = torch.tensor([1.0, math.nan, 0, 0, math.nan, 3, math.nan])
    groups = torch.tensor([0, 0, 0, 0, 1, 0, 1])
    expected = rk.group_advantages(torch.tensor([1.0, 0, 0, 3]), torch.zeros(4).long(), kind=kind).tolist()
    close(rk.group_advantages(scores, groups, kind=kind), [expected[0], 0, *expected[1:3], 0, expected[3], 0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float64, 1e-9), (torch.float32, 1e-5)), ids=str)
def test_more_responses_than_a_tile(backend_name, kind, dtype, tolerance):
    scores, groups = torch.randn(200, dtype=dtype), torch.randint(30, (200,))
    scores[::7] = math.nan
    advantages = rk.group_advantages(scores, groups, kind=kind)
    with rk.use_backend("torch"):
        close(advantages, rk.group_advantages(scores, groups, kind=kind), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_int32_groups(backend_name, kind):
    scores, groups = torch.randn(9), torch.randint(3, (9,))
    expected = rk.group_advantages(scores, groups, kind=kind)
    assert torch.equal(rk.group_advantages(scores, groups.int(), kind=kind), expected)


@oracle.property_test
@given(st.integers(1, 20), st.integers(1, 4), st.sampled_from(KINDS), st.integers(0, 2**16))
def test_order_and_other_prompts_make_no_difference(backend_name, count, prompts, kind, seed):
    torch.manual_seed(seed)
    scores, groups = torch.randn(count, dtype=torch.float64), torch.randint(prompts, (count,))
    expected = rk.group_advantages(scores, groups, kind=kind)
    order = torch.randperm(count)
    shuffled = rk.group_advantages(scores[order], groups[order] * 7 - 3, kind=kind)
    close(oracle.restore(shuffled, order, 0, 0), expected, rtol=1e-10, atol=1e-12)
    for group in groups.unique():
        alone = rk.group_advantages(scores[groups == group], groups[groups == group], kind=kind)
        close(alone, expected[groups == group], rtol=1e-10, atol=1e-12)

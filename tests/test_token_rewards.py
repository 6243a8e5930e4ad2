import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("token_rewards",)

# Attention of a reward model over a prompt of three tokens and a response of four.
ROW = [0.30, 0.10, 0.05, 0.05, 0.10, 0.15, 0.25]


def inputs(rows, columns, mask="random", attention=True, per_token=False):
    logprobs, ref_logprobs = -3 * torch.rand(2, rows, columns, dtype=torch.float64)
    given = {
        "scores": torch.randn((rows, columns) if per_token else rows, dtype=torch.float64),
        "logprobs": logprobs,
        "ref_logprobs": ref_logprobs,
        "attention": torch.rand(rows, columns, dtype=torch.float64) if attention else None,
        "mask": oracle.masks(rows, columns)[mask],
    }
    return {name: x for name, x in given.items() if x is not None}


def op(attention=None, **arguments):
    return rk.token_rewards(attention=attention, **arguments)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    ("beta", "expected"),
    (
        (0.0, [0, 0, 0, 2.5]),
        (0.8, [0.181818, 0.363636, 0.545455, 1.409091]),
        (1.0, [0.227273, 0.454545, 0.681818, 1.136364]),
    ),
)
def test_known_credit(backend_name, beta, expected, dtype):
    """The share of the prompt is dropped, the rest renormalised; the sum is the score."""
    mask = torch.tensor([[False] * 3 + [True] * 4])
    zeros = torch.zeros(1, 7, dtype=dtype)
    rewards, kl = rk.token_rewards(
        torch.tensor([2.5], dtype=dtype), zeros, zeros, torch.tensor([ROW], dtype=dtype), mask, kl_coef=0.1, beta=beta
    )
    close(rewards, [[0, 0, 0, *expected]])
    close(rewards.sum(), 2.5)
    close(kl, zeros)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    ("kind", "expected"),
    (
        ("k1", [0.2, -1, 3]),
        ("k2", [0.02, 0.5, 4.5]),
        ("k3", [0.018731, 0.718282, 2.049787]),
        ("abs", [0.2, 1, 3]),
        ("pos", [0.2, 0, 3]),
    ),
)
def test_known_kl(backend_name, kind, expected, dtype):
    logprobs = torch.tensor([[-1, -2, -0.5]], dtype=dtype)
    ref_logprobs = torch.tensor([[-1.2, -1, -3.5]], dtype=dtype)
    score, mask = torch.tensor([4.0], dtype=dtype), torch.ones(1, 3)
    rewards, kl = rk.token_rewards(score, logprobs, ref_logprobs, None, mask, kl_coef=0.5, beta=0.8, kl_estimator=kind)
    close(kl, [expected])
    close(rewards, [[-0.5 * expected[0], -0.5 * expected[1], 4 - 0.5 * expected[2]]])


def test_score_stands_on_the_last_true(backend_name):
    """The row "a b EOS pad pad" beside one that fills its five columns: index 2, not 3 and not 4."""
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 0]])
    zeros = torch.zeros(4, 5)
    rewards, _ = rk.token_rewards(torch.tensor([1.0, 2, 3, 4]), zeros, zeros, None, mask, kl_coef=0.1, beta=0.0)
    close(rewards, torch.tensor([[0.0, 0, 1, 0, 0], [0, 0, 0, 0, 2], [0, 0, 3, 0, 0], [0, 0, 0, 0, 0]]))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.ROW_SHAPES, ids=str)
def test_matches_formula(backend_name, shape, dtype):
    for mask in ("random", "none", "all"):
        for attention in (True, False):
            given = inputs(*shape, mask, attention)
            compare(op, oracle.token_rewards, given, dtype=dtype, kl_coef=0.1, beta=0.8)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_scores_of_single_tokens(backend_name, dtype):
    """Signed credit is paid as it stands, also where its sum is nothing; what is masked is not read."""
    scores = torch.tensor([[0.5, -2.0, 1.5, math.nan], [0.0, 3.0, math.nan, -1.0]], dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 1]])
    logprobs = torch.full((2, 4), -1.0, dtype=dtype)
    rewards, kl = rk.token_rewards(scores, logprobs, logprobs - 1, None, mask, kl_coef=0.25, beta=0.8)
    close(kl, mask.to(dtype))
    close(rewards, [[0.25, -2.25, 1.25, 0], [-0.25, 2.75, 0, -1.25]])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.ROW_SHAPES, ids=str)
def test_scores_of_single_tokens_match_the_formula(backend_name, shape, dtype):
    for mask in ("random", "none", "all"):
        given = inputs(*shape, mask, attention=False, per_token=True)
        compare(op, oracle.token_rewards, given, dtype=dtype, kl_coef=0.1, beta=0.8)


@pytest.mark.parametrize("per_token", (False, True))
@pytest.mark.parametrize("kind", oracle.KL)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_estimators_and_layouts(backend_name, kind, layout, per_token):
    given = inputs(5, 9, attention=not per_token, per_token=per_token)
    compare(op, oracle.token_rewards, given, layout=layout, kl_coef=0.3, beta=0.5, kl_estimator=kind)


def test_k3_is_clamped_at_20(backend_name):
    difference = torch.tensor([[30.0, -30, 20, -20]], dtype=torch.float64)
    zeros, mask = torch.zeros_like(difference), torch.ones(1, 4)
    score = torch.zeros(1, dtype=torch.float64)
    _, kl = rk.token_rewards(score, difference, zeros, None, mask, kl_coef=0.1, beta=0.0, kl_estimator="k3")
    close(kl, [[math.exp(-20) + 19, math.exp(20) - 21, math.exp(-20) + 19, math.exp(20) - 21]], rtol=1e-12)
    _, k1 = rk.token_rewards(score, difference, zeros, None, mask, kl_coef=0.1, beta=0.0)
    close(k1, difference)


@pytest.mark.parametrize("kind", oracle.KL)
def test_two_forbidden_tokens_have_no_kl(backend_name, kind):
    logprobs = torch.tensor([[-math.inf, -1.0]])
    rewards, kl = rk.token_rewards(
        torch.ones(1), logprobs, logprobs, None, torch.ones(1, 2), kl_coef=0.1, beta=0.0, kl_estimator=kind
    )
    assert kl.tolist() == [[0, 0]]
    assert rewards.tolist() == [[0, 1]]


@pytest.mark.parametrize("attention", ([0.0, 0, 0, 9], [1e-13, 0, 0, 9], [math.nan, 1, 1, 9], [math.inf, 1, 1, 9]))
def test_useless_attention_becomes_uniform(backend_name, attention):
    mask = torch.tensor([[True, True, True, False]])
    zeros = torch.zeros(1, 4)
    rewards, _ = rk.token_rewards(
        torch.tensor([3.0]), zeros, zeros, torch.tensor([attention]), mask, kl_coef=0.1, beta=0.5
    )
    close(rewards, [[0.5, 0.5, 2.0, 0]])


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("kind", oracle.KL)
def test_masked_places_are_never_read(backend_name, kind, garbage):
    given = inputs(5, 9)
    empty = ~given["mask"].any(-1)
    assert empty.any()
    poisoned = {name: oracle.poison(x, given["mask"], garbage) if x.ndim == 2 else x for name, x in given.items()}
    poisoned |= {"mask": given["mask"], "scores": given["scores"].masked_fill(empty, garbage)}
    scalars = {"kl_coef": 0.1, "beta": 0.8, "kl_estimator": kind}
    for a, b in zip(rk.token_rewards(**given, **scalars), rk.token_rewards(**poisoned, **scalars)):
        assert torch.equal(a, b)
        assert (b[~given["mask"]] == 0).all()


def test_mixed_dtypes_follow_logprobs(backend_name):
    given = inputs(3, 5)
    expected = oracle.token_rewards(**given, kl_coef=0.1, beta=0.8)
    for wide in given.keys() - {"mask"}:
        mixed = {name: x if name in (wide, "mask") else x.float() for name, x in given.items()}
        for actual, wanted in zip(rk.token_rewards(**mixed, kl_coef=0.1, beta=0.8), expected):
            assert actual.dtype == (torch.float64 if wide == "logprobs" else torch.float32)
            close(actual, wanted)


@oracle.property_test
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16))
def test_batch_makes_no_difference(backend_name, rows, columns, left, right, seed):
    torch.manual_seed(seed)
    given, scalars = inputs(rows, columns), {"kl_coef": 0.1, "beta": 0.7, "kl_estimator": "k3"}
    order = torch.randperm(rows)
    moved = rk.token_rewards(**{name: oracle.rearrange(x, order, left, right) for name, x in given.items()}, **scalars)
    alone = [rk.token_rewards(**{name: x[b : b + 1] for name, x in given.items()}, **scalars) for b in range(rows)]
    for i, expected in enumerate(rk.token_rewards(**given, **scalars)):
        close(oracle.restore(moved[i], order, left, right), expected, rtol=1e-12)
        close(torch.cat([x[i] for x in alone]), expected, rtol=1e-12)

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare
from test_token_rewards import inputs as reward_inputs

OPS = ("rollout_advantages",)

SCALARS = {"kl_coef": 0.1, "beta": 0.7, "gamma": 0.99, "lam": 0.9}


def inputs(rows, columns, mask="random", attention=True, per_token=False):
    given = reward_inputs(rows, columns, mask, attention, per_token)
    return {**given, "values": torch.randn(rows, columns, dtype=torch.float64)}


def op(attention=None, **arguments):
    return rk.rollout_advantages(attention=attention, **arguments)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_values(backend_name, dtype):
    """One response of four tokens with a terminal score and no KL: the first golden vector of gae, then whitened."""
    logprobs = torch.tensor([[-1.0, -1, -1, -1, math.nan]], dtype=dtype)
    ref_logprobs = torch.tensor([[-1.0, -1, -1, -1, math.nan]], dtype=dtype)
    values = torch.tensor([[0.5, 0.4, 0.3, 0.2, 9]], dtype=dtype)
    mask = torch.tensor([[1, 1, 1, 1, 0]])
    # δ = [−.1, −.1, −.1, .8], γλ = .95: A_3 = .8, A_2 = .66, A_1 = .527, A_0 = .40065
    raw = [0.40065, 0.527, 0.66, 0.8]
    mean = sum(raw) / 4
    std = math.sqrt(sum((a - mean) ** 2 for a in raw) / 4)
    score = torch.ones(1, dtype=dtype)
    for whiten, wanted in ((False, raw), (True, [(a - mean) / std for a in raw])):
        advantages, returns, rewards, kl = rk.rollout_advantages(
            score, logprobs, ref_logprobs, None, values, mask, kl_coef=0.1, beta=0.0, whiten=whiten
        )
        close(advantages, [[*wanted, 0]])
        close(returns, [[0.90065, 0.927, 0.96, 1.0, 0]])  # never whitened
        close(rewards, [[0, 0, 0, 1, 0]])
        close(kl, [[0, 0, 0, 0, 0]])


@pytest.mark.parametrize("whiten", (True, False))
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.ROW_SHAPES, ids=str)
def test_matches_formula(backend_name, shape, dtype, whiten):
    for mask in ("random", "none", "all"):
        for attention in (True, False):
            given = inputs(*shape, mask, attention)
            # A single place has no deviation to divide by: rounding there is checked below.
            if not whiten or given["mask"].sum() != 1:
                compare(op, oracle.rollout_advantages, given, dtype=dtype, whiten=whiten, **SCALARS)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((3, 0), (5, 9)), ids=str)
def test_scores_of_single_tokens(backend_name, shape, dtype):
    given = inputs(*shape, attention=False, per_token=True)
    compare(op, oracle.rollout_advantages, given, dtype=dtype, **SCALARS)


@pytest.mark.parametrize("kind", oracle.KL)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_estimators_and_layouts(backend_name, kind, layout):
    given = inputs(5, 9)
    compare(op, oracle.rollout_advantages, given, layout=layout, **SCALARS, kl_estimator=kind)


def test_is_its_parts(backend_name):
    given = inputs(5, 9)
    mask, values = given["mask"], given["values"]
    with rk.use_backend("torch"):
        rewards, kl = rk.token_rewards(
            **{name: x for name, x in given.items() if name != "values"}, kl_coef=0.1, beta=0.7
        )
        advantages, returns = rk.gae(rewards, values, mask, gamma=0.99, lam=0.9)
        parts = rk.masked_whiten(advantages, mask), returns, rewards, kl
    for whole, part in zip(rk.rollout_advantages(**given, **SCALARS), parts):
        close(whole, part, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("valid", (0, 1))
def test_whitening_of_nothing_and_of_one_place(backend_name, valid):
    given = inputs(3, 5, "none")
    given["mask"][1, :valid] = True
    advantages, returns, _, _ = rk.rollout_advantages(**given, **SCALARS)
    assert (advantages == 0).all()
    assert returns.isfinite().all()


def test_whitening_of_equal_advantages(backend_name):
    """Each response has one token and the same reward: variance 0 gives 0, not 0/0."""
    given = {name: torch.zeros(4, 1) for name in ("logprobs", "ref_logprobs", "values")}
    advantages, *_ = op(**given, scores=torch.full((4,), 0.1), mask=torch.ones(4, 1), kl_coef=0.1, beta=0.0)
    close(advantages, torch.zeros(4, 1), atol=1e-3)  # rounding of the mean over a deviation of at least 1e-4


def test_whitening_far_from_zero(backend_name):
    """E[x²] − E[x]² would cancel in fp32: a spread of 1 around 3000."""
    scores = (3000 + torch.randn(64)).round(decimals=1)
    zeros, mask = torch.zeros(64, 1), torch.ones(64, 1)
    advantages, *_ = rk.rollout_advantages(scores, zeros, zeros, None, zeros, mask, kl_coef=0.1, beta=0.0)
    exact = scores.double()
    close(advantages[:, 0], (exact - exact.mean()) / exact.std(correction=0), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("garbage", (math.nan, math.inf))
def test_masked_places_are_never_read(backend_name, garbage):
    given = inputs(5, 9)
    poisoned = {name: oracle.poison(x, given["mask"], garbage) if x.ndim == 2 else x for name, x in given.items()}
    poisoned["mask"] = given["mask"]
    for a, b in zip(rk.rollout_advantages(**given, **SCALARS), rk.rollout_advantages(**poisoned, **SCALARS)):
        assert torch.equal(a, b)
        assert (b[~given["mask"]] == 0).all()


def test_mixed_dtypes_follow_logprobs(backend_name):
    given = inputs(4, 5)
    expected = rk.rollout_advantages(**given, **SCALARS)
    for wide in given.keys() - {"mask"}:
        mixed = {name: x if name in (wide, "mask") else x.float() for name, x in given.items()}
        for actual, wanted in zip(rk.rollout_advantages(**mixed, **SCALARS), expected):
            assert actual.dtype == (torch.float64 if wide == "logprobs" else torch.float32)
            close(actual, wanted, rtol=1e-4, atol=1e-5)


@oracle.property_test
@given(st.integers(2, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16), st.booleans())
def test_batch_makes_no_difference(backend_name, rows, columns, left, right, seed, whiten):
    torch.manual_seed(seed)
    given, scalars = inputs(rows, columns), {**SCALARS, "whiten": whiten}
    order = torch.randperm(rows)
    moved = rk.rollout_advantages(
        **{name: oracle.rearrange(x, order, left, right) for name, x in given.items()}, **scalars
    )
    expected = rk.rollout_advantages(**given, **scalars)
    for i, wanted in enumerate(expected):
        close(oracle.restore(moved[i], order, left, right), wanted, rtol=1e-9, atol=1e-9)
    if not whiten:  # whitening is over the batch, the rest row by row
        alone = [
            rk.rollout_advantages(**{name: x[b : b + 1] for name, x in given.items()}, **scalars) for b in range(rows)
        ]
        for i, wanted in enumerate(expected):
            close(torch.cat([x[i] for x in alone]), wanted, rtol=1e-12)

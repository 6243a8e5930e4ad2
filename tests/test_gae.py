import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("gae",)

REWARDS = [[0.1, -0.2, 0, 1, 0, 0]]
VALUES = [[0.5, 0.4, 0.3, 0.2, 9, 9]]
MASK = torch.tensor([[True, True, True, True, False, False]])


def inputs(rows, columns, mask="random"):
    rewards, values = torch.randn(2, rows, columns, dtype=torch.float64)
    return {"rewards": rewards, "values": values, "mask": oracle.masks(rows, columns)[mask]}


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    (
        (1.0, 0.95, [0.31065, 0.327, 0.66, 0.8]),
        (1.0, 1.0, [0.4, 0.4, 0.7, 0.8]),
        (0.0, 0.95, [-0.4, -0.6, -0.3, 0.8]),
        (0.9, 0.8, [-0.04121, -0.00168, 0.456, 0.8]),
    ),
)
def test_known_values(backend_name, gamma, lam, expected, dtype):
    rewards, values = torch.tensor(REWARDS, dtype=dtype), torch.tensor(VALUES, dtype=dtype)
    advantages, returns = rk.gae(rewards, values, MASK, gamma=gamma, lam=lam)
    close(advantages, [[*expected, 0, 0]], atol=5e-6)  # written to five places
    close(returns, [[*(a + v for a, v in zip(expected, VALUES[0])), 0, 0]], atol=5e-6)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_interior_hole_is_stepped_over(backend_name, dtype):
    rewards = torch.tensor([[0, 0, 0, 0, 0, 1]], dtype=dtype)
    values = torch.tensor([[0.5, 0.4, 7, 7, 0.3, 0.2]], dtype=dtype)
    mask = torch.tensor([[1, 1, 0, 0, 1, 1]])
    advantages, returns = rk.gae(rewards, values, mask)
    close(advantages, [[0.40065, 0.527, 0, 0, 0.66, 0.8]])
    close(returns, [[0.90065, 0.927, 0, 0, 0.96, 1]])


def test_gamma_0_sees_one_token_ahead_of_nothing(backend_name):
    """With a terminal score only, horizon one leaves every earlier token its KL penalty alone."""
    kl, values = torch.rand(1, 5), torch.rand(1, 5)
    rewards = -0.1 * kl
    rewards[0, 4] += 3
    advantages = [rk.gae(rewards, values, torch.ones(1, 5), gamma=0.0, lam=lam)[0] for lam in (0.0, 0.95, 1.0)]
    close(advantages[0][0, :4], (-0.1 * kl - values)[0, :4])
    assert torch.equal(advantages[0], advantages[1])
    assert torch.equal(advantages[0], advantages[2])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", (*oracle.ROW_SHAPES, (2, 257)), ids=str)
def test_matches_formula(backend_name, shape, dtype):
    for mask in ("random", "none", "all"):
        compare(rk.gae, oracle.gae, inputs(*shape, mask), dtype=dtype, gamma=0.99, lam=0.9)
        compare(rk.gae, oracle.gae, inputs(*shape, mask), dtype=dtype, gamma=1.0, lam=1.0)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(backend_name, layout):
    compare(rk.gae, oracle.gae, inputs(5, 9), layout=layout)


def test_expanded_inputs(backend_name):
    row = torch.randn(9, dtype=torch.float64)
    given = {"rewards": row.expand(3, 9), "values": row[:1].expand(3, 9), "mask": torch.tensor(1).expand(3, 9)}
    wanted = oracle.gae(given["rewards"], given["values"], given["mask"].bool())
    for actual, expected in zip(rk.gae(**given), wanted):
        close(actual, expected, rtol=1e-12)


def test_mixed_dtypes_follow_rewards(backend_name):
    given = inputs(3, 5)
    rewards, values, mask = given.values()
    expected = oracle.gae(**given)
    for r, v, dtype in ((rewards.float(), values, torch.float32), (rewards, values.float(), torch.float64)):
        for actual, wanted in zip(rk.gae(r, v, mask), expected):
            assert actual.dtype == dtype
            close(actual, wanted)


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_masked_places_are_never_read(backend_name, garbage):
    rewards, values, mask = inputs(5, 9).values()
    clean = rk.gae(rewards, values, mask)
    poisoned = rk.gae(oracle.poison(rewards, mask, garbage), oracle.poison(values, mask, garbage), mask)
    for a, b in zip(clean, poisoned):
        assert torch.equal(a, b)
        assert (b[~mask] == 0).all()


@oracle.property_test
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16))
def test_batch_makes_no_difference(backend_name, rows, columns, left, right, seed):
    torch.manual_seed(seed)
    given = inputs(rows, columns)
    order = torch.randperm(rows)
    moved = rk.gae(**{name: oracle.rearrange(x, order, left, right) for name, x in given.items()})
    alone = [rk.gae(**{name: x[b : b + 1] for name, x in given.items()}) for b in range(rows)]
    for i, expected in enumerate(rk.gae(**given)):
        close(oracle.restore(moved[i], order, left, right), expected, rtol=1e-12)
        close(torch.cat([x[i] for x in alone]), expected, rtol=1e-12)

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("ppo_loss",)


def inputs(*shape, mask="random"):
    """Ratios from about 0.5 to 2 and values around theirs, so that every clip acts somewhere."""
    old_logprobs, noise, advantages, old_values, change, returns = torch.randn(6, *shape, dtype=torch.float64)
    return {
        "logprobs": old_logprobs + 0.3 * noise,
        "old_logprobs": old_logprobs,
        "advantages": advantages,
        "values": old_values + 0.3 * change,
        "old_values": old_values,
        "returns": returns,
        "mask": oracle.masks(*shape)[mask],
    }


def one_token(logratio, advantage, dtype=torch.float64, **scalars):
    """Policy loss and its derivative for one token, the value on its return."""
    logprobs = torch.tensor([logratio], dtype=dtype, requires_grad=True)
    zero = torch.zeros(1, dtype=dtype)
    advantages = torch.tensor([advantage], dtype=dtype)
    loss, stats = rk.ppo_loss(logprobs, zero, advantages, zero, zero, zero, torch.ones(1), **scalars)
    loss.backward()
    return loss.item(), logprobs.grad.item(), stats


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    ("advantage", "ratio", "dual_clip", "loss", "gradient"),
    (
        (1.0, 0.5, None, -0.5, -0.5),
        (1.0, 1.0, None, -1.0, -1.0),
        (1.0, 1.5, None, -1.2, 0.0),
        (1.0, 4.0, None, -1.2, 0.0),
        (-1.0, 0.5, None, 0.8, 0.0),
        (-1.0, 1.0, None, 1.0, 1.0),
        (-1.0, 1.5, None, 1.5, 1.5),
        (-1.0, 4.0, None, 4.0, 4.0),
        (-1.0, 4.0, 3.0, 3.0, 0.0),
        (-1.0, 2.5, 3.0, 2.5, 2.5),
        (1.0, 4.0, 3.0, -1.2, 0.0),
    ),
)
def test_known_policy_loss(backend_name, advantage, ratio, dual_clip, loss, gradient, dtype):
    got = one_token(math.log(ratio), advantage, dtype, dual_clip=dual_clip)
    assert got[:2] == pytest.approx((loss, gradient), rel=1e-5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize("advantage", (1.0, -1.0))
@pytest.mark.parametrize("ratio", (0.8, 1.2))
def test_boundary_keeps_the_gradient(backend_name, ratio, advantage, dtype):
    """The clip range is set to the ratio as the op itself computes it, so the ratio is on the boundary to the bit."""
    exact = one_token(math.log(ratio), advantage, dtype)[2].ratio_max.item()
    assert exact == pytest.approx(ratio, rel=1e-6)
    loss, gradient, stats = one_token(math.log(ratio), advantage, dtype, cliprange=abs(exact - 1))
    assert loss == gradient == -advantage * exact
    assert stats.clipfrac_high == stats.clipfrac_low == 0
    assert one_token(0.0, advantage, dtype, cliprange=0.0)[:2] == (-advantage, -advantage)


@pytest.mark.parametrize(
    ("logratio", "advantage", "loss", "gradient"),
    (
        (200.0, 1.0, -1.2, 0.0),
        (200.0, -1.0, math.exp(20), 0.0),
        (-200.0, 1.0, -math.exp(-20), 0.0),
        (-200.0, -1.0, 0.8, 0.0),
        (20.0, -1.0, math.exp(20), math.exp(20)),
        (-20.0, 1.0, -math.exp(-20), -math.exp(-20)),
        (math.inf, 1.0, -1.2, 0.0),
        (-math.inf, -1.0, 0.8, 0.0),
    ),
)
def test_log_ratio_is_clamped_at_20(backend_name, logratio, advantage, loss, gradient):
    for dtype in (torch.float64, torch.float32):
        assert one_token(logratio, advantage, dtype)[:2] == pytest.approx((loss, gradient), rel=1e-5)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    ("value", "target", "cliprange_value", "loss", "gradient"),
    (
        (1.0, 2.0, 0.2, 0.845, 0.0),  # moved 0.5 towards the target; the clipped 0.7 is further off and wins
        (1.0, 0.0, 0.2, 0.5, 1.0),  # moved away from the target: full error, full gradient
        (0.6, 2.0, 0.2, 0.98, -1.4),  # inside the range
        (1.0, 2.0, None, 0.5, -1.0),
        (0.5, 2.0, 0.0, 1.125, -1.5),  # on the boundary of an empty range
    ),
)
def test_known_value_loss(backend_name, value, target, cliprange_value, loss, gradient, dtype):
    values = torch.tensor([value], dtype=dtype, requires_grad=True)
    zero, old = torch.zeros(1, dtype=dtype), torch.tensor([0.5], dtype=dtype)
    total, stats = rk.ppo_loss(
        zero,
        zero,
        zero,
        values,
        old,
        torch.tensor([target], dtype=dtype),
        torch.ones(1),
        cliprange_value=cliprange_value,
        vf_coef=0.1,
    )
    total.backward()
    assert stats.value_loss.item() == pytest.approx(loss, rel=1e-5)
    assert total.item() == pytest.approx(0.1 * loss, rel=1e-5)
    assert values.grad.item() == pytest.approx(0.1 * gradient, rel=1e-5)


def test_known_stats(backend_name):
    ratio = torch.tensor([2.0, 0.5, 2.0, 0.5, 1.0, math.nan])
    advantages = torch.tensor([1.0, -1, -1, 1, 1, math.nan])
    values = torch.tensor([1.0, 1, 0, 0, 0, math.nan])
    returns = torch.tensor([2.0, 0, 0, 0, 1, math.nan])
    old_values = torch.tensor([0.5, 0.5, 0, 0, 0, math.nan])
    mask = torch.tensor([1, 1, 1, 1, 1, 0])
    loss, stats = rk.ppo_loss(ratio.log(), torch.zeros(6), advantages, values, old_values, returns, mask)
    close(stats.policy_loss, (-1.2 + 0.8 + 2 - 0.5 - 1) / 5)
    close(stats.value_loss, (1.69 + 1 + 0 + 0 + 1) / 2 / 5)
    close(loss, 0.1 / 5 + 0.1 * 0.369)
    close(stats.approx_kl, 4 * math.log(2) ** 2 / 2 / 5)
    assert stats.clipfrac_high.item() == pytest.approx(0.2)  # the first: A > 0 and held at 1.2
    assert stats.clipfrac_low.item() == pytest.approx(0.2)  # the second: A < 0 and held at 0.8
    assert stats.clipfrac_value.item() == pytest.approx(0.2)  # the first
    close(stats.ratio_mean, 6 / 5)
    close(stats.ratio_max, 2.0)
    # returns − values = [1, −1, 0, 0, 1], mean .2: var .56; returns: mean .6, var .64
    close(stats.explained_variance, 1 - 0.56 / 0.64)
    assert stats.tokens == 5


def test_first_step_has_ratio_one(backend_name):
    """Before any update nothing is clipped and the gradient is the policy gradient, −A / n."""
    given = inputs(4, 9) | {"logprobs": (old := inputs(4, 9)["old_logprobs"]), "old_logprobs": old}
    given = {name: x.float() if name != "mask" else x for name, x in given.items()}
    logprobs = given["logprobs"].clone().requires_grad_()
    loss, stats = rk.ppo_loss(**given | {"logprobs": logprobs})
    loss.backward()
    assert stats.ratio_mean == stats.ratio_max == 1
    assert stats.clipfrac_high == stats.clipfrac_low == stats.approx_kl == 0
    close(logprobs.grad, torch.where(given["mask"], -given["advantages"], 0) / given["mask"].sum())


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", (*oracle.ROW_SHAPES, (70,), (2, 3, 4)), ids=str)
def test_matches_formula(backend_name, shape, dtype):
    for mask in ("random", "none", "all"):
        given = inputs(*shape, mask=mask)
        compare(rk.ppo_loss, oracle.ppo_loss, given, wrt=("logprobs", "values"), dtype=dtype)


@pytest.mark.parametrize(
    "scalars",
    (
        {"cliprange": 0.1, "cliprange_high": 0.28},
        {"cliprange_value": None, "vf_coef": 0.5},
        {"dual_clip": 1.3, "normalizer": 37.0},
        {"cliprange_value": 0.05, "normalizer": torch.tensor(12)},
    ),
    ids=str,
)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_scalars_and_layouts(backend_name, layout, scalars):
    compare(rk.ppo_loss, oracle.ppo_loss, inputs(5, 9), wrt=("logprobs", "values"), layout=layout, **scalars)


def test_expanded_inputs(backend_name):
    given = {name: x[:1, :1].expand(3, 5) for name, x in inputs(1, 1, mask="all").items()}
    compare(rk.ppo_loss, oracle.ppo_loss, given, wrt=("logprobs", "values"))


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_masked_places_are_never_read(backend_name, garbage):
    clean = inputs(5, 9)
    poisoned = {name: oracle.poison(x, clean["mask"], garbage) for name, x in clean.items()} | {"mask": clean["mask"]}
    results = [oracle.evaluate(rk.ppo_loss, given, ("logprobs", "values"), {}) for given in (clean, poisoned)]
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1]):
        assert torch.equal(a, b)
    for gradient in results[1][1]:
        assert (gradient[~clean["mask"]] == 0).all()


def test_all_masked_is_zero_and_in_the_graph(backend_name):
    given = {name: torch.full((2, 3), math.nan) for name in inputs(1)} | {"mask": torch.zeros(2, 3)}
    given["logprobs"].requires_grad_()
    given["values"].requires_grad_()
    loss, stats = rk.ppo_loss(**given)
    assert loss == 0
    assert all(x == 0 for x in stats)
    loss.backward()
    assert (given["logprobs"].grad == 0).all()
    assert (given["values"].grad == 0).all()


def test_two_forbidden_tokens_are_taken_out(backend_name):
    given = inputs(4, 6)
    without = given["mask"].clone()
    without[1, 2] = False
    forbidden = {name: given[name].clone() for name in ("logprobs", "old_logprobs")}
    for x in forbidden.values():
        x[1, 2] = -math.inf
    wrt = ("logprobs", "values")
    expected = oracle.evaluate(rk.ppo_loss, given | {"mask": without}, wrt, {})
    actual = oracle.evaluate(rk.ppo_loss, given | forbidden, wrt, {})
    for a, b in zip(actual[0] + actual[1], expected[0] + expected[1]):
        close(a, b, rtol=1e-12)


def test_constant_returns_have_no_explained_variance(backend_name):
    given = inputs(4, 6) | {"returns": torch.full((4, 6), 0.25, dtype=torch.float64)}
    assert rk.ppo_loss(**given)[1].explained_variance == 0


def test_explained_variance_far_from_zero(backend_name):
    """E[x²] − E[x]² would cancel in fp32: a spread of 1 around 3000."""
    given = inputs(8, 32, mask="all")
    given |= {"returns": given["returns"] + 3000, "values": given["returns"] + 3000 + 0.5 * given["advantages"]}
    rounded = {name: x.float() if name != "mask" else x for name, x in given.items()}
    exact = {name: x.double() if name != "mask" else x for name, x in rounded.items()}
    expected = oracle.ppo_loss(**exact)[1][8]
    close(rk.ppo_loss(**rounded)[1].explained_variance, expected, atol=1e-3)
    assert 0.5 < expected < 0.95


def test_mixed_dtypes_follow_logprobs(backend_name):
    given = inputs(4, 6)
    expected = oracle.evaluate(oracle.ppo_loss, given, ("logprobs", "values"), {}, [0])
    for wide in given.keys() - {"mask"}:
        mixed = {name: x if name in (wide, "mask") else x.float() for name, x in given.items()}
        values, gradients, _ = oracle.evaluate(rk.ppo_loss, mixed, ("logprobs", "values"), {})
        for actual, wanted in zip(values, expected[0]):
            assert actual.dtype == (torch.float64 if wide == "logprobs" else torch.float32)
            close(actual, wanted)
        for name, actual, wanted in zip(("logprobs", "values"), gradients, expected[1]):
            assert actual.dtype == (torch.float64 if wide == name else torch.float32)
            close(actual, wanted)


def test_gradcheck(backend_name):
    given = inputs(3, 4)

    def op(logprobs, values):
        return rk.ppo_loss(**given | {"logprobs": logprobs, "values": values}, dual_clip=1.5)[0]

    assert torch.autograd.gradcheck(op, (given["logprobs"].requires_grad_(), given["values"].requires_grad_()))


@oracle.property_test
@given(st.integers(2, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16))
def test_batch_makes_no_difference(backend_name, rows, columns, left, right, seed):
    """Padding and permuting change nothing; with the normalizer given, parts add up to the whole."""
    torch.manual_seed(seed)
    given, wrt = inputs(rows, columns), ("logprobs", "values")
    total = {"normalizer": given["mask"].sum().clamp(min=1)}
    expected = oracle.evaluate(rk.ppo_loss, given, wrt, {})
    order = torch.randperm(rows)
    moved = {name: oracle.rearrange(x, order, left, right) for name, x in given.items()}
    values, gradients, _ = oracle.evaluate(rk.ppo_loss, moved, wrt, {})
    for a, b in zip(values, expected[0]):
        close(a, b, rtol=1e-9, atol=1e-9)
    for a, b in zip(gradients, expected[1]):
        close(oracle.restore(a, order, left, right), b, rtol=1e-12)
    halves = [{name: x[part] for name, x in given.items()} for part in (slice(0, 1), slice(1, None))]
    parts = [oracle.evaluate(rk.ppo_loss, half, wrt, total) for half in halves]
    close(parts[0][0][0] + parts[1][0][0], expected[0][0], rtol=1e-9, atol=1e-9)
    for a, b, whole in zip(parts[0][1], parts[1][1], expected[1]):
        close(torch.cat([a, b]), whole, rtol=1e-12)

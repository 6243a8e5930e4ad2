import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("rrhf_loss",)


def formula(logprobs, scores, prompts, mask, *, rank_coef=1.0, sft_coef=1.0, length_power=1.0):
    """(loss, stats in the order of RRHFStats), pair by pair."""
    rank = sft = logprobs.sum() * 0
    right = pairs = 0
    names = [x for x in prompts.unique() if (mask.any(-1) & ~scores.isnan() & (prompts == x)).any()]
    for prompt in names:
        members = [int(i) for i in (mask.any(-1) & ~scores.isnan() & (prompts == prompt)).nonzero()]
        total = {i: logprobs[i, mask[i]].sum() for i in members}
        p = {i: total[i] / int(mask[i].sum()) ** length_power for i in members}
        for i in members:
            for j in members:
                if scores[i] < scores[j]:
                    rank = rank + torch.relu(p[i] - p[j])
                    right, pairs = right + bool(p[i] < p[j]), pairs + 1
        sft = sft - total[max(members, key=lambda i: scores[i])]  # max takes the first of equals
    count = max(len(names), 1)
    rank, sft = rank / count, sft / count
    stats = (rank.detach(), sft.detach(), rank.new_tensor(right / max(pairs, 1)), rank.new_tensor(len(names)))
    return rank_coef * rank + sft_coef * sft, stats


def inputs(responses, columns, prompts, mask="random"):
    return {
        "logprobs": -3 * torch.rand(responses, columns, dtype=torch.float64),
        "scores": torch.randint(4, (responses,)).double(),  # with ties
        "prompts": torch.randint(prompts, (responses,)),
        "mask": oracle.masks(responses, columns)[mask],
    }


LISTS = ([-1.0, -2, -3], [-0.5, -0.5], [-2.0, -1, -1, -0.4], [-3.0])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
@pytest.mark.parametrize(
    ("length_power", "rank", "dp"), ((1.0, 2.8, [-1, 0, 2, -1]), (0.0, 1.6, [-1, 0, 1, 0])), ids=("mean", "sum")
)
def test_known_values(backend_name, length_power, rank, dp, dtype):
    mask = torch.tensor([[t < len(x) for t in range(4)] for x in LISTS])
    logprobs = torch.full((4, 4), math.nan, dtype=dtype)
    logprobs[mask] = torch.tensor([x for row in LISTS for x in row], dtype=dtype)
    logprobs.requires_grad_()
    scores, prompts = torch.tensor([0.2, 0.9, -0.1, 0.2]), torch.zeros(4).long()
    loss, stats = rk.rrhf_loss(logprobs, scores, prompts, mask, length_power=length_power)
    close(stats.rank_loss, rank)
    close(stats.sft_loss, 1.0)  # the token sum of the second, whatever the length power
    close(loss.detach(), rank + 1.0)
    assert stats.prompts == 1
    for rank_coef, sft_coef in ((1.0, 0.0), (0.0, 1.0), (10.0, 0.5)):
        loss, _ = rk.rrhf_loss(
            logprobs, scores, prompts, mask, rank_coef=rank_coef, sft_coef=sft_coef, length_power=length_power
        )
        (gradient,) = torch.autograd.grad(loss, logprobs)
        expected = [
            [mask[i, t] * (rank_coef * dp[i] / len(x) ** length_power - sft_coef * (i == 1)) for t in range(4)]
            for i, x in enumerate(LISTS)
        ]
        close(gradient, expected)


def test_accuracy_and_equal_scores(backend_name):
    logprobs, mask = torch.tensor([[-1.0], [-2], [-3], [-4]]), torch.ones(4, 1)
    prompts = torch.tensor([0, 0, 0, 1])
    _, stats = rk.rrhf_loss(logprobs, torch.tensor([2.0, 1, 3, 5]), prompts, mask)
    close(stats.accuracy, 1 / 3)  # of three pairs the policy has only (first, second) right
    assert stats.prompts == 2
    _, stats = rk.rrhf_loss(logprobs, torch.ones(4), prompts, mask)
    assert stats.rank_loss == stats.accuracy == 0
    close(stats.sft_loss, (1 + 4) / 2)  # the first of equals


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((0, 4, 1), (1, 1, 1), (3, 0, 2), (6, 5, 1), (12, 9, 4)), ids=str)
def test_matches_formula(backend_name, shape, dtype):
    for mask in ("random", "none", "all"):
        compare(rk.rrhf_loss, formula, inputs(*shape, mask), wrt=("logprobs",), dtype=dtype)


@pytest.mark.parametrize("scalars", ({"rank_coef": 100.0}, {"sft_coef": 0.0}, {"length_power": 0.5}), ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_scalars_and_layouts(backend_name, layout, scalars):
    compare(rk.rrhf_loss, formula, inputs(8, 5, 2), wrt=("logprobs",), layout=layout, **scalars)


def test_what_takes_a_response_out(backend_name):
    """A NaN score or an empty mask, even where that response would be the best of its prompt."""
    given = inputs(6, 5, 1, "all")
    given["scores"] = torch.tensor([1.0, math.nan, 9, 3, 2, math.inf], dtype=torch.float64)
    given["mask"][2] = False
    values, (gradient,), _ = oracle.evaluate(rk.rrhf_loss, given, ("logprobs",), {})
    kept = torch.tensor([0, 3, 4, 5])
    expected, (expected_gradient,), _ = oracle.evaluate(
        formula, {name: x[kept] for name, x in given.items()}, ("logprobs",), {}
    )
    for a, b in zip([*values, gradient[kept]], [*expected, expected_gradient]):
        close(a, b, rtol=1e-12)
    assert (gradient[1:3] == 0).all()


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_masked_places_are_never_read(backend_name, garbage):
    clean = inputs(8, 5, 2)
    poisoned = clean | {"logprobs": oracle.poison(clean["logprobs"], clean["mask"], garbage)}
    results = [oracle.evaluate(rk.rrhf_loss, given, ("logprobs",), {}) for given in (clean, poisoned)]
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1]):
        assert torch.equal(a, b)


def test_all_masked_is_zero_and_in_the_graph(backend_name):
    given = inputs(4, 3, 2, "none")
    given["logprobs"].fill_(math.nan).requires_grad_()
    loss, stats = rk.rrhf_loss(**given)
    assert loss == 0
    assert all(x == 0 for x in stats)
    loss.backward()
    assert (given["logprobs"].grad == 0).all()


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("responses", (3, 80))
def test_scores_are_compared_as_given(backend_name, responses, dtype):
    """fp64 scores that the log-probabilities' own dtype would round to ties or to infinities."""
    given = inputs(responses, 5, 2, "all")
    given["logprobs"] = given["logprobs"].to(dtype)
    ranks = torch.randperm(responses).double()
    expected, (expected_gradient,), _ = oracle.evaluate(rk.rrhf_loss, given | {"scores": ranks}, ("logprobs",), {})
    for scores in (1 + ranks * 1e-12, (1 + ranks) * 1e300):
        values, (gradient,), _ = oracle.evaluate(rk.rrhf_loss, given | {"scores": scores}, ("logprobs",), {})
        for a, b in zip([*values, gradient], [*expected, expected_gradient]):
            assert torch.equal(a, b)


@pytest.mark.parametrize(("dtype", "rtol"), ((torch.float64, 1e-9), (torch.float32, 1e-4)), ids=str)
def test_more_responses_than_a_tile(backend_name, dtype, rtol):
    given = inputs(130, 70, 9)
    given["logprobs"] = given["logprobs"].to(dtype)
    given["scores"][::11] = math.nan
    given["mask"][5::13] = False
    values, (gradient,), _ = oracle.evaluate(rk.rrhf_loss, given, ("logprobs",), {"length_power": 0.7})
    with rk.use_backend("torch"):
        expected, (expected_gradient,), _ = oracle.evaluate(rk.rrhf_loss, given, ("logprobs",), {"length_power": 0.7})
    for a, b in zip([*values, gradient], [*expected, expected_gradient]):
        close(a, b, rtol=rtol, atol=rtol / 100)


def test_gradcheck(backend_name):
    given = inputs(6, 4, 2)

    def op(logprobs):
        return rk.rrhf_loss(**given | {"logprobs": logprobs}, rank_coef=2.0)[0]

    assert torch.autograd.gradcheck(op, given["logprobs"].requires_grad_())


@oracle.property_test
@given(
    st.integers(1, 10),
    st.integers(1, 5),
    st.integers(1, 3),
    st.tuples(st.integers(0, 2), st.integers(0, 2)),
    st.integers(0, 2**16),
)
def test_batch_makes_no_difference(backend_name, responses, columns, prompts, padding, seed):
    """Candidates shuffled, prompts interleaved and renamed, columns padded."""
    torch.manual_seed(seed)
    given = inputs(responses, columns, prompts)
    given["scores"] += torch.rand(responses, dtype=torch.float64)  # no ties: the first of equals depends on the order
    expected, (expected_gradient,), _ = oracle.evaluate(rk.rrhf_loss, given, ("logprobs",), {})
    order = torch.randperm(responses)
    moved = {name: oracle.rearrange(x, order, *padding) for name, x in given.items()}
    moved["prompts"] = 1000 - moved["prompts"]
    values, (gradient,), _ = oracle.evaluate(rk.rrhf_loss, moved, ("logprobs",), {})
    for a, b in zip(values, expected):
        close(a, b, rtol=1e-10, atol=1e-12)
    close(oracle.restore(gradient, order, *padding), expected_gradient, rtol=1e-10, atol=1e-12)

import pytest
import torch
import torch.nn.functional as F

import oracle
import rlhf_kernels as rk
import test_rrhf_loss
from oracle import close, compare
from test_linear_logprobs import products

OPS = ("linear_rrhf_loss",)
WRT = ("hidden", "weight", "bias")


def inputs(responses, columns, prompts, hidden, vocabulary, mask="random"):
    given = test_rrhf_loss.inputs(responses, columns, prompts, mask)
    del given["logprobs"]
    return given | {
        "hidden": torch.randn(responses, columns, hidden, dtype=torch.float64),
        "weight": torch.randn(vocabulary, hidden, dtype=torch.float64) / hidden**0.5,
        "bias": torch.randn(vocabulary, dtype=torch.float64),
        "tokens": torch.randint(vocabulary, (responses, columns)),
    }


def grouped(responses, columns, group, hidden, vocabulary):
    """Blocks of `group` responses of one prompt, the prompts' ids in no order."""
    given = inputs(responses, columns, 1, hidden, vocabulary, "all")
    given["prompts"] = torch.randperm(responses // group).repeat_interleave(group)
    given["mask"][:, columns // 2 :] = torch.rand(responses, columns - columns // 2) < 0.5
    given["mask"][1] = False  # no candidate
    return given


def formula(hidden, weight, tokens, scores, prompts, mask, bias=None, *, temperature=1.0, **scalars):
    logprobs = oracle.token_logprobs(F.linear(hidden, weight, bias), tokens, mask, temperature=temperature)
    return test_rrhf_loss.formula(logprobs, scores, prompts, mask, **scalars)


def test_known_value(backend_name):
    """Two responses of one token, log ½ each: nothing to rank, −log ½ for the better one."""
    hidden, weight = torch.zeros(2, 1, 3, requires_grad=True), torch.ones(2, 3, requires_grad=True)
    tokens, prompts, mask = torch.tensor([[0], [1]]), torch.zeros(2).long(), torch.ones(2, 1)
    loss, stats = rk.linear_rrhf_loss(hidden, weight, tokens, torch.tensor([0.0, 1.0]), prompts, mask)
    close(loss.detach(), 0.693147)
    close(stats.sft_loss, 0.693147)
    assert (stats.rank_loss, stats.prompts) == (0, 1)
    loss.backward()
    close(hidden.grad, torch.zeros(2, 1, 3))
    close(weight.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((0, 3, 1, 4, 7), (3, 0, 2, 4, 7), (6, 5, 2, 8, 7), (3, 2, 1, 16, 4097)), ids=str)
def test_matches_formula(backend_name, shape, dtype):
    for mask in ("random", "none", "all"):
        given = inputs(*shape, mask)
        compare(rk.linear_rrhf_loss, formula, given, wrt=WRT, dtype=dtype, products=True, atol=5e-6)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_scalars_and_layouts(backend_name, layout):
    given = inputs(6, 5, 2, 8, 7)
    scalars = {"temperature": 0.7, "rank_coef": 2.0, "sft_coef": 0.5, "length_power": 0.3}
    compare(rk.linear_rrhf_loss, formula, given, wrt=WRT, layout=layout, **scalars)


@pytest.mark.parametrize("responses", (4, 8, 11, 24))
def test_budgets_make_no_difference(backend_name, responses):
    """Room for so many responses of fp64 logits: less than a prompt, a prompt, not a whole number of them, all."""
    given = grouped(24, 6, 4, 8, 7)
    expected = oracle.evaluate(rk.linear_rrhf_loss, given, WRT, {})
    for group_size in (None, 4):
        limits = {"group_size": group_size, "memory_budget": responses * 6 * 7 * 8}
        actual = oracle.evaluate(rk.linear_rrhf_loss, given, WRT, limits)
        for a, b in zip(actual[0] + actual[1], expected[0] + expected[1]):
            close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", ("native", "triton"))
def test_number_of_products(backend):
    """3 in one chunk or in chunks of whole prompts, 4 where a prompt would be cut, 2 or 3 with a frozen head.

    The two products of a gradient leave out the rows that have none where the backend says so.
    """
    given = grouped(24, 6, 4, 8, 64)
    del given["bias"]
    room = {"memory_budget": 8 * 6 * 64 * 4}  # eight responses in fp32
    _, (gradient,), _ = oracle.evaluate(formula, given, ("hidden",), {})
    moving = (gradient != 0).any(-1).sum() / given["mask"].sum()
    assert 0.5 < moving < 1
    one = float(moving) if backend == "native" else 1

    def count(wrt, **scalars):
        return products({**given}, wrt, rk.linear_rrhf_loss, **scalars)

    with oracle.on_backend(backend, *OPS):
        assert count(WRT[:2]) == pytest.approx((1 + 2 * one, 0))
        assert count(WRT[:2], group_size=4, memory_budget=2 * 8 * 6 * 64 * 4) == pytest.approx((1 + 2 * one, 0))
        assert count(WRT[:2], **room) == pytest.approx((2 + 2 * one, 0))
        assert count(WRT[:1]) == pytest.approx((1 + one, 0))
        assert count(WRT[:1], **room) == pytest.approx((2 + one, 0))
        assert count(()) == pytest.approx((1, 0))


def test_groups_that_are_none(backend_name):
    given = grouped(8, 3, 4, 8, 7)
    with pytest.raises(ValueError, match=r"^linear_rrhf_loss: group_size must divide the 8 responses, got 3$"):
        rk.linear_rrhf_loss(**given, group_size=3)
    for prompts in ([0, 0, 0, 0, 1, 1, 1, 2], [5, 5, 5, 5, 5, 5, 5, 5]):
        given["prompts"] = torch.tensor(prompts)
        message = r"^linear_rrhf_loss: prompts must be blocks of group_size 4 equal ids, each id in one block, got \["
        with oracle.refuses(message):
            assert rk.linear_rrhf_loss(**given, group_size=4)[0].isnan()

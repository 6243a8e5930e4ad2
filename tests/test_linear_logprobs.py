import importlib
import math

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("linear_logprobs",)
WRT = ("hidden", "weight", "bias")


def inputs(rows, hidden, vocabulary, mask="random", bias=True):
    given = {
        "hidden": torch.randn(*rows, hidden, dtype=torch.float64),
        "weight": torch.randn(vocabulary, hidden, dtype=torch.float64),
        "tokens": torch.randint(vocabulary, rows),
        "mask": oracle.masks(*rows)[mask],
    }
    return given | ({"bias": torch.randn(vocabulary, dtype=torch.float64)} if bias else {})


def formula(hidden, weight, tokens, mask=None, *, bias=None, memory_budget=None, **scalars):
    return oracle.token_logprobs_entropy(F.linear(hidden, weight, bias), tokens, mask, **scalars)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_values(backend_name, dtype):
    """Logits 1, 2, 3, 0 as the product of a head and a hidden state, then with the same as bias."""
    weight = torch.tensor([[0.5, 0.5], [1, 1], [1.5, 1.5], [0, 0]], dtype=dtype)
    hidden, tokens = torch.ones(1, 2, dtype=dtype), torch.tensor([2])
    logprobs, entropy = rk.linear_logprobs_entropy(hidden, weight, tokens)
    close(logprobs, [3 - 3.440190])
    close(entropy, [0.947537])
    bias = torch.tensor([1.0, 2, 3, 0], dtype=dtype)
    close(rk.linear_logprobs(0 * hidden, weight, tokens, bias=bias), [3 - 3.440190])
    close(rk.linear_logprobs(hidden, weight, tokens, bias=bias, temperature=2.0), [3 - 3.440190])


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", (((0,), 4, 7), ((2, 0), 4, 7), ((3, 5), 8, 1), ((3, 5), 3, 7), ((2, 2), 16, 4097)))
def test_matches_formula(backend_name, shape, dtype, bias):
    wrt = WRT if bias else WRT[:2]
    for mask in ("random", "none", "all"):
        given = inputs(*shape, mask, bias)
        compare(rk.linear_logprobs_entropy, formula, given, wrt=wrt, dtype=dtype, products=True)


@pytest.mark.parametrize("scalars", ({"temperature": 0.7}, {"softcap": 2.0}))
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_scalars_and_layouts(backend_name, layout, scalars):
    compare(rk.linear_logprobs_entropy, formula, inputs((3, 5), 4, 7), wrt=WRT, layout=layout, **scalars)
    compare(
        rk.linear_logprobs,
        lambda **given: formula(**given)[0],
        inputs((3, 5), 4, 7),
        wrt=WRT,
        layout=layout,
        **scalars,
    )


@pytest.mark.parametrize("rows", (1, 2, 5))
def test_chunks_make_no_difference(backend_name, rows):
    """A budget for so many rows of fp64 logits."""
    given = inputs((3, 5), 4, 7)
    expected = oracle.evaluate(rk.linear_logprobs_entropy, given, WRT, {})
    actual = oracle.evaluate(rk.linear_logprobs_entropy, given, WRT, {"memory_budget": rows * 7 * 8})
    for a, b in zip(actual[0] + actual[1], expected[0] + expected[1]):
        close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("rows", (None, 1, 96))
def test_bf16_chunks_are_rounded_once(backend_name, rows):
    """Sizes off every tile; the sum over chunks is as exact as the single product."""
    given = inputs((9, 17), 290, 517)
    given["hidden"] /= 17
    budget = rows and rows * 517 * 4
    limits = {"memory_budget": budget}
    compare(rk.linear_logprobs_entropy, formula, given, wrt=WRT, dtype=torch.bfloat16, products=True, **limits)


@pytest.mark.parametrize("wrt", (("hidden",), ("weight",), ("bias",), ("hidden", "bias")))
def test_only_what_is_needed(backend_name, wrt):
    compare(rk.linear_logprobs_entropy, formula, inputs((3, 5), 4, 7), wrt=wrt)


@pytest.mark.parametrize("garbage", (math.nan, math.inf))
def test_masked_rows_reach_no_gradient(backend_name, garbage):
    clean = inputs((4, 5), 3, 7)
    poisoned = clean | {"hidden": oracle.poison(clean["hidden"], clean["mask"], garbage)}
    results = [oracle.evaluate(rk.linear_logprobs_entropy, given, WRT, {}) for given in (clean, poisoned)]
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1]):
        assert torch.equal(a, b)
    assert (results[1][1][0][~clean["mask"]] == 0).all()


def test_forbidden_tokens(backend_name):
    """A bias of −inf takes tokens out of the vocabulary."""
    given = inputs((4, 5), 3, 7, "all")
    given["bias"][5:] = -math.inf
    given["tokens"] %= 5
    values, gradients, _ = oracle.evaluate(rk.linear_logprobs_entropy, given, WRT, {})
    cut = given | {"weight": given["weight"][:5], "bias": given["bias"][:5]}
    expected, expected_gradients, _ = oracle.evaluate(formula, cut, WRT, {})
    for a, b in zip([*values, gradients[0], gradients[1][:5], gradients[2][:5]], expected + expected_gradients):
        close(a, b, rtol=1e-10)
    assert (gradients[1][5:] == 0).all()
    assert (gradients[2][5:] == 0).all()


def test_token_out_of_range(backend_name):
    given = inputs((2, 3), 4, 7) | {"tokens": torch.full((2, 3), 8), "mask": torch.ones(2, 3)}
    with oracle.refuses(r"logprobs: tokens must be below V = 7, got 8$"):
        assert rk.linear_logprobs(**given).isnan().all()


def test_logits_stay_in_fp32(backend_name):
    """Logits rounded to bf16 would be off by 0.03 nats and more; only the inputs are rounded here."""
    given = inputs((8, 8), 64, 1000, "all", bias=False)
    given = {name: x.bfloat16() if x.is_floating_point() else x for name, x in given.items()}
    exact = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    logprobs, entropy = rk.linear_logprobs_entropy(**given)
    assert logprobs.dtype == entropy.dtype == torch.float32
    for a, b in zip((logprobs, entropy), formula(**exact)):
        close(a, b, atol=1e-4)


def test_autocast(backend_name):
    """fp32 parameters under autocast: the products see bf16, the gradients come back in fp32."""
    given = {name: x.float() if x.is_floating_point() else x for name, x in inputs((3, 5), 8, 7).items()}
    rounded = {name: x.bfloat16() if x.is_floating_point() else x for name, x in given.items()}
    expected, expected_gradients, _ = oracle.evaluate(rk.linear_logprobs_entropy, rounded, WRT, {})

    def op(**arguments):
        with torch.autocast(oracle.DEVICE, torch.bfloat16):
            return rk.linear_logprobs_entropy(**arguments)

    values, gradients, _ = oracle.evaluate(op, given, WRT, {})
    for a, b in zip(values, expected):
        assert torch.equal(a, b)
    for a, b in zip(gradients, expected_gradients):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_gradcheck(backend_name):
    hidden, weight, tokens, mask, bias = inputs((3, 2), 3, 5).values()

    def op(hidden, weight, bias):
        return rk.linear_logprobs_entropy(hidden, weight, tokens, mask, bias=bias, temperature=0.8, softcap=4.0)

    assert torch.autograd.gradcheck(op, [x.requires_grad_() for x in (hidden, weight, bias)])


@oracle.property_test
@given(st.integers(2, 4), st.integers(1, 6), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16))
def test_batch_makes_no_difference(backend_name, rows, columns, left, right, seed):
    torch.manual_seed(seed)
    given = inputs((rows, columns), 3, 11)
    order = torch.randperm(rows)
    moved = {name: x if name in WRT[1:] else oracle.rearrange(x, order, left, right) for name, x in given.items()}
    sums = []
    for arguments in (given, moved):
        hidden, weight, bias = (arguments[name].clone().requires_grad_() for name in WRT)
        outputs = rk.linear_logprobs_entropy(hidden, weight, arguments["tokens"], arguments["mask"], bias=bias)
        sums.append((outputs, torch.autograd.grad(outputs[0].sum() + outputs[1].sum(), (hidden, weight, bias))))
    (expected, expected_gradients), (actual, gradients) = sums
    for a, b in zip([*actual, gradients[0]], [*expected, expected_gradients[0]]):
        close(oracle.restore(a, order, left, right), b, rtol=1e-10, atol=1e-12)
    for a, b in zip(gradients[1:], expected_gradients[1:]):
        close(a, b, rtol=1e-10, atol=1e-12)


def products(given, wrt, op=rk.linear_logprobs, **scalars):
    """Matrix products of all rows that the host knows to count, forward and backward, for the gradients in `wrt`."""
    leaves = {name: x.detach().requires_grad_() if name in wrt else x for name, x in given.items()}
    kept = []
    forward = oracle.product_flops(lambda: kept.append(op(**leaves, **scalars)))
    output = sum(x.sum() for x in oracle.flatten(kept) if x.requires_grad)
    backward = oracle.product_flops(output.backward) if wrt else 0
    rows = int(given["mask"].sum()) if oracle.DEVICE == "cpu" else given["mask"].numel()
    one = 2 * rows * given["weight"].numel()
    return forward / one, backward / one


@pytest.mark.parametrize("backend", ("native", "triton"))
@pytest.mark.parametrize("budget", (None, 8 * 64 * 12), ids=("whole", "chunks"))
def test_number_of_products(backend, budget):
    """4 for everything; with a frozen head 2, all in the forward pass; an entropy needs the logits once more.

    They are not made again if a CPU has kept them.
    """
    given = inputs((6, 6), 8, 64, bias=False)
    with oracle.on_backend(backend, *OPS):
        scalars, again = {"memory_budget": budget}, 0 if budget is None and oracle.DEVICE == "cpu" else 1
        assert products(given, (), **scalars) == (1, 0)
        assert products(given, ("hidden", "weight"), **scalars) == (1, 2 + again)
        assert products(given, ("hidden",), **scalars) == (2, 0)
        assert products(given, ("weight",), **scalars) == (1, 1 + again)
        assert products(given, ("hidden",), rk.linear_logprobs_entropy, **scalars) == (1, 1 + again)


def test_frozen_head_gives_the_same_gradient(backend_name):
    given = inputs((3, 5), 8, 7)
    for scalars in ({}, {"temperature": 0.7, "softcap": 2.0}):
        alone = oracle.evaluate(rk.linear_logprobs, given, ("hidden",), scalars)
        together = oracle.evaluate(rk.linear_logprobs, given, WRT, scalars)
        close(alone[0][0], together[0][0], rtol=1e-12, atol=1e-14)
        close(alone[1][0], together[1][0], rtol=1e-12, atol=1e-14)
        assert (alone[1][0][~given["mask"]] == 0).all()


def test_max_tokens(backend_name):
    """A bound that is kept changes nothing; one that is not kept is an error where the host can see it."""
    given = inputs((3, 5), 8, 7)
    count = int(given["mask"].sum())
    expected = oracle.evaluate(rk.linear_logprobs_entropy, given, WRT, {})
    for bound in (count, count + 1, 100):
        actual = oracle.evaluate(rk.linear_logprobs_entropy, given, WRT, {"max_tokens": bound})
        for a, b in zip(actual[0] + actual[1], expected[0] + expected[1]):
            close(a, b, rtol=1e-12, atol=1e-14)
    with oracle.refuses(rf"^linear_logprobs: max_tokens must be at least {count}, the tokens that co"):
        assert rk.linear_logprobs(**given, max_tokens=count - 1).isnan().sum() == 1
    with pytest.raises(ValueError, match=r"^linear_logprobs: max_tokens must be at least 0, got -1$"):
        rk.linear_logprobs(**given, max_tokens=-1)
    with pytest.raises(ValueError, match=r"^linear_logprobs: memory_budget must be greater than 0, got 0$"):
        rk.linear_logprobs(**given, memory_budget=0)


def test_rows_that_a_gpu_cannot_count(monkeypatch):
    """Without the host's count the products take max_tokens rows, and what finds no room is NaN."""
    if not rk.backend.has("linear_logprobs", "triton", "cpu"):
        pytest.skip("no triton kernel for linear_logprobs on cpu")
    module = importlib.import_module("rlhf_kernels.triton_kernels.linear_logprobs")
    monkeypatch.setattr(module, "host_count", lambda flags: None)
    given = inputs((4, 5), 8, 7)
    given["mask"][0] = True
    count = int(given["mask"].sum())
    expected = oracle.evaluate(rk.linear_logprobs, given, WRT, {})
    with rk.use_backend("triton"):
        for bound in (None, count):
            scalars = {} if bound is None else {"max_tokens": bound}
            actual = oracle.evaluate(rk.linear_logprobs, given, WRT, scalars)
            for a, b in zip(actual[0] + actual[1], expected[0] + expected[1]):
                close(a, b, rtol=1e-12, atol=1e-14)
            rows = 20 if bound is None else bound
            assert products(given, (), **scalars) == (rows / count, 0)
        monkeypatch.setattr(
            module, "without_room", lambda op, valid, most: valid & (valid.flatten().cumsum(0).view(4, 5) > most)
        )
        crowded = rk.linear_logprobs(**given, max_tokens=count - 2)
    missed = given["mask"].flatten().nonzero().flatten()[-2:]
    assert crowded.flatten()[missed].isnan().all()
    kept = torch.ones(20, dtype=torch.bool).index_fill(0, missed, False)
    close(crowded.flatten()[kept], expected[0][0].flatten()[kept], rtol=1e-12)

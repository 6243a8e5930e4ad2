import math

import pytest
import torch
import torch.nn.functional as F

import oracle
import rlhf_kernels as rk
from oracle import close, compare
from test_linear_logprobs import products

OPS = ("linear_ppo_loss",)
WRT = ("hidden", "weight", "bias")
SCALARS = {"entropy_coef": 0.05, "kl_coef": 0.1}


def inputs(rows, hidden, vocabulary, mask="random"):
    given = {
        "hidden": torch.randn(*rows, hidden, dtype=torch.float64),
        "weight": torch.randn(vocabulary, hidden, dtype=torch.float64) / hidden**0.5,
        "bias": torch.randn(vocabulary, dtype=torch.float64),
        "tokens": torch.randint(vocabulary, rows),
        "mask": oracle.masks(*rows)[mask],
    }
    logprobs = oracle.token_logprobs(F.linear(given["hidden"], given["weight"], given["bias"]), given["tokens"])
    old, ref, advantages = torch.randn(3, *rows, dtype=torch.float64)
    return given | {
        "old_logprobs": logprobs + 0.3 * old,
        "ref_logprobs": logprobs + 0.3 * ref,
        "advantages": advantages,
    }


def formula(
    hidden,
    weight,
    tokens,
    old_logprobs,
    advantages,
    mask,
    bias=None,
    ref_logprobs=None,
    *,
    temperature=1.0,
    entropy_coef=0.0,
    kl_coef=0.0,
    normalizer=None,
    **clips,
):
    """(loss, stats in the order of LinearPPOStats)."""
    logits = F.linear(hidden, weight, bias)
    logprobs, entropy = oracle.token_logprobs_entropy(logits, tokens, mask, temperature=temperature)
    logprobs, entropy = logprobs[mask], entropy[mask]
    policy, stats = oracle.policy_loss(logprobs, old_logprobs[mask], advantages[mask], **clips)
    kl = torch.zeros_like(logprobs) if ref_logprobs is None else oracle.KL["k3"](logprobs - ref_logprobs[mask])
    total = max(int(mask.sum()), 1) if normalizer is None else normalizer
    stats |= {"policy_loss": policy.sum() / total, "entropy": oracle.mean(entropy), "kl": oracle.mean(kl)}
    loss = (policy - entropy_coef * entropy + kl_coef * kl).sum() / total
    return loss, tuple(stats[name].detach() for name in rk.stats.LinearPPOStats._fields)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_values(backend_name, dtype):
    """One token, uniform over 4 logits: A = 2 at ratio 1, then at ratio 2, held at 1.2."""
    hidden = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    weight = torch.zeros(4, 1, dtype=dtype, requires_grad=True)
    token, advantages, mask = torch.tensor([2]), torch.tensor([2.0], dtype=dtype), torch.ones(1)
    old = torch.full((1,), -math.log(4), dtype=dtype)
    loss, stats = rk.linear_ppo_loss(hidden, weight, token, old, advantages, mask, entropy_coef=0.1)
    close(loss.detach(), -2 - 0.1 * math.log(4))
    close(stats.entropy, math.log(4))
    assert stats.kl == stats.clipfrac_high == 0
    loss.backward()
    close(weight.grad, [[0.5], [0.5], [-1.5], [0.5]])  # −A · (1[v = y] − p) · hidden
    close(hidden.grad, [[0.0]])
    ratio_two = old - math.log(2)
    ref = torch.zeros(1, dtype=dtype)  # D = −log 4: k3 = 4 − 1 − log 4, derivative 1 − 4
    loss, stats = rk.linear_ppo_loss(
        hidden, weight, token, ratio_two, advantages, mask, ref_logprobs=ref, kl_coef=0.5, normalizer=2
    )
    close(stats.kl, 3 - math.log(4))
    close(stats.policy_loss, -2.4 / 2)
    close(loss.detach(), (-2.4 + 0.5 * (3 - math.log(4))) / 2)
    assert stats.clipfrac_high == 1
    (gradient,) = torch.autograd.grad(loss, weight)
    close(gradient, [[0.1875], [0.1875], [-0.5625], [0.1875]])  # .5 · (1 − 4) / 2 · (1[v = y] − ¼)
    close(stats.ratio_max, 2.0)


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", (((0,), 4, 7), ((3, 5), 8, 2), ((3, 5), 4, 7), ((2, 2), 16, 4097)))
def test_matches_formula(backend_name, shape, dtype):
    for mask in ("random", "none", "all"):
        given = inputs(*shape, mask)
        compare(rk.linear_ppo_loss, formula, given, wrt=WRT, dtype=dtype, atol=5e-6, products=True, **SCALARS)
        bare = {name: x for name, x in given.items() if name not in ("bias", "ref_logprobs")}
        compare(rk.linear_ppo_loss, formula, bare, wrt=WRT[:2], dtype=dtype, atol=5e-6, products=True)


@pytest.mark.parametrize(
    "scalars",
    (
        {"temperature": 0.7, "entropy_coef": 0.0},
        {"cliprange": 0.1, "cliprange_high": 0.3, "kl_coef": 0.0},
        {"dual_clip": 1.2, "normalizer": 50.0},
        {"normalizer": torch.tensor(9)},
    ),
    ids=str,
)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_scalars_and_layouts(backend_name, layout, scalars):
    compare(rk.linear_ppo_loss, formula, inputs((3, 5), 4, 7), wrt=WRT, layout=layout, **SCALARS | scalars)


@pytest.mark.parametrize("rows", (1, 2, 5))
def test_chunks_make_no_difference(backend_name, rows):
    """A budget for so many rows of fp64 logits."""
    given = inputs((3, 5), 4, 7)
    expected = oracle.evaluate(rk.linear_ppo_loss, given, WRT, SCALARS)
    actual = oracle.evaluate(rk.linear_ppo_loss, given, WRT, {**SCALARS, "memory_budget": rows * 7 * 8})
    for a, b in zip(actual[0] + actual[1], expected[0] + expected[1]):
        close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("wrt", (("hidden",), ("weight",), ("bias",), ("hidden", "bias")))
def test_only_what_is_needed(backend_name, wrt):
    compare(rk.linear_ppo_loss, formula, inputs((3, 5), 4, 7), wrt=wrt, **SCALARS)


@pytest.mark.parametrize("garbage", (math.nan, math.inf))
def test_masked_rows_reach_no_gradient(backend_name, garbage):
    clean = inputs((4, 5), 3, 7)
    per_token = ("hidden", "old_logprobs", "ref_logprobs", "advantages")
    poisoned = clean | {name: oracle.poison(clean[name], clean["mask"], garbage) for name in per_token}
    results = [oracle.evaluate(rk.linear_ppo_loss, given, WRT, SCALARS) for given in (clean, poisoned)]
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1]):
        assert torch.equal(a, b)
    assert (results[1][1][0][~clean["mask"]] == 0).all()


def test_all_masked_is_zero_and_in_the_graph(backend_name):
    given = inputs((2, 3), 4, 7, "none")
    given["hidden"].fill_(math.nan)
    for name in WRT:
        given[name].requires_grad_()
    loss, stats = rk.linear_ppo_loss(**given, **SCALARS)
    assert loss == 0
    assert all(x == 0 for x in stats)
    loss.backward()
    for name in WRT:
        assert (given[name].grad == 0).all()


def test_is_its_parts(backend_name):
    given = inputs((4, 6), 5, 7)
    hidden, weight, bias = (given[name].clone().requires_grad_() for name in WRT)
    zeros = torch.zeros(4, 6, dtype=torch.float64)
    with rk.use_backend("torch"):
        logprobs = rk.linear_logprobs(hidden, weight, given["tokens"], given["mask"], bias=bias, temperature=0.8)
        expected, _ = rk.ppo_loss(
            logprobs, given["old_logprobs"], given["advantages"], zeros, zeros, zeros, given["mask"], dual_clip=2.0
        )
        expected_gradients = torch.autograd.grad(expected, (hidden, weight, bias))
    loss, _ = rk.linear_ppo_loss(
        **given | {"hidden": hidden, "weight": weight, "bias": bias}, temperature=0.8, dual_clip=2.0
    )
    close(loss, expected, rtol=1e-10)
    for a, b in zip(torch.autograd.grad(loss, (hidden, weight, bias)), expected_gradients):
        close(a, b, rtol=1e-10, atol=1e-12)


def test_autocast(backend_name):
    """fp32 parameters under autocast: the products see bf16, the loss and the gradients come back in fp32."""
    given = {name: x.float() if x.is_floating_point() else x for name, x in inputs((3, 5), 8, 7).items()}
    rounded = given | {name: given[name].bfloat16() for name in WRT}
    expected, expected_gradients, _ = oracle.evaluate(rk.linear_ppo_loss, rounded, WRT, SCALARS)

    def op(**arguments):
        with torch.autocast(oracle.DEVICE, torch.bfloat16):
            return rk.linear_ppo_loss(**arguments)

    values, gradients, _ = oracle.evaluate(op, given, WRT, SCALARS)
    for a, b in zip(values, expected):
        assert torch.equal(a, b)
    for a, b in zip(gradients, expected_gradients):
        assert a.dtype == torch.float32
        assert torch.equal(a, b.float())


def test_gradcheck(backend_name):
    given = inputs((3, 2), 3, 5)

    def op(*tensors):
        return rk.linear_ppo_loss(**given | dict(zip(WRT, tensors)), **SCALARS)[0]

    assert torch.autograd.gradcheck(op, [given[name].requires_grad_() for name in WRT])


@pytest.mark.parametrize("backend", ("native", "triton"))
@pytest.mark.parametrize("budget", (None, 8 * 64 * 12), ids=("whole", "chunks"))
def test_number_of_products(backend, budget):
    """3 forward and backward together, 2 with a frozen head, none left for the backward pass."""
    given = {name: x for name, x in inputs((6, 6), 8, 64).items() if name != "bias"}
    with oracle.on_backend(backend, *OPS):
        scalars = {**SCALARS, "memory_budget": budget}
        assert products(given, (), rk.linear_ppo_loss, **scalars) == (1, 0)
        assert products(given, ("hidden", "weight"), rk.linear_ppo_loss, **scalars) == (3, 0)
        assert products(given, ("hidden",), rk.linear_ppo_loss, **scalars) == (2, 0)


@pytest.mark.parametrize("backend", ("native", "triton"))
def test_rows_without_a_gradient_are_left_out(backend):
    """Zero advantages and held ratios: their rows are in the logits' product and in no other that the host cuts."""
    given = {name: x for name, x in inputs((4, 25), 8, 64, "all").items() if name not in ("bias", "ref_logprobs")}
    logprobs = oracle.token_logprobs(F.linear(given["hidden"], given["weight"]), given["tokens"])
    given["advantages"] = torch.ones(4, 25, dtype=torch.float64)
    given["advantages"][:, 20:] = 0
    given["old_logprobs"] = logprobs.clone()
    given["old_logprobs"][0] -= 1  # ratio e, held at 1.2
    moving = 3 * 20
    with oracle.on_backend(backend, *OPS):
        expected = 1 + 2 * moving / 100 if oracle.DEVICE == "cpu" else 3
        assert products(given, ("hidden", "weight"), rk.linear_ppo_loss) == (expected, 0)
        actual = oracle.evaluate(rk.linear_ppo_loss, given, WRT[:2], {})
    exact = oracle.evaluate(formula, given, WRT[:2], {}, actual[2])
    for a, b in zip(actual[0] + actual[1], exact[0] + exact[1]):
        close(a, b, rtol=1e-10, atol=1e-12)


def test_max_tokens(backend_name):
    given = inputs((3, 5), 8, 7)
    count = int(given["mask"].sum())
    expected = oracle.evaluate(rk.linear_ppo_loss, given, WRT, SCALARS)
    actual = oracle.evaluate(rk.linear_ppo_loss, given, WRT, {**SCALARS, "max_tokens": count})
    for a, b in zip(actual[0] + actual[1], expected[0] + expected[1]):
        close(a, b, rtol=1e-12, atol=1e-14)
    with oracle.refuses(rf"^linear_ppo_loss: max_tokens must be at least {count}, the tokens that cou"):
        assert rk.linear_ppo_loss(**given, max_tokens=count - 1)[0].isnan()

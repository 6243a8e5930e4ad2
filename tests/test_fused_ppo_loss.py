import math

import pytest
import torch

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("fused_ppo_loss",)
WRT = ("logits", "values")
SCALARS = {"kl_coef": 0.1, "beta": 0.7, "gamma": 0.99, "lam": 0.9, "entropy_coef": 0.05}


def inputs(rows, columns, vocabulary, mask="random", attention=True, per_token=False):
    shape = (rows, columns)
    logits, noise = torch.randn(2, *shape, vocabulary, dtype=torch.float64)
    tokens = torch.randint(vocabulary, shape)
    old_logprobs = oracle.token_logprobs(logits + 0.3 * noise, tokens)
    ref_noise, old_values, change, weights = torch.randn(4, *shape, dtype=torch.float64)
    given = {
        "logits": logits,
        "tokens": tokens,
        "scores": torch.randn((rows, columns) if per_token else rows, dtype=torch.float64),
        "old_logprobs": old_logprobs,
        "ref_logprobs": old_logprobs + 0.3 * ref_noise,
        "values": old_values + 0.3 * change,
        "old_values": old_values,
        "mask": oracle.masks(*shape)[mask],
    }
    return given | ({"attention": weights.abs()} if attention else {})


def op(attention=None, **arguments):
    return rk.fused_ppo_loss(attention=attention, **arguments)


def formula(
    logits,
    tokens,
    scores,
    old_logprobs,
    ref_logprobs,
    values,
    old_values,
    mask,
    attention=None,
    *,
    temperature=1.0,
    softcap=None,
    entropy_coef=0.0,
    normalizer=None,
    kl_coef,
    beta,
    gamma=1.0,
    lam=0.95,
    kl_estimator="k1",
    whiten=True,
    **clips,
):
    """The composition of the parts' formulas; (loss, stats in the order of FusedPPOStats)."""
    rewards = {"kl_coef": kl_coef, "beta": beta, "gamma": gamma, "lam": lam, "kl_estimator": kl_estimator}
    advantages, returns, _, _ = oracle.rollout_advantages(
        scores, old_logprobs, ref_logprobs, old_values, mask, attention, **rewards, whiten=whiten
    )
    logprobs, entropy = oracle.token_logprobs_entropy(logits, tokens, mask, temperature=temperature, softcap=softcap)
    loss, stats = oracle.ppo_loss(
        logprobs, old_logprobs, advantages, values, old_values, returns, mask, normalizer=normalizer, **clips
    )
    total = max(int(mask.sum()), 1) if normalizer is None else normalizer
    entropy_mean = oracle.mean(entropy[mask]).detach()
    return loss - entropy_coef * entropy[mask].sum() / total, (*stats[:2], entropy_mean, *stats[2:])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_values(backend_name, dtype):
    """One token, uniform over 4 logits, ratio 1: A = score − value, not whitened; entropy log 4."""
    logits = torch.zeros(1, 1, 4, dtype=dtype, requires_grad=True)
    old = torch.full((1, 1), -math.log(4), dtype=dtype)
    values = torch.tensor([[0.5]], dtype=dtype, requires_grad=True)
    loss, stats = rk.fused_ppo_loss(
        logits,
        torch.tensor([[2]]),
        torch.tensor([2.0], dtype=dtype),
        old,
        old,
        None,
        values,
        values.detach(),
        torch.ones(1, 1),
        kl_coef=0.1,
        beta=0.0,
        whiten=False,
        entropy_coef=0.01,
    )
    close(stats.policy_loss, -1.5)  # A = 2 − .5
    close(stats.value_loss, 1.125)
    close(stats.entropy, math.log(4))
    close(loss.detach(), -1.5 + 0.1 * 1.125 - 0.01 * math.log(4))
    loss.backward()
    close(logits.grad, [[[0.375, 0.375, -1.125, 0.375]]])  # −A · (1[v = y] − p); the entropy is at its maximum
    close(values.grad, [[0.1 * -1.5]])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((0, 3, 7), (3, 0, 7), (3, 1, 5), (5, 9, 7), (2, 3, 4097)), ids=str)
def test_matches_formula(backend_name, shape, dtype):
    for mask in ("random", "none", "all"):
        for attention in (True, False):
            given = inputs(*shape, mask, attention)
            compare(op, formula, given, wrt=WRT, dtype=dtype, **SCALARS)


@pytest.mark.parametrize("shape", ((3, 0, 7), (5, 9, 7)), ids=str)
def test_scores_of_single_tokens(backend_name, shape):
    given = inputs(*shape, attention=False, per_token=True)
    compare(op, formula, given, wrt=WRT, **SCALARS)


@pytest.mark.parametrize(
    "scalars",
    (
        {"temperature": 0.7, "softcap": 3.0},
        {"whiten": False, "kl_estimator": "k3", "dual_clip": 1.5},
        {"cliprange": 0.1, "cliprange_high": 0.3, "cliprange_value": None, "normalizer": 50.0},
        {"entropy_coef": 0.0, "vf_coef": 0.5},
    ),
    ids=str,
)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_scalars_and_layouts(backend_name, layout, scalars):
    compare(op, formula, inputs(5, 9, 7), wrt=WRT, layout=layout, **SCALARS | scalars)


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_masked_places_are_never_read(backend_name, garbage):
    clean = inputs(5, 9, 7)
    mask = clean["mask"]
    kept = ("tokens", "mask", "scores")
    poisoned = {name: x if name in kept else oracle.poison(x, mask, garbage) for name, x in clean.items()}
    poisoned["tokens"] = clean["tokens"].masked_fill(~mask, 99)
    results = [oracle.evaluate(op, given, WRT, SCALARS) for given in (clean, poisoned)]
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1]):
        assert torch.equal(a, b)
    for gradient in results[1][1]:
        assert (gradient[~mask] == 0).all()


def test_negative_tokens_are_masked(backend_name):
    given = inputs(5, 9, 7, "all")
    mask = oracle.random_mask(5, 9)
    expected = oracle.evaluate(op, given | {"mask": mask}, WRT, SCALARS)
    actual = oracle.evaluate(op, given | {"tokens": given["tokens"].masked_fill(~mask, -100)}, WRT, SCALARS)
    for a, b in zip(actual[0] + actual[1], expected[0] + expected[1]):
        assert torch.equal(a, b)


def test_all_masked_is_zero_and_in_the_graph(backend_name):
    given = {name: x.fill_(math.nan) if x.is_floating_point() else x for name, x in inputs(2, 3, 5, "none").items()}
    for name in WRT:
        given[name].requires_grad_()
    loss, stats = op(**given, **SCALARS)
    assert loss == 0
    assert all(x == 0 for x in stats)
    loss.backward()
    assert (given["logits"].grad == 0).all()
    assert (given["values"].grad == 0).all()


def test_is_its_parts(backend_name):
    given = inputs(4, 6, 7)
    logits, values = (given[name].clone().requires_grad_() for name in WRT)
    with rk.use_backend("torch"):
        advantages, returns, _, _ = rk.rollout_advantages(
            given["scores"],
            given["old_logprobs"],
            given["ref_logprobs"],
            given["attention"],
            given["old_values"],
            given["mask"],
            kl_coef=0.1,
            beta=0.7,
        )
        logprobs = rk.token_logprobs(logits, given["tokens"], given["mask"])
        constants = (given["old_logprobs"], advantages, values, given["old_values"], returns, given["mask"])
        expected, _ = rk.ppo_loss(logprobs, *constants)
        expected_gradients = torch.autograd.grad(expected, (logits, values))
    loss, _ = rk.fused_ppo_loss(**given | {"logits": logits, "values": values}, kl_coef=0.1, beta=0.7)
    close(loss, expected, rtol=1e-10)
    for a, b in zip(torch.autograd.grad(loss, (logits, values)), expected_gradients):
        close(a, b, rtol=1e-10, atol=1e-12)


def test_gradcheck(backend_name):
    given = inputs(2, 3, 4, "all")

    def loss(logits, values):
        return op(**given | {"logits": logits, "values": values}, **SCALARS)[0]

    assert torch.autograd.gradcheck(loss, [given[name].requires_grad_() for name in WRT])

import math

import pytest
import torch

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("policy_ref_logprobs",)


def inputs(shape, mask="random"):
    logits, ref_logits = 2 * torch.randn(2, *shape, dtype=torch.float64)
    tokens = torch.randint(shape[-1], shape[:-1])
    return {"logits": logits, "ref_logits": ref_logits, "tokens": tokens, "mask": oracle.masks(*shape[:-1])[mask]}


def formula(logits, ref_logits, tokens, mask, *, temperature=1.0):
    logprobs, entropy = oracle.token_logprobs_entropy(logits, tokens, mask, temperature=temperature)
    ref_logprobs = oracle.token_logprobs(ref_logits, tokens, mask, temperature=temperature)
    p, q = (torch.log_softmax(x[mask] / temperature, -1) for x in (logits, ref_logits))
    return logprobs, ref_logprobs, entropy, oracle.scatter(mask, (p.exp() * (p - q)).sum(-1))


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_values(backend_name, dtype):
    logits, uniform = torch.tensor([[1, 2, 3, 0]], dtype=dtype), torch.full((1, 4), 7, dtype=dtype)
    logprobs, ref_logprobs, entropy, kl = rk.policy_ref_logprobs(logits, uniform, torch.tensor([2]))
    close(logprobs, [3 - 3.440190])
    close(ref_logprobs, [-math.log(4)])
    close(entropy, [0.947537])
    close(kl, [0.438757])
    close(rk.policy_ref_logprobs(2 * logits, uniform, torch.tensor([2]), temperature=2.0)[3], [0.438757])


# lse is rounded to fp32 before it is subtracted from each of V log-probabilities.
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.LOGIT_SHAPES, ids=str)
def test_matches_formula(backend_name, shape, dtype):
    compare(rk.policy_ref_logprobs, formula, inputs(shape), wrt=("logits",), dtype=dtype, atol=5e-6)


@pytest.mark.parametrize("mask", ("none", "all"))
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_masks_and_layouts(backend_name, layout, mask):
    given = inputs((3, 5, 7), mask)
    compare(rk.policy_ref_logprobs, formula, given, wrt=("logits",), layout=layout, temperature=0.7)


def test_the_reference_is_a_constant(backend_name):
    given = inputs((3, 5, 7))
    given["logits"].requires_grad_()
    given["ref_logits"].requires_grad_()
    logprobs, ref_logprobs, entropy, kl = rk.policy_ref_logprobs(**given)
    assert not ref_logprobs.requires_grad
    (logprobs + entropy + kl).sum().backward()
    assert given["ref_logits"].grad is None
    assert given["logits"].grad.abs().sum() > 0


def test_equal_policies_have_no_kl(backend_name):
    given = inputs((3, 5, 33))
    logits = given["logits"].float().requires_grad_()
    *_, kl = rk.policy_ref_logprobs(logits, logits.detach().clone(), given["tokens"])
    close(kl.detach(), torch.zeros(3, 5))
    kl.sum().backward()
    close(logits.grad, torch.zeros(3, 5, 33))


@pytest.mark.parametrize("output", (0, 2, 3))
def test_one_output_used(backend_name, output):
    given = inputs((4, 5, 7))
    logits = given["logits"].requires_grad_()
    (actual,) = torch.autograd.grad(rk.policy_ref_logprobs(**given)[output].sum(), logits)
    (expected,) = torch.autograd.grad(formula(**given)[output].sum(), logits)
    close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_masked_rows_are_never_read(backend_name, garbage):
    clean = inputs((4, 5, 7))
    mask = clean["mask"]
    poisoned = clean | {name: oracle.poison(clean[name], mask, garbage) for name in ("logits", "ref_logits")}
    results = [oracle.evaluate(rk.policy_ref_logprobs, given, ("logits",), {}) for given in (clean, poisoned)]
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1]):
        assert torch.equal(a, b)
        assert (b[~mask] == 0).all()


def test_forbidden_tokens(backend_name):
    """Tokens forbidden in both take no part; a row that forbids everything gives 0."""
    given = inputs((3, 4, 9), "all")
    for name in ("logits", "ref_logits"):
        given[name][..., 6:] = -math.inf
    given["tokens"] %= 6
    given["logits"][0] = -math.inf
    values, gradients, _ = oracle.evaluate(rk.policy_ref_logprobs, given, ("logits",), {})
    cut = given | {name: given[name][1:, :, :6] for name in ("logits", "ref_logits")}
    cut |= {name: given[name][1:] for name in ("tokens", "mask")}
    for a, b in zip(values, formula(**cut)):
        close(a[1:], b, rtol=1e-10)
    assert (values[0][0] == -math.inf).all()
    assert (values[2][0] == 0).all()
    assert (values[3][0] == 0).all()
    assert gradients[0].isfinite().all()
    assert (gradients[0][given["logits"] == -math.inf] == 0).all()


def test_gradcheck(backend_name):
    given = inputs((3, 2, 5))

    def op(logits):
        logprobs, _, entropy, kl = rk.policy_ref_logprobs(**given | {"logits": logits}, temperature=0.8)
        return logprobs, entropy, kl

    assert torch.autograd.gradcheck(op, given["logits"].requires_grad_())

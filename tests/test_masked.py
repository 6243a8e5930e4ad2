import math

import pytest
import torch

import oracle
import rlhf_kernels as rk
from oracle import close, compare

X = [1.0, 2, 4, 7, 100]
MASK = torch.tensor([True, True, True, True, False])


def mean(x, mask):
    return oracle.mean(x[mask])


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_values(dtype):
    x = torch.tensor(X, dtype=dtype)
    close(rk.masked_mean(x, MASK), 3.5)
    close(rk.masked_whiten(x, MASK), [-1.091089, -0.654654, 0.218218, 1.527525, 0])
    close(rk.masked_whiten(x, MASK, unbiased=True), [-0.944911, -0.566947, 0.188982, 1.322876, 0])
    close(rk.masked_whiten(x, MASK, shift_mean=False), [2.408911, 2.845346, 3.718218, 5.027525, 0])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((0,), (7,), (3, 5), (2, 3, 4)), ids=str)
def test_matches_formula(shape, dtype):
    for kind in ("random", "none", "all"):
        x, mask = torch.randn(shape, dtype=torch.float64), oracle.masks(*shape)[kind]
        given = {"x": x, "mask": mask}
        compare(rk.masked_mean, mean, given, wrt=("x",), dtype=dtype)
        if mask.sum() != 1:  # one place has no deviation: below
            for shift in (True, False):
                compare(rk.masked_whiten, oracle.masked_whiten, given, dtype=dtype, shift_mean=shift)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(layout):
    given = {"x": torch.randn(3, 5, dtype=torch.float64), "mask": oracle.random_mask(3, 5)}
    compare(rk.masked_mean, mean, given, wrt=("x",), layout=layout)
    compare(rk.masked_whiten, oracle.masked_whiten, given, layout=layout)


def test_none_one_and_equal_places():
    x = torch.tensor([3.25, 9.0, 9.0])
    nothing, one = torch.tensor([0, 0, 0]), torch.tensor([1, 0, 0])
    assert rk.masked_mean(x, nothing) == 0
    assert rk.masked_whiten(x, nothing).tolist() == [0, 0, 0]
    assert rk.masked_whiten(x, one).tolist() == rk.masked_whiten(x, one, unbiased=True).tolist() == [0, 0, 0]
    assert rk.masked_whiten(x, one, shift_mean=False).tolist() == [3.25, 0, 0]
    assert rk.masked_whiten(x, torch.tensor([0, 1, 1])).tolist() == [0, 0, 0]
    close(rk.masked_whiten(x, torch.tensor([0, 1, 1]), shift_mean=False), [0.0, 9, 9])


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_masked_places_are_never_read(garbage):
    x = torch.tensor([1.0, 2, garbage, 4], requires_grad=True)
    mask = torch.tensor([1, 1, 0, 1])
    close(rk.masked_mean(x, mask).detach(), 7 / 3)
    whitened = rk.masked_whiten(x, mask)
    close(whitened.detach(), rk.masked_whiten(torch.tensor([1.0, 2, 0, 4]), mask))
    for result in (rk.masked_mean(x, mask), whitened.square().sum(), whitened[0]):
        (gradient,) = torch.autograd.grad(result, x, retain_graph=True)
        assert gradient.isfinite().all()
        assert gradient[2] == 0


def test_whitening_far_from_zero():
    """E[x²] − E[x]² would cancel in fp32: a spread of 1 around 3000."""
    x = 3000 + torch.randn(500)
    exact = x.double()
    expected = (exact - exact.mean()) / exact.std(correction=0)
    close(rk.masked_whiten(x, torch.ones(500)), expected, atol=1e-3)


def test_gradcheck():
    x, mask = torch.randn(3, 5, dtype=torch.float64, requires_grad=True), oracle.random_mask(3, 5)
    assert torch.autograd.gradcheck(lambda x: rk.masked_mean(x, mask), x)
    assert torch.autograd.gradcheck(lambda x: rk.masked_whiten(x, mask), x)

"""csrc/formulas.h, the scalar maths of the C++ and CUDA kernels, against the reference and autograd through it."""

import ctypes
import math
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

import oracle
from oracle import close
from rlhf_kernels import reference

HERE = Path(__file__).resolve().parent
DTYPES = {torch.float32: ("float", ctypes.c_float), torch.float64: ("double", ctypes.c_double)}
ESTIMATORS = ("k1", "k2", "k3", "abs", "pos")  # in the order of the enum


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    if shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler")
    target = tmp_path_factory.mktemp("formulas") / "formulas.so"
    flags = ["-O2", "-std=c++20", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{HERE.parent / 'csrc'}"]
    subprocess.run(["c++", *flags, str(HERE / "formulas.cpp"), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def call(library, name, results, tensors, *scalars):
    """`results` rows of what the C function makes of the tensors."""
    suffix, number = DTYPES[tensors[0].dtype]
    n = tensors[0].numel()
    out = torch.full((results, n), math.nan, dtype=tensors[0].dtype)
    pointers = [ctypes.c_void_p(x.contiguous().data_ptr()) for x in tensors]
    given = [number(x) if isinstance(x, float) else ctypes.c_int(x) for x in scalars]
    getattr(library, f"{name}_{suffix}")(*pointers, *given, ctypes.c_long(n), ctypes.c_void_p(out.data_ptr()))
    return out


def numbers(dtype):
    """Around zero, at bounds, far out, not finite."""
    special = [0.0, 1e-4, -1e-4, 0.2, -0.2, 20.0, -20.0, 20.5, -20.5, 90.0, -90.0, math.inf, -math.inf, math.nan]
    return torch.cat([torch.tensor(special), 3 * torch.randn(500)]).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ESTIMATORS)
def test_kl_estimate(library, kind, dtype):
    d = numbers(dtype)
    (got,) = call(library, "kl", 1, [d], ESTIMATORS.index(kind))
    close(got, reference.kl_estimate(d, kind))
    finite = d.isfinite() & (d.abs() <= 20)
    close(got[finite].double(), oracle.KL[kind](d[finite].double()), rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_difference(library, dtype):
    a, b = numbers(dtype), numbers(dtype).flip(0)
    a[:2] = b[:2] = -math.inf
    (got,) = call(library, "difference", 1, [a, b])
    close(got, reference.log_difference(a, b, torch.ones_like(a, dtype=torch.bool)))
    assert (got[:2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dual_clip", (-1.0, 3.0))
def test_policy_term(library, dual_clip, dtype):
    d = numbers(dtype)
    d = d[d.isfinite()].requires_grad_()
    advantage = torch.randn_like(d)
    low, high = 0.8, 1.3
    got = call(library, "policy", 6, [d.detach(), advantage], low, high, dual_clip)
    given = {"cliprange": 0.2, "cliprange_high": 0.3, "dual_clip": dual_clip if dual_clip > 0 else None}
    loss, _ = oracle.policy_loss(d, torch.zeros_like(d), advantage, **given)
    close(got[0], loss.detach())
    # At the bounds the op keeps the gradient, autograd's clamp does too; beyond ±20 neither has one.
    (derivative,) = torch.autograd.grad(loss.sum(), d)
    close(got[1], derivative)
    ratio = d.detach().clamp(-20, 20).exp()
    close(got[2], d.detach().clamp(-20, 20))
    close(got[3], ratio)
    close(got[4], (advantage > 0) & (ratio > high))
    close(got[5], (advantage < 0) & (ratio < low))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_policy_term_at_the_bounds(library, dtype):
    """A ratio of exactly 1 ± ε keeps its gradient; NaN shows."""
    bound = torch.tensor([1.25, 0.75], dtype=torch.float64).log().to(dtype)
    d = torch.cat([bound, torch.tensor([math.nan], dtype=dtype)])
    advantage = torch.tensor([1.0, -1.0, 1.0], dtype=dtype)
    low, high = float(bound[1].exp()), float(bound[0].exp())
    loss, derivative, *_ = call(library, "policy", 6, [d, advantage], low, high, -1.0)
    close(derivative[:2], [-1.25, 0.75])
    assert loss[2].isnan() and derivative[2].isnan()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cliprange", (0.2, -1.0))
def test_value_term(library, cliprange, dtype):
    value, old, target = (torch.randn(500, dtype=dtype) for _ in range(3))
    value[:9] = old[:9] + torch.tensor([-3, -0.5, -0.2, -0.1, 0, 0.1, 0.2, 0.5, 3], dtype=dtype)
    got = call(library, "value", 3, [value, old, target], cliprange)
    leaf = value.clone().requires_grad_()
    error = (leaf - target) ** 2
    clipped = torch.zeros_like(error) if cliprange < 0 else (old + (leaf - old).clamp(-0.2, 0.2) - target) ** 2
    loss = torch.maximum(error, clipped) / 2
    close(got[0], loss.detach())
    (derivative,) = torch.autograd.grad(loss.sum(), leaf)
    tied = (error == clipped).detach()  # autograd splits the gradient of a tie; inside the clip both are the same error
    close(got[1][~tied], derivative[~tied])
    close(got[1][tied], (value - target)[tied])
    outside = (value - old).abs() > cliprange if cliprange > 0 else torch.zeros_like(tied)
    close(got[2], (outside & (clipped > error)).detach())

"""KL estimates, their gradients as losses, and the controllers."""

import itertools

import pytest
import torch

from rlhf.kl_control import measured_kl
from rlhf.kl_penalty import IN_LOSS, KINDS, kl_penalty

MASK = torch.tensor([[True, True, True, False]])


def tensors(**changes):
    lp = torch.tensor([[-1.0, -2.0, -0.5, torch.nan]], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([[-1.2, -1.0, -3.5, torch.nan]], dtype=torch.float64)
    return lp, ref


@pytest.mark.parametrize(
    ("kind", "value", "gradient"),
    [
        ("k1", [0.2, -1, 3], [1, 1, 1]),
        ("k2", [0.02, 0.5, 4.5], [0.2, -1, 3]),
        ("k3", [0.018731, 0.718282, 2.049787], [0.181269, -1.718282, 0.950213]),
        ("abs", [0.2, 1, 3], [1, -1, 1]),
        ("pos", [0.2, 0, 3], [1, 0, 1]),
        ("k1+", [0.2, -1, 3], [0.2, -1, 3]),
        ("k3+", [0.018731, 0.718282, 2.049787], [0.2, -1, 3]),
    ],
)
def test_known_values(kind, value, gradient):
    lp, ref = tensors()
    kl = kl_penalty(kind, lp, ref, MASK)
    (got,) = torch.autograd.grad(kl.sum(), lp)
    assert kl.tolist()[0] == pytest.approx([*value, 0], abs=1e-6)
    assert got.tolist()[0] == pytest.approx([*gradient, 0], abs=1e-6)


def test_importance_weighted_k3():
    """ρ·k3 with gradient ρ·(k3 + 1 − exp(−D))."""
    lp, ref = tensors()
    old = lp.detach() - torch.tensor([0.1, -0.3, 0.0, 0.0])
    kl = kl_penalty("k3-is", lp, ref, MASK, old_logprobs=old)
    (gradient,) = torch.autograd.grad(kl.sum(), lp)
    ratio, k3 = (lp - old)[0, :3].exp(), torch.tensor([0.018731, 0.718282, 2.049787])
    torch.testing.assert_close(kl[0, :3], ratio * k3, rtol=1e-5, atol=1e-6)
    slope = torch.tensor([0.181269, -1.718282, 0.950213])
    torch.testing.assert_close(gradient[0, :3], ratio * (k3 + slope), rtol=1e-5, atol=1e-6)


def test_clip():
    lp, ref = tensors()
    assert kl_penalty("k1", lp, ref, MASK, clip=0.5).tolist() == [[pytest.approx(0.2), -0.5, 0.5, 0]]


def test_full_is_given():
    lp, ref = tensors()
    full = torch.tensor([[0.1, 0.2, 0.3, torch.nan]])
    assert kl_penalty("full", lp, ref, MASK, full=full)[0, :3].tolist() == pytest.approx([0.1, 0.2, 0.3])
    with pytest.raises(ValueError, match="full must be given"):
        kl_penalty("full", lp, ref, MASK)
    with pytest.raises(ValueError, match="kind must be one of k1"):
        kl_penalty("k4", lp, ref, MASK)


@pytest.mark.parametrize("kind", IN_LOSS)
def test_expected_gradients(kind):
    """Over samples of a two-token policy, enumerated: which estimate has the gradient of which KL."""
    logits = torch.tensor([0.3, -0.4, 0.9], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.1, 0.5, -0.2], dtype=torch.float64).log_softmax(0)
    logprobs = logits.log_softmax(0)
    p = logprobs.detach().exp()
    exact = (logprobs.exp() * (logprobs - ref)).sum()
    (reverse,) = torch.autograd.grad(exact, logits, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logprobs)).sum(), logits, retain_graph=True)

    mask = torch.ones(3, 1, dtype=torch.bool)
    full = exact.expand(3, 1) if kind == "full" else None
    kl = kl_penalty(kind, logprobs[:, None], ref[:, None], mask, old_logprobs=logprobs.detach()[:, None], full=full)
    (gradient,) = torch.autograd.grad((p[:, None] * kl).sum(), logits)
    if kind == "k1":
        torch.testing.assert_close(gradient, torch.zeros(3, dtype=torch.float64))
    elif kind == "k3":
        torch.testing.assert_close(gradient, forward)
    elif kind != "abs":
        torch.testing.assert_close(gradient, reverse)


@pytest.mark.parametrize(("kind", "clip"), list(itertools.product(KINDS, (None, 10.0))))
def test_far_apart_stays_finite(kind, clip):
    lp = torch.tensor([[-700.0, -1.0, -torch.inf]], requires_grad=True)
    ref = torch.tensor([[-1.0, -700.0, -torch.inf]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    kl = kl_penalty(kind, lp, ref, mask, old_logprobs=lp.detach(), full=torch.ones(1, 3), clip=clip)
    assert kl.isfinite().all()
    if kind != "full":
        (gradient,) = torch.autograd.grad(kl.sum(), lp)
        assert gradient.isfinite().all()
        assert kl[0, 2] == 0


def test_measures():
    kl = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])
    assert measured_kl(kl, mask, "seq_sum") == pytest.approx((6 + 4) / 2)
    assert measured_kl(kl, mask, "token_mean") == pytest.approx((2 + 4) / 2)

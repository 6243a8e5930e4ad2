"""The policy losses: values and gradients by hand, against fp64 autograd of their formulas, weights of the tokens."""

import math

import pytest
import torch

from rlhf.policy_losses import AGGREGATIONS, POLICY_LOSSES, Clips, policy_loss, token_weights, value_loss


def one(kind, ratio, advantage, **clips):
    """Loss and its derivative by the log-probability for a response of one token whose log-probability is −1."""
    logprobs = torch.full((1, 1), -1.0, dtype=torch.float64, requires_grad=True)
    old = logprobs.detach() - math.log(ratio)
    mask, rows = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, dtype=torch.float64)
    advantages = torch.tensor([[advantage]], dtype=torch.float64)
    loss, stats = policy_loss(kind, logprobs, old, advantages, mask, rows, Clips(**clips))
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.item(), gradient.item(), {name: value.item() for name, value in stats.items()}


@pytest.mark.parametrize(
    ("kind", "ratio", "advantage", "clips", "loss", "gradient"),
    [
        ("ppo", 0.5, 1.0, {}, -0.5, -0.5),
        ("ppo", 1.5, 1.0, {}, -1.2, 0.0),
        ("ppo", 0.5, -1.0, {}, 0.8, 0.0),
        ("ppo", 4.0, -1.0, {}, 4.0, 4.0),
        ("ppo", 4.0, -1.0, {"dual": 3.0}, 3.0, 0.0),
        ("ppo", 1.25, 1.0, {"high": 0.28}, -1.25, -1.25),
        ("gspo", 1.5, 1.0, {}, -1.2, 0.0),
        ("gspo", 0.9, -2.0, {}, 1.8, 1.8),
        ("gspo_token", 0.9, -2.0, {}, 1.8, 1.8),
        # −clip(ρ)·A·logprob and −clip(ρ)·A: the gradient outlives the clip.
        ("cispo", 1.5, 1.0, {}, 1.2, -1.2),
        ("cispo", 0.5, -1.0, {}, -0.8, 0.8),
        ("cispo", 0.5, 1.0, {"cispo_cap": 5.0}, 0.5, -0.5),
        ("cispo", 8.0, 1.0, {"cispo_cap": 5.0}, 5.0, -5.0),
        ("cispo", 1.0, 1.0, {"cispo_cap": 0.2}, 0.2, -0.2),
        # At ρ = 1 the gate is 2/τ and its slope by log ρ is 1, whatever τ.
        ("sapo", 1.0, 1.0, {}, -2.0, -1.0),
        ("sapo", 1.0, -1.0, {}, 2 / 1.05, 1.0),
        ("sapo", 2.0, 1.0, {}, -4 / (1 + math.exp(-1)), -8 * math.exp(-1) / (1 + math.exp(-1)) ** 2),
        # gmpo clips the log-ratio, not the ratio.
        ("gmpo", math.exp(0.5), 1.0, {}, -math.exp(0.2), 0.0),
        ("gmpo", math.exp(-0.5), 1.0, {}, -math.exp(-0.5), -math.exp(-0.5)),
        ("gmpo", math.exp(-0.5), -1.0, {}, math.exp(-0.2), 0.0),
        ("gpg", 3.0, 2.0, {}, 2.0, -2.0),
    ],
)
def test_one_token(kind, ratio, advantage, clips, loss, gradient):
    got = one(kind, ratio, advantage, **clips)
    assert got[0] == pytest.approx(loss, abs=1e-7)
    assert got[1] == pytest.approx(gradient, abs=1e-7)


@pytest.mark.parametrize("ratio", [0.3, 0.9, 1.1, 1.25, 3.9, 4.1, 30.0])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_two_sided_clip_is_the_dual_clip(ratio, advantage):
    """max(−A·min(ρ, δ), −A·clip(ρ)) for δ = 4, as TRL writes it."""
    lp = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    rho = lp.exp()
    written = torch.maximum(-advantage * rho.clamp(max=4.0), -advantage * rho.clamp(0.8, 1.2))
    written.backward()
    loss, gradient, _ = one("ppo", ratio, advantage, dual=4.0)
    assert loss == pytest.approx(written.item())
    assert gradient == pytest.approx(lp.grad.item())


# Responses of 3, 1 and no tokens; what stands at the others must not matter.
MASK = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


@pytest.fixture
def batch():
    torch.manual_seed(0)
    old = -torch.rand(3, 3, dtype=torch.float64) * 3
    logprobs = (old + 0.6 * torch.randn(3, 3, dtype=torch.float64)).requires_grad_()
    advantages = torch.tensor([[1.5, -0.5, -1.0], [-2.0, 7, 7], [7, 7, 7]], dtype=torch.float64)
    return logprobs, old, advantages


def formulas(kind, lp, old, advantages):
    """[3, 3]: the losses of the tokens, written for one response after another."""
    total = torch.zeros(3, 3, dtype=torch.float64)
    for b, n in ((0, 3), (1, 1)):
        u, a = lp[b, :n] - old[b, :n], advantages[b, :n]
        mean = u.mean()
        if kind == "gspo":
            rows = torch.maximum(-a * mean.exp(), -a * mean.exp().clamp(0.8, 1.3))
        elif kind == "gspo_token":
            s = (lp[b, :n] - lp[b, :n].detach() + mean.detach()).exp()
            rows = torch.maximum(-a * s, -a * s.clamp(0.8, 1.3))
        elif kind == "gmpo":
            sign = a.sign()
            bounded = sign * torch.minimum(sign * u, sign * u.clamp(-0.2, 0.3))
            rows = (-a.mean() * bounded.mean().exp()).expand(n)
        elif kind == "cispo":
            rows = -u.exp().clamp(0.8, 1.3).detach() * a * lp[b, :n]
        elif kind == "sapo":
            tau = torch.where(a > 0, 1.0, 1.05)
            rows = -a * 4 / tau / (1 + (-tau * (u.exp() - 1)).exp())
        elif kind == "gpg":
            rows = -a * lp[b, :n]
        else:
            rows = torch.maximum(-a * u.exp(), -a * u.exp().clamp(0.8, 1.3))
        total = total.index_put((torch.tensor(b), torch.arange(n)), rows)
    return total


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_against_the_formula(kind, aggregation, batch):
    logprobs, old, advantages = batch
    weights = token_weights(aggregation, MASK, 5)
    loss, stats = policy_loss(
        kind, logprobs, old, advantages, MASK, weights.rows.double(), Clips(low=0.2, high=0.3)
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, logprobs, retain_graph=True)
    matrix = formulas(kind, logprobs, old, advantages)
    sums = matrix.sum(1)
    expected = {
        "token-mean": matrix.sum() / 4,
        "seq-mean-token-mean": (sums[0] / 3 + sums[1]) / 2,
        "seq-mean-token-sum": sums.sum() / 2,
        "constant-length": sums.sum() / (3 * 5),
        "seq-mean-token-sum-norm": sums.sum() / 5,
    }[aggregation]
    (wanted,) = torch.autograd.grad(expected, logprobs)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(gradient, wanted, rtol=1e-6, atol=1e-9)
    assert (gradient[~MASK] == 0).all()
    assert stats["tokens"] == 4 and stats["policy_loss"] == pytest.approx(loss.item())


@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_what_is_masked_is_never_read(kind, batch):
    logprobs, old, advantages = batch
    rows = token_weights("token-mean", MASK, 3).rows.double()
    clean, _ = policy_loss(kind, logprobs, old, advantages, MASK, rows, Clips())
    dirty = torch.where(MASK, logprobs, torch.nan).detach().requires_grad_()
    loss, stats = policy_loss(
        kind, dirty, torch.where(MASK, old, -torch.inf), torch.where(MASK, advantages, torch.nan), MASK, rows, Clips()
    )
    assert loss.item() == pytest.approx(clean.item())
    (gradient,) = torch.autograd.grad(loss, dirty)
    assert gradient[~MASK].eq(0).all() and gradient.isfinite().all()
    assert all(value.isfinite() for value in stats.values())


@pytest.mark.parametrize("kind", POLICY_LOSSES)
def test_an_empty_minibatch(kind):
    logprobs = torch.zeros(2, 3, requires_grad=True)
    nothing = torch.zeros(2, 3)
    mask = nothing.bool()
    rows = token_weights("seq-mean-token-mean", mask, 3).rows
    loss, _ = policy_loss(kind, logprobs, nothing, nothing, mask, rows, Clips())
    loss.backward()
    assert loss == 0 and (logprobs.grad == 0).all()


def test_statistics():
    """Ratios e^0.5, e^−0.5, e², e^25 with advantages 1, −1, −1, 1; the last log-ratio is clamped."""
    difference = torch.tensor([[0.5, -0.5, 2.0, 25.0]], dtype=torch.float64)
    old, mask = torch.full_like(difference, -30.0), torch.ones(1, 4, dtype=torch.bool)
    advantages = torch.tensor([[1.0, -1, -1, 1]], dtype=torch.float64)
    _, stats = policy_loss("ppo", old + difference, old, advantages, mask, torch.ones(1).double(), Clips(dual=3.0))
    d = difference.clamp(max=20)
    expected = {
        "approx_kl": (0.25 + 0.25 + 4 + 625) / 8,
        "k1": -(0.5 - 0.5 + 2 + 25) / 4,
        "k3": (d.exp() - 1 - d).mean().item(),
        "ratio_mean": d.exp().mean().item(),
        "ratio_max": math.exp(20),
        "clipfrac_high": 0.5,
        "clipfrac_low": 0.25,
        "clipfrac_dual": 0.25,
        "clipfrac_ratio": 0.25,
        "tokens": 4,
    }
    assert {name: stats[name].item() for name in expected} == pytest.approx(expected, rel=1e-5)


def test_value_loss():
    values = torch.tensor([[1.0, 2.0, 9.0]], dtype=torch.float64, requires_grad=True)
    old, returns = torch.tensor([[0.5, 1.9, 9.0]]).double(), torch.tensor([[2.0, 3.0, 0.0]]).double()
    mask, half = torch.tensor([[True, True, False]]), torch.tensor(0.5, dtype=torch.float64)
    # Clipped to 0.7 the first is further from 2; the second stays within 0.2 of its old value.
    loss, stats = value_loss(values, old, returns, mask, half, 0.2)
    (gradient,) = torch.autograd.grad(loss, values)
    assert loss.item() == pytest.approx(0.5 * 0.5 * (1.3**2 + 1))
    assert gradient.tolist() == [[0.0, -0.5, 0.0]]
    assert stats["clipfrac_value"] == 0.5
    free, _ = value_loss(values, old, returns, mask, half, None)
    assert free.item() == pytest.approx(0.5 * 0.5 * 2)


def test_unknown_names():
    with pytest.raises(ValueError, match="aggregation must be one of token-mean"):
        token_weights("mean", MASK, 3)
    with pytest.raises(ValueError, match="kind must be one of ppo, gspo"):
        policy_loss("ppo2", *torch.zeros(3, 3, 3), MASK, torch.ones(3), Clips())

"""Which reward shaping keeps the policy gradient, by exact enumeration of a Markov decision process of two steps.

Two tokens, each 0 or 1; the policy is a table of logits, one for the first token and one for the second after each
first. Every response is weighted with its probability, so the expectations below are exact.
"""

import pytest
import torch

import rlhf_kernels as rk
from rlhf.advantages import total_return
from rlhf.credit import shaped_scores, spread

RESPONSES = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]])
SCORES = torch.tensor([1.0, -0.5, 0.25, 2.0], dtype=torch.float64)
ATTENTION = torch.tensor([[0.9, 0.1], [0.3, 0.7], [0.5, 0.5], [0.2, 0.8]], dtype=torch.float64)  # depends on the future
PREFIX = torch.tensor([0.4, 0.4, 1.1, 1.1], dtype=torch.float64)  # the score of the first token alone
MASK = torch.ones(4, 2, dtype=torch.bool)
LOGITS = torch.tensor([0.3, -0.4, 0.8], dtype=torch.float64)

CREDIT = {
    "terminal": spread(SCORES, None, MASK).double(),
    "uniform": torch.stack([SCORES / 2, SCORES / 2], 1),
    "abc": ATTENTION * SCORES[:, None],
    "prefix-diff": torch.stack([PREFIX, SCORES - PREFIX], 1),
    "causal": torch.stack([0.3 * PREFIX.exp(), SCORES - 0.3 * PREFIX.exp()], 1),
}


def log_probabilities(logits):
    """[4, 2]: log π of each response's tokens."""
    first = RESPONSES[:, 0]
    signs = 2 * RESPONSES.double() - 1
    return torch.nn.functional.logsigmoid(signs * torch.stack([logits[0].expand(4), logits[1:][first]], 1))


def true_gradient(gamma=1.0):
    logits = LOGITS.clone().requires_grad_()
    (gamma * log_probabilities(logits).sum(1).exp() * SCORES).sum().backward()
    return logits.grad


def estimated_gradient(rewards, estimator, gamma=1.0):
    """E[Σ_t ∇ log π_t · A_t] with the advantages of the estimator, exactly."""
    logits = LOGITS.clone().requires_grad_()
    logprobs = log_probabilities(logits)
    values = torch.zeros(4, 2, dtype=torch.float64)
    if estimator == "gae":  # λ = 1: the reward to go
        advantages, _ = rk.gae(rewards, values, MASK, gamma=gamma, lam=1.0)
        # The gradient of the discounted return weighs step t with γ^t.
        advantages = advantages * gamma ** torch.arange(2)
    else:
        advantages, _ = total_return(rewards, values, MASK, gamma)
    (logprobs.sum(1).exp().detach()[:, None] * logprobs * advantages).sum().backward()
    return logits.grad


@pytest.mark.parametrize("estimator", ["gae", "total_return"])
@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", CREDIT)
def test_which_shaping_keeps_the_gradient(kind, beta, estimator):
    """Terminal and causal credit do with any estimator, hindsight with the total return or at β = 0 alone."""
    found = estimated_gradient(shaped_scores(CREDIT[kind], MASK, beta=beta), estimator)
    biased = kind in ("abc", "uniform") and beta > 0 and estimator == "gae"
    assert torch.allclose(found, true_gradient(), atol=1e-6) != biased


def test_the_bias_in_numbers():
    """By hand: P(1) = σ(.3) = .574443, Q(1 | 0) = σ(−.4) = .401312, Q(1 | 1) = σ(.8) = .689974.

    What attention at β = 1 forgets of the second token's gradient is the credit that the first token got.
    """
    p, q, r = (1 / (1 + torch.exp(-LOGITS))).tolist()
    true = [
        p * (1 - p) * ((1 - r) * 0.25 + r * 2 - (1 - q) * 1 + q * 0.5),
        (1 - p) * q * (1 - q) * (-0.5 - 1),
        p * r * (1 - r) * (2 - 0.25),
    ]
    assert true_gradient().tolist() == pytest.approx(true, abs=1e-12)
    hindsight = [
        true[0],
        (1 - p) * q * (1 - q) * (0.7 * -0.5 - 0.1 * 1),
        p * r * (1 - r) * (0.8 * 2 - 0.5 * 0.25),
    ]
    found = estimated_gradient(shaped_scores(CREDIT["abc"], MASK, beta=1.0), "gae")
    assert found.tolist() == pytest.approx(hindsight, abs=1e-12)
    assert true == pytest.approx([0.258985, -0.153367, 0.215038], abs=1e-6)
    assert hindsight == pytest.approx([0.258985, -0.046010, 0.181246], abs=1e-6)


@pytest.mark.parametrize("gamma", [0.5, 0.9])
@pytest.mark.parametrize("kind", CREDIT)
def test_the_potential_form_keeps_discounted_returns(kind, gamma):
    rewards = shaped_scores(CREDIT[kind], MASK, beta=0.8, gamma=gamma)
    discounted = rewards @ torch.tensor([1.0, gamma], dtype=torch.float64)
    torch.testing.assert_close(discounted, gamma * SCORES, rtol=1e-6, atol=1e-6)
    # and with it the gradient, with the total return for any credit, with the reward to go for a causal one
    assert torch.allclose(estimated_gradient(rewards, "total_return", gamma), true_gradient(gamma), atol=1e-6)
    if kind in ("terminal", "prefix-diff", "causal"):
        assert torch.allclose(estimated_gradient(rewards, "gae", gamma), true_gradient(gamma), atol=1e-6)
    # γ = 1 in the shaping with a smaller γ in the returns does not, unless all of it comes at the end
    plain = shaped_scores(CREDIT[kind], MASK, beta=0.8) @ torch.tensor([1.0, gamma], dtype=torch.float64)
    assert torch.allclose(plain, gamma * SCORES, atol=1e-6) == (kind == "terminal")


def test_total_return():
    rewards = torch.tensor([[1.0, -2.0, 4.0, 9.0], [0.5, 0.0, 9.0, 9.0]])
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    values = torch.tensor([[1.0, 2.0, 3.0, 9.0], [0.0, 1.0, 9.0, 9.0]])
    advantages, returns = total_return(rewards, values, mask, 0.5)
    assert returns.tolist() == [[1.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.0, 0.0]]  # 1 − 1 + 1, 0.5
    assert advantages.tolist() == [[0.0, -1.0, -2.0, 0.0], [0.5, -0.5, 0.0, 0.0]]

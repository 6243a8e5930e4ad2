"""Where the score lands, whitening, and the estimators: numbers worked out by hand."""

import pytest
import torch

import rlhf_kernels as rk
from rlhf.advantages import Rewards, advantages_and_returns, place_rewards, score_column, through
from rlhf.ppo_config import PpoConfig

# "a b EOS pad pad" beside a response that fills all five columns.
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def settings(**changes):
    return PpoConfig(init="i", rm="r", out="o", **{"batch_size": 4, **changes})


def given(rewards, values=None, mask=None, groups=None, **more):
    tokens = torch.tensor(rewards)
    mask = torch.ones_like(tokens).bool() if mask is None else torch.tensor(mask).bool()
    zeros = torch.zeros(len(tokens), 1)
    values = torch.zeros_like(tokens) if values is None else torch.tensor(values)
    return Rewards(
        torch.cat([tokens, zeros], 1),
        torch.cat([values, zeros + 9], 1) if values.shape == tokens.shape else values,
        mask,
        torch.cat([mask, zeros.bool()], 1),
        torch.arange(len(tokens)) if groups is None else torch.tensor(groups),
        **more,
    )


# --- where the score lands ---


@pytest.mark.parametrize(
    ("position", "pad_is_eos", "columns"),
    [
        ("eos", False, [2, 4]),
        ("eos", True, [2, 4]),
        ("after_eos", False, [3, 4]),
        ("last_column", False, [4, 4]),
        ("trlx", False, [4, 4]),
        ("trlx", True, [3, 4]),
    ],
)
def test_score_position(position, pad_is_eos, columns):
    found = score_column(position, MASK, response_length=5, pad_is_eos=pad_is_eos)
    assert found.tolist() == columns
    rewards = place_rewards(torch.where(MASK, 0.5, 0.0), torch.zeros(2, 5), found, position)
    if position != "eos":
        assert rewards.tolist() == [[1.5 * (c == columns[0]) for c in range(6)], [2.5 * (c == 4) for c in range(6)]]
    counted = through(found, MASK)
    assert counted.sum(1).tolist() == [columns[0] + 1, 5] and not counted[:, 5].any()


def test_score_after_eos_of_the_longest_response():
    """It may have been longer, so there is a place after its EOS: the column after the last."""
    assert score_column("after_eos", MASK, response_length=8).tolist() == [3, 5]
    assert through(torch.tensor([3, 5]), MASK).sum(1).tolist() == [4, 6]
    assert score_column("trlx", MASK, response_length=8).tolist() == [4, 4]


@pytest.mark.parametrize("position", ["eos", "after_eos", "last_column", "trlx"])
def test_a_row_without_tokens_has_no_place(position):
    mask = torch.tensor([[0, 0], [1, 1]]).bool()
    column = score_column(position, mask, response_length=2)
    assert column[0] == -1 and not through(column, mask)[0].any()


def test_score_after_eos_reaches_the_eos_action_through_the_value():
    """δ of EOS is V(after) − V(EOS), and the score comes back by γλ: what N+ and TRL's PPOTrainer compute."""
    rewards, values = [[0.0, 0, 0, 2]], [[0.1, 0.2, 0.3, 0.5, 7]]
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    parts = Rewards(
        torch.tensor([[*rewards[0], 0.0]]),
        torch.tensor(values),
        mask,
        torch.tensor([[1, 1, 1, 1, 0]]).bool(),
        torch.zeros(1).long(),
    )
    advantages, returns = advantages_and_returns(parts, settings(whiten_advantages=False))
    last = 2 - 0.5
    eos = 0.5 - 0.3 + 0.95 * last
    second = 0.3 - 0.2 + 0.95 * eos
    torch.testing.assert_close(advantages, torch.tensor([[0.2 - 0.1 + 0.95 * second, second, eos, 0]]), **CLOSE)
    torch.testing.assert_close(returns[0, 2:], torch.tensor([eos + 0.3, 2.0, 0]), **CLOSE)


# --- GAE and whitening ---

GAE = {"rewards": [[0.1, -0.2, 0, 1, 0, 0]], "values": [[0.5, 0.4, 0.3, 0.2, 9, 9]], "mask": [[1, 1, 1, 1, 0, 0]]}


@pytest.mark.parametrize(
    ("gamma", "lam", "expected"),
    [
        (1.0, 0.95, [0.31065, 0.327, 0.66, 0.8]),
        (1.0, 1.0, [0.4, 0.4, 0.7, 0.8]),
        (0.0, 0.5, [-0.4, -0.6, -0.3, 0.8]),
        (0.9, 0.8, [-0.04121, -0.00168, 0.456, 0.8]),
    ],
)
def test_gae(gamma, lam, expected):
    config = settings(gamma=gamma, lam=lam, whiten_advantages=False)
    advantages, returns = advantages_and_returns(given(**GAE), config)
    assert advantages[0].tolist() == pytest.approx([*expected, 0, 0], abs=1e-5)
    assert returns[0, :4].tolist() == pytest.approx([a + v for a, v in zip(expected, GAE["values"][0])], abs=1e-5)


def test_a_lambda_of_the_returns_own():
    config = settings(lam=0.95, lam_value=1.0, whiten_advantages=False)
    advantages, returns = advantages_and_returns(given(**GAE), config)
    assert advantages[0, :4].tolist() == pytest.approx([0.31065, 0.327, 0.66, 0.8], abs=1e-5)
    assert returns[0, :4].tolist() == pytest.approx([0.9, 0.8, 1.0, 1.0], abs=1e-5)


def test_bootstrap_is_the_value_of_what_would_have_followed():
    """As if one more step, worth its value, stood after the response."""
    config = settings(gamma=0.9, lam=0.8, whiten_advantages=False)
    cut = given([[0.1, -0.2]], [[0.5, 0.4]], bootstrap=torch.tensor([0.9 * 0.7]))
    advantages, _ = advantages_and_returns(cut, config)
    second = -0.2 + 0.9 * 0.7 - 0.4
    assert advantages[0].tolist() == pytest.approx([0.1 + 0.9 * 0.4 - 0.5 + 0.72 * second, second])


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, [-1.091089, -0.654654, 0.218218, 1.527525, 0]),
        ({"whiten_variance": "unbiased"}, [-0.944911, -0.566947, 0.188982, 1.322876, 0]),
        # The padding is a zero among five numbers: mean 2.8, biased variance 6.16.
        ({"whiten_mask": "all"}, [-0.725241, -0.322329, 0.483494, 1.692228, 0]),
    ],
)
def test_whitened_advantages(changes, expected):
    """γ = 0 and no values: the advantages are the rewards."""
    parts = given([[1.0, 2, 4, 7, 100]], mask=[[1, 1, 1, 1, 0]])
    advantages, returns = advantages_and_returns(parts, settings(gamma=0.0, **changes))
    assert advantages[0].tolist() == pytest.approx(expected, abs=1e-5)
    assert returns[0, :4].tolist() == [1, 2, 4, 7]


def test_whitened_rewards_keep_their_mean():
    parts = given([[1.0, 2, 4, 7, 100]], mask=[[1, 1, 1, 1, 0]])
    config = settings(gamma=0.0, whiten_rewards=True, whiten_advantages=False)
    advantages, _ = advantages_and_returns(parts, config)
    assert advantages[0].tolist() == pytest.approx([2.408911, 2.845346, 3.718218, 5.027525, 0], abs=1e-5)


# --- without a value model ---


@pytest.mark.parametrize(
    ("estimator", "expected"),
    [
        ("rloo", [0, -1.333333, -1.333333, 2.666667]),
        ("grpo", [0, -0.707057, -0.707057, 1.414114]),
        ("dr_grpo", [0, -1, -1, 2]),
    ],
)
def test_groups(estimator, expected):
    """Returns 1, 0, 0, 3 of one prompt, each over two tokens; another prompt's responses change nothing."""
    rewards = [[0.4, 0.6], [0.0, 0], [-1, 1], [0, 3], [50, 0], [60, 0], [70, 0], [80, 0]]
    config = settings(estimator=estimator, num_generations=4, batch_size=8)
    advantages, returns = advantages_and_returns(given(rewards, groups=[0] * 4 + [1] * 4), config)
    assert advantages[:4, 0].tolist() == pytest.approx(expected, abs=1e-5)
    assert torch.equal(advantages[:, 0], advantages[:, 1]) and not returns.any()


def test_opo():
    """Lengths 1 and 3, returns 4 and 0: the baseline is (1·4 + 3·0) / 4."""
    parts = given([[4.0, 0, 0], [0, 0, 0]], mask=[[1, 0, 0], [1, 1, 1]], groups=[7, 7])
    advantages, _ = advantages_and_returns(parts, settings(estimator="opo", num_generations=2))
    assert advantages.tolist() == [[3, 0, 0], [-1, -1, -1]]


def test_reinforce_plus_plus():
    """The reward to go, discounted, then whitened over all tokens."""
    parts = given([[1.0, 2, 4], [8, 0, 0]], mask=[[1, 1, 1], [1, 0, 0]])
    plain, _ = advantages_and_returns(parts, settings(estimator="reinforce++", gamma=0.5, whiten_advantages=False))
    assert plain.tolist() == [[1 + 0.5 * 4, 4, 4], [8, 0, 0]]
    whitened, _ = advantages_and_returns(parts, settings(estimator="reinforce++", gamma=0.5))
    torch.testing.assert_close(whitened, rk.masked_whiten(plain, parts.mask))


def test_reinforce_plus_plus_baseline():
    """Returns 3 and 1 of one prompt: ±1 over 2 and 1 tokens, whitened: mean 1/3, variance 8/9."""
    parts = given([[1.0, 2], [1, 0]], mask=[[1, 1], [1, 0]], groups=[0, 0])
    config = settings(estimator="reinforce++-baseline", num_generations=2)
    advantages, _ = advantages_and_returns(parts, config)
    std = (8 / 9) ** 0.5
    assert advantages.flatten().tolist() == pytest.approx([2 / 3 / std, 2 / 3 / std, -4 / 3 / std, 0], abs=1e-5)


def test_remax():
    parts = given([[1.0, 2], [5, 0]], mask=[[1, 1], [1, 0]], baseline=torch.tensor([0.5, 4.0]))
    advantages, _ = advantages_and_returns(parts, settings(estimator="remax"))
    assert advantages.tolist() == [[2.5, 1.5], [1, 0]]


def test_responses_without_a_score_or_tokens_are_left_out():
    parts = given([[1.0], [3], [99]], mask=[[1], [1], [0]], groups=[0, 0, 0])
    for estimator, best in (("rloo", 2), ("opo", 1), ("dr_grpo", 1)):
        config = settings(estimator=estimator, num_generations=2)
        advantages, _ = advantages_and_returns(parts, config)
        assert advantages.flatten().tolist() == [-best, best, 0]


def test_a_response_left_out_of_the_loss_still_counts_in_its_group():
    """missing_eos mask: its score is part of the others' baseline."""
    parts = given([[1.0], [3], [8]], groups=[0, 0, 0])
    parts.mask[2] = False
    advantages, _ = advantages_and_returns(parts, settings(estimator="dr_grpo", num_generations=2))
    assert advantages.flatten().tolist() == [-3, -1, 0]


def test_rows_of_a_minibatch():
    parts = given([[1.0, 2], [3, 4], [5, 6]], bootstrap=torch.tensor([1.0, 2, 3]))
    rows = parts.rows(torch.tensor([2, 0]))
    assert rows.tokens[:, :2].tolist() == [[5, 6], [1, 2]] and rows.bootstrap.tolist() == [3, 1]
    assert rows.baseline is None and rows.groups.tolist() == [2, 0]

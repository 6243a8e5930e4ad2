"""The presets of `rlhf ppo` against their references: numbers worked out from the references' definitions."""

import dataclasses

import pytest
import torch

from rlhf.advantages import Rewards, advantages_and_returns, place_rewards, score_column, through, whiten
from rlhf.kl_control import adapt_kl_coef
from rlhf.kl_penalty import kl_penalty
from rlhf.policy_losses import policy_loss, token_weights, value_loss
from rlhf.ppo_config import PpoConfig
from rlhf.presets import PRESETS
from rlhf.scores import ScoreNormalizer, missing_eos

NAMES = tuple(PRESETS["ppo"])


def preset(name, **changes):
    return PpoConfig(**{"init": "i", "rm": "r", "out": "o", "batch_size": 256, **PRESETS["ppo"][name], **changes})


def test_all_are_there():
    assert NAMES == ("lm_hp", "n_plus", "trl_classic", "trl_ppo", "trlx", "alpaca_farm", "openrlhf", "verl", "abc")


# --- where the score lands: "a b EOS pad pad" beside a response that fills all five columns ---

MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]).bool()
AT_EOS = ("trl_classic", "alpaca_farm", "openrlhf", "verl", "abc")
POSITIONS = {**dict.fromkeys(AT_EOS, (2, 2)), "n_plus": (3, 3), "trl_ppo": (3, 3), "trlx": (4, 3), "lm_hp": (4, 4)}


@pytest.mark.parametrize("name", NAMES)
def test_score_position(name):
    for pad_is_eos, wanted in zip((False, True), POSITIONS[name]):
        position = preset(name).score_position
        assert score_column(position, MASK, response_length=5, pad_is_eos=pad_is_eos).tolist() == [wanted, 4]


@pytest.mark.parametrize("name", NAMES)
def test_what_the_eos_action_earns(name):
    """Score 2, no KL, values .1 .2 .3 before the tokens and .5 .6 at the places after EOS; λ of the preset's own."""
    config = preset(name, whiten_rewards=False, whiten_advantages=False, reward_shaping="terminal")
    column = score_column(config.score_position, MASK, response_length=5)
    credit = torch.tensor([[0.0, 0, 2, 0, 0], [0, 0, 0, 0, 2]])
    values = torch.tensor([[0.1, 0.2, 0.3, 0.5, 0.6, 9], [0.0] * 5 + [9]])
    rewards = place_rewards(credit, torch.zeros(2, 5), column, config.score_position)
    parts = Rewards(rewards, values, MASK, through(column, MASK), torch.arange(2))
    advantages, _ = advantages_and_returns(parts, config)
    at_eos = 2 - 0.3
    after = (0.5 - 0.3) + 0.95 * (2 - 0.5)
    two_after = (0.5 - 0.3) + 0.95 * ((0.6 - 0.5) + 0.95 * (2 - 0.6))
    wanted = {2: at_eos, 3: after, 4: two_after}[POSITIONS[name][0]]
    assert advantages[0, 2].item() == pytest.approx(wanted, abs=1e-6)
    # λ = 1: everything that follows counts whole.
    lam = 1.0 if name in ("alpaca_farm", "openrlhf", "verl") else 0.95
    assert advantages[0, 1].item() == pytest.approx(0.3 - 0.2 + lam * wanted, abs=1e-6)


# --- whitening of 1 2 4 7 with one place of padding ---

BIASED = [-1.091089, -0.654654, 0.218218, 1.527525]
UNBIASED = [-0.944911, -0.566947, 0.188982, 1.322876]
WHITENED = {
    **dict.fromkeys(("lm_hp", "n_plus", "openrlhf"), BIASED),
    **dict.fromkeys(("trl_classic", "trl_ppo", "verl", "abc"), UNBIASED),
    "alpaca_farm": [(x - 2.8) / 6.16**0.5 for x in (1, 2, 4, 7)],  # the padding counts as a zero
    "trlx": [(x - 2.8) / 7.7**0.5 for x in (1, 2, 4, 7)],  # and the variance is over n − 1
}


@pytest.mark.parametrize("name", NAMES)
def test_whitening(name):
    config = preset(name)
    x, mask = torch.tensor([[1.0, 2, 4, 7, 100]]), torch.tensor([[1, 1, 1, 1, 0]]).bool()
    assert config.whitens_advantages
    assert whiten(x, mask, config)[0].tolist() == pytest.approx([*WHITENED[name], 0], abs=1e-5)
    # Rewards are whitened by two of them, and keep their mean.
    assert config.whiten_rewards == (name in ("lm_hp", "alpaca_farm"))
    assert config.whiten_scope == ("minibatch" if name in ("lm_hp", "trlx") else "rollout")


# --- the KL penalty of log-ratios .2 −1 3 30, and its control ---

DIFFERENCES = [0.2, -1.0, 3.0, 30.0]
PENALTIES = {"alpaca_farm": [0.2, 0, 3, 30], "openrlhf": [0.2, -1, 3, 10]}


@pytest.mark.parametrize("name", NAMES)
def test_kl_penalty(name):
    config = preset(name)
    logprobs, mask = torch.tensor([DIFFERENCES]) - 40, torch.ones(1, 4).bool()
    kl = kl_penalty(config.kl_estimator, logprobs, torch.full((1, 4), -40.0), mask, clip=config.kl_clip)
    assert kl[0].tolist() == pytest.approx(PENALTIES.get(name, DIFFERENCES), abs=1e-4)
    assert config.kl_in == ("none" if name == "verl" else "reward")


@pytest.mark.parametrize("name", NAMES)
def test_kl_control(name):
    """With 256 responses, a target of 6 and 30 measured an adaptive coefficient grows by 0.2 · 256 / 10000."""
    config = preset(name)
    grown = adapt_kl_coef(config.kl_coef, 30.0, config) / config.kl_coef
    assert grown == pytest.approx(1.00512 if name in ("lm_hp", "trl_classic", "abc") else 1)
    start = {"lm_hp": 0.15, "n_plus": 0.05, "trl_classic": 0.2, "abc": 0.2, "trl_ppo": 0.05, "trlx": 0.001}
    start |= {"alpaca_farm": 0.0067, "openrlhf": 0.01, "verl": 0.001}
    assert config.kl_coef == start[name]


# --- scores 3 and 14, of which the second was cut off ---

SCORES = {
    "lm_hp": [(3 - 2) / 2, -1],
    "n_plus": [3 - 2, -1],
    "alpaca_farm": [3, -1],
    "trlx": [3, 10],
    "openrlhf": [3, 10],
}


@pytest.mark.parametrize("name", NAMES)
def test_scores(name):
    """Reference responses have mean 2 and population deviation 2."""
    config = preset(name)
    normalizer = ScoreNormalizer(config.score_norm, config.score_clip, config.score_clip_before)
    normalizer.fit(torch.tensor([0.0, 4.0]))
    scores, _ = normalizer.fixed(torch.tensor([3.0, 14.0]))
    scores = missing_eos(
        config.missing_eos,
        scores,
        torch.tensor([True, False]),
        torch.tensor([3, 5]),
        penalty=config.missing_eos_penalty,
        response_length=5,
        buffer=1,
    )
    assert normalizer.running(scores)[0].tolist() == pytest.approx(SCORES.get(name, [3, 14]))


# --- the losses ---


@pytest.mark.parametrize("name", NAMES)
def test_loss(name):
    """Three tokens in rows of two and one, of five columns: ratios 4, 1.5 and 1 with advantages −1, 1 and 2."""
    config = preset(name)
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 0, 0, 0, 0]]).bool()
    ratios = torch.tensor([[4.0, 1.5, 9, 9, 9], [1, 9, 9, 9, 9]])
    advantages = torch.tensor([[-1.0, 1, 9, 9, 9], [2, 9, 9, 9, 9]])
    old = torch.full((2, 5), -5.0)
    rows = token_weights(config.aggregation, mask, 5)
    loss, _ = policy_loss(config.policy_loss, old + ratios.log(), old, advantages, mask, rows.rows, config.clips)
    total = (3 if name == "verl" else 4) - 1.2 - 2  # the dual clip holds the first at 3
    assert loss.item() == pytest.approx(total / (2 * 5 if name == "alpaca_farm" else 3), abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_value_loss(name):
    """V 1 from V_old 0 with return 2: clipped to .2 or .5 it is further off, which is what counts."""
    config = preset(name)
    one, zero = torch.ones(1, 1), torch.zeros(1, 1)
    loss, _ = value_loss(one, zero, 2 * one, one.bool(), torch.tensor(1.0), config.cliprange_value)
    bound = 0.5 if name in ("openrlhf", "verl") else 0.2
    assert loss.item() == pytest.approx((2 - bound) ** 2 / 2)
    factor = {"trlx": 1.0, "openrlhf": 1.0, "verl": 1.0}.get(name, 0.1)
    assert config.vf_coef == factor
    passes = {"alpaca_farm": 2, "openrlhf": 1, "verl": 1}.get(name, 4)
    assert config.num_ppo_epochs == passes


def test_abc_is_classic_trl_with_attention_credit():
    abc, classic = preset("abc"), preset("trl_classic")
    changed = {f.name for f in dataclasses.fields(abc) if getattr(abc, f.name) != getattr(classic, f.name)}
    assert changed == {"reward_shaping", "attention_query"} and abc.reward_shaping == "abc" and abc.beta == 0.8

"""The PPO stage: the checks that guard it, the invariances of its update, resuming, and that it raises the reward."""

import dataclasses
import json
import math

import pytest
import torch

from rlhf import kl_control, ppo, ppo_update
from rlhf.config import UserError
from rlhf.data import load_task
from rlhf.experience import Models, make_experience, rollout_record, score_rollout
from rlhf.model import load_policy, load_reward_model, response_logits
from rlhf.rollout import generate
from rlhf.run import Run
from rlhf.scorer import RewardModelScorer


def config(out, start, **changes):
    settings = {
        "out": str(out),
        "init": start.policy,
        "rm": start.reward_model,
        "steps": 2,
        "batch_size": 8,
        "num_ppo_epochs": 2,
        "response_length": 8,
        "eval_samples": 8,
        "num_samples": 4,
    }
    return ppo.PpoConfig(**{**settings, **changes})


def metrics(folder):
    """The logged lines without the timings, which no two runs share."""
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


@pytest.fixture
def models(start):
    policy, tokenizer = load_policy(start.policy)
    value, _ = load_reward_model(start.policy)
    reward_model, _ = load_reward_model(start.reward_model)
    scorer = RewardModelScorer(reward_model)
    return Models(policy, value, load_policy(start.policy)[0], reward_model, tokenizer, scorer)


@pytest.fixture
def experience(models, start, tmp_path):
    torch.manual_seed(0)
    settings = config(tmp_path / "run", start)
    run = Run.create(settings.out, "ppo", settings)
    rollout = generate(models.policy, models.tokenizer, load_task("reviews", 0).prompts[:8], response_length=8)
    return make_experience(models, rollout, settings, 0.05, run)


# --- the guards ---


def test_first_ratio_must_be_one(models, experience, start, tmp_path):
    settings = config(tmp_path, start)
    rows = torch.arange(8)
    ppo_update.minibatch_backward(models, experience, rows, settings, 0.05, check_ratio=True)
    with torch.no_grad():
        next(models.policy.parameters()).mul_(1.01)
    with pytest.raises(UserError, match="ratio of the first minibatch must be 1 to 1e-05"):
        ppo_update.minibatch_backward(models, experience, rows, settings, 0.05, check_ratio=True)


def test_negative_kl_alarm(tmp_path, start):
    settings = config(tmp_path, start)
    kl_control.check_kl(-0.9, settings)
    kl_control.check_kl(-5.0, dataclasses.replace(settings, kl_estimator="abs"))
    with pytest.raises(UserError, match=r"is -1\.50 nats a response, and a KL is never negative"):
        kl_control.check_kl(-1.5, settings)


@pytest.mark.parametrize(
    ("sequence_kl", "expected"), [(3, 0.198976), (6, 0.2), (6.6, 0.200512), (30, 0.201024), (-50, 0.198976)]
)
def test_adaptive_kl(tmp_path, start, sequence_kl, expected):
    settings = config(tmp_path, start, kl_control="adaptive", kl_target=6.0, batch_size=256, kl_horizon=10_000.0)
    assert kl_control.adapt_kl_coef(0.2, sequence_kl, settings) == pytest.approx(expected, abs=1e-9)
    assert kl_control.adapt_kl_coef(0.2, sequence_kl, dataclasses.replace(settings, kl_control="fixed")) == 0.2


def test_adaptive_kl_as_in_the_paper(tmp_path, start):
    settings = config(tmp_path, start, kl_control="adaptive-paper", kl_target=6.0)
    assert kl_control.adapt_kl_coef(0.2, 6.6, settings) == pytest.approx(0.2 * 1.01)
    assert kl_control.adapt_kl_coef(0.2, 100.0, settings) == pytest.approx(0.2 * 1.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9}, "batch_size must be a multiple of num_mini_batches 2, got 9"),
        (
            {"kl_estimator": "k3-is"},
            "kl_estimator in the reward must be one of k1, k2, k3, abs, pos, full, got 'k3-is'",
        ),
        ({"kl_estimator": "pos", "kl_in": "loss"}, "kl_estimator in the loss must be one of k1, k2"),
        ({"missing_eos_penalty": -1.0}, "must be at least 0, got -1.0"),
        ({"reward_shaping": "dense"}, "reward_shaping must be one of terminal, uniform, abc, abc-d, .*got 'dense'"),
    ],
)
def test_config_errors(tmp_path, start, change, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, start, **change)


# --- rewards ---


@pytest.mark.parametrize(
    "shaping", ["terminal", "uniform", "abc", "abc-d", "prefix-diff", "grad-x-input", "value-attention"]
)
def test_credit_sums_to_the_score(tmp_path, start, shaping):
    folder = ppo.main(config(tmp_path / "run", start, steps=1, reward_shaping=shaping))
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 4
    for sample in samples:
        assert len(sample["tokens"]) == len(sample["credit"]) == len(sample["rewards"]) > 0
        assert sum(sample["credit"]) == pytest.approx(sample["score"], abs=1e-4)
        if shaping == "terminal":
            assert max(map(abs, sample["credit"][:-1]), default=0) < 1e-5


def test_other_shapings_of_the_same_responses(tmp_path, start):
    kinds = ("terminal", "uniform", "abc", "abc-d", "prefix-diff", "grad-x-input", "value-attention")
    folder = ppo.main(config(tmp_path / "run", start, steps=1, compare_shapings=kinds))
    for sample in map(json.loads, (folder / "samples.jsonl").read_text().splitlines()):
        credits = sample["credit_by_shaping"]
        assert tuple(credits) == kinds and credits["terminal"] == sample["credit"]
        for kind, values in credits.items():
            assert len(values) == len(sample["tokens"]), kind
            assert sum(values) == pytest.approx(sample["score"], abs=1e-4), kind
        assert len({tuple(values) for values in credits.values()}) == len(kinds) or len(sample["tokens"]) == 1


def test_rollout_record(experience):
    record = rollout_record(experience, 3)
    mask, kl = experience.batch.mask, experience.kl
    assert record["step"] == 3 and record["lengths"] == mask.sum(1).tolist()
    assert sum(record["kl"]) == pytest.approx(kl.sum().item(), abs=1e-6)
    for t, mean in enumerate(record["kl_by_position"]):
        column = kl[:, t][mask[:, t]]
        assert math.isnan(mean) if len(column) == 0 else mean == pytest.approx(column.mean().item(), abs=1e-6)


def test_missing_eos_penalty_is_not_spread(models, start, tmp_path):
    torch.manual_seed(1)
    settings = config(tmp_path, start, reward_shaping="abc", missing_eos_penalty=2.5)
    rollout = generate(models.policy, models.tokenizer, load_task("reviews", 0).prompts[:8], response_length=6)
    rollout.terminated = torch.tensor([True, False] * 4)
    free, spread = score_rollout(models, rollout, dataclasses.replace(settings, missing_eos_penalty=0.0))
    score, earned = score_rollout(models, rollout, settings)
    penalty = torch.tensor([0.0, 2.5] * 4)
    torch.testing.assert_close(free - score, penalty)
    last = torch.nn.functional.one_hot(rollout.batch.mask.sum(1) - 1, rollout.batch.mask.shape[1])
    torch.testing.assert_close(spread - earned, penalty[:, None] * last)
    assert (spread.abs() > 1e-4).sum() > 2 * len(spread)  # the score itself is spread, penalty or not


# --- the update ---


def test_micro_batches_give_the_same_gradient(models, experience, start, tmp_path):
    """Rows are ragged, so a mean of micro-batch means would differ."""
    rows, gradients, values = torch.arange(8), [], []
    for size in (None, 3):
        for model in (models.policy, models.value):
            model.zero_grad()
        stats = ppo_update.minibatch_backward(models, experience, rows, config(tmp_path, start, micro_batch=size), 0.05)
        gradients.append(
            [p.grad.clone() for m in (models.policy, models.value) for p in m.parameters() if p.grad is not None]
        )
        values.append(torch.stack([stats[name] for name in sorted(stats) if name != "explained_variance"]))
    assert len(gradients[0]) > 50
    for one, three in zip(*gradients):
        torch.testing.assert_close(one, three, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-6)


def gradients(models, experience, settings, kl_coef=0.5):
    """The gradient of the policy on all rows, as one vector, and the statistics."""
    models.policy.zero_grad()
    models.value.zero_grad()
    stats = ppo_update.minibatch_backward(models, experience, torch.arange(8), settings, kl_coef)
    return torch.cat([p.grad.flatten() for p in models.policy.parameters() if p.grad is not None]), stats


@pytest.fixture
def moved(models, experience):
    """The policy after it has left its reference."""
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in models.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return models


def test_kl_and_entropy_in_the_loss(moved, experience, start, tmp_path):
    """Each term adds its own gradient: that of the whole loss is the sum, and the exact KL is taken from the logits."""
    plain = config(tmp_path, start, kl_in="none")
    base, _ = gradients(moved, experience, plain)
    mask, batch = experience.batch.mask, experience.batch
    for kind in ("full", "k2", "k3-is"):
        settings = dataclasses.replace(plain, kl_in="loss", kl_estimator=kind, entropy_coef=0.3)
        gradient, stats = gradients(moved, experience, settings)
        logits = response_logits(moved.policy, batch)
        logprobs = logits.log_softmax(-1)
        with torch.no_grad():
            ref = response_logits(moved.ref, batch).log_softmax(-1)
        chosen, ref_chosen = (x.gather(-1, batch.responses[..., None])[..., 0] for x in (logprobs, ref))
        d = chosen - ref_chosen
        kl = {
            "full": (logprobs.exp() * (logprobs - ref)).sum(-1),
            "k2": d**2 / 2,
            "k3-is": ((-d).exp() - 1 + d) * (chosen - experience.old_logprobs).exp(),
        }[kind]
        entropy = -(logprobs.exp() * logprobs).sum(-1)
        tokens = mask.sum()
        extra = (torch.where(mask, 0.5 * kl - 0.3 * entropy, 0)).sum() / tokens
        moved.policy.zero_grad()
        extra.backward()
        added = torch.cat([p.grad.flatten() for p in moved.policy.parameters() if p.grad is not None])
        torch.testing.assert_close(gradient, base + added, rtol=1e-3, atol=1e-6)
        assert stats["kl_loss"].item() == pytest.approx((torch.where(mask, kl, 0).sum() / tokens).item(), rel=1e-4)


def test_exact_kl_in_the_reward(moved, experience, start, tmp_path):
    settings = config(tmp_path / "again", start, kl_estimator="full")
    run = Run.create(settings.out, "ppo", settings)
    again = make_experience(moved, experience.rollout, settings, 0.5, run)
    with torch.no_grad():
        logprobs, ref = (response_logits(m, again.batch).log_softmax(-1) for m in (moved.policy, moved.ref))
    kl = torch.where(again.batch.mask, (logprobs.exp() * (logprobs - ref)).sum(-1), 0)
    torch.testing.assert_close(again.kl, kl, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again.rewards, again.credit - 0.5 * kl, rtol=1e-4, atol=1e-5)


def test_passes_stop_by_kl(models, experience, start, tmp_path):
    settings = config(tmp_path, start, num_ppo_epochs=4, learning_rate=1e-2, early_stop_kl=1e-4)
    optimizer = torch.optim.AdamW([*models.policy.parameters(), *models.value.parameters()], lr=1e-2)
    stats = ppo_update.update(models, optimizer, experience, settings, 0.05)
    assert stats["passes"] < 4 and stats["k1"] > 1e-4


def test_resume_equals_an_uninterrupted_run(tmp_path, start, monkeypatch):
    changes = {"steps": 4, "save_steps": 2, "kl_control": "adaptive", "reward_shaping": "abc"}
    whole = ppo.main(config(tmp_path / "whole", start, **changes))

    log = Run.log

    def interrupted(self, step, values):
        if step == 3:
            raise KeyboardInterrupt
        return log(self, step, values)

    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ppo.main(config(tmp_path / "parts", start, **changes))
    monkeypatch.undo()
    parts = ppo.main(config(tmp_path / "parts", start, **changes, resume=True))
    assert metrics(parts) == metrics(whole)
    assert (parts / "rollouts.jsonl").read_text() == (whole / "rollouts.jsonl").read_text() != ""
    for name in ("model", "value"):
        saved = [(folder / name / "model.safetensors").read_bytes() for folder in (whole, parts)]
        assert saved[0] == saved[1]


def test_prompts_are_a_function_of_the_step(tmp_path, start):
    task = load_task("reviews", 0)
    settings = config(tmp_path, start, batch_size=len(task.prompts) - 2)
    first, second = (ppo.step_prompts(task, settings, step) for step in (1, 2))
    assert first == ppo.step_prompts(task, settings, 1)
    # The first epoch ends two prompts into the second step.
    assert sorted(first + second[:2]) == sorted(task.prompts)


@pytest.mark.parametrize("shaping", ["terminal", "uniform"])
def test_ppo_raises_the_reward(tmp_path, start, monkeypatch, shaping):
    """The share of tokens with an even id, −2 to 2: an untrained policy starts at 0 with a spread of 4 √(¼ / 8)."""

    def even_tokens(model, tokens, attention_mask, **_):
        return 4 * (tokens[:, -8:] % 2 == 0).float().mean(1) - 2

    monkeypatch.setattr("rlhf.scorer.scores", even_tokens)
    settings = config(
        tmp_path / "run",
        start,
        steps=14,
        batch_size=48,
        num_ppo_epochs=4,
        learning_rate=2e-3,
        kl_coef=0.0,
        missing_eos_penalty=0.0,
        reward_shaping=shaping,
        beta=1.0,
        eval_every=0,
    )
    _, *lines = metrics(ppo.main(settings))
    score = [line["objective/scores"] for line in lines]
    standard_error = 4 * (0.25 / 8 / (3 * 48)) ** 0.5
    assert abs(sum(score[:3]) / 3) < 4 * standard_error
    assert sum(score[-3:]) / 3 > 4 * standard_error
    assert lines[-1]["eval/kl"] > 0.1

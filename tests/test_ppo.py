"""The PPO stage: the checks that guard it, the invariances of its update, resuming, and that it raises the reward."""

import dataclasses
import json
import math

import pytest
import torch

from rlhf import kl_control, ppo, ppo_update
from rlhf.config import UserError
from rlhf.data import decode, load_task
from rlhf.experience import Models, make_experience, rollout_record, score_rollout
from rlhf.model import load_policy, load_reward_model, response_logits, response_logprobs, values
from rlhf.ptx import Demonstrations
from rlhf.rollout import generate, given_rollout
from rlhf.run import Run
from rlhf.scorer import RewardModelScorer, Scores
from rlhf.scores import ScoreNormalizer


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
        for kind, each in credits.items():
            assert len(each) == len(sample["tokens"]), kind
            assert sum(each) == pytest.approx(sample["score"], abs=1e-4), kind
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


# --- the variants, end to end ---

VARIANTS = {
    "grpo": {"estimator": "grpo", "num_generations": 4, "kl_in": "loss", "kl_estimator": "k3"},
    "rloo": {"estimator": "rloo", "num_generations": 2, "whiten_scope": "minibatch", "policy_loss": "cispo"},
    "remax": {"estimator": "remax", "policy_loss": "gpg"},
    "reinforce++": {"estimator": "reinforce++", "kl_estimator": "full", "policy_loss": "gmpo", "kl_in": "none"},
    "dynamic": {"estimator": "dr_grpo", "num_generations": 2, "dynamic_sampling": True},
    "shared": {"value_trunk": "shared", "bootstrap_truncated": True, "lam_value": 1.0, "score_norm": "affine"},
    "after_eos": {"score_position": "after_eos", "whiten_rewards": True, "score_norm": "bias-only", "micro_batch": 3},
    "last_column": {"score_position": "last_column", "whiten_scope": "minibatch", "score_norm": "running-std"},
    "ptx": {"ptx_coef": 1.0, "ptx_batch_size": 4, "cliprange_value": None, "missing_eos": "soft-overlong"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_run(tmp_path, start, name):
    folder = ppo.main(config(tmp_path / "run", start, steps=1, eval_every=0, num_samples=2, **VARIANTS[name]))
    line = metrics(folder)[-1]
    assert all(value is not None for value in line.values()), "a metric is not finite"
    critic = VARIANTS[name].get("estimator") is None
    assert (folder / "value").exists() == critic == ("loss/value_avg" in line)
    assert ("loss/ptx_avg" in line) == (name == "ptx")
    assert line.get("frac_reward_zero_std") == (0 if "num_generations" in VARIANTS[name] else None)
    assert line["tokens/mean_length"] > 0 and line["val/ratio"] == pytest.approx(1, abs=0.5)


def test_responses_to_a_prompt_stand_side_by_side(models, start, tmp_path):
    settings = config(tmp_path, start, estimator="grpo", num_generations=4)
    rollout = ppo.step_rollout(models, load_task("reviews", 0), settings, 6, step=1)
    assert [rollout.prompts[i] == rollout.prompts[i - 1] for i in range(1, 8)] == [True] * 3 + [False] + [True] * 3


def test_dynamic_sampling(models, start, tmp_path):
    """Scores 0 or 1 by the first token: prompts whose two responses agree give way to others, until all differ."""
    models.scorer = lambda rollout: Scores((rollout.batch.responses[:, 0] % 2).float())
    settings = config(tmp_path, start, num_generations=2, dynamic_sampling=True, missing_eos="mask")
    torch.manual_seed(3)
    task = load_task("reviews", 0)
    rollout = ppo.step_rollout(models, task, settings, 3, step=1)
    first = rollout.batch.responses[:, 0].view(-1, 2) % 2
    assert (first[:, 0] != first[:, 1]).all()
    assert len(rollout.prompts) == len(rollout.responses) == len(rollout.terminated) == len(first) * 2 == 8
    assert set(rollout.prompts) - set(ppo.step_prompts(task, settings, 1)), "nothing was sampled anew: choose a seed"
    assert [rollout.prompts[i] == rollout.prompts[i + 1] for i in (0, 2, 4, 6)] == [True] * 4
    for row, text in enumerate(rollout.responses):
        kept = rollout.batch.responses[row][rollout.batch.mask[row]].tolist()
        ended = kept[-1] == models.tokenizer.eos_token_id
        assert rollout.terminated[row].item() == ended
        assert decode(models.tokenizer, kept[:-1] if ended else kept) == text
    models.scorer = lambda rollout: Scores(torch.ones(len(rollout.prompts)))
    with pytest.raises(UserError, match="after 10 rounds there are still 4 prompts whose 2 responses all have"):
        ppo.step_rollout(models, task, settings, 1, step=1)


def test_a_head_on_the_policys_trunk(start, tmp_path):
    """Values from the policy's own pass are those of a pass of the value model, and both losses reach the trunk."""
    settings = config(tmp_path / "run", start, value_trunk="shared", vf_coef=1.0)
    models, optimizer = ppo.prepare(settings, None, load_task("reviews", 0))
    assert models.value.base_model is models.policy.base_model
    policy, value = optimizer.param_groups
    assert [p.shape for p in value["params"]] == [(1, 128)] and len(policy["params"]) > 30
    torch.nn.init.normal_(models.value.score.weight)
    run = Run.create(settings.out, "ppo", settings)
    rollout = generate(models.policy, models.tokenizer, load_task("reviews", 0).prompts[:8], response_length=6)
    experience = make_experience(models, rollout, settings, 0.05, run)
    *_, found, _ = ppo_update.forward(models, experience.batch, settings)
    torch.testing.assert_close(found, values(models.value, experience.batch), rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(found.sum(), [models.policy.model.embed_tokens.weight])
    assert gradient.abs().sum() > 0


def test_demonstrations_are_a_function_of_the_step(models):
    torch.manual_seed(0)
    task = load_task("reviews", 0)
    first = Demonstrations(task.demonstrations[:10], models.tokenizer, 4, seed=1)
    assert sorted(first.chosen(0) + first.chosen(1) + first.chosen(2)[:2]) == list(range(10))
    assert first.chosen(7) == Demonstrations(task.demonstrations[:10], models.tokenizer, 4, seed=1).chosen(7)
    gradients = []
    for size in (None, 1):
        models.policy.zero_grad()
        loss = first.backward(models.policy, 0, 2.0, micro_batch=size)
        gradients.append(models.policy.model.embed_tokens.weight.grad.clone())
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    chosen = [task.demonstrations[i] for i in first.chosen(0)]
    given = given_rollout(models.tokenizer, [d.prompt for d in chosen], [d.response for d in chosen], "cpu")
    mean = response_logprobs(models.policy, given.batch).sum() / given.batch.mask.sum()
    assert loss.item() == pytest.approx(-2 * mean.item(), rel=1e-5)


def test_scores_under_normalisation_and_rules(models, start, tmp_path):
    """bias-only, then the rule; what is not a factor of the score stands on the last token, the rest is spread."""
    settings = config(tmp_path, start, reward_shaping="uniform", beta=1.0, missing_eos="replace", score_clip=2.0)
    torch.manual_seed(1)
    rollout = generate(models.policy, models.tokenizer, load_task("reviews", 0).prompts[:4], response_length=6)
    rollout.terminated = torch.tensor([True, False, True, True])
    models.scorer = lambda rollout: Scores(torch.tensor([1.0, 2.0, 9.0, -1.0]))
    models.normalizer = ScoreNormalizer("bias-only", clip=2.0)
    models.normalizer.fit(torch.tensor([0.0, 1.0]))
    scores, earned = score_rollout(models, rollout, settings)
    assert scores.tolist() == [0.5, -1, 2, -1.5]
    torch.testing.assert_close(earned.sum(1), scores)
    lengths = rollout.batch.mask.sum(1)
    for row, raw in enumerate([1.0, 2, 9, -1]):
        share = raw / lengths[row]
        torch.testing.assert_close(earned[row, : lengths[row] - 1], share.expand(lengths[row] - 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"estimator": "grpo"}, "num_generations must be at least 2 for grpo, got 1"),
        ({"num_generations": 3}, "batch_size must be a multiple of num_generations 3, got 8"),
        ({"dynamic_sampling": True}, "num_generations must be at least 2 for dynamic_sampling, got 1"),
        (
            {"estimator": "remax", "value_trunk": "shared"},
            "value_trunk shared needs a value model",
        ),
        ({"missing_eos": "scale", "missing_eos_penalty": 2.0}, "must be at most 1 with missing_eos scale, got 2"),
        (
            {"score_position": "after_eos", "reward_shaping": "uniform"},
            "is for terminal rewards alone, got reward",
        ),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, start, change, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, start, **change)


@pytest.mark.parametrize(
    "changes",
    [
        {"kl_control": "adaptive", "reward_shaping": "abc"},
        {"score_norm": "running-std", "value_trunk": "shared", "ptx_coef": 0.5, "ptx_batch_size": 4},
    ],
    ids=["adaptive", "shared"],
)
def test_resume_equals_an_uninterrupted_run(tmp_path, start, monkeypatch, changes):
    changes = {**changes, "steps": 4, "save_steps": 2}
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

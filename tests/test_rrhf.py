"""The RRHF stage: candidates from a file and from samples, the step, resuming."""

import json

import pytest
import torch

from rlhf import rrhf
from rlhf.config import UserError
from rlhf.data import collate
from rlhf.model import load_policy, load_reward_model, response_logprobs, scores
from rlhf.run import Run

ROWS = [
    {"prompt": "in this film the plot", "responses": [" is brilliant .", " is dull ."], "scores": [0.9, 0]},
    {
        "prompt": "as a fan the music",
        "responses": [" was great .", " was bad .", " was fine ."],
        "scores": [2, -1, 0.5],
    },
]


def config(out, start, **changes):
    settings = {
        "out": str(out),
        "init": start.policy,
        "rm": start.reward_model,
        "rounds": 2,
        "num_prompts": 8,
        "batch_size": 4,
        "response_length": 8,
        "eval_samples": 8,
        "learning_rate": 1e-3,
    }
    return rrhf.RrhfConfig(**{**settings, **changes})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_read_candidates(tmp_path, start):
    _, tokenizer = load_policy(start.policy)
    groups = rrhf.read_candidates(write(tmp_path / "c.jsonl", ROWS), tokenizer)
    assert [len(group.responses) for group in groups] == [2, 3]
    assert groups[0].scores == (0.9, 0.0)
    for group in groups:
        for tokens, text in zip(group.responses, group.texts):
            assert tokens[-1] == tokenizer.eos_token_id and tokenizer.decode(tokens[:-1]) == text


def test_a_row_without_scores_is_named(tmp_path, start):
    _, tokenizer = load_policy(start.policy)
    path = write(tmp_path / "c.jsonl", [ROWS[0], {"prompt": "a", "response": "b"}])
    with pytest.raises(
        UserError, match=r'c\.jsonl:2: a row of candidates must have "prompt", "responses" and "scores"'
    ):
        rrhf.read_candidates(path, tokenizer)


def test_samples_carry_the_reward_models_scores(start):
    policy, tokenizer = load_policy(start.policy)
    reward_model, _ = load_reward_model(start.reward_model)
    torch.manual_seed(0)
    prompts = ["in this film the plot", "as a fan the music is"]
    groups = rrhf.sample_candidates(
        policy, tokenizer, reward_model, prompts, count=3, response_length=6, temperature=1.0, micro_batch=4
    )
    assert [group.prompt for group in groups] == prompts
    for group in groups:
        batch = collate([group.prompt_tokens] * 3, group.responses, tokenizer.pad_token_id)
        torch.testing.assert_close(
            scores(reward_model, batch.tokens, batch.attention_mask), torch.tensor(group.scores), rtol=1e-4, atol=1e-5
        )


def test_steps_learn_the_ranking(tmp_path, start):
    """After some steps on two rankings the length-normalised log-probabilities stand in the order of the scores."""
    folder = rrhf.main(
        config(
            tmp_path / "run", start, candidates=write(tmp_path / "c.jsonl", ROWS), epochs=25, batch_size=2, eval_every=0
        )
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy"] == 1.0 and lines[-1]["loss/rank"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["loss/sft"] < 0.5 * lines[1]["loss/sft"]
    policy, tokenizer = load_policy(str(folder))
    for group in rrhf.read_candidates(str(tmp_path / "c.jsonl"), tokenizer):
        count = len(group.responses)
        batch = collate([group.prompt_tokens] * count, group.responses, tokenizer.pad_token_id)
        with torch.no_grad():
            mean = response_logprobs(policy, batch).sum(1) / batch.mask.sum(1)
        assert mean.argsort(descending=True).tolist() == torch.tensor(group.scores).argsort(descending=True).tolist()


def test_resume_equals_an_uninterrupted_run(tmp_path, start, monkeypatch):
    whole = rrhf.main(config(tmp_path / "whole", start))
    log = Run.log

    def interrupted(self, step, values):
        if step == 3:
            raise KeyboardInterrupt
        return log(self, step, values)

    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rrhf.main(config(tmp_path / "parts", start))
    monkeypatch.undo()
    parts = rrhf.main(config(tmp_path / "parts", start, resume=True))
    saved = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, parts)]
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rm": None}, "needs --rm to score what it samples, or --candidates with scores"),
        ({"num_candidates": 1}, "num_candidates must be at least 2 to rank, got 1"),
    ],
)
def test_config_errors(tmp_path, start, change, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, start, **change)

"""Candidates of several sources: what each gives, how they are scored, the distance in a score."""

import dataclasses
import json

import pytest
import torch

from rlhf.candidates import (
    DECODINGS,
    Candidates,
    draw_candidates,
    model_source,
    own_source,
    penalize_distance,
    read_candidates,
    score_candidates,
    source_metrics,
)
from rlhf.config import UserError
from rlhf.data import collate
from rlhf.model import head_scores, hidden_states, load_policy, load_reward_model, response_logprobs, scores
from rlhf.scorer import RewardModelScorer

ROWS = [
    {"prompt": "in this film the plot", "responses": [" is brilliant .", " is dull ."], "scores": [0.9, 0]},
    {"prompt": "as a fan the music", "chosen": " was bad .", "rejected": " was great ."},
]
PROMPTS = [row["prompt"] for row in ROWS]


@pytest.fixture(scope="module")
def models(start):
    policy, tokenizer = load_policy(start.policy)
    return policy, tokenizer, load_reward_model(start.reward_model)[0]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_provided_candidates(tmp_path, models):
    _, tokenizer, _ = models
    groups = read_candidates(write(tmp_path / "c.jsonl", ROWS), tokenizer)
    assert [group.scores for group in groups] == [(0.9, 0.0), (1.0, 0.0)]
    assert [group.chosen for group in groups] == [0, 0] and groups[0].sources == ("provided", "provided")
    for group in groups:
        for tokens, text in zip(group.responses, group.texts):
            assert tokens[-1] == tokenizer.eos_token_id and tokenizer.decode(tokens[:-1]) == text


def test_a_row_without_scores_is_named(tmp_path, models):
    path = write(tmp_path / "c.jsonl", [ROWS[0], {"prompt": "a", "response": "b"}])
    with pytest.raises(UserError, match=r'c\.jsonl:2: a row of candidates must have "prompt", "responses" and "scor'):
        read_candidates(path, models[1])


def test_every_source_gives_its_candidates_and_the_reward_model_scores_them(tmp_path, models, other_start):
    policy, tokenizer, reward_model = models
    provided = read_candidates(write(tmp_path / "c.jsonl", ROWS), tokenizer)
    settings = {"count": 3, "response_length": 6, "temperature": 1.0, "micro_batch": 4}
    sources = [own_source(policy, tokenizer, name, **settings) for name in DECODINGS]
    sources.append(model_source("other", other_start.policy, tokenizer, **settings))
    groups = draw_candidates(sources, tokenizer, RewardModelScorer(reward_model, 4), PROMPTS, provided=provided)
    assert [group.prompt for group in groups] == PROMPTS
    for group, given in zip(groups, provided):
        names = [name for name in (*DECODINGS, "other") for _ in range(3)]
        assert group.sources == (*names, "provided", "provided")
        assert group.responses[-2:] == given.responses and group.chosen == 15
        assert all(1 <= len(response) <= 6 for response in group.responses[:-2])
        batch = collate([group.prompt_tokens] * 17, group.responses, tokenizer.pad_token_id)
        with torch.no_grad():
            expected = scores(reward_model, batch.tokens, batch.attention_mask)
        torch.testing.assert_close(expected, torch.tensor(group.scores), rtol=1e-4, atol=1e-5)
        assert len({tuple(response) for response in group.responses[9:12]}) == 3  # each diverse beam another response
    metrics = source_metrics(groups)
    assert sum(metrics[f"source/{name}/best"] for name in (*DECODINGS, "other", "provided")) == pytest.approx(1)
    mean = sum(score for group in groups for score in group.scores[-2:]) / 4
    assert metrics["source/provided/score"] == pytest.approx(mean)


def test_what_people_chose_is_not_held_for_the_best(tmp_path, models):
    _, tokenizer, reward_model = models
    groups = score_candidates(
        read_candidates(
            write(tmp_path / "c.jsonl", [ROWS[1], {**ROWS[1], "chosen": " was great .", "rejected": " was bad ."}]),
            tokenizer,
        ),
        tokenizer,
        RewardModelScorer(reward_model),
    )
    assert groups[0].chosen == groups[1].chosen == 0
    assert {groups[0].best, groups[1].best} == {0, 1}  # the same two texts: the reward model likes one of them


def test_a_response_without_eos_is_scored_at_its_last_token(models):
    """Released RRHF code looks for the first EOS and reads at position 0 where there is none."""
    _, tokenizer, reward_model = models
    tokens = tokenizer("in this film the plot is brilliant but the music")["input_ids"]
    cut = Candidates("p", tokens[:5], [tokens[5:]], ["…"], (), ("sample",))
    assert tokenizer.eos_token_id not in tokens
    (scored,) = score_candidates([cut], tokenizer, RewardModelScorer(reward_model))
    with torch.no_grad():
        ids = torch.tensor([tokens])
        each = head_scores(reward_model, hidden_states(reward_model, ids, torch.ones_like(ids, dtype=torch.bool)))[0]
    assert scored.scores[0] == pytest.approx(each[-1].item(), rel=1e-4)
    assert abs(each[-1] - each[0]) > 1e-3


def test_distance_is_subtracted(models):
    policy, tokenizer, _ = models
    ref, _ = load_policy(policy.name_or_path)
    with torch.no_grad():
        for parameter in ref.parameters():
            parameter.mul_(1 + 0.2 * torch.rand_like(parameter))
    group = Candidates("a", [5, 6], [[7, 8, 9], [10]], ["x", "y"], (1.0, -2.0), ("sample",) * 2, 1)
    (moved,) = penalize_distance([group], tokenizer, policy, ref, kl_coef=0.5, temperature=1.0)
    for place, response in enumerate(group.responses):
        batch = collate([group.prompt_tokens], [response], tokenizer.pad_token_id)
        with torch.no_grad():
            distance = (response_logprobs(policy, batch) - response_logprobs(ref, batch)).sum().item()
        assert moved.scores[place] == pytest.approx(group.scores[place] - 0.5 * distance, abs=1e-5)
        assert abs(distance) > 1e-2
    assert dataclasses.replace(moved, scores=group.scores) == group

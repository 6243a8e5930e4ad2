"""Reward functions: what they are called with, what they may return, and what the stages make of it."""

import json
from dataclasses import replace

import pytest
import torch

from rlhf import best_of_n, evaluate, ppo, rrhf
from rlhf.candidates import Candidates, score_candidates
from rlhf.config import UserError
from rlhf.data import collate, encode_prompt, encode_response
from rlhf.experience import Models, make_experience, rollout_metrics, score_rollout
from rlhf.model import load_policy, load_reward_model, train_tokenizer, zero_head
from rlhf.ppo_config import PpoConfig
from rlhf.rollout import Rollout, generate
from rlhf.run import Run, read_lines
from rlhf.scorer import FunctionScorer, RewardModelScorer, load_function, scorer_of


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the film was good ."] * 3)


def rollout_of(tokenizer, pairs, cut=()):
    """A rollout of (prompt, response) texts; the rows in `cut` end without EOS."""
    prompts = [encode_prompt(tokenizer, prompt) for prompt, _ in pairs]
    responses = [encode_response(tokenizer, response) for _, response in pairs]
    responses = [ids[:-1] if row in cut else ids for row, ids in enumerate(responses)]
    batch = collate(prompts, responses, tokenizer.pad_token_id)
    terminated = torch.tensor([row not in cut for row in range(len(pairs))])
    return Rollout(batch, [prompt for prompt, _ in pairs], [response for _, response in pairs], terminated)


@pytest.fixture(scope="module")
def rollout(tokenizer):
    """Two responses of three and of two tokens and their EOS."""
    return rollout_of(tokenizer, [("the film", " was good ."), ("the", " film was")])


def score(rollout, tokenizer, returned, **rows):
    return FunctionScorer(lambda **_: returned, "f.py:f", tokenizer, rows)(rollout)


# What a function is called with


def test_a_function_gets_texts_tokens_and_the_columns_of_its_rows(rollout, tokenizer):
    seen = {}

    def function(prompts, completions, completion_ids, **columns):
        seen.update(columns, prompts=prompts, completions=completions, completion_ids=completion_ids)
        return [1, 2]

    rows = {"the film": {"prompt": "the film", "answer": 4}, "unused": {"prompt": "unused", "level": "hard"}}
    FunctionScorer(function, "f.py:f", tokenizer, rows)(rollout)
    assert seen["prompts"] == ["the film", "the"] and seen["completions"] == [" was good .", " film was"]
    assert seen["completion_ids"] == [encode_response(tokenizer, text) for text in seen["completions"]]
    # A column of any row is always there, so that a function need not ask.
    assert seen["answer"] == [4, None] and seen["level"] == [None, None] and "prompt" not in seen


def test_a_chat_prompt_reaches_the_function_as_messages(rollout, tokenizer):
    chat = [{"role": "user", "content": "the film"}]
    calls = []
    scorer = FunctionScorer(
        lambda prompts, completions: calls.append((prompts, completions)) or [0, 0],
        "f.py:f",
        tokenizer,
        {"the film": {"prompt": chat}},
    )
    scorer(rollout)
    assert calls == [([chat, "the"], [[{"role": "assistant", "content": " was good ."}], " film was"])]


def test_a_function_without_keywords_gets_what_it_names(rollout, tokenizer):
    def lengths(completions, scale=2.0):
        return [scale * len(text) for text in completions]

    assert FunctionScorer(lengths, "f.py:f", tokenizer)(rollout).scores.tolist() == [22.0, 18.0]
    with pytest.raises(UserError, match=r"f.py:g: takes 'answer', which is no column of the data; there are level, pr"):
        FunctionScorer(lambda answer: [0, 0], "f.py:g", tokenizer, {"the": {"level": 1}})(rollout)


# What it may return


def test_numbers_and_what_cannot_be_scored(rollout, tokenizer):
    found = score(rollout, tokenizer, [0, None])
    assert found.credit is None and found.scores[0] == 0 and found.scores[1].isnan()
    assert score(rollout, tokenizer, [True, torch.tensor(2.5)]).scores.tolist() == [1.0, 2.5]
    assert score(rollout, tokenizer, torch.tensor([0.5, -1.0])).scores.tolist() == [0.5, -1.0]
    assert score(rollout, tokenizer, (1, 2)).scores.tolist() == [1, 2]


def test_a_number_for_each_token(rollout, tokenizer):
    found = score(rollout, tokenizer, [[0.5, -1, 2, 0.25], [1.0, 2.0, 0.0]])
    assert found.scores.tolist() == [1.75, 3.0]
    assert found.credit.tolist() == [[0.5, -1, 2, 0.25], [1, 2, 0, 0]]
    # A plain number among them stands on the last token; None has none.
    found = score(rollout, tokenizer, [torch.tensor([1.0, 1, 1, 1]), 3])
    assert found.credit.tolist() == [[1, 1, 1, 1], [0, 0, 3, 0]] and found.scores.tolist() == [4, 3]
    found = score(rollout, tokenizer, [None, [1, 1, 1]])
    assert found.scores.isnan().tolist() == [True, False] and found.credit[0].tolist() == [0, 0, 0, 0]


def test_spans_are_spread_over_their_tokens_by_bytes(rollout, tokenizer):
    # " was good .": tokens at bytes 0-4, 4-9, 9-11, and the EOS at 11. Two thirds of 3-6 lie in the second token.
    spans = [[(3, 6, 3.0), (9, 10, -1), (11, 11, 0.5)], []]
    found = score(rollout, tokenizer, spans)
    assert found.scores.tolist() == [2.5, 0.0]
    torch.testing.assert_close(found.credit, torch.tensor([[1, 2, -1, 0.5], [0, 0, 0, 0]]))


def test_spans_count_bytes_not_characters(tokenizer):
    # "é" is two bytes and, for this tokenizer, two tokens; the space is one.
    rollout = rollout_of(tokenizer, [("the", "é film")])
    found = score(rollout, tokenizer, [[(1, 2, 1.0), (2, 7, 5.0)]])
    assert found.credit.tolist() == [[0, 1, 5, 0]]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "must return a list of one item for each of the 2 completions, got NoneType"),
        ("ab", "must return a list of one item for each of the 2 completions, got str"),
        ([1], "must return a list of one item for each of the 2 completions, got 1 items"),
        ([1, float("nan")], r"completion 1: wanted a finite number, or None for a completion that .*, got nan"),
        ([1, "2"], "completion 1: wanted a finite number, .*, got '2'"),
        ([[1, 2, 3], 0], "completion 0: wanted one number for each of the 4 tokens of completion_ids, got 3"),
        ([0, [1, None, 3]], "completion 1: wanted a finite number"),
        ([[(0, 2)], 0], r"completion 0: wanted numbers, or spans \(start, end, value\) with whole .*, got \(0, 2\)"),
        ([[(0, 2, 1), 3], 0], "completion 0: wanted numbers, or spans"),
        ([0, [(0, 10, 1)]], "completion 1: a span must lie in 0 to 9, the bytes of the completion, got 0 to 10"),
        ([0, [(5, 4, 1)]], "completion 1: a span must lie in 0 to 9"),
        ([[(0, 1, float("inf"))], 0], "completion 0: wanted a finite number"),
        ([None, None], "returned None for each of the 2 completions"),
    ],
)
def test_what_it_must_not_return(rollout, tokenizer, returned, message):
    with pytest.raises(UserError, match=f"reward function f.py:f.*{message}"):
        score(rollout, tokenizer, returned)


def test_an_exception_inside_names_function_error_and_line(tmp_path, rollout, tokenizer):
    path = tmp_path / "mine.py"
    path.write_text("def bad(prompts, **_):\n    return [prompts[0].missing]\n")
    scorer = FunctionScorer(load_function("--reward-fn", f"{path}:bad"), "mine.py:bad", tokenizer)
    with pytest.raises(UserError, match=r"mine.py:bad raised AttributeError: .*'missing' \(line 2 of .*mine.py\)"):
        scorer(rollout)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mine.py", "--reward-fn must be path.py:function, got '"),
        ("mine.txt:bad", "--reward-fn must be path.py:function"),
        ("mine.py:good", "mine.py has no function good; it has bad"),
        ("broken.py:f", "broken.py raised ZeroDivisionError: division by zero"),
    ],
)
def test_references_that_lead_nowhere(tmp_path, name, message):
    (tmp_path / "mine.py").write_text("def bad():\n    pass\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(UserError, match=message):
        load_function("--reward-fn", str(tmp_path / name))
    with pytest.raises(FileNotFoundError, match="--reward-fn: there is no file"):
        load_function("--reward-fn", str(tmp_path / "absent.py:f"))


# What the stages make of it

FUNCTIONS = """
def spans(prompts, completions, tag, **_):
    assert set(tag) <= {"a", None}
    return [[(0, min(2, len(text.encode())), 1.0)] for text in completions]


def even(completion_ids, **_):
    return [None if len(ids) % 2 else float(ids[0] % 2) for ids in completion_ids]


def length(completions):
    return [-len(text) / 10 for text in completions]
"""


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "functions.py"
    path.write_text(FUNCTIONS)
    return str(path)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"film {i} was", "tag": "a"}) + "\n" for i in range(20)))
    return str(path)


def settings(out, start, **changes):
    common = {"init": start.policy, "steps": 2, "batch_size": 8, "response_length": 6, "eval_samples": 4}
    return PpoConfig(out=str(out), **{**common, "num_samples": 3, "reward_fn": "f.py:f", **changes})


@pytest.fixture
def models(start):
    policy, tokenizer = load_policy(start.policy)
    value, _ = load_reward_model(start.policy)
    zero_head(value)
    return Models(policy, value, load_policy(start.policy)[0], None, tokenizer, None)


def experience_of(models, config, rollout, function):
    models.scorer = FunctionScorer(function, "f.py:f", models.tokenizer)
    return make_experience(models, rollout, config, 0.0, Run.create(config.out, "ppo", config))


def test_dense_rewards_make_the_returns(tmp_path, start, models):
    """Without a KL penalty, with λ = γ = 1 and values of 0, a return is the sum of what is still to come."""
    config = settings(tmp_path / "run", start, lam=1.0, missing_eos_penalty=0.5, whiten_advantages=False)
    rollout = rollout_of(models.tokenizer, [("the film", " was good"), ("the plot", " is")], cut=[1])
    assert [len(ids) for ids in rollout.batch.mask.sum(1, keepdim=True)] == [1, 1]
    first, second = rollout.batch.mask.sum(1).tolist()
    experience = experience_of(models, config, rollout, lambda **_: [[1.0] * first, [0.0] * (second - 1) + [2.0]])
    expected = torch.zeros_like(experience.advantages)
    expected[0, :first] = torch.arange(first, 0, -1.0)
    expected[1, :second] = 1.5  # 2 less the penalty of a response that was cut off
    torch.testing.assert_close(experience.returns[:, :-1], expected)
    torch.testing.assert_close(experience.advantages, expected)
    torch.testing.assert_close(experience.scores, torch.tensor([float(first), 1.5]))


def test_numbers_are_spread_as_asked(tmp_path, start, models):
    config = settings(tmp_path, start, reward_shaping="uniform", missing_eos_penalty=0.0)
    rollout = rollout_of(models.tokenizer, [("the film", " was good"), ("the plot", " is")])
    models.scorer = FunctionScorer(lambda **_: [1, 2], "f.py:f", models.tokenizer)
    mask, lengths = rollout.batch.mask, rollout.batch.mask.sum(1)
    last = torch.nn.functional.one_hot(lengths - 1, mask.shape[1])
    uniform = 0.8 * mask / lengths[:, None] + 0.2 * last
    scores, earned = score_rollout(models, rollout, config)
    assert scores.tolist() == [1, 2]
    torch.testing.assert_close(earned, uniform * torch.tensor([[1.0], [2.0]]))
    with pytest.raises(UserError, match="span needs a reward function that scores tokens or spans, got one score"):
        score_rollout(models, rollout, replace(config, reward_shaping="span"))
    # A function's own numbers count as they are, unless another way to spread their sum is asked for.
    models.scorer = replace(
        models.scorer, function=lambda completion_ids: [list(range(len(i))) for i in completion_ids]
    )
    own = torch.where(mask, torch.arange(mask.shape[1]), 0).float()
    for shaping, expected in (("span", own), ("terminal", own), ("uniform", uniform * own.sum(1, keepdim=True))):
        _, earned = score_rollout(models, rollout, replace(config, reward_shaping=shaping))
        torch.testing.assert_close(earned, expected, rtol=1e-5, atol=1e-5)


def test_what_cannot_be_scored_counts_nowhere(tmp_path, start, models):
    torch.manual_seed(0)
    rollout = generate(models.policy, models.tokenizer, ["the film"] * 4, response_length=5)
    config = settings(tmp_path / "a", start)
    some = experience_of(models, config, rollout, lambda **_: [1.0, None, 3.0, None])
    kept = torch.tensor([0, 2])
    only = Rollout(
        rollout.batch.rows(kept), rollout.prompts[:2], [rollout.responses[i] for i in kept], rollout.terminated[kept]
    )
    config = settings(tmp_path / "b", start)
    fewer = experience_of(models, config, only, lambda **_: [1.0, 3.0])
    for name in ("advantages", "returns", "rewards", "kl"):
        found = getattr(some, name)
        assert not found[[1, 3]].any()
        torch.testing.assert_close(found[kept], getattr(fewer, name), rtol=1e-4, atol=1e-6)
    assert some.batch.mask.sum() == fewer.batch.mask.sum()
    metrics, wanted = rollout_metrics(some, 0.0, config), rollout_metrics(fewer, 0.0, config)
    for name in wanted:
        if name != "val/num_eos_tokens":
            assert metrics[name] == pytest.approx(wanted[name], abs=1e-5), name


def test_ppo_runs_on_spans_and_on_missing_scores(tmp_path, start, functions, prompts):
    folder = ppo.main(settings(tmp_path / "a", start, reward_fn=f"{functions}:spans", data=prompts, kl_coef=0.0))
    lines = read_lines(folder / "metrics.jsonl")
    # Every response has a byte to reward, unless it is empty or was cut off, which costs 1.
    assert all(-1 <= line["objective/scores"] <= 1 for line in lines[1:]) and lines[0]["eval/proxy"] > 0.5
    for sample in read_lines(folder / "samples.jsonl"):
        assert sum(sample["credit"]) == pytest.approx(sample["score"], abs=1e-5)
    folder = ppo.main(settings(tmp_path / "b", start, reward_fn=f"{functions}:even", data=prompts))
    assert len(read_lines(folder / "metrics.jsonl")) == 3
    with pytest.raises(UserError, match=r"raised TypeError: .*missing 1 required positional argument: 'tag'"):
        ppo.main(settings(tmp_path / "c", start, reward_fn=f"{functions}:spans"))


def test_a_function_that_fails_loses_nothing(tmp_path, start, prompts):
    """It is called for the first evaluation, then for each step; here it fails in the second step."""
    flag = tmp_path / "fail"
    (tmp_path / "mine.py").write_text(
        "import pathlib\ncalls = []\n\ndef length(completions):\n"
        f"    calls.append(pathlib.Path({str(flag)!r}).exists())\n"
        "    if len(calls) == 3 and calls[-1]:\n        raise OSError('the judge is away')\n"
        "    return [-len(text) / 10 for text in completions]\n"
    )
    options = {"reward_fn": f"{tmp_path / 'mine.py'}:length", "data": prompts, "steps": 3, "eval_every": 0}
    whole = ppo.main(settings(tmp_path / "whole", start, **options))
    flag.touch()
    with pytest.raises(UserError, match=r"mine.py:length raised OSError: the judge is away \(line 7 of .*mine.py\)"):
        ppo.main(settings(tmp_path / "cut", start, **options))
    flag.unlink()
    cut = ppo.main(settings(tmp_path / "cut", start, resume=True, **options))
    lines = [read_lines(folder / "metrics.jsonl") for folder in (whole, cut)]
    kept = [[{k: v for k, v in line.items() if not k.startswith("time/")} for line in each] for each in lines]
    assert kept[0] == kept[1] and [line["step"] for line in kept[1]] == [0, 1, 2, 3]


def test_the_other_stages_take_a_function_too(tmp_path, start, functions, prompts, capsys):
    common = {"init": start.policy, "reward_fn": f"{functions}:length", "data": prompts, "response_length": 6}
    common |= {"num_prompts": 4, "batch_size": 4, "eval_samples": 4}
    folder = rrhf.main(rrhf.RrhfConfig(out=str(tmp_path / "rrhf"), num_candidates=2, rounds=1, **common))
    assert read_lines(folder / "metrics.jsonl")[-1]["objective/scores"] < 0
    folder = best_of_n.main(best_of_n.BestOfNConfig(out=str(tmp_path / "bon"), n=2, epochs=1, **common))
    for row in read_lines(folder / "selected.jsonl"):
        assert row["score"] == pytest.approx(-len(row["response"]) / 10)
    settings = {"run": str(folder), "data": prompts, "samples": 4, "response_length": 6, "overwrite": True}
    found = json.loads(evaluate.main(evaluate.EvaluateConfig(**settings)).read_text())
    assert "proxy" not in found  # a file that run.json names is not run unless the user names it too
    assert f"--reward-fn {functions}:length gives the one that the run had" in capsys.readouterr().err
    found = json.loads(evaluate.main(evaluate.EvaluateConfig(**settings, reward_fn=common["reward_fn"])).read_text())
    assert found["proxy"]["mean"] == pytest.approx(
        sum(-len(sample["response"]) / 10 for sample in found["samples"]) / 4, abs=1e-6
    )


def test_responses_without_a_score_are_no_candidates(start):
    _, tokenizer = load_policy(start.policy)
    names = ("one", "two", "three")
    groups = [
        Candidates(prompt, [5], [[6], [7], [8]], ["x", "y", "z"], (), names, chosen)
        for prompt, chosen in (("a", 2), ("b", 0))
    ]
    scorer = FunctionScorer(lambda **_: [1, None, 2, None, None, 3], "f.py:f", tokenizer)
    first, second = score_candidates(groups, tokenizer, scorer)
    assert (first.scores, first.responses, first.texts, first.chosen) == ((1, 2), [[6], [8]], ["x", "z"], 1)
    assert (second.scores, second.sources, second.chosen) == ((3,), ("three",), None)
    scorer = replace(scorer, function=lambda **_: [1, 1, 1, None, None, None])
    with pytest.raises(UserError, match="none of the 3 responses to this prompt can be scored: 'b'"):
        score_candidates(groups, tokenizer, scorer)


def test_one_thing_scores(tmp_path, start, functions):
    both = {"rm": start.reward_model, "reward_fn": f"{functions}:length"}
    with pytest.raises(UserError, match="rm and reward_fn exclude each other, got both"):
        settings(tmp_path, start, **both)
    with pytest.raises(UserError, match="rm or reward_fn must be given"):
        settings(tmp_path, start, reward_fn=None)
    with pytest.raises(UserError, match="reward_shaping abc is what the reward model says, so it needs rm"):
        settings(tmp_path, start, reward_shaping="abc")
    config = settings(tmp_path, start, rm=start.reward_model, reward_fn=None, micro_batch=3)
    model, tokenizer = load_reward_model(start.reward_model)
    assert scorer_of(config, (model, tokenizer), tokenizer, None) == RewardModelScorer(model, 3)

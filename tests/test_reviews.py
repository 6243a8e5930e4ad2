"""The generated task: its gold rule by hand, its grammar, its annotator."""

import math
import random
import statistics

import pytest

from rlhf import reviews
from rlhf.config import UserError
from rlhf.data import encode_prompt, encode_response, load_task
from rlhf.model import train_tokenizer


def total(response, prompt="in the end the music"):
    """The sum of the clauses' values: gold before its tanh."""
    return 2 * math.atanh(reviews.gold_score(prompt, response))


@pytest.mark.parametrize(
    "response, value",
    [
        (" is good .", 0.5),
        (" feels awful .", -1.0),
        (" is not good .", -0.25),
        (" is never good .", -0.35),
        (" is slightly dull .", -0.24),
        (" is absolutely superb .", 1.0),  # bounded
        (" is not very bad .", 0.325),
        (" is good and the plot is bad .", 0.0),
        (" is good , everyone loved the plot but it was filmed in spain .", 1.5),
        (" is good , the music is fine .", 0.5 - 0.5),  # the prompt's aspect again
        (" is good , the plot is good .", 0.5 - 0.5),  # the adjective again
        (" is good , it has three acts , it has three acts .", 0.5 - 0.5),
        (" is good , i loved the plot , we loved the hero .", 0.5 + 1.0 - 0.5),
        (" is good", 0.5 - 1.0),  # no full stop
        (" is good good .", -1.0),
        (" superb superb superb .", -1.0),
        (" is not .", -1.0),
        (" is good , .", 0.5 - 1.0),
        (" .", -1.0),
        ("", -2.0),
        (" is good . the plot is fine .", -1.0),  # a full stop inside
    ],
)
def test_gold_by_hand(response, value):
    assert total(response) == pytest.approx(value, abs=1e-9)


def test_gold_needs_an_aspect_in_the_prompt():
    assert total(" is good .", prompt="in the end the weather") == pytest.approx(-1.0)
    assert total(" is good .", prompt="") == pytest.approx(-1.0)


def clause_values(prompt, response):
    seen = set()
    clauses = reviews._clauses(response.split()[:-1])
    clauses[0] = ["the", prompt.split()[-1], *clauses[0]]
    return [reviews._clause_value(clause, seen) for clause in clauses]


@pytest.mark.parametrize("clauses", [1, 2, 4, 7, 15])
def test_the_grammar_writes_nothing_that_gold_calls_broken(monkeypatch, clauses):
    monkeypatch.setattr(reviews, "MALFORMED", 99.0)
    monkeypatch.setattr(reviews, "REPEATED", 99.0)
    rng = random.Random(1)
    for _ in range(1000):
        prompt = reviews.write_prompt(rng)
        response = reviews.write_response(rng, prompt, clauses=clauses)
        values = clause_values(prompt, response)
        assert response.endswith(" .") and clauses / 2 <= len(values) <= clauses
        assert max(values) <= 1, response
        marks = [word for word in response.split() if word in reviews.ADJECTIVES or word in reviews.ASPECTS]
        assert len(marks) == len(set(marks)) and prompt.split()[-1] not in marks


def test_mood_moves_gold_and_the_mean_is_neutral():
    rng = random.Random(2)

    def mean(mood, count):
        texts = [
            (prompt, reviews.write_response(rng, prompt, mood))
            for prompt in (reviews.write_prompt(rng) for _ in range(count))
        ]
        return statistics.mean(reviews.gold_score(*text) for text in texts)

    assert mean(1.0, 300) > 0.5 and mean(-1.0, 300) < -0.5
    assert abs(mean(None, 3000)) < 0.04  # standard error 0.01


def test_damage_costs_gold():
    rng = random.Random(3)
    differences = []
    for _ in range(1000):
        prompt = reviews.write_prompt(rng)
        response = reviews.write_response(rng, prompt, 1.0)
        differences.append(
            reviews.gold_score(prompt, reviews.corrupt(rng, response)) - reviews.gold_score(prompt, response)
        )
    assert statistics.mean(differences) < -0.2 and max(differences) < 0.5


def test_the_annotator_is_bradley_terry():
    rng = random.Random(4)
    prompt, better, worse = "in the end the music", " is good .", " is decent ."
    gap = reviews.gold_score(prompt, better) - reviews.gold_score(prompt, worse)
    wins = 0
    for _ in range(4000):
        first, second = reviews.annotate(rng, prompt, (better, worse))
        wins += first > second
    expected = 1 / (1 + math.exp(-gap / reviews.NOISE))
    assert 0.6 < expected < 0.95
    assert wins / 4000 == pytest.approx(expected, abs=4 * math.sqrt(expected * (1 - expected) / 4000))
    ratings = [reviews.annotate(rng, prompt, (better,))[0] for _ in range(4000)]
    assert statistics.mean(ratings) == pytest.approx(reviews.gold_score(prompt, better), abs=0.01)


def test_the_task_is_seeded_and_its_held_out_prompts_are_new():
    task = load_task("reviews", 0)
    assert task == load_task("reviews", 0) and task.demonstrations != load_task("reviews", 1).demonstrations
    held_out = set(task.eval_prompts)
    shown = {each.prompt for each in task.demonstrations} | {each.prompt for each in task.rankings} | set(task.prompts)
    assert len(held_out) == 96 and held_out.isdisjoint(shown)
    assert {each.prompt for each in task.heldout_rankings} <= held_out
    assert all(len(each.responses) == reviews.RESPONSES for each in task.rankings)
    # With these ratings a perfect judge agrees with the annotator on 95 % of the pairs.
    agree = [
        (gold_a > gold_b) == (a > b)
        for each in task.rankings
        for gold, scores in [([reviews.gold_score(each.prompt, r) for r in each.responses], each.scores)]
        for gold_a, gold_b, a, b in [(gold[0], gold[1], scores[0], scores[1])]
        if gold_a != gold_b
    ]
    assert 0.92 < statistics.mean(agree) < 0.98


@pytest.mark.parametrize("name", ["reviews-7", "reviews-101"])
def test_a_length_without_enough_words_is_refused(name):
    with pytest.raises(UserError, match=rf"^{name}: a review must have 8 to 100 tokens, got {name[8:]}$"):
        load_task(name, 0)


@pytest.mark.parametrize("name, length", [("reviews", reviews.RESPONSE_LENGTH), ("reviews-16", 16), ("reviews-96", 96)])
def test_every_response_fits_the_response_length(name, length):
    task = load_task(name, 0)
    tokenizer = train_tokenizer(task.texts())
    lengths = [len(encode_response(tokenizer, each.response)) for each in task.demonstrations]
    assert length / 2 < max(lengths) <= task.response_length == length
    words = {word for each in task.demonstrations for word in each.response.split()}
    assert all(len(encode_prompt(tokenizer, " " + word)) == 1 for word in words)

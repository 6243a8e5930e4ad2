"""Labels for new samples: rankings of responses by a gold judge, by a judge that is asked, or by a person."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from pathlib import Path

from .config import UserError
from .data import Gold, Ranking
from .files import write_atomically
from .formats import Parser
from .judges import Judge
from .readers import read_rows

Samples = Sequence[tuple[str, Sequence[str]]]
"""Prompts, each with its responses."""


def by_gold(gold: Gold, samples: Samples) -> list[Ranking]:
    """Scored by a judge of texts, such as a reward model's."""
    prompts = [prompt for prompt, responses in samples for _ in responses]
    scores = iter(gold(prompts, [response for _, responses in samples for response in responses]))
    return [
        Ranking(prompt, tuple(responses), tuple(itertools.islice(scores, len(responses))))
        for prompt, responses in samples
    ]


def by_comparison(judge: Judge, samples: Samples) -> tuple[list[Ranking], dict[str, float]]:
    """Every pair of a prompt is asked in both orders and the answers averaged.

    A response's score is the mean probability of its being better than another one, over the pairs with both answers;
    a prompt with a response that has no such pair is left out.

    Returns:
        rankings; label/position_bias: how much likelier than half the response shown first wins, −0.5 to 0.5 (0 if the
        order does not matter); label/disagreement: share of the pairs whose winner depends on the order.
    """
    pairs = [
        (number, i, j)
        for number, (_, responses) in enumerate(samples)
        for i, j in itertools.combinations(range(len(responses)), 2)
    ]
    shown = [(samples[n][0], samples[n][1][i], samples[n][1][j]) for n, i, j in pairs]
    turned = [(prompt, second, first) for prompt, first, second in shown]
    answers = judge.compare([*shown, *turned])
    wins: list[list[list[float]]] = [[[] for _ in responses] for _, responses in samples]
    first_wins, disagreements, answered = 0.0, 0, 0
    for (number, i, j), straight, reverse in zip(pairs, answers, answers[len(pairs) :]):
        if straight is None or reverse is None:
            continue
        better = (straight + 1 - reverse) / 2
        wins[number][i].append(better)
        wins[number][j].append(1 - better)
        first_wins += (straight + reverse) / 2
        disagreements += (straight - 0.5) * (reverse - 0.5) > 0
        answered += 1
    rankings = [
        Ranking(prompt, tuple(responses), tuple(sum(each) / len(each) for each in won))
        for (prompt, responses), won in zip(samples, wins)
        if all(won)
    ]
    metrics = {
        "label/position_bias": first_wins / answered - 0.5 if answered else math.nan,
        "label/disagreement": disagreements / answered if answered else math.nan,
    }
    return rankings, metrics | _counted(judge)


def by_rating(judge: Judge, samples: Samples) -> tuple[list[Ranking], dict[str, float]]:
    """Every response rated by itself; a prompt with an unrated response is left out."""
    ratings = iter(judge.rate([(prompt, response) for prompt, responses in samples for response in responses]))
    rankings = []
    for prompt, responses in samples:
        found = list(itertools.islice(ratings, len(responses)))
        scores = tuple(rating for rating in found if rating is not None)
        if len(scores) == len(found):
            rankings.append(Ranking(prompt, tuple(responses), scores))
    return rankings, _counted(judge)


def _counted(judge: Judge) -> dict[str, float]:
    """label/bad_replies, label/failed …: what the judge counted since the last look."""
    counts = {f"label/{name}": float(count) for name, count in judge.counts.items()}
    judge.counts.clear()
    return counts


# By a person


def export(path: Path, samples: Samples) -> None:
    """Write rows {"prompt", "responses", "scores"} whose scores are null, for a person to fill in."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [
        {"prompt": prompt, "responses": list(responses), "scores": [None] * len(responses)}
        for prompt, responses in samples
    ]
    write_atomically(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def read_exported(path: Path) -> list[Ranking]:
    """The rows that have scores; responses may have been edited or added. Raises UserError naming a bad row."""
    rankings, parse = [], Parser()
    for where, row, *_ in read_rows(path):
        if row.get("scores") and all(score is None for score in row["scores"]):
            continue
        ranking = parse(where, row).ranking
        if ranking is None:
            raise UserError(f'{where}: a labelled row must have "prompt", "responses" and "scores"')
        rankings.append(ranking)
    return rankings

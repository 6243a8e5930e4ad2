"""What a reward model trains on: rankings as tokens, batches of them, and scores without an annotator's bias."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .data import Ranking, collate, encode_prompt, encode_response

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Example:
    """A ranking with the token ids of each response's whole text."""

    texts: list[list[int]]
    scores: tuple[float, ...]
    margin: float | None = None
    probability: float | None = None
    source: str = ""


@dataclass
class RankingBatch:
    """The responses of some rankings, all K of them in a row, and the P pairs among them.

    tokens, attention_mask: [K, L], padded on the right. targets: [K] fp32, the given scores. rankings: [K], the ranking
    of each response. ranks: [K], its place there: 0 is best, equal scores share one.
    chosen, rejected: [P] indices into K. prompts: [P], the ranking of each pair. margins: [P] fp32, the wanted
    difference where the data gives one, else NaN. probabilities: [P] fp32 that the chosen one is better, 1 where that
    is certain. sources: the data set of each ranking.
    """

    tokens: Tensor
    attention_mask: Tensor
    targets: Tensor
    rankings: Tensor
    ranks: Tensor
    chosen: Tensor
    rejected: Tensor
    prompts: Tensor
    margins: Tensor
    probabilities: Tensor
    sources: list[str]

    def to(self, device: torch.device | str) -> RankingBatch:
        values: dict[str, Any] = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {name: each.to(device) for name, each in values.items() if isinstance(each, Tensor)}
        return replace(self, **moved)


def encode(
    tokenizer: PreTrainedTokenizerBase, rankings: Sequence[Ranking], max_length: int, *, aligned: bool = False
) -> list[Example]:
    """Texts of at most `max_length` tokens, which lose their start; aligned: as much of it for all of a ranking.

    Aligned texts keep their tokens in the same places, prompt and shared words included; what is then still too long
    loses its end.
    """
    examples = []
    for each in rankings:
        prompt = encode_prompt(tokenizer, each.prompt, start=False)
        texts = [prompt + encode_response(tokenizer, response) for response in each.responses]
        if aligned:
            lost = min(max(max(map(len, texts)) - max_length, 0), len(prompt))
            texts = [text[lost : lost + max_length] for text in texts]
        else:
            texts = [text[-max_length:] for text in texts]
        examples.append(Example(texts, each.scores, each.margin, each.probability, each.source))
    return examples


def batch_of(examples: Sequence[Example], pad_id: int) -> RankingBatch:
    texts = [text for each in examples for text in each.texts]
    batch = collate([[]] * len(texts), texts, pad_id)
    pairs: list[tuple[int, int, int]] = []
    margins: list[float] = []
    probabilities: list[float] = []
    ranks: list[int] = []
    first = 0
    for number, each in enumerate(examples):
        found = ordered_pairs(each.scores)
        pairs += [(first + better, first + worse, number) for better, worse in found]
        margins += [math.nan if each.margin is None else each.margin] * len(found)
        probabilities += [1.0 if each.probability is None else each.probability] * len(found)
        order = sorted(set(each.scores), reverse=True)
        ranks += [order.index(score) for score in each.scores]
        first += len(each.scores)
    chosen, rejected, prompts = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 3).unbind(1)
    return RankingBatch(
        tokens=batch.tokens,
        attention_mask=batch.attention_mask,
        targets=torch.tensor([score for each in examples for score in each.scores]),
        rankings=torch.tensor([number for number, each in enumerate(examples) for _ in each.scores]),
        ranks=torch.tensor(ranks),
        chosen=chosen,
        rejected=rejected,
        prompts=prompts,
        margins=torch.tensor(margins),
        probabilities=torch.tensor(probabilities),
        sources=[each.source for each in examples],
    )


def ordered_pairs(given: Sequence[float]) -> list[tuple[int, int]]:
    """(better, worse) for each pair of unequal scores."""
    pairs = itertools.combinations(range(len(given)), 2)
    return [(i, j) if given[i] > given[j] else (j, i) for i, j in pairs if given[i] != given[j]]


def batches_of(examples: Sequence[Example], size: int, pad_id: int) -> list[RankingBatch]:
    return [batch_of(examples[start : start + size], pad_id) for start in range(0, len(examples), size)]


# Annotators


def annotator_biases(rankings: Sequence[Ranking]) -> dict[str, float]:
    """How far each annotator's mean score lies above the mean of all scores whose annotator is known."""
    given = defaultdict(list)
    for each in rankings:
        for name, score in zip(each.annotators, each.scores):
            if name:
                given[name].append(score)
    everything = [score for scores in given.values() for score in scores]
    mean = sum(everything) / max(len(everything), 1)
    return {name: sum(scores) / len(scores) - mean for name, scores in given.items()}


def without_biases(rankings: Sequence[Ranking], biases: Mapping[str, float]) -> list[Ranking]:
    """Each score less the bias of who gave it; one by an unknown annotator stays as it is."""
    return [
        replace(each, scores=tuple(s - biases.get(name, 0.0) for s, name in zip(each.scores, each.annotators)))
        if each.annotators
        else each
        for each in rankings
    ]

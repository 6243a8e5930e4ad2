"""Candidates: several responses to one prompt, from any sources, with one score each.

A source draws responses to prompts: the policy itself (plain sampling, nucleus, beam, diverse beam), another model, or
the data that provides them. What people chose in the data is a candidate like any other: the scores decide.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .chat import Chat
from .config import UserError
from .data import Batch, Ranking, collate, decode, encode_prompt, encode_response
from .decoding import beam_search, nucleus_sample
from .formats import Parser
from .model import load_policy, response_logprobs
from .readers import read_rows
from .rollout import Rollout, generate
from .scorer import Scorer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PROVIDED = "provided"
DECODINGS = ("sample", "top_p", "beam", "diverse_beam")


@dataclass(frozen=True)
class Candidates:
    """The candidates of one prompt, as tokens (the EOS included where one ended) and as text, with their scores.

    sources: where each comes from. chosen: the place of the response that the data itself holds for the best.
    """

    prompt: str
    prompt_tokens: list[int]
    responses: list[list[int]]
    texts: list[str]
    scores: tuple[float, ...]
    sources: tuple[str, ...]
    chosen: int | None = None

    @property
    def best(self) -> int:
        """Place of the highest score, the first of equals."""
        return max(range(len(self.scores)), key=lambda i: (self.scores[i], -i))


@dataclass(frozen=True)
class Source:
    """draw: token ids of some responses to each prompt, in the policy's tokens."""

    name: str
    draw: Callable[[list[str]], list[list[list[int]]]]


def own_source(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    decoding: str,
    *,
    count: int,
    response_length: int,
    temperature: float,
    top_p: float = 0.9,
    diversity: float = 1.0,
    micro_batch: int | None = None,
) -> Source:
    """`count` responses of the policy to each prompt. diverse_beam: each beam is a group of its own."""
    settings: dict[str, Any] = {"response_length": response_length, "temperature": temperature}

    def sampled(prompts: list[str]) -> list[list[list[int]]]:
        repeated = [prompt for prompt in prompts for _ in range(count)]
        if decoding == "sample":
            batch = generate(policy, tokenizer, repeated, micro_batch=micro_batch, **settings).batch
            rows = [row[mask].tolist() for row, mask in zip(batch.responses, batch.mask)]
        else:
            encoded = [encode_prompt(tokenizer, prompt) for prompt in repeated]
            size = micro_batch or len(encoded)
            rows = [
                row
                for start in range(0, len(encoded), size)
                for row in nucleus_sample(policy, tokenizer, encoded[start : start + size], top_p=top_p, **settings)
            ]
        return [rows[start : start + count] for start in range(0, len(rows), count)]

    def searched(prompts: list[str]) -> list[list[list[int]]]:
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        size = max(1, micro_batch // count) if micro_batch else len(encoded)
        diverse: dict[str, Any] = {"groups": count, "diversity": diversity} if decoding == "diverse_beam" else {}
        return [
            found
            for start in range(0, len(encoded), size)
            for found in beam_search(
                policy, tokenizer, encoded[start : start + size], beams=count, **diverse, **settings
            )
        ]

    return Source(decoding, sampled if decoding in ("sample", "top_p") else searched)


def model_source(
    name: str,
    path: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    count: int,
    response_length: int,
    temperature: float,
    micro_batch: int | None = None,
    **where: Any,
) -> Source:
    """`count` samples of another model to each prompt; its text is encoded anew with the policy's `tokenizer`.

    A response that did not end, or that has more than `response_length` of the policy's tokens, has no EOS.
    """
    model, own_tokenizer = load_policy(path, **where)

    def draw(prompts: list[str]) -> list[list[list[int]]]:
        repeated = [prompt for prompt in prompts for _ in range(count)]
        rollout = generate(
            model,
            own_tokenizer,
            repeated,
            response_length=response_length,
            temperature=temperature,
            micro_batch=micro_batch,
        )
        rows = [
            encode_response(tokenizer, text)[: None if ended else -1][:response_length]
            for text, ended in zip(rollout.responses, rollout.terminated.tolist())
        ]
        return [rows[start : start + count] for start in range(0, len(rows), count)]

    return Source(name, draw)


def read_candidates(
    path: str, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, str] | None = None
) -> list[Candidates]:
    """The provided candidates of a file or folder; a row that is no ranking is an error with its file and line."""
    found = []
    parse = Parser(Chat(tokenizer=tokenizer), columns)
    for where, values, source, _ in read_rows(Path(path)):
        ranking = parse(where, values, source).ranking
        if ranking is None:
            raise UserError(
                f'{where}: a row of candidates must have "prompt", "responses" and "scores", or "chosen" and "rejected"'
            )
        found.append(provided_candidates(ranking, tokenizer))
    return found


def provided_candidates(ranking: Ranking, tokenizer: PreTrainedTokenizerBase) -> Candidates:
    count = len(ranking.responses)
    return Candidates(
        ranking.prompt,
        encode_prompt(tokenizer, ranking.prompt),
        [encode_response(tokenizer, response) for response in ranking.responses],
        list(ranking.responses),
        ranking.scores,
        (PROVIDED,) * count,
        chosen=max(range(count), key=lambda i: (ranking.scores[i], -i)),
    )


def draw_candidates(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
    prompts: Sequence[str],
    *,
    provided: Sequence[Candidates] = (),
) -> list[Candidates]:
    """Responses of every source to each prompt, the provided ones (as many as prompts, or none) after them, with the
    scores of `score_candidates`. The token ids are kept as they were drawn."""
    drawn = [source.draw(list(prompts)) for source in sources]
    groups = []
    for number, prompt in enumerate(prompts):
        given = provided[number] if provided else None
        responses = [response for rows in drawn for response in rows[number]]
        names = [source.name for source, rows in zip(sources, drawn) for _ in rows[number]]
        chosen = None if given is None or given.chosen is None else len(responses) + given.chosen
        texts = [decode(tokenizer, without_eos(each, tokenizer.eos_token_id)) for each in responses]
        if given:
            responses, texts, names = responses + given.responses, texts + given.texts, [*names, *given.sources]
        groups.append(Candidates(prompt, encode_prompt(tokenizer, prompt), responses, texts, (), tuple(names), chosen))
    return score_candidates(groups, tokenizer, scorer)


def score_candidates(
    groups: Sequence[Candidates],
    tokenizer: PreTrainedTokenizerBase,
    scorer: Scorer,
) -> list[Candidates]:
    """The same candidates with the scorer's scores, without those that it cannot score.

    A reward model's score is read at the last token: the EOS or, without one, where the response was cut off. Raises
    UserError where a prompt has no candidate left.
    """
    responses = [each for group in groups for each in group.responses]
    rollout = Rollout(
        candidate_batch(groups, tokenizer),
        [group.prompt for group in groups for _ in group.responses],
        [text for group in groups for text in group.texts],
        torch.tensor([each[-1:] == [tokenizer.eos_token_id] for each in responses]),
    )
    return [without_missing(group) for group in with_scores(groups, scorer(rollout).scores)]


def without_missing(group: Candidates) -> Candidates:
    """The candidates that have a score."""
    kept = [i for i, score in enumerate(group.scores) if not math.isnan(score)]
    if len(kept) == len(group.scores):
        return group
    if not kept:
        raise UserError(
            f"none of the {len(group.scores)} responses to this prompt can be scored: {group.prompt!r:.200}"
        )
    return replace(
        group,
        responses=[group.responses[i] for i in kept],
        texts=[group.texts[i] for i in kept],
        scores=tuple(group.scores[i] for i in kept),
        sources=tuple(group.sources[i] for i in kept),
        chosen=kept.index(group.chosen) if group.chosen in kept else None,
    )


def penalize_distance(
    groups: Sequence[Candidates],
    tokenizer: PreTrainedTokenizerBase,
    policy: PreTrainedModel,
    ref: PreTrainedModel,
    *,
    kl_coef: float,
    temperature: float,
    micro_batch: int | None = None,
) -> list[Candidates]:
    """Scores minus kl_coef · Σ_t (log π(y_t) − log π_ref(y_t)), the k1 estimate of a sequence's KL in nats."""
    batch = candidate_batch(groups, tokenizer).to(policy.device)
    with torch.no_grad():
        ours, theirs = (
            response_logprobs(model, batch, temperature, micro_batch=micro_batch).sum(1) for model in (policy, ref)
        )
    score = torch.tensor([score for group in groups for score in group.scores])
    return with_scores(groups, score - kl_coef * (ours - theirs).cpu())


def candidate_batch(groups: Sequence[Candidates], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Every candidate a row, in order."""
    prompts = [group.prompt_tokens for group in groups for _ in group.responses]
    return collate(prompts, [each for group in groups for each in group.responses], tokenizer.pad_token_id)


def with_scores(groups: Sequence[Candidates], score: Tensor) -> list[Candidates]:
    parts = score.cpu().split([len(group.responses) for group in groups])
    return [replace(group, scores=tuple(part.tolist())) for group, part in zip(groups, parts)]


def without_eos(tokens: Sequence[int], eos: int) -> Sequence[int]:
    return tokens[:-1] if tokens and tokens[-1] == eos else tokens


def source_metrics(groups: Sequence[Candidates]) -> dict[str, float]:
    """source/<name>/score: mean score; source/<name>/best: share of the prompts whose best candidate it gave."""
    metrics = {}
    for name in sorted({name for group in groups for name in group.sources}):
        found = [score for group in groups for score, source in zip(group.scores, group.sources) if source == name]
        metrics[f"source/{name}/score"] = sum(found) / len(found)
        metrics[f"source/{name}/best"] = sum(group.sources[group.best] == name for group in groups) / len(groups)
    return metrics


def mean_score(groups: Sequence[Candidates]) -> float:
    flat = [score for group in groups for score in group.scores]
    return sum(flat) / len(flat)

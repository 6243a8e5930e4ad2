"""Feedback on tokens: rows of marked responses, and the label that each token gets from byte spans."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import UserError
from .data import Batch, collate, encode_prompt
from .offsets import text_spans
from .readers import read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIGNS = {"good": 1.0, "bad": -1.0}


@dataclass(frozen=True)
class Span:
    """Bytes start … end − 1 of a response's UTF-8 text; an empty span at its end is the EOS. label: sign · weight."""

    start: int
    end: int
    label: float


@dataclass(frozen=True)
class Marked:
    """A response in tokens (EOS included) with the label of each: sign and weight, 0 where it is not marked."""

    prompt: list[int]
    response: list[int]
    labels: list[float]


def read_feedback(path: str, tokenizer: PreTrainedTokenizerBase, overlap: float = 0.0) -> list[Marked]:
    """The marked responses of a file or folder of .jsonl or .json rows.

    A row is {"prompt": text, "response": text, "spans": [span, …]}, a span {"start", "end", "label": "good" or "bad",
    "weight": 1 unless given} with byte offsets into the response's UTF-8 text. overlap: as in `label_tokens`.

    Raises UserError for a row or span that is not of this form, naming file and line, and where no token is marked.
    """
    found = []
    for where, row, *_ in read_rows(Path(path)):
        for key in ("prompt", "response"):
            if not isinstance(row.get(key), str):
                raise UserError(f'{where}: "{key}" must be a string, got {row.get(key)!r:.60}')
        spans = row.get("spans")
        if not isinstance(spans, list):
            raise UserError(f'{where}: "spans" must be a list, got {spans!r:.60}')
        size = len(row["response"].encode())
        parsed = [parse_span(where, span, size) for span in spans]
        found.append(mark(tokenizer, row["prompt"], row["response"], parsed, overlap))
    if not any(any(each.labels) for each in found):
        raise UserError(f"{path}: no span marks a token")
    return found


def parse_span(where: str, span: Any, size: int) -> Span:
    if not isinstance(span, dict) or not {"start", "end", "label"} <= set(span):
        raise UserError(f'{where}: a span must have "start", "end" and "label", got {span!r:.80}')
    start, end, label, weight = span["start"], span["end"], span["label"], span.get("weight", 1)
    whole = all(isinstance(each, int) and not isinstance(each, bool) for each in (start, end))
    if not whole or not 0 <= start <= end <= size:
        raise UserError(f"{where}: a span must lie in 0 to {size}, the bytes of the response, got {start!r} to {end!r}")
    if start == end and end < size:
        raise UserError(f"{where}: a span of no bytes marks the end of the response, {size}, got {start}")
    if label not in SIGNS:
        raise UserError(f'{where}: "label" must be "good" or "bad", got {label!r:.60}')
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise UserError(f'{where}: "weight" must be a number greater than 0, got {weight!r:.60}')
    return Span(start, end, SIGNS[label] * weight)


def mark(
    tokenizer: PreTrainedTokenizerBase, prompt: str, response: str, spans: Sequence[Span], overlap: float = 0.0
) -> Marked:
    """A response in tokens, with the labels that the spans give them."""
    ids, places = text_spans(tokenizer, response, special_tokens=False)
    size = len(response.encode())
    places = [*places, (size, size)]
    labels = label_tokens(places, spans, overlap)
    return Marked(encode_prompt(tokenizer, prompt), [*ids, tokenizer.eos_token_id], labels)


def label_tokens(places: Sequence[tuple[int, int]], spans: Sequence[Span], overlap: float = 0.0) -> list[float]:
    """The label of each token, from the byte ranges of the tokens.

    A span marks a token where it covers at least the share `overlap` of the token's bytes, and one byte; a token of no
    bytes (EOS) where it reaches its place from an empty span there. Bad wins over good, then the larger weight.
    """
    labels = []
    for start, end in places:
        given = []
        for span in spans:
            covered = min(end, span.end) - max(start, span.start)
            empty = start == end == span.start == span.end
            if empty or (covered > 0 and covered >= overlap * (end - start)):
                given.append(span.label)
        worst = min(given, default=0.0)
        labels.append(worst if worst < 0 else max(given, default=0.0))
    return labels


def batch_of(rows: Sequence[Marked], tokenizer: PreTrainedTokenizerBase) -> tuple[Batch, Tensor]:
    """The responses, and their labels [B, T] fp32, 0 on padding."""
    batch = collate([each.prompt for each in rows], [each.response for each in rows], tokenizer.pad_token_id)
    labels = torch.zeros(batch.mask.shape)
    for row, each in enumerate(rows):
        labels[row, : len(each.labels)] = torch.tensor(each.labels)
    return batch, labels

"""Where the tokens of a response stand in its text: byte offsets, which any two tokenizers share."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .data import decode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")
"""How SentencePiece's byte fallback writes one byte."""


def byte_spans(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[tuple[int, int]]:
    """(start, end) of each token in the UTF-8 bytes of the text of the tokens without EOS; one after the other.

    An EOS is (n, n), of no length at the end of the text. Exact, also inside a character that several tokens share,
    for byte-level tokenizers and for SentencePiece's byte fallback; elsewhere, and where bytes are no character and
    decode to U+FFFD, the token that completes the text has all of it.
    """
    ended = bool(ids) and ids[-1] == tokenizer.eos_token_id
    text = ids[:-1] if ended else ids
    backend = getattr(tokenizer, "backend_tokenizer", None)
    byte_level = backend is not None and "ByteLevel" in str(backend.decoder)
    total = len(decode(tokenizer, text).encode())
    lengths = _alphabet_lengths(tokenizer, text) if byte_level else []
    if sum(lengths) != total:
        lengths = _decoded_lengths(tokenizer, text)
        lengths[-1] += total - sum(lengths)
    ends = list(itertools.accumulate(lengths + [0] * ended))
    return list(zip([0, *ends], ends))


def _alphabet_lengths(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Bytes of each token of a byte-level vocabulary: one for a character of its alphabet, all of an added token."""
    added = tokenizer.added_tokens_decoder
    tokens = tokenizer.convert_ids_to_tokens(list(ids))
    return [len(token.encode()) if i in added else len(token) for i, token in zip(ids, tokens)]


def _decoded_lengths(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Bytes that each token adds to the text, decoded after the token before it: a first one may lose its space."""

    def size(window: list[int]) -> int:
        return len(decode(tokenizer, window).encode())

    lengths: list[int] = []
    window: list[int] = []  # the last token that ended a character, and those since
    own = 0  # bytes of that token alone
    for place, (i, token) in enumerate(zip(ids, tokenizer.convert_ids_to_tokens(list(ids)))):
        if BYTE_TOKEN.fullmatch(token):
            lengths.append(1)
            continue
        if place and not window:
            window, own = [i], size([i])
        window.append(i)
        if decode(tokenizer, window).endswith("\ufffd"):
            lengths.append(0)
            continue
        lengths.append(size(window) - own)
        window, own = [i], size([i])
    return lengths


def text_spans(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special_tokens: bool = True
) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids of a text and (start, end) of each in its UTF-8 bytes, one after the other.

    What a tokenizer drops, such as the space before a word, belongs to the token after it; what it adds (BOS) has no
    length. Bytes of a character that several tokens share go to them in turn. special_tokens: let it add its own.
    """
    coded = tokenizer(
        text, add_special_tokens=special_tokens, return_offsets_mapping=True, return_special_tokens_mask=True
    )
    ids, tokens = coded["input_ids"], tokenizer.convert_ids_to_tokens(coded["input_ids"])
    starts = list(itertools.accumulate((len(each.encode()) for each in text), initial=0))
    ends: list[int] = []
    last = 0
    shared: list[int] = []  # places of the tokens since a character's start, and the character's first byte
    first = 0
    for place, ((start, end), added) in enumerate(zip(coded["offset_mapping"], coded["special_tokens_mask"])):
        if added and start == end:
            ends.append(last)
            continue
        begin, stop = starts[start], max(starts[end], last)
        if not shared or begin >= last:  # a new character
            shared, first = [], last
        shared.append(place)
        ends.append(stop)
        last = stop
        if len(shared) > 1:
            _share(ends, shared, first, stop, tokens)
    return ids, list(zip([0, *ends], ends))


def _share(ends: list[int], places: list[int], first: int, stop: int, tokens: Sequence[str]) -> None:
    """Divide the bytes from `first` to `stop` among tokens by the bytes that the vocabulary writes each with."""
    sizes = list(itertools.accumulate(1 if BYTE_TOKEN.fullmatch(tokens[i]) else len(tokens[i]) for i in places))
    for place, size in zip(places, sizes):
        ends[place] = first + (stop - first) * size // sizes[-1]

"""Hashes of what a run depends on and does not save: the frozen models, the tokenizer, the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from .data import encode_prompt, encode_response, encode_text

PROBE = ("The film's plot: naïve — 12.50 €?\n\n \tÜbung 映画 🎬", " Answer:  yes.\n")
"""A prompt and a response whose token ids show how a tokenizer splits, and where texts get special tokens."""


def fingerprint(thing: Any) -> str:
    """SHA-256 of a model's weights, of how a tokenizer renders text, or of data (numbers, strings, dataclasses …)."""
    digest = hashlib.sha256()
    if isinstance(thing, torch.nn.Module):
        pieces = _weights(thing)
    elif hasattr(thing, "get_vocab"):
        pieces = iter([_rendering(thing)])
    else:
        pieces = _data(thing)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _weights(model: torch.nn.Module) -> Iterator[bytes | memoryview]:
    for name, tensor in model.state_dict().items():
        yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
        yield memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    config = getattr(model, "config", None)
    yield repr([getattr(config, name, None) for name in ("score_mean", "score_std")]).encode()


def _rendering(tokenizer: Any) -> bytes:
    prompt, response = PROBE
    return json.dumps(
        {
            "vocabulary": sorted(tokenizer.get_vocab().items()),
            "special": {name: str(token) for name, token in sorted(tokenizer.special_tokens_map.items())},
            "chat template": getattr(tokenizer, "chat_template", None),
            "prompt": encode_prompt(tokenizer, prompt),
            "empty prompt": encode_prompt(tokenizer, ""),
            "response": encode_response(tokenizer, response),
            "text": encode_text(tokenizer, prompt, response),
        }
    ).encode()


def _data(value: Any) -> Iterator[bytes]:
    """The parts of a value in order, each with its type and length in front, so that no two values share a stream."""
    if is_dataclass(value):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if callable(value):  # a judge or a reward function: its code is the user's to keep
        return
    if isinstance(value, dict):
        value = list(value.items())
    if isinstance(value, list | tuple):
        yield f"[{len(value)}".encode()
        for item in value:
            yield from _data(item)
    else:
        content = repr(value).encode("utf-8", "backslashreplace")
        yield f"{type(value).__name__}{len(content)}:".encode() + content

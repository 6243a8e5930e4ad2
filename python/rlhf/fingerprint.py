"""Hashes of what a run depends on and does not save: the frozen models, the tokenizer, the data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch

from .chat import renderer_hash
from .data import encode_prompt, encode_response, encode_text

PROBE = ("The film's plot: naïve — 12.50 €?\n\n \tÜbung 映画 🎬", " Answer:  yes.\n")
"""A prompt and a response whose token ids show how a tokenizer splits, and where texts get special tokens."""


def fingerprint(thing: Any) -> str:
    """SHA-256 of a model's weights, of how a tokenizer renders text, or of data (numbers, strings, dataclasses …)."""
    digest = hashlib.sha256()
    for piece in _pieces(thing):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(thing: Any) -> Iterator[bytes | memoryview]:
    """The parts of a thing in order, data with its type and length in front, so that no two share a stream."""
    if isinstance(thing, torch.nn.Module):
        yield from _weights(thing)
        return
    if hasattr(thing, "get_vocab"):
        yield _rendering(thing)
        return
    if is_dataclass(thing):
        thing = {field.name: getattr(thing, field.name) for field in fields(thing)}
    if callable(thing):  # a judge or a reward function: its code is the user's to keep
        return
    if isinstance(thing, dict):
        thing = list(thing.items())
    if isinstance(thing, list | tuple):
        yield f"[{len(thing)}".encode()
        for item in thing:
            yield from _pieces(item)
    else:
        content = repr(thing).encode("utf-8", "backslashreplace")
        yield f"{type(thing).__name__}{len(content)}:".encode() + content


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
            "renderer": renderer_hash(tokenizer),
            "prompt": encode_prompt(tokenizer, prompt),
            "empty prompt": encode_prompt(tokenizer, ""),
            "response": encode_response(tokenizer, response),
            "text": encode_text(tokenizer, prompt, response),
        }
    ).encode()

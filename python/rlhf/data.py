"""Tasks and batches: what a data source gives to the stages, and how texts become padded token tensors.

The two rules that every stage shares stand here, once each:

* text ↔ tokens: a text is `prompt + response`, concatenated as they are; both are tokenised on their own, so that the
  border between them is a token border in every stage, and one EOS ends each response;
* padding: prompts left, responses right. Masks come from lengths, never from the pad id, so pad may equal EOS.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

HELDOUT_FRACTION = 0.1
FILE_RESPONSE_LENGTH = 48
"""Tokens of a response for data read from files, where nothing better is known; a stage's flag overrides it."""


@dataclass(frozen=True)
class Demonstration:
    prompt: str
    response: str


@dataclass(frozen=True)
class Ranking:
    """Responses to one prompt and their scores: higher is better, equal scores are a tie."""

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]


Gold = Callable[[list[str], list[str]], list[float]]
"""The judge that training never sees: (prompts, responses) → one score each, higher is better."""


@dataclass(frozen=True)
class Task:
    name: str
    demonstrations: list[Demonstration]
    rankings: list[Ranking]
    heldout_rankings: list[Ranking]
    prompts: list[str]
    eval_prompts: list[str]
    gold: Gold | None
    response_length: int
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The first row of the data with each prompt: its columns reach a reward function."""

    def texts(self) -> list[str]:
        """Every training text, for a tokenizer that is trained on the data."""
        demonstrations = [each.prompt + each.response for each in self.demonstrations]
        ranked = [each.prompt + response for each in self.rankings for response in each.responses]
        return demonstrations + ranked + ([] if demonstrations or ranked else list(self.prompts))


def load_task(data: str, seed: int) -> Task:
    """The task of a data source; splits are disjoint and a function of the seed.

    Args:
        data: "reviews", the generated task ("reviews-96": of up to 96 tokens a response); or a folder with `*.pos` and
            `*.neg` files of one sentence a line; or a .jsonl or .json file, or a folder of them, with rows {"prompt",
            "response"}, {"prompt", "chosen", "rejected"}, {"prompt", "responses", "scores"} or {"prompt"}.
        seed: of the generated texts and of every split.

    Raises:
        UserError: a row that fits none of the forms (file and line are named), or nothing to read.
        FileNotFoundError: a path that is not there.
    """
    if generated := re.fullmatch(r"reviews(?:-(\d+))?", data):
        from .reviews import RESPONSE_LENGTH, reviews_task

        return reviews_task(seed, int(generated[1] or RESPONSE_LENGTH))
    path = Path(data)
    if not path.exists():
        raise FileNotFoundError(f'data must be "reviews" or a file or folder, got {data}: it does not exist')
    if path.is_dir() and any(path.glob("*.pos")):
        from .sentences import sentences_task

        return sentences_task(path, seed)
    return rows_task(path, seed)


# Rows of .jsonl and .json files


def rows_task(path: Path, seed: int) -> Task:
    """A task from rows of .jsonl or .json files; there is no gold judge for them."""
    demonstrations: list[Demonstration] = []
    rankings: list[Ranking] = []
    prompts: dict[str, dict[str, Any]] = {}
    for where, row in read_rows(path):
        parsed = parse_row(where, row)
        prompts.setdefault(row["prompt"], row)
        if isinstance(parsed, Demonstration):
            demonstrations.append(parsed)
        elif isinstance(parsed, Ranking):
            rankings.append(parsed)
    if not prompts:
        raise UserError(f"{path}: no rows")
    heldout_prompts, train_prompts = split(list(prompts), seed)
    heldout = set(heldout_prompts)
    return Task(
        name=path.stem,
        demonstrations=[each for each in demonstrations if each.prompt not in heldout],
        rankings=[each for each in rankings if each.prompt not in heldout],
        heldout_rankings=[each for each in rankings if each.prompt in heldout],
        prompts=train_prompts,
        eval_prompts=heldout_prompts,
        gold=None,
        response_length=FILE_RESPONSE_LENGTH,
        rows=prompts,
    )


def read_rows(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """(where, row) of every row under `path`; `where` is "file:line" ("file, row n" in a .json list)."""
    files = sorted(each for each in path.iterdir() if each.suffix in (".jsonl", ".json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path}: no .jsonl or .json file (and no .pos and .neg files) in this folder")
    for file in files:
        if file.suffix not in (".jsonl", ".json"):
            raise UserError(f"{file}: must be a .jsonl or .json file, or a folder")
        text = file.read_text(encoding="utf-8")
        for where, row in _list_rows(file, text) if text.lstrip().startswith("[") else _line_rows(file, text):
            if not isinstance(row, dict):
                raise UserError(f"{where}: a row must be a JSON object, got {type(row).__name__}")
            yield where, row


def _line_rows(file: Path, text: str) -> Iterable[tuple[str, Any]]:
    # Not splitlines(): it also cuts at characters such as U+2028 that may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file}:{number}", _parse_json(file, line, number - 1)


def _list_rows(file: Path, text: str) -> Iterable[tuple[str, Any]]:
    for number, row in enumerate(_parse_json(file, text, 0), 1):
        yield f"{file}, row {number}", row


def _parse_json(file: Path, text: str, lines_before: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{lines_before + error.lineno}: not JSON: {error.msg}") from None


def parse_row(where: str, row: dict[str, Any]) -> Demonstration | Ranking | None:
    """The demonstration or ranking in a row, None for one with a prompt and columns that say nothing of responses."""
    prompt = _text(where, row, "prompt")
    if "responses" in row or "scores" in row:
        return Ranking(prompt, *_scored_responses(where, row))
    if "chosen" in row or "rejected" in row:
        return Ranking(prompt, (_text(where, row, "chosen"), _text(where, row, "rejected")), (1.0, 0.0))
    if "response" in row:
        return Demonstration(prompt, _text(where, row, "response"))
    return None


def _text(where: str, row: dict[str, Any], key: str) -> str:
    if key not in row:
        raise UserError(f'{where}: a row must have "{key}", got {_keys(row)}')
    if not isinstance(row[key], str):
        raise UserError(f'{where}: "{key}" must be a string, got {row[key]!r:.60}')
    return row[key]


def _scored_responses(where: str, row: dict[str, Any]) -> tuple[tuple[str, ...], tuple[float, ...]]:
    for key in ("responses", "scores"):
        if not isinstance(row.get(key), list):
            raise UserError(f'{where}: "{key}" must be a list, got {row.get(key)!r:.60}')
    responses, scores = row["responses"], row["scores"]
    if not responses or len(responses) != len(scores):
        raise UserError(f"{where}: wanted one score for each response, got {len(responses)} and {len(scores)}")
    for each in responses:
        if not isinstance(each, str):
            raise UserError(f'{where}: each of "responses" must be a string, got {each!r:.60}')
    for each in scores:
        # bool is an int to Python; NaN and infinities cannot be ranked.
        if isinstance(each, bool) or not isinstance(each, (int, float)) or not abs(each) < float("inf"):
            raise UserError(f'{where}: each of "scores" must be a finite number, got {each!r:.60}')
    return tuple(responses), tuple(float(each) for each in scores)


def _keys(row: dict[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in row) or "no keys"


def split(items: Sequence[Any], seed: int, fraction: float = HELDOUT_FRACTION) -> tuple[list[Any], list[Any]]:
    """(held out, the rest): a seeded cut; the larger part never ends up empty, order is kept within each part."""
    count = min(max(1, round(fraction * len(items))), len(items) - 1)
    chosen = set(random.Random(seed).sample(range(len(items)), count))
    heldout = [item for i, item in enumerate(items) if i in chosen]
    return heldout, [item for i, item in enumerate(items) if i not in chosen]


# Text ↔ tokens


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, *, start: bool = True) -> list[int]:
    """Token ids of a prompt, with the BOS that the tokenizer puts before a text, if it does.

    With `start`, an empty prompt becomes the BOS (or, without one, the EOS) token: a policy predicts from something.
    """
    ids = tokenizer(text)["input_ids"] if text else []
    if start and not ids:
        ids = [tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id]
    return ids


def encode_response(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of a response and the EOS that ends it."""
    return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def encode_text(tokenizer: PreTrainedTokenizerBase, prompt: str, response: str) -> list[int]:
    """Token ids of prompt + response + EOS, what a reward model reads; the tokens a policy would have produced."""
    return encode_prompt(tokenizer, prompt, start=False) + encode_response(tokenizer, response)


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens written out; bytes that are no character show as U+FFFD."""
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def decode_tokens(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """The text of each token by itself, for display."""
    return [decode(tokenizer, [each]) for each in ids]


# Batches


@dataclass
class Batch:
    """Prompts left-padded to P, responses right-padded to T: one column border for the whole batch.

    tokens: [B, P+T] int64. attention_mask: [B, P+T] bool, True on every real token.
    mask: [B, T] bool, True on response tokens, the EOS included. prompt_width: P.
    """

    tokens: Tensor
    attention_mask: Tensor
    mask: Tensor
    prompt_width: int

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def responses(self) -> Tensor:
        """[B, T] int64: the response columns of `tokens`."""
        return self.tokens[:, self.prompt_width :]

    @property
    def position_ids(self) -> Tensor:
        """[B, P+T] int64: 0 at the first real token of each row."""
        return position_ids(self.attention_mask)

    def to(self, device: torch.device | str) -> Batch:
        return Batch(self.tokens.to(device), self.attention_mask.to(device), self.mask.to(device), self.prompt_width)

    def rows(self, index: Tensor | slice) -> Batch:
        """The chosen rows, at the same widths."""
        return Batch(self.tokens[index], self.attention_mask[index], self.mask[index], self.prompt_width)

    def split(self, size: int | None) -> list[Batch]:
        """Runs of at most `size` rows, in order; None for one run."""
        size = size or max(1, len(self))
        return [self.rows(slice(start, start + size)) for start in range(0, len(self), size)]


def position_ids(attention_mask: Tensor) -> Tensor:
    return (attention_mask.cumsum(-1) - 1).clamp(min=0)


def collate(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], pad_id: int) -> Batch:
    """The padding rule: prompts left, responses right, masks from the lengths."""
    if len(prompts) != len(responses):
        raise ValueError(f"collate: wanted one response for each prompt, got {len(responses)} and {len(prompts)}")
    width = max(map(len, prompts), default=0)
    length = max(map(len, responses), default=0)
    tokens = torch.full((len(prompts), width + length), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros(len(prompts), width + length, dtype=torch.bool)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        columns = slice(width - len(prompt), width + len(response))
        tokens[row, columns] = torch.tensor([*prompt, *response], dtype=torch.int64)
        attention_mask[row, columns] = True
    return Batch(tokens, attention_mask, attention_mask[:, width:].clone(), width)


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits `count` items: a function of (seed, epoch), so that a resumed run keeps it."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=generator).tolist()

"""Tasks and batches: what a data source gives to the stages, and how texts become padded token tensors.

The two rules that every stage shares stand here, once each:

* text ↔ tokens: a text is `prompt + response`, concatenated as they are; both are tokenised on their own, so that the
  border between them is a token border in every stage, and one EOS ends each response;
* padding: prompts left, responses right. Masks come from lengths, never from the pad id, so pad may equal EOS.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from .chat import Chat

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
    """Responses to one prompt and their scores: higher is better, equal scores are a tie.

    margin: wanted score difference of a pair. probability: that the first of a pair, which has the higher score, is
    better; None where that is certain. annotators: who gave each score; empty where that is not known. source: the data
    set that it is from.
    """

    prompt: str
    responses: tuple[str, ...]
    scores: tuple[float, ...]
    margin: float | None = None
    probability: float | None = None
    annotators: tuple[str, ...] = ()
    source: str = ""


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
    cut_prompts: int = 0
    """Rows whose prompt was found by cutting back what two responses share."""

    def texts(self) -> list[str]:
        """Every training text, for a tokenizer that is trained on the data."""
        demonstrations = [each.prompt + each.response for each in self.demonstrations]
        ranked = [each.prompt + response for each in self.rankings for response in each.responses]
        return demonstrations + ranked + ([] if demonstrations or ranked else list(self.prompts))


def load_task(
    data: str,
    seed: int,
    *,
    chat: Chat | None = None,
    columns: Mapping[str, str] | None = None,
    dataset_config: str | None = None,
) -> Task:
    """The task of a data source; splits are disjoint and a function of the seed.

    Args:
        data: "reviews", the generated task ("reviews-96": of up to 96 tokens a response); or a folder with `*.pos` and
            `*.neg` files of one sentence a line; or a file or a folder of rows, or "owner/name" of a hub, in the forms
            of `formats.py`.
        seed: of the generated texts and of every split.
        chat: renders messages; they become a plain transcript unless given.
        columns: our name of a column → its name in the rows. dataset_config: which configuration of a hub data set.

    Raises:
        UserError: a row that fits none of the forms (file and line are named), or nothing to read.
        FileNotFoundError: a path that is not there.
    """
    if generated := re.fullmatch(r"reviews(?:-(\d+))?", data):
        from .reviews import RESPONSE_LENGTH, reviews_task

        return reviews_task(seed, int(generated[1] or RESPONSE_LENGTH))
    path = Path(data)
    if path.is_dir() and any(path.glob("*.pos")):
        from .sentences import sentences_task

        return sentences_task(path, seed)
    from .rows import rows_task

    return rows_task(data, seed, chat=chat, columns=columns, dataset_config=dataset_config)


def task_of(config: StageConfig, model: str | None) -> Task:
    """`load_task` with the flags of a stage. model: whose chat template renders messages, where it has one."""
    chat = Chat(model, trust_remote_code=config.trust_remote_code)
    seed, found = config.data_seed, config.dataset_config
    return load_task(config.data, seed, chat=chat, columns=config.columns, dataset_config=found)


class StageConfig(Protocol):
    @property
    def data(self) -> str: ...
    @property
    def data_seed(self) -> int: ...
    @property
    def columns(self) -> dict[str, str]: ...
    @property
    def dataset_config(self) -> str | None: ...
    @property
    def trust_remote_code(self) -> bool: ...


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

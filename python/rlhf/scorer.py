"""What scores responses: a reward model, or a Python function of the user's."""

from __future__ import annotations

import importlib.util
import inspect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import rlhf_kernels as rk

from .config import UserError
from .credit import Shaping, reward_model_credit
from .data import Task
from .guard import check_finite
from .model import scores
from .offsets import byte_spans
from .reading import Reader, Retokenizer, read_same, same_tokens
from .rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Scores:
    """scores: [B] fp32; NaN marks a response that cannot be scored: it has no advantage and is part of no mean.

    credit: [B, T] fp32 or None: what each response token has of the score. Rows sum to the scores; 0 where masked.
    """

    scores: Tensor
    credit: Tensor | None = None


Scorer = Callable[[Rollout], Scores]


@dataclass(frozen=True)
class RewardModelScorer:
    """The scores of a reward model. read: what it reads of a rollout, the policy's tokens or its own tokenizer's."""

    model: PreTrainedModel
    micro_batch: int | None = None
    read: Reader = read_same

    def __call__(self, rollout: Rollout) -> Scores:
        reading = self.read(rollout).to(self.model.device)
        with torch.no_grad():
            found = scores(self.model, reading.tokens, reading.attention_mask, micro_batch=self.micro_batch)
        check_finite(reward=found)
        return Scores(found)

    def with_credit(self, rollout: Rollout, shaping: Shaping) -> Scores:
        """The scores with the credit that the model itself gives, by one of the kinds OF_REWARD_MODEL."""
        reading = self.read(rollout).to(self.model.device)
        found, credit = reward_model_credit(self.model, reading, shaping, micro_batch=self.micro_batch)
        check_finite(reward=found, credit=credit)
        return Scores(found, credit)


@dataclass(frozen=True)
class FunctionScorer:
    """Scores from `function(prompts, completions, completion_ids, **columns)`, called as TRL calls a reward function.

    prompts, completions: B texts, or lists of messages where the prompt's row of the data has messages.
    completion_ids: B lists of token ids, EOS included. columns: the other columns of each prompt's row, a list of B
    values for each name, None where a row has no such column. A function without `**` gets only what it names.

    It returns B items, each of them one of
        None                            cannot be scored
        a number                        the score
        one number for each token       what each of completion_ids is worth; the score is their sum
        spans (start, end, value)       values of byte ranges of the completion's UTF-8 text, spread over their tokens
                                        by bytes; an empty range goes to the last token; the score is their sum

    Anything else, a wrong count, and numbers that are not finite raise UserError naming the function and the row, and
    so does an exception inside the function.
    """

    function: Callable[..., Any]
    name: str
    tokenizer: PreTrainedTokenizerBase
    rows: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __call__(self, rollout: Rollout) -> Scores:
        mask = rollout.batch.mask
        ids = [row[kept].tolist() for row, kept in zip(rollout.batch.responses, mask)]
        returned = self._call(rollout, ids)
        items = _as_list(returned)
        if items is None or len(items) != len(ids):
            came = type(returned).__name__ if items is None else f"{len(items)} items"
            raise UserError(
                f"reward function {self.name}: must return a list of one item for each of the {len(ids)} "
                f"completions, got {came}"
            )
        totals, credit, dense = [], torch.zeros(mask.shape, dtype=torch.float64), False
        for row, item in enumerate(items):
            item = item if (found := _as_list(item)) is None else found
            if isinstance(item, list):
                dense = True
                credit[row, : len(ids[row])] = torch.tensor(self._token_values(row, item, ids[row]))
                totals.append(credit[row].sum().item())
                continue
            score = math.nan if item is None else self._number(row, item)
            totals.append(score)
            credit[row, len(ids[row]) - 1] = 0.0 if item is None else score
        if totals and all(map(math.isnan, totals)):
            raise UserError(f"reward function {self.name}: returned None for each of the {len(ids)} completions")
        return Scores(
            torch.tensor(totals, device=mask.device, dtype=torch.float32),
            credit.to(mask.device, torch.float32) if dense else None,
        )

    def _call(self, rollout: Rollout, ids: list[list[int]]) -> Any:
        try:
            return self.function(**self._arguments(rollout, ids))
        except UserError:
            raise
        except Exception as error:
            place = error.__traceback__
            while place is not None and place.tb_next is not None:
                place = place.tb_next
            line = "" if place is None else f" (line {place.tb_lineno} of {place.tb_frame.f_code.co_filename})"
            raise UserError(f"reward function {self.name} raised {type(error).__name__}: {error}{line}") from error

    def _arguments(self, rollout: Rollout, ids: list[list[int]]) -> dict[str, Any]:
        rows = [self.rows.get(prompt, {}) for prompt in rollout.prompts]
        chats = [row["prompt"] if isinstance(row.get("prompt"), list) else None for row in rows]
        own: dict[str, list[Any]] = {
            "prompts": [prompt if chat is None else chat for prompt, chat in zip(rollout.prompts, chats)],
            "completions": [
                response if chat is None else [{"role": "assistant", "content": response}]
                for response, chat in zip(rollout.responses, chats)
            ],
            "completion_ids": ids,
        }
        names = dict.fromkeys(name for row in self.rows.values() for name in row if name != "prompt")
        given = {name: [row.get(name) for row in rows] for name in names} | own
        parameters = inspect.signature(self.function).parameters.values()
        if any(each.kind is each.VAR_KEYWORD for each in parameters):
            return given
        for each in parameters:
            if each.name not in given and each.default is each.empty and each.kind is not each.VAR_POSITIONAL:
                raise UserError(
                    f"reward function {self.name}: takes {each.name!r}, which is no column of the data; there are "
                    f"{', '.join(given)}"
                )
        return {each.name: given[each.name] for each in parameters if each.name in given}

    def _token_values(self, row: int, item: list[Any], ids: list[int]) -> list[float]:
        """What each token gets, from numbers or from spans."""
        if not any(isinstance(each, list | tuple) for each in item):
            if item and len(item) != len(ids):
                raise UserError(
                    f"reward function {self.name}, completion {row}: wanted one number for each of the {len(ids)} "
                    f"tokens of completion_ids, got {len(item)}"
                )
            return [self._number(row, each) for each in item] or [0.0] * len(ids)
        places = byte_spans(self.tokenizer, ids)
        spans, values = [], []
        for each in item:
            start, end, value = self._span(row, each, places[-1][1])
            spans.append((start, end))
            values.append(value)
        shared = rk.align_credit(
            torch.tensor([values], dtype=torch.float64), torch.tensor([spans]), torch.tensor([places])
        )
        return shared[0].tolist()

    def _span(self, row: int, item: Any, size: int) -> tuple[int, int, float]:
        if not isinstance(item, list | tuple) or len(item) != 3 or not all(isinstance(e, int) for e in item[:2]):
            wanted = "numbers, or spans (start, end, value) with whole start and end"
            raise UserError(f"reward function {self.name}, completion {row}: wanted {wanted}, got {item!r:.60}")
        start, end, value = item
        if not 0 <= start <= end <= size:
            raise UserError(
                f"reward function {self.name}, completion {row}: a span must lie in 0 to {size}, the bytes of the "
                f"completion, got {start} to {end}"
            )
        return start, end, self._number(row, value)

    def _number(self, row: int, value: Any) -> float:
        value = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
        if not isinstance(value, numbers.Real) or not math.isfinite(value):
            raise UserError(
                f"reward function {self.name}, completion {row}: wanted a finite number, or None for a completion "
                f"that cannot be scored, got {value!r:.60}"
            )
        return float(value)


def _as_list(value: Any) -> list[Any] | None:
    """Lists, tuples, tensors and arrays of at least one dimension as a list; None for anything else."""
    if getattr(value, "ndim", 0) > 0 and hasattr(value, "tolist"):
        return list(value.tolist())
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str | bytes) else None


def scorer_of(
    config: Any,
    reward_model: tuple[PreTrainedModel, PreTrainedTokenizerBase] | None,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
) -> Scorer | None:
    """What a stage's flags ask for: `reward_fn`, or the reward model; None where there is neither.

    reward_model: what `load_reward_model` gave; its tokenizer need not be `tokenizer`, the policy's.
    """
    if config.reward_fn is not None:
        function = load_function("--reward-fn", config.reward_fn)
        return FunctionScorer(function, config.reward_fn, tokenizer, task.rows)
    if reward_model is None:
        return None
    model, its_tokenizer = reward_model
    read: Reader = read_same
    if config.rm_chat_template or not same_tokens(its_tokenizer, tokenizer):
        asked = {prompt: row["prompt"] for prompt, row in task.rows.items() if isinstance(row.get("prompt"), list)}
        read = Retokenizer(its_tokenizer, tokenizer, config.rm_chat_template, asked)
    return RewardModelScorer(model, config.micro_batch, read)


def load_function(flag: str, reference: str) -> Callable[..., Any]:
    """The function of `path.py:function`; the file is run, once for each call.

    Raises UserError naming the flag: no such form, an exception of the file itself, no such function in it.
    FileNotFoundError: no such file.
    """
    path, colon, name = reference.rpartition(":")
    if not colon or not path.endswith(".py") or not name.isidentifier():
        raise UserError(f"{flag} must be path.py:function, got {reference!r}")
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"{flag}: there is no file {path}")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None  # a .py file has both
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{flag}: {path} raised {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        there = ", ".join(each for each, value in vars(module).items() if inspect.isfunction(value))
        raise UserError(f"{flag}: {path} has no function {name}; it has {there or 'none'}")
    return function

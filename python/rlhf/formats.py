"""The forms that rows of preference, demonstration and prompt data have, and what each says.

A prompt and its response are concatenated as they stand. Forms whose columns are bare turns (a question, an answer) and
messages go through a `Chat`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .chat import Chat, Messages, check_messages
from .config import UserError
from .data import Demonstration, Ranking

HH_TURN = "\n\nAssistant:"
TURNS = re.compile(
    r"\n\n(?:Assistant|AI|Bot|Answer):|### (?:Response|Answer|Assistant):\n?|\[/INST\]|<\|assistant\|>\n?"
    r"|<\|im_start\|>assistant\n|<\|start_header_id\|>assistant<\|end_header_id\|>\n\n"
)
"""Where the turn of a model begins in a text."""
RED_TEAM = {"transcript", "min_harmlessness_score_transcript"}


@dataclass(frozen=True)
class Record:
    """What a row says. values: the row with its prompt under "prompt". cut: the prompt is a common start cut back."""

    prompt: str
    values: dict[str, Any]
    demonstration: Demonstration | None = None
    ranking: Ranking | None = None
    cut: bool = False


class Parser:
    """Rows of one source. columns: our name of a column → the name in the rows, as the --…-key flags give them."""

    def __init__(self, chat: Chat | None = None, columns: Mapping[str, str] | None = None) -> None:
        self.chat = chat or Chat()
        self.columns = dict(columns or {})

    def __call__(self, where: str, values: Mapping[str, Any], source: str = "") -> Record:
        """Raises UserError naming the row, what was wanted and what came."""
        row = self._renamed(where, values)
        if row.keys() >= RED_TEAM:
            raise UserError(f"{where}: red-team transcripts hold no preferences; leave this file out")
        form = next((form for needed, form in self._forms if needed <= row.keys()), None)
        if form is None:
            raise UserError(
                f'{where}: a row must have "prompt" (and "response", "chosen" and "rejected", or "responses" and '
                f'"scores"), "messages", or the columns of another known form; got {_keys(row)}'
            )
        record = form(where, row)
        record = replace(record, values={**values, "prompt": row.get("prompt", record.prompt)})
        if record.ranking is not None:
            named = _text(where, row, "source") if "source" in row else str(row.get("data_source", source))
            record = replace(record, ranking=replace(record.ranking, source=record.ranking.source or named))
        return record

    def _renamed(self, where: str, values: Mapping[str, Any]) -> dict[str, Any]:
        for ours, theirs in self.columns.items():
            if theirs not in values:
                raise UserError(
                    f"{where}: --{ours.replace('_', '-')}-key {theirs}: there is no such column in {_keys(values)}"
                )
        moved = set(self.columns.values()) - set(self.columns)
        row = {name: value for name, value in values.items() if name not in moved}
        row |= {ours: values[theirs] for ours, theirs in self.columns.items()}
        return {name: value for name, value in row.items() if value is not None}

    # Forms

    @property
    def _forms(self) -> list[tuple[set[str], Callable[[str, dict[str, Any]], Record]]]:
        """The first of these whose columns a row has is its form."""
        return [
            ({"responses"}, self._scored_list),
            ({"scores"}, self._scored_list),
            ({"human_ref_A", "human_ref_B"}, self._shp),
            ({"output_1", "output_2"}, self._alpaca_farm),
            ({"completion_a", "completion_b"}, self._gpt4_llm),
            ({"chosen"}, self._preference),
            ({"rejected"}, self._preference),
            ({"messages"}, self._messages),
            ({"conversations"}, self._messages),
            ({"user_input"}, self._chatllama),
            ({"instruction", "output"}, self._alpaca),
            ({"response"}, self._response),
            ({"completion"}, self._response),
            ({"text"}, self._plain_text),
            ({"prompt"}, self._prompt_only),
        ]

    def _prompt_only(self, where: str, row: dict[str, Any]) -> Record:
        return Record(self._prompt(where, row)[0], row)

    def _plain_text(self, where: str, row: dict[str, Any]) -> Record:
        if "prompt" in row:
            return self._prompt_only(where, row)
        return Record("", row, Demonstration("", _text(where, row, "text")))

    def _response(self, where: str, row: dict[str, Any]) -> Record:
        """A demonstration or, with a "score" or a "label", a response that was judged: 0 is a score."""
        key = "response" if "response" in row else "completion"
        judged = _given(row, "score") or _given(row, "label")
        prompt, messages = ("", None) if judged and "prompt" not in row else self._prompt(where, row)
        return self._judged(where, row, prompt, self._answer(where, f'"{key}"', row[key], messages))

    def _judged(self, where: str, row: dict[str, Any], prompt: str, response: str) -> Record:
        demonstration = Demonstration(prompt, response)
        annotators = (str(row["annotator"]),) if "annotator" in row else ()
        if _given(row, "score"):
            score = _number(where, row, "score")
            return Record(prompt, row, None, Ranking(prompt, (response,), (score,), annotators=annotators))
        if _given(row, "label"):
            good = _bool(where, row, "label")
            ranking = Ranking(prompt, (response,), (float(good),), annotators=annotators)
            return Record(prompt, row, demonstration if good else None, ranking)
        return Record(prompt, row, demonstration)

    def _messages(self, where: str, row: dict[str, Any]) -> Record:
        """A conversation: the last answer is a demonstration, the turns before it are its prompt."""
        key = "messages" if "messages" in row else "conversations"
        messages = check_messages(where, f'"{key}"', row[key])
        if messages[-1]["role"] != "assistant":
            return Record(self.chat.prompt(where, messages), {**row, "prompt": messages})
        return self._single_answer(where, row, messages[:-1], messages[-1]["content"])

    def _chatllama(self, where: str, row: dict[str, Any]) -> Record:
        return self._single_answer(where, row, _user(_text(where, row, "user_input")), _text(where, row, "completion"))

    def _alpaca(self, where: str, row: dict[str, Any]) -> Record:
        return self._single_answer(where, row, _instruction(where, row), _text(where, row, "output"))

    def _single_answer(self, where: str, row: dict[str, Any], messages: Messages, answer: str) -> Record:
        prompt = self.chat.prompt(where, messages)
        return self._judged(where, row, prompt, self.chat.response(where, messages, _assistant(answer)))

    def _scored_list(self, where: str, row: dict[str, Any]) -> Record:
        """TRL-like "prompt" or RRHF's "query", with lists "responses" and "scores"."""
        if "prompt" not in row and "query" in row:
            row = {**row, "prompt": row["query"]}
        prompt, messages = self._prompt(where, row)
        for key in ("responses", "scores"):
            if not isinstance(row.get(key), list):
                raise UserError(f'{where}: "{key}" must be a list, got {row.get(key)!r:.60}')
        count = len(row["responses"])
        if not count or count != len(row["scores"]):
            raise UserError(f"{where}: wanted one score for each response, got {count} and {len(row['scores'])}")
        responses = tuple(self._answer(where, 'each of "responses"', each, messages) for each in row["responses"])
        scores = tuple(_as_number(where, 'each of "scores"', each) for each in row["scores"])
        annotators = row.get("annotators", [row["annotator"]] * count if "annotator" in row else [])
        if not isinstance(annotators, list) or len(annotators) not in (0, count):
            raise UserError(f'{where}: "annotators" must be a list of {count}, one for each response')
        return Record(prompt, row, None, Ranking(prompt, responses, scores, annotators=tuple(map(str, annotators))))

    def _shp(self, where: str, row: dict[str, Any]) -> Record:
        """labels 1: A is better."""
        label = _number(where, row, "labels")
        if label not in (0, 1):
            raise UserError(f'{where}: "labels" must be 1 where A is better or 0 where B is, got {row["labels"]!r:.60}')
        record = self._pair(where, row, _user(_text(where, row, "history")), "human_ref_A", "human_ref_B", label == 1)
        assert record.ranking is not None
        return replace(record, ranking=replace(record.ranking, source=str(row.get("domain", ""))))

    def _alpaca_farm(self, where: str, row: dict[str, Any]) -> Record:
        """preference 1: output_1 is better; 2: output_2; between them: 2 with that much of certainty."""
        preference = _number(where, row, "preference")
        if not 1 <= preference <= 2:
            raise UserError(f'{where}: "preference" must lie between 1 and 2, got {row["preference"]!r:.60}')
        record = self._pair(where, row, _instruction(where, row), "output_1", "output_2", preference <= 1.5)
        assert record.ranking is not None
        certainty = max(2 - preference, preference - 1)
        tie = preference == 1.5
        ranking = replace(record.ranking, scores=(0.0, 0.0) if tie else record.ranking.scores)
        return replace(record, ranking=replace(ranking, probability=None if certainty in (1, 0.5) else certainty))

    def _gpt4_llm(self, where: str, row: dict[str, Any]) -> Record:
        """completion_a is the better one."""
        return self._pair(where, row, _user(_text(where, row, "user_input")), "completion_a", "completion_b", True)

    def _pair(
        self, where: str, row: dict[str, Any], messages: Messages, first: str, second: str, better: bool
    ) -> Record:
        """Two answers to bare turns; the better one comes first."""
        keys = (first, second) if better else (second, first)
        chosen, rejected = (self.chat.response(where, messages, _assistant(_text(where, row, key))) for key in keys)
        return self._chosen(where, row, self.chat.prompt(where, messages), chosen, rejected)

    def _preference(self, where: str, row: dict[str, Any]) -> Record:
        """TRL's "chosen" and "rejected", with or without "prompt", as texts or messages; Anthropic's HH."""
        for key in ("chosen", "rejected"):
            if key not in row:
                raise UserError(f'{where}: a row must have "{key}", got {_keys(row)}')
        if isinstance(row["chosen"], list) and not isinstance(row.get("prompt"), list):
            return self._implicit_messages(where, row)
        if "prompt" in row:
            prompt, messages = self._prompt(where, row)
            chosen, rejected = (self._answer(where, f'"{key}"', row[key], messages) for key in ("chosen", "rejected"))
            return self._chosen(where, row, prompt, chosen, rejected)
        chosen, rejected = _text(where, row, "chosen"), _text(where, row, "rejected")
        if HH_TURN in chosen and HH_TURN in rejected:
            prompt, cut = split_transcripts(where, chosen, rejected), False
        else:
            prompt, cut = split_texts(chosen, rejected)
        record = self._chosen(where, row, prompt, chosen[len(prompt) :], rejected[len(prompt) :])
        return replace(record, cut=cut)

    def _implicit_messages(self, where: str, row: dict[str, Any]) -> Record:
        """The prompt is what both conversations share, up to where both go on with an answer."""
        chosen, rejected = (check_messages(where, f'"{key}"', row[key]) for key in ("chosen", "rejected"))
        shared = common = shared_length(chosen, rejected)
        while shared and not all(
            shared < len(each) and each[shared]["role"] == "assistant" for each in (chosen, rejected)
        ):
            shared -= 1
        if not shared:
            raise UserError(f'{where}: "chosen" and "rejected" share no message before an answer')
        messages = chosen[:shared]
        better, worse = (self.chat.response(where, messages, each[shared:]) for each in (chosen, rejected))
        record = self._chosen(where, {**row, "prompt": messages}, self.chat.prompt(where, messages), better, worse)
        return replace(record, cut=shared < common)

    def _chosen(self, where: str, row: dict[str, Any], prompt: str, chosen: str, rejected: str) -> Record:
        margin = _number(where, row, "margin") if _given(row, "margin") else None
        probability = _number(where, row, "probability") if _given(row, "probability") else None
        if probability is not None and not 0 <= probability <= 1:
            raise UserError(f'{where}: "probability" that chosen is better must lie in 0 to 1, got {probability:g}')
        ranking = Ranking(prompt, (chosen, rejected), (1.0, 0.0), margin=margin, probability=probability)
        return Record(prompt, row, None, ranking)

    # Values

    def _prompt(self, where: str, row: dict[str, Any]) -> tuple[str, Messages | None]:
        """The text of a prompt, and its messages where it has some."""
        if isinstance(row.get("prompt"), list):
            messages = check_messages(where, '"prompt"', row["prompt"])
            return self.chat.prompt(where, messages), messages
        return _text(where, row, "prompt"), None

    def _answer(self, where: str, name: str, value: Any, messages: Messages | None) -> str:
        """An answer to messages may be a text or messages; to a text it is a text."""
        if messages is None:
            return _as_text(where, name, value)
        answer = _assistant(value) if isinstance(value, str) else check_messages(where, name, value)
        return self.chat.response(where, messages, answer)


# Prompts that are not said


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if one[low:middle] == other[low:middle] else (low, middle - 1)
    return low


def split_transcripts(where: str, chosen: str, rejected: str) -> str:
    """The prompt of two HH transcripts: up to the last "Assistant:" that both share.

    Where the texts begin to differ says less: answers that begin alike share characters, which are no prompt.
    """
    shared = shared_length(chosen, rejected)
    place = chosen.rfind(HH_TURN, 0, shared)
    if place < 0:
        raise UserError(f'{where}: "chosen" and "rejected" share no {HH_TURN.strip()!r} turn')
    return chosen[: place + len(HH_TURN)]


def split_texts(chosen: str, rejected: str) -> tuple[str, bool]:
    """(the prompt that two texts share, whether it is shorter than what they share).

    It ends with the last turn of a model that they share, else between two words, before the space.
    """
    shared = shared_length(chosen, rejected)
    prefix = chosen[:shared]
    turns = list(TURNS.finditer(prefix))
    if turns:
        place = turns[-1].end()
    elif (
        chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace() and not prefix[-1:].isspace()
    ):
        place = shared
    else:
        words = re.search(r"\s+\S*$", prefix)
        place = words.start() if words else 0
    return prefix[:place], bool(prefix[place:].strip())


def _user(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def _assistant(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def _instruction(where: str, row: dict[str, Any]) -> Messages:
    extra = _text(where, row, "input") if row.get("input") else ""
    return _user("\n\n".join(part for part in (_text(where, row, "instruction"), extra) if part))


def _text(where: str, row: Mapping[str, Any], key: str) -> str:
    if key not in row:
        raise UserError(f'{where}: a row must have "{key}", got {_keys(row)}')
    return _as_text(where, f'"{key}"', row[key])


def _as_text(where: str, name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UserError(f"{where}: {name} must be a string, got {value!r:.60}")
    return value


def _given(row: Mapping[str, Any], key: str) -> bool:
    """An empty cell of a table is not given; 0 is."""
    return row.get(key) is not None and row[key] != ""


def _number(where: str, row: Mapping[str, Any], key: str) -> float:
    return _as_number(where, f'"{key}"', row.get(key))


def _as_number(where: str, name: str, value: Any) -> float:
    """A number, also written as text: tables have nothing else. NaN and infinities cannot be ranked."""
    try:
        # bool is an int to Python, and a text can be "nan".
        number = math.nan if isinstance(value, bool) or not isinstance(value, int | float | str) else float(value)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {name} must be a finite number, got {value!r:.60}")
    return number


def _bool(where: str, row: Mapping[str, Any], key: str) -> bool:
    words = {"true": True, "1": True, "1.0": True, "false": False, "0": False, "0.0": False}
    found = words.get(str(row[key]).strip().lower())
    if found is None:
        raise UserError(f'{where}: "{key}" must be true or false, got {row[key]!r:.60}')
    return found


def _keys(row: Mapping[str, Any]) -> str:
    return ", ".join(f'"{key}"' for key in row) or "no keys"

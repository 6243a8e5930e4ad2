"""Judges that are asked in words: a causal language model here, or any endpoint with OpenAI's chat interface.

Both compare two responses or rate one. A judge answers None where it gave no usable answer, which is counted.
"""

from __future__ import annotations

import json
import os
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor

from .config import UserError
from .data import collate, encode_prompt
from .model import check_context, load_policy, response_logprobs

KEY = "RLHF_JUDGE_KEY"
"""The environment variable that an endpoint's key is read from; nothing else holds it."""

INSTRUCTION = "You judge how well a response continues or answers a text."
COMPARE = (
    "{instruction}\n\nText:\n{prompt}\n\nResponse A:\n{first}\n\nResponse B:\n{second}\n\n"
    "Which response is better? Answer with A or B alone.\nAnswer:"
)
RATE = (
    "{instruction}\n\nText:\n{prompt}\n\nResponse:\n{response}\n\n"
    "How good is the response, from 1 (worst) to 10 (best)? Answer with the number alone.\nAnswer:"
)
RATINGS = range(1, 11)


class Judge(Protocol):
    """counts: what went wrong since the last look, by name."""

    counts: Counter[str]

    def compare(self, items: Sequence[tuple[str, str, str]]) -> list[float | None]:
        """For each (prompt, first, second): the probability, 0 to 1, that the first is the better response."""

    def rate(self, items: Sequence[tuple[str, str]]) -> list[float | None]:
        """For each (prompt, response): a rating from 1 to 10."""


class ModelJudge:
    """A causal language model; its answer is the probability that it gives to each of the possible ones.

    options: how it is loaded, as `loading_options` has it.
    """

    def __init__(
        self,
        name: str,
        *,
        instruction: str = INSTRUCTION,
        micro_batch: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.tokenizer = load_policy(name, frozen=True, **options)
        self.instruction, self.micro_batch = instruction, micro_batch
        self.counts: Counter[str] = Counter()

    def compare(self, items: Sequence[tuple[str, str, str]]) -> list[float | None]:
        questions = [
            COMPARE.format(instruction=self.instruction, prompt=prompt, first=first, second=second)
            for prompt, first, second in items
        ]
        return list(self._answers(questions, ["A", "B"])[:, 0].tolist())

    def rate(self, items: Sequence[tuple[str, str]]) -> list[float | None]:
        questions = [
            RATE.format(instruction=self.instruction, prompt=prompt, response=response) for prompt, response in items
        ]
        share = self._answers(questions, [str(each) for each in RATINGS])
        return list((share * torch.tensor(RATINGS, device=share.device)).sum(1).tolist())

    @torch.no_grad()
    def _answers(self, questions: Sequence[str], answers: Sequence[str]) -> Tensor:
        """[questions, answers]: the probability of each answer, given that it is one of them."""
        space = ""
        if self.tokenizer.chat_template:
            chats = [[{"role": "user", "content": question}] for question in questions]
            questions = [
                str(self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))
                for chat in chats
            ]
            asked = [self.tokenizer(question, add_special_tokens=False)["input_ids"] for question in questions]
        else:
            space = " "
            asked = [encode_prompt(self.tokenizer, question) for question in questions]
        longest = max(map(len, asked), default=0) + 2
        check_context(self.model, longest, "a question to the judge, with its answer,")
        given = [self.tokenizer(space + answer, add_special_tokens=False)["input_ids"] for answer in answers]
        found = []
        for question in asked:
            batch = collate([question] * len(given), given, self.tokenizer.pad_token_id).to(self.model.device)
            found.append(response_logprobs(self.model, batch, micro_batch=self.micro_batch).sum(1))
        return torch.stack(found).softmax(1)


class EndpointJudge:
    """An endpoint that answers POST <url>/chat/completions as OpenAI's does.

    Timeouts, refused connections and the statuses 408, 429 and 5xx are tried again, `retries` times, after 1, 2, 4 …
    seconds; a question that stays without an answer counts as `failed`, an answer that is none as `bad_replies`. Other
    statuses raise UserError, and so does an endpoint whose first three questions all failed.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        instruction: str = INSTRUCTION,
        timeout: float = 60.0,
        retries: int = 3,
        workers: int = 8,
        pause: float = 1.0,
    ) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"endpoint must be an http or https address, got {url!r}")
        self.key = os.environ.get(KEY, "")
        if self.key and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
            raise UserError(f"endpoint must be https: the key in {KEY} would go to {parts.hostname} unencrypted")
        self.url, self.model, self.instruction = url.rstrip("/") + "/chat/completions", model, instruction
        self.timeout, self.retries, self.workers, self.pause = timeout, retries, workers, pause
        self.counts: Counter[str] = Counter()
        self.answered = 0
        self.opener = urllib.request.build_opener(_NoRedirect)

    def compare(self, items: Sequence[tuple[str, str, str]]) -> list[float | None]:
        questions = [
            COMPARE.format(instruction=self.instruction, prompt=prompt, first=first, second=second)
            for prompt, first, second in items
        ]
        return self._all(questions, choice_in)

    def rate(self, items: Sequence[tuple[str, str]]) -> list[float | None]:
        questions = [
            RATE.format(instruction=self.instruction, prompt=prompt, response=response) for prompt, response in items
        ]
        return self._all(questions, rating_in)

    def _all(self, questions: Sequence[str], parse: Any) -> list[float | None]:
        with ThreadPoolExecutor(self.workers) as pool:
            replies = list(pool.map(self._ask, questions))
        found: list[float | None] = []
        for reply in replies:
            answer = None if reply is None else parse(reply)
            self.counts["bad_replies"] += reply is not None and answer is None
            found.append(answer)
        return found

    def _ask(self, question: str) -> str | None:
        """The text of the reply, "" for a reply without one; None where there is no reply."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 16,
        }
        headers = {"Content-Type": "application/json"}
        if self.key:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers)
        reason = ""
        for attempt in range(self.retries + 1):
            if attempt:
                self.counts["retries"] += 1
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                with self.opener.open(request, timeout=self.timeout) as response:
                    raw = response.read(1 << 20)
            except urllib.error.HTTPError as error:
                reason = f"status {error.code}"
                if error.code not in (408, 429) and error.code < 500:
                    text = error.read(300).decode("utf-8", "replace")
                    text = text.replace(self.key, "<key>") if self.key else text
                    raise UserError(f"endpoint {self.url}: {reason}: {text}") from None
            except (TimeoutError, urllib.error.URLError, ConnectionError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            else:
                self.answered += 1
                return _content(raw)
        self.counts["failed"] += 1
        if not self.answered and self.counts["failed"] >= 3:
            raise UserError(f"endpoint {self.url} does not answer: {reason}")
        return None


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect is an error: it would carry the key to another place."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _content(raw: bytes) -> str:
    try:
        content = json.loads(raw)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError):
        return ""
    return content if isinstance(content, str) else ""


def choice_in(reply: str) -> float | None:
    """1 for a reply that says A, 0 for B, None for any other."""
    found = re.fullmatch(r"\W*(?:(?:the )?(?:better )?(?:answer|response)(?: is)?\W*)?([AB])\W*", reply, re.IGNORECASE)
    return None if found is None else float(found[1].upper() == "A")


def rating_in(reply: str) -> float | None:
    """The rating from 1 to 10 in a reply that is nothing but one."""
    found = re.fullmatch(
        r"[\s*\"':]*(?:(?:answer|rating|score)\W*)?(\d+(?:\.\d+)?)(?:\s*/\s*10)?[\s*\"'.]*", reply, re.IGNORECASE
    )
    rating = float(found[1]) if found else 0.0
    return rating if RATINGS[0] <= rating <= RATINGS[-1] else None

"""Chat messages as text: a tokenizer's own template where it has one, else a plain transcript.

The transcript is the one of Anthropic's HH data, "\\n\\nHuman: …\\n\\nAssistant: …": the same conversation is the same
text, whether it came as one or as messages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from .config import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Messages = list[dict[str, str]]
NAMES = {"system": "System", "user": "Human", "assistant": "Assistant"}
TURN = "\n\n{name}:"
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
"""ShareGPT's names of the roles."""


def renderer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of what turns messages into text for this tokenizer: 64 hexadecimal digits.

    Two tokenizers with equal hashes render the same messages as the same text.
    """
    template = getattr(tokenizer, "chat_template", None)
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [template, special] if template else [TURN, NAMES]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Chat:
    """Renders messages for a model, whose tokenizer is loaded when the first message comes.

    model: run folder, model folder or hub name; None, and "tiny", which has no template, for the plain transcript.
    tokenizer: instead of a model's.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.model = model
        self.trust_remote_code = trust_remote_code
        self._given = tokenizer

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer with the template, None where the transcript is plain."""
        from .model import TINY, load_tokenizer
        from .run import resolve_model

        found = self._given
        if found is None and self.model not in (None, TINY):
            found = load_tokenizer(resolve_model(str(self.model)), self.trust_remote_code)
        return found if found is not None and found.chat_template else None

    def prompt(self, where: str, messages: Messages) -> str:
        """The text of a conversation up to where the assistant's next answer begins."""
        if self.tokenizer is not None:
            return self._without_bos(self._template(where, messages, answer=True))
        return plain(messages) + TURN.format(name=NAMES["assistant"])

    def response(self, where: str, messages: Messages, answer: Messages) -> str:
        """What follows the text of `prompt(messages)`: the answer (and further turns), without an EOS at its end."""
        if not answer or answer[0]["role"] != "assistant":
            raise UserError(f"{where}: an answer must begin with an assistant's message, got {answer!r:.80}")
        if self.tokenizer is None:
            return plain(answer).removeprefix(TURN.format(name=NAMES["assistant"]))
        prompt, whole = self.prompt(where, messages), self._template(where, messages + answer, answer=False)
        whole = self._without_bos(whole)
        if not whole.startswith(prompt):
            raise UserError(
                f"{where}: the tokenizer's chat template renders the prompt otherwise when an answer follows, so where "
                "the answer begins cannot be told"
            )
        text, eos = whole[len(prompt) :], str(self.tokenizer.eos_token)
        return text.rstrip().removesuffix(eos) if text.rstrip().endswith(eos) else text

    def _template(self, where: str, messages: Messages, *, answer: bool) -> str:
        assert self.tokenizer is not None
        try:
            return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=answer))
        except Exception as error:  # a template says no with an exception of jinja's
            raise UserError(f"{where}: the tokenizer's chat template refuses these messages: {error}") from None

    def _without_bos(self, text: str) -> str:
        """Without a BOS that the tokenizer would put in front a second time."""
        tokenizer = self.tokenizer
        assert tokenizer is not None
        bos = tokenizer.bos_token
        if bos is None or not text.startswith(str(bos)):
            return text
        twice = tokenizer(text)["input_ids"][:2] == [tokenizer.bos_token_id] * 2
        return text.removeprefix(str(bos)) if twice else text


def plain(messages: Sequence[dict[str, str]]) -> str:
    parts = []
    for message in messages:
        name = NAMES.get(message["role"], message["role"].capitalize())
        parts.append(f"{TURN.format(name=name)} {message['content']}")
    return "".join(parts)


def check_messages(where: str, name: str, value: Any) -> Messages:
    """Messages {"role", "content"}, also from ShareGPT's {"from", "value"} and from contents in text parts."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name} must be a text or a list of messages, got {value!r:.60}")
    found = []
    for each in value:
        role = each.get("role", each.get("from")) if isinstance(each, dict) else None
        content = each.get("content", each.get("value")) if isinstance(each, dict) else None
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(f'{where}: a message of {name} must have a text "role" and "content", got {each!r:.80}')
        found.append({"role": ROLES.get(role, role), "content": content})
    return found

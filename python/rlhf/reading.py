"""What a reward model reads of a rollout, and the way back from its tokens to the policy's.

With one tokenizer both are the same tokens. With two, the text is tokenised anew and everything that is worked out for
the reward model's tokens goes to the policy's through the UTF-8 bytes that they share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

import rlhf_kernels as rk

from .chat import Messages
from .config import UserError
from .data import collate
from .offsets import byte_spans, text_spans
from .rollout import Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Spans = list[tuple[int, int]]
OUTSIDE = (-1, -1)


@dataclass(frozen=True)
class Reading:
    """The texts of a rollout in a reward model's tokens.

    tokens: [B, L] int64. attention_mask: [B, L] bool. response: [B, L] bool, True on what stands in the response or
    after it (EOS, the end of a chat template). mask: [B, T] bool, the policy's response tokens.
    spans: [B, L, 2] and policy_spans: [B, T, 2] int64, bytes from the start of the response, (−1, −1) elsewhere; None
    where the reward model reads the policy's own tokens.
    """

    tokens: Tensor
    attention_mask: Tensor
    response: Tensor
    mask: Tensor
    spans: Tensor | None = None
    policy_spans: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def split(self, size: int | None) -> list[Reading]:
        """Runs of at most `size` rows, in order; None for one run."""
        size = size or max(1, len(self))
        return [self._rows(slice(start, start + size)) for start in range(0, len(self), size)]

    def to(self, device: torch.device) -> Reading:
        spans, policy_spans = (None if each is None else each.to(device) for each in (self.spans, self.policy_spans))
        return Reading(
            self.tokens.to(device),
            self.attention_mask.to(device),
            self.response.to(device),
            self.mask.to(device),
            spans,
            policy_spans,
        )

    def _rows(self, part: slice) -> Reading:
        spans, policy_spans = (None if each is None else each[part] for each in (self.spans, self.policy_spans))
        return Reading(
            self.tokens[part], self.attention_mask[part], self.response[part], self.mask[part], spans, policy_spans
        )

    def carry(self, values: Tensor, *, whole: bool = False) -> Tensor:
        """[B, T] fp32: values [B, L] of the reward model's tokens on the policy's; sums over the response are kept.

        A token that begins in the prompt brings the share of its bytes that lie in the response, or all with `whole`.
        """
        if self.spans is None or self.policy_spans is None:
            return torch.where(self.mask, values[:, values.shape[1] - self.mask.shape[1] :], 0)
        spans = self.spans
        if whole:
            spans = torch.where(spans[..., 1:] >= 0, spans.clamp(min=0), spans)
        return rk.align_credit(values, spans, self.policy_spans)

    def last_response(self) -> Tensor:
        """[B] int64: the last token of the response with its EOS, before what a chat template puts after it."""
        columns = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        inside = self.response
        if self.spans is not None and self.policy_spans is not None:
            length = self.policy_spans[..., 1].amax(1, keepdim=True)
            start, end = self.spans.unbind(-1)
            inside = inside & ((start < length) | ((start == length) & (end == length)))
        return torch.where(inside, columns, 0).amax(1)


Reader = Callable[[Rollout], Reading]


def read_same(rollout: Rollout) -> Reading:
    """The policy's own tokens."""
    batch = rollout.batch
    response = torch.cat([torch.zeros_like(batch.attention_mask[:, : batch.prompt_width]), batch.mask], 1)
    return Reading(batch.tokens, batch.attention_mask, response, batch.mask)


@dataclass(frozen=True)
class Retokenizer:
    """Reads a rollout in the tokens of another tokenizer.

    The text is tokenised as a whole, and its response found by byte offset: a token may stand on the border. It is
    prompt + response, and EOS where the policy ended it; with `chat_template` it is what the reward model's template
    makes of the two as a user's and an assistant's message (cut after the response where the policy did not end it).
    messages: for the template, the conversation that stands behind a prompt, where it was given as one.

    `rlhf rm` tokenises prompt and response apart: its models have seen the same tokens unless one crosses the border.
    """

    tokenizer: PreTrainedTokenizerBase
    policy_tokenizer: PreTrainedTokenizerBase
    chat_template: bool = False
    messages: Mapping[str, Messages] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.tokenizer.is_fast:
            raise UserError("the reward model's tokenizer must be a fast one, which tells where its tokens stand")
        if self.chat_template and not self.tokenizer.chat_template:
            raise UserError("the reward model's tokenizer has no chat template")

    def __call__(self, rollout: Rollout) -> Reading:
        batch = rollout.batch
        found = [
            self.read(prompt, response, ended=ended)
            for prompt, response, ended in zip(rollout.prompts, rollout.responses, rollout.terminated.tolist())
        ]
        sampled = [row[kept].tolist() for row, kept in zip(batch.responses, batch.mask)]
        policy_spans = padded([byte_spans(self.policy_tokenizer, ids) for ids in sampled], batch.mask.shape[1])
        read = collate([[]] * len(found), [ids for ids, _ in found], self.tokenizer.pad_token_id)
        read = read.to(batch.tokens.device)
        spans = padded([places for _, places in found], read.mask.shape[1]).to(batch.tokens.device)
        return Reading(
            read.tokens, read.attention_mask, spans[..., 1] >= 0, batch.mask, spans, policy_spans.to(spans.device)
        )

    def read(self, prompt: str, response: str, *, ended: bool) -> tuple[list[int], Spans]:
        """Token ids of one text and where each stands, in bytes from the start of the response."""
        text, first = self.render(prompt, response)
        ids, places = text_spans(self.tokenizer, text, special_tokens=not self.chat_template)
        size = len(response.encode())
        # A BOS, or whatever ends at or before the border, belongs to the prompt.
        spans = [(start - first, end - first) if end > first else OUTSIDE for start, end in places]
        if not ended:
            kept = [(token, span) for token, span in zip(ids, spans) if span == OUTSIDE or span[0] < size]
            ids, spans = [token for token, _ in kept], [span for _, span in kept]
        elif self.tokenizer.eos_token_id not in ids[-1:] and not self.chat_template:
            ids, spans = [*ids, self.tokenizer.eos_token_id], [*spans, (size, size)]
        if ended and spans and spans[-1] == OUTSIDE:  # an EOS that the tokenizer has put after an empty response
            spans[-1] = (size, size)
        return ids, spans

    def render(self, prompt: str, response: str) -> tuple[str, int]:
        """The text that the reward model reads, and the byte in it at which the response starts."""
        if not self.chat_template:
            return prompt + response, len(prompt.encode())
        asked = self.messages.get(prompt, [{"role": "user", "content": prompt}])
        messages = [*asked, {"role": "assistant", "content": response}]
        text = str(self.tokenizer.apply_chat_template(messages, tokenize=False))
        for shown in (response, response.strip()):  # many templates strip what they are given
            place = text.rfind(shown)
            if shown and place >= 0:
                return text, len(text[:place].encode()) - len(response[: response.index(shown)].encode())
        if response.strip():
            raise UserError(f"the reward model's chat template does not show the response as it is: {response!r:.60}")
        return text, len(text.encode())


def padded(rows: list[Spans], width: int) -> Tensor:
    """[B, width, 2] int64, padding (−1, −1)."""
    return torch.tensor([[*row, *[OUTSIDE] * (width - len(row))] for row in rows], dtype=torch.int64).view(-1, width, 2)


def same_tokens(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers write the same ids, so that a model of one can read the tokens of the other."""
    return first.get_vocab() == second.get_vocab() and first.eos_token_id == second.eos_token_id

"""Sampling responses from a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import UserError
from .data import Batch, collate, decode, encode_prompt, encode_response
from .model import check_context

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

KEPT_ALIVE = 0.75  # rows that have ended leave the batch when no more than this share goes on


@dataclass
class Rollout:
    """Sampled responses.

    responses: decoded without EOS. terminated: [B] bool, True where EOS was sampled. limit: tokens a response might
    have had, T unless given.
    """

    batch: Batch
    prompts: list[str]
    responses: list[str]
    terminated: Tensor
    limit: int | None = None

    @property
    def response_length(self) -> int:
        return self.limit or self.batch.mask.shape[1]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[str],
    *,
    response_length: int,
    temperature: float = 1.0,
    micro_batch: int | None = None,
) -> Rollout:
    """One sampled response for each prompt, from the full softmax at `temperature` (no top-k, no top-p).

    That is the distribution that `response_logprobs` scores. Randomness comes from torch's global generator. A response
    ends with its first EOS, which it includes, or is cut after `response_length` tokens; a pad token that is sampled
    before the EOS is a token like any other.

    Args:
        prompts: B texts; an empty one starts from the BOS or EOS token.
        micro_batch: rows sampled at a time, None for all.

    Returns:
        a Rollout on the model's device; T is the longest sampled response.
    """
    if not prompts:
        raise ValueError("generate: prompts must not be empty")
    if response_length < 1:
        raise ValueError(f"generate: response_length must be at least 1, got {response_length}")
    if not temperature > 0:
        raise ValueError(f"generate: temperature must be greater than 0, got {temperature}")
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    pad = eos if pad is None else pad
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    check_room(model, prompts, encoded, response_length)
    # One number for each token that may be sampled: a row's tokens depend on no other row and on no micro-batch.
    uniform = torch.rand(len(prompts), response_length, dtype=torch.float64, device=model.device)
    sampled: list[list[int]] = []
    training = model.training
    model.eval()
    try:
        for numbers in uniform.split(micro_batch or len(prompts)):
            part = encoded[len(sampled) : len(sampled) + len(numbers)]
            batch = collate(part, [[]] * len(part), pad_id=pad).to(model.device)
            sampled += sample(model, batch, numbers, temperature, eos)
    finally:
        model.train(training)
    batch = collate(encoded, sampled, pad_id=pad)
    terminated = torch.tensor([response[-1] == eos for response in sampled])
    texts = [response[:-1] if response[-1] == eos else response for response in sampled]
    decoded = [decode(tokenizer, each) for each in texts]
    return Rollout(batch.to(model.device), list(prompts), decoded, terminated.to(model.device), response_length)


def check_prompts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str], response_length: int
) -> None:
    """Raises UserError for a prompt that leaves no room for its response: before a run, not in the middle of it."""
    check_room(model, prompts, [encode_prompt(tokenizer, prompt) for prompt in prompts], response_length)


def check_room(model: PreTrainedModel, prompts: list[str], encoded: list[list[int]], response_length: int) -> None:
    if encoded:
        length, prompt = max(zip(map(len, encoded), prompts))
        what = f"the prompt {prompt[:60]!r} with a response of {response_length} tokens"
        check_context(model, length + response_length, what)


def joined_rollouts(rollouts: list[Rollout], kept: list[Tensor], pad_id: int) -> Rollout:
    """One rollout of the kept rows of several; kept: [B] bool for each of them."""
    prompts: list[list[int]] = []
    responses: list[list[int]] = []
    texts: list[tuple[str, str]] = []
    for rollout, chosen in zip(rollouts, kept):
        batch, width = rollout.batch, rollout.batch.prompt_width
        for row in chosen.nonzero().flatten().tolist():
            prompts.append(batch.tokens[row, :width][batch.attention_mask[row, :width]].tolist())
            responses.append(batch.responses[row][batch.mask[row]].tolist())
            texts.append((rollout.prompts[row], rollout.responses[row]))
    device = rollouts[0].batch.tokens.device
    return Rollout(
        collate(prompts, responses, pad_id).to(device),
        [prompt for prompt, _ in texts],
        [response for _, response in texts],
        torch.cat([rollout.terminated[chosen] for rollout, chosen in zip(rollouts, kept)]),
        rollouts[0].limit,
    )


def given_rollout(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str], responses: list[str], device: torch.device | str
) -> Rollout:
    """Responses that somebody else wrote, each with its EOS, as if they had been sampled."""
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    batch = collate(
        [encode_prompt(tokenizer, prompt) for prompt in prompts],
        [encode_response(tokenizer, response) for response in responses],
        pad_id=pad,
    )
    ended = torch.ones(len(prompts), dtype=torch.bool, device=device)
    return Rollout(batch.to(device), list(prompts), list(responses), ended)


@torch.no_grad()
def sample(model: PreTrainedModel, prompts: Batch, uniform: Tensor, temperature: float, eos_id: int) -> list[list[int]]:
    """Token ids sampled after each prompt, each row cut after its first EOS.

    Args:
        prompts: B rows without responses.
        uniform: [B, T] fp64 in [0, 1), what each token is drawn with; T is the length at which a response is cut.
    """
    from .kv_cache import growing_cache

    tokens, mask, positions = prompts.tokens, prompts.attention_mask, prompts.position_ids
    cache = growing_cache(model)
    rows = torch.arange(len(tokens), device=tokens.device)  # the responses that the rows of the cache belong to
    alive = torch.ones_like(rows, dtype=torch.bool)
    sampled = torch.full(uniform.shape, eos_id, device=tokens.device)
    for step in range(uniform.shape[1]):
        logits = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **cache,
        ).logits[:, -1]
        drawn = draw(logits, temperature, uniform[rows, step])
        sampled[rows, step] = drawn
        alive &= drawn != eos_id
        left = int(alive.sum())
        if not left:
            break
        tokens, mask, positions = drawn[:, None], extended(mask), positions[:, -1:] + 1
        if left <= KEPT_ALIVE * len(rows):
            kept = alive.nonzero().squeeze(1)
            for each in cache.values():
                each.batch_select_indices(kept)
            tokens, mask, positions, rows, alive = (x[kept] for x in (tokens, mask, positions, rows, alive))
    return [until_eos(row, eos_id) for row in sampled.tolist()]


def draw(logits: Tensor, temperature: float, uniform: Tensor) -> Tensor:
    """[B] int64: tokens from softmax(logits [B, V] / temperature), each by one number of uniform [B] in [0, 1).

    The inverse of the cumulative distribution, which is summed in fp64: an fp32 sum would lose rare tokens. It takes
    one pass and one random number where `torch.multinomial` draws one for each of the V tokens.
    """
    cumulative = (logits.float() / temperature).softmax(-1).cumsum(-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    if not total.isfinite().all():
        raise UserError("the policy's logits are NaN or infinite: there is nothing to sample from")
    # The first token at which the sum exceeds the number; one of probability 0 never is.
    return (
        torch.searchsorted(cumulative, uniform[:, None] * total, right=True).squeeze(1).clamp(max=logits.shape[1] - 1)
    )


def extended(mask: Tensor) -> Tensor:
    """[B, L + 1]: the mask with one more column of True."""
    return torch.nn.functional.pad(mask, (0, 1), value=True)


def until_eos(tokens: list[int], eos_id: int) -> list[int]:
    """The tokens up to the first EOS, which is kept; all of them if there is none."""
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens

"""Sampling responses from a policy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .data import Batch, collate, decode, encode_prompt

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase


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
    config = _generation_config(tokenizer, response_length, temperature)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    sampled: list[list[int]] = []
    size = micro_batch or len(prompts)
    for start in range(0, len(prompts), size):
        sampled += _sample(model, encoded[start : start + size], config)
    batch = collate(encoded, sampled, pad_id=config.pad_token_id)
    terminated = torch.tensor([response[-1] == tokenizer.eos_token_id for response in sampled])
    texts = [response[:-1] if response[-1] == tokenizer.eos_token_id else response for response in sampled]
    decoded = [decode(tokenizer, each) for each in texts]
    return Rollout(batch.to(model.device), list(prompts), decoded, terminated.to(model.device), response_length)


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, response_length: int, temperature: float
) -> GenerationConfig:
    from transformers import GenerationConfig

    if response_length < 1:
        raise ValueError(f"generate: response_length must be at least 1, got {response_length}")
    if not temperature > 0:
        raise ValueError(f"generate: temperature must be greater than 0, got {temperature}")
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=response_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
    )


@torch.no_grad()
def _sample(model: PreTrainedModel, prompts: list[list[int]], config: GenerationConfig) -> list[list[int]]:
    """Token ids sampled after each prompt, each cut after its first EOS."""
    batch = collate(prompts, [[]] * len(prompts), pad_id=config.pad_token_id).to(model.device)
    # generate() fills what our config leaves open from the model's own one (a top-k, a repetition penalty …), which
    # would sample from another distribution than the one that is scored.
    own, training = model.generation_config, model.training
    model.generation_config = config
    model.eval()
    try:
        tokens = model.generate(  # type: ignore[operator]
            batch.tokens, attention_mask=batch.attention_mask.long(), generation_config=config
        )
    finally:
        model.generation_config = own
        model.train(training)
    return [until_eos(row, config.eos_token_id) for row in tokens[:, batch.prompt_width :].tolist()]


def until_eos(tokens: list[int], eos_id: int) -> list[int]:
    """The tokens up to the first EOS, which is kept; all of them if there is none."""
    return tokens[: tokens.index(eos_id) + 1] if eos_id in tokens else tokens

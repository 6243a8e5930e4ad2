"""Ways of drawing responses other than plain sampling: the nucleus, beams, diverse beams.

They choose among a policy's responses, so what they give is no sample from the distribution that scores it: fit for
candidates that are ranked, not for an importance ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .data import collate, position_ids
from .kv_cache import growing_cache
from .rollout import until_eos

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@torch.no_grad()
def nucleus_sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    top_p: float,
    response_length: int,
    temperature: float = 1.0,
) -> list[list[int]]:
    """Token ids of one response to each prompt, EOS included, from the likeliest tokens that together have `top_p`.

    Source: Holtzman et al. 2020 (arXiv 1904.09751).
    """
    from transformers import GenerationConfig

    batch = collate(prompts, [[]] * len(prompts), tokenizer.pad_token_id).to(model.device)
    config = GenerationConfig(
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=top_p,
        max_new_tokens=response_length,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    # generate() fills what a config leaves open from the model's own (a top-k, a repetition penalty …).
    own = model.generation_config
    model.generation_config = config
    try:
        tokens = model.generate(  # type: ignore[operator]
            batch.tokens, attention_mask=batch.attention_mask.long(), generation_config=config
        )
    finally:
        model.generation_config = own
    return [until_eos(row, tokenizer.eos_token_id) for row in tokens[:, batch.prompt_width :].tolist()]


@dataclass
class _Group:
    """One group of beams of one prompt: what is alive, as (log-probability, tokens), and what has ended."""

    alive: list[tuple[float, list[int]]]
    ended: list[tuple[float, list[int]]] = field(default_factory=list)


@torch.no_grad()
def beam_search(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    groups: int = 1,
    diversity: float = 0.0,
    response_length: int,
    temperature: float = 1.0,
) -> list[list[list[int]]]:
    """`beams` responses to each prompt, as token ids, EOS included where one ended: of each group its best by mean
    log-probability.

    groups: they search one after the other at each step; a token loses `diversity` nats for each beam of an earlier
    group that has just taken it. One group is plain beam search. The penalty chooses tokens; it is not kept in a
    beam's log-probability.

    Raises ValueError where groups do not divide beams.

    Source: diverse beam search, Vijayakumar et al. 2018 (arXiv 1610.02424).
    """
    if beams < 1 or groups < 1 or beams % groups:
        raise ValueError(f"beam_search: groups must divide beams {beams}, got {groups}")
    width, eos = beams // groups, tokenizer.eos_token_id
    state = [[_Group([(0.0, [])]) for _ in range(groups)] for _ in prompts]
    batch = collate(prompts, [[]] * len(prompts), tokenizer.pad_token_id).to(model.device)
    repeats = torch.arange(len(prompts), device=model.device).repeat_interleave(beams)
    tokens, attention_mask, cache = batch.tokens[repeats], batch.attention_mask[repeats], growing_cache(model)
    for step in range(response_length):
        output = model(
            input_ids=tokens,
            attention_mask=attention_mask,
            position_ids=position_ids(attention_mask)[:, -tokens.shape[1] :],
            use_cache=True,
            logits_to_keep=1,
            **cache,
        )
        logprobs = (output.logits[:, -1].float() / temperature).log_softmax(-1)
        parents, taken = [], []
        for row, prompt_groups in enumerate(state):
            counts = torch.zeros(logprobs.shape[1], device=logprobs.device)
            for number, group in enumerate(prompt_groups):
                first = row * beams + number * width
                chosen = _advance(group, logprobs[first : first + width], counts, diversity, width, eos)
                chosen += [(0, eos)] * (width - len(chosen))  # rows without a beam
                parents += [first + parent for parent, _ in chosen]
                taken += [token for _, token in chosen]
        if step + 1 == response_length or not any(group.alive for each in state for group in each):
            break
        for held in cache.values():
            held.batch_select_indices(torch.tensor(parents, device=model.device))
        tokens = torch.tensor(taken, device=model.device)[:, None]
        attention_mask = torch.cat([attention_mask, torch.ones_like(tokens, dtype=torch.bool)], 1)
    return [[tokens for group in each for tokens in _best(group, width)] for each in state]


def _advance(
    group: _Group, logprobs: Tensor, counts: Tensor, diversity: float, width: int, eos: int
) -> list[tuple[int, int]]:
    """One step of a group; returns (beam continued, token) of what is alive and adds the tokens taken to `counts`."""
    if not group.alive:
        return []
    total = torch.tensor([logprob for logprob, _ in group.alive], device=logprobs.device)
    grown = total[:, None] + logprobs[: len(group.alive)]
    found = (grown - diversity * counts).flatten().topk(min(2 * width, grown.numel())).indices
    following: list[tuple[float, list[int]]] = []
    chosen: list[tuple[int, int]] = []
    for place, index in enumerate(found.tolist()):
        parent, token = divmod(index, logprobs.shape[1])
        beam = (grown[parent, token].item(), [*group.alive[parent][1], token])
        if token == eos:
            if place < width:  # an end that is not among the best does not count
                group.ended.append(beam)
                counts[token] += 1
        elif len(following) < width:
            following.append(beam)
            chosen.append((parent, token))
            counts[token] += 1
    group.alive = following if len(group.ended) < width else []
    return chosen


def _best(group: _Group, width: int) -> list[list[int]]:
    """The best that ended, then the best that did not; fewer than `width` only where the vocabulary ran out."""
    ranked = [sorted(each, key=lambda beam: -beam[0] / len(beam[1])) for each in (group.ended, group.alive)]
    return [tokens for _, tokens in [*ranked[0], *ranked[1]][:width]]

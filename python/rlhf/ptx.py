"""PPO-ptx: likelihood of demonstrations beside the reward, against forgetting how to write (Ouyang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from .data import Demonstration, collate, encode_prompt, encode_response, epoch_order
from .model import response_logprobs

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Demonstrations:
    """Demonstrations in minibatches that are a function of (seed, number of the optimiser step)."""

    def __init__(
        self, demonstrations: Sequence[Demonstration], tokenizer: PreTrainedTokenizerBase, batch_size: int, seed: int
    ) -> None:
        self.prompts = [encode_prompt(tokenizer, each.prompt) for each in demonstrations]
        self.responses = [encode_response(tokenizer, each.response) for each in demonstrations]
        self.pad_id = tokenizer.pad_token_id
        self.batch_size, self.seed = batch_size, seed

    def backward(
        self, policy: PreTrainedModel, number: int, coef: float, *, micro_batch: int | None = None
    ) -> torch.Tensor:
        """Adds the gradient of −coef · mean log π over the response tokens of minibatch `number`; returns that loss."""
        chosen = self.chosen(number)
        batch = collate([self.prompts[i] for i in chosen], [self.responses[i] for i in chosen], self.pad_id)
        batch = batch.to(policy.device)
        tokens, total = batch.mask.sum(), torch.zeros((), device=policy.device)
        for part in batch.split(micro_batch):
            loss = -coef * response_logprobs(policy, part).sum() / tokens
            loss.backward()
            total = total + loss.detach()
        return total

    def chosen(self, number: int) -> list[int]:
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        found = []
        for place in places:
            epoch, position = divmod(place, len(self.prompts))
            found.append(epoch_order(len(self.prompts), self.seed, epoch)[position])
        return found

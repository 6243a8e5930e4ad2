"""Any reward model as the gold judge: `--gold` of the stages that train or measure a policy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from .data import Task
from .model import load_reward_model, loading_options
from .rm import score_texts

MAX_LENGTH = 2048
"""Tokens of a text that the judge reads; a longer one loses its start."""


class RewardModelJudge:
    """Called with (prompts, responses), gives the model's normalised score of each text, read by its own tokenizer."""

    def __init__(self, name: str, *, micro_batch: int | None = None, **loading: Any) -> None:
        self.model, self.tokenizer = load_reward_model(name, **loading)
        self.model.requires_grad_(False)
        self.micro_batch = micro_batch

    @torch.no_grad()
    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        texts = zip(prompts, responses)
        return score_texts(self.model, self.tokenizer, texts, MAX_LENGTH, micro_batch=self.micro_batch).tolist()


def with_gold(task: Task, config: Any) -> Task:
    """The task with the judge that a stage's `gold` asks for, or as it is."""
    if config.gold is None:
        return task
    judge = RewardModelJudge(config.gold, micro_batch=config.micro_batch, **loading_options(config))
    return replace(task, gold=judge)

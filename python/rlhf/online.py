"""PPO with a reward model that is refreshed: new samples of the policy are labelled as it moves.

Every `refresh_every` steps the policy, as it then is, answers some prompts; the answers are labelled (`labels.py`), the
reward model is trained on old and new rankings mixed, and its normalisation is fitted anew on the demonstrations. Then
the policy goes on, with its optimiser and its value model as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import ppo, rm
from .config import UserError, option
from .data import Ranking, Task, epoch_order, task_of
from .experience import Models
from .files import append_line, read_lines
from .guard import Guard
from .judges import INSTRUCTION, KEY, EndpointJudge, Judge, ModelJudge
from .labels import by_comparison, by_gold, by_rating, export, read_exported
from .lora import trainable
from .model import loading_options
from .ppo_config import PpoConfig
from .rm_data import batch_of, batches_of, encode
from .rollout import generate
from .run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HELDOUT = 64
"""Held-out rankings of the data that the reward model is measured on before and after a refresh."""

LABELS = "labels.jsonl"
"""In the run folder: every ranking that was labelled, with the step before which it was."""


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(PpoConfig):
    refresh_every: int = option(10, "steps between two refreshes of the reward model", low=1)
    label_prompts: int = option(64, "prompts whose answers are labelled at a refresh", low=1)
    label_responses: int = option(2, "answers sampled for each of them", low=2)
    labeler: str = option(
        "gold",
        "the gold judge; a causal model (--judge); an --endpoint; or export: a file for a person to fill in",
        choices=("gold", "judge", "endpoint", "export"),
    )
    judge: str | None = option(None, "labeler judge: run folder, model folder or hub name")
    endpoint: str | None = option(
        None, f"labeler endpoint: base address with /chat/completions as OpenAI's; its key is read from ${KEY}"
    )
    endpoint_model: str | None = option(None, "labeler endpoint: the model's name there")
    endpoint_timeout: float = option(60.0, "labeler endpoint: seconds to wait for an answer", above=0)
    endpoint_retries: int = option(3, "labeler endpoint: times that a question without an answer is asked again", low=0)
    endpoint_workers: int = option(8, "labeler endpoint: questions asked at a time", low=1)
    ask: str = option(
        "comparisons",
        "what a judge is asked: the better of two, in both orders; or a rating from 1 to 10",
        choices=("comparisons", "ratings"),
    )
    judge_instruction: str = option(INSTRUCTION, "first sentence of what a judge is asked: what is good here")
    rm_data: str | None = option(
        None, "rankings that the reward model was trained on, for rm_mix, in a form of --data; --data unless given"
    )
    rm_mix: float = option(1.0, "old rankings for each new one in the reward model's training", low=0)
    rm_epochs: int = option(1, "passes over them at a refresh", low=1)
    rm_batch_size: int = option(16, "rankings in an optimiser step of the reward model", low=1)
    rm_learning_rate: float = option(2e-4, "the reward model's learning rate, falling linearly to 0", above=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rm is None:
            raise UserError("online needs --rm: the reward model is what is refreshed")
        for labeler, name in (("judge", "judge"), ("endpoint", "endpoint"), ("endpoint", "endpoint_model")):
            if self.labeler == labeler and getattr(self, name) is None:
                raise UserError(f"labeler {labeler} needs --{name.replace('_', '-')}")


class Feedback:
    """The refresh as `ppo.train` calls it before each step."""

    def __init__(self, config: OnlineConfig) -> None:
        assert config.rm is not None  # the config refuses a run without one
        self.config = config
        self.judge = judge_of(config)
        self.old = old_rankings(config, config.rm_data) if config.rm_data else None
        self.rm_config = rm.RmConfig(
            out=config.out,
            init=config.rm,
            seed=config.seed,
            epochs=config.rm_epochs,
            batch_size=config.rm_batch_size,
            learning_rate=config.rm_learning_rate,
            micro_batch=config.micro_batch,
        )

    def __call__(self, step: int, models: Models, task: Task, run: Run, guard: Guard) -> dict[str, float]:
        """Before step k · refresh_every + 1: label, train, normalise; returns metrics. Otherwise nothing."""
        number, rest = divmod(step - 1, self.config.refresh_every)
        if number == 0 or rest:
            return {}
        with run.timer("label"):
            fresh, metrics = self.label(step, number, models, task, run)
        if not fresh:
            run.say(f"step {step}: no prompt got unequal scores, so the reward model stays as it is")
            return metrics
        earlier = rankings_in(run.folder / LABELS)
        for ranking in fresh:
            row = {"prompt": ranking.prompt, "responses": ranking.responses, "scores": ranking.scores}
            append_line(run.folder / LABELS, {"step": step, **row})
        with run.timer("refresh"):
            return metrics | self.train(number, fresh, [*earlier, *fresh], models, task, guard)

    # Labels

    def label(
        self, step: int, number: int, models: Models, task: Task, run: Run
    ) -> tuple[list[Ranking], dict[str, float]]:
        """Rankings of new samples with unequal scores, and what is known of the labelling."""
        exported = run.folder / "to_label" / f"step-{step:06d}.jsonl"
        metrics: dict[str, float] = {}
        if self.config.labeler == "export" and exported.exists():
            found = read_exported(exported)
        else:
            samples = self.sample(number, models, task)
            if self.config.labeler == "export":
                export(exported, samples)
                found = []
            elif self.config.labeler == "gold":
                if task.gold is None:
                    raise UserError(f"labeler gold: {self.config.data} has no gold judge; give one with --gold")
                found = by_gold(task.gold, samples)
            else:
                assert self.judge is not None  # the config names it
                ask = by_comparison if self.config.ask == "comparisons" else by_rating
                found, metrics = ask(self.judge, samples)
        usable = [ranking for ranking in found if len(set(ranking.scores)) > 1]
        if not usable and self.config.labeler == "export":
            raise UserError(
                f"the samples of step {step - 1} are in {exported}: give their responses scores (higher is better; "
                "rows left at null are not used), then go on with --resume"
            )
        return usable, metrics | {"label/rankings": len(usable)}

    def sample(self, number: int, models: Models, task: Task) -> list[tuple[str, list[str]]]:
        order = epoch_order(len(task.prompts), self.config.seed, 1_000_000 + number)
        count = self.config.label_responses
        prompts = [task.prompts[order[i % len(order)]] for i in range(self.config.label_prompts)]
        responses = generate(
            models.policy,
            models.tokenizer,
            [prompt for prompt in prompts for _ in range(count)],
            response_length=self.config.response_length or task.response_length,
            temperature=self.config.temperature,
            micro_batch=self.config.micro_batch,
        ).responses
        return [(prompt, responses[i * count : (i + 1) * count]) for i, prompt in enumerate(prompts)]

    # Training

    def train(
        self, number: int, fresh: list[Ranking], labelled: list[Ranking], models: Models, task: Task, guard: Guard
    ) -> dict[str, float]:
        """Fine-tune the reward model, in place, on everything labelled so far and old rankings; fit its normalisation.

        refresh/accuracy_before and _after: share of the fresh pairs in the right order, before the model has seen them
        and after; refresh/heldout_before and _after: of the data's held-out rankings.
        """
        model, tokenizer, config = models.reward_model, models.rm_tokenizer, self.rm_config
        assert model is not None and tokenizer is not None  # the config refuses a run without a reward model
        known = task.rankings if self.old is None else self.old
        old = [ranking for ranking in known if len(set(ranking.scores)) > 1]
        order = epoch_order(len(old), self.config.seed, 1_000_000 + number)
        mixed = [*labelled, *(old[i] for i in order[: round(self.config.rm_mix * len(labelled))])]
        examples = encode(tokenizer, mixed, config.max_length)
        before = self.accuracies(model, tokenizer, fresh, task)
        optimizer = torch.optim.AdamW(trainable(model), lr=config.learning_rate, weight_decay=config.weight_decay)
        guard.track(optimizer)
        total = config.epochs * math.ceil(len(examples) / config.batch_size)
        done = 0
        for epoch in range(config.epochs):
            order = epoch_order(len(examples), config.seed, 1000 * number + epoch)
            for start in range(0, len(order), config.batch_size):
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * (1 - done / total)
                batch = batch_of(
                    [examples[i] for i in order[start : start + config.batch_size]], tokenizer.pad_token_id
                )
                loss = rm.train_step(model, optimizer, batch.to(model.device), config)["loss"]
                done += 1
        optimizer.zero_grad(set_to_none=True)
        rm.fit_normalization(model, tokenizer, task, config)
        after = self.accuracies(model, tokenizer, fresh, task)
        metrics = {f"refresh/{name}_before": value for name, value in before.items()}
        metrics |= {f"refresh/{name}_after": value for name, value in after.items()}
        return metrics | {"refresh/loss": loss, "refresh/rankings": len(mixed)}

    def accuracies(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, fresh: list[Ranking], task: Task
    ) -> dict[str, float]:
        found = {}
        for name, rankings in (("accuracy", fresh), ("heldout", task.heldout_rankings[:HELDOUT])):
            examples = encode(tokenizer, rankings, self.rm_config.max_length)
            batches = batches_of(examples, self.rm_config.batch_size, tokenizer.pad_token_id)
            result = rm.evaluation(model, batches, self.rm_config)
            if "pair_accuracy" in result:
                found[name] = result["pair_accuracy"]
        return found


def old_rankings(config: OnlineConfig, data: str) -> list[Ranking]:
    """Those of rm_data. Raises UserError, which names the flag, for data that cannot be read."""
    try:
        return task_of(replace(config, data=data), config.rm).rankings
    except (UserError, FileNotFoundError) as error:
        raise UserError(f"rm_data {data}: {error}") from error


def judge_of(config: OnlineConfig) -> Judge | None:
    if config.labeler == "judge":
        assert config.judge is not None
        return ModelJudge(
            config.judge,
            instruction=config.judge_instruction,
            micro_batch=config.micro_batch,
            **loading_options(config),
        )
    if config.labeler == "endpoint":
        assert config.endpoint is not None and config.endpoint_model is not None
        return EndpointJudge(
            config.endpoint,
            config.endpoint_model,
            instruction=config.judge_instruction,
            timeout=config.endpoint_timeout,
            retries=config.endpoint_retries,
            workers=config.endpoint_workers,
        )
    return None


def rankings_in(path: Path) -> list[Ranking]:
    lines = read_lines(path) if path.exists() else []
    return [Ranking(line["prompt"], tuple(line["responses"]), tuple(line["scores"])) for line in lines]


def main(config: OnlineConfig) -> Path:
    """Train and return the run folder: as `rlhf ppo`, with labels.jsonl, and reward/, the reward model at the end."""
    return ppo.train(config, "online", Feedback(config))

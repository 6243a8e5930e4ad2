"""PPO, with a value model or without: sparse or dense rewards, KL penalty in reward or loss, one process.

One step, in this order: sample → score (`scores.py`) → old and reference log-probabilities, values → rewards and
advantages (`experience.py`) → epochs of minibatches (`ppo_update.py`) → KL controller (`kl_control.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .config import UserError
from .data import Demonstration, Task, decode_tokens, epoch_order, task_of
from .evaluate import Evaluator, Judges, eval_prompts
from .experience import (
    Models,
    adjusted_scores,
    make_experience,
    rollout_metrics,
    rollout_record,
    score_rollout,
)
from .feedback_loss import feedback_term
from .gold_model import with_gold
from .guard import Guard, Values
from .kl_control import adapt_kl_coef, check_kl, measured_kl
from .model import load_policy, load_reference, load_reward_model, loading_options, share_trunk, zero_head
from .overoptimization import overoptimization, watch_gold
from .ppo_config import PpoConfig
from .ppo_update import trained_parameters, update, update_metrics
from .ptx import Demonstrations
from .reading import same_tokens
from .rollout import Rollout, check_prompts, generate, given_rollout, joined_rollouts
from .run import Checkpoint, Run, seed_everything
from .schedule import schedule
from .scorer import FunctionScorer, load_function, scorer_of
from .scores import ScoreNormalizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

REFERENCES = 512
"""Demonstrations whose mean score is the bias of score_norm bias-only."""

MAX_RESAMPLES = 10
"""Rounds of dynamic sampling in a step."""


Refresh = Callable[[int, Models, Task, Run, Guard], dict[str, float]]
"""What changes the reward model: called before each step with its number, gives metrics."""


def main(config: PpoConfig) -> Path:
    """Train and return the run folder: model/, value/, metrics.jsonl, rollouts.jsonl, samples.jsonl."""
    return train(config, "ppo")


def train(config: PpoConfig, stage: str, refresh: Refresh | None = None) -> Path:
    """The stage; with `refresh` the reward model is no constant of it, but part of each checkpoint and saved at the
    end."""
    run = Run.create(config.out, stage, config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = with_gold(task_of(config, config.init), config)
    response_length = config.response_length or task.response_length
    checkpoint = run.load_checkpoint()
    models, optimizer = prepare(config, checkpoint, task, refreshed=refresh is not None)
    check_prompts(models.policy, models.tokenizer, task.prompts, response_length)
    feedback = feedback_term(config, models.tokenizer, models.ref)
    evaluator = Evaluator.of(config, task, Judges(models.ref, models.scorer, task.gold))

    kl = Values(coef=config.kl_coef)
    demonstrations = None
    if config.ptx_coef:
        demonstrations = Demonstrations(
            needed_demonstrations(task, config, "ptx_coef"), models.tokenizer, config.ptx_batch_size, config.seed
        )
    trained: dict[str, Any] = {"model": (models.policy, models.tokenizer)}
    if models.value is not None:
        trained["value"] = (models.value, models.tokenizer)
    constants: dict[str, Any] = {"data": task, "tokenizer": models.tokenizer, "reference": models.ref}
    if feedback:
        constants["token feedback"] = feedback.rows
    if refresh is None:
        constants["scorer"] = models.scorer
    else:
        trained["reward"] = (models.reward_model, models.rm_tokenizer)
    with Guard(
        run,
        config,
        config.steps,
        models=trained,
        parts={"optimizer": optimizer, "kl": kl, "scores": models.normalizer},
        constants=constants,
        checkpoint=checkpoint,
    ) as guard:
        if guard.step == 0:
            if config.score_norm == "bias-only":
                models.normalizer.fit(demonstration_scores(models, task, config))
            run.log(0, evaluator.metrics(models.policy, models.tokenizer, run))
        for step in guard.steps(f"{stage} {config.reward_shaping}"):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(
                    step - 1, config.steps, warmup=config.warmup, kind=config.lr_scheduler
                )
            metrics = {"lr": optimizer.param_groups[0]["lr"], "episode": step * config.batch_size}
            evaluated = step == config.steps or (config.eval_every and step % config.eval_every == 0)
            with guard.attempt() as seen:
                if refresh:
                    metrics |= refresh(step, models, task, run, guard)
                with run.timer("generate"):
                    seen["rollout"] = rollout = step_rollout(models, task, config, response_length, step)
                seen["experience"] = experience = make_experience(models, rollout, config, kl["coef"], run)
                metrics |= rollout_metrics(experience, kl["coef"], config)
                if evaluated or step == 1:
                    run.rollout(rollout_record(experience, step))
                check_kl(metrics["objective/kl"], config)
                with run.timer("train"):
                    stats = update(
                        models,
                        optimizer,
                        experience,
                        config,
                        kl["coef"],
                        demonstrations=demonstrations,
                        feedback=feedback,
                        step=step,
                    )
                metrics |= update_metrics(stats)
                measured = measured_kl(experience.kl, experience.batch.mask, config.kl_measure)
                kl["coef"] = adapt_kl_coef(kl["coef"], measured, config)
            if evaluated:
                metrics |= evaluator.metrics(models.policy, models.tokenizer, run)
            guard.log(metrics, "objective/scores", "objective/kl")
            if watch_gold(run, models.policy, models.tokenizer, config.stop_on_gold):
                guard.total = step
    for record in credit_samples(models, task, config, response_length, guard.total, kl["coef"], run):
        run.sample(record)
    for name, (model, tokenizer) in trained.items():
        run.save_model(model, tokenizer, name)
    return run.finish({"kl_coef": kl["coef"], "steps": guard.total, **overoptimization(run.folder)})


def prepare(
    config: PpoConfig, checkpoint: Checkpoint | None, task: Task, *, refreshed: bool = False
) -> tuple[Models, torch.optim.Optimizer]:
    """Models, fresh or as the checkpoint left them, and a fresh optimiser. refreshed: the reward model trains too."""
    folder = checkpoint.folder if checkpoint else None
    where = loading_options(config)
    policy, tokenizer = load_policy(str(folder / "model") if folder else config.init, lora=config.lora, **where)
    ref = load_reference(config.ref or config.init, tokenizer, **where)
    loaded = None
    if config.rm and refreshed:
        loaded = load_reward_model(str(folder / "reward") if folder else config.rm, lora=config.lora, **where)
    elif config.rm:
        loaded = load_reward_model(config.rm, frozen=True, **where)
    scorer = scorer_of(config, loaded, tokenizer, task)
    assert scorer is not None  # the config has seen to it
    reward_model = loaded[0] if loaded else None
    value = (
        load_value(config, checkpoint, policy, tokenizer, loaded and loaded[1], where) if config.has_critic else None
    )
    models = Models(policy, value, ref, reward_model, tokenizer, scorer, rm_tokenizer=loaded and loaded[1])
    models.normalizer = ScoreNormalizer(config.score_norm, config.score_clip, config.score_clip_before)
    if config.score_norm == "delta":
        models.references = {each.prompt: each.response for each in needed_demonstrations(task, config, "score_norm")}
    peaks = {"policy": config.learning_rate, "value": config.value_learning_rate or config.learning_rate}
    optimizer = torch.optim.AdamW(
        [{"params": params, "peak": peaks[name]} for name, params in trained_parameters(models).items()],
        lr=config.learning_rate,
        eps=config.adam_eps,
        weight_decay=0.0,
    )
    if config.token_reward_fn is not None:
        function = load_function("--token-reward-fn", config.token_reward_fn)
        models.token_scorer = FunctionScorer(function, config.token_reward_fn, tokenizer, task.rows)
    return models, optimizer


def load_value(
    config: PpoConfig,
    checkpoint: Checkpoint | None,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rm_tokenizer: PreTrainedTokenizerBase | None,
    where: dict[str, Any],
) -> PreTrainedModel:
    """The value model, fresh with a head of zeros or as the checkpoint left it; a head on the policy's if asked."""
    shared = config.value_trunk == "shared"
    if checkpoint:
        value, _ = load_reward_model(str(checkpoint.folder / "value"), lora=config.lora, **where)
    else:
        start = config.init if shared else value_start(config, rm_tokenizer, tokenizer)
        value, _ = load_reward_model(start, lora=config.lora, **where)
        zero_head(value)
        value.config.score_mean, value.config.score_std = 0.0, 1.0
    if shared:
        share_trunk(value, policy)
    return value


def value_start(
    config: PpoConfig, rm_tokenizer: PreTrainedTokenizerBase | None, tokenizer: PreTrainedTokenizerBase
) -> str:
    """The model that the value model starts from; it reads the policy's tokens, so it must be of its tokenizer."""
    if config.value_init == "init" or config.rm is None or rm_tokenizer is None:
        return config.init
    if same_tokens(rm_tokenizer, tokenizer):
        return config.rm
    print(
        f"ppo: the value model starts from {config.init}: {config.rm} has another tokenizer than the policy",
        file=sys.stderr,
        flush=True,
    )
    return config.init


def needed_demonstrations(task: Task, config: PpoConfig, flag: str) -> list[Demonstration]:
    if not task.demonstrations:
        raise UserError(f"{flag} needs demonstrations, and {config.data} has none")
    return task.demonstrations


def demonstration_scores(models: Models, task: Task, config: PpoConfig) -> Tensor:
    """The scores of the first demonstrations, as many as there are responses in a few rollouts."""
    chosen = needed_demonstrations(task, config, "score_norm")[:REFERENCES]
    prompts, responses = [each.prompt for each in chosen], [each.response for each in chosen]
    given = given_rollout(models.tokenizer, prompts, responses, models.policy.device)
    return models.scorer(given).scores


def step_rollout(models: Models, task: Task, config: PpoConfig, response_length: int, step: int) -> Rollout:
    """The rollout of a step: num_generations responses to each of its prompts, side by side.

    With dynamic_sampling a prompt whose responses all have the same score gives way to another, until each has two.
    Raises UserError where none is found in MAX_RESAMPLES rounds.
    """
    prompts = step_prompts(task, config, step)
    found: list[Rollout] = []
    kept: list[Tensor] = []
    for round_number in range(MAX_RESAMPLES):
        rollout = generate(
            models.policy,
            models.tokenizer,
            [prompt for prompt in prompts for _ in range(config.num_generations)],
            response_length=response_length,
            temperature=config.temperature,
            micro_batch=config.micro_batch,
        )
        if not config.dynamic_sampling:
            return rollout
        scores, _ = adjusted_scores(models, rollout, models.scorer(rollout).scores, config)
        groups = scores.view(-1, config.num_generations)
        differ = groups.amax(1) > groups.amin(1)  # False for NaN, what cannot be scored
        found.append(rollout)
        kept.append(differ.repeat_interleave(config.num_generations))
        if differ.all():
            return joined_rollouts(found, kept, models.tokenizer.pad_token_id)
        order = epoch_order(len(task.prompts), config.seed, -(step * MAX_RESAMPLES + round_number + 1))
        missing = len(prompts) - int(differ.sum())
        prompts = [task.prompts[order[i % len(order)]] for i in range(missing)]
    raise UserError(
        f"dynamic_sampling: after {MAX_RESAMPLES} rounds there are still {len(prompts)} prompts whose "
        f"{config.num_generations} responses all have the same score"
    )


def step_prompts(task: Task, config: PpoConfig, step: int) -> list[str]:
    """The prompts of a step, a function of (seed, step): a resumed run goes on where it was."""
    if not task.prompts:
        raise UserError(f"{config.data}: the data has no prompts to sample from")
    count = config.batch_size // config.num_generations
    first, chosen = (step - 1) * count, []
    order: dict[int, list[int]] = {}
    for position in range(first, first + count):
        epoch, place = divmod(position, len(task.prompts))
        order.setdefault(epoch, epoch_order(len(task.prompts), config.seed, epoch))
        chosen.append(task.prompts[order[epoch][place]])
    return chosen


def credit_samples(
    models: Models, task: Task, config: PpoConfig, response_length: int, step: int, kl_coef: float, run: Run
) -> Iterator[dict[str, Any]]:
    """Records for samples.jsonl: held-out responses with what each token got of the score and of the reward."""
    prompts = eval_prompts(task.eval_prompts, config.num_samples) if config.num_samples else []
    if not prompts:
        return
    rollout = generate(
        models.policy,
        models.tokenizer,
        prompts,
        response_length=response_length,
        temperature=config.temperature,
        micro_batch=config.micro_batch,
    )
    experience = make_experience(models, rollout, config, kl_coef, run, observe=False)
    others = {
        kind: score_rollout(models, rollout, replace(config, reward_shaping=kind))[1]
        for kind in config.compare_shapings
    }
    gold = task.gold(rollout.prompts, rollout.responses) if task.gold else [None] * len(prompts)
    for row, prompt in enumerate(prompts):
        mask = rollout.batch.mask[row]
        yield {
            "step": step,
            "prompt": prompt,
            "tokens": decode_tokens(models.tokenizer, rollout.batch.responses[row][mask].tolist()),
            "credit": experience.credit[row][mask].tolist(),
            "rewards": experience.rewards[row][mask].tolist(),
            "score": experience.scores[row].item(),
            "gold": gold[row],
            "credit_by_shaping": {kind: earned[row][mask].tolist() for kind, earned in others.items()},
        }

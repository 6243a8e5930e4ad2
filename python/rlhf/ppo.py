"""PPO with a critic: sparse or dense rewards, KL penalty in the reward, one process.

One step, in this order: sample → score (missing-EOS penalty) → old and reference log-probabilities, values → rewards
and advantages (`experience.py`) → epochs of minibatches (`ppo_update.py`) → KL controller (`kl_control.py`).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .config import UserError
from .data import Task, decode_tokens, epoch_order, task_of
from .evaluate import Evaluator, Judges, eval_prompts
from .experience import Models, make_experience, rollout_metrics, rollout_record, score_rollout
from .gold_model import with_gold
from .guard import Guard, Values
from .kl_control import adapt_kl_coef, check_kl, measured_kl
from .lora import trainable
from .model import load_policy, load_reference, load_reward_model, loading_options, zero_head
from .overoptimization import overoptimization, watch_gold
from .ppo_config import PpoConfig
from .ppo_update import update, update_metrics
from .reading import same_tokens
from .rollout import check_prompts, generate
from .run import Checkpoint, Run, seed_everything
from .schedule import schedule
from .scorer import scorer_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main(config: PpoConfig) -> Path:
    """Train and return the run folder: model/, value/, metrics.jsonl, rollouts.jsonl, samples.jsonl."""
    run = Run.create(config.out, "ppo", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    task = with_gold(task_of(config, config.init), config)
    response_length = config.response_length or task.response_length
    checkpoint = run.load_checkpoint()
    models, optimizer = prepare(config, checkpoint, task)
    check_prompts(models.policy, models.tokenizer, task.prompts, response_length)
    evaluator = Evaluator.of(config, task, Judges(models.ref, models.scorer, task.gold))

    kl = Values(coef=config.kl_coef)
    with Guard(
        run,
        config,
        config.steps,
        models={"model": (models.policy, models.tokenizer), "value": (models.value, models.tokenizer)},
        parts={"optimizer": optimizer, "kl": kl},
        constants={
            "data": task,
            "tokenizer": models.tokenizer,
            "reference": models.ref,
            "scorer": models.scorer,
        },
        checkpoint=checkpoint,
    ) as guard:
        if guard.step == 0:
            run.log(0, evaluator.metrics(models.policy, models.tokenizer, run))
        for step in guard.steps(f"ppo {config.reward_shaping}"):
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * schedule(
                    step - 1, config.steps, warmup=config.warmup, kind=config.lr_scheduler
                )
            metrics = {"lr": optimizer.param_groups[0]["lr"], "episode": step * config.batch_size}
            evaluated = step == config.steps or (config.eval_every and step % config.eval_every == 0)
            with guard.attempt() as seen:
                with run.timer("generate"):
                    seen["rollout"] = rollout = generate(
                        models.policy,
                        models.tokenizer,
                        step_prompts(task, config, step),
                        response_length=response_length,
                        temperature=config.temperature,
                        micro_batch=config.micro_batch,
                    )
                seen["experience"] = experience = make_experience(models, rollout, config, kl["coef"], run)
                metrics |= rollout_metrics(experience, kl["coef"])
                if evaluated or step == 1:
                    run.rollout(rollout_record(experience, step))
                check_kl(metrics["objective/kl"], config)
                with run.timer("train"):
                    metrics |= update_metrics(update(models, optimizer, experience, config, kl["coef"]))
                measured = measured_kl(experience.kl, experience.batch.mask, config.kl_measure)
                kl["coef"] = adapt_kl_coef(kl["coef"], measured, config)
            if evaluated:
                metrics |= evaluator.metrics(models.policy, models.tokenizer, run)
            guard.log(metrics, "objective/scores", "objective/kl")
            if watch_gold(run, models.policy, models.tokenizer, config.stop_on_gold):
                guard.total = step
    for record in credit_samples(models, task, config, response_length, guard.total, kl["coef"], run):
        run.sample(record)
    run.save_model(models.policy, models.tokenizer)
    run.save_model(models.value, models.tokenizer, "value")
    return run.finish({"kl_coef": kl["coef"], "steps": guard.total, **overoptimization(run.folder)})


def prepare(config: PpoConfig, checkpoint: Checkpoint | None, task: Task) -> tuple[Models, torch.optim.Optimizer]:
    """Models, fresh or as the checkpoint left them, and a fresh optimiser."""
    folder = checkpoint.folder if checkpoint else None
    where = loading_options(config)
    policy, tokenizer = load_policy(str(folder / "model") if folder else config.init, lora=config.lora, **where)
    ref = load_reference(config.ref or config.init, tokenizer, **where)
    loaded = load_reward_model(config.rm, frozen=True, **where) if config.rm else None
    scorer = scorer_of(config, loaded, tokenizer, task)
    assert scorer is not None  # the config has seen to it
    reward_model = loaded[0] if loaded else None
    if folder:
        value, _ = load_reward_model(str(folder / "value"), lora=config.lora, **where)
    else:
        value, _ = load_reward_model(value_start(config, loaded and loaded[1], tokenizer), lora=config.lora, **where)
        zero_head(value)
        value.config.score_mean, value.config.score_std = 0.0, 1.0
    optimizer = torch.optim.AdamW(
        [
            {"params": trainable(policy), "peak": config.learning_rate},
            {"params": trainable(value), "peak": config.value_learning_rate or config.learning_rate},
        ],
        lr=config.learning_rate,
        eps=config.adam_eps,
        weight_decay=0.0,
    )
    return Models(policy, value, ref, reward_model, tokenizer, scorer), optimizer


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


def step_prompts(task: Task, config: PpoConfig, step: int) -> list[str]:
    """The prompts of a step, a function of (seed, step): a resumed run goes on where it was."""
    if not task.prompts:
        raise UserError(f"{config.data}: the data has no prompts to sample from")
    first, chosen = (step - 1) * config.batch_size, []
    order: dict[int, list[int]] = {}
    for position in range(first, first + config.batch_size):
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
    experience = make_experience(models, rollout, config, kl_coef, run)
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

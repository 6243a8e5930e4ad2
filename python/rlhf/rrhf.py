"""RRHF: rank candidate responses by their length-normalised log-probability as their scores do.

Candidates come from a file (prompt, responses, scores), or are sampled from the policy and scored by the reward model;
then `rk.rrhf_loss` on whole prompts. With `rounds` above one the sampling is repeated from the trained policy.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

import rlhf_kernels as rk

from .config import CommonConfig, UserError, option
from .data import Ranking, collate, encode_prompt, encode_response, epoch_order, load_task, parse_row, read_rows
from .evaluate import Evaluator, Judges
from .model import load_policy, load_reward_model, response_logprobs, scores
from .rollout import generate
from .run import Run, resolve_device, rng_state, seed_everything, set_rng_state
from .schedule import schedule, set_learning_rate

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, kw_only=True)
class RrhfConfig(CommonConfig):
    init: str = option(MISSING, "start policy: run folder, model folder or hub name")
    rm: str | None = option(None, "reward model that scores the samples; not needed with --candidates")
    ref: str | None = option(None, "start model of the KL that evaluations report; --init unless given")
    data: str = option("reviews", '"reviews", a folder or a file: gives the prompts and the gold judge')
    candidates: str | None = option(
        None, 'file or folder of rows {"prompt", "responses", "scores"} to train on; sampled unless given'
    )
    num_prompts: int = option(256, "prompts sampled for in each round", low=1)
    num_candidates: int = option(4, "responses sampled for each prompt", low=1)
    rounds: int = option(4, "times that candidates are sampled anew from the policy", low=1)
    epochs: int = option(1, "passes over the candidates of a round", low=1)
    batch_size: int = option(32, "prompts in an optimiser step", low=1)
    micro_batch: int | None = option(None, "rows through a model when sampling and scoring; all unless given", low=1)
    response_length: int | None = option(None, "tokens a response may have; the task's own unless given", low=1)
    temperature: float = option(1.0, "sampling temperature; the same one scores the tokens", above=0)
    learning_rate: float = option(
        1e-3, "peak learning rate, falling linearly to 0; pretrained models want about 1e-5", above=0
    )
    max_grad_norm: float = option(1.0, "gradient norm at which the gradient is clipped", above=0)
    rank_coef: float = option(1.0, "weight of the ranking loss", low=0)
    sft_coef: float = option(1.0, "weight of the best response's negative log-likelihood (its sum over tokens)", low=0)
    length_power: float = option(1.0, "power of its length that a response's log-probability is divided by", low=0)
    eval_every: int = option(
        4, "steps between evaluations on held-out prompts; 0 for only the first and the last", low=0
    )
    eval_samples: int = option(128, "responses in an evaluation", low=1)
    save_total_limit: int = option(2, "checkpoints to keep; there is one after each round", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.candidates is None and self.rm is None:
            raise UserError("rrhf needs --rm to score what it samples, or --candidates with scores")
        if self.candidates is None and self.num_candidates < 2:
            raise UserError(f"num_candidates must be at least 2 to rank, got {self.num_candidates}")


@dataclass(frozen=True)
class Candidates:
    """The candidates of one prompt, as tokens (EOS included) and as text, with their scores."""

    prompt: str
    prompt_tokens: list[int]
    responses: list[list[int]]
    texts: list[str]
    scores: tuple[float, ...]


def sample_candidates(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reward_model: PreTrainedModel,
    prompts: list[str],
    *,
    count: int,
    response_length: int,
    temperature: float,
    micro_batch: int | None = None,
) -> list[Candidates]:
    """`count` responses to each prompt, scored by the reward model; the token ids are kept as they were sampled."""
    repeated = [prompt for prompt in prompts for _ in range(count)]
    rollout = generate(
        policy,
        tokenizer,
        repeated,
        response_length=response_length,
        temperature=temperature,
        micro_batch=micro_batch,
    )
    batch = rollout.batch
    with torch.no_grad():
        score = scores(reward_model, batch.tokens, batch.attention_mask, micro_batch=micro_batch).tolist()
    responses = [row[mask].tolist() for row, mask in zip(batch.responses, batch.mask)]
    found = []
    for number, prompt in enumerate(prompts):
        part = slice(number * count, (number + 1) * count)
        tokens = encode_prompt(tokenizer, prompt)
        found.append(Candidates(prompt, tokens, responses[part], rollout.responses[part], tuple(score[part])))
    return found


def read_candidates(path: str, tokenizer: PreTrainedTokenizerBase) -> list[Candidates]:
    """Candidates of a file or folder; a row that is no ranking is an error with its file and line."""
    found = []
    for where, row in read_rows(Path(path)):
        ranking = parse_row(where, row)
        if not isinstance(ranking, Ranking):
            raise UserError(f'{where}: a row of candidates must have "prompt", "responses" and "scores"')
        tokens = encode_prompt(tokenizer, ranking.prompt)
        responses = [encode_response(tokenizer, response) for response in ranking.responses]
        found.append(Candidates(ranking.prompt, tokens, responses, list(ranking.responses), ranking.scores))
    if not found:
        raise UserError(f"{path}: no rows")
    return found


def step(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    optimizer: torch.optim.Optimizer,
    groups: list[Candidates],
    config: RrhfConfig,
) -> dict[str, float]:
    """One optimiser step on the candidates of some prompts."""
    prompts = [group.prompt_tokens for group in groups for _ in group.responses]
    responses = [response for group in groups for response in group.responses]
    batch = collate(prompts, responses, tokenizer.pad_token_id).to(policy.device)
    score = torch.tensor([score for group in groups for score in group.scores], device=policy.device)
    ids = torch.tensor([i for i, group in enumerate(groups) for _ in group.responses], device=policy.device)
    logprobs = response_logprobs(policy, batch, config.temperature)
    loss, stats = rk.rrhf_loss(
        logprobs,
        score,
        ids,
        batch.mask,
        rank_coef=config.rank_coef,
        sft_coef=config.sft_coef,
        length_power=config.length_power,
    )
    if not math.isfinite(loss.item()):
        raise UserError(f"the loss is {loss.item()}; the last checkpoint and model are as they were")
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    grad_norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), config.max_grad_norm)
    optimizer.step()
    return {
        "loss": loss.item(),
        "loss/rank": stats.rank_loss.item(),
        "loss/sft": stats.sft_loss.item(),
        "accuracy": stats.accuracy.item(),
        "grad_norm": grad_norm.item(),
    }


def mean_score(groups: list[Candidates]) -> float:
    flat = [score for group in groups for score in group.scores]
    return sum(flat) / len(flat)


def main(config: RrhfConfig) -> Path:
    """Train and return the run folder."""
    run = Run.create(config.out, "rrhf", config, resume=config.resume, overwrite=config.overwrite)
    seed_everything(config.seed)
    device = resolve_device(config.device)
    task = load_task(config.data, config.seed)
    checkpoint = run.load_checkpoint() if config.resume else None
    where: dict[str, Any] = {"device": device, "dtype": config.dtype}
    policy, tokenizer = load_policy(str(checkpoint[1] / "model") if checkpoint else config.init, **where)
    ref, _ = load_policy(config.ref or config.init, **where)
    reward_model = load_reward_model(config.rm, **where)[0] if config.rm else None
    evaluator = Evaluator.of(config, task, Judges(ref, reward_model, task.gold))
    response_length = config.response_length or task.response_length
    provided = read_candidates(config.candidates, tokenizer) if config.candidates else None
    rounds = config.rounds if provided is None else 1
    per_round = math.ceil((len(provided) if provided else config.num_prompts) / config.batch_size) * config.epochs
    total = rounds * per_round
    optimizer = torch.optim.AdamW(policy.parameters(), lr=config.learning_rate, weight_decay=0.0)
    done = 0
    if checkpoint:
        done, _, state = checkpoint
        optimizer.load_state_dict(state["optimizer"])
        set_rng_state(state["rng"])

    def round_candidates(number: int) -> list[Candidates]:
        if provided is not None:
            return provided
        assert reward_model is not None  # the config refuses sampling without one
        if not task.prompts:
            raise UserError(f"{config.data}: the data has no prompts to sample from")
        order = epoch_order(len(task.prompts), config.seed, number)
        prompts = [task.prompts[order[i % len(order)]] for i in range(config.num_prompts)]
        with run.timer("generate"):
            return sample_candidates(
                policy,
                tokenizer,
                reward_model,
                prompts,
                count=config.num_candidates,
                response_length=response_length,
                temperature=config.temperature,
                micro_batch=config.micro_batch,
            )

    if done == 0:
        run.log(0, evaluator.metrics(policy, tokenizer, run))
    with run.progress(total, "rrhf", initial=done) as progress:
        for number in range(done // per_round, rounds):
            candidates = round_candidates(number)
            for epoch in range(config.epochs):
                order = epoch_order(len(candidates), config.seed, 1000 * number + epoch)
                for start in range(0, len(order), config.batch_size):
                    done += 1
                    learning_rate = config.learning_rate * schedule(done - 1, total, warmup=0.0, kind="linear")
                    set_learning_rate(optimizer, learning_rate)
                    groups = [candidates[i] for i in order[start : start + config.batch_size]]
                    with run.timer("train"):
                        metrics = step(policy, tokenizer, optimizer, groups, config)
                    metrics["lr"] = learning_rate
                    metrics["objective/scores"] = sum(sum(g.scores) for g in groups) / sum(
                        len(g.scores) for g in groups
                    )
                    if done == total or (config.eval_every and done % config.eval_every == 0):
                        metrics |= evaluator.metrics(policy, tokenizer, run)
                    run.log(done, metrics)
                    progress.update(1)
                    progress.set_postfix(loss=metrics["loss"], accuracy=metrics["accuracy"])
            if number + 1 < rounds:
                state = {"optimizer": optimizer.state_dict(), "rng": rng_state()}
                run.save_checkpoint(done, {"model": (policy, tokenizer)}, state)
    run.save_model(policy, tokenizer)
    return run.finish({"steps": total})

"""What TRL, trlx, OpenRLHF and verl call our flags, with what the name means there. Data; `flags.py` reads it.

A row is (their name, ours, who calls it so) and, where the meaning differs, how a value becomes ours. A row without a
name of ours is a refusal: the flag cannot be carried over by itself, and the row says what to write instead. verl and
OpenRLHF nest their names with dots.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .config import UserError

HF, TRL, TRLX, OPENRLHF, VERL = "transformers", "TRL", "trlx", "OpenRLHF", "verl"


@dataclass(frozen=True)
class Alias:
    """theirs: their name, with underscores. ours: our fields, separated by spaces (one value each); "" refuses.

    scale: our number is theirs times this. values: our value for each of theirs, as lower-case text. also: what the
    name means beside its value; a flag that is given wins over it. yields: their values over which one wins as well.
    stages: where the row holds, all unless given.
    note: what the user should know, or why the flag is refused.
    """

    theirs: str
    ours: str
    source: str
    scale: float = 1.0
    values: Mapping[str, Any] = field(default_factory=dict)
    also: Mapping[str, Any] = field(default_factory=dict)
    yields: tuple[str, ...] = ()
    stages: tuple[str, ...] = ()
    note: str = ""

    def translate(self, value: Any, where: str = "") -> dict[str, Any]:
        """Our fields and their values. Raises UserError for a value that has no counterpart."""
        names = self.ours.split()
        parts = value if isinstance(value, list) and len(names) > 1 else [value]
        if len(parts) != len(names):
            raise UserError(f"{where}{self.theirs} must have {len(names)} values, got {value!r}")
        return {name: self._one(part, where) for name, part in zip(names, parts)}

    def _one(self, value: Any, where: str) -> Any:
        if self.values:
            if str(value).lower() not in self.values:
                wanted = ", ".join(self.values)
                raise UserError(f"{where}{self.theirs} of {self.source} must be one of {wanted}, got {value!r}")
            return self.values[str(value).lower()]
        if self.scale == 1 or value is None:
            return value
        try:
            return float(value) * self.scale
        except (TypeError, ValueError):
            raise UserError(f"{where}{self.theirs} of {self.source} must be a number, got {value!r}") from None


SCHEDULERS = {
    "linear": "linear",
    "cosine": "cosine",
    "constant": "constant",
    "constant_with_warmup": "constant",
}
KL_KINDS = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
    "full": "full",
}
KL_PLUS = {"kl+": "k1+", "k1+": "k1+", "low_var_kl+": "k3+", "k3+": "k3+"}
VERL_LOSSES = {
    "vanilla": "ppo",
    "gspo": "gspo_token",
    "cispo": "cispo",
    "sapo": "sapo",
    "geo_mean": "gmpo",
    "gpg": "gpg",
}
VERL_ESTIMATORS = {
    "gae": "gae",
    "grpo": "grpo",
    "rloo": "rloo",
    "remax": "remax",
    "opo": "opo",
    "reinforce_plus_plus": "reinforce++",
    "reinforce_plus_plus_baseline": "reinforce++-baseline",
}
OPENRLHF_ESTIMATORS = {
    "gae": "gae",
    "reinforce": "reinforce++",
    "reinforce_baseline": "reinforce++-baseline",
    "rloo": "rloo",
    "group_norm": "grpo",
    "dr_grpo": "dr_grpo",
}
YES = {"true": True, "false": False}
ACTOR = "actor_rollout_ref.actor."

ALIASES = (
    # Run, data, models
    Alias("output_dir", "out", HF),
    Alias("ckpt.output_dir", "out", OPENRLHF),
    Alias("save_path", "out", OPENRLHF),
    Alias("trainer.default_local_dir", "out", VERL),
    Alias("overwrite_output_dir", "overwrite", HF),
    Alias("resume_from_checkpoint", "resume", HF, values=YES, note="it is the last checkpoint in --out"),
    Alias("model_name_or_path", "model", HF, stages=("sft",)),
    Alias("model_name_or_path", "init", HF),
    Alias("sft_model_path", "init", TRL),
    Alias("pretrain", "model", OPENRLHF, stages=("sft",)),
    Alias("pretrain", "init", OPENRLHF),
    Alias("actor.model_name_or_path", "init", OPENRLHF),
    Alias("actor_rollout_ref.model.path", "init", VERL),
    Alias("reward_model_path", "rm", TRL),
    Alias("reward_pretrain", "rm", OPENRLHF),
    Alias("reward.model_name_or_path", "rm", OPENRLHF),
    Alias("reward_model.model.path", "rm", VERL),
    Alias("dataset_name", "data", TRL),
    Alias("prompt_data", "data", OPENRLHF),
    Alias("data.prompt_dataset", "data", OPENRLHF),
    Alias("data.train_files", "data", VERL),
    Alias("input_key", "prompt_key", OPENRLHF),
    Alias("data.input_key", "prompt_key", OPENRLHF),
    Alias("data.prompt_key", "prompt_key", VERL),
    Alias("output_key", "response_key", OPENRLHF),
    Alias("data.output_key", "response_key", OPENRLHF),
    Alias("data.chosen_key", "chosen_key", OPENRLHF),
    Alias("data.rejected_key", "rejected_key", OPENRLHF),
    Alias("bf16", "dtype", HF, values={"true": "bfloat16", "false": "float32"}),
    Alias("torch_dtype", "dtype", HF, values={"float32": "float32", "bfloat16": "bfloat16"}),
    Alias("use_cpu", "device", HF, values={"true": "cpu", "false": "auto"}),
    Alias("save_freq", "save_steps", VERL),
    Alias("trainer.save_freq", "save_steps", VERL),
    Alias("ckpt.save_steps", "save_steps", OPENRLHF),
    Alias("max_ckpt_num", "save_total_limit", OPENRLHF),
    Alias("ckpt.max_num", "save_total_limit", OPENRLHF),
    Alias("trainer.max_actor_ckpt_to_keep", "save_total_limit", VERL),
    Alias("eval_steps", "eval_every", HF),
    Alias("eval.steps", "eval_every", OPENRLHF),
    Alias("trainer.test_freq", "eval_every", VERL),
    Alias("train.seed", "seed", OPENRLHF),
    # Optimiser
    Alias("lr_scheduler_type", "lr_scheduler", HF, values=SCHEDULERS),
    Alias("warmup_ratio", "warmup", HF),
    Alias("lr_warmup_ratio", "warmup", OPENRLHF),
    Alias("num_train_epochs", "epochs", HF, stages=("sft", "rm", "rrhf", "best-of-n", "dpo")),
    Alias("per_device_train_batch_size", "batch_size", HF, stages=("sft", "rm")),
    Alias("max_norm", "max_grad_norm", OPENRLHF),
    Alias("actor.max_norm", "max_grad_norm", OPENRLHF),
    Alias(ACTOR + "grad_clip", "max_grad_norm", VERL),
    Alias("adam_epsilon", "adam_eps", HF),
    Alias("actor_learning_rate", "learning_rate", OPENRLHF),
    Alias("actor.adam.lr", "learning_rate", OPENRLHF),
    Alias(ACTOR + "optim.lr", "learning_rate", VERL),
    Alias("critic_learning_rate", "value_learning_rate", OPENRLHF),
    Alias("critic.adam.lr", "value_learning_rate", OPENRLHF),
    Alias("critic.optim.lr", "value_learning_rate", VERL),
    Alias("l2", "weight_decay", OPENRLHF),
    Alias("warmup_steps", "", HF, note="give --warmup, the share of the steps"),
    Alias("gradient_accumulation_steps", "", HF, note="--batch-size is the whole batch; --micro-batch splits it"),
    Alias(
        "per_device_train_batch_size",
        "",
        HF,
        note="in TRL it is multiplied by other flags; --batch-size counts the responses of a step",
    ),
    Alias("num_train_epochs", "", HF, note="--steps counts rollouts"),
    Alias("total_episodes", "", TRL, note="--steps counts rollouts: episodes / --batch-size"),
    Alias("push_to_hub", "", HF, note="nothing is uploaded"),
    Alias("fp16", "", HF, note="--dtype is float32 or bfloat16"),
    # Rollouts
    Alias("max_completion_length", "response_length", TRL),
    Alias("max_new_tokens", "response_length", TRLX),
    Alias("generate_max_len", "response_length", OPENRLHF),
    Alias("rollout.max_new_tokens", "response_length", OPENRLHF),
    Alias("data.max_response_length", "response_length", VERL),
    Alias("rollout.temperature", "temperature", OPENRLHF),
    Alias("actor_rollout_ref.rollout.temperature", "temperature", VERL),
    Alias("local_rollout_forward_batch_size", "micro_batch", TRL),
    Alias("micro_rollout_batch_size", "micro_batch", OPENRLHF),
    Alias("micro_train_batch_size", "micro_batch", OPENRLHF),
    Alias("train.micro_batch_size", "micro_batch", OPENRLHF),
    Alias(ACTOR + "ppo_micro_batch_size_per_gpu", "micro_batch", VERL),
    Alias("num_rollouts", "batch_size", TRLX),
    Alias("rollout_batch_size", "", OPENRLHF, note="it counts prompts; --batch-size counts responses"),
    Alias("rollout.batch_size", "", OPENRLHF, note="it counts prompts; --batch-size counts responses"),
    Alias("data.train_batch_size", "", VERL, note="it counts prompts; --batch-size counts responses"),
    Alias("mini_batch_size", "", TRL, note="--num-mini-batches is --batch-size / mini_batch_size"),
    Alias("train_batch_size", "", OPENRLHF, note="--num-mini-batches is --batch-size / train_batch_size"),
    Alias("train.batch_size", "", OPENRLHF, note="--num-mini-batches is --batch-size / train.batch_size"),
    Alias(ACTOR + "ppo_mini_batch_size", "", VERL, note="--num-mini-batches counts the optimiser steps of a pass"),
    Alias("top_p", "", HF, note="the full softmax is sampled, which is what the log-probabilities are of"),
    Alias("top_k", "", HF, note="the full softmax is sampled, which is what the log-probabilities are of"),
    # PPO
    Alias("ppo_epochs", "num_ppo_epochs", TRL),
    Alias("num_iterations", "num_ppo_epochs", TRL),
    Alias("max_epochs", "num_ppo_epochs", OPENRLHF, stages=("ppo",)),
    Alias("train.max_epochs", "num_ppo_epochs", OPENRLHF),
    Alias(ACTOR + "ppo_epochs", "num_ppo_epochs", VERL),
    Alias("init_kl_coef", "kl_coef", TRL),
    Alias("algo.kl.init_coef", "kl_coef", OPENRLHF),
    Alias("algorithm.kl_ctrl.kl_coef", "kl_coef", VERL),
    Alias("kl_penalty", "kl_estimator", TRL, values=KL_KINDS),
    Alias("algorithm.kl_penalty", "kl_estimator", VERL, values=KL_KINDS),
    Alias(ACTOR + "kl_loss_type", "kl_estimator", VERL, values=KL_KINDS | KL_PLUS, also={"kl_in": "loss"}),
    Alias(ACTOR + "kl_loss_coef", "kl_coef", VERL, also={"kl_in": "loss"}),
    Alias(ACTOR + "use_kl_loss", "kl_in", VERL, values={"true": "loss", "false": "none"}, yields=("false",)),
    Alias("algorithm.use_kl_in_reward", "kl_in", VERL, values={"true": "reward", "false": "none"}, yields=("false",)),
    Alias("use_kl_loss", "kl_in", OPENRLHF, values={"true": "loss", "false": "reward"}),
    Alias("algo.kl.use_loss", "kl_in", OPENRLHF, values={"true": "loss", "false": "reward"}),
    Alias(
        "use_bias_correction_kl", "kl_estimator", TRL, values={"true": "k3-is", "false": "k3"}, also={"kl_in": "loss"}
    ),
    Alias("algo.kl.estimator", "kl_estimator", OPENRLHF, also={"kl_clip": 10.0}),
    Alias("adap_kl_ctrl", "kl_control", TRL, values={"true": "adaptive", "false": "fixed"}),
    Alias("algorithm.kl_ctrl.type", "kl_control", VERL, values={"adaptive": "adaptive", "fixed": "fixed"}),
    Alias("target", "kl_target", TRL, also={"kl_control": "adaptive"}),
    Alias("algo.kl.target", "kl_target", OPENRLHF, also={"kl_control": "adaptive"}),
    Alias("algorithm.kl_ctrl.target_kl", "kl_target", VERL, also={"kl_measure": "token_mean"}),
    Alias("target_kl", "early_stop_kl", TRL, scale=1.5, note="TRL stops at 1.5 times it"),
    Alias("early_stopping", "", TRL, note="--early-stop-kl sets the KL and switches it on"),
    Alias("horizon", "kl_horizon", TRL),
    Alias("algo.kl.horizon", "kl_horizon", OPENRLHF),
    Alias("algorithm.kl_ctrl.horizon", "kl_horizon", VERL),
    Alias("eps_clip", "cliprange", OPENRLHF),
    Alias("actor.eps_clip", "cliprange", OPENRLHF),
    Alias("eps_clip_low_high", "cliprange cliprange_high", OPENRLHF),
    Alias("actor.eps_clip_low_high", "cliprange cliprange_high", OPENRLHF),
    Alias("epsilon", "cliprange", TRL),
    Alias("epsilon_high", "cliprange_high", TRL),
    Alias("clip_ratio", "cliprange", VERL),
    Alias(ACTOR + "clip_ratio", "cliprange", VERL),
    Alias(ACTOR + "clip_ratio_low", "cliprange", VERL),
    Alias(ACTOR + "clip_ratio_high", "cliprange_high", VERL),
    Alias(ACTOR + "clip_ratio_c", "dual_clip", VERL),
    Alias("actor.dual_clip", "dual_clip", OPENRLHF),
    Alias("delta", "dual_clip", TRL, note="two-sided clipping is the dual clip with this bound"),
    Alias("loss_agg_mode", "loss_aggregation", VERL),
    Alias(ACTOR + "loss_agg_mode", "loss_aggregation", VERL),
    Alias(ACTOR + "loss_scale_factor", "loss_length", VERL),
    Alias("policy_loss_type", "policy_loss", OPENRLHF),
    Alias("actor.policy_loss_type", "policy_loss", OPENRLHF),
    Alias(ACTOR + "policy_loss.loss_mode", "policy_loss", VERL, values=VERL_LOSSES),
    Alias("importance_sampling_level", "policy_loss", TRL, values={"token": "ppo", "sequence": "gspo"}),
    Alias("sapo_temperature_pos", "sapo_tau_pos", TRL),
    Alias("sapo_temperature_neg", "sapo_tau_neg", TRL),
    Alias(ACTOR + "tau_pos", "sapo_tau_pos", VERL),
    Alias(ACTOR + "tau_neg", "sapo_tau_neg", VERL),
    Alias(
        "loss_type",
        "loss_aggregation",
        TRL,
        values={
            "grpo": "seq-mean-token-mean",
            "bnpo": "token-mean",
            "dapo": "token-mean",
            "dr_grpo": "constant-length",
        },
        stages=("ppo",),
        note="--policy-loss has cispo and sapo",
    ),
    Alias("entropy_loss_coef", "entropy_coef", OPENRLHF),
    Alias("actor.entropy_coef", "entropy_coef", OPENRLHF),
    Alias(ACTOR + "entropy_coeff", "entropy_coef", VERL),
    Alias("lr_warmup_steps_ratio", "warmup", VERL),
    Alias(ACTOR + "optim.lr_warmup_steps_ratio", "warmup", VERL),
    Alias("actor.lr_warmup_ratio", "warmup", OPENRLHF),
    Alias("actor.lr_scheduler", "lr_scheduler", OPENRLHF, values=SCHEDULERS),
    Alias("value_clip", "cliprange_value", OPENRLHF),
    Alias("critic.value_clip", "cliprange_value", OPENRLHF),
    Alias("critic.cliprange_value", "cliprange_value", VERL),
    Alias("n_samples_per_prompt", "num_generations", OPENRLHF),
    Alias("rollout.n_samples_per_prompt", "num_generations", OPENRLHF),
    Alias("actor_rollout_ref.rollout.n", "num_generations", VERL),
    Alias("adv_estimator", "estimator", VERL, values=VERL_ESTIMATORS),
    Alias("algorithm.adv_estimator", "estimator", VERL, values=VERL_ESTIMATORS),
    Alias("advantage_estimator", "estimator", OPENRLHF, values=OPENRLHF_ESTIMATORS),
    Alias("algo.advantage.estimator", "estimator", OPENRLHF, values=OPENRLHF_ESTIMATORS),
    Alias(
        "scale_rewards",
        "estimator",
        TRL,
        values={"group": "grpo", "true": "grpo", "none": "dr_grpo", "false": "dr_grpo"},
    ),
    Alias("algo.dynamic_filtering_enable", "dynamic_sampling", OPENRLHF),
    Alias("dynamic_filtering", "dynamic_sampling", OPENRLHF),
    Alias("mask_truncated_completions", "missing_eos", TRL, values={"true": "mask", "false": "subtract"}),
    Alias("penalty_reward_value", "missing_eos_penalty", "N+", scale=-1.0, also={"missing_eos": "replace"}),
    Alias("stop_properly_penalty_coef", "missing_eos_penalty", OPENRLHF, also={"missing_eos": "scale"}),
    Alias("reward.stop_properly_penalty_coef", "missing_eos_penalty", OPENRLHF, also={"missing_eos": "scale"}),
    Alias("overlong_buffer_len", "overlong_buffer", OPENRLHF, also={"missing_eos": "soft-overlong"}),
    Alias("reward.overlong_buffer_len", "overlong_buffer", OPENRLHF, also={"missing_eos": "soft-overlong"}),
    Alias("overlong_penalty_factor", "missing_eos_penalty", OPENRLHF, also={"missing_eos": "soft-overlong"}),
    Alias("reward.overlong_penalty_factor", "missing_eos_penalty", OPENRLHF, also={"missing_eos": "soft-overlong"}),
    Alias("cliprange_reward", "score_clip", TRLX, also={"score_clip_before": True}),
    Alias("scale_reward", "score_norm", TRLX, values={"running": "running-std", "ref": "ref-std", "ignored": "none"}),
    Alias(
        "use_score_scaling",
        "score_norm",
        TRL,
        values={"true": "running-std", "false": "none"},
        yields=("true", "false"),
    ),
    Alias("use_score_norm", "score_norm", TRL, values={"true": "running-z", "false": "running-std"}, yields=("false",)),
    Alias("reward_clip_range", "", OPENRLHF, note="--score-clip 10 clips to −10 and 10"),
    Alias("reward.clip_range", "", OPENRLHF, note="--score-clip 10 clips to −10 and 10"),
    Alias("lambd", "lam", OPENRLHF),
    Alias("algo.advantage.lambd", "lam", OPENRLHF),
    Alias("algorithm.lam", "lam", VERL),
    Alias("algo.advantage.gamma", "gamma", OPENRLHF),
    Alias("algorithm.gamma", "gamma", VERL),
    # Reward model, RRHF, DPO
    Alias("center_rewards_coefficient", "center_coef", TRL),
    Alias("rrhf_weight", "rank_coef", "RRHF"),
    Alias("length_penalty", "length_power", "RRHF"),
    Alias("only_use_provide", "sources", "RRHF", values={"true": "provided", "false": "all"}),
    Alias("only_use_sample", "sources", "RRHF", values={"true": "sampled", "false": "all"}),
    Alias("loss_type", "loss", TRL, values={"sigmoid": "sigmoid", "ipo": "ipo"}, stages=("dpo",)),
    Alias("ref_model_name_or_path", "ref", TRL, stages=("dpo",)),
)

TRLX_METHOD = "method."
"""trlx's configuration has these names under `method`."""

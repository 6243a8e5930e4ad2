"""Presets: the conventions of a reference implementation as values of our flags, by stage.

`rlhf ppo --preset NAME` fills them in where neither a flag nor `--config` says otherwise.
"""

from collections.abc import Mapping
from typing import Any

RRHF_RECIPE = {
    "decoding": ("diverse_beam",),
    "num_candidates": 4,
    "diversity": 1.0,
    "temperature": 0.8,
    "score_temperature": 1.0,
    "response_length": 128,
    "num_prompts": 0,
    "rounds": 1,
    "epochs": 3,
    "batch_size": 64,
    "learning_rate": 2e-5,
    "rank_coef": 1.0,
    "length_power": 1.0,
}
"""What paper and released code of RRHF share (arXiv 2304.05302)."""

NO_EOS_RULE = {"missing_eos": "subtract", "missing_eos_penalty": 0.0}
CLASSIC = {
    "num_ppo_epochs": 4,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
    "kl_in": "reward",
    "kl_estimator": "k1",
    "kl_control": "fixed",
    "max_grad_norm": None,
}
"""What lm-human-preferences, its reproduction N+, TRL and trlx share."""

ADAPTIVE = {"kl_control": "adaptive", "kl_target": 6.0, "kl_horizon": 10_000.0, "kl_measure": "seq_sum"}
TRL_CLASSIC = {
    **CLASSIC,
    **ADAPTIVE,
    **NO_EOS_RULE,
    "kl_coef": 0.2,
    "whiten_variance": "unbiased",
    "score_position": "eos",
    "value_trunk": "shared",
    "learning_rate": 1.41e-5,
    "lr_scheduler": "constant",
    "adam_eps": 1e-8,
}
SEPARATE_CRITIC = {
    "num_ppo_epochs": 1,
    "cliprange": 0.2,
    "cliprange_value": 0.5,
    "vf_coef": 1.0,  # the critic has an optimiser of its own there: no factor
    "gamma": 1.0,
    "lam": 1.0,
    "kl_control": "fixed",
    "kl_estimator": "k1",
    "score_position": "eos",
    "value_trunk": "separate",
    "learning_rate": 1e-6,
    "max_grad_norm": 1.0,
    "adam_eps": 1e-8,
    **NO_EOS_RULE,
}
"""What OpenRLHF and verl share."""

# On the tokens that are sampled these compute what the reference computes. What they cannot carry over: padding that
# lm-human-preferences, AlpacaFarm and trlx let into a loss or a value (here it is not trained), dropout, TRL 0.7's skip
# of minibatches with a large ratio, the floor of OpenRLHF's cosine.
PPO: Mapping[str, Mapping[str, Any]] = {
    # openai/lm-human-preferences, 2019
    "lm_hp": {
        **CLASSIC,
        **ADAPTIVE,
        "kl_coef": 0.15,
        "score_norm": "affine",
        "score_position": "last_column",
        "missing_eos": "replace",
        "missing_eos_penalty": 1.0,
        "whiten_rewards": True,
        "whiten_scope": "minibatch",
        "value_trunk": "shared",
        "learning_rate": 1e-5,
        "lr_scheduler": "linear",
        "adam_eps": 1e-5,
    },
    # "The N+ implementation details of RLHF with PPO" (vwxyzjn/summarize_from_feedback_details)
    "n_plus": {
        **CLASSIC,
        "kl_coef": 0.05,
        "score_norm": "bias-only",
        "score_position": "after_eos",
        "missing_eos": "replace",
        "missing_eos_penalty": 1.0,
        "value_init": "rm",
        "temperature": 0.7,
        "learning_rate": 3e-6,
        "lr_scheduler": "linear",
        "adam_eps": 1e-5,
    },
    # TRL 0.7, PPOTrainer with a step method
    "trl_classic": TRL_CLASSIC,
    # TRL 0.12 to 1.15, PPOTrainer with a train method
    "trl_ppo": {
        **CLASSIC,
        **NO_EOS_RULE,
        "kl_coef": 0.05,
        "whiten_variance": "unbiased",
        "score_position": "after_eos",
        "value_trunk": "separate",
        "temperature": 0.7,
        "learning_rate": 3e-6,
        "lr_scheduler": "linear",
        "adam_eps": 1e-8,
    },
    # CarperAI/trlx 0.7
    "trlx": {
        **CLASSIC,
        **NO_EOS_RULE,
        "kl_coef": 0.001,
        "vf_coef": 1.0,
        "score_clip": 10.0,
        "score_clip_before": True,
        "score_position": "trlx",
        "whiten_variance": "unbiased",
        "whiten_scope": "minibatch",
        "whiten_mask": "all",
        "value_trunk": "shared",
        "learning_rate": 3e-5,
        "lr_scheduler": "constant",
    },
    # AlpacaFarm
    "alpaca_farm": {
        **CLASSIC,
        "num_ppo_epochs": 2,
        "lam": 1.0,
        "kl_coef": 0.0067,
        "kl_estimator": "pos",
        "score_position": "eos",
        "missing_eos": "replace",
        "missing_eos_penalty": 1.0,
        "whiten_rewards": True,
        "whiten_mask": "all",
        "loss_aggregation": "constant-length",
        "value_init": "rm",
        "learning_rate": 1e-5,
    },
    # OpenRLHF 0.11
    "openrlhf": {
        **SEPARATE_CRITIC,
        "kl_in": "reward",
        "kl_coef": 0.01,
        "kl_clip": 10.0,
        "score_clip": 10.0,
        "value_init": "rm",
        "value_learning_rate": 9e-6,
        "lr_scheduler": "cosine",
        "warmup": 0.03,
    },
    # verl 0.8
    "verl": {
        **SEPARATE_CRITIC,
        "kl_in": "none",
        "kl_coef": 0.001,
        "kl_measure": "token_mean",
        "kl_target": 0.1,
        "dual_clip": 3.0,
        "whiten_variance": "unbiased",
        "value_init": "init",
        "value_learning_rate": 1e-5,
        "lr_scheduler": "constant",
    },
    # Chan et al. 2024 (arXiv 2402.00782), on TRL 0.7
    "abc": {**TRL_CLASSIC, "reward_shaping": "abc", "beta": 0.8, "attention_query": "response"},
}

PRESETS: dict[str, Mapping[str, Mapping[str, Any]]] = {
    "ppo": PPO,
    "rrhf": {
        "rrhf_paper": {**RRHF_RECIPE, "sft_reduction": "sum", "lr_scheduler": "linear", "warmup": 0.0},
        # As it runs: every candidate divided by the padded length, the supervised term too.
        "rrhf_code": {
            **RRHF_RECIPE,
            "compat_padded_norm": True,
            "sft_reduction": "mean",
            "lr_scheduler": "cosine",
            "warmup": 0.03,
        },
    },
}

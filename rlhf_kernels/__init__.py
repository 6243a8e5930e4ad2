"""Fused ops for reinforcement learning from human feedback, in data-flow order: see `__all__`.

    tokens → logits | hidden → log-probabilities → rewards → advantages → loss → gradients

`rlhf_kernels.backend` says which implementation runs; `python -m rlhf_kernels` prints it.
"""

from . import backend
from .align_credit import align_credit
from .attention_row import attention_row
from .backend import use_backend
from .fused_ppo_loss import fused_ppo_loss
from .gae import gae
from .group_advantages import group_advantages
from .linear_logprobs import linear_logprobs, linear_logprobs_entropy
from .linear_ppo_loss import linear_ppo_loss
from .linear_rrhf_loss import linear_rrhf_loss
from .masked import masked_mean, masked_whiten
from .policy_ref_logprobs import policy_ref_logprobs
from .ppo_loss import ppo_loss
from .rm_losses import rm_listwise_loss, rm_pairwise_loss, rm_regression_loss
from .rollout_advantages import rollout_advantages
from .rrhf_loss import rrhf_loss
from .token_feedback_loss import token_feedback_loss
from .token_logprobs import token_logprobs, token_logprobs_entropy
from .token_rewards import token_rewards

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 - in data-flow order
    "token_logprobs",
    "token_logprobs_entropy",
    "linear_logprobs",
    "linear_logprobs_entropy",
    "policy_ref_logprobs",
    "attention_row",
    "align_credit",
    "token_rewards",
    "gae",
    "rollout_advantages",
    "group_advantages",
    "ppo_loss",
    "fused_ppo_loss",
    "linear_ppo_loss",
    "rrhf_loss",
    "linear_rrhf_loss",
    "rm_pairwise_loss",
    "rm_listwise_loss",
    "rm_regression_loss",
    "token_feedback_loss",
    "masked_mean",
    "masked_whiten",
    "use_backend",
    "backend",
]

backend.load_extension()

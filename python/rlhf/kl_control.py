"""The KL coefficient from one rollout to the next, and the alarm for a KL that cannot be one."""

from .config import UserError
from .ppo_config import PpoConfig

MIN_SEQUENCE_KL = -1.0  # nats: below it the estimate says that scoring and sampling disagree


def check_kl(sequence_kl: float, config: PpoConfig) -> None:
    """The alarm for a penalty that has turned into a reward."""
    if config.kl_estimator == "k1" and sequence_kl < MIN_SEQUENCE_KL:
        raise UserError(
            f"the mean KL of the policy to the reference is {sequence_kl:.2f} nats a response, and a KL is never "
            "negative: the tokens were not sampled from the distribution that scores them. Usual causes: a temperature "
            "other than the sampler's, top-k or top-p, a minimum length that suppresses EOS, dropout, a wrong "
            "attention mask. The last checkpoint and model are as they were."
        )


def adapt_kl_coef(kl_coef: float, sequence_kl: float, config: PpoConfig) -> float:
    """Ziegler et al. 2019 (arXiv 1909.08593): a proportional controller, its error clipped to ±0.2."""
    if config.kl_control == "fixed":
        return kl_coef
    error = min(max(sequence_kl / config.kl_target - 1, -0.2), 0.2)
    return kl_coef * (1 + error * config.batch_size / config.kl_horizon)

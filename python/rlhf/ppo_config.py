"""The flags of `rlhf ppo`."""

from __future__ import annotations

from dataclasses import dataclass

from .advantages import ESTIMATORS, OF_GROUPS, SCORE_POSITIONS, WITH_CRITIC
from .config import CommonConfig, SampledConfig, UserError, check_scorer, option
from .credit import KINDS, OF_REWARD_MODEL, QUERIES, REDUCTIONS, AttentionChoice, Shaping
from .feedback_loss import LOSSES
from .kl_penalty import IN_LOSS, IN_REWARD
from .kl_penalty import KINDS as KL_KINDS
from .overoptimization import STOP_ON_GOLD
from .policy_losses import AGGREGATIONS, POLICY_LOSSES, Clips
from .schedule import KINDS as SCHEDULES
from .scores import MISSING_EOS, NORMALIZATIONS

CONTROLS = ("fixed", "adaptive", "adaptive-paper")
MEASURES = ("seq_sum", "token_mean")


@dataclass(frozen=True, kw_only=True)
class PpoConfig(SampledConfig, CommonConfig):
    ref: str | None = option(None, "reference policy of the KL penalty; --init unless given")
    steps: int = option(25, "rollouts, each followed by its updates", low=1)
    batch_size: int = option(128, "responses sampled a step, num_generations to a prompt", low=1)
    num_ppo_epochs: int = option(4, "passes over each rollout", low=1)
    num_mini_batches: int = option(2, "optimiser steps in a pass", low=1)
    micro_batch: int | None = option(None, "rows through a model at a time; all of a minibatch unless given", low=1)
    temperature: float = option(1.0, "sampling temperature; the same one scores the tokens", above=0)
    learning_rate: float = option(2e-4, "policy's peak learning rate; pretrained models want about 3e-6", above=0)
    value_learning_rate: float | None = option(None, "the value model's; the policy's unless given", above=0)
    lr_scheduler: str = option("linear", "how the learning rates fall after the warm-up", choices=SCHEDULES)
    warmup: float = option(0.0, "share of the steps in which the learning rates climb", low=0, high=1)
    adam_eps: float = option(1e-5, "Adam's epsilon", above=0)
    max_grad_norm: float | None = option(
        1.0, "gradient norm at which each model's gradient is clipped; none for no bound", above=0
    )
    reward_shaping: str = option("terminal", "how the score is spread over the tokens", choices=KINDS)
    beta: float = option(0.8, "share of the score that is spread; the rest stays on the last token", low=0, high=1)
    attention_layers: tuple[int, ...] = option(
        (-1,), "layers whose attention counts, averaged, for abc and abc-d; negative ones from the end"
    )
    attention_heads: tuple[int, ...] = option((), "heads that count for abc, abc-d, value-attention; all unless given")
    head_reduction: str = option(
        "mean", "one row of several heads; renorm normalises each over the response first", choices=REDUCTIONS
    )
    attention_query: str = option(
        "pooled", "abc: token whose attention counts, where the score is read or the response's last", choices=QUERIES
    )
    abc_d_shift: int = option(0, "abc-d: tokens by which the credit moves; the published code has 1", choices=(0, 1))
    prefix_smoothing: float = option(
        0.0, "prefix-diff: weight of the past in a moving average of the prefix scores", low=0, below=1
    )
    attribution_scale: float = option(
        1.0, "grad-x-input, value-attention: bound of their absolute sum, in absolute scores", low=0
    )
    exact_potential: bool = option(
        False, "spread the score as a potential with the discount gamma, which keeps every discounted return"
    )
    estimator: str = option(
        "gae",
        "of advantages; total_return gives each token the response's whole reward; all after it need no value model",
        choices=ESTIMATORS,
    )
    num_generations: int = option(1, "responses to each prompt; batch_size counts them all", low=1)
    dynamic_sampling: bool = option(False, "sample anew for prompts whose responses all have the same score")
    score_norm: str = option(
        "none",
        "what scores are shifted and divided by, beside the reward model's own: mean and deviation (affine) or the "
        "mean (bias-only) of reference responses, the reference response (delta), or what the rollouts show",
        choices=NORMALIZATIONS,
    )
    score_clip: float | None = option(None, "bound of a score, on either side", above=0)
    score_clip_before: bool = option(False, "clip before a running score_norm rather than after it")
    score_position: str = option(
        "eos",
        "where the score lands: on the last token or, as others have it, after EOS, in the last column, two "
        "places after EOS",
        choices=SCORE_POSITIONS,
    )
    missing_eos: str = option(
        "subtract", "what a response that was cut off gets: see missing_eos_penalty", choices=MISSING_EOS
    )
    token_feedback: str | None = option(
        None, "file or folder of marked responses, as rlhf token-feedback reads them: one more loss in each step"
    )
    token_feedback_weight: float = option(0.1, "weight of that loss", low=0)
    token_feedback_loss: str = option("bandit", "how marked tokens are learnt", choices=LOSSES)
    token_feedback_beta: float = option(
        0.5, "strength of its anchor to the reference, in units of a span's weight", above=0
    )
    token_feedback_batch_size: int = option(32, "marked responses in an optimiser step", low=1)
    token_reward_fn: str | None = option(
        None, "path.py:function like --reward-fn that says what tokens or spans are worth, beside what scores"
    )
    token_reward_weight: float = option(1.0, "its values are added to the rewards times this")
    missing_eos_penalty: float = option(
        1.0,
        "subtract: this less; replace: minus this; scale: this share; soft-overlong: up to this less over the last "
        "overlong_buffer tokens; mask: no part in the losses. Never spread",
        low=0,
    )
    overlong_buffer: int = option(8, "the last tokens of the response length, for soft-overlong", low=1)
    kl_in: str = option("reward", "what the KL penalty is part of", choices=("reward", "loss", "none"))
    kl_coef: float = option(0.05, "weight of the KL penalty", low=0)
    kl_estimator: str = option(
        "k1",
        "estimate of the KL; k1+ and k3+ (their value, the gradient of k2) and k3-is (k3 times the ratio) are for the "
        "loss, pos for the reward",
        choices=KL_KINDS,
    )
    kl_clip: float | None = option(None, "bound of the estimate at a token, on either side", above=0)
    kl_control: str = option(
        "fixed",
        "adaptive moves kl_coef towards kl_target, each time by up to 0.2 · batch_size / kl_horizon of itself; "
        "adaptive-paper by up to 0.2 · kl_gain",
        choices=CONTROLS,
    )
    kl_target: float = option(6.0, "target of the adaptive controls, in nats, of what kl_measure says", above=0)
    kl_measure: str = option(
        "seq_sum", "the KL that is controlled: a response's sum over tokens, or its mean", choices=MEASURES
    )
    kl_horizon: float = option(10_000.0, "responses over which adaptive may change kl_coef e-fold", above=0)
    kl_gain: float = option(0.1, "gain of adaptive-paper", above=0)
    policy_loss: str = option("ppo", "loss of the policy", choices=POLICY_LOSSES)
    loss_aggregation: str | None = option(
        None,
        "how the losses of the tokens become one number; token-mean unless given, for gspo, gspo_token and gmpo "
        "seq-mean-token-mean",
        choices=AGGREGATIONS,
    )
    loss_length: int | None = option(
        None, "what constant-length and seq-mean-token-sum-norm divide by; the response length unless given", low=1
    )
    cliprange: float = option(0.2, "the ratio's lower bound is 1 − cliprange", low=0)
    cliprange_high: float | None = option(
        None, "the ratio's upper bound is 1 + cliprange_high; cliprange unless given", low=0
    )
    dual_clip: float | None = option(None, "bound of the ratio for negative advantages; none for no bound", above=1)
    cispo_cap: float | None = option(
        None,
        "bound of cispo's weight, without a lower one (TRL's epsilon_high); cliprange's bounds unless given",
        above=0,
    )
    sapo_tau_pos: float = option(1.0, "sapo's temperature for positive advantages", above=0)
    sapo_tau_neg: float = option(1.05, "sapo's temperature for the others", above=0)
    entropy_coef: float = option(0.0, "weight of the entropy in the loss, which raises it", low=0)
    early_stop_kl: float | None = option(
        None, "leave a rollout after the pass in which the mean of log π_old − log π, in nats, exceeds this", above=0
    )
    cliprange_value: float | None = option(0.2, "how far a value may move from its old one; none for no bound", low=0)
    vf_coef: float = option(0.1, "weight of the value loss", low=0)
    gamma: float = option(1.0, "discount", low=0, high=1)
    lam: float = option(0.95, "λ of GAE", low=0, high=1)
    lam_value: float | None = option(None, "λ of the returns that the values learn; lam unless given", low=0, high=1)
    bootstrap_truncated: bool = option(False, "after a response that was cut off counts the value, not nothing")
    whiten_rewards: bool = option(False, "whiten the rewards, their mean kept")
    whiten_advantages: bool | None = option(
        None, "whiten the advantages; unless given where the estimator is gae, total_return or reinforce++(-baseline)"
    )
    whiten_variance: str = option("biased", "over n or n − 1", choices=("biased", "unbiased"))
    whiten_scope: str = option(
        "rollout", "whiten, and estimate advantages with a value model, over these", choices=("rollout", "minibatch")
    )
    whiten_mask: str = option("response", "all: padding counts as zeros", choices=("response", "all"))
    value_trunk: str = option(
        "separate", "shared: the value model is a head on the policy's trunk", choices=("separate", "shared")
    )
    ptx_coef: float = option(0.0, "weight of −log π of the task's demonstrations, a mean over tokens", low=0)
    ptx_batch_size: int = option(32, "demonstrations in an optimiser step", low=1)
    value_init: str = option(
        "rm",
        "weights the value model starts from (init's without an --rm of the policy's tokenizer); its head is new",
        choices=("rm", "init"),
    )
    eval_every: int = option(
        5, "steps between evaluations on held-out prompts; 0 for only the first and the last", low=0
    )
    stop_on_gold: int | None = option(None, STOP_ON_GOLD, low=1)
    num_samples: int = option(8, "held-out responses whose credit is written to samples.jsonl at the end", low=0)
    compare_shapings: tuple[str, ...] = option(
        (), "shapings whose credit for the same responses is written beside", choices=KINDS[:-1]
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scorer(self)
        if self.reward_fn is not None and self.reward_shaping in OF_REWARD_MODEL:
            raise UserError(
                f"reward_shaping {self.reward_shaping} is what the reward model says, so it needs rm; got reward_fn"
            )
        if self.reward_fn is None and self.reward_shaping == "span":
            raise UserError("reward_shaping span is what a reward function says, so it needs reward_fn; got rm")
        self.shaping()
        if self.reward_fn is not None and (asked := set(self.compare_shapings) & set(OF_REWARD_MODEL)):
            raise UserError(f"compare_shapings {', '.join(sorted(asked))} need rm, got reward_fn")
        if self.batch_size % self.num_mini_batches:
            raise UserError(
                f"batch_size must be a multiple of num_mini_batches {self.num_mini_batches}, got {self.batch_size}"
            )
        self._check_groups()
        self._check_scores()
        allowed = {"reward": IN_REWARD, "loss": IN_LOSS, "none": KL_KINDS}[self.kl_in]
        if self.kl_estimator not in allowed:
            wanted = ", ".join(allowed)
            raise UserError(f"kl_estimator in the {self.kl_in} must be one of {wanted}, got {self.kl_estimator!r}")

    def _check_groups(self) -> None:
        if self.batch_size % self.num_generations:
            raise UserError(
                f"batch_size must be a multiple of num_generations {self.num_generations}, got {self.batch_size}"
            )
        if self.num_generations == 1 and (self.estimator in OF_GROUPS or self.dynamic_sampling):
            what = self.estimator if self.estimator in OF_GROUPS else "dynamic_sampling"
            raise UserError(f"num_generations must be at least 2 for {what}, got 1")
        if not self.has_critic and (self.bootstrap_truncated or self.value_trunk == "shared"):
            what = "bootstrap_truncated" if self.bootstrap_truncated else "value_trunk shared"
            raise UserError(f"{what} needs a value model: estimator must be gae or total_return, got {self.estimator}")

    def _check_scores(self) -> None:
        if self.missing_eos == "scale" and self.missing_eos_penalty > 1:
            raise UserError(
                f"missing_eos_penalty must be at most 1 with missing_eos scale, got {self.missing_eos_penalty:g}"
            )
        if self.score_position != "eos" and (self.reward_shaping != "terminal" or self.bootstrap_truncated):
            got = "bootstrap_truncated" if self.bootstrap_truncated else f"reward_shaping {self.reward_shaping}"
            raise UserError(f"score_position {self.score_position} is for terminal rewards alone, got {got}")

    @property
    def has_critic(self) -> bool:
        return self.estimator in WITH_CRITIC

    @property
    def whitens_advantages(self) -> bool:
        by_default = (*WITH_CRITIC, "reinforce++", "reinforce++-baseline")
        return self.estimator in by_default if self.whiten_advantages is None else self.whiten_advantages

    @property
    def aggregation(self) -> str:
        """The loss aggregation, where none is given the policy loss's own."""
        of_sequences = self.policy_loss in ("gspo", "gspo_token", "gmpo")
        return self.loss_aggregation or ("seq-mean-token-mean" if of_sequences else "token-mean")

    @property
    def clips(self) -> Clips:
        high = self.cliprange if self.cliprange_high is None else self.cliprange_high
        return Clips(self.cliprange, high, self.dual_clip, self.cispo_cap, self.sapo_tau_pos, self.sapo_tau_neg)

    def shaping(self) -> Shaping:
        return Shaping(
            kind=self.reward_shaping,
            beta=self.beta,
            gamma=self.gamma if self.exact_potential else 1.0,
            attention=AttentionChoice(self.attention_layers, self.attention_heads, self.head_reduction),
            query=self.attention_query,
            shift=self.abc_d_shift,
            smoothing=self.prefix_smoothing,
            scale=self.attribution_scale,
        )

"""Every error message in full: op, argument, what was wanted and why, what came."""

import pytest
import torch

import rlhf_kernels as rk

LOGITS = torch.zeros(2, 3, 7)
TOKENS = torch.zeros(2, 3).long()
ROWS = torch.zeros(2, 3)
SHORT = torch.zeros(2, 2)
SCORES = torch.zeros(2)
MASK = torch.ones(2, 3).bool()
HIDDEN, WEIGHT, BIAS = torch.zeros(2, 3, 4), torch.zeros(7, 4), torch.zeros(7)
QUERY, KEY = torch.zeros(2, 4, 8), torch.zeros(2, 2, 3, 8)
SPANS = torch.zeros(2, 3, 2).long()
PAIR = torch.tensor([0, 1])


def elsewhere(x):
    return x.to("meta")


def token_rewards(*changes, **scalars):
    arguments = dict(zip(("scores", "logprobs", "ref_logprobs", "attention", "mask"), (SCORES, ROWS, ROWS, ROWS, MASK)))
    return rk.token_rewards(**arguments | dict(changes), **{"kl_coef": 0.1, "beta": 0.5, **scalars})


def rollout_advantages(*changes, **scalars):
    names = ("scores", "logprobs", "ref_logprobs", "attention", "values", "mask")
    arguments = dict(zip(names, (SCORES, ROWS, ROWS, ROWS, ROWS, MASK)))
    return rk.rollout_advantages(**arguments | dict(changes), **{"kl_coef": 0.1, "beta": 0.5, **scalars})


def ppo_loss(*changes, **scalars):
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "mask")
    return rk.ppo_loss(**dict(zip(names, (ROWS,) * 6 + (MASK,))) | dict(changes), **scalars)


def fused_ppo_loss(*changes, **scalars):
    names = ("logits", "tokens", "scores", "old_logprobs", "ref_logprobs", "attention", "values", "old_values", "mask")
    arguments = dict(zip(names, (LOGITS, TOKENS, SCORES, ROWS, ROWS, ROWS, ROWS, ROWS, MASK)))
    return rk.fused_ppo_loss(**arguments | dict(changes), **{"kl_coef": 0.1, "beta": 0.5, **scalars})


def linear_ppo_loss(*changes, **scalars):
    names = ("hidden", "weight", "tokens", "old_logprobs", "advantages", "mask")
    return rk.linear_ppo_loss(**dict(zip(names, (HIDDEN, WEIGHT, TOKENS, ROWS, ROWS, MASK))) | dict(changes), **scalars)


def linear_rrhf_loss(*changes, **scalars):
    names = ("hidden", "weight", "tokens", "scores", "prompts", "mask")
    prompts = torch.zeros(2, dtype=torch.long)
    arguments = dict(zip(names, (HIDDEN, WEIGHT, TOKENS, SCORES, prompts, MASK)))
    return rk.linear_rrhf_loss(**arguments | dict(changes), **scalars)


WRONG_TYPE = (
    (lambda: rk.token_logprobs([1.0], TOKENS), "token_logprobs: logits must be a Tensor, got list"),
    (lambda: rk.token_logprobs(LOGITS, TOKENS, [True]), "token_logprobs: mask must be a Tensor, got list"),
    (
        lambda: rk.token_logprobs(LOGITS.long(), TOKENS),
        "token_logprobs: logits must be floating point, got torch.int64",
    ),
    (lambda: rk.token_logprobs(LOGITS, ROWS), "token_logprobs: tokens must be int64 indices, got torch.float32"),
    (
        lambda: rk.linear_logprobs(HIDDEN, WEIGHT.double(), TOKENS),
        "linear_logprobs: weight must be torch.float32 like hidden, got torch.float64",
    ),
    (
        lambda: rk.linear_logprobs_entropy(HIDDEN, WEIGHT, TOKENS, bias=BIAS.half()),
        "linear_logprobs_entropy: bias must be torch.float32 like hidden, got torch.float16",
    ),
    (
        lambda: rk.policy_ref_logprobs(LOGITS, LOGITS.long(), TOKENS),
        "policy_ref_logprobs: ref_logits must be floating point, got torch.int64",
    ),
    (
        lambda: rk.attention_row(QUERY, KEY.double(), MASK),
        "attention_row: key must be torch.float32 like query, got torch.float64",
    ),
    (
        lambda: rk.align_credit(ROWS, SPANS.float(), SPANS),
        "align_credit: rm_spans must be int64 indices, got torch.float32",
    ),
    (
        lambda: token_rewards(("scores", SCORES.long())),
        "token_rewards: scores must be floating point, got torch.int64",
    ),
    (lambda: rk.gae([0.0], ROWS, MASK), "gae: rewards must be a Tensor, got list"),
    (lambda: rk.gae(ROWS, ROWS.long(), MASK), "gae: values must be floating point, got torch.int64"),
    (
        lambda: rollout_advantages(("values", TOKENS)),
        "rollout_advantages: values must be floating point, got torch.int64",
    ),
    (
        lambda: rk.group_advantages(SCORES, SCORES, kind="grpo"),
        "group_advantages: groups must be int64 indices, got torch.float32",
    ),
    (lambda: ppo_loss(("advantages", TOKENS)), "ppo_loss: advantages must be floating point, got torch.int64"),
    (lambda: ppo_loss(("values", 1.0)), "ppo_loss: values must be a Tensor, got float"),
    (lambda: rk.rrhf_loss(ROWS, PAIR, PAIR, MASK), "rrhf_loss: scores must be floating point, got torch.int64"),
    (
        lambda: rk.rm_pairwise_loss(SCORES, SCORES, PAIR),
        "rm_pairwise_loss: chosen must be int64 indices, got torch.float32",
    ),
    (
        lambda: rk.rm_listwise_loss(SCORES, SCORES, PAIR),
        "rm_listwise_loss: ranks must be int64 indices, got torch.float32",
    ),
    (
        lambda: rk.rm_regression_loss(SCORES, PAIR),
        "rm_regression_loss: targets must be floating point, got torch.int64",
    ),
    (
        lambda: rk.token_feedback_loss(LOGITS, LOGITS, TOKENS, TOKENS, beta=0.1),
        "token_feedback_loss: labels must be floating point, got torch.int64",
    ),
    (lambda: rk.masked_mean(TOKENS, MASK), "masked_mean: x must be floating point, got torch.int64"),
    (lambda: rk.masked_whiten(3.0, MASK), "masked_whiten: x must be a Tensor, got float"),
)

WRONG_SHAPE = (
    (
        lambda: linear_rrhf_loss(("hidden", HIDDEN[0])),
        "linear_rrhf_loss: hidden must have shape [K, T, H], got (3, 4)",
    ),
    (
        lambda: linear_rrhf_loss(("scores", torch.zeros(3))),
        "linear_rrhf_loss: scores must have shape (2,) to match hidden (2, 3, 4), got (3,)",
    ),
    (
        lambda: rk.token_logprobs(LOGITS, TOKENS[:, :2]),
        "token_logprobs: tokens must have shape (2, 3) to match logits (2, 3, 7), got (2, 2)",
    ),
    (
        lambda: rk.token_logprobs_entropy(LOGITS, TOKENS, MASK[:1]),
        "token_logprobs_entropy: mask must have shape (2, 3) to match tokens (2, 3), got (1, 3)",
    ),
    (
        lambda: rk.token_logprobs(LOGITS[..., :0], TOKENS),
        "token_logprobs: logits must have shape [..., V], got (2, 3, 0)",
    ),
    (
        lambda: rk.linear_logprobs(HIDDEN[..., :3], WEIGHT, TOKENS),
        "linear_logprobs: hidden must have shape [..., 4] to match weight (7, 4), got (2, 3, 3)",
    ),
    (
        lambda: rk.linear_logprobs(HIDDEN, WEIGHT[0], TOKENS),
        "linear_logprobs: weight must have shape [V, H], got (4,)",
    ),
    (
        lambda: rk.linear_logprobs(HIDDEN, WEIGHT, TOKENS, bias=BIAS[:3]),
        "linear_logprobs: bias must have shape (7,) to match weight (7, 4), got (3,)",
    ),
    (
        lambda: rk.policy_ref_logprobs(LOGITS, LOGITS[..., :5], TOKENS),
        "policy_ref_logprobs: ref_logits must have shape (2, 3, 7) to match logits (2, 3, 7), got (2, 3, 5)",
    ),
    (
        lambda: rk.attention_row(QUERY, KEY[..., :5], MASK),
        "attention_row: key must have shape (2, Hkv, T, 8) to match query (2, 4, 8), got (2, 2, 3, 5)",
    ),
    (
        lambda: rk.attention_row(QUERY[:, :3], KEY, MASK),
        "attention_row: key must have a number of heads that divides the query's 3, got 2",
    ),
    (
        lambda: rk.attention_row(QUERY, KEY, MASK[:, :2]),
        "attention_row: key_mask must have shape (2, 3) to match key (2, 2, 3, 8), got (2, 2)",
    ),
    (
        lambda: rk.attention_row(QUERY, KEY, MASK, sink=SCORES),
        "attention_row: sink must have shape (4,) to match query (2, 4, 8), got (2,)",
    ),
    (
        lambda: rk.attention_row(QUERY[0], KEY, MASK),
        "attention_row: query must have shape [B, Hq, D], got (4, 8)",
    ),
    (
        lambda: rk.align_credit(ROWS, SPANS[:, :2], SPANS),
        "align_credit: rm_spans must have shape (2, 3, 2) to match credit (2, 3), got (2, 2, 2)",
    ),
    (
        lambda: rk.align_credit(ROWS, SPANS, SPANS[:1]),
        "align_credit: policy_spans must have shape (2, 3, 2) to match credit (2, 3), got (1, 3, 2)",
    ),
    (
        lambda: token_rewards(("scores", ROWS[0])),
        "token_rewards: scores must have shape (2,) to match logprobs (2, 3), got (3,)",
    ),
    (
        lambda: token_rewards(("scores", SHORT)),
        "token_rewards: scores must have shape (2, 3) to match logprobs (2, 3), got (2, 2)",
    ),
    (
        lambda: token_rewards(("scores", ROWS), ("attention", ROWS)),
        "token_rewards: attention must be None where scores has one for each token, got (2, 3)",
    ),
    (
        lambda: token_rewards(("attention", SHORT)),
        "token_rewards: attention must have shape (2, 3) to match logprobs (2, 3), got (2, 2)",
    ),
    (lambda: rk.gae(SCORES, SCORES, SCORES), "gae: rewards must have shape [B, T], got (2,)"),
    (
        lambda: rk.gae(ROWS, SHORT, MASK),
        "gae: values must have shape (2, 3) to match rewards (2, 3), got (2, 2)",
    ),
    (
        lambda: rollout_advantages(("values", SHORT)),
        "rollout_advantages: values must have shape (2, 3) to match logprobs (2, 3), got (2, 2)",
    ),
    (
        lambda: rk.group_advantages(ROWS, TOKENS, kind="grpo"),
        "group_advantages: scores must have shape [B], got (2, 3)",
    ),
    (
        lambda: ppo_loss(("returns", SHORT)),
        "ppo_loss: returns must have shape (2, 3) to match logprobs (2, 3), got (2, 2)",
    ),
    (lambda: ppo_loss(normalizer=SCORES), "ppo_loss: normalizer must have shape (), got (2,)"),
    (
        lambda: fused_ppo_loss(("logits", LOGITS[0]), ("tokens", TOKENS[0])),
        "fused_ppo_loss: logits must have shape [B, T, V], got (3, 7)",
    ),
    (
        lambda: fused_ppo_loss(("old_values", SHORT)),
        "fused_ppo_loss: old_values must have shape (2, 3) to match tokens (2, 3), got (2, 2)",
    ),
    (
        lambda: linear_ppo_loss(("advantages", SHORT)),
        "linear_ppo_loss: advantages must have shape (2, 3) to match tokens (2, 3), got (2, 2)",
    ),
    (
        lambda: rk.rrhf_loss(ROWS, SCORES, PAIR[:1], MASK),
        "rrhf_loss: prompts must have shape (2,) to match logprobs (2, 3), got (1,)",
    ),
    (
        lambda: rk.rm_pairwise_loss(SCORES, PAIR, PAIR[:1]),
        "rm_pairwise_loss: rejected must have shape (2,) to match chosen (2,), got (1,)",
    ),
    (
        lambda: rk.rm_listwise_loss(SCORES, PAIR, PAIR[:1]),
        "rm_listwise_loss: prompts must have shape (2,) to match scores (2,), got (1,)",
    ),
    (
        lambda: rk.rm_regression_loss(SCORES, SCORES[:1]),
        "rm_regression_loss: targets must have shape (2,) to match scores (2,), got (1,)",
    ),
    (
        lambda: rk.token_feedback_loss(LOGITS, LOGITS, TOKENS, SCORES, beta=0.1),
        "token_feedback_loss: labels must have shape (2, 3) to match tokens (2, 3), got (2,)",
    ),
    (
        lambda: rk.masked_whiten(ROWS, MASK[0]),
        "masked_whiten: mask must have shape (2, 3) to match x (2, 3), got (3,)",
    ),
)

WRONG_VALUE = (
    (lambda: linear_rrhf_loss(length_power=-1), "linear_rrhf_loss: length_power must be at least 0, got -1"),
    (lambda: linear_rrhf_loss(group_size=0), "linear_rrhf_loss: group_size must be greater than 0, got 0"),
    (lambda: linear_ppo_loss(max_tokens=-1), "linear_ppo_loss: max_tokens must be at least 0, got -1"),
    (
        lambda: rk.token_logprobs(LOGITS, TOKENS, temperature=0.0),
        "token_logprobs: temperature must be greater than 0, got 0.0",
    ),
    (
        lambda: rk.token_logprobs(LOGITS, TOKENS, temperature=float("nan")),
        "token_logprobs: temperature must be greater than 0, got nan",
    ),
    (
        lambda: rk.linear_logprobs(HIDDEN, WEIGHT, TOKENS, softcap=-1.0),
        "linear_logprobs: softcap must be greater than 0, got -1.0",
    ),
    (
        lambda: rk.policy_ref_logprobs(LOGITS, LOGITS, TOKENS, temperature=-1.0),
        "policy_ref_logprobs: temperature must be greater than 0, got -1.0",
    ),
    (lambda: rk.attention_row(QUERY, KEY, MASK, window=0), "attention_row: window must be greater than 0, got 0"),
    (lambda: token_rewards(beta=1.5), "token_rewards: beta must lie between 0 and 1, got 1.5"),
    (
        lambda: token_rewards(kl_estimator="k4"),
        "token_rewards: kl_estimator must be one of k1, k2, k3, abs, pos, got 'k4'",
    ),
    (lambda: rk.gae(ROWS, ROWS, MASK, gamma=1.01), "gae: gamma must lie between 0 and 1, got 1.01"),
    (lambda: rollout_advantages(lam=-0.1), "rollout_advantages: lam must lie between 0 and 1, got -0.1"),
    (
        lambda: rk.group_advantages(SCORES, PAIR, kind="mean"),
        "group_advantages: kind must be one of grpo, rloo, dr_grpo, got 'mean'",
    ),
    (lambda: ppo_loss(cliprange=-0.2), "ppo_loss: cliprange must be at least 0, got -0.2"),
    (lambda: ppo_loss(dual_clip=1.0), "ppo_loss: dual_clip must be greater than 1, got 1.0"),
    (lambda: ppo_loss(normalizer=0), "ppo_loss: normalizer must be greater than 0, got 0"),
    (lambda: ppo_loss(cliprange_value=-1.0), "ppo_loss: cliprange_value must be at least 0, got -1.0"),
    (lambda: fused_ppo_loss(lam=2), "fused_ppo_loss: lam must lie between 0 and 1, got 2"),
    (lambda: fused_ppo_loss(vf_coef=-1), "fused_ppo_loss: vf_coef must be at least 0, got -1"),
    (lambda: linear_ppo_loss(cliprange_high=-1), "linear_ppo_loss: cliprange_high must be at least 0, got -1"),
    (
        lambda: linear_ppo_loss(kl_coef=0.1),
        "linear_ppo_loss: ref_logprobs must be given for kl_coef 0.1, got None",
    ),
    (
        lambda: rk.rrhf_loss(ROWS, SCORES, PAIR, MASK, rank_coef=-1),
        "rrhf_loss: rank_coef must be at least 0, got -1",
    ),
    (
        lambda: rk.rm_pairwise_loss(SCORES, PAIR, PAIR, center_coef=-0.01),
        "rm_pairwise_loss: center_coef must be at least 0, got -0.01",
    ),
    (
        lambda: rk.token_feedback_loss(LOGITS, LOGITS, TOKENS, ROWS, beta=0.0),
        "token_feedback_loss: beta must be greater than 0, got 0.0",
    ),
    (
        lambda: rk.token_feedback_loss(LOGITS, LOGITS, TOKENS, ROWS, beta=0.1, kind="dpo"),
        "token_feedback_loss: kind must be one of bandit, unlikelihood, got 'dpo'",
    ),
)

WRONG_DEVICE = (
    (
        lambda: rk.token_logprobs(LOGITS, elsewhere(TOKENS)),
        "token_logprobs: tokens must be on cpu like logits, got meta",
    ),
    (
        lambda: rk.linear_logprobs(HIDDEN, elsewhere(WEIGHT), TOKENS),
        "linear_logprobs: weight must be on cpu like hidden, got meta",
    ),
    (
        lambda: rk.policy_ref_logprobs(LOGITS, elsewhere(LOGITS), TOKENS),
        "policy_ref_logprobs: ref_logits must be on cpu like logits, got meta",
    ),
    (lambda: rk.attention_row(QUERY, elsewhere(KEY), MASK), "attention_row: key must be on cpu like query, got meta"),
    (
        lambda: rk.align_credit(ROWS, SPANS, elsewhere(SPANS)),
        "align_credit: policy_spans must be on cpu like credit, got meta",
    ),
    (
        lambda: token_rewards(("scores", elsewhere(SCORES))),
        "token_rewards: scores must be on cpu like logprobs, got meta",
    ),
    (lambda: rk.gae(ROWS, ROWS, elsewhere(MASK)), "gae: mask must be on cpu like rewards, got meta"),
    (
        lambda: rollout_advantages(("attention", elsewhere(ROWS))),
        "rollout_advantages: attention must be on cpu like logprobs, got meta",
    ),
    (
        lambda: rk.group_advantages(SCORES, elsewhere(PAIR), kind="rloo"),
        "group_advantages: groups must be on cpu like scores, got meta",
    ),
    (lambda: ppo_loss(("values", elsewhere(ROWS))), "ppo_loss: values must be on cpu like logprobs, got meta"),
    (
        lambda: ppo_loss(normalizer=elsewhere(torch.tensor(3.0))),
        "ppo_loss: normalizer must be on cpu like logprobs, got meta",
    ),
    (
        lambda: fused_ppo_loss(("old_logprobs", elsewhere(ROWS))),
        "fused_ppo_loss: old_logprobs must be on cpu like tokens, got meta",
    ),
    (
        lambda: linear_ppo_loss(("advantages", elsewhere(ROWS))),
        "linear_ppo_loss: advantages must be on cpu like tokens, got meta",
    ),
    (
        lambda: rk.rrhf_loss(ROWS, SCORES, elsewhere(PAIR), MASK),
        "rrhf_loss: prompts must be on cpu like logprobs, got meta",
    ),
    (
        lambda: rk.rm_pairwise_loss(SCORES, elsewhere(PAIR), elsewhere(PAIR)),
        "rm_pairwise_loss: chosen must be on cpu like scores, got meta",
    ),
    (
        lambda: rk.rm_listwise_loss(SCORES, elsewhere(PAIR), PAIR),
        "rm_listwise_loss: ranks must be on cpu like scores, got meta",
    ),
    (
        lambda: rk.rm_regression_loss(SCORES, elsewhere(SCORES)),
        "rm_regression_loss: targets must be on cpu like scores, got meta",
    ),
    (
        lambda: rk.token_feedback_loss(LOGITS, LOGITS, TOKENS, elsewhere(ROWS), beta=0.1),
        "token_feedback_loss: labels must be on cpu like tokens, got meta",
    ),
)


def table(kind, rows):
    return [pytest.param(kind, call, message, id=message) for call, message in rows]


@pytest.mark.parametrize(
    ("kind", "call", "message"),
    table(TypeError, WRONG_TYPE)
    + table(ValueError, WRONG_SHAPE)
    + table(ValueError, WRONG_VALUE)
    + table(ValueError, WRONG_DEVICE),
)
def test_message(kind, call, message):
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_every_function_is_here():
    messages = [message for rows in (WRONG_TYPE, WRONG_SHAPE, WRONG_VALUE) for _, message in rows]
    functions = set(rk.__all__) - {"use_backend", "backend"}
    assert functions == {message.split(":")[0] for message in messages}

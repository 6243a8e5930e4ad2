"""Bytes that the Triton kernels move and launches they need, counted under the interpreter."""

import pytest
import torch

import rlhf_kernels as rk
import test_attention_row
import test_fused_ppo_loss
import test_gae
import test_group_advantages
import test_policy_ref_logprobs
import test_ppo_loss
import test_rm_losses
import test_rollout_advantages
import test_rrhf_loss
import test_token_feedback_loss
import test_token_logprobs
import test_token_rewards

pytestmark = pytest.mark.skipif(not rk.backend.has("gae", "triton", "cpu"), reason="Triton's interpreter is not in use")

V = 5000  # two blocks


def count(op, wrt, given, **scalars):
    """Results, and the traffic of the forward and of the backward pass."""
    from triton_interpreter import traffic

    leaves = {
        name: x if x is None or not x.is_floating_point() else x.float().requires_grad_(name in wrt)
        for name, x in given.items()
    }
    with rk.use_backend("triton"):
        with traffic() as forward:
            outputs = op(**leaves, **scalars)
        with traffic() as backward:
            if wrt:
                tensors = outputs if isinstance(outputs, tuple) else (outputs,)
                sum(x.sum() for x in tensors if isinstance(x, torch.Tensor) and x.requires_grad).backward()
    return leaves, forward, backward


@pytest.mark.parametrize("rows", (6, 300), ids=("split", "whole"))
def test_token_logprobs_reads_the_logits_once(rows):
    """And nothing of a masked row; the backward pass reads them once more and writes each gradient once."""
    given = test_token_logprobs.inputs((rows, V if rows < 256 else 300))
    leaves, forward, backward = count(rk.token_logprobs, ("logits",), given)
    live, vocabulary = int(given["mask"].sum()), given["logits"].shape[1]
    assert forward.bytes("loaded", leaves["logits"]) == 4 * live * (vocabulary + 1)  # and the token's own again
    assert backward.bytes("loaded", leaves["logits"]) == 4 * live * vocabulary
    assert backward.bytes("stored") == 4 * rows * vocabulary
    assert forward.launches == (["_block_sums_kernel"] if rows < 256 else []) + ["_token_logprobs_fwd_kernel"]
    small = 100 * rows + 3 * 8 * rows * 2  # tokens, masks, results, sums of blocks
    assert forward.bytes("loaded") + forward.bytes("stored") <= 4 * live * vocabulary + small


def test_policy_ref_logprobs_reads_both_rows_once():
    given = test_policy_ref_logprobs.inputs((5, V))
    leaves, forward, backward = count(rk.policy_ref_logprobs, ("logits",), given)
    live = int(given["mask"].sum())
    for name in ("logits", "ref_logits"):
        assert forward.bytes("loaded", leaves[name]) == 4 * live * (V + 1)
        assert backward.bytes("loaded", leaves[name]) == 4 * live * V
    assert backward.bytes("stored") == 4 * 5 * V
    assert (len(forward.launches), len(backward.launches)) == (1, 1)


@pytest.mark.parametrize("whiten", (True, False))
def test_fused_ppo_loss_is_one_pass_over_the_logits(whiten):
    """One launch over [B, T], one over the logits, one over [B, T]; each row is read, and again from the cache."""
    given = test_fused_ppo_loss.inputs(4, 3, V)
    scalars = {"kl_coef": 0.1, "beta": 0.7, "whiten": whiten, "entropy_coef": 0.01}
    leaves, forward, backward = count(rk.fused_ppo_loss, ("logits", "values"), given, **scalars)
    live = int(given["mask"].sum())
    assert forward.launches == ["_rollout_advantages_kernel", "_ppo_rows_kernel", "_ppo_loss_fwd_kernel"]
    assert forward.bytes("loaded", leaves["logits"]) == 4 * live * (2 * V + 1)
    assert 4 * 12 * V <= forward.bytes("stored") <= 4 * 12 * V + 12 * 60
    assert backward.launches == []


def test_rows_without_a_gradient_are_not_read_again():
    given = test_fused_ppo_loss.inputs(4, 3, V)
    given["mask"][:] = True
    with torch.no_grad():
        logprobs = rk.token_logprobs(given["logits"], given["tokens"])
    given["old_logprobs"] = logprobs - 1  # ratio e: held wherever the advantage is positive
    given["old_logprobs"][0] = logprobs[0]
    given["values"] = given["old_values"] = torch.zeros(4, 3)
    given["scores"] = torch.ones(4)
    leaves, forward, _ = count(rk.fused_ppo_loss, ("logits",), given, kl_coef=0.0, beta=0.0, whiten=False)
    assert forward.bytes("loaded", leaves["logits"]) == 4 * V * (12 + 3) + 4 * 12


@pytest.mark.parametrize("groups", (1, 2, 4))
def test_attention_row_reads_each_key_once(groups):
    """For all query heads of its key head; nothing of a masked key."""
    given = test_attention_row.inputs(2, 4, groups, 70, 8)
    leaves, forward, _ = count(rk.attention_row, (), given)
    assert forward.bytes("loaded", leaves["key"]) == 4 * 8 * groups * int(given["key_mask"].sum())
    assert len(forward.launches) == 2


def test_launches():
    kl = {"kl_coef": 0.1, "beta": 0.7}
    scores, targets = torch.randn(2, 40, dtype=torch.float64)
    feedback = test_token_feedback_loss.inputs((3, 2, 50))
    for launches, op, wrt, given, scalars in (
        (1, rk.gae, (), test_gae.inputs(3, 5), {}),
        (1, rk.token_rewards, (), test_token_rewards.inputs(3, 5), kl),
        (1, rk.rollout_advantages, (), test_rollout_advantages.inputs(3, 5), {**kl, "whiten": False}),
        (2, rk.rollout_advantages, (), test_rollout_advantages.inputs(3, 5), kl),
        (1, rk.ppo_loss, ("logprobs", "values"), test_ppo_loss.inputs(3, 5), {}),
        (1, rk.rrhf_loss, ("logprobs",), test_rrhf_loss.inputs(12, 5, 3), {}),
        (1, rk.rm_pairwise_loss, ("scores",), test_rm_losses.pair_inputs(40, 30), {}),
        (1, rk.rm_listwise_loss, ("scores",), test_rm_losses.list_inputs(40, 5), {}),
        (1, rk.rm_regression_loss, ("scores",), {"scores": scores, "targets": targets}, {}),
        (2, rk.token_feedback_loss, ("logits",), feedback, {"beta": 0.5}),
        *(
            (1, rk.group_advantages, (), {"scores": scores, "groups": torch.randint(5, (40,))}, {"kind": kind})
            for kind in test_group_advantages.KINDS
        ),
    ):
        _, forward, backward = count(op, wrt, given, **scalars)
        assert (len(forward.launches), len(backward.launches)) == (launches, 0), op

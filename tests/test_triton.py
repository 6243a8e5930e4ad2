"""Paths of the Triton kernels that only large inputs take, taken by small ones; the ops' own tests do the rest."""

import importlib
import math

import pytest
import torch

import oracle
import rlhf_kernels as rk
import test_attention_row
import test_fused_ppo_loss
import test_linear_logprobs
import test_policy_ref_logprobs
import test_ppo_loss
import test_rollout_advantages
import test_token_logprobs
from oracle import close

pytestmark = pytest.mark.skipif(not rk.backend.has("gae", "triton", oracle.DEVICE), reason="no Triton")


def kernels(stem):
    return importlib.import_module(f"rlhf_kernels.triton_kernels.{stem}")


def agree(op, given, wrt=(), rtol=1e-9, atol=1e-12, **scalars):
    """Triton against the torch backend; returns Triton's results."""
    results = []
    for backend in ("torch", "triton"):
        with rk.use_backend(backend):
            results.append(oracle.evaluate(op, given, wrt, scalars))
    for expected, actual in zip(results[0][0] + results[0][1], results[1][0] + results[1][1]):
        close(actual, expected, rtol=rtol, atol=atol)
    return results[1][0] + results[1][1]


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(kernels("token_logprobs"), "MAX_BLOCK_V", 128)
    monkeypatch.setattr(kernels("gae"), "MAX_BLOCK_T", 32)


LOGITS = (3, 2, 500)  # four blocks of 128


def test_rows_of_many_blocks(small_blocks, monkeypatch):
    """Whole or split over programs: the same bits."""
    given = test_token_logprobs.inputs(LOGITS)
    given["logits"][0, 0, 128:256] = -math.inf
    split = agree(rk.token_logprobs_entropy, given, ("logits",), temperature=0.7, softcap=9.0)
    monkeypatch.setattr(kernels("token_logprobs"), "FEW_ROWS", 0)
    whole = agree(rk.token_logprobs_entropy, given, ("logits",), temperature=0.7, softcap=9.0)
    for a, b in zip(split, whole):
        assert torch.equal(a, b)


def test_split_rows_with_a_large_offset(small_blocks):
    given = test_token_logprobs.inputs(LOGITS)
    given["logits"] = (given["logits"] * 8).round().float() / 8 - 1e4
    agree(rk.token_logprobs_entropy, given, rtol=1e-5, atol=1e-5)


def test_pairs_of_rows_of_many_blocks(small_blocks):
    given = test_policy_ref_logprobs.inputs(LOGITS)
    given["logits"][0, 0, 130:250] = -math.inf
    given["ref_logits"][..., 384:] -= 40  # the maximum moves between blocks
    agree(rk.policy_ref_logprobs, given, ("logits",))


def test_fused_loss_of_many_blocks(small_blocks, monkeypatch):
    monkeypatch.setattr(kernels("rollout_advantages"), "MAX_PROGRAMS", 2)  # fewer than rows
    monkeypatch.setattr(kernels("fused_ppo_loss"), "MAX_PROGRAMS", 16)
    given = test_fused_ppo_loss.inputs(5, 3, 300)
    scalars = {"kl_coef": 0.1, "beta": 0.7, "entropy_coef": 0.05, "temperature": 0.8}
    agree(rk.fused_ppo_loss, given, ("logits", "values"), **scalars)


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_gradient_over_the_logits_of_many_blocks(small_blocks, dtype):
    """In bf16 the gradient is half as wide as the logits that it overwrites."""
    given = test_linear_logprobs.inputs((4, 3), 8, 500)
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    tolerance = {} if dtype == torch.float64 else {"rtol": 2e-2, "atol": 2e-2}
    agree(rk.linear_logprobs_entropy, given, ("hidden", "weight", "bias"), **tolerance)
    agree(rk.linear_logprobs, given, ("hidden",), **tolerance)


@pytest.mark.parametrize("whiten", (True, False))
def test_long_rows(small_blocks, monkeypatch, whiten):
    """Advantages and values are carried from tile to tile, over tiles that are all masked too."""
    monkeypatch.setattr(kernels("rollout_advantages"), "MAX_PROGRAMS", 2)
    given = test_rollout_advantages.inputs(5, 150)
    given["mask"][2, 32:100] = False
    scalars = {"kl_coef": 0.1, "beta": 0.7, "gamma": 0.99, "lam": 0.9}
    advantages, *_ = agree(rk.rollout_advantages, given, whiten=whiten, **scalars)
    assert advantages[2, :32].abs().max() > 0
    rewards = torch.randn(5, 150, dtype=torch.float64)
    agree(rk.gae, {"rewards": rewards, "values": given["values"], "mask": given["mask"]}, gamma=0.9, lam=0.8)


def test_row_of_32768():
    rewards, values = torch.randn(2, 1, 32768, dtype=torch.float64)
    mask = torch.rand(1, 32768) < 0.9
    advantages, returns = agree(rk.gae, {"rewards": rewards, "values": values, "mask": mask}, gamma=0.999, lam=0.99)
    assert advantages.abs().max() > 1
    assert (returns[~mask] == 0).all()


def test_many_tokens(monkeypatch):
    """Sums by several programs in one launch, gradients in the next."""
    monkeypatch.setattr(kernels("ppo_loss"), "BLOCK", 16)
    monkeypatch.setattr(kernels("ppo_loss"), "SINGLE", 16)
    for most in (512, 2):  # a tile a program, several tiles a program
        monkeypatch.setattr(kernels("ppo_loss"), "MAX_PROGRAMS", most)
        agree(rk.ppo_loss, test_ppo_loss.inputs(9, 11), ("logprobs", "values"), dual_clip=2.0)


@pytest.mark.parametrize("groups", (4, 2))
@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.float16), ids=str)
def test_attention_split_over_columns(monkeypatch, groups, dtype):
    given = test_attention_row.inputs(2, 4, groups, 300, 16, sink=True)
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    tolerance = {"rtol": 1e-9, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for programs in (1, 10, 10**6):
        monkeypatch.setattr(kernels("attention_row"), "PROGRAMS", programs)
        agree(rk.attention_row, given, scale=0.3, window=150, **tolerance)


def test_more_text_than_a_tile():
    lengths = torch.randint(1, 5, (2, 100))
    spans = torch.stack([lengths.cumsum(1) - lengths, lengths.cumsum(1)], -1)
    credit = torch.randn(2, 100, dtype=torch.float64)
    policy = torch.stack([torch.arange(150), torch.arange(150) + 1], -1)[None].repeat(2, 1, 1) * 2
    (aligned,) = agree(rk.align_credit, {"credit": credit, "rm_spans": spans, "policy_spans": policy})
    close(aligned.sum(1), credit.sum(1), rtol=1e-9)


@pytest.mark.parametrize("memory_budget", (None, 1), ids=("one chunk", "many chunks"))
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16, torch.float32), ids=str)
def test_products_that_a_gpu_has(monkeypatch, dtype, memory_budget):
    """Operands of one dtype, and a result in theirs, or in fp32 of 16-bit ones: cuBLAS has no other."""
    module, asked = kernels("linear_logprobs"), []
    product = module.product

    def recorded(a, b, out, accumulate=False):
        asked.append((a.dtype, b.dtype, out.dtype))
        return product(a, b, out, accumulate)

    monkeypatch.setattr(module, "product", recorded)
    given = test_linear_logprobs.inputs((2, 3), 8, 33)
    given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in given.items()}
    leaves = [given[name].requires_grad_() for name in ("hidden", "weight", "bias")]
    with rk.use_backend("triton"):
        rk.linear_logprobs(**given, memory_budget=memory_budget).sum().backward()
        rk.linear_logprobs(**given | {"weight": given["weight"].detach(), "bias": None}, memory_budget=memory_budget)
    assert asked
    for a, b, out in asked:
        assert a == b
        assert out in (a, torch.float32)
    assert all(x.grad.isfinite().all() for x in leaves)


def test_a_product_without_fp32_sums():
    """Where torch refuses the mixed product the operands are widened."""
    a, b, out = torch.randn(3, 4).half(), torch.randn(4, 5).half(), torch.empty(3, 5)
    close(kernels("linear_logprobs").product(a, b, out), a.float() @ b.float())
    close(kernels("linear_logprobs").product(a, b, out, accumulate=True), 2 * (a.float() @ b.float()))

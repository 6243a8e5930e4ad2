"""The gradient of the logits in memory that the caller gives, for every op that offers it."""

import math

import pytest
import torch

import rlhf_kernels as rk
import test_fused_ppo_loss
import test_policy_ref_logprobs
import test_token_feedback_loss
import test_token_logprobs
from oracle import BACKENDS, close, flatten, on_backend

CAPPED = {"temperature": 0.7, "softcap": 5.0}
SCALARS = {
    "token_logprobs": CAPPED,
    "token_logprobs_entropy": CAPPED,
    "policy_ref_logprobs": {"temperature": 0.7},
    "fused_ppo_loss": {"kl_coef": 0.1, "beta": 0.7, "entropy_coef": 0.05, **CAPPED},
    "token_feedback_loss": {"beta": 0.5},
}
every_op = pytest.mark.parametrize("name", SCALARS)
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def stem(name):
    return name.removesuffix("_entropy")


def inputs(name, dtype, rows=3, columns=4, vocabulary=130):
    shape = (rows, columns, vocabulary)
    given = {
        "token_logprobs": lambda: test_token_logprobs.inputs(shape),
        "policy_ref_logprobs": lambda: test_policy_ref_logprobs.inputs(shape),
        "fused_ppo_loss": lambda: test_fused_ppo_loss.inputs(*shape),
        "token_feedback_loss": lambda: test_token_feedback_loss.inputs(shape),
    }[stem(name)]()
    for logits in ("logits", "ref_logits"):
        if logits in given:
            given[logits] = given[logits].to(dtype)
    return given


def total(name, given, **options):
    """A number that depends on all that is differentiable."""
    outputs = flatten(getattr(rk, name)(**given, **SCALARS[name], **options))
    return sum((0.3 * x.double().sin()).sum() for x in outputs if x.requires_grad)


def gradients(name, given, retain_graph=False, **options):
    wrt = [x for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad]
    return torch.autograd.grad(total(name, given, **options), wrt, retain_graph=retain_graph)


def leaves(name, given):
    wrt = ("logits", "values") if name == "fused_ppo_loss" else ("logits",)
    return {key: x.clone().requires_grad_(key in wrt) if x is not None else x for key, x in given.items()}


@on_every_backend
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@every_op
def test_same_bits_in_the_given_memory(name, dtype, backend):
    """As in fresh memory: in a buffer of NaN, in one that is used again, in the logits themselves."""
    with on_backend(backend, stem(name)):
        given = inputs(name, dtype)
        buffer = torch.full_like(given["logits"], math.nan)
        expected = gradients(name, leaves(name, given))
        for _ in range(2):
            actual = gradients(name, leaves(name, given), grad_buffer=buffer)
            assert actual[0].data_ptr() == buffer.data_ptr()
            assert all(torch.equal(a, b) for a, b in zip(actual, expected))
        own = leaves(name, given)
        actual = gradients(name, own, grad_buffer=own["logits"])
        assert all(torch.equal(a, b) for a, b in zip(actual, expected))
        assert torch.equal(own["logits"].detach(), expected[0])


@on_every_backend
def test_a_wider_reference(backend):
    """The gradient is made in fp32 and rounded into the buffer."""
    for name in ("policy_ref_logprobs", "token_feedback_loss"):
        with on_backend(backend, name):
            given = inputs(name, torch.bfloat16)
            given["ref_logits"] = given["ref_logits"].float()
            buffer = torch.full_like(given["logits"], math.nan)
            (expected,) = gradients(name, leaves(name, given))
            (actual,) = gradients(name, leaves(name, given), grad_buffer=buffer)
            assert actual.data_ptr() == buffer.data_ptr()
            assert torch.equal(actual, expected)


@every_op
def test_memory_that_was_used_again_is_noticed(name):
    """Two graphs over one buffer, or logits that are gone: an error instead of the other's gradient."""
    given = inputs(name, torch.float32)
    own = leaves(name, given)
    output = total(name, own, grad_buffer=own["logits"])
    torch.autograd.grad(output, own["logits"], retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(output, own["logits"])


def test_a_loss_of_an_older_batch_is_noticed():
    name = "fused_ppo_loss"
    given = inputs(name, torch.float32)
    buffer, first = torch.empty_like(given["logits"]), leaves(name, given)
    older = total(name, first, grad_buffer=buffer)
    total(name, leaves(name, given), grad_buffer=buffer)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(older, first["logits"])


@every_op
def test_buffer_of_another_kind(name):
    given = inputs(name, torch.float32, 1, 2, 7)
    for buffer, message in (
        (torch.zeros(1, 2, 6), r"have shape \(1, 2, 7\) to match logits \(1, 2, 7\), got \(1, 2, 6\)"),
        (torch.zeros(1, 2, 7).half(), "be contiguous and torch.float32 like logits, got torch.float16"),
        (torch.zeros(1, 7, 2).mT, "be contiguous and torch.float32 like logits, got torch.float32 with strides"),
    ):
        with pytest.raises(ValueError, match=rf"^{name}: grad_buffer must {message}"):
            getattr(rk, name)(**given, **SCALARS[name], grad_buffer=buffer)


@every_op
def test_without_a_gradient_the_buffer_is_left_alone(name):
    given = inputs(name, torch.float32, 1, 2, 7)
    buffer = torch.full_like(given["logits"], 3.0)
    getattr(rk, name)(**given, **SCALARS[name], grad_buffer=buffer)
    assert (buffer == 3).all()


@every_op
def test_under_compile(name):
    torch._dynamo.reset()
    given = inputs(name, torch.float64, 2, 3, 33)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(given, buffer):
        return total(name, given, grad_buffer=buffer)

    traced, buffer = leaves(name, given), torch.empty_like(given["logits"])
    actual = torch.autograd.grad(compiled(traced, buffer), traced["logits"])
    close(actual[0], gradients(name, leaves(name, given))[0], rtol=1e-12, atol=1e-15)


@on_every_backend
@every_op
def test_opcheck(name, backend):
    """The ops that write to what they are given, with the arguments that they get."""
    with on_backend(backend, stem(name)):
        calls = []

        class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(self, op, types, args=(), kwargs=None):
                if op.name().endswith("_out"):
                    calls.append((op, [x.detach().clone() if isinstance(x, torch.Tensor) else x for x in args]))
                return op(*args, **kwargs or {})

        given = inputs(name, torch.float32, 2, 3, 33)
        with Recorder():
            gradients(name, leaves(name, given), grad_buffer=torch.zeros_like(given["logits"]))
        ((op, args),) = calls
        torch.library.opcheck(op, args)


def test_opcheck_of_what_attaches_a_gradient():
    given = torch.randn(2, 3, requires_grad=True)
    arguments = (torch.randn(()), given, torch.randn(2, 3))
    torch.library.opcheck(
        torch.ops.rlhf_kernels.attach_gradient.default, arguments, test_utils=("test_schema", "test_faketensor")
    )

"""What holds for every op alike. The public functions stand in CASES; the ops that they call are recorded from them."""

import contextlib
import inspect
from typing import Any, NamedTuple

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import rlhf_kernels as rk
import test_align_credit
import test_attention_row
import test_fused_ppo_loss
import test_gae
import test_group_advantages
import test_linear_logprobs
import test_linear_ppo_loss
import test_linear_rrhf_loss
import test_policy_ref_logprobs
import test_ppo_loss
import test_rm_losses
import test_rollout_advantages
import test_rrhf_loss
import test_token_feedback_loss
import test_token_logprobs
import test_token_rewards
from oracle import BACKENDS, close, flatten, on_backend


class Case(NamedTuple):
    """One call of a public function: `op` is the stem of the registered op, `wrt` the differentiable inputs."""

    op: str
    inputs: dict[str, Any]
    wrt: tuple[str, ...] = ()
    scalars: dict[str, Any] = {}  # noqa: RUF012 - never written


def cases(rows=4, columns=5, vocabulary=7):
    """Public function → its calls, the first with every option that adds work."""
    torch.manual_seed(0)
    shape = (rows, columns)
    logits = test_token_logprobs.inputs((*shape, vocabulary))
    linear = test_linear_logprobs.inputs(shape, 8, vocabulary)
    rewards = test_token_rewards.inputs(*shape)
    rollout = test_rollout_advantages.inputs(*shape)
    fused = test_fused_ppo_loss.inputs(*shape, vocabulary)
    linear_ppo = test_linear_ppo_loss.inputs(shape, 8, vocabulary)
    pairs = test_rm_losses.pair_inputs(rows, 2 * columns)
    feedback = test_token_feedback_loss.inputs((*shape, vocabulary))
    capped = {"temperature": 0.7, "softcap": 3.0}
    kl = {"kl_coef": 0.1, "beta": 0.7}

    def without(inputs, *names):
        return {name: x for name, x in inputs.items() if name not in names}

    def none(inputs, *names):
        return inputs | dict.fromkeys(names)

    head = ("hidden", "weight", "bias")
    values = torch.randn(shape, dtype=torch.float64)
    return {
        "token_logprobs": [
            Case("token_logprobs", logits, ("logits",), capped),
            Case("token_logprobs", without(logits, "mask"), ("logits",)),
        ],
        "token_logprobs_entropy": [Case("token_logprobs", logits, ("logits",), capped)],
        "linear_logprobs": [
            Case("linear_logprobs", linear, head, capped),
            Case("linear_logprobs", without(linear, "bias", "mask"), head[:1]),
        ],
        "linear_logprobs_entropy": [Case("linear_logprobs", linear, head, capped)],
        "policy_ref_logprobs": [
            Case(
                "policy_ref_logprobs",
                test_policy_ref_logprobs.inputs((*shape, vocabulary)),
                ("logits",),
                {"temperature": 0.7},
            )
        ],
        "attention_row": [
            Case(
                "attention_row",
                test_attention_row.inputs(rows, 4, 2, columns, 8, sink=True),
                (),
                {"scale": 0.3, "softcap": 2.0, "window": 3},
            ),
            Case("attention_row", test_attention_row.inputs(rows, 4, 2, columns, 8)),
        ],
        "align_credit": [Case("align_credit", test_align_credit.inputs())],
        "token_rewards": [
            Case("token_rewards", rewards, (), {**kl, "kl_estimator": "k3"}),
            Case("token_rewards", none(rewards, "attention"), (), kl),
            Case("token_rewards", none(test_token_rewards.inputs(*shape, "random", False, True), "attention"), (), kl),
        ],
        "gae": [Case("gae", test_gae.inputs(*shape), (), {"gamma": 0.9, "lam": 0.8})],
        "rollout_advantages": [
            Case("rollout_advantages", rollout, (), kl),
            Case("rollout_advantages", none(rollout, "attention"), (), {**kl, "whiten": False}),
        ],
        "group_advantages": [
            Case(
                "group_advantages",
                {"scores": torch.randn(rows * columns).double(), "groups": torch.randint(3, (rows * columns,))},
                (),
                {"kind": kind},
            )
            for kind in test_group_advantages.KINDS
        ],
        "ppo_loss": [
            Case("ppo_loss", test_ppo_loss.inputs(*shape), ("logprobs", "values"), {"dual_clip": 2.0}),
            Case("ppo_loss", test_ppo_loss.inputs(*shape), ("values",), {"normalizer": 12, "cliprange_value": None}),
        ],
        "fused_ppo_loss": [
            Case("fused_ppo_loss", fused, ("logits", "values"), {**kl, **capped, "entropy_coef": 0.05}),
            Case("fused_ppo_loss", none(fused, "attention"), ("logits",), {**kl, "normalizer": 12.0}),
        ],
        "linear_ppo_loss": [
            Case("linear_ppo_loss", linear_ppo, head, {"entropy_coef": 0.05, "kl_coef": 0.1, "temperature": 0.7}),
            Case("linear_ppo_loss", without(linear_ppo, "bias", "ref_logprobs"), head[1:2], {"normalizer": 12.0}),
        ],
        "rrhf_loss": [Case("rrhf_loss", test_rrhf_loss.inputs(rows, columns, 2), ("logprobs",))],
        "linear_rrhf_loss": [
            Case("linear_rrhf_loss", test_linear_rrhf_loss.inputs(rows, columns, 2, 8, vocabulary), head),
            Case(
                "linear_rrhf_loss",
                without(test_linear_rrhf_loss.inputs(rows, columns, 2, 8, vocabulary), "bias"),
                head[:1],
                {"length_power": 0.5, "temperature": 0.7},
            ),
        ],
        "rm_pairwise_loss": [
            Case("rm_pairwise_loss", pairs, ("scores",), {"center_coef": 0.01}),
            Case("rm_pairwise_loss", without(pairs, "prompts", "margin"), ("scores",)),
        ],
        "rm_listwise_loss": [Case("rm_listwise_loss", test_rm_losses.list_inputs(5 * rows, 3), ("scores",))],
        "rm_regression_loss": [
            Case("rm_regression_loss", {"scores": values[0], "targets": values[1] + values[0]}, ("scores",))
        ],
        "token_feedback_loss": [
            Case("token_feedback_loss", feedback, ("logits",), {"beta": 0.5, "kind": kind})
            for kind in test_token_feedback_loss.KINDS
        ],
    }


def parametrize(cases, keep=lambda case: True):
    listed = [(name, case, f"{name}-{i}") for name, many in cases.items() for i, case in enumerate(many) if keep(case)]
    return pytest.mark.parametrize(("name", "case"), [pytest.param(name, case, id=x) for name, case, x in listed])


CASES = cases()
every_case = parametrize(CASES)
differentiable_case = parametrize(CASES, lambda case: case.wrt)
every_big_case = parametrize(cases(96, 161, 17))  # more than one thread's share
every_tall_case = parametrize(cases(9, 3, 17))  # more than one program of the Triton kernels, which have no threads
on_every_backend = pytest.mark.parametrize("backend", BACKENDS)


def tensors(case, dtype=None):
    """Fresh copies of the inputs, those in `wrt` as leaves."""
    fresh = {}
    for name, x in case.inputs.items():
        if x is not None:
            x = x.detach().clone() if dtype is None or not x.is_floating_point() else x.detach().to(dtype, copy=True)
            x.requires_grad_(name in case.wrt)
        fresh[name] = x
    return fresh


def call(name, case, given):
    """Outputs, and the gradients of the sum of what is differentiable."""
    outputs = flatten(getattr(rk, name)(**given, **case.scalars))
    wrt = [given[x] for x in case.wrt]
    if not wrt:
        return outputs, []
    return outputs, list(torch.autograd.grad(sum(x.sum() for x in outputs if x.requires_grad), wrt))


class Recorder(TorchDispatchMode):
    """Keeps the calls of registered ops, below autograd."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **kwargs or {})
        if op.namespace == "rlhf_kernels":
            self.calls.append((op, args, result))
        return result


def record(name, case, dtype=None, grad=True):
    with Recorder() as recorder, contextlib.nullcontext() if grad else torch.no_grad():
        given = tensors(case, dtype)
        call(name, case if grad else case._replace(wrt=()), given)
    return recorder.calls


def recorded_ops():
    with rk.use_backend("torch"):
        calls = [call for name, many in CASES.items() for case in many for call in record(name, case)]
    return {op.name().split("::")[1] for op, *_ in calls}


def test_cases_cover_every_public_function_and_every_op():
    plain_torch = {"masked_mean", "masked_whiten"}
    assert set(CASES) == set(rk.__all__) - plain_torch - {"use_backend", "backend"}
    ops = set(rk.backend.table("cpu"))
    assert recorded_ops() == {op for op in ops if not op.endswith("_out")}  # those are in test_grad_buffer.py


@on_every_backend
@every_case
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_opcheck(name, case, backend, dtype):
    with on_backend(backend, case.op):
        for op, args, _ in record(name, case, dtype):
            if op.name().endswith("_bwd"):  # called below autograd, never through it
                args = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
            torch.library.opcheck(op, args)


@every_case
def test_fake_outputs_with_mixed_dtypes(name, case):
    """One fp64 input among fp32 ones, and the reverse: the shapes and dtypes that tracing is told are the real ones."""
    with rk.use_backend("torch"):
        for op, args, _ in record(name, case, torch.float32):
            must_agree = {"hidden", "weight", "bias", "query", "key"}
            may_differ = [
                i
                for i, (argument, x) in enumerate(zip(op._schema.arguments, args))
                if isinstance(x, torch.Tensor) and x.is_floating_point() and argument.name not in must_agree
            ]
            for odd in may_differ if not op.name().endswith("_bwd") else []:
                mixed = [x.detach() if isinstance(x, torch.Tensor) else x for x in args]
                mixed[odd] = mixed[odd].double()
                real = flatten(op(*mixed))
                with FakeTensorMode() as mode:
                    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in mixed]
                    told = flatten(op(*fakes))
                assert [(x.shape, x.dtype) for x in real] == [(x.shape, x.dtype) for x in told], f"{op}, input {odd}"


@on_every_backend
@every_case
def test_inputs_are_left_alone(name, case, backend):
    """Nothing is written to what the user gave, no output shares its memory, and outputs are contiguous."""
    with on_backend(backend, case.op):
        given = tensors(case)
        before = {key: None if x is None else x.detach().clone() for key, x in given.items()}
        outputs, gradients = call(name, case, given)
        for key, x in given.items():
            assert x is None or torch.equal(x, before[key]), key
        memory = {x.untyped_storage().data_ptr() for x in given.values() if x is not None}
        for x in outputs + gradients:
            assert x.untyped_storage().data_ptr() not in memory
        assert all(x.is_contiguous() for x in outputs + gradients)


@pytest.mark.parametrize("backend", ("torch", "native"))
@every_big_case
def test_same_input_same_bits(name, case, backend, threads):
    with on_backend(backend, case.op):
        results = []
        for count in (2, 2, 1):
            threads(count)
            outputs, gradients = call(name, case, tensors(case, torch.float32))
            results.append(outputs + gradients)
        for once, again, one_thread in zip(*results):
            assert torch.equal(once, again)
            if "linear" not in name:  # a matrix product is cut up by the BLAS library as it likes
                assert torch.equal(once, one_thread)


@every_tall_case
def test_same_input_same_bits_in_triton(name, case):
    with on_backend("triton", case.op):
        once, again = ([*outputs, *grads] for outputs, grads in (call(name, case, tensors(case)) for _ in range(2)))
        for a, b in zip(once, again):
            assert torch.equal(a, b)


@on_every_backend
@differentiable_case
def test_graph_can_be_used_twice(name, case, backend):
    with on_backend(backend, case.op):
        given = tensors(case)
        outputs = [x for x in flatten(getattr(rk, name)(**given, **case.scalars)) if x.requires_grad]
        total, wrt = sum(x.sum() for x in outputs), [given[x] for x in case.wrt]
        first = torch.autograd.grad(total, wrt, retain_graph=True)
        second = torch.autograd.grad(total, wrt)
        for a, b in zip(first, second):
            assert torch.equal(a, b)
            assert a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr()


@differentiable_case
def test_upstream_gradient_scales(name, case):
    """A loss divided by the accumulation steps; unused outputs bring no gradient."""
    given = tensors(case)
    output = flatten(getattr(rk, name)(**given, **case.scalars))[0]
    wrt = [given[x] for x in case.wrt]
    once = torch.autograd.grad(output.sum(), wrt, retain_graph=True)
    for a, b in zip(torch.autograd.grad(output.sum() / 4, wrt), once):
        close(a, b / 4, rtol=1e-12, atol=1e-15)


@differentiable_case
def test_double_backward_is_refused(name, case):
    given = tensors(case)
    output = flatten(getattr(rk, name)(**given, **case.scalars))[0]
    message = rf"^{case.op}: double backward \(create_graph=True\) is not supported$"
    with pytest.raises(RuntimeError, match=message):
        torch.autograd.grad(output.sum(), [given[x] for x in case.wrt], create_graph=True)


@on_every_backend
@every_case
def test_no_grad_computes_no_gradient(name, case, backend):
    """The ops that make their gradient in the forward pass return empty ones, and nothing requires grad."""
    with on_backend(backend, case.op):
        with torch.no_grad():
            assert not any(x.requires_grad for x in flatten(getattr(rk, name)(**tensors(case), **case.scalars)))
        ((op, _, result),) = record(name, case, grad=False)
        if "loss" in name:
            gradients = result[2:]  # after the loss and its statistics
            assert gradients, op
            assert all(x.numel() == 0 for x in gradients)


@pytest.mark.parametrize("name", CASES)
def test_frozen_inputs_give_no_graph(name):
    """Outputs of the ops without a backward pass do not require grad, whatever the inputs do."""
    case = CASES[name][0]
    given = {key: x if x is None else x.clone().requires_grad_(x.is_floating_point()) for key, x in case.inputs.items()}
    outputs = flatten(getattr(rk, name)(**given, **case.scalars))
    assert any(x.requires_grad for x in outputs) == bool(case.wrt)
    if case.wrt:
        sum(x.sum() for x in outputs if x.requires_grad).backward()
    for key, x in given.items():
        assert (x is not None and x.grad is not None) == (key in case.wrt), key


@every_case
def test_compiles_in_one_graph(name, case):
    torch._dynamo.reset()

    def function(given):
        return getattr(rk, name)(**given, **case.scalars)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    results = []
    for run in (function, compiled):
        given = tensors(case)
        outputs = flatten(run(given))
        wrt = [given[x] for x in case.wrt]
        total = sum((x.sum() for x in outputs if x.requires_grad), torch.zeros(()))
        results.append([*outputs, *(torch.autograd.grad(total, wrt) if wrt else [])])
    for a, b in zip(*results):
        close(a.detach(), b.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_lengths_do_not_recompile(name):
    """After the two calls in which dynamo learns that a length varies."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def function(given, scalars):
        return getattr(rk, name)(**given, **scalars)

    for columns in (5, 6, 7, 8, 9):
        case = cases(4, columns)[name][0]
        function(tensors(case), case.scalars)
    assert counter.frame_count <= 2


def test_values_compile_once_each():
    """Dynamo makes a Python float given to any custom op a constant; a normalizer in a tensor stays a variable."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    given = tensors(CASES["ppo_loss"][0])

    @torch.compile(fullgraph=True, backend=counter)
    def function(normalizer, vf_coef):
        return rk.ppo_loss(**given, normalizer=normalizer, vf_coef=vf_coef)[0]

    for normalizer in (3.0, 4.0, 5.0):
        assert function(torch.tensor(normalizer), 0.1) == rk.ppo_loss(**given, normalizer=normalizer)[0]
    assert counter.frame_count == 1
    function(torch.tensor(3.0), 0.2)
    compiled = counter.frame_count
    for vf_coef in (0.1, 0.2, 0.1):
        assert function(torch.tensor(3.0), vf_coef) == rk.ppo_loss(**given, normalizer=3.0, vf_coef=vf_coef)[0]
    assert counter.frame_count == compiled


@pytest.mark.parametrize("name", [name for name in rk.__all__ if inspect.isfunction(getattr(rk, name))])
def test_docstrings(name):
    function = getattr(rk, name)
    doc = inspect.getdoc(function)
    assert doc, name
    assert doc.splitlines()[0].strip()
    annotations = {x: str(p.annotation) for x, p in inspect.signature(function).parameters.items()}
    assert all(annotation != str(inspect.Parameter.empty) for annotation in annotations.values())
    if any("Tensor" in annotation for annotation in annotations.values()):
        assert "Returns:" in doc
        assert "Args:" in doc or "Arguments" in doc
        if "Args:" in doc:
            missing = [x for x in annotations if x not in doc and "scalars" not in doc]
            assert not missing


STATS = {
    "ppo_loss": "policy_loss value_loss approx_kl clipfrac_high clipfrac_low clipfrac_value ratio_mean ratio_max "
    "explained_variance tokens",
    "fused_ppo_loss": "policy_loss value_loss entropy approx_kl clipfrac_high clipfrac_low clipfrac_value ratio_mean "
    "ratio_max explained_variance tokens",
    "linear_ppo_loss": "policy_loss entropy kl approx_kl clipfrac_high clipfrac_low ratio_mean ratio_max tokens",
    "rrhf_loss": "rank_loss sft_loss accuracy prompts",
    "linear_rrhf_loss": "rank_loss sft_loss accuracy prompts",
    "rm_pairwise_loss": "accuracy margin chosen_score rejected_score",
    "rm_listwise_loss": "accuracy top1_accuracy",
    "rm_regression_loss": "correlation bias",
    "token_feedback_loss": "logprob_good logprob_bad kl tokens",
}


@pytest.mark.parametrize("name", STATS)
def test_stats(name):
    assert set(STATS) == {name for name in CASES if "loss" in name}
    case = CASES[name][0]
    loss, stats = getattr(rk, name)(**tensors(case), **case.scalars)
    assert loss.ndim == 0
    assert loss.requires_grad
    assert " ".join(stats._fields) == STATS[name]
    for x in stats:
        assert x.ndim == 0
        assert not x.requires_grad
        assert x.dtype == loss.dtype
        assert x.isfinite()

"""What only a GPU can show: sizes beyond 2³¹, CUDA graphs, streams, a second device, no wait for the device.

The other tests of the ops run on a GPU too: RLHF_TEST_DEVICE=cuda pytest tests/test_gae.py …
"""

import functools

import pytest
import torch

import oracle
import rlhf_kernels as rk
import test_registration as registration
from oracle import on_backend
from test_registration import call, tensors

pytestmark = pytest.mark.skipif(oracle.DEVICE != "cuda", reason="needs a GPU and RLHF_TEST_DEVICE=cuda")

every_case = pytest.mark.parametrize(
    ("name", "number"),
    [pytest.param(name, i, id=f"{name}-{i}") for name, many in registration.CASES.items() for i in range(len(many))],
)
on_both_backends = pytest.mark.parametrize("backend", ("triton", "native"))


@pytest.fixture(autouse=True)
def as_users_run():
    """Not under conftest's deterministic mode: it swaps torch's own kernels for others, some of which wait."""
    torch.use_deterministic_algorithms(False)
    yield
    torch.use_deterministic_algorithms(True, warn_only=True)


@functools.cache
def big_cases():
    """Several programs and several tiles in every kernel."""
    return registration.cases(48, 257, 1009)


def results(name, case, given):
    outputs, gradients = call(name, case, given)
    return [x.detach() for x in (*outputs, *gradients)]


def halve(given):
    """Other inputs in the same memory."""
    with torch.no_grad():
        for x in given.values():
            if x is not None and x.is_floating_point():
                x.mul_(0.5)


def assert_same_bits(actual, expected):
    assert len(actual) == len(expected)
    for number, (a, b) in enumerate(zip(actual, expected)):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)), f"result {number}"


# ------------------------------------------------------------------------------------------------ every op, small


@on_both_backends
@every_case
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_replays_in_a_cuda_graph(name, number, backend, dtype):
    """A replay gives the bits of an eager call on what the inputs hold by then."""
    case = big_cases()[name][number]
    with on_backend(backend, case.op):
        other = tensors(case, dtype)
        halve(other)
        expected = results(name, case, other)
        given = tensors(case, dtype)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # compiles, and lets cuBLAS take its workspace
            results(name, case, given)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = results(name, case, given)
        halve(given)
        for x in captured:
            x.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert_same_bits(captured, expected)


@on_both_backends
@every_case
def test_no_wait_for_the_device(name, number, backend):
    case = big_cases()[name][number]
    with on_backend(backend, case.op):
        given = tensors(case, torch.float32)
        results(name, case, given)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            results(name, case, given)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@on_both_backends
@every_case
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_same_input_same_bits(name, number, backend, dtype):
    case = big_cases()[name][number]
    with on_backend(backend, case.op):
        once = results(name, case, tensors(case, dtype))
        for _ in range(3):
            assert_same_bits(results(name, case, tensors(case, dtype)), once)


@on_both_backends
@every_case
def test_current_stream(name, number, backend):
    """The inputs are written late in the op's own stream: a kernel in another stream would not see them."""
    case = big_cases()[name][number]
    with on_backend(backend, case.op):
        source, given = tensors(case, torch.float32), tensors(case, torch.float32)
        halve(source)
        expected = results(name, case, source)
        torch.cuda.synchronize()
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(20_000_000)  # clock cycles, about 10 ms
            halve(given)
            actual = results(name, case, given)
        side.synchronize()
        assert_same_bits(actual, expected)


@on_both_backends
@every_case
def test_second_device(name, number, backend):
    """The tensors' device counts, not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    case = big_cases()[name][number]
    moved = {key: x if x is None else x.to("cuda:1") for key, x in case.inputs.items()}
    with on_backend(backend, case.op):
        expected = results(name, case, tensors(case, torch.float32))
        actual = results(name, case, tensors(case._replace(inputs=moved), torch.float32))
        for a, b in zip(actual, expected):
            assert a.device == torch.device("cuda:1")
            oracle.close(a.cpu(), b.cpu(), rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- large


def needs(gib):
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free:.0f} are")


@on_both_backends
def test_more_than_2_31_logits(backend):
    """Forward, and backward into the logits' own memory; some rows against fp64, the sum of every row's gradient."""
    needs(12)
    rows, vocabulary = 20_000, 128_256
    with on_backend(backend, "token_logprobs"):
        logits = torch.empty(rows, vocabulary, dtype=torch.bfloat16).normal_(0, 3)
        assert logits.numel() > 2**31
        tokens, mask = torch.randint(vocabulary, (rows,)), torch.rand(rows) < 0.9
        boundary = 2**31 // vocabulary  # the row in which element 2³¹ lies
        chosen = torch.tensor([0, 1, boundary - 1, boundary, boundary + 1, 18_000, rows - 2, rows - 1])
        mask[chosen] = True
        upstream = torch.randint(1, 9, (rows,)).float() / 8
        exact = logits[chosen].double().log_softmax(-1)
        logits.requires_grad_()
        logprobs = rk.token_logprobs(logits, tokens, mask, grad_buffer=logits)
        oracle.close(logprobs[chosen].detach(), exact.gather(1, tokens[chosen, None])[:, 0])
        assert (logprobs[~mask] == 0).all()
        (gradient,) = torch.autograd.grad(logprobs, logits, upstream)
        assert gradient.data_ptr() == logits.data_ptr()
        wanted = torch.nn.functional.one_hot(tokens[chosen], vocabulary) - exact.exp()
        oracle.close(gradient[chosen], wanted * upstream[chosen, None], rtol=2**-7, atol=1e-7)
        sums = torch.stack([part.float().sum(1).abs().max() for part in gradient.split(1000)])
        assert sums.max() < 0.02  # rounding to bf16; a row that was not written would be −1 · upstream or logits
        for part, counts in zip(gradient.split(1000), mask.split(1000)):
            assert (part[~counts] == 0).all()


@on_both_backends
def test_linear_logprobs_keeps_to_its_budget(backend):
    """No [N, V] tensor: 1 GiB of fp32 logits in a chunk of 64 MiB, forward and backward."""
    needs(4)
    with on_backend(backend, "linear_logprobs"):
        hidden = torch.randn(8192, 64, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(32_768, 64, dtype=torch.bfloat16, requires_grad=True)
        tokens, budget = torch.randint(len(weight), (len(hidden),)), 64 << 20

        def run():
            logprobs = rk.linear_logprobs(hidden, weight, tokens, memory_budget=budget)
            return torch.autograd.grad(logprobs.sum(), (hidden, weight))

        run()  # compiles, and lets cuBLAS take its workspace
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        assert torch.cuda.max_memory_allocated() - before < budget + (64 << 20)

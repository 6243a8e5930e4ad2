import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("token_logprobs",)


def inputs(shape, mask="random"):
    *rows, vocabulary = shape
    return {
        "logits": 3 * torch.randn(shape, dtype=torch.float64),
        "tokens": torch.randint(vocabulary, rows),
        "mask": oracle.masks(*rows)[mask],
    }


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32))
def test_known_values(backend_name, dtype):
    logits = torch.tensor([[1, 2, 3, 0]], dtype=dtype)
    logprobs, entropy = rk.token_logprobs_entropy(logits, torch.tensor([2]))
    close(logprobs, [3 - 3.440190])
    close(entropy, [0.947537])
    close(rk.token_logprobs(logits, torch.tensor([3])), [-3.440190])
    # temperature 2 halves the logits; a soft cap of 1 sends them through tanh: z = tanh([1, 2, 3, 0])
    z = [math.tanh(x) for x in (1, 2, 3, 0)]
    expected = z[2] - math.log(sum(map(math.exp, z)))
    close(rk.token_logprobs(logits, torch.tensor([2]), softcap=1.0), [expected])
    close(rk.token_logprobs(2 * logits, torch.tensor([2]), temperature=2.0), [-0.440190])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", oracle.LOGIT_SHAPES, ids=str)
def test_matches_formula(backend_name, shape, dtype):
    compare(rk.token_logprobs_entropy, oracle.token_logprobs_entropy, inputs(shape), wrt=("logits",), dtype=dtype)


@pytest.mark.parametrize("scalars", ({"temperature": 0.7}, {"softcap": 2.0}, {"temperature": 1.3, "softcap": 5.0}))
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_scalars_and_layouts(backend_name, dtype, layout, scalars):
    for op, formula in (
        (rk.token_logprobs_entropy, oracle.token_logprobs_entropy),
        (rk.token_logprobs, oracle.token_logprobs),
    ):
        compare(op, formula, inputs((3, 5, 7)), wrt=("logits",), dtype=dtype, layout=layout, **scalars)


@pytest.mark.parametrize("mask", ("random", "none", "all"))
@pytest.mark.parametrize("shape", ((6, 13), (2, 3, 4, 5), (9,)), ids=str)
def test_masks_and_leading_dimensions(backend_name, shape, mask):
    given = inputs(shape if len(shape) > 1 else (1, *shape), mask)
    if len(shape) == 1:
        given = {name: x[0] for name, x in given.items()}
    compare(rk.token_logprobs_entropy, oracle.token_logprobs_entropy, given, wrt=("logits",))


@pytest.mark.parametrize("vocabulary", (7, 33, 50257))
def test_shifted_view_is_used_in_place(backend_name, vocabulary):
    """logits[:, :-1] against tokens[:, 1:], the shift of every trainer; an odd V leaves rows unaligned."""
    logits = torch.randn(2, 4, vocabulary, requires_grad=True)
    tokens = torch.randint(vocabulary, (2, 4))
    shifted = rk.token_logprobs(logits[:, :-1], tokens[:, 1:])
    close(shifted, oracle.token_logprobs(logits.detach()[:, :-1].double(), tokens[:, 1:]))
    shifted.sum().backward()
    assert (logits.grad[:, -1] == 0).all()
    close(logits.grad.sum(-1), torch.zeros(2, 4), atol=2e-5)


def test_expanded_inputs_and_gradients(backend_name):
    row = torch.randn(7, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor(3).expand(2, 3)
    logprobs, entropy = rk.token_logprobs_entropy(row.expand(2, 3, 7), tokens, torch.tensor(True).expand(2, 3))
    (logprobs.sum() + entropy.sum()).backward()  # sum gives upstream gradients of stride 0
    expected_row = row.detach().clone().requires_grad_()
    expected, expected_entropy = oracle.token_logprobs_entropy(expected_row.expand(6, 7), tokens.flatten())
    (expected.sum() + expected_entropy.sum()).backward()
    close(logprobs.flatten(), expected, rtol=1e-12)
    close(row.grad, expected_row.grad, rtol=1e-10)


def test_int32_tokens_float_masks_and_negative_tokens(backend_name):
    given = inputs((4, 5, 7))
    logits, tokens, mask = given.values()
    expected = rk.token_logprobs(logits, tokens, mask)
    assert torch.equal(rk.token_logprobs(logits, tokens.int(), mask.float()), expected)
    assert torch.equal(rk.token_logprobs(logits, tokens, mask.long()), expected)
    assert torch.equal(rk.token_logprobs(logits, tokens.masked_fill(~mask, -100)), expected)


def test_token_out_of_range(backend_name):
    logits, tokens = torch.randn(2, 3, 7), torch.full((2, 3), 9)
    with oracle.refuses(r"^token_logprobs: tokens must be below V = 7, got 9$"):
        assert rk.token_logprobs(logits, tokens).isnan().all()
    assert (rk.token_logprobs(logits, tokens, torch.zeros(2, 3)) == 0).all()  # never read where masked


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_masked_rows_are_never_read(backend_name, garbage):
    logits, tokens, mask = inputs((4, 5, 7)).values()
    results = []
    for value in (0.0, garbage):
        x = oracle.poison(logits, mask, value).requires_grad_()
        logprobs, entropy = rk.token_logprobs_entropy(x, tokens, mask)
        upstream = oracle.poison(torch.ones(4, 5, dtype=x.dtype), mask, value)
        (gradient,) = torch.autograd.grad([logprobs, entropy], x, [upstream, upstream])
        results.append((logprobs.detach(), entropy.detach(), gradient))
    for clean, poisoned in zip(*results):
        assert torch.equal(clean, poisoned)
    assert (results[1][2][~mask] == 0).all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32, torch.bfloat16), ids=str)
def test_forbidden_tokens(backend_name, dtype):
    """−inf logits: a whole first block of them, a forbidden target, and a row of nothing else."""
    logits = torch.randn(4, 1000).to(dtype)
    logits[0, :900] = -math.inf
    logits[1, 5:] = -math.inf
    logits[2] = -math.inf
    logits[3] = -math.inf
    logits[3, 8] = 2.0
    tokens = torch.tensor([950, 10, 0, 8])
    x = logits.clone().requires_grad_()
    logprobs, entropy = rk.token_logprobs_entropy(x, tokens)
    allowed = logits[0, 900:].double().log_softmax(-1)
    close(logprobs.detach(), torch.stack([allowed[50], *torch.tensor([-math.inf, -math.inf, 0.0])]))
    expected = [-(allowed.exp() * allowed).sum(), -(p := logits[1, :5].double().softmax(-1)) @ p.log(), 0, 0]
    close(entropy.detach(), [float(h) for h in expected])
    for output in (logprobs, entropy):
        (gradient,) = torch.autograd.grad(output.sum(), x, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient[logits == -math.inf] == 0).all()
    close(gradient[0].sum().double(), 0.0, atol=1e-2 if dtype == torch.bfloat16 else 1e-5)


def test_soft_cap_keeps_forbidden_tokens_forbidden(backend_name):
    """tanh would make −softcap of −inf."""
    logits = torch.tensor([[0.0, -math.inf, 0.0]], requires_grad=True)
    logprobs, entropy = rk.token_logprobs_entropy(logits, torch.tensor([0]), softcap=1.0)
    close(logprobs.detach(), [-math.log(2)])
    close(entropy.detach(), [math.log(2)])
    logprobs.sum().backward()
    close(logits.grad, [[0.5, 0, -0.5]])


def test_offsets_beyond_32_bits(backend_name, tmp_path):
    """The last row of more than 2³¹ logits, in a sparse file of which nothing else is read."""
    if backend_name == "torch":
        pytest.skip("the torch backend copies the logits")
    if oracle.DEVICE != "cpu":
        pytest.skip("a GPU reads no sparse file; test_gpu.py has logits of that size")
    rows, vocabulary = 2**11 + 1, 2**20
    logits = torch.from_file(str(tmp_path / "logits"), True, rows * vocabulary, dtype=torch.bfloat16)
    logits = logits.view(rows, vocabulary)
    logits[-1, 5] = math.log(vocabulary)
    tokens, mask = torch.full((rows,), 5), torch.arange(rows) == rows - 1
    logprobs = rk.token_logprobs(logits, tokens, mask)
    assert logits[-1, 5] == 13.875  # log(2^20) in bf16
    # a million equal terms, which a scalar build adds one by one
    close(logprobs[-1], 13.875 - math.log(vocabulary - 1 + math.exp(13.875)), atol=2e-5)
    assert (logprobs[:-1] == 0).all()


def test_large_common_offset(backend_name):
    logits, tokens, _ = inputs((3, 5, 33)).values()
    logits = (logits * 8).round() / 8  # exact in fp32 at 1e4
    expected = oracle.token_logprobs_entropy(logits, tokens)
    for offset in (1e4, -1e4):
        x = (logits + offset).float().requires_grad_()
        logprobs, entropy = rk.token_logprobs_entropy(x, tokens)
        close(logprobs.detach(), expected[0])
        close(entropy.detach(), expected[1])
        logprobs.sum().backward()
        # The backward pass reads an fp32 logsumexp, rounded to 5e-4 at 1e4.
        close(x.grad, torch.nn.functional.one_hot(tokens, 33) - logits.softmax(-1), atol=5e-4)


def test_one_output_used(backend_name):
    """The upstream gradient of the unused output is None."""
    logits, tokens, mask = inputs((4, 5, 7)).values()
    logits.requires_grad_()
    both = torch.autograd.grad([x.sum() for x in rk.token_logprobs_entropy(logits, tokens, mask)], logits)[0]
    alone = [torch.autograd.grad(rk.token_logprobs_entropy(logits, tokens, mask)[i].sum(), logits)[0] for i in (0, 1)]
    reference = [
        torch.autograd.grad(oracle.token_logprobs_entropy(logits, tokens, mask)[i].sum(), logits)[0] for i in (0, 1)
    ]
    for got, wanted in zip([*alone, both], [*reference, sum(reference)]):
        close(got, wanted, rtol=1e-10, atol=1e-12)


def test_gradcheck(backend_name):
    logits, tokens, mask = inputs((3, 2, 5)).values()

    def op(x):
        return rk.token_logprobs_entropy(x, tokens, mask, temperature=0.8, softcap=4.0)

    assert torch.autograd.gradcheck(op, logits.requires_grad_())


@oracle.property_test
@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16))
def test_batch_makes_no_difference(backend_name, rows, columns, left, right, seed):
    """A token's result is the same bits in a padded and permuted batch, and alone."""
    torch.manual_seed(seed)
    given = inputs((rows, columns, 11))
    order = torch.randperm(rows)
    expected = rk.token_logprobs_entropy(**given)
    moved = rk.token_logprobs_entropy(**{name: oracle.rearrange(x, order, left, right) for name, x in given.items()})
    single = [rk.token_logprobs_entropy(**{name: x[:1, :1] for name, x in given.items()})]
    for i, wanted in enumerate(expected):
        assert torch.equal(oracle.restore(moved[i], order, left, right), wanted)
        assert torch.equal(single[0][i], wanted[:1, :1])

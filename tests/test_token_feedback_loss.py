import math

import pytest
import torch

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("token_feedback_loss",)
KINDS = ("bandit", "unlikelihood")


def formula(logits, ref_logits, tokens, labels, *, beta, kind="bandit"):
    """(loss, stats in the order of TokenFeedbackStats), token by token."""
    terms, kls, logprobs = [], [], {1: [], -1: []}
    for row, ref_row, token, label in zip(
        logits.flatten(0, -2), ref_logits.flatten(0, -2), tokens.flatten().tolist(), labels.flatten()
    ):
        if token < 0:
            continue
        logp, logq = row.log_softmax(-1), ref_row.log_softmax(-1)
        kls.append((logq.exp() * (logq - logp)).sum())
        if label != 0:
            logprobs[int(label.sign())].append(logp[token])
        if kind == "bandit":
            tilted = logq.index_put((torch.tensor(token),), logq[token] + label / beta)
            target = tilted.log_softmax(-1)
            terms.append((target.exp() * (target - logp)).sum())
        elif label > 0:
            terms.append(-label * logp[token])
        elif label < 0:
            others = torch.cat([logp[:token], logp[token + 1 :]]).logsumexp(-1)
            terms.append(label * others)  # log(1 − p) is the log of all the others' probability
        else:
            terms.append(beta * kls[-1])

    def mean(values):
        return sum(values, logits.new_zeros(())) / max(len(values), 1)

    stats = mean(logprobs[1]), mean(logprobs[-1]), mean(kls), logits.new_tensor(len(terms))
    return mean(terms) + 0 * logits.sum(), tuple(x.detach() for x in stats)


def inputs(shape, labels=(-1.5, 0.0, 0.5)):
    logits, ref_logits = 2 * torch.randn(2, *shape, dtype=torch.float64)
    rows = shape[:-1]
    return {
        "logits": logits,
        "ref_logits": ref_logits,
        "tokens": torch.randint(-1, shape[-1], rows),  # a few of them padding
        "labels": torch.tensor(labels, dtype=torch.float64)[torch.randint(len(labels), rows)],
    }


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_values(backend_name, dtype):
    """ref(y) = .3, label −1, beta .5: π*(y) = .054821; unlikelihood −log(1 − .3) = .356675."""
    ref_logits = torch.tensor([[0.3, 0.7]], dtype=dtype).log()
    token, bad = torch.tensor([0]), torch.tensor([-1.0], dtype=dtype)
    optimum = 0.054821
    logits = ref_logits.clone().requires_grad_()
    loss, stats = rk.token_feedback_loss(logits, ref_logits, token, bad, beta=0.5)
    target = (optimum, 1 - optimum)
    close(loss.detach(), sum(p * math.log(p / q) for p, q in zip(target, (0.3, 0.7))))
    loss.backward()
    close(logits.grad, [[0.3 - optimum, 0.7 - (1 - optimum)]])  # cross-entropy to π*: p − π*
    close(stats.logprob_bad, math.log(0.3))
    assert stats.tokens == 1
    assert stats.logprob_good == 0
    close(stats.kl, 0.0)
    # at its optimum the loss and its gradient vanish
    logits = torch.tensor([target], dtype=dtype).log().requires_grad_()
    loss, _ = rk.token_feedback_loss(logits, ref_logits, token, bad, beta=0.5)
    close(loss.detach(), 0.0)
    close(torch.autograd.grad(loss, logits)[0], [[0.0, 0]])
    logits = ref_logits.clone().requires_grad_()
    loss, _ = rk.token_feedback_loss(logits, ref_logits, token, bad, beta=0.5, kind="unlikelihood")
    close(loss.detach(), 0.356675)
    close(torch.autograd.grad(loss, logits)[0], [[0.3 / 0.7 * 0.7, -0.3 / 0.7 * 0.7]])
    loss, _ = rk.token_feedback_loss(ref_logits, ref_logits, token, -2 * bad, beta=0.5, kind="unlikelihood")
    close(loss, -2 * math.log(0.3))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("shape", ((0, 3, 7), (2, 1, 7), (3, 5, 7), (9, 33), (2, 2, 4097)), ids=str)
def test_matches_formula(backend_name, shape, dtype, kind):
    given = inputs(shape)
    compare(rk.token_feedback_loss, formula, given, wrt=("logits",), dtype=dtype, beta=0.4, kind=kind, atol=5e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_layouts(backend_name, layout, kind):
    given = inputs((3, 5, 7))
    compare(rk.token_feedback_loss, formula, given, wrt=("logits",), layout=layout, beta=2.0, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_vocabulary_of_one(backend_name, kind):
    """Nothing to choose: a certain token gives a finite loss and no gradient."""
    for label in (-1.0, 0.0, 1.0):
        logits = torch.randn(3, 1, requires_grad=True)
        loss, _ = rk.token_feedback_loss(
            logits, torch.randn(3, 1), torch.zeros(3).long(), torch.full((3,), label), beta=0.5, kind=kind
        )
        assert loss.isfinite()
        loss.backward()
        assert (logits.grad == 0).all()


@pytest.mark.parametrize("label", (60.0, -60.0))
def test_extreme_label(backend_name, label):
    """label / beta = ±600 overflows exp in every dtype but fp64; π* becomes certain of the token, or free of it."""
    logits, ref_logits = torch.randn(2, 1, 5)
    logits.requires_grad_()
    loss, _ = rk.token_feedback_loss(logits, ref_logits, torch.tensor([2]), torch.tensor([label]), beta=0.1)
    target = torch.tensor([[0.0, 0, 1, 0, 0]])
    if label < 0:
        target = ref_logits.index_fill(1, torch.tensor([2]), -math.inf).softmax(-1)
    close(torch.autograd.grad(loss, logits)[0], logits.detach().softmax(-1) - target)
    cross_entropy = -(target * logits.detach().log_softmax(-1)).sum()
    close(loss.detach(), cross_entropy + torch.xlogy(target, target).sum())


def test_certain_bad_token_is_bounded(backend_name):
    """log(1 − p) at p = 1: the log-probability is held at −1e-6, so the loss is −log(1e-6) and no inf."""
    logits = torch.tensor([[200.0, 0.0]], requires_grad=True)
    loss, _ = rk.token_feedback_loss(
        logits, torch.zeros(1, 2), torch.tensor([0]), torch.tensor([-1.0]), beta=0.5, kind="unlikelihood"
    )
    close(loss.detach(), -math.log(1e-6))
    assert torch.autograd.grad(loss, logits)[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_forbidden_tokens(backend_name, kind):
    """Tokens forbidden in both take no part."""
    given = inputs((4, 5, 9))
    given["tokens"] = given["tokens"].clamp(max=5)
    for name in ("logits", "ref_logits"):
        given[name][..., 6:] = -math.inf
    values, (gradient,), _ = oracle.evaluate(rk.token_feedback_loss, given, ("logits",), {"beta": 0.5, "kind": kind})
    cut = given | {name: given[name][..., :6] for name in ("logits", "ref_logits")}
    expected, (expected_gradient,), _ = oracle.evaluate(formula, cut, ("logits",), {"beta": 0.5, "kind": kind})
    for a, b in zip([*values, gradient[..., :6]], [*expected, expected_gradient]):
        close(a, b, rtol=1e-10)
    assert (gradient[..., 6:] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
def test_padding_is_never_read(backend_name, garbage, kind):
    clean = inputs((4, 5, 7))
    valid = clean["tokens"] >= 0
    assert not valid.all()
    poisoned = {name: oracle.poison(x, valid, garbage) for name, x in clean.items() if name != "tokens"}
    results = [
        oracle.evaluate(rk.token_feedback_loss, clean | given, ("logits",), {"beta": 0.5, "kind": kind})
        for given in ({}, poisoned)
    ]
    for a, b in zip(results[0][0] + results[0][1], results[1][0] + results[1][1]):
        assert torch.equal(a, b)
    assert (results[1][1][0][~valid] == 0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_all_padding_is_zero_and_in_the_graph(backend_name, kind):
    logits = torch.full((2, 3, 5), math.nan, requires_grad=True)
    loss, stats = rk.token_feedback_loss(
        logits, logits.detach(), torch.full((2, 3), -100), torch.ones(2, 3), beta=0.5, kind=kind
    )
    assert loss == 0
    assert all(x == 0 for x in stats)
    loss.backward()
    assert (logits.grad == 0).all()


def test_labels_without_gradient_to_the_reference(backend_name):
    given = inputs((3, 5, 7))
    for name in ("logits", "ref_logits", "labels"):
        given[name].requires_grad_()
    rk.token_feedback_loss(**given, beta=0.5)[0].backward()
    assert given["logits"].grad is not None
    assert given["ref_logits"].grad is None
    assert given["labels"].grad is None


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(backend_name, kind):
    given = inputs((4, 5))

    def op(logits):
        return rk.token_feedback_loss(**given | {"logits": logits}, beta=0.5, kind=kind)[0]

    assert torch.autograd.gradcheck(op, given["logits"].requires_grad_())

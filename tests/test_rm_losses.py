import math
from itertools import combinations

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("rm_pairwise_loss", "rm_listwise_loss", "rm_regression_loss")

SCORES = [1.2, 0.3, -0.5, 0.3]


def pairwise(scores, chosen, rejected, prompts=None, margin=None, *, center_coef=0.0):
    """(loss, stats in the order of RMPairwiseStats)."""
    better, worse = scores[chosen], scores[rejected]
    required = better - worse if margin is None else better - worse - margin
    terms = -F.logsigmoid(required) + center_coef * (better + worse) ** 2

    def mean(x):
        groups = [x] if prompts is None else [x[prompts == prompt] for prompt in prompts.unique()]
        return sum((oracle.mean(group) for group in groups), x.sum() * 0) / max(len(groups), 1)

    report = ((better > worse).to(scores), better - worse, better, worse)
    return mean(terms), tuple(mean(x).detach() for x in report)


def listwise(scores, ranks, prompts):
    loss = scores.sum() * 0
    right = pairs = top = tops = 0
    for prompt in prompts.unique():
        s, r = scores[prompts == prompt], ranks[prompts == prompt]
        for i in range(len(s)):
            loss = loss + torch.cat([s[i : i + 1], s[r > r[i]]]).logsumexp(0) - s[i]
            right, pairs = right + int((s[i] > s[r > r[i]]).sum()), pairs + int((r > r[i]).sum())
            if r[i] == r.min() < r.max():
                top, tops = top + bool(s[i] == s.max()), tops + 1
    stats = (right / max(pairs, 1), top / max(tops, 1))
    return loss / max(len(prompts.unique()), 1), tuple(map(scores.new_tensor, stats))


def regression(scores, targets):
    error = scores - targets
    correlation = torch.corrcoef(torch.stack([scores, targets]))[0, 1] if len(scores) > 1 else error.sum() * 0
    return oracle.mean(error**2), (correlation.detach(), oracle.mean(error).detach())


def pair_inputs(responses, pairs, prompts=3):
    chosen, rejected = torch.randint(max(responses, 1), (2, pairs))
    return {
        "scores": 2 * torch.randn(responses, dtype=torch.float64),
        "chosen": chosen,
        "rejected": rejected,
        "prompts": 5 * torch.randint(prompts, (pairs,)) - 3,
        "margin": torch.rand(pairs, dtype=torch.float64),
    }


def list_inputs(responses, prompts):
    return {
        "scores": 2 * torch.randn(responses, dtype=torch.float64),
        "ranks": torch.randint(4, (responses,)),  # with ties and gaps
        "prompts": torch.randint(prompts, (responses,)),
    }


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_pairs(backend_name, dtype):
    """Ranks 0, 1, 2, 1: the tie is dropped, five pairs of one prompt are left."""
    scores, ranks = torch.tensor(SCORES, dtype=dtype), [0, 1, 2, 1]
    pairs = [(i, j) if ranks[i] < ranks[j] else (j, i) for i, j in combinations(range(4), 2) if ranks[i] != ranks[j]]
    chosen, rejected = torch.tensor(pairs).T
    for prompts in (None, torch.zeros(5).long()):
        loss, stats = rk.rm_pairwise_loss(scores, chosen, rejected, prompts)
        close(loss, 0.318459)
        assert stats.accuracy == 1
        close(stats.margin, (0.9 + 1.7 + 0.9 + 0.8 + 0.8) / 5)
        close(stats.chosen_score, (1.2 * 3 + 0.3 * 2) / 5)
        close(stats.rejected_score, (0.3 * 2 - 0.5 * 3) / 5)
    first, second = torch.tensor([0]), torch.tensor([1])
    margin = torch.tensor([0.5], dtype=dtype)
    close(rk.rm_pairwise_loss(scores, first, second, margin=margin)[0], 0.513015)
    centered = rk.rm_pairwise_loss(scores, first, second, center_coef=0.01)[0]
    close(centered - rk.rm_pairwise_loss(scores, first, second)[0], 0.0225)


def test_a_prompt_weighs_as_one(backend_name):
    """Three pairs of one prompt and one of another: the mean within the first counts half."""
    scores = torch.tensor([0.0, 1, 2, 3, 5])
    chosen, rejected = torch.tensor([2, 2, 1, 4]), torch.tensor([1, 0, 0, 3])
    loss, stats = rk.rm_pairwise_loss(scores, chosen, rejected, torch.tensor([7, 7, 7, -1]))
    softplus = [math.log1p(math.exp(-d)) for d in (1, 2, 1, 2)]
    close(loss, (sum(softplus[:3]) / 3 + softplus[3]) / 2)
    close(stats.margin, (4 / 3 + 2) / 2)
    close(rk.rm_pairwise_loss(scores, chosen, rejected)[0], sum(softplus) / 4)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_rankings(backend_name, dtype):
    scores = torch.tensor(SCORES[:3], dtype=dtype)
    one = torch.zeros(3).long()
    loss, stats = rk.rm_listwise_loss(scores, torch.tensor([0, 1, 2]), one)
    close(loss, 0.834364876)
    assert stats.accuracy == stats.top1_accuracy == 1
    close(rk.rm_listwise_loss(scores, torch.tensor([0, 1, 1]), one)[0], 0.463264)  # top-1: the rest tie
    loss, stats = rk.rm_listwise_loss(scores, torch.tensor([2, 1, 0]), one)
    assert stats.accuracy == stats.top1_accuracy == 0
    # two responses are a Bradley–Terry pair, and prompts are averaged
    pair = rk.rm_pairwise_loss(scores, torch.tensor([0]), torch.tensor([1]))[0]
    close(rk.rm_listwise_loss(scores, torch.tensor([0, 3, 0]), torch.tensor([8, 8, 2]))[0], pair.item() / 2)


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_regression(backend_name, dtype):
    scores, targets = torch.tensor([1, 2, 3], dtype=dtype), torch.tensor([1, 4, 4], dtype=dtype)
    loss, stats = rk.rm_regression_loss(scores, targets)
    close(loss, 5 / 3)
    close(stats.bias, -1.0)
    close(stats.correlation, 3 / math.sqrt(2 * 6))
    assert rk.rm_regression_loss(scores, torch.ones_like(scores))[1].correlation == 0


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_match_formulas(backend_name, layout, dtype):
    same = {"wrt": ("scores",), "layout": layout, "dtype": dtype}
    for responses, pairs in ((0, 0), (1, 0), (2, 1), (9, 30)):
        given = pair_inputs(responses, pairs)
        compare(rk.rm_pairwise_loss, pairwise, given, **same, center_coef=0.01)
        bare = {name: given[name] for name in ("scores", "chosen", "rejected")}
        compare(rk.rm_pairwise_loss, pairwise, bare, **same)
    for responses, prompts in ((0, 1), (1, 1), (2, 1), (5, 5), (24, 4)):
        compare(rk.rm_listwise_loss, listwise, list_inputs(responses, prompts), **same)
    for responses in (0, 1, 2, 40):
        scores, targets = torch.randn(2, responses, dtype=torch.float64)
        compare(rk.rm_regression_loss, regression, {"scores": scores, "targets": targets}, **same)


def test_far_apart_scores(backend_name):
    """log(sigmoid) would be −inf beyond 103, log(1 + exp) inf beyond 88."""
    scores = torch.tensor([500.0, -500.0], requires_grad=True)
    right, wrong = torch.tensor([0]), torch.tensor([1])
    for chosen, rejected, expected, gradient in ((right, wrong, 0, [0.0, 0]), (wrong, right, 1000, [1.0, -1])):
        loss, _ = rk.rm_pairwise_loss(scores, chosen, rejected)
        close(loss.detach(), expected)
        close(torch.autograd.grad(loss, scores)[0], gradient)
        ranks = torch.tensor([0, 1]) if chosen is right else torch.tensor([1, 0])
        loss, _ = rk.rm_listwise_loss(scores, ranks, torch.zeros(2).long())
        close(loss.detach(), expected)
        close(torch.autograd.grad(loss, scores)[0], gradient)


def test_nothing_to_learn_from_is_zero_and_in_the_graph(backend_name):
    none = torch.zeros(0).long()
    scores, empty = torch.randn(3, requires_grad=True), torch.zeros(0, requires_grad=True)
    losses = (
        rk.rm_pairwise_loss(scores, none, none, none)[0],
        rk.rm_listwise_loss(scores, torch.zeros(3).long(), torch.zeros(3).long())[0],  # all tied
        rk.rm_listwise_loss(empty, none, none)[0],
        rk.rm_regression_loss(empty, torch.zeros(0))[0],
    )
    for loss in losses:
        assert loss == 0
        loss.backward()
    assert (scores.grad == 0).all()


@pytest.mark.parametrize(("dtype", "rtol"), ((torch.float64, 1e-9), (torch.float32, 1e-4)), ids=str)
def test_more_responses_than_a_tile(backend_name, dtype, rtol):
    scores, targets = torch.randn(2, 1100, dtype=torch.float64)
    for op, sample in (
        (rk.rm_pairwise_loss, pair_inputs(130, 200, 9)),
        (rk.rm_pairwise_loss, pair_inputs(20, 200, 9)),  # only the pairs fill more than one
        (rk.rm_pairwise_loss, pair_inputs(130, 20, 9)),  # only the scores do
        (rk.rm_listwise_loss, list_inputs(130, 9)),
        (rk.rm_regression_loss, {"scores": scores, "targets": targets}),
    ):
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in sample.items()}
        values, (gradient,), _ = oracle.evaluate(op, given, ("scores",), {})
        with rk.use_backend("torch"):
            expected, (expected_gradient,), _ = oracle.evaluate(op, given, ("scores",), {})
        for a, b in zip([*values, gradient], [*expected, expected_gradient]):
            close(a, b, rtol=rtol, atol=rtol / 100)


def test_gradcheck(backend_name):
    pairs, lists, targets = pair_inputs(5, 8), list_inputs(6, 2), torch.randn(5, dtype=torch.float64)
    ops = (
        lambda x: rk.rm_pairwise_loss(**pairs | {"scores": x}, center_coef=0.1)[0],
        lambda x: rk.rm_regression_loss(x, targets)[0],
    )
    for op in ops:
        assert torch.autograd.gradcheck(op, pairs["scores"].requires_grad_())
    assert torch.autograd.gradcheck(
        lambda x: rk.rm_listwise_loss(**lists | {"scores": x})[0], lists["scores"].requires_grad_()
    )


@oracle.property_test
@given(st.integers(1, 9), st.integers(1, 12), st.integers(1, 3), st.integers(0, 2**16))
def test_order_makes_no_difference(backend_name, responses, pairs, prompts, seed):
    """Responses and pairs shuffled, prompts renamed, responses added that stand in no pair."""
    torch.manual_seed(seed)
    given, lists = pair_inputs(responses, pairs, prompts), list_inputs(responses, prompts)
    order, among = torch.randperm(responses + 2), torch.randperm(pairs)
    place = order.argsort()
    scores = torch.cat([given["scores"], torch.full((2,), 77.0, dtype=torch.float64)])[order]
    moved = {
        "scores": scores,
        "chosen": place[given["chosen"]][among],
        "rejected": place[given["rejected"]][among],
        "prompts": 100 - given["prompts"][among],
        "margin": given["margin"][among],
    }
    shuffle = torch.randperm(responses)
    shuffled = {name: x[shuffle] for name, x in lists.items()} | {"prompts": 100 - lists["prompts"][shuffle]}
    for op, before, after, back in (
        (rk.rm_pairwise_loss, given, moved, place[:responses]),
        (rk.rm_listwise_loss, lists, shuffled, shuffle.argsort()),
    ):
        expected, (expected_gradient,), _ = oracle.evaluate(op, before, ("scores",), {})
        values, (gradient,), _ = oracle.evaluate(op, after, ("scores",), {})
        for a, b in zip(values, expected):
            close(a, b, rtol=1e-10, atol=1e-12)
        close(gradient[back], expected_gradient, rtol=1e-10, atol=1e-12)

import math
from itertools import pairwise

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("align_credit",)


def spans(*rows):
    """[B, T, 2] from lists of (start, end), short rows padded with (−1, −1)."""
    longest = max(map(len, rows))
    return torch.tensor([[*row, *[(-1, -1)] * (longest - len(row))] for row in rows])


def formula(credit, rm_spans, policy_spans):
    """Byte by byte: a token's credit goes to the policy tokens that hold its bytes."""
    result = torch.zeros(policy_spans.shape[:2], dtype=credit.dtype)
    for b in range(len(credit)):
        tokens = [(t, *span) for t, span in enumerate(policy_spans[b].tolist()) if span[1] >= 0]
        for amount, (start, end) in zip(credit[b], rm_spans[b].tolist()):
            if end < 0 or not tokens:
                continue
            in_response = range(max(start, 0), end)
            if end > start:
                amount = amount * len(in_response) / (end - start)
            holders = [t for byte in in_response for t, first, last in tokens if first <= byte < last]
            if not holders:
                empty = [t for t, first, last in tokens if first == last]
                holders = [empty[-1] if empty else tokens[-1][0]]
            for t in holders:
                result[b, t] += amount / len(holders)
    return result


def tokenisation(text, tokens, prompt=0, end_of_sequence=True):
    """Random spans that tile bytes −prompt to text, with an empty end of sequence."""
    cuts = sorted((torch.randperm(text + prompt - 1)[: tokens - 1] + 1 - prompt).tolist())
    edges = [-prompt, *cuts, text]
    return [*pairwise(edges), *([(text, text)] if end_of_sequence else [])]


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_values(backend_name, dtype):
    policy, rm = spans([(0, 3), (3, 7), (7, 12), (12, 12)]), spans([(0, 5), (5, 6), (6, 12), (12, 12)])
    credit = torch.tensor([[0.2, 0.1, 0.4, 0.3]], dtype=dtype)
    close(rk.align_credit(credit, rm, policy), [[0.12, 0.246667, 0.333333, 0.3]])
    signed = torch.tensor([[-0.5, 1.0, 0.6, -0.1]], dtype=dtype)  # −.3, −.2 + 1 + .1, .5, −.1
    close(rk.align_credit(signed, rm, policy), [[-0.3, 0.9, 0.5, -0.1]])


@pytest.mark.parametrize(
    ("rm", "policy", "expected"),
    (
        ([(0, 4), (4, 4)], [(0, 4)], [3.0]),  # no end of sequence in the policy: the last token takes it
        ([(0, 4), (4, 4)], [(0, 4), (4, 4), (4, 4)], [1, 0, 2]),  # the last of two
        ([(0, 4), (4, 4)], [(0, 2), (2, 2), (2, 4)], [0.5, 2, 0.5]),  # which need not stand at the end
        ([(0, 4), (4, 9)], [(0, 4), (4, 4)], [1, 2]),  # text that the policy's tokens do not reach
        ([(-4, 4), (4, 6)], [(0, 4), (4, 6)], [0.5, 2]),  # half of the first token lies in the prompt
        ([(-4, 0), (0, 6)], [(0, 6)], [2.0]),  # all of it
        ([(-1, -1), (0, 6)], [(-1, -1), (0, 3), (3, 6)], [0, 1, 1]),  # left padding
        ([(0, 4), (4, 6)], [(0, 1), (3, 6)], [0.5, 2.5]),  # a gap in the policy's spans
        ([(0, 4), (4, 6)], [(-1, -1), (-1, -1)], [0, 0]),  # nothing to give it to
    ),
)
def test_edges(backend_name, rm, policy, expected):
    credit = torch.tensor([[1.0, 2.0]])
    close(rk.align_credit(credit, spans(rm), spans(policy)), [expected])


def inputs():
    rows = [(12, 5, 7, 0, True), (20, 3, 9, 4, True), (9, 9, 2, 0, False)]
    rm = spans(*(tokenisation(text, a, prompt) for text, a, _, prompt, _ in rows))
    policy = spans(*(tokenisation(text, b, 0, eos) for text, _, b, _, eos in rows))
    return {"credit": torch.randn(rm.shape[:2], dtype=torch.float64), "rm_spans": rm, "policy_spans": policy}


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_matches_formula(backend_name, layout, dtype):
    compare(rk.align_credit, formula, inputs(), layout=layout, dtype=dtype)


@pytest.mark.parametrize(("rows", "rm", "policy"), ((0, 3, 2), (2, 0, 3), (2, 3, 0)))
def test_empty(backend_name, rows, rm, policy):
    result = rk.align_credit(torch.ones(rows, rm), torch.zeros(rows, rm, 2).long(), torch.zeros(rows, policy, 2).long())
    assert result.shape == (rows, policy)
    assert (result == 0).all()


def test_int32_spans(backend_name):
    given = inputs()
    expected = rk.align_credit(**given)
    assert torch.equal(rk.align_credit(given["credit"], given["rm_spans"].int(), given["policy_spans"].int()), expected)


def test_padding_is_never_read(backend_name):
    given = inputs()
    padded = given["rm_spans"][..., 1] < 0
    assert padded.any()
    poisoned = given | {"credit": given["credit"].masked_fill(padded, math.nan)}
    assert torch.equal(rk.align_credit(**poisoned), rk.align_credit(**given))


@oracle.property_test
@given(st.integers(1, 30), st.integers(1, 12), st.integers(1, 12), st.booleans(), st.integers(0, 2**16))
def test_sum_is_kept(backend_name, text, rm_tokens, policy_tokens, end_of_sequence, seed):
    torch.manual_seed(seed)
    rm = spans(tokenisation(text, min(rm_tokens, text)))
    policy = spans(tokenisation(text, min(policy_tokens, text), 0, end_of_sequence))
    credit = torch.randn(rm.shape[:2], dtype=torch.float64)
    there = rk.align_credit(credit, rm, policy)
    close(there.sum(), credit.sum(), rtol=1e-12)
    close(rk.align_credit(credit, rm, rm), credit, rtol=1e-12)  # the same tokens: unchanged


def test_the_order_of_the_policys_tokens_does_not_matter(backend_name):
    """Spans in the order of the text are found by their place, others one by one."""
    rm, policy = tokenisation(40, 9, prompt=3), tokenisation(40, 12)
    credit = torch.randn(1, len(rm))
    expected = rk.align_credit(credit, spans(rm), spans(policy))
    order = torch.randperm(len(policy)).tolist()
    close(rk.align_credit(credit, spans(rm), spans([policy[i] for i in order])), expected[:, order])

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

import oracle
import rlhf_kernels as rk
from oracle import close, compare

OPS = ("attention_row",)


def inputs(batch, heads, kv_heads, columns, dim, mask="random", sink=False):
    query = torch.randn(batch, heads, dim, dtype=torch.float64)
    key = torch.randn(batch, kv_heads, columns, dim, dtype=torch.float64)
    given = {"query": query, "key": key, "key_mask": oracle.masks(batch, columns)[mask]}
    return given | ({"sink": torch.randn(heads, dtype=torch.float64)} if sink else {})


def formula(query, key, key_mask, sink=None, *, scale=None, softcap=None, window=None):
    """Head by head, over the attended keys alone."""
    batch, heads, dim = query.shape
    row = torch.zeros(key_mask.shape, dtype=query.dtype)
    for b in range(batch):
        columns = key_mask[b].nonzero().flatten()
        if window is not None:
            columns = columns[columns > columns[-1:] - window]
        for h in range(heads):
            k = key[b, h // (heads // key.shape[1]), columns]
            scores = (k @ query[b, h]) * (dim**-0.5 if scale is None else scale)
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if sink is not None:
                scores = torch.cat([scores, sink[h : h + 1]])
            row[b, columns] += scores.softmax(0)[: len(columns)] / heads
    return row


@pytest.mark.parametrize("dtype", (torch.float64, torch.float32), ids=str)
def test_known_values(backend_name, dtype):
    """Scores of log 1, log 2, log 3 and log 4: a row of 0.1, 0.2, 0.3, 0.4, and what is left of it."""
    query = torch.ones(1, 1, 1, dtype=dtype)
    key = torch.tensor([1.0, 2, 3, 4], dtype=dtype).log().view(1, 1, 4, 1)
    every = torch.ones(1, 4)
    close(rk.attention_row(query, key, every), [[0.1, 0.2, 0.3, 0.4]])
    close(rk.attention_row(query, key, torch.tensor([[0, 1, 1, 0]])), [[0, 0.4, 0.6, 0]])
    close(rk.attention_row(query, key, every, window=2), [[0, 0, 3 / 7, 4 / 7]])
    close(rk.attention_row(query, key, torch.tensor([[1, 1, 1, 0]]), window=2), [[0, 0.4, 0.6, 0]])
    sink = torch.tensor([math.log(10)], dtype=dtype)
    close(rk.attention_row(query, key, every, sink=sink), [[0.05, 0.1, 0.15, 0.2]])
    close(rk.attention_row(query, key, every, scale=2.0), [[1 / 30, 4 / 30, 9 / 30, 16 / 30]])
    # the mean of this head and one that sees everything alike
    two = torch.tensor([1.0, 0], dtype=dtype).view(1, 2, 1)
    close(rk.attention_row(two, key, every), [[0.175, 0.225, 0.275, 0.325]])


def test_heads_share_keys_in_blocks(backend_name):
    """Of four query heads the first two read key head 0, the others key head 1."""
    query = torch.ones(1, 4, 1)
    key = torch.tensor([[0.0, math.log(3)], [math.log(3), 0.0]]).view(1, 2, 2, 1)
    query[0, :2] = 0  # uniform
    close(rk.attention_row(query, key, torch.ones(1, 2)), [[(0.5 + 0.75) / 2, (0.5 + 0.25) / 2]])


@pytest.mark.parametrize("dtype", oracle.DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", ((0, 2, 1, 5, 4), (3, 4, 2, 0, 8), (1, 1, 1, 1, 1), (3, 4, 4, 7, 5), (4, 6, 2, 33, 16), (1, 2, 1, 300, 64))
)
def test_matches_formula(backend_name, shape, dtype):
    for mask in ("random", "none", "all"):
        compare(rk.attention_row, formula, inputs(*shape, mask), dtype=dtype)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("heads", ((1, 1), (4, 2), (10, 2), (20, 1)), ids=str)
@pytest.mark.parametrize("dim", (64, 80, 128, 256, 320))
def test_head_sizes_of_models(backend_name, dim, heads, dtype):
    compare(rk.attention_row, formula, inputs(2, *heads, 70, dim), dtype=dtype)


@pytest.mark.parametrize("sink", (False, True))
@pytest.mark.parametrize("scalars", ({"scale": 0.3}, {"softcap": 1.5}, {"window": 3}, {"window": 100, "softcap": 4.0}))
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_scalars_and_layouts(backend_name, layout, scalars, sink):
    compare(rk.attention_row, formula, inputs(4, 4, 2, 9, 8, sink=sink), layout=layout, **scalars)


def test_key_as_the_model_has_it(backend_name):
    """[B, T, Hkv, D] in memory, seen through transpose(1, 2), and one key expanded over the batch."""
    given = inputs(3, 4, 2, 9, 8)
    as_projected = given | {"key": given["key"].transpose(1, 2).contiguous().transpose(1, 2)}
    expected = formula(**given)
    close(rk.attention_row(**as_projected), expected, rtol=1e-12)
    shared = given | {"key": given["key"][:1].expand(3, -1, -1, -1)}
    close(rk.attention_row(**shared), formula(**shared), rtol=1e-12)


@pytest.mark.parametrize("garbage", (math.nan, math.inf, -math.inf))
@pytest.mark.parametrize("scalars", ({}, {"softcap": 2.0}, {"window": 2}))
def test_masked_keys_are_never_read(backend_name, scalars, garbage):
    given = inputs(4, 4, 2, 9, 8)
    keys = given["key_mask"][:, None].expand(4, 2, 9)
    poisoned = given | {"key": oracle.poison(given["key"], keys, garbage)}
    row = rk.attention_row(**poisoned, **scalars)
    assert torch.equal(row, rk.attention_row(**given, **scalars))
    assert (row[~given["key_mask"]] == 0).all()
    assert (row[0] == 0).all()  # no key at all


def test_keys_before_the_window_are_never_read(backend_name):
    given = inputs(2, 2, 1, 6, 4, "all")
    clean = rk.attention_row(**given, window=2)
    given["key"][:, :, :4] = math.nan
    assert torch.equal(rk.attention_row(**given, window=2), clean)


def test_huge_scores(backend_name):
    given = inputs(2, 2, 1, 6, 4, "all")
    for factor in (1e4, -1e4):
        scaled = {name: x.float() for name, x in given.items()} | {"query": factor * given["query"].float()}
        row = rk.attention_row(**scaled)
        close(row, formula(**{name: x.double() if name != "key_mask" else x.bool() for name, x in scaled.items()}))
        close(row.sum(-1), torch.ones(2))


@pytest.mark.parametrize("sink", (1e4, -1e4, -math.inf))
def test_extreme_sinks(backend_name, sink):
    given = inputs(3, 2, 1, 6, 4)
    row = rk.attention_row(**given, sink=torch.full((2,), sink, dtype=torch.float64))
    expected = torch.zeros_like(row) if sink > 0 else formula(**given)
    close(row, expected, rtol=1e-12)


def test_sums_to_one(backend_name):
    given = inputs(5, 8, 2, 40, 16)
    row = rk.attention_row(**given)
    close(row.sum(-1), given["key_mask"].any(-1).double(), rtol=1e-12)


@oracle.property_test
@given(st.integers(1, 4), st.integers(1, 9), st.integers(0, 3), st.integers(0, 3), st.integers(0, 2**16))
def test_batch_makes_no_difference(backend_name, rows, columns, left, right, seed):
    torch.manual_seed(seed)
    query, key, key_mask = inputs(rows, 4, 2, columns, 8).values()
    order = torch.randperm(rows)
    keys = oracle.rearrange(key.transpose(1, 2), order, left, right).transpose(1, 2)
    expected = rk.attention_row(query, key, key_mask, window=4)
    moved = rk.attention_row(query[order], keys, oracle.rearrange(key_mask, order, left, right), window=4)
    close(oracle.restore(moved, order, left, right), expected, rtol=1e-12)
    alone = [rk.attention_row(query[b : b + 1], key[b : b + 1], key_mask[b : b + 1], window=4) for b in range(rows)]
    close(torch.cat(alone), expected, rtol=1e-12)

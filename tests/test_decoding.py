"""Nucleus, beam and diverse beam search: by enumeration on a Markov chain, and on a model with its cache."""

import itertools
from types import SimpleNamespace

import pytest
import torch

from rlhf import decoding
from rlhf.data import collate, encode_prompt
from rlhf.decoding import beam_search, nucleus_sample
from rlhf.model import load_policy, response_logits

EOS = 0
TOKENIZER = SimpleNamespace(eos_token_id=EOS, pad_token_id=EOS)


@pytest.fixture
def no_cache(monkeypatch):
    """A chain remembers nothing."""
    monkeypatch.setattr(decoding, "growing_cache", lambda model: {})


class Chain:
    """A model whose next token depends on the last one alone: logits [V, V]."""

    device = torch.device("cpu")

    def __init__(self, logits):
        self.table = logits

    def __call__(self, input_ids, **_):
        return SimpleNamespace(logits=self.table[input_ids[:, -1:]])

    def logprob(self, start, tokens, temperature=1.0):
        table = (self.table / temperature).log_softmax(-1)
        return sum(table[a, b].item() for a, b in itertools.pairwise([start, *tokens]))


def test_a_beam_as_wide_as_all_sequences_ranks_them_all(no_cache):
    chain = Chain(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))
    (found,) = beam_search(chain, TOKENIZER, [[3]], beams=100, response_length=3, temperature=0.7)
    every = [list(each) for n in (1, 2, 3) for each in itertools.product(range(5), repeat=n)]
    every = [each for each in every if EOS not in each[:-1] and (each[-1] == EOS or len(each) == 3)]
    assert len(found) == 21 + 64 and sorted(found) == sorted(every)
    for each in (found[:21], found[21:]):  # those that ended, those that did not
        means = [chain.logprob(3, tokens, 0.7) / len(tokens) for tokens in each]
        assert means == pytest.approx(sorted(means, reverse=True))
    assert all(tokens[-1] == EOS for tokens in found[:21])


def test_two_beams_find_what_greedy_misses(no_cache):
    probability = torch.tensor([[1.0, 0, 0], [0.1, 0.45, 0.45], [0.9, 0.05, 0.05]])
    chain = Chain(torch.cat([probability, torch.tensor([[0.0, 0.6, 0.4]])]).log().nan_to_num(neginf=-1e4))
    chain.table = torch.nn.functional.pad(chain.table, (0, 1), value=-1e4)
    (greedy,) = beam_search(chain, TOKENIZER, [[3]], beams=1, response_length=2)
    (two,) = beam_search(chain, TOKENIZER, [[3]], beams=2, response_length=2)
    assert greedy == [[1, 1]]
    assert two[0] == [2, EOS]  # 0.4 · 0.9 against 0.6 · 0.45


@pytest.mark.parametrize(("diversity", "different"), [(0.0, 1), (100.0, 4)])
def test_a_penalty_makes_groups_differ(no_cache, diversity, different):
    chain = Chain(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))
    found = beam_search(chain, TOKENIZER, [[1], [2]], beams=4, groups=4, diversity=diversity, response_length=3)
    for responses in found:
        assert len(responses) == 4 and len({response[0] for response in responses}) == different


def test_groups_must_divide_the_beams():
    with pytest.raises(ValueError, match="groups must divide beams 4, got 3"):
        beam_search(Chain(torch.zeros(2, 2)), TOKENIZER, [[1]], beams=4, groups=3, response_length=1)


@pytest.fixture(scope="module")
def policy(start):
    return load_policy(start.policy)


def test_one_beam_and_a_small_nucleus_are_greedy(policy):
    model, tokenizer = policy
    prompts = [encode_prompt(tokenizer, text) for text in ("in this film the plot", "as a fan", "the music is not bad")]
    expected = []
    with torch.no_grad():
        for prompt in prompts:
            tokens: list[int] = []
            while len(tokens) < 6 and tokens[-1:] != [tokenizer.eos_token_id]:
                batch = collate([prompt], [[*tokens, 0]], tokenizer.pad_token_id)
                tokens.append(response_logits(model, batch)[0, -1].argmax().item())
            expected.append(tokens)
    assert beam_search(model, tokenizer, prompts, beams=1, response_length=6) == [[each] for each in expected]
    assert nucleus_sample(model, tokenizer, prompts, top_p=1e-6, response_length=6) == expected


def test_padding_does_not_change_what_beams_find(policy):
    model, tokenizer = policy
    prompts = [encode_prompt(tokenizer, text) for text in ("in this film the plot is", "we")]
    settings = {"beams": 4, "groups": 2, "diversity": 0.5, "response_length": 5}
    together = beam_search(model, tokenizer, prompts, **settings)
    alone = [beam_search(model, tokenizer, [prompt], **settings)[0] for prompt in prompts]
    assert together == alone and all(len(each) == 4 for each in together)

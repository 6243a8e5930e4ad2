"""State as safetensors and JSON: what comes back is what went in, and nothing else is taken."""

import math
import pickle
from types import SimpleNamespace

import pytest
import torch

from rlhf.checkpoint import Unreadable, read_state, write_state
from rlhf.data import Demonstration, Ranking
from rlhf.fingerprint import fingerprint
from rlhf.model import load_policy, load_reward_model, load_tokenizer


def same(one, other):
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    return one == other or (one != one and other != other)


def test_state_comes_back_with_its_types(tmp_path):
    state = {
        "tensors": [torch.arange(6.0).view(2, 3).T, torch.tensor(3), torch.zeros(0), torch.ones(2, dtype=torch.bool)],
        "half": torch.tensor([1.0, math.inf], dtype=torch.bfloat16),
        "numbers": [1, True, 0.1, 1e-310, 2**100, math.nan, -math.inf, None],
        "texts": {"": "ü\ud83d", "$tensor": "a key like ours", "x": ("a", ("b",), [])},
        3: {"int keys": {0: 1, (1, 2): "tuple"}},
    }
    write_state(tmp_path, state)
    assert same(read_state(tmp_path), state)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "state.safetensors"]


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_an_optimizer_goes_on_bit_for_bit(tmp_path, kind):
    def step(weight, optimizer, number):
        weight.grad = torch.linspace(-1, 1, 5) * number
        optimizer.step()

    weights = [torch.nn.Parameter(torch.ones(5)) for _ in range(2)]
    options = {"lr": 0.1, **({"momentum": 0.9} if kind is torch.optim.SGD else {})}
    optimizers = [kind([weight], **options) for weight in weights]
    for number in range(3):
        step(weights[0], optimizers[0], number)
    write_state(tmp_path, {"optimizer": optimizers[0].state_dict(), "weight": weights[0]})
    saved = read_state(tmp_path)
    weights[1].data.copy_(saved["weight"])
    optimizers[1].load_state_dict(saved["optimizer"])
    for number in range(3, 6):
        for weight, optimizer in zip(weights, optimizers):
            step(weight, optimizer, number)
    assert torch.equal(*weights)


def test_other_objects_are_refused_with_their_place(tmp_path):
    with pytest.raises(TypeError, match=r"state\.a\.1: a checkpoint holds .* got SimpleNamespace"):
        write_state(tmp_path, {"a": [1, SimpleNamespace()]})


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_no_code_is_run(tmp_path, name):
    class Attack:
        def __reduce__(self):
            return ((tmp_path / "owned").touch, ())

    write_state(tmp_path, {"a": torch.ones(1)})
    (tmp_path / name).write_bytes(pickle.dumps(Attack()))
    with pytest.raises(Unreadable):
        read_state(tmp_path)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "TypeError"),
        ("{}", "KeyError: 'format'"),
        ('{"format": 7, "files": {}, "state": 0}', r"has format 7, wanted 1"),
        ('{"format": 1, "files": {"x": "00"}, "state": 0}', "x is missing"),
        ('{"format": 1, "files": {}, "state": {"$tensor": "no"}}', "KeyError: 'no'"),
        ('{"format": 1, ', "JSONDecodeError"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, content, message):
    write_state(tmp_path, {})
    (tmp_path / "state.json").write_text(content)
    with pytest.raises(Unreadable, match=message):
        read_state(tmp_path)


# --- hashes of what a run depends on ---


def test_fingerprints_of_data():
    data = [Demonstration("a", "b"), Ranking("a", ("b", "c"), (1.0, 0.0))]
    others = [
        [Demonstration("a", "b ")],
        data[:1],
        data[::-1],
        [Demonstration("ab", ""), data[1]],
        [data[0], Ranking("a", ("b", "c"), (1.0, 0.5))],
        [data[0], Ranking("a", ("bc",), (1.0,))],
        [data],
    ]
    assert fingerprint(data) == fingerprint(tuple(data))
    assert len({fingerprint(each) for each in [data, *others]}) == 1 + len(others)


def test_fingerprints_of_models_and_tokenizers(start, other_start, tmp_path):
    model, tokenizer = load_reward_model(start.reward_model)
    fresh = fingerprint(model), fingerprint(tokenizer)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load_reward_model(str(tmp_path))
    assert (fingerprint(again[0]), fingerprint(again[1])) == fresh
    assert fingerprint(load_tokenizer(other_start.policy)) != fresh[1]
    again[1].chat_template = "{{ messages }}"
    assert fingerprint(again[1]) != fresh[1]
    again[0].config.score_std = 2.0
    assert fingerprint(again[0]) != fresh[0]
    policy, _ = load_policy(start.policy)
    before = fingerprint(policy)
    with torch.no_grad():
        policy.lm_head.weight[-1, -1] += 1e-3
    assert fingerprint(policy) != before

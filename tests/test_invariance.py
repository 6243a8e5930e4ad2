"""What must not matter does not: micro-batches, padding, threads, backends, whole logits. Resuming is in test_kill.py.

Rounding is all that may differ. One step's numbers are compared before it grows: after several, a sampled token flips.
"""

import pytest
import torch

import rlhf_kernels as rk
from mini_runs import command
from rlhf import cli, head
from rlhf.data import Batch, collate
from rlhf.files import read_lines
from rlhf.model import load_policy, load_reward_model, response_logprobs, values

TOLERANCE = {"rel": 1e-4, "abs": 1e-5}
NOT_ADDITIVE = ("time/", "ppo/val/var_explained")  # the latter is a mean over micro-batches of what is no mean


def first_update(mini, out, *more):
    """The metrics of a PPO run of one step, the evaluation before it included; NOT_ADDITIVE left out."""
    assert cli.main(command(mini, "ppo", out, "--steps", "1", "--seed", "3", *more)) == 0
    lines = read_lines(out / "metrics.jsonl")
    return {
        f"{line['step']} {name}": value
        for line in lines
        for name, value in line.items()
        if not name.startswith(NOT_ADDITIVE)
    }


@pytest.fixture(scope="module")
def expected(mini, tmp_path_factory):
    return first_update(mini, tmp_path_factory.mktemp("invariance") / "run")


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches(mini, tmp_path, expected, size):
    found = first_update(mini, tmp_path / "run", "--micro-batch", str(size))
    assert found == pytest.approx(expected, **TOLERANCE)


def test_threads(mini, tmp_path, expected, threads):
    threads(2 if torch.get_num_threads() == 1 else 1)
    assert first_update(mini, tmp_path / "run") == pytest.approx(expected, **TOLERANCE)


def test_backends(mini, tmp_path, expected):
    with rk.use_backend("torch"):
        assert first_update(mini, tmp_path / "run") == pytest.approx(expected, **TOLERANCE)


@pytest.mark.parametrize("trunk", ["separate", "shared"])
def test_logits_that_are_never_whole(mini, tmp_path, monkeypatch, trunk):
    expected = first_update(mini, tmp_path / "whole", "--value-trunk", trunk)
    monkeypatch.setattr(head, "WHOLE_LOGITS", 0)
    calls, original = [], rk.linear_logprobs_entropy
    monkeypatch.setattr(rk, "linear_logprobs_entropy", lambda *a, **k: calls.append(1) or original(*a, **k))
    assert first_update(mini, tmp_path / "chunks", "--value-trunk", trunk) == pytest.approx(expected, **TOLERANCE)
    assert calls


def test_the_side_of_the_padding(mini):
    """Prompts padded on the left by a batch, on the right by hand: the same log-probabilities and values."""
    policy, tokenizer = load_policy(str(mini / "policy"))
    value, _ = load_reward_model(str(mini / "rm"))
    prompts, responses = [[5, 6, 7, 8], [9], [10, 11]], [[12, 13], [14, 15, 16], [17]]
    batch = collate(prompts, responses, tokenizer.pad_token_id)
    logprobs, estimates = response_logprobs(policy, batch), values(value, batch)
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        padding = [tokenizer.pad_token_id] * 3
        tokens = torch.tensor([prompt + response + padding])
        attended = torch.tensor([[True] * len(prompt + response) + [False] * 3])
        alone = Batch(tokens, attended, attended[:, len(prompt) :], len(prompt))
        for whole, single in ((logprobs, response_logprobs(policy, alone)), (estimates, values(value, alone))):
            torch.testing.assert_close(whole[row, : len(response)], single[0, : len(response)], atol=1e-5, rtol=1e-5)

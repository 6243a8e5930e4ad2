"""Fixtures of the pipeline's tests: untrained tiny models on disk, made once a session."""

from types import SimpleNamespace

import pytest
import torch


def save_start(folder, texts):
    from rlhf.model import load_policy, load_reward_model

    torch.manual_seed(0)
    policy, tokenizer = load_policy("tiny", tokenizer_texts=texts)
    start = SimpleNamespace(policy=str(folder / "policy"), reward_model=str(folder / "rm"))
    policy.save_pretrained(start.policy)
    tokenizer.save_pretrained(start.policy)
    reward_model, _ = load_reward_model(start.policy)
    reward_model.save_pretrained(start.reward_model)
    tokenizer.save_pretrained(start.reward_model)
    return start


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    """Paths of a policy and a reward model with the tokenizer of the generated task."""
    from rlhf.data import load_task

    return save_start(tmp_path_factory.mktemp("start"), load_task("reviews", 0).texts())


@pytest.fixture(scope="session")
def other_start(tmp_path_factory):
    """The same with another tokenizer."""
    return save_start(tmp_path_factory.mktemp("other"), ["one two three four five six seven"] * 4)

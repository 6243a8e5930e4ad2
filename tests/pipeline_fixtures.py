"""Fixtures of the pipeline's tests: untrained tiny models on disk, made once a session."""

import json
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


@pytest.fixture(scope="session")
def mini(tmp_path_factory):
    """A folder with data and two models of a few thousand parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from rlhf.model import load_reward_model, train_tokenizer

    folder = tmp_path_factory.mktemp("mini")
    words = ("red", "green", "blue", "white", "black")
    rows = [
        {"prompt": f"the {a} car and", "responses": [f" the {b} house .", f" {a} {b} .", " no"], "scores": [2, 1, 0]}
        for a in words
        for b in words
    ]
    spans = [{"start": 0, "end": 4, "label": "good"}, {"start": 5, "end": 8, "label": "bad"}]
    marked = [{"prompt": row["prompt"], "response": row["responses"][0], "spans": spans} for row in rows[:16]]
    for name, written in (("rows.jsonl", rows), ("marked.jsonl", marked)):
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in written))
    tokenizer = train_tokenizer([row["prompt"] + response for row in rows for response in row["responses"]])
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes, **special))
    model.save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    reward_model, _ = load_reward_model(str(folder / "policy"))
    reward_model.save_pretrained(folder / "rm")
    tokenizer.save_pretrained(folder / "rm")
    return folder

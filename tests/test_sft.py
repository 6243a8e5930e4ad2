"""Supervised fine-tuning: the loss, micro-batches, evaluation, resuming; and learning-rate schedules."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from rlhf import sft
from rlhf.config import UserError
from rlhf.data import Demonstration, encode_prompt, encode_response, load_task
from rlhf.guard import NonFinite
from rlhf.model import load_policy, response_logprobs
from rlhf.run import Run, read_lines
from rlhf.schedule import schedule

STEP = SimpleNamespace(micro_batch=None, max_grad_norm=1e9)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 48 demonstrations that a tiny model learns in a few steps."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    words = ("red", "green", "blue", "white")
    rows = [{"prompt": f"the {word} car number {i}", "response": f" is {word} ."} for i in range(12) for word in words]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tmp_path, data, name="sft", **options):
    defaults = {"epochs": 2, "batch_size": 8, "eval_fraction": 0.1, "eval_every": 4, "device": "cpu"}
    return sft.SftConfig(out=str(tmp_path / name), data=data, **{**defaults, **options})


@pytest.fixture(scope="module")
def model_and_batch():
    torch.manual_seed(0)
    texts = [Demonstration("one two", " three"), Demonstration("four", " five six one two"), Demonstration("six", "")]
    model, tokenizer = load_policy("tiny", tokenizer_texts=[each.prompt + each.response for each in texts] * 2)
    return model, sft.batch_of(sft.encode(tokenizer, texts, 64), tokenizer)


def gradients(model, batch, micro_batch):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    step = SimpleNamespace(micro_batch=micro_batch, max_grad_norm=1e9)
    metrics = sft.train_step(model, optimizer, batch, step)
    return metrics, [parameter.grad.clone() for parameter in model.parameters()]


def test_loss_is_the_token_mean_whatever_the_micro_batch(model_and_batch):
    model, batch = model_and_batch
    with torch.no_grad():
        expected = -response_logprobs(model, batch)[batch.mask].mean().item()
    whole, gradient = gradients(model, batch, None)
    assert whole["loss"] == pytest.approx(expected, abs=1e-6) and whole["num_tokens"] == batch.mask.sum().item()
    # Rows have 2, 5 and 1 tokens or so: a mean of micro-batch means would differ.
    parts, gradient_of_parts = gradients(model, batch, 1)
    assert parts["loss"] == pytest.approx(expected, abs=1e-6)
    for one, other in zip(gradient, gradient_of_parts):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_accuracy_counts_the_likeliest_tokens(model_and_batch):
    model, batch = model_and_batch
    with torch.no_grad():
        found = sft.evaluate(model, [batch], None)
        right = total = 0
        for row in range(len(batch)):
            tokens = batch.tokens[row][batch.attention_mask[row]]
            logits = model(tokens[None]).logits[0]
            length = int(batch.mask[row].sum())
            right += (logits[-length - 1 : -1].argmax(-1) == tokens[-length:]).sum().item()
            total += length
    assert found["eval/mean_token_accuracy"] == pytest.approx(right / total)
    assert found["eval/perplexity"] == pytest.approx(math.exp(found["eval/loss"]))
    assert sft.evaluate(model, [], None) == {}


def test_a_gradient_that_is_not_finite_stops_before_the_weights_change(model_and_batch):
    model, batch = model_and_batch
    weight = model.model.norm.weight
    before = weight.detach().clone()
    with torch.no_grad():
        weight[0] = math.nan
    with pytest.raises(NonFinite, match="the loss is nan"):
        sft.train_step(model, torch.optim.SGD(model.parameters(), lr=0.1), batch, STEP)
    with torch.no_grad():
        assert torch.equal(weight[1:], before[1:])
        weight.copy_(before)


def test_long_texts_lose_the_start_of_the_prompt_then_the_end(model_and_batch, data):
    _, tokenizer = load_policy("tiny", tokenizer_texts=["a b c d e f g"] * 2)
    text = Demonstration("a b c d", " e f g")
    prompt, response = encode_prompt(tokenizer, text.prompt), encode_response(tokenizer, text.response)
    assert sft.encode(tokenizer, [text], len(prompt) + len(response)) == [(prompt, response)]
    assert sft.encode(tokenizer, [text], len(response) + 2) == [(prompt[-2:], response)]
    assert sft.encode(tokenizer, [text], 2) == [(prompt[-1:], response[:1])]


def test_a_run_learns_and_writes_what_it_did(tmp_path, data):
    folder = sft.main(config(tmp_path, data, epochs=8, learning_rate=3e-3))
    info = json.loads((folder / "run.json").read_text())
    lines = read_lines(folder / "metrics.jsonl")
    per_epoch = math.ceil(info["summary"]["demonstrations"] / 8)
    assert info["finished"] and info["summary"]["steps"] == 8 * per_epoch
    assert [line["step"] for line in lines] == [*range(1, 8 * per_epoch + 1), 8 * per_epoch]
    assert lines[0]["loss"] > 5 and lines[-2]["loss"] < 1.0
    assert info["summary"]["eval/loss"] < 1.0 and info["summary"]["eval/mean_token_accuracy"] > 0.7
    assert {"lr", "grad_norm", "tokens_per_second", "epoch", "time/train"} <= lines[0].keys()
    assert "eval/loss" in lines[3] and "eval/loss" not in lines[4]
    model, tokenizer = load_policy(str(folder))
    task = load_task(data, 0)
    batch = sft.batch_of(sft.encode(tokenizer, task.demonstrations[:4], 64), tokenizer)
    assert sft.evaluate(model, [batch], None)["eval/loss"] < 1.0


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path, data, monkeypatch):
    options = {"save_steps": 3, "save_total_limit": 1, "batch_size": 16, "epochs": 3}
    whole = sft.main(config(tmp_path, data, "whole", **options))

    # The same run, stopped by the first step after a checkpoint in the middle of an epoch.
    original, steps = sft.train_step, []

    def stopping(*args):
        if len(steps) == 4:
            raise KeyboardInterrupt
        steps.append(1)
        return original(*args)

    monkeypatch.setattr(sft, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        sft.main(config(tmp_path, data, "cut", **options))
    monkeypatch.undo()
    torch.manual_seed(99)
    cut = sft.main(config(tmp_path, data, "cut", resume=True, **options))

    timings = ("time/", "tokens_per_second")
    metrics = [
        [{k: v for k, v in line.items() if not k.startswith(timings)} for line in read_lines(folder / "metrics.jsonl")]
        for folder in (whole, cut)
    ]
    assert metrics[0] == metrics[1] and len(metrics[0]) == 10
    for one, other in zip(load_policy(str(whole))[0].parameters(), load_policy(str(cut))[0].parameters()):
        assert torch.equal(one, other)


def test_best_responses_stand_in_for_demonstrations(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"p{i}", "responses": [" worst", " best", " tied"], "scores": [-1, 2, 2]} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = sft.demonstrations(load_task(str(path), 0))
    assert len(found) == 18 and {each.response for each in found} == {" best"}
    path.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(UserError, match="needs responses to learn from, got none"):
        sft.demonstrations(load_task(str(path), 0))


@pytest.mark.parametrize(
    "option, value, message",
    [
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("batch_size", 0, "batch_size must be at least 1, got 0"),
        ("eval_fraction", 1.0, r"eval_fraction must be at least 0 and less than 1, got 1.0"),
        ("max_length", 1, "max_length must be at least 2, got 1"),
        ("lr_scheduler", "step", "lr_scheduler must be one of linear, cosine, constant"),
    ],
)
def test_bad_options(tmp_path, data, option, value, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, data, **{option: value})


def test_a_second_run_does_not_touch_the_first(tmp_path, data):
    (tmp_path / "sft").mkdir()
    Run.create(tmp_path / "sft", "sft", config(tmp_path, data))
    with pytest.raises(FileExistsError, match="--resume continues"):
        sft.main(config(tmp_path, data))


# Schedules


def test_schedules():
    linear = [schedule(step, 10, warmup=0.2, kind="linear") for step in range(10)]
    assert linear == pytest.approx([1 / 3, 2 / 3, 1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8])
    cosine = [schedule(step, 4, warmup=0.0, kind="cosine") for step in range(4)]
    assert cosine == pytest.approx([(1 + math.cos(math.pi * step / 4)) / 2 for step in range(4)])
    assert [schedule(step, 4, warmup=0.25, kind="constant") for step in range(4)] == [0.5, 1, 1, 1]
    assert schedule(0, 1, warmup=0.0, kind="linear") == 1.0
    with pytest.raises(ValueError, match="kind must be one of linear, cosine, constant, got 'step'"):
        schedule(0, 4, warmup=0.0, kind="step")

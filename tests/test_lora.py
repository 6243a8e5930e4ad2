"""LoRA: one copy of the frozen weights for four models, the reference with the adapter off, peft's own file format."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from rlhf import dpo, lora, ppo, rm
from rlhf.config import UserError
from rlhf.data import load_task
from rlhf.lora import Lora, MergeConfig
from rlhf.model import load_policy, load_reward_model, response_logprobs
from rlhf.rollout import generate
from rlhf.run import Run

LORA = Lora(r=2, alpha=4.0)


def small(out, start, **changes):
    settings = {"out": str(out), "init": start.policy, "rm": start.reward_model, "steps": 2, "batch_size": 4}
    settings |= {"num_ppo_epochs": 2, "response_length": 6, "eval_samples": 4, "num_samples": 0, "lora_r": 2}
    return ppo.PpoConfig(**{**settings, **changes})


@pytest.fixture
def rollout(start):
    policy, tokenizer = load_policy(start.policy)
    torch.manual_seed(3)
    return generate(policy, tokenizer, load_task("reviews", 0).prompts[:4], response_length=6)


def stir(model):
    """Gives the second matrices of the adapters, which begin at 0, an effect."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in lora.trained(model):
            if "lora_B" in name:
                weight.normal_(std=0.2)


def test_a_new_adapter_changes_nothing_and_is_all_that_trains(start, rollout):
    plain, _ = load_policy(start.policy)
    model, _ = load_policy(start.policy, lora=LORA)
    with torch.no_grad():
        before, after = response_logprobs(plain, rollout.batch), response_logprobs(model, rollout.batch)
    assert torch.allclose(before, after, atol=1e-6)
    response_logprobs(model, rollout.batch).sum().backward()
    trained = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert trained == {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained and all(".lora_" in name for name in trained)


def test_frozen_weights_are_the_same_tensors_in_every_model(start):
    policy, _ = load_policy(start.policy, lora=LORA)
    ref, _ = load_policy(start.policy, frozen=True)
    value, _ = load_reward_model(start.policy, lora=LORA)
    whole, _ = load_policy(start.policy)

    def storage(model):
        return {weight.data_ptr(): weight.numel() for name, weight in model.named_parameters() if ".lora_" not in name}

    assert storage(policy) == storage(ref)
    head = value.score.weight
    assert storage(value).keys() - storage(ref).keys() == {head.data_ptr()} and head.requires_grad
    assert storage(whole).keys().isdisjoint(storage(ref))  # it trains its own
    together = storage(policy) | storage(ref) | storage(value)
    assert sum(together.values()) < 1.01 * sum(storage(whole).values())
    assert not any(weight.requires_grad for weight in ref.parameters())


def test_the_reference_is_the_model_with_the_adapter_off(start, rollout):
    policy, _ = load_policy(start.policy, lora=LORA)
    ref, _ = load_policy(start.policy, frozen=True)
    plain, _ = load_policy(start.policy)
    stir(policy)
    with torch.no_grad():
        away, there = response_logprobs(policy, rollout.batch), response_logprobs(ref, rollout.batch)
        assert torch.equal(there, response_logprobs(plain, rollout.batch))
    assert (away - there).abs().max() > 0.1


def test_an_adapter_is_saved_as_peft_does_and_merged(start, rollout, tmp_path):
    policy, tokenizer = load_policy(start.policy, lora=LORA)
    stir(policy)
    settings = small(tmp_path / "run", start)
    run = Run.create(settings.out, "ppo", settings)
    folder = run.save_model(policy, tokenizer)
    assert not (folder / "model.safetensors").exists()
    with torch.no_grad():
        wanted = response_logprobs(policy, rollout.batch)
        again, _ = load_policy(settings.out)
        assert torch.equal(response_logprobs(again, rollout.batch), wanted)

        from peft import PeftModel

        theirs = PeftModel.from_pretrained(load_policy(start.policy)[0], folder)
        assert torch.allclose(response_logprobs(theirs, rollout.batch), wanted, atol=1e-6)

        merged = lora.main(MergeConfig(model=settings.out, out=str(tmp_path / "merged")))
        whole, _ = load_policy(str(merged))
        assert not lora.has_adapter(whole)
        assert torch.allclose(response_logprobs(whole, rollout.batch), wanted, atol=1e-5)
    with pytest.raises(UserError, match="has no adapter to merge"):
        lora.main(MergeConfig(model=str(merged), out=str(tmp_path / "twice")))


def test_an_adapter_that_peft_wrote_is_read(start, rollout, tmp_path):
    from peft import LoraConfig, get_peft_model

    model, _ = load_policy(start.policy)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    model.peft_config["default"].base_model_name_or_path = str(Path(start.policy).resolve())
    model.save_pretrained(tmp_path / "theirs")
    read, tokenizer = load_policy(str(tmp_path / "theirs"))
    assert tokenizer.eos_token_id is not None
    with torch.no_grad():
        assert torch.allclose(
            response_logprobs(read, rollout.batch), response_logprobs(model.eval(), rollout.batch), atol=1e-6
        )


def test_ppo_on_one_trunk_with_a_reward_model_of_the_same_base(start, tmp_path, monkeypatch):
    rows = [{"prompt": f"the film {number}", "chosen": " was good .", "rejected": " was bad ."} for number in range(20)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"out": str(tmp_path / "rm"), "init": start.policy, "data": str(data), "max_steps": 2, "batch_size": 4}
    rm_run = str(rm.main(rm.RmConfig(eval_every=0, lora_r=2, **settings)))
    assert load_reward_model(rm_run)[0].config.score_std != 1.0  # its normalisation came with the adapter

    whole = ppo.main(small(tmp_path / "whole", start, rm=rm_run, save_steps=1))
    log = Run.log
    parts = small(tmp_path / "parts", start, rm=rm_run, save_steps=1)
    monkeypatch.setattr(Run, "log", lambda run, step, values: 1 / 0 if step == 2 else log(run, step, values))
    with pytest.raises(ZeroDivisionError):
        ppo.main(parts)
    monkeypatch.undo()
    resumed = ppo.main(replace(parts, resume=True))
    for name in ("model", "value"):
        assert (resumed / name / lora.WEIGHTS).read_bytes() == (whole / name / lora.WEIGHTS).read_bytes()
    trained = dict(lora.trained(load_policy(str(whole))[0]))
    assert max(weight.abs().max() for name, weight in trained.items() if "lora_B" in name) > 0

    models, _ = ppo.prepare(parts, None, load_task("reviews", 0))
    pointers = [
        {weight.data_ptr() for name, weight in model.named_parameters() if ".lora_" not in name and "score" not in name}
        for model in (models.policy, models.value, models.ref, models.reward_model)
    ]
    assert pointers[0] == pointers[1] == pointers[2] == pointers[3]


def test_another_stage_goes_on_with_the_adapter(start, tmp_path):
    first = ppo.main(small(tmp_path / "ppo", start, steps=1))
    rows = [{"prompt": f"the film {number}", "chosen": " was good .", "rejected": " was bad ."} for number in range(20)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"out": str(tmp_path / "dpo"), "data": str(data), "max_steps": 1, "batch_size": 4, "eval_samples": 4}
    settings["response_length"] = 6
    second = dpo.main(dpo.DpoConfig(init=str(first), **settings))
    base = json.loads((second / "model" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == Path(start.policy).resolve()
    with pytest.raises(UserError, match="has an adapter with lora_r = 2, and it goes on with that; got 3"):
        dpo.main(dpo.DpoConfig(init=str(first), lora_r=3, **{**settings, "out": str(tmp_path / "other")}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_r": 0, "lora_alpha": 4.0}, "lora_alpha and lora_target_modules need lora_r, got lora_r 0"),
        ({"lora_target_modules": ("nowhere",)}, "lora_target_modules nowhere of .*Target modules"),
    ],
)
def test_flags_that_do_not_fit(start, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        ppo.main(small(tmp_path / "run", start, **changes))


def test_tiny_has_nothing_to_freeze(tmp_path):
    with pytest.raises(UserError, match='model "tiny" is made from scratch'):
        load_policy("tiny", tokenizer_texts=["a b"], lora=LORA)


def test_a_base_that_has_gone_is_named(start, tmp_path):
    (tmp_path / "adapter_config.json").write_text(
        json.dumps(
            {"peft_type": "LORA", "base_model_name_or_path": "/gone", "target_modules": ["q"], "r": 1, "lora_alpha": 1}
        )
    )
    with pytest.raises(UserError, match="the adapter's base /gone is not there"):
        load_policy(str(tmp_path))

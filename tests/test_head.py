"""rlhf/head.py: log-probabilities from hidden states are those from logits, and who gets them."""

import copy

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlhf import head, sft
from rlhf.cpu import speed_up
from rlhf.data import collate
from rlhf.lora import Lora, add_adapter
from rlhf.model import response_logprobs

V = 61
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)),
    "softcap": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
    "scaled logits": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.0625)),
}


def model_of(name):
    torch.manual_seed(0)
    return MODELS[name]().eval()


def batch_of():
    prompts, responses = [[5, 6], [7], [8, 9, 10, 11]], [[1, 2, 3, 4], [60], [12, 0, 13]]
    return collate(prompts, responses, 0)


@pytest.fixture
def no_whole_logits(monkeypatch):
    monkeypatch.setattr(head, "WHOLE_LOGITS", 0)


def measured(model, temperature=0.7):
    """(logprobs, entropy, gradients) of a loss in which each token weighs otherwise."""
    model.zero_grad()
    logprobs, entropy = response_logprobs(model, batch_of(), temperature, entropy=True)
    weights = torch.linspace(-1, 1, logprobs.numel()).view(logprobs.shape)
    (weights * logprobs + 0.3 * weights * entropy).sum().backward()
    return logprobs.detach(), entropy.detach(), [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("name", ["llama", "gpt2", "softcap"])
def test_the_same_without_logits(name, monkeypatch):
    model = model_of(name)
    assert head.head_for(model, batch_of()) is None  # its logits are small
    wanted = measured(model)
    monkeypatch.setattr(head, "WHOLE_LOGITS", 0)
    assert head.head_for(model, batch_of()) is not None
    model.lm_head.register_forward_hook(lambda *_: pytest.fail("logits were made"))
    for found, expected in zip(measured(model), wanted):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(response_logprobs(model, batch_of(), 0.7), wanted[0], atol=2e-5, rtol=0)


def test_bf16_weights(no_whole_logits, monkeypatch):
    model = model_of("llama").bfloat16()
    found = response_logprobs(model, batch_of())
    monkeypatch.setattr(head, "WHOLE_LOGITS", 1 << 40)
    torch.testing.assert_close(found, response_logprobs(model, batch_of()), atol=5e-2, rtol=2e-2)
    assert found.dtype == torch.float32


def test_onednn_heads_are_plain(no_whole_logits):
    model = model_of("llama")
    speed_up(model, onednn=True)
    assert head.head_for(model, batch_of()) is not None


def test_a_model_that_scales_its_logits_keeps_them(no_whole_logits):
    model = model_of("scaled logits")
    assert head.head_for(model, batch_of()) is None
    seen = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    response_logprobs(model, batch_of())
    assert seen == [1]


def test_an_adapter_on_the_head_keeps_logits(no_whole_logits, tmp_path):
    model = model_of("llama")
    model.save_pretrained(tmp_path)
    without = copy.deepcopy(model)
    add_adapter(model, str(tmp_path), Lora(2, 4.0, ("lm_head",)), None)
    assert head.head_for(model, batch_of()) is None and head.head_for(without, batch_of()) is not None
    add_adapter(without, str(tmp_path), Lora(2, 4.0, ("q_proj",)), None)
    assert head.head_for(without, batch_of()) is not None


@pytest.mark.parametrize("rows", [1 << 20, 4 * V])
def test_sft_counts_right_tokens(rows, monkeypatch):
    """Also in chunks: one row of logits takes 4 V bytes."""
    model = model_of("softcap")
    with torch.no_grad():
        wanted = sft.loss_and_right(model, batch_of(), torch.tensor([1.0, 2.0, 0.5]))
        monkeypatch.setattr(head, "WHOLE_LOGITS", 0)
        chosen = head.head_for(model, batch_of())
        monkeypatch.setattr(head, "WHOLE_LOGITS", rows)
        monkeypatch.setattr(sft, "head_for", lambda *_: chosen)
        found = sft.loss_and_right(model, batch_of(), torch.tensor([1.0, 2.0, 0.5]))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-5)

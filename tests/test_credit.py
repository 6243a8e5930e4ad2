"""Attention rows against the full maps of eager attention, and what the hook leaves behind: nothing."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

import rlhf_kernels as rk
from rlhf.credit import credit_weights, last_attention_row, last_layer, policy_attention
from rlhf.data import collate
from rlhf.model import hidden_states, last_attended, position_ids, scores

VOCABULARY, LENGTH = 50, 12
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gpt2": lambda: GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=3, n_head=4, n_positions=64, initializer_range=0.3, pad_token_id=0
    ),
    "gpt2-scaled-by-layer": lambda: GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        pad_token_id=0,
        scale_attn_by_inverse_layer_idx=True,
    ),
    "qwen2": lambda: Qwen2Config(**SIZES),
    "mistral-window": lambda: MistralConfig(**SIZES, sliding_window=4),
    "gemma2-softcap-window": lambda: Gemma2Config(
        **SIZES,
        head_dim=8,
        sliding_window=4,
        attn_logit_softcapping=2.0,
        query_pre_attn_scalar=5,
        layer_types=["full_attention", "full_attention", "sliding_attention"],
    ),
    "gpt-oss-sink": lambda: GptOssConfig(
        **SIZES, head_dim=8, num_local_experts=2, num_experts_per_tok=1, layer_types=["full_attention"] * 3
    ),
}


def make(name, kind=AutoModelForSequenceClassification):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for option in ("attn_pdrop", "resid_pdrop", "embd_pdrop"):
        if hasattr(config, option):
            setattr(config, option, 0.0)
    if kind is AutoModelForSequenceClassification:
        config.num_labels, config.score_mean, config.score_std = 1, 0.0, 1.0
    model = kind.from_config(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(weight)
    return model


def texts(side, lengths=(12, 3, 7, 1)):
    tokens = torch.randint(1, VOCABULARY, (len(lengths), LENGTH), generator=torch.Generator().manual_seed(1))
    columns = torch.arange(LENGTH)
    mask = torch.stack([columns < n if side == "right" else columns >= LENGTH - n for n in lengths])
    return torch.where(mask, tokens, 0), mask


@torch.no_grad()
def eager_maps(model, tokens, mask):
    """[B, L, L]: the last layer's attention, mean over heads, from a forward pass that returns every map."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": position_ids(mask)}
    attentions = model.base_model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    assert len(attentions) == model.config.num_hidden_layers
    return attentions[-1].mean(1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_row_equals_the_eager_map(name, side):
    model = make(name)
    tokens, mask = texts(side)
    before = model.config._attn_implementation
    score, row = last_attention_row(model, tokens, mask)
    assert model.config._attn_implementation == before
    last = last_attended(mask)
    expected = eager_maps(model, tokens, mask)[torch.arange(len(last)), last]
    assert row.shape == mask.shape and row.dtype == torch.float32
    torch.testing.assert_close(row, torch.where(mask, expected, 0), atol=1e-5, rtol=0)
    assert not row[~mask].any() and (row[0] > 0).sum() == (4 if "window" in name else LENGTH)
    total = row.sum(1)
    assert (total < 0.999).all() if "sink" in name else torch.allclose(total, torch.ones(4), atol=1e-5)
    torch.testing.assert_close(score, scores(model, tokens, mask), atol=1e-5, rtol=0)


def test_micro_batches_change_nothing():
    model = make("llama")
    tokens, mask = texts("left")
    whole, parts = last_attention_row(model, tokens, mask), last_attention_row(model, tokens, mask, micro_batch=3)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=0)


def test_every_layer_runs_sdpa_and_no_map_is_made(monkeypatch):
    from transformers.integrations import sdpa_attention

    model, calls = make("llama"), []
    original = sdpa_attention.sdpa_attention_forward

    def counted(module, *args, **options):
        calls.append((module.layer_idx, options.get("output_attentions")))
        return original(module, *args, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", counted)
    last_attention_row(model, *texts("left"))
    assert [layer for layer, _ in calls] == [0, 1, 2] and not any(wanted for _, wanted in calls)


def test_the_hook_leaves_nothing_behind():
    model, other = make("llama"), make("gpt2")
    tokens, mask = texts("right")
    expected = last_attention_row(model, tokens, mask)[1]
    with pytest.raises(ZeroDivisionError), last_layer(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    # Nested, on the same model and on another: the inner pass does not disturb what the outer one kept.
    with last_layer(model) as outer:
        with torch.no_grad():
            hidden_states(model, tokens, mask)
        inner_row = last_attention_row(model, tokens.flip(0), mask.flip(0))[1]
        last_attention_row(other, tokens, mask)
        assert model.config._attn_implementation == "rlhf_row_sdpa"
        outer_row = outer.row(last_attended(mask), mask)
    assert model.config._attn_implementation == other.config._attn_implementation == "sdpa"
    torch.testing.assert_close(outer_row, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(inner_row.flip(0), expected, atol=1e-6, rtol=0)


def test_a_pass_outside_the_context_is_not_kept():
    model = make("llama")
    with last_layer(model) as layer:
        pass
    hidden_states(model, *texts("left"))
    with pytest.raises(ValueError, match="did not go through"):
        layer.row(torch.zeros(4, dtype=torch.int64), texts("left")[1])


# The policy's own attention


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral-window", "gemma2-softcap-window"])
def test_policy_attention_is_the_mean_over_later_steps(name):
    model = make(name, AutoModelForCausalLM)
    batch = collate([[1, 2, 3], [4], [5, 6]], [[7, 8, 9, 10, 11], [12, 13, 14], [15]], pad_id=0)
    found = policy_attention(model, batch)
    maps = eager_maps(model, batch.tokens, batch.attention_mask)
    expected = torch.zeros(batch.mask.shape)
    for row, length in enumerate(batch.mask.sum(1).tolist()):
        for t in range(length - 1):
            # Token s is predicted from position P + s − 1, and its step sees the response tokens 0 … s − 1.
            seen = [maps[row, batch.prompt_width + s - 1, batch.prompt_width + t] for s in range(t + 1, length)]
            expected[row, t] = torch.stack(seen).mean()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert found[0, 4] == 0 and not found[2].any()
    torch.testing.assert_close(policy_attention(model, batch, micro_batch=1), found, atol=1e-6, rtol=0)


# Credit


def test_credit_of_each_kind():
    model, policy = make("llama"), make("llama", AutoModelForCausalLM)
    batch = collate([[1, 2, 3], [4]], [[7, 8, 9, 10], [12, 13]], pad_id=0)
    score, row = last_attention_row(model, batch.tokens, batch.attention_mask)
    assert credit_weights("terminal", batch) is None
    assert torch.equal(credit_weights("uniform", batch), batch.mask.float())
    assert torch.equal(credit_weights("abc", batch, attention_row=row), row[:, 3:])
    assert torch.equal(credit_weights("abc-policy", batch, policy=policy), policy_attention(policy, batch))
    zeros = torch.zeros(batch.mask.shape)
    for kind in ("terminal", "abc", "abc-policy", "uniform"):
        attention = credit_weights(kind, batch, attention_row=row, policy=policy)
        rewards, _ = rk.token_rewards(score, zeros, zeros, attention, batch.mask, kl_coef=0.1, beta=0.8)
        torch.testing.assert_close(rewards.sum(1), score, atol=1e-5, rtol=0)
        assert (kind == "terminal") == (not rewards[0, :-1].any())


def test_credit_errors():
    batch = collate([[1]], [[2]], pad_id=0)
    with pytest.raises(ValueError, match="kind must be one of terminal, abc, abc-policy, uniform, got 'attention'"):
        credit_weights("attention", batch)
    with pytest.raises(ValueError, match="attention_row must be given for kind 'abc', got None"):
        credit_weights("abc", batch)
    with pytest.raises(ValueError, match="policy must be given for kind 'abc-policy', got None"):
        credit_weights("abc-policy", batch)

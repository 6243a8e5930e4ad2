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

from rlhf.attention import AttentionChoice, attention_layers, policy_attention
from rlhf.attribution import attention
from rlhf.config import UserError
from rlhf.data import collate
from rlhf.model import hidden_states, last_attended, position_ids, scores
from rlhf.reading import Reading

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


def read(tokens, mask):
    """Texts that are all response."""
    return Reading(tokens, mask, mask, mask)


@torch.no_grad()
def eager_heads(model, tokens, mask, layer=-1):
    """[B, H, L, L]: a layer's attention, from a forward pass that returns every map."""
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    inputs = {"input_ids": tokens, "attention_mask": mask, "position_ids": position_ids(mask)}
    attentions = model.base_model(**inputs, output_attentions=True, use_cache=False).attentions
    model.set_attn_implementation(before)
    assert len(attentions) == model.config.num_hidden_layers
    return attentions[layer]


def eager_maps(model, tokens, mask):
    return eager_heads(model, tokens, mask).mean(1)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", CONFIGS)
def test_row_equals_the_eager_map(name, side):
    model = make(name)
    tokens, mask = texts(side)
    before = model.config._attn_implementation
    found = attention(model, read(tokens, mask), AttentionChoice())
    score, row = found.scores, found.tokens
    assert model.config._attn_implementation == before
    last = last_attended(mask)
    expected = eager_maps(model, tokens, mask)[torch.arange(len(last)), last]
    assert row.shape == mask.shape and row.dtype == torch.float32
    torch.testing.assert_close(row, torch.where(mask, expected, 0), atol=1e-5, rtol=0)
    assert not row[~mask].any() and (row[0] > 0).sum() == (4 if "window" in name else LENGTH)
    total = row.sum(1)
    assert (total < 0.999).all() if "sink" in name else torch.allclose(total, torch.ones(4), atol=1e-5)
    torch.testing.assert_close(score, scores(model, tokens, mask), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap-window", "gpt-oss-sink"])
def test_chosen_layers_heads_and_reductions(name):
    """Against the full maps: any layers, any heads of them, each way to make one row of several heads."""
    model = make(name)
    tokens, mask = texts("left")
    last, rows = last_attended(mask), torch.arange(4)
    response = mask & (torch.arange(LENGTH) >= LENGTH - 5)
    heads = (0, 3)
    maps = {layer: eager_heads(model, tokens, mask, layer)[rows, :, last] for layer in (0, 2)}  # [B, H, L]
    some = maps[2][:, heads]
    inside = torch.where(response[:, None], some, 0)
    expected = {
        AttentionChoice(heads=heads): some.mean(1),
        AttentionChoice(heads=heads, reduction="max"): some.amax(1),
        AttentionChoice(heads=heads, reduction="renorm"): (inside / inside.sum(-1, keepdim=True)).mean(1),
        AttentionChoice(layers=(-3, -1)): (maps[0].mean(1) + maps[2].mean(1)) / 2,
        AttentionChoice(layers=(0, 2), heads=(1,)): (maps[0][:, 1] + maps[2][:, 1]) / 2,
        AttentionChoice(reduction="max"): maps[2].amax(1),
    }
    for choice, row in expected.items():
        found = attention(model, Reading(tokens, mask, response, mask), choice).tokens
        torch.testing.assert_close(found, torch.where(mask, row, 0), atol=1e-5, rtol=0)


def test_a_layer_or_head_that_is_not_there():
    model = make("llama")
    with pytest.raises(UserError, match="attention_layers must lie in -3 to 2, the model's layers, got 3"):
        attention(model, read(*texts("left")), AttentionChoice(layers=(3,)))
    with pytest.raises(UserError, match="attention_heads must lie in 0 to 3, the model's heads, got 4"):
        attention(model, read(*texts("left")), AttentionChoice(heads=(4,)))


def test_every_layer_runs_sdpa_and_no_map_is_made(monkeypatch):
    from transformers.integrations import sdpa_attention

    model, calls = make("llama"), []
    original = sdpa_attention.sdpa_attention_forward

    def counted(module, *args, **options):
        calls.append((module.layer_idx, options.get("output_attentions")))
        return original(module, *args, **options)

    monkeypatch.setattr(sdpa_attention, "sdpa_attention_forward", counted)
    attention(model, read(*texts("left")), AttentionChoice())
    assert [layer for layer, _ in calls] == [0, 1, 2] and not any(wanted for _, wanted in calls)


def test_the_hook_leaves_nothing_behind():
    model, other = make("llama"), make("gpt2")
    tokens, mask = texts("right")
    choice = AttentionChoice()
    expected = attention(model, read(tokens, mask), choice).tokens
    with pytest.raises(ZeroDivisionError), attention_layers(model):
        raise ZeroDivisionError
    assert model.config._attn_implementation == "sdpa"
    # Nested, on the same model and on another: the inner pass does not disturb what the outer one kept.
    with attention_layers(model) as (outer,):
        with torch.no_grad():
            hidden_states(model, tokens, mask)
        inner_row = attention(model, read(tokens.flip(0), mask.flip(0)), choice).tokens
        attention(other, read(tokens, mask), choice)
        assert model.config._attn_implementation == "rlhf_row_sdpa"
        outer_row = outer.row(last_attended(mask), mask)
    assert model.config._attn_implementation == other.config._attn_implementation == "sdpa"
    torch.testing.assert_close(outer_row, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(inner_row.flip(0), expected, atol=1e-6, rtol=0)


def test_a_pass_outside_the_context_is_not_kept():
    model = make("llama")
    with attention_layers(model) as (layer,):
        pass
    hidden_states(model, *texts("left"))
    with pytest.raises(UserError, match="do not go through"):
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
    shifted = policy_attention(model, batch, shift=1)
    assert not shifted[:, 0].any()
    torch.testing.assert_close(shifted[0, 1:], found[0, :-1], atol=0, rtol=0)
    torch.testing.assert_close(shifted[1, 1:3], found[1, :2], atol=0, rtol=0)
    assert not shifted[1, 3:].any()

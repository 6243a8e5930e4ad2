"""Sampling: from the distribution that is scored, ended by the first EOS, seeded."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from rlhf import rollout as rollout_module
from rlhf.config import UserError
from rlhf.data import encode_prompt
from rlhf.model import response_logprobs, train_tokenizer
from rlhf.rollout import draw, generate, until_eos


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three four five six"] * 3)


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


PROMPTS = ["one", "two three four", "", "five six"]


def replay(monkeypatch, rows):
    """Makes these rows the sampled ones."""
    columns = iter(torch.tensor(rows).t())
    monkeypatch.setattr(rollout_module, "KEPT_ALIVE", 0.0)
    monkeypatch.setattr(rollout_module, "draw", lambda logits, temperature, uniform: next(columns))


@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_mask_ends_with_the_first_eos_and_pads_may_be_tokens(monkeypatch, model, tokenizer, pad_is_eos):
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if pad_is_eos:
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.pad_token = tokenizer.eos_token
    word = encode_prompt(tokenizer, "one")[0]
    replay(monkeypatch, [[word, eos, eos, eos], [pad, word, pad, eos], [word] * 4, [eos, eos, eos, eos]])
    rollout = generate(model, tokenizer, PROMPTS, response_length=4)
    assert rollout.batch.mask.sum(1).tolist() == [2, 4, 4, 1]
    assert rollout.terminated.tolist() == [True, True, False, True]
    assert rollout.batch.responses[1].tolist() == [pad, word, pad, eos]
    assert rollout.batch.attention_mask[:, rollout.batch.prompt_width :].equal(rollout.batch.mask)
    text = tokenizer.decode([word])
    assert rollout.responses == [text, f"<|pad|>{text}<|pad|>", text * 4, ""] and rollout.prompts == PROMPTS


def test_until_eos():
    assert until_eos([3, 1, 0, 5, 0], 0) == [3, 1, 0] and until_eos([3, 1], 0) == [3, 1] and until_eos([0], 0) == [0]


def test_widths_are_those_of_the_longest_prompt_and_response(model, tokenizer):
    rollout = generate(model, tokenizer, PROMPTS, response_length=6)
    batch = rollout.batch
    assert batch.prompt_width == max(len(encode_prompt(tokenizer, prompt)) for prompt in PROMPTS)
    assert batch.mask.shape[1] == batch.mask.sum(1).max() <= 6
    assert (batch.mask.sum(1) == 6).logical_or(rollout.terminated).all()


def test_samples_are_seeded_and_the_model_is_as_before(model, tokenizer):
    model.generation_config.repetition_penalty = 1.3
    own = model.generation_config
    model.train()
    torch.manual_seed(5)
    first = generate(model, tokenizer, PROMPTS * 4, response_length=8)
    assert model.training and model.generation_config is own and own.repetition_penalty == 1.3
    torch.manual_seed(5)
    assert torch.equal(generate(model, tokenizer, PROMPTS * 4, response_length=8).batch.tokens, first.batch.tokens)
    assert not torch.equal(generate(model, tokenizer, PROMPTS * 4, response_length=8).batch.tokens, first.batch.tokens)


def test_micro_batches_keep_the_order(model, tokenizer):
    prompts = [" ".join(["one", "two", "three"][: 1 + i % 3]) for i in range(10)]
    rollout = generate(model, tokenizer, prompts, response_length=5, micro_batch=3)
    assert rollout.prompts == prompts and len(rollout.batch) == len(rollout.responses) == 10
    for row, prompt in enumerate(prompts):
        tokens = rollout.batch.tokens[row, : rollout.batch.prompt_width]
        assert tokens[rollout.batch.attention_mask[row, : rollout.batch.prompt_width]].tolist() == encode_prompt(
            tokenizer, prompt
        )
        kept = rollout.batch.responses[row][rollout.batch.mask[row]].tolist()
        kept = kept[:-1] if rollout.terminated[row] else kept
        assert tokenizer.decode(kept, clean_up_tokenization_spaces=False) == rollout.responses[row]


def test_a_row_depends_on_no_other_row(model, tokenizer):
    """Micro-batches pad each prompt by another width and drop ended rows at other times."""
    responses = []
    for size in (None, 1, 3):
        torch.manual_seed(3)
        responses.append(generate(model, tokenizer, PROMPTS * 3, response_length=12, micro_batch=size).responses)
    assert responses[0] == responses[1] == responses[2] and len(set(responses[0])) > 6


def small(family, tokenizer):
    """A model that often ends: rows leave the batch at every length."""
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    common = {"vocab_size": len(tokenizer), "initializer_range": 0.6, "pad_token_id": tokenizer.pad_token_id}
    if family == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, **common))
    elif family == "sliding window":
        model = MistralForCausalLM(MistralConfig(**sizes, num_key_value_heads=1, sliding_window=4, **common))
    else:
        model = LlamaForCausalLM(LlamaConfig(**sizes, **common))
    return model.eval()


@pytest.mark.parametrize("family", ["llama", "gpt2", "sliding window"])
def test_greedy_tokens_are_those_of_transformers(family, tokenizer):
    model = small(family, tokenizer)
    prompts = [" ".join(["one", "two", "three", "four", "five", "six"][i % 3 : 1 + i % 6]) or "six" for i in range(12)]
    rollout = generate(model, tokenizer, prompts, response_length=10, temperature=1e-4)
    for row, prompt in enumerate(prompts):
        ids = torch.tensor([encode_prompt(tokenizer, prompt)])
        wanted = model.generate(ids, do_sample=False, max_new_tokens=10, eos_token_id=tokenizer.eos_token_id)
        wanted = until_eos(wanted[0, ids.shape[1] :].tolist(), tokenizer.eos_token_id)
        assert rollout.batch.responses[row][rollout.batch.mask[row]].tolist() == wanted


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "sliding window"])
def test_every_place_is_sampled_from_the_scored_distribution(family, tokenizer, monkeypatch):
    """At each place the mean log-probability of the samples is −entropy, within 5 standard errors."""
    monkeypatch.setattr(rollout_module, "KEPT_ALIVE", 0.99)
    model, temperature = small(family, tokenizer), 1.3
    model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 3
    torch.manual_seed(0)
    rollout = generate(model, tokenizer, PROMPTS * 300, response_length=6, temperature=temperature)
    logprobs, entropy = response_logprobs(model, rollout.batch, temperature, entropy=True)
    counts = rollout.batch.mask.sum(0)
    assert counts[-1] < 0.95 * counts[0]  # rows were dropped on the way
    for place in range(6):
        here = rollout.batch.mask[:, place]
        surprise = (logprobs + entropy)[here, place]
        assert surprise.mean().abs() < 5 * surprise.std() / counts[place] ** 0.5


def test_draw_inverts_the_cumulative_distribution():
    weights = torch.tensor([[1.0, 0.0, 2.0, 1.0, 0.0]]).expand(7, -1)
    numbers = torch.tensor([0.0, 0.2499, 0.25, 0.5, 0.7499, 0.75, 1 - 2**-53], dtype=torch.float64)
    assert draw(weights.log(), 1.0, numbers).tolist() == [0, 0, 2, 2, 2, 3, 3]
    assert draw(weights.log() * 3, 3.0, numbers).tolist() == [0, 0, 2, 2, 2, 3, 3]
    # A token of probability 1e-9 has its place, which an fp32 sum does not have.
    rare = torch.tensor([[0.0, -20.7, 0.0]])
    assert draw(rare, 1.0, torch.tensor([0.5], dtype=torch.float64)).item() == 1
    with pytest.raises(UserError, match="the policy's logits are NaN or infinite"):
        draw(torch.full((2, 3), torch.nan), 1.0, numbers[:2])


@torch.no_grad()
def test_tokens_come_from_the_whole_softmax_at_the_temperature(model, tokenizer):
    # What a model's own config asks for must not change the distribution: it would no longer be the scored one.
    model.generation_config.top_k, model.generation_config.top_p = 1, 0.1
    model.generation_config.repetition_penalty, model.generation_config.min_new_tokens = 5.0, 2
    count, temperature = 4000, 1.7
    rollout = generate(model, tokenizer, ["one two"] * count, response_length=1, temperature=temperature)
    logits = model(torch.tensor([encode_prompt(tokenizer, "one two")])).logits[0, -1]
    expected = (logits / temperature).softmax(-1)
    observed = torch.bincount(rollout.batch.responses[:, 0], minlength=len(expected)) / count
    error = (expected * (1 - expected) / count).sqrt()
    assert ((observed - expected).abs() < 5 * error + 1 / count).all()
    # The mean log-probability of samples is −entropy, within 5 standard errors.
    logprobs = response_logprobs(model, rollout.batch, temperature)[:, 0]
    entropy = -(expected * expected.log()).sum()
    assert (logprobs.mean() + entropy).abs() < 5 * logprobs.std() / count**0.5


def test_bad_arguments(model, tokenizer):
    with pytest.raises(ValueError, match="prompts must not be empty"):
        generate(model, tokenizer, [], response_length=4)
    with pytest.raises(ValueError, match="response_length must be at least 1, got 0"):
        generate(model, tokenizer, ["one"], response_length=0)
    with pytest.raises(ValueError, match="temperature must be greater than 0, got 0"):
        generate(model, tokenizer, ["one"], response_length=4, temperature=0)

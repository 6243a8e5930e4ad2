"""Loading models, the log-probability shift, pooling, values: all against a naive computation without padding."""

import json
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from rlhf.config import UserError
from rlhf.data import Batch, collate
from rlhf.model import (
    check_context,
    hidden_states,
    last_attended,
    load_policy,
    load_reference,
    load_reward_model,
    response_logits,
    response_logprobs,
    score_head,
    scores,
    set_score_normalization,
    train_tokenizer,
    values,
    zero_head,
)

VOCABULARY, PAD = 61, 60
TOLERANCE = {"atol": 1e-5, "rtol": 0}


def llama_config(**options):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaConfig(
        vocab_size=VOCABULARY, num_key_value_heads=2, pad_token_id=PAD, initializer_range=0.3, **sizes, **options
    )


@pytest.fixture(scope="module")
def policies():
    torch.manual_seed(0)
    gpt2 = GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=PAD, initializer_range=0.3
    )
    return {"llama": LlamaForCausalLM(llama_config()).eval(), "gpt2": GPT2LMHeadModel(gpt2).eval()}


@pytest.fixture(scope="module")
def reward_model():
    torch.manual_seed(1)
    model = LlamaForSequenceClassification(llama_config(num_labels=1)).eval()
    model.config.score_mean, model.config.score_std = 0.5, 2.0
    return model


def texts(seed=0, rows=5):
    """Prompts and responses of different lengths; the tokens include the pad id."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(low, high):
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    return [tokens(1, 8) for _ in range(rows)], [[*tokens(1, 7), PAD] for _ in range(rows)]


def padded(sequences, side, pad=PAD, width=16):
    """[B, width] tokens and mask, padded on one side."""
    tokens = torch.full((len(sequences), width), pad)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        columns = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        tokens[row, columns] = torch.tensor(sequence)
        mask[row, columns] = True
    return tokens, mask


# Policies


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_logprobs_are_those_of_each_token_given_what_stands_before_it(policies, name):
    model, temperature = policies[name], 0.7
    prompts, responses = texts()
    batch = collate(prompts, responses, PAD)
    logprobs, entropy = response_logprobs(model, batch, temperature, entropy=True)
    assert logprobs.dtype == torch.float32 and logprobs.shape == batch.mask.shape
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        for t, token in enumerate(response):
            before = torch.tensor([prompt + response[:t]])
            expected = (model(before).logits[0, -1] / temperature).log_softmax(-1)
            torch.testing.assert_close(logprobs[row, t], expected[token], **TOLERANCE)
            torch.testing.assert_close(entropy[row, t], -(expected.exp() * expected).sum(), **TOLERANCE)
        assert not logprobs[row, len(response) :].any() and not entropy[row, len(response) :].any()


def wider(batch, left, right):
    """The same batch with more padding."""

    def pad(x, value, left):
        return torch.nn.functional.pad(x, (left, right), value=value)

    tokens, attention_mask = pad(batch.tokens, PAD, left), pad(batch.attention_mask, False, left)
    return Batch(tokens, attention_mask, pad(batch.mask, False, 0), batch.prompt_width + left)


@torch.no_grad()
def test_padding_and_micro_batches_change_nothing(policies):
    for model in policies.values():
        batch = collate(*texts(), PAD)
        logprobs = response_logprobs(model, batch)
        more = response_logprobs(model, wider(batch, 3, 4))
        torch.testing.assert_close(more[:, : logprobs.shape[1]], logprobs, **TOLERANCE)
        assert not more[:, logprobs.shape[1] :].any()
        torch.testing.assert_close(response_logprobs(model, batch, micro_batch=2), logprobs, **TOLERANCE)
        alone = response_logprobs(model, batch.rows(torch.tensor([3])))
        torch.testing.assert_close(alone[0], logprobs[3], **TOLERANCE)


@torch.no_grad()
def test_only_the_response_columns_reach_the_language_model_head(policies):
    batch = collate(*texts(), PAD)
    for model in policies.values():
        seen = []
        hook = model.lm_head.register_forward_pre_hook(lambda module, inputs, seen=seen: seen.append(inputs[0].shape))
        logits = response_logits(model, batch)
        hook.remove()
        assert logits.shape == (*batch.mask.shape, VOCABULARY)
        assert seen == [(len(batch), batch.mask.shape[1] + 1, 32)]


def test_gradients_flow_only_from_the_mask(policies):
    model = policies["llama"]
    batch = collate(*texts(), PAD)
    model.zero_grad()
    response_logprobs(model, batch).sum().backward()
    expected = model.model.layers[0].self_attn.q_proj.weight.grad.clone()
    model.zero_grad()
    response_logprobs(model, wider(batch, 2, 3)).sum().backward()
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.grad, expected, atol=1e-4, rtol=1e-4)
    model.zero_grad()


# Reward and value models


def test_last_attended_wherever_the_padding_is():
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    assert last_attended(mask).tolist() == [1, 3, 2, 0, 0]
    assert last_attended(mask.bool()).tolist() == [1, 3, 2, 0, 0]


@torch.no_grad()
def test_scores_are_read_at_the_last_token_of_the_text(reward_model):
    sequences = [prompt + response for prompt, response in zip(*texts())]
    naive = torch.stack(
        [
            reward_model.score(reward_model.model(torch.tensor([sequence])).last_hidden_state[0, -1])[0]
            for sequence in sequences
        ]
    )
    for side in ("left", "right"):
        for pad in (PAD, 0):  # every text ends in PAD, as in models whose pad token is their EOS
            tokens, mask = padded(sequences, side, pad)
            torch.testing.assert_close(scores(reward_model, tokens, mask, normalized=False), naive, **TOLERANCE)
            torch.testing.assert_close(scores(reward_model, tokens, mask), (naive - 0.5) / 2, **TOLERANCE)
            split = scores(reward_model, tokens, mask, micro_batch=2)
            torch.testing.assert_close(split, (naive - 0.5) / 2, **TOLERANCE)
    batch = collate(*texts(), PAD)
    torch.testing.assert_close(scores(reward_model, batch.tokens, batch.attention_mask), (naive - 0.5) / 2, **TOLERANCE)


@torch.no_grad()
def test_values_stand_before_each_response_token(reward_model):
    prompts, responses = texts()
    batch = collate(prompts, responses, PAD)
    found = values(reward_model, batch)
    assert found.shape == (len(batch), batch.mask.shape[1] + 1) and found.dtype == torch.float32
    for row, (prompt, response) in enumerate(zip(prompts, responses)):
        hidden = reward_model.model(torch.tensor([prompt + response])).last_hidden_state[0]
        expected = reward_model.score(hidden[len(prompt) - 1 :])[:, 0]
        torch.testing.assert_close(found[row, : len(response) + 1], expected, **TOLERANCE)


def test_normalization_makes_mean_0_and_std_1(reward_model):
    raw = torch.tensor([1.0, 2.0, 6.0])
    set_score_normalization(reward_model, raw)
    assert reward_model.config.score_mean == pytest.approx(3.0)
    assert reward_model.config.score_std == pytest.approx((14 / 3) ** 0.5)
    set_score_normalization(reward_model, torch.tensor([4.0, 4.0]))
    assert reward_model.config.score_std == 1.0
    reward_model.config.score_mean, reward_model.config.score_std = 0.5, 2.0


def test_a_model_without_a_scalar_head_is_refused(policies):
    with pytest.raises(UserError, match="linear head `score` with one output, got None"):
        score_head(policies["llama"])
    with pytest.raises(UserError, match="got Linear"):
        score_head(LlamaForSequenceClassification(llama_config(num_labels=2)))


# Loading

TEXTS = ["the film was good .", "the music is never bad ."] * 3


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(folder, model, tokenizer) of a tiny policy."""
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    torch.manual_seed(0)
    model, tokenizer = load_policy("tiny", tokenizer_texts=TEXTS)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder, model, tokenizer


def test_tiny_is_a_small_llama_with_its_own_tokenizer(tiny):
    folder, model, tokenizer = tiny
    assert tokenizer.pad_token_id != tokenizer.eos_token_id and tokenizer("the film")["input_ids"] != []
    assert model.config.vocab_size == len(tokenizer) and 0.7e6 < sum(p.numel() for p in model.parameters()) < 1.5e6
    loaded, again = load_policy(str(folder))
    assert again("the film was bad")["input_ids"] == tokenizer("the film was bad")["input_ids"]
    batch = collate(
        [tokenizer("the film")["input_ids"]], [tokenizer(" was good .")["input_ids"]], tokenizer.pad_token_id
    )
    assert torch.equal(response_logprobs(loaded, batch), response_logprobs(model, batch))
    assert not loaded.training and loaded.dtype == torch.float32
    assert load_policy(str(folder), dtype="bfloat16")[0].dtype == torch.bfloat16


def test_a_reward_model_takes_the_trunk_and_starts_with_a_small_head(tiny, tmp_path):
    folder, policy, tokenizer = tiny
    torch.manual_seed(3)
    model, _ = load_reward_model(str(folder))
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, model.model.get_parameter(name)), name
    head = score_head(model)
    assert head.bias is None and head.weight.shape == (1, 128)
    # 128 draws from N(0, 1/129): their standard deviation is within 4 errors of it.
    assert head.weight.std().item() == pytest.approx(129**-0.5, rel=4 / 256**0.5)
    assert (model.config.score_mean, model.config.score_std) == (0.0, 1.0)
    model.config.score_mean, model.config.score_std = 0.25, 3.0
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, _ = load_reward_model(str(tmp_path))
    tokens, mask = padded([[5, 6, 7]], "right", width=4)
    assert torch.equal(scores(again, tokens, mask), scores(model, tokens, mask))
    assert (again.config.score_mean, again.config.score_std) == (0.25, 3.0)


def test_a_zero_head_gives_zero_values(tiny):
    model, _ = load_reward_model(str(tiny[0]))
    assert values(model, collate([[1, 2]], [[3, 4]], 0)).abs().min() > 0
    zero_head(model)
    assert not values(model, collate([[1, 2]], [[3, 4]], 0)).any()


def test_dropout_is_off(tmp_path, tiny):
    config = GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    assert config.attn_pdrop == config.resid_pdrop == config.embd_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokenizer = train_tokenizer(["ab"] * 2)
    tokenizer.save_pretrained(tmp_path)
    for load in (load_policy, load_reward_model):
        model, _ = load(str(tmp_path))
        model.train()
        tokens, mask = padded([[5, 6, 7]], "right", width=4)
        with torch.no_grad():
            first, second = (hidden_states(model, tokens, mask) for _ in range(2))
        assert torch.equal(first, second)


def test_a_tokenizer_without_pad_pads_with_eos_and_one_without_eos_is_refused(tiny, tmp_path):
    from transformers import PreTrainedTokenizerFast

    _, model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|endoftext|>").save_pretrained(
        tmp_path
    )
    loaded, without_pad = load_policy(str(tmp_path))
    assert without_pad.pad_token_id == without_pad.eos_token_id == loaded.config.pad_token_id
    PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no EOS token"):
        load_policy(str(tmp_path))


def test_loading_errors(tmp_path):
    with pytest.raises(UserError, match='"tiny" is made from scratch and needs texts'):
        load_policy("tiny")
    with pytest.raises(FileNotFoundError):
        load_policy(str(tmp_path / "absent"))


def test_code_that_comes_with_a_model_runs_only_when_asked(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("sys.path", list(sys.path))
    _, model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    places = {f"Auto{kind}": f"brought.{kind}" for kind in ("Config", "ModelForCausalLM")}
    (tmp_path / "config.json").write_text(json.dumps(config | {"model_type": "brought", "auto_map": places}))
    (tmp_path / "brought.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w').close()\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class Config(LlamaConfig):\n    model_type = 'brought'\n"
        "class ModelForCausalLM(LlamaForCausalLM):\n    config_class = Config\n"
    )
    for load in (load_policy, load_reward_model):
        with pytest.raises(UserError, match="needs Python files that come with it; --trust-remote-code runs them"):
            load(str(tmp_path))
    assert not (tmp_path / "ran").exists()
    assert type(load_policy(str(tmp_path), trust_remote_code=True)[0]).__module__.endswith("brought")
    assert (tmp_path / "ran").exists()


def test_loaded_weights_are_aligned(tmp_path, tiny):
    """The last bits of a product depend on it, and files lay the weights at any multiple of 8."""
    _, model, tokenizer = tiny
    tokenizer.save_pretrained(tmp_path)
    for length in (1, 9, 17):
        model.config.name = "x" * length
        model.save_pretrained(tmp_path)
        assert {weight.data_ptr() % 64 for weight in load_policy(str(tmp_path))[0].parameters()} == {0}


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tiny):
    _, model, tokenizer = tiny
    model.save_pretrained(tmp_path)
    more = train_tokenizer(["other words make another and a longer vocabulary of tokens"] * 9)
    assert len(more) > len(tokenizer)
    more.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"it has token {len(more) - 1}, the model {len(tokenizer)} tokens"):
        load_policy(str(tmp_path))
    tokenizer.save_pretrained(tmp_path / "policy")
    model.save_pretrained(tmp_path / "policy")
    load_reference(str(tmp_path / "policy"), tokenizer)
    with pytest.raises(UserError, match="must have the policy's tokenizer: both score the same tokens"):
        load_reference(str(tmp_path / "policy"), more)


def test_what_is_longer_than_the_context_is_refused(policies):
    for model in policies.values():
        limit = model.config.max_position_embeddings
        check_context(model, limit, "the prompt")
        with pytest.raises(UserError, match=f"the prompt has {limit + 1} tokens, and the model's context is {limit}"):
            check_context(model, limit + 1, "the prompt")

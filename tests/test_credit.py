"""Credit: attributions against independent computations, what is made of them, and that it sums to the score."""

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Gemma2Config, GPT2Config, LlamaConfig

from rlhf.attention import AttentionChoice, policy_attention
from rlhf.attribution import attention, grad_x_input, prefix_differences, value_attention
from rlhf.config import UserError
from rlhf.credit import OF_REWARD_MODEL, Shaping, complete, reward_model_credit, shaped_scores, spread, token_scores
from rlhf.data import collate
from rlhf.flags import make_parser, parse_config
from rlhf.model import load_policy, scores
from rlhf.ppo_config import PpoConfig
from rlhf.reading import read_same
from rlhf.rollout import Rollout

VOCABULARY = 50
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "pad_token_id": 0,
}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "pad_token_id": 0}
CONFIGS = {
    "llama": lambda: LlamaConfig(**SIZES),
    "gpt2": lambda: GPT2Config(**GPT2, initializer_range=0.3, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0),
    "gemma2": lambda: Gemma2Config(**SIZES, head_dim=8),
}


def make(name):
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.num_labels, config.score_mean, config.score_std = 1, 0.3, 2.0
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:  # norms that do more than nothing
            torch.nn.init.normal_(parameter, mean=1.0, std=0.2)
    return model.requires_grad_(False)


BATCH = collate([[1, 2, 3], [4], [5, 6]], [[7, 8, 9, 10, 11], [12, 13, 14], [15]], pad_id=0)
READING = read_same(Rollout(BATCH, ["a", "b", "c"], ["d", "e", "f"], torch.ones(3, dtype=torch.bool)))


def of_texts(model, rows):
    """Scores of token lists, each by itself."""
    return torch.stack([scores(model, torch.tensor([row]), torch.ones(1, len(row)).bool())[0] for row in rows])


# Attributions


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_prefix_differences_are_those_of_prefixes_scored_apart(name):
    model = make(name)
    found = prefix_differences(model, READING)
    texts = [row[seen].tolist() for row, seen in zip(BATCH.tokens, BATCH.attention_mask)]
    torch.testing.assert_close(found.scores, of_texts(model, texts), atol=1e-5, rtol=0)
    for row, prompt in enumerate((3, 1, 2)):
        prefix = of_texts(model, [texts[row][: end + 1] for end in range(prompt, len(texts[row]))])
        expected = torch.diff(prefix, prepend=torch.zeros(1))
        credit = found.tokens[row, BATCH.prompt_width :]
        torch.testing.assert_close(credit[: len(expected)], expected, atol=2e-5, rtol=0)
        assert not credit[len(expected) :].any() and not found.tokens[row, : BATCH.prompt_width].any()
    smooth = prefix_differences(model, READING, 0.75)
    torch.testing.assert_close(smooth.tokens.sum(1), found.scores, atol=1e-5, rtol=0)
    heads = found.tokens[0, 3:].cumsum(0).tolist()
    moving = [heads[0]]
    for head in heads[1:-1]:
        moving.append(0.75 * moving[-1] + 0.25 * head)
    expected = torch.diff(torch.tensor([0.0, *moving, heads[-1]]))
    torch.testing.assert_close(smooth.tokens[0, 3:], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_grad_x_input_is_the_slope_along_each_embedding(name):
    """⟨∂R/∂e, e⟩ is dR/dε of e·(1 + ε): against central differences."""
    model = make(name)
    found = grad_x_input(model, READING).tokens
    embed, step = model.get_input_embeddings(), 1e-2
    for row, column in ((0, 0), (0, 4), (1, 5), (2, 3)):
        sides = []
        for sign in (1, -1):

            def scaled(_module, _inputs, output, sign=sign, row=row, column=column):
                output = output.clone()
                output[row, column] *= 1 + sign * step
                return output

            handle = embed.register_forward_hook(scaled)
            sides.append(scores(model, BATCH.tokens, BATCH.attention_mask)[row].item())
            handle.remove()
        slope = (sides[0] - sides[1]) / (2 * step)
        assert found[row, column].item() == pytest.approx(slope, rel=2e-2, abs=2e-3)
    assert not found[~BATCH.attention_mask].any()


def parts(model, name):
    """The last layer's value projection of [B, L, 32], its output projection [32, 32] and the final norm."""
    if name == "llama":
        block = model.model.layers[-1]
        return block.input_layernorm, block.self_attn.v_proj, block.self_attn.o_proj.weight, model.model.norm
    block = model.transformer.h[-1]

    def value(x):
        return block.attn.c_attn(x)[..., 64:]

    return block.ln_1, value, block.attn.c_proj.weight.T, model.transformer.ln_f


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_value_attention_is_the_last_block_taken_apart(name):
    model, seen = make(name), {}
    norm, value, output, final = parts(model, name)
    for key, module in (("in", norm), ("out", final)):
        module.register_forward_hook(lambda _m, inputs, output, key=key: seen.update({key: (inputs[0], output)}))
    found = value_attention(model, READING, AttentionChoice())
    attended = attention(model, READING, AttentionChoice()).tokens
    torch.testing.assert_close(found.weights, attended)

    rows, last = torch.arange(3), torch.tensor([7, 5, 3])
    values = value(seen["in"][1])  # [B, L, heads · 8], two heads share one in the Llama
    values = values.view(3, BATCH.tokens.shape[1], -1, 8).repeat_interleave(4 // (values.shape[-1] // 8), 2)
    x = seen["out"][0][rows, last]
    if name == "llama":
        w_eff = model.score.weight[0] * final.weight * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt()
    else:
        w_eff = model.score.weight[0] * final.weight * (x.var(1, unbiased=False, keepdim=True) + 1e-5).rsqrt()
        w_eff = w_eff - w_eff.mean(1, keepdim=True)
    each = torch.stack([attention(model, READING, AttentionChoice(heads=(h,))).tokens for h in range(4)], 2)
    direction = torch.einsum("bd,dhk->bhk", w_eff, output.view(32, 4, 8))
    expected = torch.einsum("blh,blhk,bhk->bl", each, values, direction) / 2.0  # score_std
    torch.testing.assert_close(found.tokens, torch.where(BATCH.attention_mask, expected, 0), atol=2e-5, rtol=1e-4)
    some = value_attention(model, READING, AttentionChoice(heads=(1, 3))).tokens
    rest = value_attention(model, READING, AttentionChoice(heads=(0, 2))).tokens
    torch.testing.assert_close(some + rest, found.tokens, atol=1e-5, rtol=1e-4)


def test_value_attention_says_where_it_cannot_be():
    with pytest.raises(UserError, match="Gemma2ForSequenceClassification is not supported: a norm, post_feed"):
        value_attention(make("gemma2"), READING, AttentionChoice())
    with pytest.raises(UserError, match="attention_layers must be -1 for value-attention"):
        Shaping("value-attention", attention=AttentionChoice(layers=(-2, -1)))


# Credit of them


def test_signed_credit_by_hand():
    """Σ|a| = 4 against a bound of |R| = 1: a is halved twice; what is missing goes by the weights, or evenly."""
    mask = torch.tensor([[True, True, True, False]] * 2)
    attribution = torch.tensor([[2.0, -1.0, 1.0, 9.0], [0.25, -0.25, 0.0, 9.0]])
    score = torch.tensor([1.0, 0.0])
    weights = torch.tensor([[1.0, 1.0, 2.0, 5.0]] * 2)
    credit = complete(attribution, score, weights, mask)
    torch.testing.assert_close(credit, torch.tensor([[0.625, -0.125, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    even = complete(attribution, score, None, mask, scale=2.0)
    torch.testing.assert_close(even, torch.tensor([[1.0, -0.5, 0.5, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    small = complete(attribution * 1e-3, score, None, mask)  # within the bound: as it is, and the rest of R
    expected = attribution[0, :3] * 1e-3 + (1 - 0.002) / 3
    torch.testing.assert_close(small[0, :3], expected)


def test_a_score_spread_by_attention():
    """The golden row: β of it by the response's share of the attention, the rest on the last token."""
    mask = torch.tensor([[True] * 4])
    credit = spread(torch.tensor([2.5]), torch.tensor([[0.05, 0.10, 0.15, 0.25]]), mask)
    for beta, expected in (
        (0.0, [0, 0, 0, 2.5]),
        (0.8, [0.181818, 0.363636, 0.545455, 1.409091]),
        (1.0, [0.227273, 0.454545, 0.681818, 1.136364]),
    ):
        torch.testing.assert_close(shaped_scores(credit, mask, beta=beta), torch.tensor([expected]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", OF_REWARD_MODEL)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_credit_of_a_reward_model_sums_to_its_scores(name, kind):
    model = make(name)
    found, credit = reward_model_credit(model, READING, Shaping(kind))
    torch.testing.assert_close(found, scores(model, BATCH.tokens, BATCH.attention_mask), atol=1e-5, rtol=0)
    torch.testing.assert_close(credit.sum(1), found, atol=1e-5, rtol=0)
    assert not credit[~BATCH.mask].any()
    same_sign = (credit[0].sign() == found[0].sign()).all()
    assert same_sign or kind != "abc"
    assert not same_sign or kind == "abc" or name == "llama"  # signed
    parts = reward_model_credit(model, READING, Shaping(kind), micro_batch=2)
    torch.testing.assert_close(parts[1], credit, atol=1e-5, rtol=0)


def test_credit_that_needs_no_reward_model(start):
    policy, tokenizer = load_policy(start.policy)
    batch = collate([[5, 6], [7]], [[8, 9, 10, 11], [12, 13, tokenizer.eos_token_id]], tokenizer.pad_token_id)
    rollout = Rollout(batch, ["a", "b"], ["c", "d"], torch.tensor([False, True]))
    score = torch.tensor([2.0, -1.0])
    last = torch.tensor([[0, 0, 0, 1], [0, 0, 1, 0]])
    even = torch.tensor([[0.25] * 4, [1 / 3] * 3 + [0.0]])
    seen = policy_attention(policy, batch)
    seen = seen / seen.sum(1, keepdim=True)
    moved = policy_attention(policy, batch, shift=1)
    moved = moved / moved.sum(1, keepdim=True)
    for shaping, expected in (
        (Shaping("terminal", beta=0.5), last),
        (Shaping("uniform", beta=0.5), 0.5 * even + 0.5 * last),
        (Shaping("abc-d", beta=0.75), 0.75 * seen + 0.25 * last),
        (Shaping("abc-d", beta=1.0, shift=1), moved),
    ):
        earned = token_scores(shaping, rollout, score, None, policy)
        torch.testing.assert_close(earned, expected * score[:, None], atol=1e-6, rtol=1e-5)


def test_the_flags_of_shaping():
    words = (
        "--out o --init i --rm r --reward-shaping abc-d --beta 0.5 --gamma 0.9 --exact-potential --head-reduction max"
    )
    words += " --attention-layers -1 -2 --attention-heads 0 3 --abc-d-shift 1"
    config = parse_config(make_parser("ppo", "", PpoConfig), "ppo", PpoConfig, words.split())
    choice = AttentionChoice((-1, -2), (0, 3), "max")
    assert config.shaping() == Shaping("abc-d", beta=0.5, gamma=0.9, attention=choice, shift=1)
    plain = PpoConfig(out="o", init="i", rm="r", gamma=0.9)
    assert plain.shaping() == Shaping("terminal", beta=0.8) and plain.estimator == "gae"
    with pytest.raises(UserError, match="reward_shaping span is what a reward function says, so it needs reward_fn"):
        PpoConfig(out="o", init="i", rm="r", reward_shaping="span")
    with pytest.raises(UserError, match="attention_layers must be -1 for value-attention"):
        PpoConfig(out="o", init="i", rm="r", reward_shaping="value-attention", attention_layers=(-1, -2))

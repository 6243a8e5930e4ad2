"""A reward model with another tokenizer: where the tokens stand, and credit that keeps its sum on the way.

Three real tokenizers trained on the same text: byte-level BPE (the policy's), which splits characters that it has not
seen often; WordPiece; and Unigram.
"""

import itertools
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast

from rlhf import best_of_n, ppo, rrhf
from rlhf.config import UserError
from rlhf.credit import OF_REWARD_MODEL, Shaping, reward_model_credit
from rlhf.data import collate, encode_prompt, encode_response
from rlhf.model import scores, train_tokenizer
from rlhf.offsets import byte_spans, text_spans
from rlhf.reading import Reading, Retokenizer, read_same, same_tokens
from rlhf.rollout import Rollout
from rlhf.scorer import RewardModelScorer, scorer_of

TEXTS = [
    "in this film the plot is good and the music is bad , naïve but nice",
    "as a fan of the story 😀 i like 中文 films",
    "le café était fermé , quel dommage 😀",
    "这部电影很好看 中文字符",
] * 4
PAIRS = [  # prompt, response, whether it ended by itself
    ("in this film the plot", " is good 😀 , 中文字符 🤖 nai\u0308ve", True),
    ("", "这部电影很好看", True),
    ("as a fan 🤖", "🤖🤖 of thé", False),
    ("the music", "", True),
    ("the  story ", "\n  is   bad", True),
]


def tokenizer_of(kind):
    if kind == "bpe":
        return train_tokenizer(TEXTS, 400)
    if kind == "bpe-trimmed":  # as GPT-2's: the offsets leave out the space that a token begins with
        tokenizer = train_tokenizer(TEXTS, 400)
        tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
        return tokenizer
    if kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
        special = ["[UNK]", "[PAD]", "[CLS]", "[SEP]"]
        trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(TEXTS, trainer)
        tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    else:
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        special = ["<unk>", "<pad>", "<s>", "</s>"]
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False
        )
        tokenizer.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=special[0],
        pad_token=special[1],
        bos_token=special[2],
        eos_token=special[3],
    )


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: tokenizer_of(kind) for kind in ("bpe", "bpe-trimmed", "wordpiece", "unigram")}


def model_of(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
    )
    config.num_labels, config.score_mean, config.score_std = 1, 0.0, 1.0
    return AutoModelForSequenceClassification.from_config(config).eval().requires_grad_(False)


def rollout_of(tokenizer, pairs=PAIRS):
    prompts = [encode_prompt(tokenizer, prompt) for prompt, _, _ in pairs]
    responses = [encode_response(tokenizer, text)[: None if ended else -1] for _, text, ended in pairs]
    batch = collate(prompts, responses, tokenizer.pad_token_id)
    ended = torch.tensor([ended for *_, ended in pairs])
    return Rollout(batch, [prompt for prompt, _, _ in pairs], [text for _, text, _ in pairs], ended)


# Where tokens stand


@pytest.mark.parametrize("kind", ["bpe", "bpe-trimmed", "wordpiece", "unigram"])
def test_spans_tile_the_text(tokenizers, kind):
    for prompt, response, _ in PAIRS:
        text = prompt + response
        ids, spans = text_spans(tokenizers[kind], text)
        assert ids == tokenizers[kind](text)["input_ids"]
        assert all(a == b for (_, a), (b, _) in itertools.pairwise(spans)) and (not spans or spans[0][0] == 0)
        assert not text.strip() or spans[-1][1] == len(text.encode())


def test_characters_that_several_tokens_share(tokenizers):
    """Byte by byte where the vocabulary has no more of the character; the policy's side agrees."""
    tokenizer = tokenizers["bpe"]
    text = "a 🤖字"  # F0 9F A4 96: the corpus has F0 9F of another emoji
    ids, spans = text_spans(tokenizer, text)
    pieces = [text.encode()[start:end] for start, end in spans]
    assert b"".join(pieces) == text.encode() and b"\xa4" in pieces and b"\x96" in pieces
    assert byte_spans(tokenizer, ids) == spans


def test_a_text_with_its_response_found_by_bytes(tokenizers):
    """By hand: "the m" + "usic" is two words of WordPiece; the second begins 2 bytes before the response."""
    read = Retokenizer(tokenizers["wordpiece"], tokenizers["bpe"]).read
    ids, spans = read("the m", "usic", ended=True)
    names = tokenizers["wordpiece"].convert_ids_to_tokens(ids)
    assert names[0] == "[CLS]" and names[-1] == "[SEP]" and "".join(names[1:-1]).replace("##", "") == "themusic"
    assert spans[0] == (-1, -1) and spans[-1] == (4, 4)
    inside = [span for span in spans[1:-1] if span != (-1, -1)]
    assert inside[0][0] <= 0 < inside[0][1] and inside[-1][1] == 4
    cut, _ = read("the m", "usic", ended=False)
    assert cut == ids[:-1]
    assert read("the m", "", ended=True)[1][-1] == (0, 0)


def test_the_same_tokenizer_gives_the_direct_reading(tokenizers):
    """What is read anew in the policy's own tokenizer is what the policy wrote, so all credit is the same."""
    tokenizer = tokenizers["bpe"]
    model, rollout = model_of(tokenizer), rollout_of(tokenizer, [PAIRS[0], ("the music", " is 🤖 bad", True)])
    anew = Retokenizer(tokenizer, tokenizer)(rollout)
    direct = read_same(rollout)
    torch.testing.assert_close(
        scores(model, anew.tokens, anew.attention_mask),
        scores(model, direct.tokens, direct.attention_mask),
        atol=1e-5,
        rtol=0,
    )
    for kind in OF_REWARD_MODEL:
        found = reward_model_credit(model, anew, Shaping(kind))
        expected = reward_model_credit(model, direct, Shaping(kind))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", OF_REWARD_MODEL)
@pytest.mark.parametrize("reader", ["wordpiece", "unigram"])
def test_credit_keeps_its_sum_between_tokenizers(tokenizers, reader, kind):
    model, rollout = model_of(tokenizers[reader]), rollout_of(tokenizers["bpe"])
    reading = Retokenizer(tokenizers[reader], tokenizers["bpe"])(rollout)
    found, credit = reward_model_credit(model, reading, Shaping(kind))
    torch.testing.assert_close(credit.sum(1), found, atol=1e-6, rtol=1e-6)
    assert credit.shape == rollout.batch.mask.shape and not credit[~rollout.batch.mask].any()
    assert (credit[0].abs() > 1e-4).sum() > 5
    alone = Retokenizer(tokenizers[reader], tokenizers["bpe"])(rollout_of(tokenizers["bpe"], PAIRS[:1]))
    _, first = reward_model_credit(model, alone, Shaping(kind))
    torch.testing.assert_close(credit[0, : first.shape[1]], first[0], atol=1e-5, rtol=1e-4)


def test_values_go_by_shared_bytes(tokenizers):
    """By hand, bytes from the start of the response: three tokens of the reward model on four of the policy."""
    mask = torch.ones(1, 4, dtype=torch.bool)
    spans = torch.tensor([[[-1, -1], [-2, 2], [2, 5], [5, 5]]])
    policy_spans = torch.tensor([[[0, 1], [1, 3], [3, 5], [5, 5]]])
    ids = torch.zeros(1, 4, dtype=torch.int64)
    reading = Reading(ids, ids.bool(), spans[..., 1] >= 0, mask, spans, policy_spans)
    values = torch.tensor([[9.0, 1.0, 3.0, 0.5]])
    torch.testing.assert_close(reading.carry(values), torch.tensor([[0.25, 1.25, 2.0, 0.5]]))  # half of the 1 is prompt
    torch.testing.assert_close(reading.carry(values, whole=True), torch.tensor([[0.5, 1.5, 2.0, 0.5]]))
    assert reading.last_response().tolist() == [3]


# Chat templates

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content | trim }}</{{ m.role }}>\n{% endfor %}"


def test_a_response_inside_a_chat_template(tokenizers):
    tokenizer = tokenizer_of("unigram")
    with pytest.raises(UserError, match="has no chat template"):
        Retokenizer(tokenizer, tokenizers["bpe"], chat_template=True)
    tokenizer.chat_template = TEMPLATE
    reader = Retokenizer(tokenizer, tokenizers["bpe"], chat_template=True)
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "good ?"}]
    text, first = replace(reader, messages={"<markup> good ?": asked}).render("<markup> good ?", "yes")
    assert text == "<system>be brief</system>\n<user>good ?</user>\n<assistant>yes</assistant>\n"
    assert text.encode()[first:].startswith(b"yes<")
    text, first = reader.render("is it good ?", " is good")
    assert text == "<user>is it good ?</user>\n<assistant>is good</assistant>\n"
    assert text.encode()[first + 1 :].startswith(b"is good<")  # its first byte, a space, the template has taken
    ids, spans = reader.read("is it good ?", " is good", ended=True)
    inside = [span for span in spans if span != (-1, -1)]
    assert inside[0][0] <= 1 and inside[-1][1] == len(text.encode()) - first
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    cut, places = reader.read("is it good ?", " is good", ended=False)
    assert cut == ids[: len(cut)] and places[-1][0] < 8 and len(cut) < len(ids)
    # The end of the template is no part of the response, but what the score is read at: its credit goes to the EOS.
    rollout = rollout_of(tokenizers["bpe"], [("is it good ?", " is good", True)])
    reading = reader(rollout)
    assert reading.last_response().item() < len(ids) - 1
    last = torch.zeros(1, len(ids))
    last[0, -1] = 1.0
    carried = reading.carry(last)
    assert carried[0, -1] == 1 and carried.sum() == 1
    found = {
        query: reward_model_credit(model_of(tokenizer), reading, Shaping("abc", query=query))[1]
        for query in ("pooled", "response")
    }
    assert not torch.allclose(found["pooled"], found["response"], atol=1e-4)


# Stages


@pytest.fixture(scope="module")
def foreign(tmp_path_factory, tokenizers):
    """Folder of a reward model with a WordPiece tokenizer."""
    folder = tmp_path_factory.mktemp("foreign")
    model_of(tokenizers["wordpiece"]).save_pretrained(folder)
    tokenizers["wordpiece"].save_pretrained(folder)
    return str(folder)


def test_which_reading_a_stage_takes(start, foreign, tokenizers):
    config = ppo.PpoConfig(out="o", init="i", rm=foreign)
    model, own = model_of(tokenizers["wordpiece"]), tokenizers["bpe"]
    assert scorer_of(config, (model, own), own, None) == RewardModelScorer(model)
    assert not same_tokens(tokenizers["wordpiece"], own)
    asked = [{"role": "user", "content": "Is it good?"}]
    task = SimpleNamespace(rows={"<u>Is it good?": {"prompt": asked}, "the music": {"tag": 1}})
    scorer = scorer_of(config, (model, tokenizers["wordpiece"]), own, task)
    assert scorer.read == Retokenizer(tokenizers["wordpiece"], own, False, {"<u>Is it good?": asked})
    rollout = rollout_of(own)
    ids = [
        tokenizers["wordpiece"](prompt + text)["input_ids"][: None if ended else -1] for prompt, text, ended in PAIRS
    ]
    for row, each in enumerate(ids):
        expected = scores(model, torch.tensor([each]), torch.ones(1, len(each)).bool())
        torch.testing.assert_close(scorer(rollout).scores[row], expected[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("shaping", ["abc", "prefix-diff"])
def test_ppo_with_another_tokenizer(tmp_path, start, foreign, capsys, shaping):
    settings = {"steps": 1, "batch_size": 8, "response_length": 8, "eval_samples": 4, "num_samples": 4}
    folder = ppo.main(
        ppo.PpoConfig(out=str(tmp_path), init=start.policy, rm=foreign, reward_shaping=shaping, **settings)
    )
    assert f"the value model starts from {start.policy}" in capsys.readouterr().err
    for line in (folder / "samples.jsonl").read_text().splitlines():
        sample = json.loads(line)
        assert sum(sample["credit"]) == pytest.approx(sample["score"], abs=1e-4)
    metrics = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert metrics["eval/proxy"] is not None


def test_other_stages_with_another_tokenizer(tmp_path, start, foreign):
    common = {"init": start.policy, "rm": foreign, "response_length": 6, "num_prompts": 4, "batch_size": 4}
    rrhf.main(rrhf.RrhfConfig(out=str(tmp_path / "a"), rounds=1, num_candidates=2, eval_samples=4, **common))
    folder = best_of_n.main(best_of_n.BestOfNConfig(out=str(tmp_path / "b"), n=2, epochs=1, eval_samples=4, **common))
    assert (folder / "selected.jsonl").read_text()

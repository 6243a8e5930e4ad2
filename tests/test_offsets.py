"""Byte offsets of tokens, for the three families of tokenizers."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rlhf.data import decode, encode_response
from rlhf.model import EOS, PAD, train_tokenizer
from rlhf.offsets import byte_spans

TEXTS = ["the film was good .", "naïve café 映画 🎬", " a film , the café"]


def word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=90, special_tokens=[EOS, PAD, "[UNK]"]))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def byte_fallback():
    """As Llama 2 has it: pieces with ▁ for a space, and bytes for what no piece covers."""
    vocabulary = {EOS: 0, PAD: 1} | {f"<0x{byte:02X}>": 2 + byte for byte in range(256)}
    pieces = ["▁", "f", "i", "l", "m", "▁film", "▁the", *" .,acdeghowstx"]
    vocabulary |= {piece: len(vocabulary) + i for i, piece in enumerate(pieces)}
    merges = []
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([EOS, PAD])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)


def covered(tokenizer, ids):
    """What the spans cut out of the text, one piece of bytes a token."""
    text = decode(tokenizer, ids[:-1]).encode()
    spans = byte_spans(tokenizer, ids)
    assert [start for start, _ in spans] == [0, *(end for _, end in spans[:-1])] and spans[-1] == (len(text),) * 2
    return [text[start:end] for start, end in spans]


def test_bytes_of_a_character_that_tokens_share():
    tokenizer = train_tokenizer(["the film was good ."] * 3)
    ids = encode_response(tokenizer, " film é🎬")
    assert covered(tokenizer, ids) == [b" film", b" ", b"\xc3", b"\xa9", b"\xf0", b"\x9f", b"\x8e", b"\xac", b""]


def test_word_pieces_bring_the_space_before_them():
    tokenizer = word_piece()
    ids = encode_response(tokenizer, "the film , the café")
    pieces = covered(tokenizer, ids)
    assert len(pieces) == len(ids) and pieces[-1] == b""
    tokens = tokenizer.convert_ids_to_tokens(ids[:-1])
    for place, (token, piece) in enumerate(zip(tokens, pieces)):
        written = token.removeprefix("##") if token.startswith("##") or not place else " " + token
        assert piece.decode() == written


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        (["▁the", "▁film", "<0xC3>", "<0xA9>", "<0xE6>", "<0x98>", "<0xA0>", "▁film"], None),
        # The text begins with bytes: the first ▁ is then no first character, and its space stays.
        (["<0xC3>", "<0xA9>", "▁film", "x"], [b"\xc3", b"\xa9", b" film", b"x"]),
    ],
)
def test_byte_fallback(tokens, expected):
    tokenizer = byte_fallback()
    ids = [*tokenizer.convert_tokens_to_ids(tokens), tokenizer.eos_token_id]
    expected = expected or [b"the", b" film", b"\xc3", b"\xa9", b"\xe6", b"\x98", b"\xa0", b" film"]
    assert covered(tokenizer, ids) == [*expected, b""]


def test_a_response_that_was_cut_off_has_no_eos():
    tokenizer = train_tokenizer(["the film was good ."] * 3)
    assert byte_spans(tokenizer, tokenizer(" film")["input_ids"]) == [(0, 5)] and byte_spans(tokenizer, []) == []


def test_bytes_that_are_no_character_are_part_of_the_text_as_it_is_decoded():
    tokenizer = train_tokenizer(["the film was good ."] * 3)
    lead, film = tokenizer("é")["input_ids"][0], tokenizer(" film")["input_ids"]
    ids = [*film, lead, *film, lead, lead, tokenizer.eos_token_id]
    text = decode(tokenizer, ids[:-1])
    assert text == " film\ufffd film\ufffd\ufffd"
    assert byte_spans(tokenizer, ids) == [(0, 5), (5, 5), (5, 13), (13, 13), (13, 19), (19, 19)]

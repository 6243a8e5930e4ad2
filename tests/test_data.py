"""Data sources, splits, text ↔ tokens, and the padding rule."""

import json

import pytest
import torch

from rlhf.config import UserError
from rlhf.data import (
    Demonstration,
    Ranking,
    collate,
    decode_tokens,
    encode_prompt,
    encode_response,
    encode_text,
    epoch_order,
    load_task,
    split,
    task_of,
)
from rlhf.model import train_tokenizer
from rlhf.sft import SftConfig


def write_rows(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


# Rows of files


def test_rows_of_every_form(tmp_path):
    rows = [
        {"prompt": "a", "response": " b"},
        {"prompt": "c", "chosen": " good", "rejected": " bad"},
        {"prompt": "d", "responses": [" x", " y", " z"], "scores": [0, -1.5, 0]},
        {"prompt": "e"},
    ]
    task = load_task(write_rows(tmp_path / "rows.jsonl", *rows), seed=0)
    rankings = task.rankings + task.heldout_rankings
    assert len(task.prompts) == 3 and len(task.eval_prompts) == 1
    assert sorted(task.prompts + task.eval_prompts) == ["a", "c", "d", "e"]
    held_out = set(task.eval_prompts)
    assert task.demonstrations == ([] if "a" in held_out else [Demonstration("a", " b")])
    assert Ranking("c", (" good", " bad"), (1.0, 0.0)) in rankings
    # A score of 0 is a score, not a missing one.
    assert Ranking("d", (" x", " y", " z"), (0.0, -1.5, 0.0)) in rankings
    assert {each.prompt for each in task.heldout_rankings} <= held_out
    assert task.gold is None and task.name == "rows"


def test_prompts_are_held_out_whole(tmp_path):
    rows = [{"prompt": f"p{i % 30}", "chosen": f" c{i}", "rejected": f" r{i}"} for i in range(120)]
    task = load_task(write_rows(tmp_path / "pairs.jsonl", *rows), seed=3)
    assert len(task.eval_prompts) == 3 and len(task.heldout_rankings) == 12 and len(task.rankings) == 108
    assert not {each.prompt for each in task.rankings} & {each.prompt for each in task.heldout_rankings}
    assert set(task.eval_prompts).isdisjoint(task.prompts)


def test_folder_json_list_and_unicode_line_separator(tmp_path):
    write_rows(
        tmp_path / "b.jsonl", '{"prompt": "one\u2028two", "response": " r"}', "", {"prompt": "q", "response": " s"}
    )
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": "z", "response": " t"}], indent=2))
    (tmp_path / "notes.txt").write_text("not data")
    task = load_task(str(tmp_path), seed=0)
    assert sorted(task.prompts + task.eval_prompts) == ["one\u2028two", "q", "z"]


@pytest.mark.parametrize(
    "row, message",
    [
        ("{not json", "rows.jsonl:2: not JSON"),
        ("[1]", "rows.jsonl:2: a row must be a JSON object, got list"),
        ({"response": "b"}, 'rows.jsonl:2: a row must have "prompt", got "response"'),
        ({"prompt": 3, "response": "b"}, 'rows.jsonl:2: "prompt" must be a string, got 3'),
        ({"prompt": "a", "chosen": "b"}, 'rows.jsonl:2: a row must have "rejected"'),
        (
            {"prompt": "a", "responses": ["b"], "scores": [1, 2]},
            "rows.jsonl:2: wanted one score for each response, got 1 and 2",
        ),
        (
            {"prompt": "a", "responses": [], "scores": []},
            "rows.jsonl:2: wanted one score for each response, got 0 and 0",
        ),
        (
            {"prompt": "a", "responses": ["b"], "scores": [None]},
            'rows.jsonl:2: each of "scores" must be a finite number',
        ),
        (
            {"prompt": "a", "responses": ["b"], "scores": [True]},
            'rows.jsonl:2: each of "scores" must be a finite number',
        ),
        ({"prompt": "a", "responses": "b", "scores": [1]}, "rows.jsonl:2: \"responses\" must be a list, got 'b'"),
        (
            '{"prompt": "a", "responses": ["b"], "scores": [NaN]}',
            'rows.jsonl:2: each of "scores" must be a finite number',
        ),
    ],
)
def test_bad_rows_name_file_and_line(tmp_path, row, message):
    path = write_rows(tmp_path / "rows.jsonl", {"prompt": "a", "response": " b"}, row)
    with pytest.raises(UserError) as error:
        load_task(path, seed=0)
    assert message in str(error.value)


def test_bad_sources(tmp_path):
    with pytest.raises(FileNotFoundError, match='data must be "reviews", a file, a folder or a hub name'):
        load_task(str(tmp_path / "absent.jsonl"), seed=0)
    with pytest.raises(UserError, match=r"no \.jsonl, \.json, \.csv, \.tsv, \.parquet file"):
        load_task(str(tmp_path), seed=0)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        load_task(str(tmp_path / "empty.jsonl"), seed=0)
    (tmp_path / "notes.txt").write_text("prompt")
    with pytest.raises(UserError, match=r"must be a \.jsonl, \.json, \.csv, \.tsv, \.parquet file"):
        load_task(str(tmp_path / "notes.txt"), seed=0)


@pytest.mark.parametrize("count, fraction, held_out", [(10, 0.2, 2), (3, 0.01, 1), (2, 0.9, 1), (1, 0.5, 0)])
def test_split_is_disjoint_seeded_and_keeps_a_rest(count, fraction, held_out):
    items = list(range(count))
    out, rest = split(items, 5, fraction)
    assert len(out) == held_out and sorted(out + rest) == items
    assert (out, rest) == split(items, 5, fraction)


def test_split_depends_on_the_seed():
    assert split(range(100), 0)[0] != split(range(100), 1)[0]


def test_stages_with_other_seeds_hold_out_the_same():
    first, second, third = (
        task_of(SftConfig(out="o", data="reviews", seed=seed, data_seed=data_seed), None)
        for seed, data_seed in ((0, 0), (5, 0), (5, 1))
    )
    assert first == second
    assert first.eval_prompts != third.eval_prompts and first.demonstrations != third.demonstrations


def test_epoch_order_is_a_function_of_seed_and_epoch():
    assert sorted(epoch_order(50, 0, 0)) == list(range(50))
    torch.manual_seed(123)  # the global generator must not matter
    assert epoch_order(50, 0, 1) == epoch_order(50, 0, 1)
    assert len({tuple(epoch_order(50, seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9


# Text ↔ tokens


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the film was good . naïve café 映画"] * 3)


def test_texts_come_back_exactly(tokenizer):
    for text in (" the film was good .", "two  spaces\nand a line", "naïve 映画 🎬", ""):
        ids = encode_response(tokenizer, text)
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(ids[:-1], clean_up_tokenization_spaces=False) == text
    assert decode_tokens(tokenizer, encode_response(tokenizer, " film")) == [" film", tokenizer.eos_token]


def test_prompt_and_response_meet_at_a_token_border(tokenizer):
    prompt, response = "the film", " was good ."
    ids = encode_text(tokenizer, prompt, response)
    assert ids == encode_prompt(tokenizer, prompt) + encode_response(tokenizer, response)
    assert ids[:-1] == tokenizer(prompt + response)["input_ids"]


def test_an_empty_prompt_starts_from_eos_only_where_a_policy_predicts(tokenizer):
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_token_id]
    assert encode_text(tokenizer, "", "x") == encode_response(tokenizer, "x")


# Batches


def test_collate_pads_prompts_left_and_responses_right():
    batch = collate([[5], [6, 7, 8]], [[1, 2, 3], [4]], pad_id=0)
    assert batch.tokens.tolist() == [[0, 0, 5, 1, 2, 3], [6, 7, 8, 4, 0, 0]]
    assert batch.attention_mask.int().tolist() == [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]
    assert batch.mask.int().tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.responses.tolist() == [[1, 2, 3], [4, 0, 0]] and batch.prompt_width == 3
    assert batch.position_ids.tolist() == [[0, 0, 0, 1, 2, 3], [0, 1, 2, 3, 3, 3]]


def test_masks_come_from_lengths_even_where_real_tokens_equal_the_pad_id():
    batch = collate([[9, 9]], [[9, 1, 9]], pad_id=9)
    assert batch.mask.all() and batch.attention_mask.all()


def test_rows_and_split_keep_widths():
    batch = collate([[1], [2, 3], [4]], [[5], [6], [7, 8]], pad_id=0)
    part = batch.rows(torch.tensor([2, 0]))
    assert part.tokens.tolist() == [[0, 4, 7, 8], [0, 1, 5, 0]] and part.prompt_width == 2
    assert [len(each) for each in batch.split(2)] == [2, 1] and len(batch.split(None)) == 1
    assert torch.cat([each.tokens for each in batch.split(1)]).equal(batch.tokens)


def test_collate_refuses_unequal_counts():
    with pytest.raises(ValueError, match="one response for each prompt, got 1 and 2"):
        collate([[1], [2]], [[3]], pad_id=0)

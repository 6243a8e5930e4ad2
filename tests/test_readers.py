"""Files, forms of rows, chat templates: what becomes of the data that people have."""

import csv
import gzip
import hashlib
import json
import os
import random
import sys
import types
from itertools import takewhile

import pytest

from rlhf.chat import Chat, renderer_hash
from rlhf.config import UserError
from rlhf.data import Demonstration, Ranking, load_task
from rlhf.formats import Parser, split_texts, split_transcripts
from rlhf.model import train_tokenizer
from rlhf.readers import read_rows


def parse(row, **columns):
    return Parser(columns=columns)("rows.jsonl:7", row)


def ranking(row, **columns):
    return parse(row, **columns).ranking


CHAT = [{"role": "user", "content": "Hi"}]
HI = "\n\nHuman: Hi\n\nAssistant:"


def answer(text):
    return [{"role": "assistant", "content": text}]


# Forms


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "a", "response": " b"}, "a", " b"),
        ({"prompt": "a", "completion": " b"}, "a", " b"),
        ({"prompt": CHAT, "completion": answer("b")}, HI, " b"),
        ({"prompt": CHAT, "completion": "b"}, HI, " b"),
        ({"messages": [*CHAT, *answer("b")]}, HI, " b"),
        ({"messages": [{"role": "system", "content": "S"}, *CHAT, *answer("b")]}, "\n\nSystem: S" + HI, " b"),
        ({"messages": [*CHAT, *answer("b"), *CHAT, *answer("c")]}, HI + " b" + HI, " c"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "b"}]}, HI, " b"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, *answer("b")]}, HI, " b"),
        ({"user_input": "Hi", "completion": "b"}, HI, " b"),
        ({"user_input": "Hi", "completion": "b", "score": None}, HI, " b"),
        ({"instruction": "Do", "input": "x", "output": "y"}, "\n\nHuman: Do\n\nx\n\nAssistant:", " y"),
        ({"instruction": "Do", "input": "", "output": "y"}, "\n\nHuman: Do\n\nAssistant:", " y"),
        ({"text": "all of it"}, "", "all of it"),
    ],
)
def test_demonstrations(row, prompt, response):
    record = parse(row)
    assert record.demonstration == Demonstration(prompt, response) and record.prompt == prompt
    assert record.ranking is None


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "chosen": " b", "rejected": " c"}, Ranking("a", (" b", " c"), (1.0, 0.0))),
        (
            {"prompt": "a", "chosen": " b", "rejected": " c", "margin": 0.5},
            Ranking("a", (" b", " c"), (1.0, 0.0), margin=0.5),
        ),
        ({"prompt": CHAT, "chosen": answer("b"), "rejected": answer("c")}, Ranking(HI, (" b", " c"), (1.0, 0.0))),
        (
            {"chosen": [*CHAT, *answer("b")], "rejected": [*CHAT, *answer("c")], "score_chosen": 8.0},
            Ranking(HI, (" b", " c"), (1.0, 0.0)),
        ),
        (
            {"prompt": "Hi", "chosen": [*CHAT, *answer("b")], "rejected": [*CHAT, *answer("c")]},
            Ranking(HI, (" b", " c"), (1.0, 0.0)),
        ),
        ({"chosen": HI + " b", "rejected": HI + " c"}, Ranking(HI, (" b", " c"), (1.0, 0.0))),
        (
            {"query": "q:", "responses": ["a", "b", "c"], "scores": [0, -1.5, "2"]},
            Ranking("q:", ("a", "b", "c"), (0.0, -1.5, 2.0)),
        ),
        ({"prompt": CHAT, "responses": ["a", "b"], "scores": [1, 2]}, Ranking(HI, (" a", " b"), (1.0, 2.0))),
        ({"prompt": "a", "completion": " b", "label": False}, Ranking("a", (" b",), (0.0,))),
        # A score of 0 is a score.
        ({"user_input": "Hi", "completion": "b", "score": 0}, Ranking(HI, (" b",), (0.0,))),
        (
            {"prompt": "a", "response": " b", "score": 3, "annotator": 7},
            Ranking("a", (" b",), (3.0,), annotators=("7",)),
        ),
        (
            {"history": "Hi", "human_ref_A": "b", "human_ref_B": "c", "labels": 0, "domain": "askhr_test"},
            Ranking(HI, (" c", " b"), (1.0, 0.0), source="askhr_test"),
        ),
        (
            {"history": "Hi", "human_ref_A": "b", "human_ref_B": "c", "labels": 1, "score_ratio": 2.0},
            Ranking(HI, (" b", " c"), (1.0, 0.0)),
        ),
        (
            {"instruction": "Hi", "input": "", "output_1": "b", "output_2": "c", "preference": 2},
            Ranking(HI, (" c", " b"), (1.0, 0.0)),
        ),
        (
            {"instruction": "Hi", "input": "", "output_1": "b", "output_2": "c", "preference": 1.25},
            Ranking(HI, (" b", " c"), (1.0, 0.0), probability=0.75),
        ),
        (
            {"instruction": "Hi", "output_1": "b", "output_2": "c", "preference": 1.5},
            Ranking(HI, (" b", " c"), (0.0, 0.0)),
        ),
        ({"user_input": "Hi", "completion_a": "b", "completion_b": "c"}, Ranking(HI, (" b", " c"), (1.0, 0.0))),
        (
            {"prompt": "a", "chosen": " b", "rejected": " c", "source": "mine", "probability": 0.9},
            Ranking("a", (" b", " c"), (1.0, 0.0), probability=0.9, source="mine"),
        ),
    ],
)
def test_rankings(row, expected):
    assert ranking(row) == expected and parse(row).prompt == expected.prompt


def test_a_response_that_was_held_for_good_is_a_demonstration_too():
    assert parse({"prompt": "a", "completion": " b", "label": True}).demonstration == Demonstration("a", " b")
    assert parse({"prompt": "a", "completion": " b", "label": "false"}).demonstration is None
    assert parse({"prompt": "a", "response": " b", "score": 5}).demonstration is None


def test_prompts_keep_their_columns_and_messages():
    record = parse({"prompt": CHAT, "reward_model": {"ground_truth": "4"}, "data_source": "sums"})
    assert record.prompt == HI and record.demonstration is record.ranking is None
    assert record.values["prompt"] == CHAT and record.values["reward_model"] == {"ground_truth": "4"}
    record = parse({"messages": CHAT})
    assert record.prompt == HI and record.demonstration is None


def test_columns_of_other_names():
    row = {"question": "q", "good": " b", "bad": " c", "prompt": "not this one"}
    found = ranking(row, prompt="question", chosen="good", rejected="bad")
    assert found == Ranking("q", (" b", " c"), (1.0, 0.0))
    # Two names that change places.
    assert ranking({"prompt": "p", "chosen": " b", "rejected": " c"}, chosen="rejected", rejected="chosen") == Ranking(
        "p", (" c", " b"), (1.0, 0.0)
    )
    with pytest.raises(UserError, match=r'7: --prompt-key q: there is no such column in "question", "good", "bad'):
        ranking(row, prompt="q")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"transcript": "…", "min_harmlessness_score_transcript": 1.0}, "red-team transcripts hold no preferences"),
        ({"prompts": "a"}, 'a row must have "prompt" .* or the columns of another known form; got "prompts"'),
        ({"chosen": " b"}, 'a row must have "rejected", got "chosen"'),
        ({"prompt": "a", "chosen": 1, "rejected": ""}, '"chosen" must be a string, got 1'),
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: c\n\nAssistant: b"},
            "share no 'Assistant:'",
        ),
        ({"chosen": answer("a"), "rejected": answer("b")}, "share no message before an answer"),
        ({"messages": [{"role": "user"}]}, 'a message of "messages" must have a text "role" and "content", got {'),
        ({"messages": []}, r'"messages" must be a text or a list of messages, got \[\]'),
        ({"prompt": CHAT, "chosen": CHAT, "rejected": answer("c")}, "an answer must begin with an assistant's message"),
        ({"user_input": "a", "completion": "b", "score": "good"}, "\"score\" must be a finite number, got 'good'"),
        ({"prompt": "a", "completion": "b", "label": "maybe"}, "\"label\" must be true or false, got 'maybe'"),
        ({"history": "a", "human_ref_A": "b", "human_ref_B": "c", "labels": 2}, '"labels" must be 1 where A is better'),
        (
            {"instruction": "a", "output_1": "b", "output_2": "c", "preference": 0},
            '"preference" must lie betw',
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "probability": 2}, "must lie in 0 to 1, got 2"),
        (
            {"prompt": "a", "responses": ["b"], "scores": [1], "annotators": ["x", "y"]},
            '"annotators" must be a list',
        ),
    ],
)
def test_bad_rows(row, message):
    with pytest.raises(UserError, match=rf"rows\.jsonl:7: .*{message}"):
        parse(row)


# Prompts that are not said


def naive(chosen, rejected):
    """The common start of both texts, a space at its end given back: what TRL's extract_prompt does."""
    shared = len(list(takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected))))
    if shared and chosen[shared - 1] == " ":
        shared -= 1
    return chosen[:shared]


def transcripts(count):
    """Rows as in Anthropic's HH, with the true prompt; about every fifth pair of answers begins with equal letters."""
    rng = random.Random(0)
    words = ["I", "you", "the", "I'm", "it", "what", "how", "can", "help", "think", "that", "is"]
    for _ in range(count):
        turns = "".join(
            f"\n\nHuman: {' '.join(rng.choices(words, k=5))}?\n\nAssistant: {' '.join(rng.choices(words, k=6))}."
            for _ in range(rng.randrange(3))
        )
        prompt = turns + f"\n\nHuman: {' '.join(rng.choices(words, k=4))}?\n\nAssistant:"
        first, second = (" ".join(rng.choices(words, k=rng.randint(2, 7))) for _ in range(2))
        if first != second:
            yield prompt, f"{prompt} {first}", f"{prompt} {second}"


def test_no_prompt_of_a_transcript_has_characters_of_an_answer():
    rows = list(transcripts(2000))
    leaks = sum(naive(chosen, rejected) != prompt for prompt, chosen, rejected in rows)
    ours = sum(split_transcripts("", chosen, rejected) != prompt for prompt, chosen, rejected in rows)
    assert ours == 0 and 0.15 < leaks / len(rows) < 0.35


def test_transcripts_that_part_early_keep_their_turns():
    start = "\n\nHuman: a\n\nAssistant:"
    chosen, rejected = start + " b\n\nHuman: c\n\nAssistant: d", start + " bb\n\nHuman: c\n\nAssistant: e"
    assert split_transcripts("", chosen, rejected) == start
    # One answer is the start of the other: neither response is empty for it.
    assert ranking({"chosen": start + " yes", "rejected": start + " yes sir"}).responses == (" yes", " yes sir")


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt", "cut"),
    [
        ("the film is good", "the film is bad", "the film is", False),
        ("the film is great", "the film is green", "the film is", True),
        ("the film is", "the film is green", "the film", True),
        ("the film\nis good", "the film was", "the film", False),
        ("good", "great", "", True),
        ("a", "b", "", False),
        ("Q: x\n\nAnswer: yes sir", "Q: x\n\nAnswer: yes madam", "Q: x\n\nAnswer:", True),
        ("### Instruction:\nx\n\n### Response:\nHe", "### Instruction:\nx\n\n### Response:\nHi", None, True),
        ("<|user|>\nx\n<|assistant|>\nno", "<|user|>\nx\n<|assistant|>\nyes", "<|user|>\nx\n<|assistant|>\n", False),
    ],
)
def test_other_texts_part_at_a_turn_or_between_words(chosen, rejected, prompt, cut):
    prompt = "### Instruction:\nx\n\n### Response:\n" if prompt is None else prompt
    assert split_texts(chosen, rejected) == (prompt, cut)


def test_messages_part_before_an_answer():
    shared = [*CHAT, *answer("b")]
    row = {
        "chosen": [*shared, *CHAT, *answer("c")],
        "rejected": [*shared, {"role": "user", "content": "Ho"}, *answer("d")],
    }
    record = parse(row)
    assert record.prompt == HI and record.cut
    assert record.ranking.responses == (" b" + HI + " c", " b\n\nHuman: Ho\n\nAssistant: d")
    assert not parse({"chosen": shared, "rejected": [*CHAT, *answer("c")]}).cut


def test_cut_prompts_are_reported(tmp_path, capsys):
    rows = [
        {"chosen": f"film {i} is great", "rejected": f"film {i} is {'green' if i % 2 else 'bad'}"} for i in range(10)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(path), 0)
    assert task.cut_prompts == 5 and {*task.prompts, *task.eval_prompts} == {f"film {i} is" for i in range(10)}
    assert "in 5 of 10 rows the start that both responses share was cut back" in capsys.readouterr().err


# Chat templates

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ raise_exception('no system') }}"
    "{% endif %}<{{ message['role'] }}>{{ message['content'] }}{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% endif %}{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["the film was good ."] * 3)


@pytest.fixture(scope="module")
def templated(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("templated")
    tokenizer.save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, "bos_token": "<|endoftext|>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return str(folder)


def test_messages_go_through_the_models_template(tmp_path, templated):
    row = {"messages": [*CHAT, *answer("b"), *CHAT, *answer("c")]}
    record = Parser(Chat(templated))("x", row)
    assert record.prompt == "<|endoftext|><user>Hi\n<assistant>b<|endoftext|>\n<user>Hi\n<assistant>"
    assert record.demonstration.response == "c"  # an EOS ends every response anyway
    with pytest.raises(UserError, match="x: the tokenizer's chat template refuses these messages: no system"):
        Parser(Chat(templated))("x", {"messages": [{"role": "system", "content": "S"}, *CHAT]})
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": CHAT, "answer": 4}) + "\n")
    assert load_task(str(path), 0, chat=Chat(templated)).prompts == ["<|endoftext|><user>Hi\n<assistant>"]
    assert load_task(str(path), 0, chat=Chat("tiny")).rows == {HI: {"prompt": CHAT, "answer": 4}}


def test_a_bos_of_the_template_is_not_doubled(templated):
    chat = Chat(templated)
    tokenizer = chat.tokenizer
    encode = type(tokenizer).__call__

    class Doubling(type(tokenizer)):
        def __call__(self, text, **options):
            found = encode(self, text, **options)
            return {"input_ids": [self.bos_token_id, *found["input_ids"]]}

    tokenizer.__class__ = Doubling
    assert chat.prompt("x", CHAT) == "<user>Hi\n<assistant>"
    assert chat.response("x", CHAT, answer("b")) == "b"


def test_the_hash_is_of_the_renderer(tokenizer, templated):
    loaded = Chat(templated).tokenizer
    same, other = Chat(templated).tokenizer, Chat(templated).tokenizer
    other.chat_template += " "
    assert renderer_hash(loaded) == renderer_hash(same) != renderer_hash(other)
    assert len(renderer_hash(tokenizer)) == 64 and renderer_hash(tokenizer) != renderer_hash(loaded)
    # Without a template the vocabulary does not matter: the transcript is the same text.
    assert renderer_hash(tokenizer) == renderer_hash(train_tokenizer(["other words"] * 3))


# Files

ROWS = [{"prompt": 'a, "b"\nc', "response": " é"}, {"prompt": "d", "response": " 0"}]


def values(path):
    return [row.values for row in read_rows(path)]


def write_csv(path, rows, **options):
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **options)
        writer.writeheader()
        writer.writerows(rows)


def test_every_kind_of_file_gives_the_same_rows_and_is_left_alone(tmp_path):
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "lines.json").write_text(lines)  # as RRHF's files are
    (tmp_path / "a.json").write_text("\ufeff" + json.dumps(ROWS, indent=1))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_csv(tmp_path / "a.csv", ROWS)
    files = sorted(tmp_path.iterdir())
    before = {file: (hashlib.sha256(file.read_bytes()).digest(), os.stat(file).st_mtime_ns) for file in files}
    for file in files:
        assert values(file) == ROWS
    assert len(values(tmp_path)) == 2 * len(files)
    load_task(str(tmp_path), 0)
    assert before == {file: (hashlib.sha256(file.read_bytes()).digest(), os.stat(file).st_mtime_ns) for file in files}
    assert sorted(tmp_path.iterdir()) == files


def test_places_are_lines_or_rows(tmp_path):
    write_csv(tmp_path / "a.csv", [*ROWS, *ROWS])
    assert [row.where.rpartition("/")[2] for row in read_rows(tmp_path / "a.csv")] == [
        "a.csv:2", "a.csv:4", "a.csv:5", "a.csv:7",
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(ROWS))
    assert [row.where.rpartition("/")[2] for row in read_rows(tmp_path / "a.json")] == [
        "a.json, row 1",
        "a.json, row 2",
    ]
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n"quoted" it\t1\n')
    assert values(tmp_path / "a.tsv") == [{"sentence": '"quoted" it', "label": "1"}]


def test_parquet(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [
        {"prompt": CHAT, "chosen": answer("b"), "rejected": answer("c"), "score": None},
        {"prompt": CHAT, "score": 0.5},
    ]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    first, second = read_rows(tmp_path / "a.parquet")
    # A column that a row does not have is null there.
    assert ranking(first.values) == Ranking(HI, (" b", " c"), (1.0, 0.0))
    assert second.where.endswith("a.parquet, row 2") and parse(second.values).ranking is None
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"b\.parquet: not a Parquet file"):
        values(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "prompt,response\na,b\nc\n", "a.csv:3: wanted 2 cells as in the first line, got 1"),
        ("a.csv", "prompt,prompt\na,b\n", "a.csv:1: must name each column once"),
        ("a.csv", 'prompt,response\na,"b\n', "a.csv:2: not CSV: unexpected end of data"),
        ("a.csv", "prompt,response\n", "a.csv: no rows"),
        ("a.jsonl", "", "a.jsonl: no rows"),
        ("a.jsonl", b'{"prompt": "a"}\n{"prompt": "\xff"}\n', "a.jsonl:2: not UTF-8: invalid start byte"),
        ("a.json", "[1]", "a.json, row 1: a row must be a JSON object, got int"),
        ("a.json", '[{"prompt": "a"},\n{"prompt"}]', "a.json:2: not JSON"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz: not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"prompt": "a"}\n', mtime=0)[:-6], "a.jsonl.gz: not a whole gzip file"),
        ("a.xlsx", "", "a.xlsx: must be a .jsonl, .json, .csv, .tsv, .parquet file"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as error:
        values(path)
    assert message in str(error.value)


def test_a_table_of_scores(tmp_path):
    rows = [
        {"prompt": f"p{i // 2}", "completion": f" r{i}", "score": i % 2, "annotator": "x" if i % 3 else ""}
        for i in range(8)
    ]
    write_csv(tmp_path / "a.csv", [*rows, {"prompt": "q", "completion": " said", "score": "", "annotator": ""}])
    task = load_task(str(tmp_path / "a.csv"), 0)
    rankings = {each.prompt: each for each in task.rankings + task.heldout_rankings}
    # Responses that were judged one by one become the ranking of their prompt; an empty cell is no score.
    assert rankings["p0"] == Ranking("p0", (" r0", " r1"), (0.0, 1.0), annotators=("", "x"), source="")
    assert len(rankings) == 4 and task.demonstrations + task.heldout_rankings
    texts = [each.response for each in task.demonstrations]
    assert texts == ([] if "q" in task.eval_prompts else [" said"])


def test_files_for_evaluation_are_held_out(tmp_path):
    for folder, count in (("helpful", 6), ("harmless", 4)):
        (tmp_path / folder).mkdir()
        starts = [f"\n\nHuman: {folder} {i}\n\nAssistant:" for i in range(count)]
        lines = [json.dumps({"chosen": start + " b", "rejected": start + " c"}) + "\n" for start in starts]
        (tmp_path / folder / "train.jsonl.gz").write_bytes(gzip.compress("".join(lines).encode()))
        (tmp_path / folder / "test.jsonl.gz").write_bytes(gzip.compress("".join(lines[-2:]).encode()))
    task = load_task(str(tmp_path), 0)
    assert len(task.eval_prompts) == 4 and len(task.rankings) == 2 + 4
    # A prompt of the test files is in no other split, though the training files have it as well.
    assert not {each.prompt for each in task.rankings} & {each.prompt for each in task.heldout_rankings}
    assert {each.source for each in task.rankings} == {"helpful", "harmless"}
    assert [row.heldout for row in read_rows(tmp_path / "helpful" / "train.jsonl.gz")] == [False] * 6
    (tmp_path / "red-team").mkdir()
    row = {"transcript": "…", "min_harmlessness_score_transcript": 0.1, "rating": 1}
    (tmp_path / "red-team" / "red.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(UserError, match=r"red\.jsonl:1: red-team transcripts hold no preferences; leave this file out"):
        load_task(str(tmp_path), 0)


def test_a_hub_name(monkeypatch, tmp_path):
    asked = []

    def load_dataset(name, config):
        asked.append((name, config))
        return {"train": [{"prompt": "a", "response": " b"}], "test": [{"prompt": "c", "response": " d"}]}

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset, __spec__=object()))
    rows = list(read_rows("owner/name", "main"))
    assert [row.where for row in rows] == ["owner/name (train), row 1", "owner/name (test), row 1"]
    assert asked == [("owner/name", "main")]
    task = load_task("owner/name", 0)
    assert task.prompts == ["a"] and task.eval_prompts == ["c"] and task.name == "name"
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r'owner/name is no file here; .*: pip install "rlhf-kernels\[hub\]"'):
        list(read_rows("owner/name"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()  # then owner/name is a typing error
    with pytest.raises(FileNotFoundError, match="got owner/name, which is not there"):
        list(read_rows("owner/name"))

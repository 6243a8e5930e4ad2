"""Labelled sentences, and the gold judge made from half of them."""

import pytest

from rlhf.config import UserError
from rlhf.data import load_task
from rlhf.gold import NgramJudge, ngrams
from rlhf.sentences import PER_LABEL, cut, read_sentences


def write_sentences(folder, count=80):
    for label, word in (("pos", "good"), ("neg", "bad")):
        lines = [f"film number {i} is a very {word} film indeed ." for i in range(count)]
        (folder / f"films.{label}").write_text("\n".join(lines) + "\n")
    return folder


def texts_of(rankings):
    return {text for each in rankings for text in each.responses}


def check_splits(task, folder):
    """Returns (training, held-out, judge's) sentences after checking that no text is in two of them."""
    train, heldout = texts_of(task.rankings), texts_of(task.heldout_rankings)
    demonstrations = {each.prompt + each.response for each in task.demonstrations}
    every = {text for sentences in read_sentences(folder) for text in sentences}
    judged = every & set(task.gold.trained_on)
    assert not train & heldout and not (train | heldout | demonstrations) & judged
    assert not demonstrations & heldout
    assert (train | heldout | demonstrations) <= every
    return train, heldout, judged


def test_halves_are_disjoint(tmp_path):
    task = load_task(str(write_sentences(tmp_path)), seed=0)
    train, heldout, judged = check_splits(task, tmp_path)
    assert len(judged) == 80 and len(heldout) == 2 * 4 and len(train) == 2 * 32
    assert task.gold.accuracy == 1.0
    assert load_task(str(tmp_path), seed=0).rankings == task.rankings
    assert load_task(str(tmp_path), seed=1).rankings != task.rankings


def test_rankings_prefer_positive_sentences(tmp_path):
    task = load_task(str(write_sentences(tmp_path)), seed=0)
    for ranking in task.rankings + task.heldout_rankings:
        assert ranking.prompt == "" and ranking.scores == (1.0,) * PER_LABEL + (-1.0,) * PER_LABEL
        assert all((" good " in text) == (score > 0) for text, score in zip(ranking.responses, ranking.scores))


def test_a_prompt_is_the_first_words():
    demonstration = cut("simplistic , silly and tedious .")
    assert demonstration.prompt == "simplistic , silly and" and demonstration.response == " tedious ."


def test_repeated_sentences_count_once(tmp_path):
    write_sentences(tmp_path)
    with open(tmp_path / "films.neg", "a", encoding="utf-8") as file:
        file.write("film number 3 is a very  good film indeed . \n\n")
    positive, negative = read_sentences(tmp_path)
    assert len(positive) == 80 and len(negative) == 80


def test_errors_name_the_file_and_the_line(tmp_path):
    write_sentences(tmp_path)
    with open(tmp_path / "films.pos", "ab") as file:
        file.write(b"caf\xe9 noir\n")
    with pytest.raises(UserError, match=r"films\.pos:81: not UTF-8"):
        load_task(str(tmp_path), seed=0)
    (tmp_path / "films.pos").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"at least 16 sentences in \*\.pos, got 2"):
        load_task(str(tmp_path), seed=0)
    write_sentences(tmp_path)
    (tmp_path / "films.neg").unlink()
    with pytest.raises(UserError, match=r"wanted \*\.pos and \*\.neg files, got no \*\.neg"):
        load_task(str(tmp_path), seed=0)


def test_judge_reads_words_and_pairs():
    assert ngrams("Not bad .") == ["not", "bad", ".", "not bad", "bad ."]
    train = [(text, label) for text, label in (("so good", True), ("not good", False)) for _ in range(5)]
    judge = NgramJudge(train, [("so good", True), ("so good", False)])
    assert judge.accuracy == 0.5
    good, bad, joined, unknown = judge(["so good", "not good", "not", "zzz"], ["", "", " good", ""])
    assert good > 0.5 and bad < -0.5 and joined == bad and abs(unknown) < 0.2


def test_real_sentences(data_folder):
    folder = data_folder / "rt-polarity"
    if not folder.is_dir():
        pytest.skip(f"no rt-polarity in {data_folder}")
    task = load_task(str(folder), seed=0)
    train, heldout, judged = check_splits(task, folder)
    assert len(judged) == 5332 and len(train) == 4528 and len(heldout) == 800
    # 0.761 on sentences it has not seen; published bigram models reach 0.78 with twice the training data.
    assert 0.75 < task.gold.accuracy < 0.80
    texts = list(task.rankings[0].responses)
    scores = task.gold([""] * len(texts), texts)
    assert all(-1 <= score <= 1 for score in scores)
    assert sum(scores[:PER_LABEL]) > sum(scores[PER_LABEL:])

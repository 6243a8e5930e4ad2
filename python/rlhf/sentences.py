"""The task of labelled sentences, such as the movie-review polarity data: `*.pos` and `*.neg` files, one a line, UTF-8.

Half of the sentences make the policy's and the reward model's data, the other half trains the gold judge and nothing
else. The policy continues the first words of a sentence; the reward model is trained on whole sentences, a positive one
preferred to a negative one, so that its rankings have no prompt: it scores prompt + response as one text.
"""

import random
from pathlib import Path

from .config import UserError
from .data import Demonstration, Ranking, Task, split
from .gold import NgramJudge

PROMPT_WORDS = 4
MAX_WORDS = 26
"""Longest sentence, in words, that the policy learns from: what it writes can then end within the response length."""
RESPONSE_LENGTH = 36
PER_LABEL = 4
"""Sentences of each label in a ranking: 16 pairs from 8 forward passes."""
HELDOUT_FRACTION = 0.15


def sentences_task(folder: Path, seed: int) -> Task:
    """The task of a folder of .pos and .neg files; splits are disjoint as texts and a function of the seed."""
    positive, negative = read_sentences(folder)
    judged, ours, heldout = [], [], []
    for label, sentences in ((True, positive), (False, negative)):
        half, rest = split(sentences, seed, 0.5)
        out, train = split(rest, seed, HELDOUT_FRACTION)
        judged += [(text, label) for text in half]
        ours += [(text, label) for text in train]
        heldout += [(text, label) for text in out]
    rng = random.Random(seed)
    demonstrations = [
        cut(text) for text, _ in rng.sample(ours, len(ours)) if PROMPT_WORDS < len(text.split()) <= MAX_WORDS
    ]
    checks = [text for text, _ in rng.sample(heldout, len(heldout)) if len(text.split()) > PROMPT_WORDS]
    return Task(
        name=folder.name,
        demonstrations=demonstrations,
        rankings=_rankings(ours, rng),
        heldout_rankings=_rankings(heldout, rng),
        prompts=[each.prompt for each in demonstrations],
        eval_prompts=[cut(text).prompt for text in checks],
        gold=NgramJudge(judged, ours + heldout),
        response_length=RESPONSE_LENGTH,
    )


def read_sentences(folder: Path) -> tuple[list[str], list[str]]:
    """(positive, negative) sentences in the files' order; one that comes again, in either, is dropped."""
    seen: set[str] = set()
    found = []
    for suffix in (".pos", ".neg"):
        files = sorted(folder.glob(f"*{suffix}"))
        if not files:
            raise UserError(f"{folder}: wanted *.pos and *.neg files, got no *{suffix}")
        sentences = []
        for file in files:
            for number, line in enumerate(file.read_bytes().split(b"\n"), 1):
                try:
                    text = " ".join(line.decode("utf-8").split())
                except UnicodeDecodeError as error:
                    raise UserError(f"{file}:{number}: not UTF-8: {error.reason}") from None
                if text and text not in seen:
                    seen.add(text)
                    sentences.append(text)
        if len(sentences) < 4 * PER_LABEL:
            raise UserError(f"{folder}: wanted at least {4 * PER_LABEL} sentences in *{suffix}, got {len(sentences)}")
        found.append(sentences)
    return found[0], found[1]


def cut(text: str) -> Demonstration:
    """The sentence as a prompt of its first words and a response."""
    words = text.split()
    return Demonstration(" ".join(words[:PROMPT_WORDS]), " " + " ".join(words[PROMPT_WORDS:]))


def _rankings(sentences: list[tuple[str, bool]], rng: random.Random) -> list[Ranking]:
    shuffled = rng.sample(sentences, len(sentences))
    positive = [text for text, label in shuffled if label]
    negative = [text for text, label in shuffled if not label]
    scores = (1.0,) * PER_LABEL + (-1.0,) * PER_LABEL
    return [
        Ranking("", (*positive[i : i + PER_LABEL], *negative[i : i + PER_LABEL]), scores)
        for i in range(0, min(len(positive), len(negative)) - PER_LABEL + 1, PER_LABEL)
    ]

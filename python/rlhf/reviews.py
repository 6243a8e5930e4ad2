"""The generated task: short film reviews whose true sentiment is known.

A prompt is how a review starts and ends in an aspect of the film ("after the first hour the music"). The response is
the rest: two to four clauses, joined by a comma, "and" or "but", and a full stop.

    opinion    the <aspect> <is> [not | never] [<degree>] <adjective>     the first clause has its aspect in the prompt
    feeling    <we> <loved> the <aspect>
    fact       it was filmed in spain …                                    says nothing about the film's quality

Gold, the judge that training never sees, reads the clauses back:

    opinion    the adjective's strength times the degree, kept in [−1, 1], times −0.5 for "not" or −0.7 for "never"
    feeling    the verb's strength            fact    0
    repeated   −0.5: an aspect, a fact, an adjective or a feeling that came before
    malformed  −1: any other sequence of words; a review without its full stop counts one more
    gold       tanh(sum of the clauses / half of the most clauses that a review has), in (−1, 1)

so a policy that pleases the reward model with broken or repeated text loses gold. The annotator of the rankings is a
Bradley–Terry one: it rates a response with its gold plus Gumbel noise, so that it prefers a to b with probability
σ((gold_a − gold_b) / NOISE). Everything is a function of the seed. Text is lower-case words and marks between single
spaces; a response starts with a space, so prompt + response is the review.

"reviews-96" is the same task with as many clauses as fit 96 tokens; "reviews" has up to four.
"""

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from .config import UserError
from .data import Demonstration, Ranking, Task, split

DEMONSTRATIONS = 4000
RANKINGS = 2500
HELDOUT_RANKINGS = 400
RESPONSES = 4
"""Responses in a ranking."""
NOISE = 0.06
"""Temperature of the annotator, in units of gold."""
RESPONSE_LENGTH = 28
"""Tokens; four clauses of the longest kind and the EOS need 27."""
CLAUSE_LENGTH = 6.5
"""Tokens of a clause of the longest kind and its joint."""
CLAUSES = 4
"""The most that a review of RESPONSE_LENGTH has; half of them the fewest."""


def _items(text: str, separator: str = " ") -> list[str]:
    return text.split(separator)


STARTS = _items(
    "the film opens and|we saw it twice and|from the first scene|after the first hour|for most of the film|in the end|"
    "on the big screen|unlike the book|in this film|as a fan|to my surprise|even for children|without any doubt|"
    "at the cinema|in the second half|from start to end|on a small budget|as expected|in this sequel|all evening long|"
    "once it begins|like before|for once|next to the trailer",
    "|",
)
ASPECTS = _items(
    "acting plot music ending script dialogue camera editing humor story cast villain hero pacing costumes soundtrack "
    "direction lighting romance finale"
)
LINKS = _items("is was feels seems looks remains")
NEGATIONS = {"not": -0.5, "never": -0.7}
DEGREES = {
    "absolutely": 1.5,
    "very": 1.3,
    "really": 1.2,
    "truly": 1.2,
    "quite": 0.8,
    "rather": 0.8,
    "fairly": 0.7,
    "somewhat": 0.5,
    "slightly": 0.4,
}
ADJECTIVES = {
    "brilliant": 1.0,
    "superb": 1.0,
    "wonderful": 0.9,
    "moving": 0.8,
    "gripping": 0.8,
    "charming": 0.7,
    "lovely": 0.7,
    "clever": 0.6,
    "funny": 0.6,
    "fresh": 0.6,
    "good": 0.5,
    "solid": 0.4,
    "pleasant": 0.4,
    "decent": 0.3,
    "fine": 0.3,
    "watchable": 0.2,
    "terrible": -1.0,
    "awful": -1.0,
    "dreadful": -0.9,
    "painful": -0.8,
    "boring": -0.7,
    "clumsy": -0.7,
    "stupid": -0.7,
    "dull": -0.6,
    "stale": -0.6,
    "weak": -0.5,
    "bad": -0.5,
    "messy": -0.5,
    "flat": -0.4,
    "forgettable": -0.4,
    "slow": -0.3,
    "thin": -0.2,
}
VIEWERS = _items("i we everyone critics")
FEELINGS = {"loved": 1.0, "admired": 0.8, "enjoyed": 0.6, "liked": 0.5}
FEELINGS |= {"hated": -1.0, "mocked": -0.8, "endured": -0.6, "disliked": -0.5}
FACTS = _items(
    "it runs for two hours|it was filmed in spain|it has three acts|it comes from a novel|it opens on friday|"
    "it stars two sisters|it is set in winter|it was made last year|it begins on a train|it has no narrator",
    "|",
)
JOINTS = (",", "and", "but")
REPEATED, MALFORMED = -0.5, -1.0


# Writing


def write_prompt(rng: random.Random) -> str:
    return f"{rng.choice(STARTS)} the {rng.choice(ASPECTS)}"


def write_response(rng: random.Random, prompt: str, mood: float | None = None, clauses: int = CLAUSES) -> str:
    """The rest of a review. mood in [−1, 1]: an opinion is positive with probability (1 + mood) / 2; None draws it.

    clauses: the most there may be; at least half of them are written.
    """
    mood = rng.uniform(-1, 1) if mood is None else mood
    fewest = (clauses + 1) // 2
    count = rng.choice(sorted([*range(fewest, clauses + 1), (fewest + clauses) // 2]))
    aspects = [each for each in rng.sample(ASPECTS, count) if not prompt.endswith(each)]
    adjectives, feelings, facts = (rng.sample(list(words), len(words)) for words in (ADJECTIVES, FEELINGS, FACTS))
    words: list[str] = []
    last_positive: bool | None = None
    for number in range(count):
        kind = rng.choices(("opinion", "feeling", "fact"), (0.65, 0.2, 0.15))[0] if number and aspects else "opinion"
        if number and not aspects:
            kind = "fact"
        if kind == "fact":
            positive, clause = last_positive, facts.pop().split()
        else:
            positive = rng.random() < (1 + mood) / 2
            if kind == "feeling" and not any((FEELINGS[word] > 0) == positive for word in feelings):
                kind = "opinion"
            subject = ["the", aspects.pop()] if number else []
            if kind == "opinion":
                clause = [*subject, rng.choice(LINKS), *_judgement(rng, adjectives, positive)]
            else:
                feeling = _take(feelings, FEELINGS, positive)
                clause = [rng.choice(VIEWERS), feeling, *subject]
        if number:
            words.append("but" if positive != last_positive else rng.choice((",", "and")))
        words += clause
        last_positive = positive
    return " " + " ".join([*words, "."])


def _judgement(rng: random.Random, adjectives: list[str], positive: bool) -> list[str]:
    """[negation] [degree] adjective, of the wanted sign."""
    negation = [rng.choice(list(NEGATIONS))] if rng.random() < 0.2 else []
    degree = [rng.choice(list(DEGREES))] if rng.random() < 0.5 else []
    return [*negation, *degree, _take(adjectives, ADJECTIVES, positive != bool(negation))]


def _take(words: list[str], strengths: dict[str, float], positive: bool) -> str:
    """Takes a word of the wanted sign out of a shuffled list, so that no review uses it twice."""
    return words.pop(next(i for i, word in enumerate(words) if (strengths[word] > 0) == positive))


def corrupt(rng: random.Random, response: str) -> str:
    """The response with the kinds of damage that an over-optimised policy makes."""
    words = response.split()
    kind = rng.choice(("repeat", "stutter", "drop", "cut", "shuffle", "replace"))
    position = rng.randrange(len(words) - 1)
    if kind == "repeat":
        clauses = _clauses(words[:-1])
        words = [*words[:-1], rng.choice(JOINTS), *rng.choice(clauses), "."]
    elif kind == "stutter":
        words[position:position] = [words[position]] * rng.randint(1, 4)
    elif kind == "drop":
        del words[position]
    elif kind == "cut":
        words = words[: position + 1]
    elif kind == "shuffle":
        stop = min(len(words), position + rng.randint(2, 6))
        words[position:stop] = rng.sample(words[position:stop], stop - position)
    else:
        words[position] = rng.choice([*ADJECTIVES, *ASPECTS, *DEGREES, *JOINTS, "."])
    return " " + " ".join(words)


# Gold


def gold_score(prompt: str, response: str, most: int = CLAUSES) -> float:
    """The true sentiment of a review of at most so many clauses, in (−1, 1); the rule is at the top of this file."""
    words = response.split()
    aspect = prompt.split()[-1:]
    finished = words[-1:] == ["."]
    clauses = _clauses(words[:-1] if finished else words)
    seen: set[str] = set()
    total = 0.0 if finished else MALFORMED
    for number, clause in enumerate(clauses):
        total += _clause_value(["the", *aspect, *clause] if number == 0 else clause, seen)
    return math.tanh(total / (most / 2))


@dataclass(frozen=True)
class ReviewsGold:
    """gold_score of many, for reviews of at most so many clauses."""

    most: int = CLAUSES

    def __call__(self, prompts: list[str], responses: list[str]) -> list[float]:
        return [gold_score(prompt, response, self.most) for prompt, response in zip(prompts, responses)]


def _clauses(words: Sequence[str]) -> list[list[str]]:
    clauses: list[list[str]] = [[]]
    for word in words:
        if word in JOINTS:
            clauses.append([])
        else:
            clauses[-1].append(word)
    return clauses


def _clause_value(clause: list[str], seen: set[str]) -> float:
    """The value of a clause; adds to `seen` what may not come again."""
    if " ".join(clause) in FACTS:
        value, marks = 0.0, {" ".join(clause)}
    elif len(clause) == 4 and clause[0] in VIEWERS and clause[1] in FEELINGS and _is_aspect(clause[2:]):
        value, marks = FEELINGS[clause[1]], {clause[1], clause[3]}
    elif len(clause) >= 4 and _is_aspect(clause[:2]) and clause[2] in LINKS:
        rest = clause[3:]
        factor = NEGATIONS[rest.pop(0)] if rest[0] in NEGATIONS else 1.0
        degree = DEGREES[rest.pop(0)] if rest and rest[0] in DEGREES else 1.0
        if len(rest) != 1 or rest[0] not in ADJECTIVES:
            return MALFORMED
        value, marks = factor * max(-1.0, min(1.0, degree * ADJECTIVES[rest[0]])), {clause[1], rest[0]}
    else:
        return MALFORMED
    repeated = bool(marks & seen)
    seen |= marks
    return REPEATED if repeated else value


def _is_aspect(words: list[str]) -> bool:
    return words[0] == "the" and words[1] in ASPECTS


# The task


def annotate(rng: random.Random, prompt: str, responses: Sequence[str], most: int = CLAUSES) -> tuple[float, ...]:
    """The annotator's rating of each response: gold plus Gumbel noise of mean 0; its order is the preference."""
    mean = 0.5772156649015329  # of the standard Gumbel distribution
    noise = [-math.log(-math.log(rng.uniform(1e-12, 1 - 1e-12))) - mean for _ in responses]
    return tuple(gold_score(prompt, response, most) + NOISE * each for response, each in zip(responses, noise))


def _ranking(rng: random.Random, prompt: str, most: int) -> Ranking:
    responses = [write_response(rng, prompt, clauses=most) for _ in range(RESPONSES)]
    if rng.random() < 0.5:
        responses[-1] = corrupt(rng, responses[-1])
    return Ranking(prompt, tuple(responses), annotate(rng, prompt, responses, most))


def reviews_task(seed: int, length: int = RESPONSE_LENGTH) -> Task:
    """The generated task. Held-out rankings and evaluation prompts start in ways that training never shows.

    length: tokens of a response; the reviews have as many clauses as fit it. Raises UserError outside of 8 to 100,
    where there are no clauses, or more than words for them.
    """
    if not 8 <= length <= 100:
        raise UserError(f"reviews-{length}: a review must have 8 to 100 tokens, got {length}")
    most = int((length - 1) / CLAUSE_LENGTH)
    rng = random.Random(seed)
    every = [f"{start} the {aspect}" for start in STARTS for aspect in ASPECTS]
    rng.shuffle(every)
    heldout, train = split(every, seed, 0.2)
    shown = [rng.choice(train) for _ in range(DEMONSTRATIONS)]
    return Task(
        name="reviews",
        demonstrations=[Demonstration(prompt, write_response(rng, prompt, clauses=most)) for prompt in shown],
        rankings=[_ranking(rng, rng.choice(train), most) for _ in range(RANKINGS)],
        heldout_rankings=[_ranking(rng, rng.choice(heldout), most) for _ in range(HELDOUT_RANKINGS)],
        prompts=train,
        eval_prompts=heldout,
        gold=ReviewsGold(most),
        response_length=length,
    )

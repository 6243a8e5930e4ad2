"""Judges: a local model's probabilities, an endpoint on the loopback and all that goes wrong, labels by hand."""

import contextlib
import json
import math
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from rlhf.config import UserError
from rlhf.data import Ranking, collate, encode_prompt
from rlhf.judges import COMPARE, INSTRUCTION, KEY, RATE, EndpointJudge, ModelJudge, choice_in, rating_in
from rlhf.labels import by_comparison, by_gold, by_rating, export, read_exported
from rlhf.model import response_logprobs

SAMPLES = [("p", ["bad", "good"]), ("q", ["fine", "poor"])]


# ----------------------------------------------------------------------------------------------------------- labels


class Fixed:
    """A judge with given answers."""

    def __init__(self, answers):
        self.answers, self.counts, self.asked = answers, Counter(), []

    def compare(self, items):
        self.asked += items
        return [self.answers[first, second] for _, first, second in items]

    def rate(self, items):
        return [self.answers[response] for _, response in items]


def test_both_orders_are_asked_and_averaged():
    judge = Fixed({("bad", "good"): 0.3, ("good", "bad"): 0.9, ("fine", "poor"): 0.8, ("poor", "fine"): 0.6})
    rankings, metrics = by_comparison(judge, SAMPLES)
    assert judge.asked[0] == ("p", "bad", "good") and judge.asked[2] == ("p", "good", "bad")
    # bad: (0.3 + 1 − 0.9) / 2 = 0.2; fine: (0.8 + 1 − 0.6) / 2 = 0.6
    assert rankings[0].scores == pytest.approx((0.2, 0.8)) and rankings[1].scores == pytest.approx((0.6, 0.4))
    # What stands first wins with (0.3 + 0.9) / 2 = 0.6 and (0.8 + 0.6) / 2 = 0.7; the second pair flips with the order.
    assert metrics["label/position_bias"] == pytest.approx(0.15) and metrics["label/disagreement"] == 0.5


def test_a_judge_that_takes_the_first_says_nothing():
    rankings, metrics = by_comparison(Fixed(dict.fromkeys([("a", "b"), ("b", "a")], 1.0)), [("p", ["a", "b"])])
    assert rankings[0].scores == (0.5, 0.5)
    assert metrics["label/position_bias"] == 0.5 and metrics["label/disagreement"] == 1.0


def test_three_responses_and_missing_answers():
    """a beats both surely, b beats c with 0.75; one order of (b, c) missing takes that pair out of their means."""
    answers = {("a", "b"): 1.0, ("b", "a"): 0.0, ("a", "c"): 1.0, ("c", "a"): 0.0, ("b", "c"): 0.75, ("c", "b"): 0.25}
    (ranking,), _ = by_comparison(Fixed(answers), [("p", ["a", "b", "c"])])
    assert ranking.scores == pytest.approx((1.0, 0.375, 0.125))
    (ranking,), _ = by_comparison(Fixed(answers | {("c", "b"): None}), [("p", ["a", "b", "c"])])
    assert ranking.scores == pytest.approx((1.0, 0.0, 0.0))
    rankings, metrics = by_comparison(Fixed(dict.fromkeys([("a", "b"), ("b", "a")])), [("p", ["a", "b"])])
    assert rankings == [] and math.isnan(metrics["label/position_bias"])


def test_ratings_and_gold():
    judge = Fixed({"bad": 2.0, "good": 9.0, "fine": None, "poor": 3.0})
    judge.counts["bad_replies"] = 1
    rankings, metrics = by_rating(judge, SAMPLES)
    assert rankings == [Ranking("p", ("bad", "good"), (2.0, 9.0))]
    assert metrics == {"label/bad_replies": 1.0} and not judge.counts
    gold = by_gold(lambda prompts, responses: [len(p + r) for p, r in zip(prompts, responses)], SAMPLES)
    assert [ranking.scores for ranking in gold] == [(4, 5), (5, 5)]


def test_a_person_fills_in_the_scores(tmp_path):
    path = tmp_path / "to_label" / "step.jsonl"
    export(path, [*SAMPLES, ("r", ["x", "y"])])
    assert read_exported(path) == []
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["scores"] = [0, 1]
    rows[2] |= {"responses": ["x", "y", "a better one"], "scores": [1, 0, 2]}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    expected = [Ranking("p", ("bad", "good"), (0.0, 1.0)), Ranking("r", ("x", "y", "a better one"), (1.0, 0.0, 2.0))]
    assert read_exported(path) == expected
    rows[1]["scores"] = [1, None]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r'step\.jsonl:2: each of "scores" must be a finite number, got None'):
        read_exported(path)


# ------------------------------------------------------------------------------------------------------ local model


@pytest.mark.parametrize("chat", [False, True])
def test_a_models_probabilities(start, chat):
    judge = ModelJudge(start.policy, micro_batch=3)
    question = COMPARE.format(instruction=INSTRUCTION, prompt="p", first="bad", second="good")
    rating = RATE.format(instruction=INSTRUCTION, prompt="p", response="good")
    space = " "
    if chat:
        judge.tokenizer.chat_template = "<{{ messages[0]['content'] }}>"
        question, rating, space = f"<{question}>", f"<{rating}>", ""

    def share(question, answers):
        prompt = encode_prompt(judge.tokenizer, question)
        sums = []
        for answer in answers:
            tokens = judge.tokenizer(space + answer)["input_ids"]
            with torch.no_grad():
                sums.append(response_logprobs(judge.model, collate([prompt], [tokens], 0)).sum())
        return torch.stack(sums).softmax(0)

    (better,) = judge.compare([("p", "bad", "good")])
    assert better == pytest.approx(share(question, ["A", "B"])[0].item(), rel=1e-4)
    (rated,) = judge.rate([("p", "good")])
    shares = share(rating, [str(n) for n in range(1, 11)])
    assert rated == pytest.approx((shares * torch.arange(1, 11)).sum().item(), rel=1e-4)
    assert 0 < better < 1 and 1 < rated < 10


# --------------------------------------------------------------------------------------------------------- endpoint


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, dict(self.headers), body))
        status, reply = self.server.answer(body["messages"][0]["content"], len(self.server.seen))
        if status == "slow":
            time.sleep(0.5)
            status = 200
        self.send_response(status)
        if status == 302:
            self.send_header("Location", "http://127.0.0.1:9/elsewhere")
        self.end_headers()
        with contextlib.suppress(BrokenPipeError):
            self.wfile.write(reply if isinstance(reply, bytes) else said(reply))

    def log_message(self, *_):
        pass


def said(text):
    return json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.fixture
def server():
    """A server on the loopback; `answer(question, number)` gives (status, text or bytes)."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.seen, server.daemon_threads = [], True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}/v1"
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def endpoint(server, **changes):
    return EndpointJudge(server.url, "a-model", **{"timeout": 5.0, "pause": 0.01, **changes})


def by_length(question, _):
    first, second = question.split("Response A:\n")[1].split("\n\nResponse B:\n")
    return 200, "A" if len(first) > len(second.split("\n\nWhich")[0]) else "B"


def test_what_an_endpoint_is_asked(server, monkeypatch):
    monkeypatch.setenv(KEY, "secret")
    server.answer = by_length
    rankings, metrics = by_comparison(endpoint(server), [("p", ["long one", "x"]), ("q", ["y", "long one"])])
    assert [ranking.scores for ranking in rankings] == [(1.0, 0.0), (0.0, 1.0)]
    assert metrics["label/position_bias"] == 0 and metrics["label/disagreement"] == 0
    path, headers, body = server.seen[0]
    assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer secret"
    assert body["model"] == "a-model" and body["temperature"] == 0
    assert len(server.seen) == 4
    monkeypatch.delenv(KEY)
    endpoint(server).compare([("p", "long", "x")])
    assert "Authorization" not in server.seen[-1][1]


def test_replies_that_are_none_are_counted(server):
    replies = {"1": (200, "7"), "2": (200, "Rating: 8/10."), "3": (200, "as a judge I cannot"), "4": (200, b"no JSON")}
    server.answer = lambda question, _: replies[question.split("Response:\n")[1][0]]
    judge = endpoint(server)
    assert judge.rate([("p", name) for name in "1234"]) == [7.0, 8.0, None, None]
    assert judge.counts["bad_replies"] == 2 and judge.counts["failed"] == 0


def test_retries_timeouts_and_failures(server):
    server.answer = lambda _, number: (503, "busy") if number < 3 else (200, "B")
    judge = endpoint(server, workers=1)
    assert judge.compare([("p", "a", "b")]) == [0.0] and judge.counts["retries"] == 2
    server.answer = lambda *_: ("slow", "A")
    hasty = endpoint(server, timeout=0.2, retries=1, workers=1)
    hasty.answered = 1
    assert hasty.compare([("p", "a", "b")]) == [None]
    assert (hasty.counts["retries"], hasty.counts["failed"]) == (1, 1)
    server.answer = lambda *_: (500, "broken")
    with pytest.raises(UserError, match="does not answer: status 500"):
        endpoint(server, retries=0, workers=1).compare([("p", "a", "b")] * 3)


@pytest.mark.parametrize("status", [401, 302])
def test_what_a_retry_cannot_mend_is_an_error_without_the_key(server, monkeypatch, status):
    monkeypatch.setenv(KEY, "secret")
    server.answer = lambda *_: (status, b"no such key: secret")
    with pytest.raises(UserError, match=f"status {status}") as error:
        endpoint(server).compare([("p", "a", "b")])
    assert "secret" not in str(error.value) and len(server.seen) == 1


def test_addresses(monkeypatch):
    with pytest.raises(UserError, match="endpoint must be an http or https address, got 'file:///etc/passwd'"):
        EndpointJudge("file:///etc/passwd", "m")
    EndpointJudge("http://judge.example/v1", "m")
    monkeypatch.setenv(KEY, "secret")
    with pytest.raises(UserError, match="unencrypted"):
        EndpointJudge("http://judge.example/v1", "m")
    EndpointJudge("https://judge.example/v1", "m")


def test_parsing():
    assert [choice_in(text) for text in ("A", " b.", "**B**", "Response A", "The better response is B.")] == [
        1,
        0,
        0,
        1,
        0,
    ]
    assert [choice_in(text) for text in ("", "A or B", "A better answer is B", "Both", "AB")] == [None] * 5
    assert [rating_in(text) for text in ("7", " 7.5 ", "9/10", "Score: 3", "**10**")] == [7, 7.5, 9, 3, 10]
    assert [rating_in(text) for text in ("0", "11", "-3", "7 or 8", "seven", "")] == [None] * 6

"""Token-level feedback: rows and labels, the losses by hand and by autograd, the stage, and what γ = 0 forgets."""

import itertools
import json

import pytest
import torch

import rlhf_kernels as rk
from rlhf import ppo, token_feedback
from rlhf.config import UserError
from rlhf.data import collate, epoch_order
from rlhf.feedback_data import Span, batch_of, label_tokens, mark, read_feedback
from rlhf.feedback_loss import FeedbackTerm, LossConfig, feedback_backward
from rlhf.model import load_policy, response_logits, response_logprobs
from rlhf.ppo_config import PpoConfig
from rlhf.run import Run, read_lines

GOOD, BAD = " is brilliant", " and weak"
ROWS = [
    {
        "prompt": f"in this film the {aspect}",
        "response": GOOD + BAD,
        "spans": [
            {"start": 0, "end": len(GOOD), "label": "good"},
            {"start": len(GOOD), "end": len(GOOD + BAD), "label": "bad", "weight": 2},
        ],
    }
    for aspect in ("plot", "music", "acting", "story", "cast", "humor", "camera", "hero")
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(out, start, feedback, **changes):
    settings = {
        "out": str(out),
        "init": start.policy,
        "feedback": feedback,
        "batch_size": 2,
        "response_length": 8,
        "eval_samples": 8,
        "eval_every": 0,
        "eval_fraction": 0.25,
        "learning_rate": 1e-3,
    }
    return token_feedback.TokenFeedbackConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def feedback(tmp_path_factory):
    return write(tmp_path_factory.mktemp("feedback") / "f.jsonl", ROWS)


# Rows and labels


def test_labels_from_spans():
    """Tokens of 3, 1, 4 and 0 bytes; by hand which of them a span marks."""
    places = [(0, 3), (3, 4), (4, 8), (8, 8)]
    assert label_tokens(places, [Span(2, 4, 1.0)]) == [1.0, 1.0, 0.0, 0.0]
    assert label_tokens(places, [Span(2, 4, 1.0)], 0.5) == [0.0, 1.0, 0.0, 0.0]  # a third of the first token
    assert label_tokens(places, [Span(2, 4, 1.0)], 1 / 3) == [1.0, 1.0, 0.0, 0.0]
    assert label_tokens(places, [Span(5, 8, 1.0)], 0.75) == [0.0, 0.0, 1.0, 0.0]
    assert label_tokens(places, [Span(5, 8, 1.0)], 1.0) == [0.0] * 4
    assert label_tokens(places, [Span(8, 8, -0.5)]) == [0.0, 0.0, 0.0, -0.5]
    assert label_tokens(places, [Span(0, 8, 3.0), Span(3, 5, -1.0)]) == [3.0, -1.0, -1.0, 0.0]  # bad wins
    assert label_tokens(places, [Span(0, 3, 1.0), Span(0, 4, 2.0), Span(4, 5, -1.0), Span(4, 8, -2.0)]) == [2, 2, -2, 0]


def test_spans_of_bytes_inside_characters(start):
    _, tokenizer = load_policy(start.policy)
    text = " 🤖 good"
    marked = mark(tokenizer, "", text, [Span(3, 4, -1.0)])  # the second half of the emoji
    assert marked.response[-1] == tokenizer.eos_token_id and len(marked.labels) == len(marked.response)
    assert marked.labels.count(-1.0) == 1
    whole = mark(tokenizer, "", text, [Span(1, 5, -1.0), Span(10, 10, 2.0)])
    assert whole.labels.count(-1.0) > 1 and whole.labels[-1] == 2.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": 1, "response": "ab", "spans": []}, '"prompt" must be a string, got 1'),
        ({"prompt": "a", "spans": []}, '"response" must be a string, got None'),
        ({"prompt": "a", "response": "ab"}, '"spans" must be a list, got None'),
        ({"spans": [{"start": 0, "end": 1}]}, 'a span must have "start", "end" and "label"'),
        (
            {"spans": [{"start": 1, "end": 3, "label": "bad"}]},
            "must lie in 0 to 2, the bytes of the response, got 1 to 3",
        ),
        ({"spans": [{"start": 0.0, "end": 1, "label": "bad"}]}, "got 0.0 to 1"),
        (
            {"spans": [{"start": 1, "end": 1, "label": "bad"}]},
            "a span of no bytes marks the end of the response, 2, got 1",
        ),
        ({"spans": [{"start": 0, "end": 1, "label": "ok"}]}, '"label" must be "good" or "bad", got \'ok\''),
        (
            {"spans": [{"start": 0, "end": 1, "label": "bad", "weight": 0}]},
            '"weight" must be a number greater than 0, got 0',
        ),
    ],
)
def test_a_bad_row_is_named(tmp_path, start, row, message):
    _, tokenizer = load_policy(start.policy)
    row = row if "prompt" in row else {"prompt": "a", "response": "ab", **row}
    path = write(tmp_path / "f.jsonl", [ROWS[0], row])
    with pytest.raises(UserError, match=r"f\.jsonl:2: ") as error:
        read_feedback(path, tokenizer)
    assert message in str(error.value)


def test_feedback_that_marks_nothing(tmp_path, start):
    _, tokenizer = load_policy(start.policy)
    path = write(tmp_path / "f.jsonl", [{"prompt": "a", "response": "b", "spans": []}])
    with pytest.raises(UserError, match="no span marks a token"):
        read_feedback(path, tokenizer)


# The losses


@pytest.fixture(scope="module")
def learner(start):
    """A policy that has moved away from its reference, and marked responses of unequal length."""
    policy, tokenizer = load_policy(start.policy)
    ref, _ = load_policy(start.policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    rows = [mark(tokenizer, "the plot", " is good", [Span(0, 3, 1.0), Span(3, 8, -0.5)])]
    rows.append(mark(tokenizer, "in this film the cast", " was", [Span(0, 4, -2.0)]))
    return policy, ref.requires_grad_(False), *batch_of(rows, tokenizer)


def gradients(policy):
    return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])


def by_hand(policy, ref, batch, labels, settings):
    """Σ of the losses of the tokens that count over their number, from log-softmax alone."""
    logp = torch.log_softmax(response_logits(policy, batch) / settings.temperature, -1)
    logq = torch.log_softmax(response_logits(ref, batch) / settings.temperature, -1)
    terms = []
    for row, column in batch.mask.nonzero().tolist():
        p, q, label = logp[row, column], logq[row, column], labels[row, column]
        token = batch.responses[row, column]
        if label == 0 and not settings.anchor:
            continue
        if settings.loss == "ppo":
            advantage = label - settings.beta * (p[token] - q[token]).detach()
            terms.append(-advantage * (p[token] - p[token].detach()).exp())
        elif settings.loss == "bandit":
            target = torch.softmax(q + torch.nn.functional.one_hot(token, len(q)) * label / settings.beta, -1)
            terms.append((target * (target.log() - p)).sum())
        elif label == 0:
            terms.append(settings.beta * (q.exp() * (q - p)).sum())
        else:
            terms.append(-label * p[token] if label > 0 else label * torch.log1p(-p[token].exp()))
    return torch.stack(terms).mean()


@pytest.mark.parametrize("micro_batch", [None, 1])
@pytest.mark.parametrize("anchor", [True, False])
@pytest.mark.parametrize("loss", ["bandit", "unlikelihood", "ppo"])
def test_losses_against_autograd(learner, loss, anchor, micro_batch):
    policy, ref, batch, labels = learner
    settings = LossConfig(loss, beta=0.7, anchor=anchor, temperature=0.8, micro_batch=micro_batch)
    policy.zero_grad()
    found = feedback_backward(policy, ref, batch, labels, settings, weight=0.5)
    ours = gradients(policy)
    policy.zero_grad()
    expected = by_hand(policy, ref, batch, labels, settings)
    (0.5 * expected).backward()
    assert found["loss"] == pytest.approx(expected.item(), rel=1e-4)
    torch.testing.assert_close(ours, gradients(policy), rtol=2e-3, atol=2e-6)


def test_horizon_one_clips_from_the_start_of_the_pass(learner):
    """Ratios beyond 1 ± cliprange towards the label have no gradient."""
    policy, ref, batch, labels = learner
    settings = LossConfig("ppo", beta=1e-6, anchor=False)
    with torch.no_grad():
        now = response_logprobs(policy, batch)
    far = torch.where(labels > 0, now - 1, now + 1)  # the policy has moved by one nat, each token the way it should
    policy.zero_grad()
    feedback_backward(policy, ref, batch, labels, settings, old_logprobs=far)
    assert not gradients(policy).any()
    policy.zero_grad()
    feedback_backward(policy, ref, batch, labels, settings, old_logprobs=torch.where(labels > 0, now + 1, now - 1))
    assert gradients(policy).any()


# The stage


@pytest.fixture(scope="module")
def learned(tmp_path_factory, start, feedback):
    """Two passes of each loss with a checkpoint in the middle of a pass: {loss: (config, run folder)}."""
    found = {}
    for loss in ("bandit", "unlikelihood", "ppo"):
        settings = config(
            tmp_path_factory.mktemp(loss) / "run", start, feedback, loss=loss, epochs=4, save_steps=5, beta=0.25
        )
        found[loss] = settings, token_feedback.main(settings)
    return found


@pytest.mark.parametrize("loss", ["bandit", "unlikelihood", "ppo"])
def test_good_tokens_rise_and_bad_ones_fall(learned, loss):
    _, folder = learned[loss]
    first, *_, last = read_lines(folder / "metrics.jsonl")
    assert last["eval/logprob_good"] > first["eval/logprob_good"] + 0.2
    gap = [line["eval/logprob_good"] - line["eval/logprob_bad"] for line in (first, last)]
    assert gap[1] > gap[0] + 0.2
    assert last["eval/kl"] > 0 and "eval/gold" in last
    info = json.loads((folder / "run.json").read_text())
    assert info["stage"] == "token-feedback" and info["summary"] == {"steps": 12, "responses": 6}


@pytest.mark.parametrize("loss", ["bandit", "ppo"])
def test_resume_equals_an_uninterrupted_run(tmp_path, learned, monkeypatch, loss):
    settings, whole = learned[loss]
    log = Run.log

    def interrupted(self, step, values):
        if step == 6:
            raise KeyboardInterrupt
        return log(self, step, values)

    again = {**vars(settings), "out": str(tmp_path / "parts")}
    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        token_feedback.main(token_feedback.TokenFeedbackConfig(**again))
    monkeypatch.undo()
    parts = token_feedback.main(token_feedback.TokenFeedbackConfig(**{**again, "resume": True}))
    saved = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, parts)]
    assert saved[0] == saved[1]


# What γ = 0 forgets


def test_with_gamma_0_a_terminal_score_reaches_the_last_token_alone():
    """A table of logits for responses of 3 tokens out of 3, trained by exact expectations of PPO's own advantages.

    With γ = 0 the first two tokens stay at the reference, to the last bit, and the third becomes the optimum of its own
    bandit, ref · exp(R / β); with γ = 1 the first one moves as well.
    """
    torch.manual_seed(0)
    beta = 0.5
    responses = torch.tensor(list(itertools.product(range(3), repeat=3)))
    score = torch.randn(27, dtype=torch.float64)
    nodes = torch.stack([torch.zeros(27).long(), 1 + responses[:, 0], 4 + 3 * responses[:, 0] + responses[:, 1]], 1)
    reference = torch.randn(13, 3, dtype=torch.float64)
    mask, zeros = torch.ones(27, 3), torch.zeros(27, 3, dtype=torch.float64)

    def logprobs_of(table):
        return torch.log_softmax(table, -1)[nodes, responses]

    def train(gamma):
        table = reference.clone().requires_grad_()
        optimizer = torch.optim.SGD([table], lr=2.0)
        for _ in range(400):
            logprobs = logprobs_of(table)
            probability = logprobs.detach().sum(1).exp()
            advantages, *_ = rk.rollout_advantages(
                score, logprobs.detach(), logprobs_of(reference), None, zeros, mask,
                kl_coef=beta, beta=0.0, gamma=gamma, lam=1.0, whiten=False,
            )  # fmt: skip
            optimizer.zero_grad()
            (-(probability[:, None] * advantages * logprobs).sum()).backward()
            optimizer.step()
        return torch.softmax(table.detach(), -1)

    start = torch.softmax(reference, -1)
    myopic, whole = train(0.0), train(1.0)
    torch.testing.assert_close(myopic[:4], start[:4], atol=1e-7, rtol=0)
    optimum = torch.softmax(reference[4:] + score.view(9, 3) / beta, -1)
    # Rarely visited prefixes learn slowly: those of the most likely path must be there.
    visited = (start[0][:, None] * start[1:4]).flatten() > 0.1
    assert visited.sum() >= 2
    torch.testing.assert_close(myopic[4:][visited], optimum[visited], atol=1e-2, rtol=0)
    # The exact optimum with γ = 1: the values of the prefixes tilt the first token too.
    last = (start[4:] * (score.view(9, 3) / beta).exp()).sum(1).log()
    middle = (start[1:4] * last.view(3, 3).exp()).sum(1).log()
    best = torch.softmax(reference[0] + middle, -1)
    assert (best - start[0]).abs().max() > 0.1
    torch.testing.assert_close(whole[0], best, atol=2e-2, rtol=0)


def test_a_batch_of_feedback(start):
    _, tokenizer = load_policy(start.policy)
    rows = [mark(tokenizer, "a", " b", [Span(0, 2, 1.0)]), mark(tokenizer, "a", "", [Span(0, 0, -1.0)])]
    batch, labels = batch_of(rows, tokenizer)
    same = collate([row.prompt for row in rows], [row.response for row in rows], tokenizer.pad_token_id)
    assert torch.equal(batch.tokens, same.tokens) and labels[1].tolist()[:1] == [-1.0]
    assert not labels[~batch.mask].any()


# In PPO


def test_a_term_visits_every_row_in_an_epoch(learner, feedback, start):
    policy, ref, _, _ = learner
    _, tokenizer = load_policy(start.policy)
    rows = read_feedback(feedback, tokenizer)
    settings = LossConfig("bandit", beta=0.25)
    term = FeedbackTerm(rows, tokenizer, ref, settings, weight=0.5, batch_size=4, seed=3)
    order = epoch_order(8, 3, 0)
    for number in (0, 1):
        batch, labels = batch_of([rows[i] for i in order[4 * number : 4 * number + 4]], tokenizer)
        policy.zero_grad()
        expected = feedback_backward(policy, ref, batch, labels, settings, weight=0.5)["loss"]
        wanted = gradients(policy)
        policy.zero_grad()
        assert term.backward(policy, number).item() == pytest.approx(expected)
        torch.testing.assert_close(gradients(policy), wanted)


def test_ppo_learns_from_marks_beside_its_rewards(tmp_path, start, feedback):
    """The gap between good and bad tokens opens with the term and not without it."""
    common = {"init": start.policy, "rm": start.reward_model, "steps": 2, "batch_size": 8, "response_length": 6}
    common |= {"eval_samples": 4, "num_samples": 0, "learning_rate": 1e-3}
    _, tokenizer = load_policy(start.policy)
    rows = read_feedback(feedback, tokenizer)
    batch, labels = batch_of(rows, tokenizer)

    def gap(folder):
        policy, _ = load_policy(str(folder))
        with torch.no_grad():
            logprobs = response_logprobs(policy, batch)
        return (logprobs[labels > 0].mean() - logprobs[labels < 0].mean()).item()

    marks = {"token_feedback": feedback, "token_feedback_weight": 1.0, "token_feedback_batch_size": 8}
    plain = ppo.main(PpoConfig(out=str(tmp_path / "a"), **common))
    mixed = ppo.main(PpoConfig(out=str(tmp_path / "b"), **common, **marks))
    assert gap(mixed) > gap(plain) + 0.2
    assert read_lines(mixed / "metrics.jsonl")[-1]["loss/token_feedback_avg"] > 0


JUDGE = """
def spans(completions, **_):
    return [[(0, min(2, len(text.encode())), 1.5)] if i != 1 else None for i, text in enumerate(completions)]

def numbers(completions, **_):
    return [1.0 for _ in completions]
"""


def test_a_judge_of_tokens_adds_to_the_rewards(tmp_path, start):
    """Spans of what was just sampled are rewards like any others: η · value on the tokens that they cover."""
    (tmp_path / "judge.py").write_text(JUDGE)
    reference = f"{tmp_path / 'judge.py'}:spans"
    common = {"init": start.policy, "rm": start.reward_model, "steps": 1, "batch_size": 4, "response_length": 6}
    common |= {"eval_samples": 4, "num_samples": 4, "kl_coef": 0.0, "missing_eos_penalty": 0.0}
    plain = ppo.main(PpoConfig(out=str(tmp_path / "a"), learning_rate=1e-12, **common))
    judged = {"token_reward_fn": reference, "token_reward_weight": 2.0, "learning_rate": 1e-12}
    found = ppo.main(PpoConfig(out=str(tmp_path / "b"), **judged, **common))
    samples = [read_lines(folder / "samples.jsonl") for folder in (plain, found)]
    for row, (before, after) in enumerate(zip(*samples)):
        assert before["tokens"] == after["tokens"]
        added = [b - a for a, b in zip(before["credit"], after["credit"])]
        empty = not "".join(after["tokens"][:-1])
        assert sum(added) == pytest.approx(0.0 if row == 1 else 3.0, abs=1e-4)
        assert empty or row == 1 or added[0] > 0.5
        assert sum(after["credit"]) == pytest.approx(after["score"], abs=1e-4)
    with pytest.raises(UserError, match=r"token_reward_fn .* must say what tokens or spans are worth, got one number"):
        ppo.main(PpoConfig(out=str(tmp_path / "c"), **common, token_reward_fn=reference.replace("spans", "numbers")))

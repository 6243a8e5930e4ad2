"""RRHF: the loss by hand and against the released code's, the step, the stage on several sources, resuming."""

import json
import math
from dataclasses import replace

import pytest
import torch

from rlhf import cli, rrhf
from rlhf.candidates import Candidates, read_candidates
from rlhf.config import UserError
from rlhf.data import collate
from rlhf.flags import make_parser, parse_config
from rlhf.model import load_policy, response_logprobs
from rlhf.run import Run

ROWS = [
    {"prompt": "in this film the plot", "responses": [" is brilliant .", " is dull ."], "scores": [0.9, 0]},
    {
        "prompt": "as a fan the music",
        "responses": [" was great .", " was bad .", " was fine ."],
        "scores": [2, -1, 0.5],
    },
]


def config(out, start, **changes):
    settings = {
        "out": str(out),
        "init": start.policy,
        "rm": start.reward_model,
        "rounds": 2,
        "num_prompts": 8,
        "batch_size": 4,
        "response_length": 8,
        "eval_samples": 8,
        "learning_rate": 1e-3,
    }
    return rrhf.RrhfConfig(**{**settings, **changes})


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# ------------------------------------------------------------------------------------------------------------- loss

LISTS = [[-1.0, -2, -3], [-0.5, -0.5], [-2.0, -1, -1, -0.4], [-3.0]]
SCORES = (0.2, 0.9, -0.1, 0.2)


def group_of(lists, scores, prompt_tokens, **fields):
    responses = [[2] * len(each) for each in lists]
    return Candidates(
        "p", [1] * prompt_tokens, responses, ["x"] * len(lists), scores, ("sample",) * len(lists), **fields
    )


def parts(lists, groups, **changes):
    """(rank, sft, gradient of each response's log-probabilities) of `loss_of`."""
    settings = rrhf.RrhfConfig(out="o", init="i", rm="r", **changes)
    width = max(map(len, lists))
    mask = torch.tensor([[t < len(each) for t in range(width)] for each in lists])
    logprobs = torch.full(mask.shape, math.nan, dtype=torch.float64)
    logprobs[mask] = torch.tensor([x for each in lists for x in each], dtype=torch.float64)
    logprobs.requires_grad_()
    loss, metrics = rrhf.loss_of(logprobs, mask, groups, settings)
    loss.backward()
    assert metrics["loss"] == pytest.approx(metrics["loss/rank"] + metrics["loss/sft"])
    return metrics["loss/rank"], metrics["loss/sft"], [row[keep].tolist() for row, keep in zip(logprobs.grad, mask)]


def test_published_numbers():
    rank, sft, gradient = parts(LISTS, [group_of(LISTS, SCORES, 2)])
    assert (rank, sft) == (pytest.approx(2.8), pytest.approx(1.0))
    expected = [[-1 / 3] * 3, [-1.0] * 2, [2 / 4] * 4, [-1.0]]
    for ours, numbers in zip(gradient, expected):
        assert ours == pytest.approx(numbers)
    assert parts(LISTS, [group_of(LISTS, SCORES, 2)], length_power=0.0)[0] == pytest.approx(1.6)
    assert parts(LISTS, [group_of(LISTS, SCORES, 2)], sft_reduction="mean")[:2] == pytest.approx((2.8, 0.5))


def test_both_ways_through_the_loss_are_one():
    """A weight of 1 for the only source leaves the op for the formula, on two prompts."""
    lists = [*LISTS, [-1.0, -0.2], [-0.1]]
    groups = [group_of(LISTS, SCORES, 2), group_of(lists[4:], (1.0, 0.0), 5)]
    ours, op = parts(lists, groups, source_weight=("sample=1",)), parts(lists, groups)
    assert ours[:2] == pytest.approx(op[:2])
    for a, b in zip(ours[2], op[2]):
        assert a == pytest.approx(b)


def released_code(lists, scores, prompt_tokens):
    """Loss of RRHF's train.py: labels are overwritten before the mask is made, so every length is the padded one."""
    padded = prompt_tokens + max(map(len, lists))
    labels = torch.full((len(lists), padded), -100)
    logits = torch.zeros(len(lists), padded)
    for row, each in enumerate(lists):
        labels[row, prompt_tokens - 1 : prompt_tokens - 1 + len(each)] = 7
        logits[row, prompt_tokens - 1 : prompt_tokens - 1 + len(each)] = torch.tensor(each)
    mask = (labels != -100).float()
    labels[labels == -100] = 0
    gathered = logits * mask
    p = gathered.sum(-1) / (labels != -100).float().sum(-1)
    rewards = torch.tensor(scores)
    difference, better = p[None] - p[:, None], rewards[None] - rewards[:, None]
    rank = -difference[(better > 0) & (difference < 0)].sum()
    return rank.item(), -gathered[rewards.argmax()].mean().item()


def test_released_codes_lengths():
    """Prompt of 2 and a longest candidate of 4 tokens: every sum is divided by 6."""
    compat = {"compat_padded_norm": True, "sft_reduction": "mean"}
    rank, sft, _ = parts(LISTS, [group_of(LISTS, SCORES, 2)], **compat)
    assert (rank, sft) == (pytest.approx(1.6 / 6), pytest.approx(1 / 6))
    assert (rank, sft) == pytest.approx(released_code(LISTS, SCORES, 2))
    assert rank != pytest.approx(2.8)


def test_presets(capsys):
    """Presets are the recipe's values; a flag wins over them."""
    stage = cli.STAGES["rrhf"]
    parser = make_parser("rrhf", stage.help, rrhf.RrhfConfig)

    def parsed(*flags):
        required = ["--init", "i", "--rm", "r", "--out", "o"]
        return parse_config(parser, "rrhf", rrhf.RrhfConfig, [*required, *flags])

    paper, code = parsed("--preset", "rrhf_paper"), parsed("--preset", "rrhf_code", "--epochs", "1")
    assert (paper.sft_reduction, paper.compat_padded_norm, paper.epochs) == ("sum", False, 3)
    assert (code.sft_reduction, code.compat_padded_norm, code.epochs) == ("mean", True, 1)
    assert paper.decoding == code.decoding == ("diverse_beam",) and paper.score_temperature == 1.0
    group = [group_of(LISTS, SCORES, 2)]
    changes = {name: getattr(code, name) for name in ("sft_reduction", "compat_padded_norm", "length_power")}
    assert parts(LISTS, group, **changes)[:2] == pytest.approx(released_code(LISTS, SCORES, 2))
    assert parsed("--only-use-provide", "--candidates", "c").sources == "provided"


def test_margin_and_weights():
    # Pairs that lose: third against first by 0.9 and against fourth by 1.9, each one rank apart.
    group = group_of(LISTS, SCORES, 2)
    assert parts(LISTS, [group], margin=0.1)[0] == pytest.approx(0.9 + 1.9 + 0.2)
    assert parts(LISTS, [group], margin=0.7)[0] == pytest.approx(1.6 + 2.6 + (-1.1 + 0.5 + 1.4))
    mixed = replace(group, sources=("a", "sample", "provided", "sample"))
    weights = ("a=0.5", "provided=0.2")
    rank, sft, _ = parts(LISTS, [mixed], source=("a=path",), source_weight=weights)
    assert (rank, sft) == (pytest.approx(0.9 * 0.5 * 0.2 + 1.9 * 0.2), pytest.approx(1.0))
    assert parts(LISTS, [mixed], source=("a=path",), source_weight=("sample=3",))[1] == pytest.approx(3.0)


def test_targets_of_the_supervised_term():
    given = group_of(LISTS, SCORES, 2, chosen=2)
    assert parts(LISTS, [given], candidates="c", sft_target="chosen")[1] == pytest.approx(4.4)
    share = [math.exp(score / 0.5) for score in SCORES]
    expected = sum(s * -sum(each) for s, each in zip(share, LISTS)) / sum(share)
    assert parts(LISTS, [given], sft_target="all_weighted", sft_tau=0.5)[1] == pytest.approx(expected)


def test_micro_batches_give_the_whole_batchs_step(start):
    policy, tokenizer = load_policy(start.policy)
    groups = [
        Candidates("a", [5, 6, 7], [[8, 9], [10], [11, 12, 13]], ["x"] * 3, (0.1, 0.9, 0.5), ("sample",) * 3),
        Candidates("b", [5], [[9, 8, 7, 6], [14, 15]], ["x"] * 2, (0.4, 0.2), ("sample",) * 2),
    ]
    before, after = [parameter.detach().clone() for parameter in policy.parameters()], []
    for micro_batch in (None, 2):
        with torch.no_grad():
            for parameter, saved in zip(policy.parameters(), before):
                parameter.copy_(saved)
        optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
        settings = rrhf.RrhfConfig(out="o", init="i", rm="r", micro_batch=micro_batch, max_grad_norm=1e9)
        metrics = rrhf.update(policy, tokenizer, optimizer, groups, settings)
        after.append(
            [parameter.detach().clone() for parameter in policy.parameters()] + [torch.tensor(metrics["loss"])]
        )
    assert max((a - b).abs().max() for a, b in zip(after[0], before)) > 1e-2
    for a, b in zip(*after):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------ stage


def test_steps_learn_the_ranking(tmp_path, start):
    """After some steps on two rankings the length-normalised log-probabilities stand in the order of the scores."""
    folder = rrhf.main(
        config(
            tmp_path / "run",
            start,
            candidates=write(tmp_path / "c.jsonl", ROWS),
            sources="provided",
            rescore=False,
            epochs=25,
            batch_size=2,
            eval_every=0,
        )
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["accuracy"] == 1.0 and lines[-1]["loss/rank"] == pytest.approx(0, abs=1e-6)
    assert lines[-1]["loss/sft"] < 0.5 * lines[1]["loss/sft"]
    policy, tokenizer = load_policy(str(folder))
    for group in read_candidates(str(tmp_path / "c.jsonl"), tokenizer):
        count = len(group.responses)
        batch = collate([group.prompt_tokens] * count, group.responses, tokenizer.pad_token_id)
        with torch.no_grad():
            mean = response_logprobs(policy, batch).sum(1) / batch.mask.sum(1)
        assert mean.argsort(descending=True).tolist() == torch.tensor(group.scores).argsort(descending=True).tolist()


def test_every_source_online_with_distance(tmp_path, start, other_start):
    folder = rrhf.main(
        config(
            tmp_path / "run",
            start,
            candidates=write(tmp_path / "c.jsonl", ROWS),
            decoding=("sample", "diverse_beam"),
            source=(f"other={other_start.policy}",),
            source_weight=("other=0.5",),
            num_candidates=2,
            refresh_every=2,
            batch_size=2,
            micro_batch=8,
            kl_coef=0.1,
            eval_every=0,
        )
    )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 4]
    names = ("sample", "diverse_beam", "other", "provided")
    for line in lines[1:]:
        assert sum(line[f"source/{name}/best"] for name in names) == pytest.approx(1)
        means = [line[f"source/{name}/score"] for name in names]
        assert min(means) <= line["objective/scores"] <= max(means)
    assert lines[-1]["eval/kl"] > 0


def test_prompts_held_out_for_evaluation_are_not_trained_on(tmp_path, start):
    from rlhf.data import load_task

    heldout = load_task("reviews", 0).eval_prompts[0]
    with pytest.raises(UserError, match="every prompt is held out for evaluation"):
        rrhf.main(
            config(tmp_path / "run", start, candidates=write(tmp_path / "c.jsonl", [{**ROWS[0], "prompt": heldout}]))
        )


def test_resume_equals_an_uninterrupted_run(tmp_path, start, monkeypatch):
    whole = rrhf.main(config(tmp_path / "whole", start))
    log = Run.log

    def interrupted(self, step, values):
        if step == 4:
            raise KeyboardInterrupt
        return log(self, step, values)

    monkeypatch.setattr(Run, "log", interrupted)
    with pytest.raises(KeyboardInterrupt):
        rrhf.main(config(tmp_path / "parts", start, save_steps=3))  # within the second round
    monkeypatch.undo()
    parts = rrhf.main(config(tmp_path / "parts", start, resume=True))
    saved = [(folder / "model" / "model.safetensors").read_bytes() for folder in (whole, parts)]
    assert saved[0] == saved[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rm": None}, "needs --candidates with scores, or --rm or --reward-fn to score what it samples"),
        ({"sources": "provided"}, "sources provided needs --candidates"),
        (
            {"rm": None, "candidates": "c", "sources": "sampled"},
            "sources sampled needs --rm or --reward-fn to score the samples",
        ),
        ({"num_candidates": 1}, "num_candidates must be at least 2 to rank, got 1"),
        ({"decoding": ("greedy",)}, "decoding must be one of sample, top_p, beam, diverse_beam, got 'greedy'"),
        ({"source": ("a",)}, "source must be name=value, got 'a'"),
        ({"source": ("sample=x",)}, "decoding and source must give every source a name of its own"),
        ({"source_weight": ("b=1",)}, "source_weight must be one of provided, sample =number, got b=1.0"),
        ({"source_weight": ("sample=x",)}, "source_weight must be name=number, got 'sample=x'"),
        ({"candidates": "c", "rescore": False}, "rescore must be on where provided and sampled candidates are ranked"),
        ({"sft_target": "chosen"}, "sft_target chosen needs --candidates"),
        ({"refresh_every": 2, "epochs": 2}, "refresh_every draws new candidates for each step and wants epochs 1"),
        ({"margin": -1.0}, "margin must be at least 0, got -1.0"),
        ({"sft_tau": 0.0}, "sft_tau must be greater than 0, got 0.0"),
        ({"rm": None, "candidates": "c", "kl_coef": 0.1}, "kl_coef needs --rm"),
    ],
)
def test_config_errors(tmp_path, start, change, message):
    with pytest.raises(UserError, match=message):
        config(tmp_path, start, **change)

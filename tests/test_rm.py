"""Reward-model training: pairs, losses, calibration, normalisation, resuming."""

import json
import math

import pytest
import torch

from rlhf import rm, rm_metrics
from rlhf.chat import renderer_hash
from rlhf.config import UserError
from rlhf.data import Demonstration, Ranking, load_task
from rlhf.model import load_policy, load_reward_model, scores
from rlhf.rm_data import Example, annotator_biases, batch_of, encode, ordered_pairs, without_biases
from rlhf.rm_objectives import OBJECTIVES, loss_of
from rlhf.run import read_lines


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A file of 40 rankings of 3 responses: the more "good", the better; and demonstrations for the normalisation."""
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows = []
    for i in range(40):
        prompt = f"film number {i} was"
        rows.append({"prompt": prompt, "responses": [" good good .", " good bad .", " bad bad ."], "scores": [2, 1, 0]})
        rows.append({"prompt": prompt, "response": [" good good .", " bad bad ."][i % 2]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def config(tmp_path, data="reviews", name="rm", **options):
    defaults = {"init": "tiny", "epochs": 4, "batch_size": 8, "eval_every": 0, "device": "cpu"}
    return rm.RmConfig(out=str(tmp_path / name), data=data, **{**defaults, **options})


def test_pairs_are_all_of_a_prompt_without_ties():
    assert ordered_pairs([1.0, 3.0, 1.0]) == [(1, 0), (1, 2)]
    assert ordered_pairs([2.0, 2.0]) == [] and ordered_pairs([0.0]) == []
    assert sorted(ordered_pairs([4, 3, 2, 1])) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    examples = [([[5], [6, 7]], (0.0, 1.0)), ([[8]], (9.0,)), ([[1], [2], [3]], (3.0, 2.0, 2.0))]
    batch = batch_of([Example(*each) for each in examples], pad_id=0)
    assert batch.tokens.tolist() == [[5, 0], [6, 7], [8, 0], [1, 0], [2, 0], [3, 0]]
    assert batch.attention_mask.sum(1).tolist() == [1, 2, 1, 1, 1, 1]
    assert batch.chosen.tolist() == [1, 3, 3] and batch.rejected.tolist() == [0, 4, 5]
    assert batch.prompts.tolist() == [0, 2, 2] and batch.targets.tolist() == [0, 1, 9, 3, 2, 2]
    assert batch.rankings.tolist() == [0, 0, 1, 2, 2, 2] and batch.ranks.tolist() == [1, 0, 0, 0, 1, 1]


def test_long_texts_keep_their_end(tmp_path, data):
    _, tokenizer = load_policy("tiny", tokenizer_texts=["a b c d"] * 2)
    ranking = Ranking("a b c", (" d", ""), (1.0, 0.0))
    (cut,) = encode(tokenizer, [ranking], max_length=3)
    assert [len(text) for text in cut.texts] == [3, 3] and cut.scores == (1.0, 0.0)
    assert all(text[-1] == tokenizer.eos_token_id for text in cut.texts)
    # Aligned, all of a ranking lose as many tokens, none of a response's.
    whole = encode(tokenizer, [ranking], max_length=9)[0].texts
    assert encode(tokenizer, [ranking], max_length=4, aligned=True)[0].texts == [text[1:] for text in whole]
    assert encode(tokenizer, [ranking], max_length=1, aligned=True)[0].texts == [whole[0][3:4], whole[1][3:4]]


def loss(tmp_path, predicted, given, **options):
    """given: scores of each ranking, or Examples."""
    examples = [each if isinstance(each, Example) else Example([[1]] * len(each), each) for each in given]
    batch = batch_of(examples, pad_id=0)
    return loss_of(torch.tensor(predicted), batch, config(tmp_path, **options)).item()


def softplus(x):
    return math.log1p(math.exp(x))


def test_losses_by_hand(tmp_path):
    # The mean over the pairs of a prompt first, then over prompts.
    first = (softplus(0.3 - 1.2) + softplus(-0.5 - 1.2) + softplus(-0.5 - 0.3)) / 3
    predicted, given = [1.2, 0.3, -0.5, 0.0, 2.0], [(3.0, 2.0, 1.0), (5.0, 1.0)]
    assert loss(tmp_path, predicted, given) == pytest.approx((first + softplus(2.0)) / 2, abs=1e-6)
    with_margin = softplus(2.0 + 0.5 * 4.0)
    assert loss(tmp_path, [0.0, 2.0], [(5.0, 1.0)], margin=0.5) == pytest.approx(with_margin, abs=1e-6)
    centred = softplus(2.0) + 0.01 * 4.0
    assert loss(tmp_path, [0.0, 2.0], [(5.0, 1.0)], center_coef=0.01) == pytest.approx(centred, abs=1e-6)
    # A score of 0 is a target like any other.
    squared = ((1.2 - 0.0) ** 2 + (0.3 - 1.0) ** 2) / 2
    assert loss(tmp_path, [1.2, 0.3], [(0.0, 1.0)], objective="absolute") == pytest.approx(squared, abs=1e-6)


def test_rankings_by_hand(tmp_path):
    # Golden values: a tie carries no pair; the mean over pairs, and over prompts of such means.
    scores, given = [1.2, 0.3, -0.5, 0.3], (3.0, 2.0, 1.0, 2.0)
    assert loss(tmp_path, scores, [given]) == pytest.approx(0.318459, abs=1e-6)
    assert loss(tmp_path, scores[:3], [given[:3]], objective="listwise") == pytest.approx(0.834364876, abs=1e-6)
    assert loss(tmp_path, scores[:3], [given[:3]], objective="top1") == pytest.approx(0.463264, abs=1e-6)
    pair = [Example([[1], [2]], (1.0, 0.0), margin=0.5)]
    assert loss(tmp_path, [1.2, 0.3], pair) == pytest.approx(0.513015, abs=1e-6)
    # A margin of the data wins over the flag, which is for what has none.
    assert loss(tmp_path, [1.2, 0.3], pair, margin=3.0) == pytest.approx(0.513015, abs=1e-6)
    both = [*pair, Example([[1], [2]], (1.0, 0.0))]
    expected = (0.513015 + softplus(3.0 - 0.9)) / 2
    assert loss(tmp_path, [1.2, 0.3] * 2, both, margin=3.0) == pytest.approx(expected, abs=1e-6)


def test_pairs_of_a_prompt_weigh_as_one_or_each(tmp_path):
    predicted, given = [1.2, 0.3, -0.5, 0.0, 2.0], [(3.0, 2.0, 1.0), (5.0, 1.0)]
    pairs = [softplus(-0.9), softplus(-1.7), softplus(-0.8), softplus(2.0)]
    assert loss(tmp_path, predicted, given, pair_reduction="global") == pytest.approx(sum(pairs) / 4, abs=1e-6)
    # As the differences that the scores have, three pairs of one prompt and one of another.
    squared = [(0.9 - 1) ** 2, (1.7 - 2) ** 2, (0.8 - 1) ** 2, (-2.0 - 4) ** 2]
    assert loss(tmp_path, predicted, given, objective="compare", pair_reduction="global") == pytest.approx(
        sum(squared) / 4, abs=1e-5
    )
    assert loss(tmp_path, predicted, given, objective="compare") == pytest.approx(
        (sum(squared[:3]) / 3 + squared[3]) / 2, abs=1e-5
    )


def test_soft_labels_by_hand(tmp_path):
    def soft(difference, q):
        return q * softplus(-difference) + (1 - q) * softplus(difference)

    pair = [Example([[1], [2]], (1.0, 0.0), probability=0.7)]
    assert loss(tmp_path, [1.2, 0.3], pair) == pytest.approx(soft(0.9, 0.7), abs=1e-6)
    both = [*pair, Example([[1], [2]], (1.0, 0.0))]
    expected = (soft(0.9 - 0.5, 0.7) + soft(0.9 - 0.5, 0.9)) / 2
    options = {"margin": 0.5, "label_smoothing": 0.1}
    assert loss(tmp_path, [1.2, 0.3] * 2, both, **options) == pytest.approx(expected, abs=1e-6)
    # At the true odds the gradient is 0: log(0.7 / 0.3) is where the loss is least.
    scores = torch.tensor([math.log(0.7 / 0.3), 0.0], requires_grad=True)
    loss_of(scores, batch_of(pair, 0), config(tmp_path)).backward()
    assert scores.grad.abs().max() < 1e-6


def test_per_token_loss_by_hand(tmp_path):
    """From the first token that differs to the end of the shorter text; what a text has alone does not count."""
    pairs = [Example([[5, 6, 7, 8, 9], [5, 6, 1, 9]], (1.0, 0.0)), Example([[3, 9], [3, 9]], (0.0, 1.0))]
    batch = batch_of(pairs, pad_id=0)
    scores = torch.tensor([[9.0, 9, 0.5, -1, 7], [0, 0, 0.2, 0.4, 5], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    scores.requires_grad_()
    found = loss_of(torch.zeros(4), batch, config(tmp_path, objective="per-token"), scores)
    assert found.item() == pytest.approx((softplus(-0.3) + softplus(1.4)) / 2, abs=1e-6)
    found.backward()
    assert (scores.grad != 0).nonzero().tolist() == [[0, 2], [0, 3], [1, 2], [1, 3]]
    doubled = [pairs[0], Example([[1, 9], [2, 9], [3, 9]], (2.0, 1.0, 0.0))]
    scores = torch.cat([scores[:2].detach(), torch.tensor([[1.0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [-1, 0, 0, 0, 0]])])
    options = {"objective": "per-token", "margin": 0.0, "label_smoothing": 0.1}
    found = loss_of(torch.zeros(5), batch_of(doubled, 0), config(tmp_path, **options), scores).item()

    def soft(difference):
        return softplus(-difference) + 0.1 * difference

    first = (soft(0.3) + soft(-1.4)) / 2
    rest = [(soft(1.0) + soft(0.0)) / 2, (soft(2.0) + soft(0.0)) / 2, (soft(1.0) + soft(0.0)) / 2]
    assert found == pytest.approx((first + sum(rest) / 3) / 2, abs=1e-6)


def test_annotators_biases_by_hand():
    """x gives 4 and 2, y gives 1, 1 and 1; the mean of all is 9 / 5."""
    rankings = [
        Ranking("p", ("a", "b"), (4.0, 1.0), annotators=("x", "y")),
        Ranking("q", ("a", "b", "c"), (2.0, 1.0, 1.0), annotators=("x", "y", "y")),
        Ranking("r", ("a", "b"), (5.0, 0.0), annotators=("z?", "")),
        Ranking("s", ("a",), (3.0,)),
    ]
    biases = annotator_biases(rankings[:2])
    assert biases == pytest.approx({"x": 3 - 1.8, "y": 1 - 1.8})
    found = without_biases(rankings, biases)
    assert [each.scores for each in found] == [
        pytest.approx(scores) for scores in ((2.8, 1.8), (0.8, 1.8, 1.8), (5.0, 0.0), (3.0,))
    ]
    assert annotator_biases(found[:2]) == pytest.approx({"x": 0.0, "y": 0.0})
    assert annotator_biases(rankings[3:]) == {}


def test_calibration_by_hand():
    # Confidences σ(0) = 0.5, σ(1) = 0.731 twice, once in the wrong order, and σ(9) = 0.9999.
    result = rm_metrics.calibration(torch.tensor([0.0, 1.0, -1.0, 9.0]))
    sure, certain = 1 / (1 + math.exp(-1)), 1 / (1 + math.exp(-9))
    assert result["calibration"]["count"] == [1, 2, 1]
    assert result["calibration"]["bins"] == pytest.approx([0.5, sure, certain], abs=1e-6)
    assert result["calibration"]["accuracy"] == [0.0, 0.5, 1.0]
    assert result["ece"] == pytest.approx((0.5 + 2 * (sure - 0.5) + 1 - certain) / 4, abs=1e-6)


def test_an_honest_model_has_a_small_calibration_error():
    torch.manual_seed(0)
    difference = torch.randn(20_000) * 2
    flipped = torch.where(torch.rand(20_000) < difference.abs().sigmoid(), difference.abs(), -difference.abs())
    assert rm_metrics.calibration(flipped)["ece"] < 0.015
    assert rm_metrics.calibration(flipped * 4)["ece"] > 0.1


@pytest.fixture(scope="module")
def trained(tmp_path_factory, data):
    return rm.main(config(tmp_path_factory.mktemp("run"), data))


def test_a_run_learns_to_order_held_out_responses(trained):
    summary = json.loads((trained / "run.json").read_text())["summary"]
    assert summary["pair_accuracy"] == 1.0 and summary["pair_accuracy_sem"] == 0.0 and summary["pairs"] == 12
    assert sum(summary["calibration"]["count"]) == 12 and 0 <= summary["ece"] <= 0.5
    first, *_, last = read_lines(trained / "metrics.jsonl")
    assert {"loss", "accuracy", "margin", "mean_reward", "min_reward", "max_reward", "lr", "grad_norm"} <= first.keys()
    assert last["eval/accuracy"] == 1.0 and last["eval/loss"] < 0.3 < first["loss"]


def test_scores_of_demonstrations_are_normalized(trained, data):
    model, tokenizer = load_reward_model(str(trained))
    assert model.config.renderer_hash == renderer_hash(tokenizer)  # a later stage can tell
    texts = [(each.prompt, each.response) for each in load_task(data, 0).demonstrations]
    found = rm.score_texts(model, tokenizer, texts, 512, micro_batch=7)
    assert found.mean().item() == pytest.approx(0.0, abs=1e-4)
    assert found.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-4)
    good, bad = rm.score_texts(
        model, tokenizer, [("film number 3 was", " good good ."), ("film number 3 was", " bad bad .")], 512
    )
    assert good > 0.5 and bad < -0.5


def test_every_response_goes_through_the_model_once(tmp_path, data):
    examples = [Example([[1, 2], [3], [4, 5, 6], [7]], (4.0, 3.0, 2.0, 1.0))] * 2
    model, _ = load_reward_model("tiny", tokenizer_texts=["a b"] * 2)
    batch, rows = batch_of(examples, pad_id=0), []
    model.base_model.register_forward_pre_hook(
        lambda module, args, options: rows.append(len(options["input_ids"])), with_kwargs=True
    )
    metrics = rm.train_step(model, torch.optim.SGD(model.parameters(), lr=0.0), batch, config(tmp_path, data))
    assert rows == [8] and len(batch.chosen) == 12
    with torch.no_grad():
        predicted = scores(model, batch.tokens, batch.attention_mask, normalized=False)
    assert metrics["accuracy"] == pytest.approx(
        (predicted[batch.chosen] > predicted[batch.rejected]).float().mean().item()
    )
    assert metrics["min_reward"] == pytest.approx(predicted.min().item(), abs=1e-6)


def test_absolute_scores_are_learned(tmp_path, data):
    folder = rm.main(config(tmp_path, data, objective="absolute", epochs=6))
    summary = json.loads((folder / "run.json").read_text())["summary"]
    assert summary["correlation"] > 0.9 and summary["loss"] < 0.2 and summary["pair_accuracy"] == 1.0


@pytest.mark.parametrize("objective", sorted({*OBJECTIVES} - {"pairwise", "absolute"}))
def test_every_objective_learns_the_order(tmp_path, data, objective):
    folder = rm.main(config(tmp_path, data, objective=objective, epochs=2))
    summary = json.loads((folder / "run.json").read_text())["summary"]
    assert summary["pair_accuracy"] > 0.9 and summary["top1_accuracy"] > 0.7
    assert ("correlation" in summary) == (objective == "compare")


def test_each_data_set_is_measured_by_itself():
    examples = [
        Example([[1], [2]], (1.0, 0.0), source="a"),
        Example([[1], [2], [3]], (1.0, 0.0, 0.5), source="b"),
        Example([[1], [2]], (3.0, 3.0), source="c"),
    ]
    predicted = torch.tensor([2.0, 1.0, 0.0, 1.0, 2.0, 0.0, 0.0])
    found = rm_metrics.evaluate([batch_of(examples, 0)], lambda batch: (predicted, torch.tensor(0.5)))
    assert found["pairs"] == 4 and found["pair_accuracy"] == 0.5 and found["top1_accuracy"] == 0.5
    a, b = found["sources"]["a"], found["sources"]["b"]
    assert list(found["sources"]) == ["a", "b"]  # c has no pair
    assert (a["pair_accuracy"], a["margin"], a["pairs"]) == (1.0, 1.0, 1)
    assert b["pair_accuracy"] == pytest.approx(1 / 3) and b["margin"] == pytest.approx((-1 - 2 + 1) / 3)
    logged = rm_metrics.eval_metrics(found)
    assert logged["eval/accuracy"] == 0.5 and logged["eval/accuracy/b"] == pytest.approx(1 / 3)
    only = rm_metrics.evaluate([batch_of(examples[:1], 0)], lambda batch: (predicted[:2], torch.tensor(0.5)))
    assert "sources" not in only and rm_metrics.evaluate([], lambda batch: None) == {}


def test_kinds_of_normalization(tmp_path, data, trained):
    task = load_task(data, 0)
    texts = [(each.prompt, each.response) for each in task.demonstrations]
    model, tokenizer = load_reward_model(str(trained))
    raw = rm.score_texts(model, tokenizer, texts, 512, normalized=False)
    expected = {"bias-only": raw - raw.mean(), "none": raw, "affine": (raw - raw.mean()) / raw.std(unbiased=False)}
    for kind, wanted in expected.items():
        rm.fit_normalization(model, tokenizer, task, config(tmp_path, data, normalize=kind))
        torch.testing.assert_close(rm.score_texts(model, tokenizer, texts, 512), wanted, rtol=1e-3, atol=1e-3)


def test_a_policys_samples_as_the_reference(tmp_path, data, start):
    task = load_task(data, 0)
    settings = config(tmp_path, data, normalize_policy=start.policy)
    model, tokenizer = load_reward_model(start.reward_model)
    torch.manual_seed(5)
    texts = rm.reference_texts(task, settings)
    assert sorted(prompt for prompt, _ in texts) == sorted(task.prompts)
    torch.manual_seed(5)
    rm.fit_normalization(model, tokenizer, task, settings)
    found = rm.score_texts(model, tokenizer, texts, 512).detach()
    assert found.mean().item() == pytest.approx(0.0, abs=1e-3)
    assert found.std(unbiased=False).item() == pytest.approx(1.0, abs=1e-3)


def test_biases_come_out_on_request(tmp_path):
    """y scores 10 higher than x, whatever the response: without its bias the better word is seen."""
    rows = [
        {
            "prompt": f"film {i % 20}",
            "response": [" good", " bad"][i % 2],
            "score": (i + 1) % 2 + 10 * (i < 20),
            "annotator": "xy"[i < 20],
        }
        for i in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = load_task(str(path), 0)
    kept, heldout = rm.usable(config(tmp_path, str(path), objective="absolute", debias_annotators=True), task)
    by_word = {}
    for each in kept + heldout:
        for response, score in zip(each.responses, each.scores):
            by_word.setdefault(response, []).append(score)
    assert max(by_word[" good"]) - min(by_word[" good"]) < 0.2 and min(by_word[" good"]) > max(by_word[" bad"]) + 0.7
    assert rm.usable(config(tmp_path, str(path), objective="absolute"), task)[0] == task.rankings
    for row in rows:
        del row["annotator"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"needs rows that say who gave a score \(--annotator-key\)"):
        rm.main(config(tmp_path, str(path), objective="absolute", debias_annotators=True))


def test_resuming_gives_what_an_uninterrupted_run_gives(tmp_path, data, monkeypatch):
    options = {"save_steps": 2, "batch_size": 12, "epochs": 2, "eval_every": 3}
    whole = rm.main(config(tmp_path, data, "whole", **options))
    original, steps = rm.train_step, []

    def stopping(*args):
        if len(steps) == 5:
            raise KeyboardInterrupt
        steps.append(1)
        return original(*args)

    monkeypatch.setattr(rm, "train_step", stopping)
    with pytest.raises(KeyboardInterrupt):
        rm.main(config(tmp_path, data, "cut", **options))
    monkeypatch.undo()
    cut = rm.main(config(tmp_path, data, "cut", resume=True, **options))
    summaries = [json.loads((folder / "run.json").read_text())["summary"] for folder in (whole, cut)]
    assert summaries[0] == summaries[1] and summaries[0]["steps"] == 6
    models = [load_reward_model(str(folder))[0] for folder in (whole, cut)]
    assert models[0].config.score_mean == models[1].config.score_mean
    for one, other in zip(*(model.parameters() for model in models)):
        assert torch.equal(one, other)


def test_data_without_pairs(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"prompt": "a", "response": " b"}\n{"prompt": "c", "response": " d"}\n')
    with pytest.raises(UserError, match="needs scored, or chosen and rejected, responses"):
        rm.main(config(tmp_path, str(path)))
    row = {"prompt": "a", "responses": [" b", " c"], "scores": [1, 1]}
    path.write_text("".join(json.dumps({**row, "prompt": f"p{i}"}) + "\n" for i in range(4)))
    task = load_task(str(path), 0)
    with pytest.raises(UserError, match="needs scored, or chosen and rejected, responses"):
        rm.usable(config(tmp_path, str(path)), task)
    assert len(rm.usable(config(tmp_path, str(path), objective="absolute"), task)[0]) == 3


def test_normalization_falls_back_to_the_ranked_responses(tmp_path, data):
    task = load_task(data, 0)
    model, tokenizer = load_reward_model("tiny", tokenizer_texts=task.texts())
    rankings = task.rankings[:2]
    bare = type(task)(**{**vars(task), "demonstrations": [], "rankings": rankings})
    rm.fit_normalization(model, tokenizer, bare, config(tmp_path, data))
    found = rm.score_texts(model, tokenizer, [(each.prompt, text) for each in rankings for text in each.responses], 512)
    assert found.mean().item() == pytest.approx(0.0, abs=1e-4)
    one = type(task)(**{**vars(task), "demonstrations": [Demonstration("a", " b")]})
    rm.fit_normalization(model, tokenizer, one, config(tmp_path, data))
    assert model.config.score_std == 1.0


@pytest.mark.parametrize("option", ["epochs", "batch_size", "max_length", "center_coef", "margin"])
def test_bad_options(tmp_path, option):
    with pytest.raises(UserError, match=f"{option} must be at least"):
        config(tmp_path, **{option: -1})
    with pytest.raises(UserError, match=r"token_dropout must be at least 0 and less than 1, got 1\.0"):
        config(tmp_path, token_dropout=1.0)


def test_dropped_tokens_are_a_share_and_never_the_one_that_is_scored():
    mask = torch.ones(200, 50, dtype=torch.bool)
    mask[:100, 30:], mask[100:, :20] = False, False
    seen = rm.drop_tokens(mask, 0.4)
    assert not (seen & ~mask).any() and seen[:100, 29].all() and seen[100:, 49].all()
    assert seen.sum().item() / mask.sum().item() == pytest.approx(0.6 + 0.4 / 30, abs=0.03)
    assert rm.drop_tokens(mask, 0.0) is mask


def test_real_sentences(tmp_path, data_folder):
    folder = data_folder / "rt-polarity"
    if not folder.is_dir():
        pytest.skip(f"no rt-polarity in {data_folder}")
    run = rm.main(config(tmp_path, str(folder), max_steps=20, epochs=1, lr_scheduler="constant", token_dropout=0.2))
    summary = json.loads((run / "run.json").read_text())["summary"]
    assert summary["steps"] == 20 and summary["pairs"] == 1600
    # Four epochs give 0.80; 20 steps must be 4 standard errors above chance.
    assert summary["pair_accuracy"] > 0.5 + 4 * summary["pair_accuracy_sem"]

"""rlhf report, on run folders written by hand: no training."""

import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from rlhf.config import UserError
from rlhf.report import ReportConfig, main
from rlhf.report_runs import grouped, read_runs
from rlhf.report_tables import gain_over

SENTENCE = "the acting is really warm and sharp , but the plot never quite works , and the score feels dull"
WORDS = SENTENCE.split()
PROMPTS = ["the film opens and", "a story about", "you will not", "after an hour", "the director"]


def write_run(
    root: Path, name: str, stage: str, *, metrics=(), samples=(), rollouts=(), evaluation=None, summary=None, **info
):
    folder = root / name
    folder.mkdir(parents=True)
    defaults = {
        "stage": stage,
        "config": {"out": f"runs/{name}", "init": "runs/sft", "seed": 0, "learning_rate": 3e-4},
        "versions": {"rlhf": "0.1.0", "torch": "2.13.0"},
        "started": f"2026-01-01T00:00:{len(list(root.iterdir())):02d}+00:00",
        "seconds": 92.4,
        "finished": True,
        "summary": summary or {},
    }
    (folder / "run.json").write_text(json.dumps({**defaults, **info}))
    lines = {"metrics.jsonl": metrics, "samples.jsonl": samples, "rollouts.jsonl": rollouts}
    for file, records in lines.items():
        if records:
            (folder / file).write_text("".join(json.dumps(record) + "\n" for record in records))
    if evaluation:
        (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder


def evaluation(gold: float, proxy: float, kl: float, rng: random.Random) -> dict:
    def sample(prompt):
        response = " ".join(rng.choices(WORDS, k=14))
        return {"prompt": prompt, "response": response, "proxy": rng.gauss(proxy, 0.5), "gold": rng.gauss(gold, 0.2)}

    return {
        "proxy": {"mean": proxy, "sem": 0.05},
        "gold": {"mean": gold, "sem": 0.02},
        "kl": {"mean": kl, "sem": 0.1},
        "length": 15.2,
        "eos_rate": 0.97,
        "distinct_1": 0.08,
        "distinct_2": 0.31,
        "n": 256,
        "samples": [sample(prompt) for prompt in PROMPTS],
    }


def credit_samples(kind: str, rng: random.Random) -> list[dict]:
    records = []
    for prompt in PROMPTS:
        tokens = [" " + word for word in rng.choices(WORDS, k=14)] + ["<eos>"]
        score = rng.gauss(0.5, 1)
        weights = [0.0] * 14 + [1.0] if kind == "terminal" else [rng.expovariate(1) for _ in tokens]
        credit = [score * weight / sum(weights) for weight in weights]
        if kind == "abc":
            credit[3], credit[-1] = credit[3] - 0.3, credit[-1] + 0.3
        rewards = [value - 0.01 for value in credit]
        records.append(
            {
                "step": 60,
                "prompt": prompt,
                "tokens": tokens,
                "credit": credit,
                "rewards": rewards,
                "score": score,
                "gold": 0.4,
            }
        )
    return records


def ppo_metrics(speed: float, peak: float, rng: random.Random, steps: int = 60) -> list[dict]:
    lines = []
    for step in range(1, steps + 1):
        t = step / steps
        line = {
            "step": step,
            "eps": 64.0 * step,
            "objective/scores": 2.5 * (1 - math.exp(-speed * t)) + rng.gauss(0, 0.15),
            "objective/kl": 12 * t * speed / 3 + rng.gauss(0, 0.3),
            "val/ratio": 1 + rng.gauss(0, 0.01),
            "policy/approxkl_avg": 0.01 + rng.expovariate(200),
            "policy/clipfrac_high": 0.03 + rng.expovariate(50),
            "policy/clipfrac_low": 0.05 + rng.expovariate(50),
            "tokens/mean_length": 14 + 4 * t,
            "val/clipfrac_avg": 0.02 + rng.expovariate(50),
            "loss/value_avg": 0.8 * math.exp(-3 * t) + rng.expovariate(20),
            "ppo/val/var_explained": 0.7 - 8 * math.exp(-9 * t) + rng.gauss(0, 0.03),
            "val/num_eos_tokens": 55 + rng.randrange(9),
            "policy/entropy_avg": 2.2 - t + rng.gauss(0, 0.04),
            "time/generate": 0.9 + rng.random() / 5,
            "time/train": 0.7,
            "time/scores": 0.2,
            "time/values": 0.1,
        }
        if step % 10 == 0 or step == 1:
            gold = peak * (1 - math.exp(-speed * t)) - max(0, t - 0.6) * 0.4
            line |= {"eval/gold": gold, "eval/gold_sem": 0.03, "eval/kl": 12 * t * speed / 3, "eval/eos_rate": 0.96}
        lines.append(line)
    return lines


def rollouts(rng: random.Random, steps=(1, 20, 40, 60)) -> list[dict]:
    records = []
    for step in steps:
        lengths = [rng.randrange(8, 16) for _ in range(64)]
        records.append(
            {
                "step": step,
                "scores": [rng.gauss(step / 30, 1) for _ in lengths],
                "lengths": lengths,
                "terminated": [length < 15 for length in lengths],
                "kl": [length * step / 200 + rng.gauss(0, 0.3) for length in lengths],
                "kl_by_position": [0.002 * step * (1 + t / 8) for t in range(15)] + [None],
            }
        )
    return records


def write_pipeline(root: Path) -> Path:
    """A demo's worth of run folders."""
    rng = random.Random(0)
    sft_metrics = [
        {"step": s, "loss/sft": 3 * math.exp(-s / 40) + 1.2 + rng.gauss(0, 0.05), "time/train": 0.3} for s in range(120)
    ]
    for line in sft_metrics[::20]:
        line["eval/loss"] = line["loss/sft"] + 0.1
    write_run(root, "sft", "sft", metrics=sft_metrics, evaluation=evaluation(0.05, 0.1, 0.0, rng))
    bins = [0.55, 0.65, 0.75, 0.85, 0.95]
    calibration = {"bins": bins, "accuracy": [0.58, 0.63, 0.79, 0.86, 0.97], "count": [60, 80, 90, 150, 400]}
    rm_metrics = [{"step": s, "loss/rm": 0.7 * math.exp(-s / 60) + rng.gauss(0, 0.03)} for s in range(100)]
    write_run(
        root,
        "rm",
        "rm",
        metrics=rm_metrics,
        summary={"pair_accuracy": 0.884, "pair_accuracy_sem": 0.011, "calibration": calibration, "pairs": 780},
    )
    for kind, speed, peak, gold in (("terminal", 2.5, 0.5, 0.46), ("abc", 4.0, 0.62, 0.55)):
        write_run(
            root,
            f"ppo-{kind}",
            "ppo",
            metrics=ppo_metrics(speed, peak, rng),
            samples=credit_samples(kind, rng),
            rollouts=rollouts(rng),
            evaluation=evaluation(gold, 2.1, 9.5, rng),
        )
    rrhf_metrics = [
        {
            "step": s,
            "loss/rank": 0.6 * math.exp(-s / 30) + 0.1,
            "loss/sft": 2 - s / 60,
            "objective/scores": 1.4 * (1 - math.exp(-s / 20)),
        }
        for s in range(60)
    ]
    for line in rrhf_metrics[::15]:
        line |= {"eval/gold": line["objective/scores"] / 4, "eval/kl": line["step"] / 8, "eval/gold_sem": 0.03}
    write_run(root, "rrhf", "rrhf", metrics=rrhf_metrics, evaluation=evaluation(0.38, 1.5, 7.0, rng))
    picked = [
        {"n": n, "kl_bound": math.log(n) - (n - 1) / n, "gold": {"mean": 0.1 + 0.12 * math.log(n), "sem": 0.02}}
        for n in (1, 2, 4, 8, 16)
    ]
    write_run(
        root,
        "best-of-n",
        "best-of-n",
        evaluation=evaluation(0.3, 1.3, 2.1, rng),
        summary={"best_of_n": picked},
        seconds=None,
        finished=False,
    )
    return root


def build(tmp_path: Path, *runs: Path, **options) -> str:
    config = ReportConfig(runs=tuple(map(str, runs)), out=str(tmp_path / "report"), **options)
    path = main(config)
    assert path == tmp_path / "report" / "report.html"
    return path.read_text(encoding="utf-8")


class Structure(HTMLParser):
    """Open tags, to see that every element is closed; start tags with their attributes; visible text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


@pytest.fixture(scope="module")
def pipeline_report(tmp_path_factory):
    root = tmp_path_factory.mktemp("report")
    text = build(root, write_pipeline(root / "runs"))
    return text, root / "report"


def test_sections_in_order_and_well_formed(pipeline_report):
    text, _ = pipeline_report
    titles = re.findall(r"<h2>(.*?)</h2>", text)
    assert titles == [
        "Methods",
        "Training",
        "Gold reward against distance",
        "Reward model",
        "Learning curves",
        "PPO diagnostics",
        "What the clip held back",
        "Inside the rollouts",
        "Credit of each token",
        "Responses",
        "Time by phase",
        "Configuration",
    ]
    page = Structure(text)
    assert page.open == []
    assert 'class="missing"' not in text


def test_self_contained(pipeline_report):
    text, _ = pipeline_report
    page = Structure(text)
    assert not {"script", "link", "iframe", "img"} & {tag for tag, _ in page.tags}
    references = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "xlink:href")
    ]
    assert references and all(value.startswith("#") for value in references)
    assert "url(http" not in text and "@import" not in text


def test_every_method_is_on_the_over_optimisation_plane(pipeline_report):
    text, _ = pipeline_report
    plane = text[text.index("<h2>Gold reward against distance") : text.index("<h2>Reward model")]
    for label in ("ppo-terminal", "ppo-abc", "rrhf", "best of n, picked", "start (SFT)"):
        assert f">{label}</text>" in plane


def test_svg_references_resolve_and_ids_are_unique(pipeline_report):
    text, _ = pipeline_report
    page = Structure(text)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'xlink:href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert wanted and wanted <= set(ids)


def test_pngs_beside_the_page(pipeline_report):
    text, folder = pipeline_report
    pngs = sorted(path.name for path in folder.glob("*.png"))
    assert {"proxy_reward.png", "gold_reward.png", "kl.png", "gold_vs_kl.png", "calibration_rm.png"} <= set(pngs)
    assert {"loss_sft.png", "loss_rm.png", "loss_rrhf.png", "val_ratio.png", "timings.png"} <= set(pngs)
    assert {"clip_ppo-abc.png", "scores_ppo-abc.png", "kl_position_ppo-abc.png", "kl_length_ppo-abc.png"} <= set(pngs)
    assert len(pngs) == text.count("<svg")
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in pngs)


def test_headline_numbers(pipeline_report):
    text, _ = pipeline_report
    assert "Highest gold reward: <strong>ppo-abc</strong>, +0.500 over sft (17.7 standard errors)" in text
    table = text[text.index("<h2>Methods") : text.index("<h2>Training")]
    rows = [re.sub(r"(\n|<[^>]+>)+", "|", row) for row in re.findall(r"<tr>(.*?)</tr>", table, flags=re.S)]
    assert [row.split("|")[1] for row in rows[1:]] == ["sft", "ppo-terminal", "ppo-abc", "rrhf", "best-of-n"]
    assert "2.100 ± 0.050" in rows[3] and "0.550 ± 0.020" in rows[3] and "+0.500 (17.7 s.e.)" in rows[3]
    assert "9.50 ± 0.10" in rows[3] and "15.2" in rows[3] and "97 %" in rows[3] and "1 min 32 s" in rows[3]
    assert "baseline" in rows[1] and "unfinished" in rows[5]
    assert "orders <strong>88.4 % ± 1.1 %</strong> of the held-out pairs" in text


def test_gain_in_standard_errors(tmp_path):
    write_pipeline(tmp_path)
    sft, _, terminal, *_ = grouped(read_runs([str(tmp_path)]))
    assert gain_over(terminal, sft) == pytest.approx((0.41, 0.41 / (0.02 * math.sqrt(2))))


def test_credit_spans(tmp_path):
    sample = {
        "step": 3,
        "prompt": "p",
        "tokens": [" good", " bad", " x"],
        "credit": [0.5, -0.25, 0.0],
        "rewards": [0.4, -0.3, 0.0],
        "score": 0.25,
        "gold": None,
    }
    text = build(tmp_path, write_run(tmp_path, "abc", "ppo", samples=[sample]))
    assert '<span style="background:rgba(0,158,115,0.85)" title="credit +0.5000, reward +0.4000">good</span>' in text
    assert 'class="minus" style="background:rgba(213,94,0,0.42)" title="credit -0.2500, reward -0.3000">bad' in text
    assert 'background:rgba(0,158,115,0.00)" title="credit +0.0000, reward +0.0000">x' in text
    assert "step 3, largest credit 0.500" in text


def test_text_from_models_and_configs_is_escaped(tmp_path):
    attack = '<script>alert("1")</script>'
    sample = {"step": 1, "prompt": attack, "tokens": [attack], "credit": [1.0], "rewards": [1.0], "score": 1, "gold": 1}
    judged = evaluation(0.1, 0.2, 0.3, random.Random(0))
    judged["samples"] = [{"prompt": attack, "response": attack, "proxy": 1.0, "gold": 1.0}]
    judged["against"] = {"run": attack, "gold": {"mean": 0.5, "sem": 0.1}}
    folder = write_run(
        tmp_path,
        "<b>&$x_1$",
        "ppo",
        metrics=[{"step": 1, "objective/scores": 1.0, "time/<i>": 1.0}],
        samples=[sample],
        evaluation=judged,
        config={"note": attack},
        summary={"pair_accuracy": 0.5},
    )
    text = build(tmp_path, folder, title=attack)
    assert "<script" not in text.lower() and "<b>" not in text and "<i>" not in text
    assert text.count("&lt;script&gt;alert(") >= 7
    assert Structure(text).open == []


def seeds(root: Path, golds=(0.2, 0.3, 0.4)) -> Path:
    """Three seeds of one pipeline, whose inputs have the seed in their names, and a run of other settings."""
    for seed, gold in enumerate(golds):
        metrics = [{"step": step, "eval/gold": gold * step, "eval/gold_sem": 9.0} for step in (1, 2)]
        config = {"out": f"runs/ppo-{seed}", "init": f"runs/sft-{seed}", "seed": seed, "learning_rate": 3e-4}
        judged = {"gold": {"mean": gold, "sem": 0.01}, "length": 10 + seed, "n": 8}
        write_run(root, f"ppo-{seed}", "ppo", metrics=metrics, evaluation=judged, config=config)
    write_run(root, "ppo-other", "ppo", config={"init": "runs/sft-0", "seed": 0, "learning_rate": 1e-4})
    return root


def test_seeds_of_one_setting_are_one_group(tmp_path):
    several, other = grouped(read_runs([str(seeds(tmp_path))]))
    assert (several.name, several.label, len(several.runs)) == ("ppo", "ppo (3 seeds)", 3)
    assert (other.name, len(other.runs)) == ("ppo-other", 1)
    # 0.2, 0.3, 0.4: mean 0.3, sample standard deviation 0.1, over √3.
    assert several.measured("gold") == pytest.approx({"mean": 0.3, "sem": 0.1 / math.sqrt(3)})
    assert several.measured("length")["mean"] == 11
    steps, means, errors = several.series("eval/gold")
    assert steps == [1, 2] and means == pytest.approx([0.3, 0.6])
    assert errors == pytest.approx([0.1 / math.sqrt(3), 0.2 / math.sqrt(3)])


def test_the_same_seed_twice_is_no_group(tmp_path):
    for name in ("a", "b"):
        write_run(tmp_path, name, "ppo")
    assert [len(group.runs) for group in grouped(read_runs([str(tmp_path)]))] == [1, 1]


def test_bands_over_seeds_are_drawn(tmp_path):
    text = build(tmp_path, seeds(tmp_path / "runs"))
    assert "between the seeds" in text and ">ppo (3 seeds)</text>" in text
    assert "<td>3</td>" in text and "0.300 ± 0.058" in text


def test_the_same_response_under_every_shaping(tmp_path):
    sample = {"step": 3, "prompt": "p", "tokens": [" a", " b"], "credit": [0.0, 1.0], "score": 1.0, "gold": None}
    sample["credit_by_shaping"] = {"terminal": [0.0, 1.0], "grad-x-input": [1.5, -0.5]}
    text = build(tmp_path, write_run(tmp_path, "ppo", "ppo", samples=[sample]))
    compared = text[text.index("The same responses under") :]
    assert "<strong>grad-x-input</strong>" in compared and "largest credit 1.500" in compared
    assert 'class="minus" style="background:rgba(213,94,0,0.28)" title="credit -0.5000">b' in compared


def test_missing_pieces_are_named(tmp_path):
    text = build(tmp_path, write_run(tmp_path, "empty", "sft", seconds=None, finished=False))
    notes = re.findall(r'<p class="missing">(.*?)</p>', text)
    assert len(notes) == 13
    assert "None of these runs has an evaluation.json yet; rlhf evaluate makes one." in notes
    assert "<svg" not in text and not list((tmp_path / "report").glob("*.png"))


def test_evaluation_without_gold(tmp_path):
    judged = evaluation(0.1, 0.2, 0.3, random.Random(0))
    del judged["gold"], judged["kl"]
    for sample in judged["samples"]:
        del sample["gold"]
    text = build(tmp_path, write_run(tmp_path, "sft", "sft", evaluation=judged))
    table = text[text.index("<h2>Methods") : text.index("<h2>Training")]
    assert "0.200 ± 0.050" in table and "<th>Gold reward</th>" not in table and "<th>KL (nats)</th>" not in table


def test_null_metrics_are_left_out_of_curves(tmp_path):
    metrics = [{"step": 1, "objective/scores": 1.0}, {"step": 2, "objective/scores": None}, {"step": 3}]
    folder = write_run(tmp_path, "ppo", "ppo", metrics=metrics)
    (run,) = read_runs([str(folder)])
    assert run.series("objective/scores") == ([1], [1.0])
    assert "<svg" in build(tmp_path, folder)


def test_same_folder_names_are_told_apart(tmp_path):
    first, second = (write_run(tmp_path / parent, "ppo", "ppo") for parent in ("a", "b"))
    assert [run.name for run in read_runs([str(first), str(second), str(first)])] == ["a/ppo", "b/ppo"]


def test_existing_report_is_kept_unless_overwritten(tmp_path):
    folder = write_run(tmp_path, "sft", "sft")
    before = build(tmp_path, folder)
    with pytest.raises(FileExistsError, match=r"report\.html is there; --overwrite replaces it"):
        build(tmp_path, folder, title="other")
    assert (tmp_path / "report" / "report.html").read_text() == before
    assert "<h1>other</h1>" in build(tmp_path, folder, title="other", overwrite=True)


def test_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"there is no run\.json in it"):
        build(tmp_path, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"there is no folder .*nowhere"):
        build(tmp_path, tmp_path / "nowhere")
    assert not (tmp_path / "report").exists()


def test_same_runs_give_the_same_page(tmp_path):
    metrics = ppo_metrics(2.5, 0.5, random.Random(0), steps=3)
    run = write_run(tmp_path, "ppo", "ppo", metrics=metrics, rollouts=rollouts(random.Random(1), steps=(1, 3)))
    assert build(tmp_path, run) == build(tmp_path, run, overwrite=True)

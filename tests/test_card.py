"""The model card: what a run says of itself, escaped; and `rlhf env`."""

import json
import re
import shlex
from dataclasses import dataclass

from rlhf import cli, flags
from rlhf.card import command_of, escape, write_card
from rlhf.config import CommonConfig, option
from rlhf.ppo import PpoConfig

INFO = {
    "stage": "ppo",
    "command": "rlhf ppo --data '<script>alert(1)</script>'",
    "config": {"init": "org/model-1", "data": "<script>alert(1)</script>|[x](javascript:1)\n# big", "rm": "runs/rm"},
    "versions": {"torch": "2.13"},
}


def test_a_card_names_what_was_done_and_runs_nothing(tmp_path):
    lines = [{"step": 1, "eval/gold": 0.25, "time/train": 3.0}, {"step": 2, "<img src=x>": 1.0, "eval/kl": None}]
    write_card(tmp_path, INFO, lines, "model")
    card = (tmp_path / "README.md").read_text()
    front, body = card.split("---\n", 2)[1:]
    assert front == 'library_name: "transformers"\ntags: ["rlhf", "ppo"]\nbase_model: "org/model-1"\n'
    assert "| eval/gold | 0.25 |" in body and "| step | 2 |" in body and "time/" not in body
    assert "| base model | org/model-1 |" in body and "runs/rm" in body and "| torch | 2.13 |" in body
    assert "<" not in body and not re.search(r"(?<!\\)\]\(", body) and "\n# big" not in body
    assert "&lt;script&gt;alert(1)&lt;/script&gt;\\|\\[x\\](javascript:1) \\# big" in body
    kept = json.loads((tmp_path / "training_args.json").read_text())
    assert kept["config"] == INFO["config"] and kept["stage"] == "ppo"


def test_a_local_base_is_no_hub_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    for base in ("tiny", "runs/sft", "/data/x", "../x"):
        write_card(tmp_path, {**INFO, "config": {"init": base}}, [], "model")
        assert "base_model" not in (tmp_path / "README.md").read_text(), base


def test_escape():
    assert escape("a_b *c* `d` | <e> & [f](g)\n\th") == r"a\_b \*c\* \`d\` \| &lt;e&gt; &amp; \[f\](g) h"


@dataclass(frozen=True, kw_only=True)
class Config(CommonConfig):
    files: tuple[str, ...] = option((), "files")
    whiten: bool = option(True, "whiten")


def test_the_command_gives_the_config_again():
    config = PpoConfig(out="runs/a b", init="x", rm="y", kl_coef=0.1, whiten_advantages=False, resume=True)
    words = shlex.split(command_of("ppo", config))
    assert words[:2] == ["rlhf", "ppo"] and "--resume" not in words and "--steps" not in words
    parser = flags.make_parser("ppo", "", PpoConfig)
    assert flags.parse_config(parser, "ppo", PpoConfig, [*words[2:], "--resume"]) == config
    assert (
        command_of("x", Config(out="o", files=("a b", "c"), whiten=False))
        == "rlhf x --out o --files 'a b' c --no-whiten"
    )


def test_env(capsys, monkeypatch):
    monkeypatch.setenv("RLHF_KERNELS_BACKEND", "torch")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("RLHF_JUDGE_KEY", "judge_secret")
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    for wanted in (
        "torch ",
        "transformers ",
        "threads in torch",
        "extension:",
        "ppo_loss",
        "RLHF_KERNELS_BACKEND = torch",
        "RLHF_JUDGE_KEY = (set, not shown)",
    ):
        assert wanted in text, wanted
    assert "secret" not in text

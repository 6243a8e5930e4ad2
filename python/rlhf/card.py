"""The model card and the settings that lie beside each saved model."""

from __future__ import annotations

import html
import json
import re
import shlex
from collections.abc import Sequence
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from .files import write_json

STAGES = {
    "sft": "supervised fine-tuning on demonstrations",
    "rm": "reward-model training on rankings or scores",
    "ppo": "PPO on the scores of a reward model or a reward function",
    "online": "PPO with a reward model that is refreshed on newly labelled samples",
    "rrhf": "RRHF, ranking of scored candidates",
    "best-of-n": "supervised fine-tuning on the best of n samples",
    "rft": "rejection-sampling fine-tuning",
    "dpo": "direct preference optimisation",
    "token-feedback": "learning from tokens that people marked good or bad",
}
ROLES = {"value": "The value model of this run; the policy lies in `../model`."}


def command_of(stage: str, config: Any) -> str:
    """The command line whose flags are this config, defaults left out."""
    words = ["rlhf", stage]
    for field in fields(config):
        value, flag = getattr(config, field.name), "--" + field.name.replace("_", "-")
        if (field.default is not MISSING and value == field.default) or field.name in ("resume", "overwrite"):
            continue
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        elif isinstance(value, dict):
            words += [flag, *(f"{key}={item}" for key, item in value.items())] if value else []
        elif isinstance(value, list | tuple):
            words += [flag, *map(str, value)] if value else []
        else:
            words += [flag, str(value)]
    return shlex.join(words)


def write_card(folder: Path, info: dict[str, Any], metrics: Sequence[dict[str, Any]], name: str) -> None:
    """README.md and training_args.json in a model's folder.

    info: of run.json: stage, config, command, versions. metrics: the lines of metrics.jsonl. name: of the model's
    folder. Whatever comes from the run, paths and names included, is escaped: a card is shown as HTML by those who
    publish it.
    """
    config = info["config"]
    base = config.get("init") or config.get("model") or ""
    front: dict[str, Any] = {"library_name": "transformers", "tags": ["rlhf", info["stage"]]}
    if re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", base) and not Path(base).exists() and base != "tiny":
        front["base_model"] = base
    last = {key: value for line in metrics for key, value in line.items() if not key.startswith("time/")}
    rows = {
        "stage": f"{info['stage']}: {STAGES.get(info['stage'], '')}",
        "base model": base or "–",
        "reward": config.get("rm") or config.get("reward_fn") or "–",
        "data": config.get("data", "–"),
        "command": info["command"],
    }
    numbers = {key: f"{value:.6g}" for key, value in last.items() if isinstance(value, int | float)}
    parts = [
        f"# {escape(info['stage'])}: {escape(name)}",
        ROLES.get(name, "A model trained by `rlhf`. Nobody has checked what it answers; its data may be biased."),
        table("", "", rows),
        "## Metrics at the end of training",
        table("metric", "value", numbers),
        "## Versions",
        table("", "", info["versions"]),
        "`training_args.json` has every setting.",
    ]
    header = "".join(f"{key}: {json.dumps(value)}\n" for key, value in front.items())  # JSON is YAML
    (folder / "README.md").write_text(f"---\n{header}---\n\n" + "\n\n".join(parts) + "\n", encoding="utf-8")
    write_json(folder / "training_args.json", {key: info[key] for key in ("stage", "command", "config", "versions")})


def table(left: str, right: str, rows: dict[str, Any]) -> str:
    lines = [f"| {left} | {right} |", "|---|---|"]
    return "\n".join(lines + [f"| {escape(str(key))} | {escape(str(value))} |" for key, value in rows.items()])


def escape(text: str) -> str:
    """As text, not as markup, in a cell of a Markdown table or in a heading."""
    plain = html.escape(" ".join(text.split()), quote=False)
    return re.sub(r"([\\`*_\[\]|#!~])", r"\\\1", plain)

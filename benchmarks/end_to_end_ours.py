"""Our side of the end-to-end comparison: `rlhf ppo` on the given models, timed by phase."""

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rlhf import ppo
from rlhf.ppo_config import PpoConfig
from rlhf.run import Run

SHARED = (
    "batch_size",
    "num_ppo_epochs",
    "response_length",
    "temperature",
    "learning_rate",
    "adam_eps",
    "kl_coef",
    "cliprange",
    "cliprange_value",
    "vf_coef",
    "gamma",
    "lam",
)
PHASES = {
    "generate": ("generate",),
    "score": ("score",),
    "logprobs and values": ("logprobs", "values"),
    "train": ("advantages", "train"),
}


def main(task: Path, settings: dict[str, Any], out: Path) -> None:
    torch.set_num_threads(settings["threads"])
    config = PpoConfig(
        out=str(out),
        overwrite=True,
        init=str(task / "policy"),
        rm=str(task / "reward_model"),
        data=str(task / "prompts.jsonl"),
        device="cpu",
        seed=settings["seed"],
        steps=settings["iterations"],
        missing_eos_penalty=0.0,
        num_mini_batches=1,
        eval_every=0,
        eval_samples=1,
        num_samples=0,
        **{name: settings[name] for name in SHARED},
    )
    rows: list[dict[str, Any]] = []
    since = time.perf_counter()
    log = Run.log

    def timed_log(run: Run, step: int, metrics: dict[str, Any]) -> dict[str, float | None]:
        nonlocal since
        record = log(run, step, metrics)
        if step:
            # The pipeline evaluates the last policy on held-out prompts, which is no part of an iteration.
            total = time.perf_counter() - since - record.get("time/evaluate", 0.0)
            seconds = {name: sum(record[f"time/{part}"] for part in parts) for name, parts in PHASES.items()}
            row = {"score": record["objective/scores"], "kl": record["objective/kl"]}
            rows.append(row | {"seconds": {**seconds, "total": total}})
        since = time.perf_counter()
        return record

    Run.log = timed_log
    ppo.main(config)
    # Not getrusage: that one remembers the memory of the process that started this one.
    peak = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024
    (out / "result.json").write_text(json.dumps({"iterations": rows, "peak_rss_mib": peak}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), Path(sys.argv[3]))

"""The whole of PPO beside the last TRL that had a PPO trainer: time by phase, memory, reward curve.

    python -m benchmarks.end_to_end             # both sides; benchmarks/results/end-to-end.json, its plot, README.md
    python -m benchmarks.end_to_end --readme    # only the plot and README.md from that file

Both sides start from the same files (end_to_end_task.py) with the same settings. Each run has a process of its own and
the same number of threads; the sides take turns. Then one process asks every trained policy the same held-out prompts.
TRL runs in a virtual environment that the first call makes, and later calls use.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import torch

from . import end_to_end_report, machine

ROOT = Path(__file__).parent.parent
# torch first: trl by itself would bring the newest one, which is not the one that ours runs with.
TRL = (("torch==2.13.0",), ("trl==1.10.0", "transformers==5.14.1", "accelerate", "datasets"))
SIDES = {"TRL": "benchmarks.end_to_end_trl", "ours": "benchmarks.end_to_end_ours"}
SETTINGS: dict[str, Any] = {
    "iterations": 14,
    "batch_size": 64,
    "num_ppo_epochs": 4,
    "response_length": 32,
    "temperature": 1.0,
    "learning_rate": 1e-4,
    "adam_eps": 1e-5,
    "kl_coef": 0.05,
    "cliprange": 0.2,
    "cliprange_value": 0.2,
    "vf_coef": 0.1,
    "gamma": 1.0,
    "lam": 0.95,
}


def main(arguments: list[str] | None = None) -> int:
    lines = (__doc__ or "").splitlines()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.end_to_end", description=lines[0])
    parser.add_argument("--readme", action="store_true", help="only write README.md and the plot from the results")
    parser.add_argument("--iterations", type=int, default=SETTINGS["iterations"], help="of a run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=2, help="runs of each side (%(default)s)")
    parser.add_argument("--threads", type=int, default=machine.cores(), help="of each run (%(default)s)")
    parser.add_argument(
        "--trl-env",
        type=Path,
        default=Path(os.environ.get("RLHF_TRL_ENV") or ROOT / "build" / "trl-env"),
        help="TRL's virtual environment, made where it is not there; RLHF_TRL_ENV names another (%(default)s)",
    )
    options = parser.parse_args(arguments)
    if not options.readme:
        pythons = {"TRL": trl_python(options.trl_env), "ours": sys.executable}
        settings = SETTINGS | {"iterations": options.iterations, "threads": options.threads}
        with tempfile.TemporaryDirectory() as folder:
            results = compare(pythons, settings, options.seeds, Path(folder))
        end_to_end_report.write(results)
        print(end_to_end_report.text(results))
    end_to_end_report.update()
    return 0


def compare(pythons: dict[str, str], settings: dict[str, Any], seeds: int, folder: Path) -> dict[str, Any]:
    """Both sides on one task, `seeds` times in turns."""
    from rlhf.data import load_task

    from . import end_to_end_task

    results: dict[str, Any] = {"machine": machine.environment("cpu"), "settings": settings}
    torch.set_num_threads(settings["threads"])
    say("training the reward model")
    results["reward_model_correlation"] = end_to_end_task.make(folder / "task", settings["response_length"])
    results["sides"] = {side: {"versions": versions(pythons[side]), "runs": []} for side in SIDES}
    for seed in range(1, seeds + 1):
        prompts = load_task(str(folder / "task" / "prompts.jsonl"), seed).prompts  # those that ours trains on
        (folder / "task" / "prompts.json").write_text(json.dumps(prompts))
        for side, module in SIDES.items():
            say(f"{side}, seed {seed} of {seeds}")
            out = folder / f"{side}-{seed}"
            out.mkdir()
            given = json.dumps(settings | {"seed": seed})
            command = [pythons[side], "-m", module, str(folder / "task"), given, str(out)]
            output = out.with_suffix(".log")
            with output.open("w") as log:
                done = subprocess.run(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment(side))
            if done.returncode:
                raise SystemExit(f"{side} failed:\n{output.read_text()[-3000:]}")
            run = json.loads((out / "result.json").read_text()) | {"seed": seed}
            results["sides"][side]["runs"].append(run | {"heldout": heldout(folder / "task", out, settings)})
            seconds = statistics.median(row["seconds"]["total"] for row in run["iterations"])
            last = run["iterations"][-1]["score"]
            say(f"  {seconds:.2f} s an iteration, {run['peak_rss_mib']:.0f} MiB, score {last:.2f}")
    return results


def environment(side: str) -> dict[str, str]:
    """TRL's process sees its own packages only; ours finds this repository as this process did."""
    ours = {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    common = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return common | quiet | (ours if side == "ours" else {})


def heldout(task: Path, out: Path, settings: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Score under the reward model and KL to the start, each {"mean", "sem"}, on prompts that no side trained on."""
    from rlhf.evaluate import Judges, measure
    from rlhf.model import load_policy, load_reward_model
    from rlhf.scorer import RewardModelScorer

    policy, tokenizer = load_policy(str(out / "model"))
    reward_model, _ = load_reward_model(str(task / "reward_model"))
    judges = Judges(load_policy(str(task / "policy"))[0], RewardModelScorer(reward_model), None)
    prompts = json.loads((task / "heldout.json").read_text())
    length, temperature = settings["response_length"], settings["temperature"]
    found = measure(policy, tokenizer, judges, prompts, response_length=length, temperature=temperature, seed=0)
    return {"score": found["proxy"], "kl": found["kl"]}


# -------------------------------------------------------------------------------------------------- TRL's environment


def trl_python(folder: Path) -> str:
    """The Python of TRL's environment, which is made where it is not there."""
    python = folder / "bin" / "python"
    wanted = dict(package.split("==") for group in TRL for package in group if "==" in package)
    if python.exists() and {name: versions(str(python)).get(name, "") for name in wanted} == wanted:
        return str(python)
    if folder.exists() and not (folder / "pyvenv.cfg").exists():
        raise SystemExit(f"--trl-env must be a virtual environment or a new folder, got {folder}")
    say(f"making TRL's environment in {folder}")
    venv.create(folder, with_pip=True)
    for packages in TRL:
        if subprocess.run([str(python), "-m", "pip", "install", "--quiet", *packages]).returncode:
            raise SystemExit(
                f"pip could not install {' '.join(packages)} into {folder} (above). TRL's side needs a package index "
                "once; --trl-env or RLHF_TRL_ENV names an environment that has them."
            )
    return str(python)


def versions(python: str) -> dict[str, str]:
    """Of the packages that decide, as that Python has them, local parts ("+cpu") cut off."""
    names = ("torch", "transformers", "trl")
    code = (
        "from importlib.metadata import distributions\n"
        "import json\n"
        f"print(json.dumps({{d.name: d.version.split('+')[0] for d in distributions() if d.name in {names}}}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else {}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

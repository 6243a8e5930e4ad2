"""The command `rlhf <stage> --flag value …`. Flags are the fields of the stage's config dataclass.

Only the chosen stage is imported, so `rlhf --help` does not wait for torch.
"""

import importlib
import os
import signal
import sys
import time
from pathlib import Path
from typing import NamedTuple

from . import __version__
from .config import UserError
from .flags import make_parser, parse_config, suggestion


class Stage(NamedTuple):
    module: str
    config: str
    help: str


STAGES = {
    "sft": Stage("rlhf.sft", "SftConfig", "fine-tune a causal language model on demonstrations"),
    "rm": Stage("rlhf.rm", "RmConfig", "train a reward model on rankings or scores"),
    "ppo": Stage("rlhf.ppo", "PpoConfig", "train the policy on the reward model, with dense rewards if asked"),
    "online": Stage("rlhf.online", "OnlineConfig", "PPO with a reward model refreshed on labelled new samples"),
    "rrhf": Stage("rlhf.rrhf", "RrhfConfig", "train the policy to rank candidates as the reward model does"),
    "token-feedback": Stage(
        "rlhf.token_feedback", "TokenFeedbackConfig", "train the policy on spans that people marked good or bad"
    ),
    "best-of-n": Stage("rlhf.best_of_n", "BestOfNConfig", "sample n, keep the best, fine-tune on it"),
    "rft": Stage("rlhf.rft", "RftConfig", "sample, keep what scores high, fine-tune on it, and again"),
    "dpo": Stage("rlhf.dpo", "DpoConfig", "train the policy on pairs of responses, without a reward model"),
    "evaluate": Stage("rlhf.evaluate", "EvaluateConfig", "proxy and gold reward, KL, length, diversity of a policy"),
    "merge": Stage("rlhf.lora", "MergeConfig", "write a model with LoRA as one with whole weights"),
    "report": Stage("rlhf.report", "ReportConfig", "one HTML page from any number of run folders"),
    "demo": Stage("rlhf.demo", "DemoConfig", "the whole pipeline on a generated task: no network, no data file"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for a mistake, 130 after Ctrl-C, 143 after SIGTERM."""
    try:
        status = command(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads, `head` for one, has enough; Python would complain again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE


def command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"rlhf {__version__}")
        return 0
    if argv[0] == "env":
        from .env import print_environment

        print_environment()
        return 0
    name = argv[0].replace("_", "-")
    if name not in STAGES:
        print(f"rlhf: unknown command {argv[0]}{suggestion(name, [*STAGES, 'env'])}; see rlhf --help", file=sys.stderr)
        return 2
    # Before torch loads OpenMP: its threads spin while they wait, and a second busy process then makes small models
    # several times slower (66 s against 11 s for 20 steps of `rlhf sft` with three processes on two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The stages have bars of their own; those of a model's loading would bury them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        return run_stage(name, STAGES[name], argv[1:])
    except KeyboardInterrupt as stop:
        print(f"\nrlhf {name}: interrupted", file=sys.stderr)
        return 128 + getattr(stop, "signal_number", signal.SIGINT)
    except ModuleNotFoundError as error:
        package = (error.name or "rlhf").partition(".")[0]
        if _traceback_wanted() or package in ("rlhf", "rlhf_kernels"):
            raise
        print(f'rlhf {name}: needs {package}: pip install "rlhf-kernels[pipeline]"', file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        if _traceback_wanted() or isinstance(error, BrokenPipeError):
            raise
        hint = "" if isinstance(error, UserError) else " (RLHF_TRACEBACK=1 shows where)"
        print(f"rlhf {name}: {' '.join(str(error).split())}{hint}", file=sys.stderr)
        return 2


def run_stage(name: str, stage: Stage, argv: list[str]) -> int:
    if not sys.stderr.isatty():  # transformers reads this when it is imported; its bars would fill a log file
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    module = importlib.import_module(stage.module)
    config_class = getattr(module, stage.config)
    parser = make_parser(name, stage.help, config_class)
    if {"-h", "--help"} & set(argv):
        parser.print_help()
        return 0
    config = parse_config(parser, name, config_class, argv)
    start = time.monotonic()
    try:
        out = module.main(config)
    except KeyboardInterrupt:
        if any(Path(config.out, "checkpoints").glob("step-*")):
            print(f"\nrlhf {name}: --resume continues from the last checkpoint in {config.out}", file=sys.stderr)
        raise
    print(f"rlhf {name}: done in {time.monotonic() - start:.0f} s, see {out}")
    return 0


def overview() -> str:
    commands = "\n".join(f"  {name:<14} {stage.help}" for name, stage in STAGES.items())
    return (
        "usage: rlhf <command> [--flag value …]\n\n"
        f"Reinforcement learning from human feedback, stage by stage.\n\n{commands}\n\n"
        "rlhf <command> --help   every flag of a command, with its default\n"
        "rlhf env                what a bug report needs: versions, machine, backends of the ops\n"
        "rlhf --version\n\n"
        "A first run, without network or data: rlhf demo"
    )


def _traceback_wanted() -> bool:
    return os.environ.get("RLHF_TRACEBACK") == "1"

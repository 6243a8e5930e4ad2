"""The command `rlhf <stage> --flag value …`. Flags are the fields of the stage's config dataclass.

Only the chosen stage is imported, so `rlhf --help` does not wait for torch.
"""

import argparse
import dataclasses
import difflib
import importlib
import json
import os
import sys
import time
import types
import typing
from dataclasses import MISSING
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from . import __version__
from .config import CommonConfig, UserError, range_text


class Stage(NamedTuple):
    module: str
    config: str
    help: str


STAGES = {
    "sft": Stage("rlhf.sft", "SftConfig", "fine-tune a causal language model on demonstrations"),
    "rm": Stage("rlhf.rm", "RmConfig", "train a reward model on rankings or scores"),
    "ppo": Stage("rlhf.ppo", "PpoConfig", "train the policy on the reward model, with dense rewards if asked"),
    "rrhf": Stage("rlhf.rrhf", "RrhfConfig", "train the policy to rank candidates as the reward model does"),
    "best-of-n": Stage("rlhf.best_of_n", "BestOfNConfig", "sample n, keep the best, fine-tune on it"),
    "evaluate": Stage("rlhf.evaluate", "EvaluateConfig", "proxy and gold reward, KL, length, diversity of a policy"),
    "report": Stage("rlhf.report", "ReportConfig", "one HTML page from any number of run folders"),
    "demo": Stage("rlhf.demo", "DemoConfig", "the whole pipeline on a generated task: no network, no data file"),
}


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 for a mistake in the command, 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(f"rlhf {__version__}")
        return 0
    name = argv[0].replace("_", "-")
    if name not in STAGES:
        print(f"rlhf: unknown command {argv[0]}{_suggestion(name, STAGES)}; see rlhf --help", file=sys.stderr)
        return 2
    # Before torch loads OpenMP: its threads spin while they wait, and a second busy process then makes small models
    # several times slower (66 s against 11 s for 20 steps of `rlhf sft` with three processes on two cores).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # The stages have bars of their own; those of a model's loading would bury them.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        return run_stage(name, STAGES[name], argv[1:])
    except KeyboardInterrupt:
        print(f"\nrlhf {name}: interrupted", file=sys.stderr)
        return 130
    except ModuleNotFoundError as error:
        package = (error.name or "rlhf").partition(".")[0]
        if _traceback_wanted() or package in ("rlhf", "rlhf_kernels"):
            raise
        print(f'rlhf {name}: needs {package}: pip install "rlhf-kernels[pipeline]"', file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        if _traceback_wanted():
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
    config = parse_config(parser, config_class, argv)
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
    commands = "\n".join(f"  {name:<10} {stage.help}" for name, stage in STAGES.items())
    return (
        "usage: rlhf <command> [--flag value …]\n\n"
        f"Reinforcement learning from human feedback, stage by stage.\n\n{commands}\n\n"
        "rlhf <command> --help   every flag of a command, with its default\n"
        "rlhf --version\n\n"
        "A first run, without network or data: rlhf demo"
    )


class Parser(argparse.ArgumentParser):
    """Raises UserError where argparse would print a usage text and exit."""

    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def make_parser(name: str, description: str, config_class: type) -> Parser:
    """A parser with `--config` and one flag for each field; flags that are not given leave no trace in the result."""
    parser = Parser(
        prog=f"rlhf {name}",
        description=description,
        usage="%(prog)s [--flag value …]",
        add_help=False,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=110),
    )
    flags = parser.add_argument_group("flags (dashes or underscores)")
    flags.add_argument("--config", metavar="FILE", help="JSON or YAML file with values for these flags; flags win")
    types_of = typing.get_type_hints(config_class)
    shared = {field.name for field in dataclasses.fields(CommonConfig)}
    fields = dataclasses.fields(config_class)
    for field in sorted(fields, key=lambda field: (not _required(field), field.name in shared)):
        kind, _, many = _kind(types_of[field.name])
        flag = _flag(field.name)
        help = f"{field.metadata.get('help', '')} {_default_text(field)}".replace("%", "%%")
        if kind is bool:
            flags.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
            continue
        choices = field.metadata.get("choices")
        metavar = "{" + ",".join(map(str, choices)) + "}" if choices else kind.__name__.upper()
        if many:
            flags.add_argument(flag, metavar=metavar, help=help, nargs="+", action="extend")
        else:
            flags.add_argument(flag, metavar=metavar, help=help)
    flags.add_argument("-h", "--help", action="store_true", help="show this text")
    return parser


def parse_config(parser: Parser, config_class: type, argv: list[str]) -> Any:
    """The config from `--config` and the flags. Raises UserError naming what is unknown, missing or ill-typed."""
    given, rest = parser.parse_known_args([_with_dashes(argument) for argument in argv])
    values = vars(given)
    names = [field.name for field in dataclasses.fields(config_class)]
    for argument in rest:
        if argument.startswith("-"):
            flag = argument.partition("=")[0]
            known = ["--config", *map(_flag, names)]
            raise UserError(f"unknown flag {flag}{_suggestion(flag, known)}")
    if rest:
        raise UserError(f"{rest[0]!r} belongs to no flag")
    if "config" in values:
        values = {**_config_file(values.pop("config"), names), **values}

    kinds = typing.get_type_hints(config_class)
    values = {name: convert(_flag(name), value, kinds[name]) for name, value in values.items()}
    for field in dataclasses.fields(config_class):
        if _required(field) and field.name not in values:
            raise UserError(f"{_flag(field.name)} is required: {field.metadata.get('help', '')}")
    return config_class(**values)


def convert(flag: str, value: Any, annotation: Any) -> Any:
    """A flag's text, or a value of a config file, as the field's type; raises UserError naming what was wanted."""
    kind, optional, many = _kind(annotation)
    if many:
        items = value if isinstance(value, list | tuple) else [value]
        return tuple(convert(flag, item, kind) for item in items)
    if optional and (value is None or value in ("none", "None")):
        return None
    fits = isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        fits = True
    if not fits and not (isinstance(value, str) and kind in (int, float)):
        raise UserError(f"{flag} must be {_wanted(kind, optional)}, got {value!r}")
    try:
        return kind(value)
    except ValueError:
        raise UserError(f"{flag} must be {_wanted(kind, optional)}, got {value!r}") from None


def _kind(annotation: Any) -> tuple[type, bool, bool]:
    """(element type, may be None, is a tuple) of str, int, float, bool, `… | None` or tuple[…, ...]."""
    if typing.get_origin(annotation) is tuple:
        return typing.get_args(annotation)[0], False, True
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        (kind,) = (option for option in typing.get_args(annotation) if option is not types.NoneType)
        return kind, True, False
    return annotation, False, False


def _wanted(kind: type, optional: bool) -> str:
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}[kind]
    return f"{words} or none" if optional else words


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _required(field: Any) -> bool:
    return field.default is MISSING


def _default_text(field: Any) -> str:
    allowed = range_text(field)
    allowed = allowed and f"; {allowed}"
    if _required(field):
        return f"(required{allowed})"
    default = field.default
    if isinstance(default, tuple):
        default = " ".join(map(str, default)) or "none"
    if isinstance(default, bool):
        default = "on" if default else "off"
    return f"(default: {'none' if default is None else default}{allowed})"


def _with_dashes(argument: str) -> str:
    flag, equals, value = argument.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else argument


def _suggestion(word: str, known: Any) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _config_file(path: str, names: list[str]) -> dict[str, Any]:
    text = Path(path).read_text(encoding="utf-8")
    try:
        values = json.loads(text) if path.endswith(".json") else _load_yaml(text)
    except ValueError as error:
        raise UserError(f"{path} is not valid: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold one object with flags and values, got {type(values).__name__}")
    values = {str(name).replace("-", "_"): value for name, value in values.items()}
    for name in values:
        if name not in names:
            raise UserError(f"{path}: unknown flag {name}{_suggestion(name, names)}")
    return values


def _load_yaml(text: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(str(error)) from error


def _traceback_wanted() -> bool:
    return os.environ.get("RLHF_TRACEBACK") == "1"

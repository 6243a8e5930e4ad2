"""What the stage configurations share. A stage's config is a frozen dataclass; each field is a flag of its command."""

import dataclasses
from dataclasses import MISSING, dataclass, fields
from typing import Any


class UserError(ValueError):
    """A mistake in what the user asked for; the command line shows it as one line, without a traceback."""


def option(default: Any, help: str, choices: tuple[Any, ...] | None = None) -> Any:
    """A config field with its help text (units included). `default=MISSING` makes the flag required."""
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """The flags of every training stage. A subclass with a `__post_init__` of its own calls this one's first."""

    out: str = option(MISSING, "run folder to write")
    seed: int = option(0, "seed of every random number generator")
    device: str = option("auto", "cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    dtype: str = option("float32", "dtype of the models' weights", choices=("float32", "bfloat16"))
    resume: bool = option(False, "continue the run in --out from its last checkpoint, or start it")
    overwrite: bool = option(False, "delete the run in --out before starting")
    report_to: str = option("none", "also write the metrics for this tracker", choices=("none", "tensorboard"))

    def __post_init__(self) -> None:
        check_choices(self)
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other, got both")


def check_choices(config: Any) -> None:
    """Raises UserError where a field of the dataclass has a value outside the `choices` of its option."""
    for field in fields(config):
        choices, value = field.metadata.get("choices"), getattr(config, field.name)
        if choices and value not in choices:
            raise UserError(f"{field.name} must be one of {', '.join(map(str, choices))}, got {value!r}")

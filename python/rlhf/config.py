"""What the stage configurations share. A stage's config is a frozen dataclass; each field is a flag of its command."""

import dataclasses
import operator
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .lora import Lora


class UserError(ValueError):
    """A mistake in what the user asked for; the command line shows it as one line, without a traceback."""


def option(
    default: Any,
    help: str,
    choices: tuple[Any, ...] | None = None,
    *,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
) -> Any:
    """A config field with its help text (units included) and its range, which `check_options` holds it to.

    `default=MISSING` makes the flag required. low and high belong to the range, above and below do not; None, where
    the field may be None, is always in it.
    """
    bounds = {"at least": low, "greater than": above, "at most": high, "less than": below}
    bounds = {word: bound for word, bound in bounds.items() if bound is not None}
    return dataclasses.field(default=default, metadata={"help": help, "choices": choices, "bounds": bounds})


TRUST_REMOTE_CODE = "run the Python files that come with a model; without it such a model is refused"


@dataclass(frozen=True, kw_only=True)
class CommonConfig:
    """The flags of every training stage. A subclass with a `__post_init__` of its own calls this one's first."""

    out: str = option(MISSING, "run folder to write")
    seed: int = option(0, "seed of every random number generator", low=0)
    device: str = option("auto", "cpu, cuda, cuda:1 …; auto takes a GPU where there is one")
    dtype: str = option("float32", "dtype of the models' weights", choices=("float32", "bfloat16"))
    resume: bool = option(False, "continue the run in --out from its last checkpoint, or start it")
    overwrite: bool = option(False, "delete the run in --out before starting")
    save_steps: int = option(0, "steps between checkpoints; 0 for none but the one that Ctrl-C leaves", low=0)
    save_total_limit: int = option(2, "checkpoints to keep", low=1)
    max_bad_steps: int = option(
        5, "stop after this many steps in a row in which a loss, a reward or a gradient was NaN or infinite", low=1
    )
    trust_remote_code: bool = option(False, TRUST_REMOTE_CODE)
    lora_r: int = option(0, "rank of LoRA adapters that train instead of the weights; 0 trains the weights", low=0)
    lora_alpha: float | None = option(
        None, "an adapter counts lora_alpha / lora_r times; 2 · lora_r unless given", above=0
    )
    lora_target_modules: tuple[str, ...] = option(
        (), "endings of the names of the linear layers that get an adapter; all linear layers unless given"
    )
    report_to: str = option("none", "also write the metrics for this tracker", choices=("none", "tensorboard"))

    @property
    def lora(self) -> "Lora | None":
        from .lora import Lora

        alpha = 2.0 * self.lora_r if self.lora_alpha is None else self.lora_alpha
        return Lora(self.lora_r, alpha, tuple(sorted(self.lora_target_modules))) if self.lora_r else None

    def __post_init__(self) -> None:
        check_options(self)
        if not self.lora_r and (self.lora_alpha is not None or self.lora_target_modules):
            raise UserError("lora_alpha and lora_target_modules need lora_r, got lora_r 0")
        if self.resume and self.overwrite:
            raise UserError("resume and overwrite exclude each other, got both")


DATA = '"reviews", a folder, a file or a hub name: gives '


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The flags by which a stage that reads data finds its way in it."""

    data_seed: int = option(
        0, "seed of the splits and of generated data: one in all stages, or what one holds out another trains on", low=0
    )
    dataset_config: str | None = option(None, "configuration of a hub data set")
    prompt_key: str | None = option(None, "name of the prompt's column in your data; so for the flags that follow")
    response_key: str | None = option(None, "column of the response of a demonstration, or of one that was judged")
    chosen_key: str | None = option(None, "column of the better response of a pair")
    rejected_key: str | None = option(None, "column of the worse response of a pair")
    responses_key: str | None = option(None, "column of several responses")
    scores_key: str | None = option(None, "column of their scores")
    score_key: str | None = option(None, "column of the score of one response")
    label_key: str | None = option(None, "column that says whether one response is good")
    margin_key: str | None = option(None, "column of the wanted score difference of a pair")
    probability_key: str | None = option(None, "column of the probability that the better response is better")
    annotator_key: str | None = option(None, "column of who gave the score")
    source_key: str | None = option(None, "column of the data set's name, for measurements of each")
    messages_key: str | None = option(None, "column of a conversation")

    @property
    def columns(self) -> dict[str, str]:
        """Our name of a column → the name in the data, for those that a flag names."""
        keys = [field.name for field in fields(DataConfig) if field.name.endswith("_key")]
        return {key.removesuffix("_key"): getattr(self, key) for key in keys if getattr(self, key) is not None}


REWARD_FN = "path.py:function that scores instead of the reward model: (prompts, completions, **columns) → list"

RM_CHAT_TEMPLATE = "show texts to the reward model as its tokenizer's chat template writes them"

GOLD = "reward model that judges instead of the data's gold judge; its scores are never trained on"


@dataclass(frozen=True, kw_only=True)
class SampledConfig(DataConfig):
    """The flags of a stage in which a policy's samples are scored, in training or in its evaluations."""

    init: str = option(MISSING, "start policy: run folder, model folder or hub name")
    rm: str | None = option(None, "reward model: run folder, model folder or hub name")
    reward_fn: str | None = option(None, REWARD_FN)
    rm_chat_template: bool = option(False, RM_CHAT_TEMPLATE)
    ref: str | None = option(None, "start model of the KL that evaluations report; --init unless given")
    data: str = option("reviews", DATA + "the prompts and the gold judge")
    gold: str | None = option(None, GOLD)
    response_length: int | None = option(None, "tokens a response may have; the task's own unless given", low=1)
    eval_samples: int = option(128, "responses in an evaluation", low=1)


def check_scorer(config: Any, *, needed: bool = True) -> None:
    """Raises UserError unless one of `rm` and `reward_fn` says what scores; neither is right where none is needed."""
    given = [name for name in ("rm", "reward_fn") if getattr(config, name) is not None]
    if len(given) == 2:
        raise UserError("rm and reward_fn exclude each other, got both")
    if needed and not given:
        raise UserError("rm or reward_fn must be given: something has to score the responses")


INSIDE: dict[str, Callable[[float, float], bool]] = {
    "at least": operator.ge,
    "greater than": operator.gt,
    "at most": operator.le,
    "less than": operator.lt,
}


def check_options(config: Any) -> None:
    """Raises UserError where a field of the dataclass lies outside the choices or the range of its option."""
    for field in fields(config):
        choices, value = field.metadata.get("choices"), getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if item is None:
                continue
            if choices and item not in choices:
                raise UserError(f"{field.name} must be one of {', '.join(map(str, choices))}, got {item!r}")
            # NaN is outside of every range, so a range is also what keeps it out.
            bounds = field.metadata.get("bounds", {})
            if not all(INSIDE[word](item, bound) for word, bound in bounds.items()):
                raise UserError(f"{field.name} must be {range_text(field)}, got {item}")


def range_text(field: Any) -> str:
    """What a field's range asks for, "at least 0 and less than 1"; nothing for a field without one."""
    return " and ".join(f"{word} {bound:g}" for word, bound in field.metadata.get("bounds", {}).items())

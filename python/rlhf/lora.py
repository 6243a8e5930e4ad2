"""LoRA through peft, on frozen weights that every model of a run shares.

Adapters are put into a model in place, so that it stays the class it was and no other file knows of them. Frozen
weights of one base are the same tensors in every model that was loaded from it: policy, value model and reward model
take the memory of one and of their adapters, and the reference is the base, or another copy of the adapter that the
policy started from.

On disk a model with LoRA is peft's folder: adapter_config.json, adapter_model.safetensors (the head of a reward or
value model in it), and our config.json beside them.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .config import UserError, check_options, option
from .files import new_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PREFIX = "base_model.model."  # of the names in adapter_model.safetensors
NAME = ".default"  # of the only adapter, in the names of a model's own parameters
WEIGHTS = "adapter_model.safetensors"


@dataclass(frozen=True)
class Lora:
    """r: rank. alpha: the product of the two matrices counts alpha / r times. target_modules: endings of the names of
    the linear layers that get an adapter; none for all of them."""

    r: int
    alpha: float
    target_modules: tuple[str, ...] = ()


@dataclass(frozen=True)
class Adapter:
    """An adapter on disk. base: the folder or hub name of the weights below it."""

    folder: Path
    base: str
    lora: Lora


def read_adapter(path: str) -> Adapter | None:
    """What adapter lies in a model folder; None where the folder has whole weights, or is no folder."""
    file = Path(path) / "adapter_config.json"
    if not file.exists():
        return None
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        kind, base, targets = said["peft_type"], said["base_model_name_or_path"], said["target_modules"]
        lora = Lora(said["r"], said["lora_alpha"], (targets,) if isinstance(targets, str) else tuple(sorted(targets)))
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is not the configuration of a LoRA adapter: {error!r}") from error
    if kind != "LORA":
        raise UserError(f"{file}: peft_type must be LORA, got {kind}")
    if Path(base).is_absolute() and not Path(base).is_dir():
        raise UserError(f"{file}: the adapter's base {base} is not there; base_model_name_or_path must name it")
    return Adapter(Path(path), base, lora)


# ------------------------------------------------------------------------------------------------------ shared weights

_shared: dict[tuple[str, torch.dtype, str], dict[str, weakref.ref[nn.Parameter]]] = {}


def share_frozen(model: PreTrainedModel, base: str, device: str | torch.device) -> None:
    """Freezes the model, whose weights come from `base`, and lets it use those of the models before it from there.

    Before any adapter is in it: the names of the weights are the base's own. On leaving, the weights are on `device`.
    """
    known = _shared.setdefault((base, model.dtype, str(torch.device(device))), {})
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        there = known[name]() if name in known else None
        if there is not None and there.shape == parameter.shape and not name.startswith("score."):
            _set(model, name, there)
    model.tie_weights()
    model.to(device)  # type: ignore[arg-type]
    model.requires_grad_(False)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        known[name] = weakref.ref(parameter)


def _set(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, parameter)


# ------------------------------------------------------------------------------------------------------------ adapters


def add_adapter(model: PreTrainedModel, base: str, lora: Lora, saved: Adapter | None) -> None:
    """Puts LoRA into a frozen model in place: new (the model's outputs do not change), or as it was saved.

    A head named `score` trains whole. Raises UserError where peft is not installed, where no layer has one of the
    names, or where the saved adapter does not fit the model.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise UserError("LoRA needs the peft package: pip install peft") from error
    head = getattr(model, "score", None)
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=list(lora.target_modules) or "all-linear",
        lora_dropout=0.0,
        fan_in_fan_out=any(type(module).__name__.endswith("Conv1D") for module in model.modules()),
        base_model_name_or_path=str(Path(base).resolve()) if Path(base).is_dir() else base,
        task_type="CAUSAL_LM" if head is None else "SEQ_CLS",
    )
    try:
        inject_adapter_in_model(settings, model)
    except ValueError as error:
        raise UserError(f"lora_target_modules {', '.join(lora.target_modules)} of {base}: {error}") from error
    if head is not None:
        settings.modules_to_save = ["score"]  # only now: peft would put a copy of the head into the model
        head.requires_grad_(True)
    if saved is not None:
        _load(model, saved)


def has_adapter(model: Any) -> bool:
    return bool(getattr(model, "peft_config", None))


def trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """(name in peft's file, weight) of a model's adapter and of its head."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name or name.startswith("score."):
            yield PREFIX + name.replace(NAME, ""), parameter


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """The weights that an optimiser is for: those of the adapter and the head, or all of them."""
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _load(model: PreTrainedModel, saved: Adapter) -> None:
    from safetensors.torch import load_file

    found = load_file(saved.folder / WEIGHTS)
    # peft itself writes a head that trains whole as "score.modules_to_save" or under its plain name.
    found = {name.replace(".modules_to_save", ""): tensor for name, tensor in found.items()}
    wanted = dict(trained(model))
    missing, unknown = wanted.keys() - found.keys(), found.keys() - wanted.keys()
    if getattr(model, "score", None) is None:
        unknown = {name for name in unknown if not name.startswith(f"{PREFIX}score.")}
    else:
        missing = {name for name in missing if not name.startswith(f"{PREFIX}score.")}
    if missing or unknown:
        name = min(missing | unknown)
        raise UserError(
            f"{saved.folder}: the adapter does not fit its base {saved.base}: {name} is in only one of them"
        )
    with torch.no_grad():
        for name, parameter in wanted.items():
            if name in found:
                parameter.copy_(found[name])


def has_head(saved: Adapter) -> bool:
    """Whether an adapter was saved with the head of a reward or value model."""
    from safetensors import safe_open

    with safe_open(saved.folder / WEIGHTS, "pt") as file:
        return any(name.startswith(f"{PREFIX}score.") for name in list(file.keys()))


def save_adapter(model: PreTrainedModel, folder: Path) -> None:
    """Writes peft's folder; the weights of the base are not in it."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(str(folder))
    model.config.save_pretrained(folder)
    weights = {name: parameter.detach().cpu().contiguous() for name, parameter in trained(model)}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


def merge(model: PreTrainedModel) -> None:
    """Makes whole weights of a model with LoRA, in place: W + (alpha / r)·B·A. Weights shared before are no longer."""
    for name, layer in list(model.named_modules()):
        if not hasattr(layer, "lora_A"):
            continue
        base: Any = layer.get_base_layer()
        base.weight = nn.Parameter(base.weight.detach() + layer.get_delta_weight("default"), requires_grad=False)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, base)
    del model.peft_config


# --------------------------------------------------------------------------------------------------------------- merge


@dataclass(frozen=True, kw_only=True)
class MergeConfig:
    model: str = option(MISSING, "run folder or model folder with LoRA")
    out: str = option(MISSING, "folder to write the whole model to")

    def __post_init__(self) -> None:
        check_options(self)


def main(config: MergeConfig) -> Path:
    """Write the model with its adapter merged into the weights, as save_pretrained does; returns the folder."""
    from .model import load_policy, load_reward_model
    from .run import resolve_model

    target = Path(config.out)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} is not empty")
    saved = read_adapter(resolve_model(config.model))
    if saved is None:
        raise UserError(f"{config.model} has no adapter to merge: it is a whole model")
    load = load_reward_model if has_head(saved) else load_policy
    model, tokenizer = load(config.model)
    merge(model)
    if target.exists():
        target.rmdir()
    with new_folder(target) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return target

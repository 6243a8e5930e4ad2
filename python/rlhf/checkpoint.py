"""Nested state as files without code in them: tensors in state.safetensors, the rest in state.json.

state.json also holds the SHA-256 of every other file in its folder, models included, so that a file which was cut off
or changed is found before anything is loaded from it.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch

from .config import UserError

FORMAT = 1


class Unreadable(UserError):
    """A folder of state that is incomplete, changed, or not of this format; the message says what is wrong."""


def write_state(folder: Path, state: Any) -> None:
    """Write `state` into an existing folder, whose other files are complete and stay as they are from now on.

    state: tensors, numbers, strings, None, lists, tuples and dicts (keys: strings, numbers), nested as they come.
    Raises TypeError naming the place of anything else.
    """
    from safetensors.torch import save_file

    tensors: dict[str, torch.Tensor] = {}
    tree = _encode(state, tensors, "state")
    save_file(tensors, folder / "state.safetensors")
    content = {"format": FORMAT, "files": _hashes(folder), "state": tree}
    (folder / "state.json").write_text(json.dumps(content, allow_nan=False), encoding="utf-8")


def read_state(folder: Path) -> Any:
    """What `write_state` wrote, tensors on the CPU. Raises Unreadable."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise Unreadable(f"{folder}/state.json has format {content['format']!r}, wanted {FORMAT}")
        found = _hashes(folder)
        for name, expected in content["files"].items():
            if found.get(name) != expected:
                raise Unreadable(f"{folder / name} is {'not what was written' if name in found else 'missing'}")
        return _decode(content["state"], load_file(folder / "state.safetensors"))
    except (OSError, SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise Unreadable(f"{folder}: {type(error).__name__}: {error}") from error


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _hashes(folder: Path) -> dict[str, str]:
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / "state.json")
    return {path.relative_to(folder).as_posix(): sha256(path) for path in paths}


# What JSON has no form for is an object with one key that starts with "$".


def _encode(value: Any, tensors: dict[str, torch.Tensor], name: str) -> Any:
    if isinstance(value, torch.Tensor):
        tensors[name] = value.detach().cpu().contiguous()
        return {"$tensor": name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, list | tuple):
        items = [_encode(item, tensors, f"{name}.{index}") for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    if isinstance(value, dict):
        pairs = [(key, _encode(item, tensors, f"{name}.{key}")) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(pairs)
        return {"$dict": [[_encode(key, tensors, name), item] for key, item in pairs]}
    raise TypeError(
        f"{name}: a checkpoint holds tensors, numbers, strings, lists and dicts, got {type(value).__name__}"
    )


def _decode(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(tree, list):
        return [_decode(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "$tensor" in tree:
        return tensors[tree["$tensor"]]
    if "$float" in tree:
        return float(tree["$float"])
    if "$tuple" in tree:
        return tuple(_decode(item, tensors) for item in tree["$tuple"])
    if "$dict" in tree:
        return {_decode(key, tensors): _decode(item, tensors) for key, item in tree["$dict"]}
    return {key: _decode(item, tensors) for key, item in tree.items()}

"""Files and folders that are written whole or not at all, and the JSON in them."""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import torch

from .config import UserError


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tensors and arrays as lists or numbers, NaN and infinities as null."""
    if isinstance(value, torch.Tensor | numpy.ndarray | numpy.generic):
        value = value.tolist()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, Path):
        return str(value)
    raise TypeError(
        f"JSON files hold numbers, strings, lists, dicts and tensors, got {type(value).__name__}: {value!r}"
    )


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Append one object to a .jsonl file; the file is closed again, so the line outlives a crash of the process."""
    line = json.dumps(plain(record))
    with open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file. A last line cut off by a crash is left out; any other bad line is a UserError."""
    lines = path.read_text(encoding="utf-8").split("\n")
    records = []
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise UserError(f"{path}:{number} is not a JSON object: {error}") from error
    return records


def write_json(path: Path, value: Any) -> None:
    """Replace the file in one step: a reader, or a crash, sees the old JSON or the new, never a part."""
    write_atomically(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace the file in one step, as `write_json` does."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`: takes its place when the block ends well, is deleted when it does not."""
    temporary, old = target.with_name(f".{target.name}.tmp"), target.with_name(f".{target.name}.old")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        _sync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    # No folder can be renamed over another. A kill between these two lines leaves .old, which recover() puts back.
    if target.exists():
        os.rename(target, old)
    os.rename(temporary, target)
    _sync_entry(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Undo what a killed process left half done in `folder`: put `.<name>.old` back or drop it, drop `.<name>.tmp`."""
    for old in folder.glob(".*.old"):
        target = folder / old.name.removeprefix(".").removesuffix(".old")
        if target.exists():
            shutil.rmtree(old)
        else:
            os.rename(old, target)
    for temporary in folder.glob(".*.tmp"):
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink()


def clear(folder: Path, last: str) -> None:
    """Delete what is in `folder`, the file `last` at the end."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == last):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _sync(folder: Path) -> None:
    for path in folder.rglob("*"):
        _sync_entry(path)
    _sync_entry(folder)


def _sync_entry(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

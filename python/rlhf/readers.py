"""Rows of data files: .jsonl, .json, .csv, .tsv (each also .gz) and .parquet, folders of them, data sets of a hub.

Files are only read. Each row comes with the place that an error can name.
"""

from __future__ import annotations

import csv
import gzip
import importlib.util
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .config import UserError

ENDINGS = (".jsonl", ".json", ".csv", ".tsv", ".parquet")
HELD_OUT = re.compile(r"(^|[-_.])(test|validation|valid|val|dev|eval)([-_.0-9]|$)", re.IGNORECASE)
"""Names of files and splits that are for evaluation."""

csv.field_size_limit(2**31 - 1)


class Row(NamedTuple):
    """where: "file:line", or "file, row n" where rows are no lines. heldout: of a file or split for evaluation."""

    where: str
    values: dict[str, Any]
    source: str = ""
    heldout: bool = False


def read_rows(data: str | Path, dataset_config: str | None = None) -> Iterator[Row]:
    """Every row of a file, of the files below a folder in the order of their names, or of a hub data set.

    Args:
        data: a path, or "owner/name" of a hub; the hub needs the `datasets` package.
        dataset_config: which configuration of a hub data set.

    Raises:
        UserError: what cannot be read, with file and line (rows that are no objects, unequal numbers of cells, bytes
            that are not UTF-8 …), and a folder or a file without rows.
        FileNotFoundError: a path that is not there.
    """
    path = Path(data)
    if not path.exists():
        if isinstance(data, str) and _is_hub_name(data):
            yield from _some(data, _hub_rows(data, dataset_config))
            return
        raise FileNotFoundError(
            f'data must be "reviews", a file, a folder or a hub name, got {data}, which is not there'
        )
    if path.is_file():
        if _ending(path) is None:
            raise UserError(f"{path}: must be a {', '.join(ENDINGS)} file (.gz too), or a folder of them")
        yield from _some(path, _file_rows(path, ""))
        return
    files = [each for each in sorted(path.rglob("*")) if _is_data(each.relative_to(path)) and each.is_file()]
    if not files:
        raise UserError(f"{path}: no {', '.join(ENDINGS)} file (and no .pos and .neg files) in this folder")
    yield from _some(path, (row for file in files for row in _file_rows(file, _source(file.relative_to(path)))))


def _some(name: str | Path, rows: Iterator[Row]) -> Iterator[Row]:
    first = next(rows, None)
    if first is None:
        raise UserError(f"{name}: no rows")
    yield first
    yield from rows


def _ending(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def _is_data(path: Path) -> bool:
    return _ending(path) is not None and not any(part.startswith(".") for part in path.parts)


def _source(path: Path) -> str:
    """The name of a data set in a folder: its own folder's, else its file's."""
    return path.parent.as_posix() if path.parent.parts else path.name.partition(".")[0]


def _file_rows(file: Path, source: str) -> Iterator[Row]:
    heldout = HELD_OUT.search(file.name) is not None
    ending = _ending(file)
    if ending == ".parquet":
        rows = _parquet_rows(file)
    elif ending in (".csv", ".tsv"):
        rows = _table_rows(file, _text(file), ending)
    else:
        text = _text(file)
        rows = _list_rows(file, text) if text.lstrip().startswith("[") else _line_rows(file, text)
    for where, values in rows:
        if not isinstance(values, dict):
            raise UserError(f"{where}: a row must be a JSON object, got {type(values).__name__}")
        yield Row(where, values, source, heldout)


def _text(file: Path) -> str:
    content = file.read_bytes()
    if file.name.lower().endswith(".gz"):
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError) as error:
            raise UserError(f"{file}: not a whole gzip file: {error}") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{file}:{line}: not UTF-8: {error.reason}") from None


def _line_rows(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    # Not splitlines(): it also cuts at characters such as U+2028 that may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield f"{file}:{number}", _parse_json(file, line, number - 1)


def _list_rows(file: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(_parse_json(file, text, 0), 1):
        yield f"{file}, row {number}", row


def _parse_json(file: Path, text: str, lines_before: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}:{lines_before + error.lineno}: not JSON: {error.msg}") from None


def _table_rows(file: Path, text: str, ending: str) -> Iterator[tuple[str, Any]]:
    """Rows of a table with a header; cells are texts. Quotes mean something in .csv only, as the two are defined."""
    style: dict[str, Any] = {"strict": True} if ending == ".csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(io.StringIO(text, newline=""), **style)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            where, line = f"{file}:{line}", reader.line_num + 1
            if not names:
                names = cells
                if len(set(names)) < len(names) or "" in names:
                    raise UserError(f"{where}: must name each column once, got {', '.join(names)!r:.200}")
                continue
            if not cells:
                continue
            if len(cells) != len(names):
                raise UserError(f"{where}: wanted {len(names)} cells as in the first line, got {len(cells)}")
            yield where, dict(zip(names, cells))
    except csv.Error as error:
        raise UserError(f"{file}:{line}: not {ending[1:].upper()}: {error}") from None


def _parquet_rows(file: Path) -> Iterator[tuple[str, Any]]:
    if importlib.util.find_spec("pyarrow") is None:
        raise UserError(f'{file}: a .parquet file needs pyarrow: pip install "rlhf-kernels[hub]"')
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{file}: not a Parquet file: {error}") from None


def _is_hub_name(name: str) -> bool:
    """owner/name, unless owner/ is a folder here: then it is a typing error, not a download."""
    return re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) is not None and not Path(name).parent.is_dir()


def _hub_rows(name: str, config: str | None) -> Iterator[Row]:
    if importlib.util.find_spec("datasets") is None:
        raise UserError(f'{name} is no file here; to read it from the hub: pip install "rlhf-kernels[hub]"')
    import datasets

    for split, rows in datasets.load_dataset(name, config).items():
        heldout = HELD_OUT.search(str(split)) is not None
        for number, row in enumerate(rows, 1):
            yield Row(f"{name} ({split}), row {number}", dict(row), "", heldout)

"""The task that rows of files or of a hub make: demonstrations, rankings, prompts, and what is held out of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .chat import Chat
from .data import FILE_RESPONSE_LENGTH, Ranking, Task, split
from .formats import Parser
from .readers import read_rows


def rows_task(
    data: str,
    seed: int,
    *,
    chat: Chat | None = None,
    columns: Mapping[str, str] | None = None,
    dataset_config: str | None = None,
) -> Task:
    """A task from rows of files or of a hub; there is no gold judge for them.

    Where files or splits are named for evaluation (test, validation, dev …), theirs are the held-out prompts, and what
    has the same prompts elsewhere is left out; else a tenth of the prompts is held out.
    """
    parse = Parser(chat, columns)
    heldout: dict[str, None] = {}
    records = []
    for where, values, source, evaluates in read_rows(data, dataset_config):
        record = parse(where, values, source)
        records.append(record)
        if evaluates:
            heldout[record.prompt] = None
    rows: dict[str, dict[str, Any]] = {}
    for record in records:
        rows.setdefault(record.prompt, record.values)
    if 0 < len(heldout) < len(rows):
        heldout_prompts = list(heldout)
        train_prompts = [prompt for prompt in rows if prompt not in heldout]
    else:
        heldout_prompts, train_prompts = split(list(rows), seed)
        heldout = dict.fromkeys(heldout_prompts)
    cut = sum(record.cut for record in records)
    if cut:
        what = "the start that both responses share was cut back to a turn or a word"
        print(f"{data}: in {cut} of {len(records)} rows {what}", file=sys.stderr)
    rankings = merged([record.ranking for record in records if record.ranking is not None])
    demonstrations = [record.demonstration for record in records if record.demonstration is not None]
    return Task(
        name=Path(data).name.partition(".")[0],
        demonstrations=[each for each in demonstrations if each.prompt not in heldout],
        rankings=[each for each in rankings if each.prompt not in heldout],
        heldout_rankings=[each for each in rankings if each.prompt in heldout],
        prompts=train_prompts,
        eval_prompts=heldout_prompts,
        gold=None,
        response_length=FILE_RESPONSE_LENGTH,
        rows=rows,
        cut_prompts=cut,
    )


def merged(rankings: Sequence[Ranking]) -> list[Ranking]:
    """Responses to one prompt that were judged one by one become one ranking; the others stay as they are."""
    singles: dict[tuple[str, str], list[Ranking]] = {}
    found: list[Ranking] = []
    for each in rankings:
        if len(each.responses) > 1:
            found.append(each)
        else:
            singles.setdefault((each.prompt, each.source), []).append(each)
    for (prompt, source), parts in singles.items():
        annotators = tuple(name for part in parts for name in part.annotators or ("",))
        found.append(
            Ranking(
                prompt,
                tuple(part.responses[0] for part in parts),
                tuple(part.scores[0] for part in parts),
                annotators=annotators if any(annotators) else (),
                source=source,
            )
        )
    return found

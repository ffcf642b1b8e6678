"""Files of a log with the pasts that a schema's sequences read: theirs, or made by replaying them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scalerec.data.parts import together, write_parts
from scalerec.data.source import Prepared, kept
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.schema import Schema

VERSION = 3  # raised when a replay writes other files than before


def with_histories(files: list[Path], schema: Schema, progress: Callable[[str], None]) -> Prepared:
    """The files themselves; or, where they have none of the schema's lists of the past, copies that have them all.

    A row of a copy sees the events of these files before it. Copies keep the order of the rows and are made once.

    Raises:
        InputError: the files have some of the lists, or not what a replay needs, or do not go together.
    """
    lists = [name for sequence in schema.sequences for name in sequence.list_columns()]
    try:
        there = set(pq.read_schema(files[0]).names)
    except (pa.ArrowException, OSError):
        there = set(lists)  # the reader names the broken file
    absent = [name for name in lists if name not in there]
    if not absent:
        return Prepared(files, {})
    if len(absent) < len(lists):
        has = next(name for name in lists if name in there)
        raise InputError(
            f"{files[0]}: has the list column {has!r} and not {absent[0]!r}: bring the lists of all sequences, or none "
            "of them to have them made"
        )
    identity = {"version": VERSION, "files": stamps(files), "schema": schema.model_dump(mode="json")}
    return kept("histories", identity, lambda folder: _replay(files, schema, folder, progress))


def stamps(files: list[Path]) -> list[tuple[str, int, int]]:
    """Path, size and time of change of each file: other ones are another log."""
    return [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _replay(files: list[Path], schema: Schema, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
    many = f"{files[0].parent}, {len(files)} files" if len(files) > 1 else str(files[0])
    progress(f"replaying {many} for the histories of its users (the log is held in memory)")
    tables = []
    for file in files:
        try:
            tables.append(pq.read_table(file))
        except (pa.ArrowException, OSError) as error:
            raise InputError(f"{file}: not a readable Parquet file ({error}); repair it or take it out") from None
    log = together(tables, many)
    if schema.new_events and schema.new_events not in log.column_names:
        log = log.append_column(schema.new_events, pa.array(np.zeros(log.num_rows, np.int64)))
    write_parts(folder, history.replay_pieces(schema, log))
    return {"rows": log.num_rows, "histories": [sequence.name for sequence in schema.sequences]}

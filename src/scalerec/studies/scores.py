"""Files in, the same rows with scores out, in constant memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from scalerec import checkpoint
from scalerec.data.histories import with_histories
from scalerec.data.reader import ParquetRows, find_parquet
from scalerec.data.split import NoSplit
from scalerec.errors import InputError
from scalerec.evaluate import BATCH
from scalerec.models.base import Model


def score_files(
    folder: Path, source: str, out: Path, *, skip_bad_shards: bool = False,
    progress: Callable[[str], None] = lambda message: None,
) -> dict[str, Any]:  # fmt: skip
    """Write the rows of `source` to `out` with one column `score_<task>` per task; `out` appears only when complete.

    Raises:
        InputError: no checkpoint, no files, columns missing, a column of that name already there, a model that does
            not rank, `out` among the files.
    """
    saved = checkpoint.load(folder)
    model = saved.model()
    if not model.ranks:
        raise InputError(
            f"{folder}: {saved.run['model']['kind']} only retrieves and has no scores of tasks: measure it with "
            "`scalerec evaluate`, or train a model that ranks (hstu with --model.goal ranking or joint)"
        )
    files = find_parquet(source)
    if out.resolve() in [file.resolve() for file in files]:
        raise InputError(f"--out {out}: one of the files to score: name another")
    brought, schema = ParquetRows(files, NoSplit(), skip_bad_shards=skip_bad_shards).columns, saved.encoder.schema
    made = {name for sequence in schema.sequences for name in sequence.list_columns()} | {schema.new_events}
    files = with_histories(files, schema, progress).files
    rows = ParquetRows(files, NoSplit(), skip_bad_shards=skip_bad_shards)
    names = [f"score_{task}" for task in saved.layout.tasks]
    clash = [name for name in names if name in rows.columns]
    if clash:
        raise InputError(f"{source}: already has a column {clash[0]!r}; rename it first")
    temporary = out.with_name(f".{out.name}.new")
    out.parent.mkdir(parents=True, exist_ok=True)
    count, counts = 0, Counter[str]()
    try:
        writer = None
        for scored in _scored(saved, model, rows, made - set(brought), names, counts):
            writer = writer or pq.ParquetWriter(temporary, scored.schema, compression="zstd")
            mine, first = list(scored.schema), list(writer.schema)
            odd = next((field for field in mine + first if (field in mine) != (field in first)), None)
            if odd is not None:
                what = f"not all have {odd.name}: {odd.type}"
                raise InputError(f"{source}: files of different columns cannot be written together: {what}")
            writer.write_batch(scored.select(writer.schema.names))
            count += scored.num_rows
        if writer is None:
            raise InputError(f"{source}: no rows to score")
        writer.close()
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)
    counts += rows.counts
    return {"rows": count, "out": str(out), "counts": {k: v for k, v in counts.items() if k != "rows"}}


def _scored(
    saved: checkpoint.Checkpoint, model: Model, rows: ParquetRows, made: Collection[str | None], names: list[str],
    counts: Counter[str],
) -> Iterator[pa.RecordBatch]:  # fmt: skip
    """The columns of all rows but those that were made, and beside them their scores."""
    for piece in rows.pieces("train"):
        if not piece.rows.num_rows:
            continue
        where = str(piece.group.file)
        batch = saved.encoder.encode(
            piece.rows, index=piece.index, where=where, first=piece.group.file_first, labels=False, counts=counts
        )
        with torch.inference_mode():
            parts = torch.arange(len(batch)).split(BATCH)
            scores = torch.cat([torch.sigmoid(model(batch.take(part)).logits) for part in parts]).numpy()
        given = piece.rows.select([name for name in piece.rows.schema.names if name not in made])
        arrays = [*given.columns, *(pa.array(np.ascontiguousarray(scores[:, j])) for j in range(len(names)))]
        yield pa.RecordBatch.from_arrays(arrays, names=[*given.schema.names, *names])

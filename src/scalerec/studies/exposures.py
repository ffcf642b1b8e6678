"""What a service has shown, read back piece by piece: the exposure log's Parquet files.

A row is one candidate of one request: request_id, time, served_at, model, version, bucket, user, item, place, score,
one `score.<task>` a task, `raw.<column>` as the encoder got them, `encoded.<feature>` as it gave them to the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scalerec.data.reader import PIECE_ROWS, find_parquet
from scalerec.errors import InputError
from scalerec.features.hashing import hash_column, mix

RAW, ENCODED, SCORE = "raw.", "encoded.", "score."


class Exposures:
    """The rows of exposure files in their order: all, those of one model, or those of requests drawn by a hash."""

    def __init__(
        self, path: str | Path, *, model: str | None = None, version: str | None = None, sample: float = 1.0
    ):  # fmt: skip
        if not 0 < sample <= 1:
            raise InputError(f"--sample {sample}: the share of requests to read is above 0 and at most 1")
        self.path, self.files, self.sample = path, find_parquet(path), sample
        self.only = {name: value for name, value in (("model", model), ("version", version)) if value is not None}

    def count(self, *columns: str) -> Counter[tuple]:
        """How many rows there are of each combination of these columns' values."""
        counts: Counter[tuple] = Counter()
        for rows in self.pieces(columns):
            found = pa.Table.from_batches([rows]).group_by(list(columns)).aggregate([([], "count_all")])
            for row in found.to_pylist():
                counts[tuple(row[name] for name in columns)] += row["count_all"]
        return counts

    def columns(self) -> list[str]:
        """The columns of the first file that has a row of ours."""
        for rows in self.pieces(None):
            return rows.schema.names
        asked = ", ".join(f"{name} {value}" for name, value in self.only.items())
        raise InputError(f"{self.path}: no exposures{f' of {asked}' if asked else ''} there")

    def pieces(self, columns: Sequence[str] | None, size: int = PIECE_ROWS) -> Iterator[pa.RecordBatch]:
        """Up to `size` rows at a time; `columns` None: all that the file has.

        Raises:
            InputError: a file cannot be read, or has a row of ours but not a column.
        """
        own = [*self.only, *(["request_id"] if self.sample < 1 else [])]
        for file in self.files:
            try:
                with pq.ParquetFile(file) as opened:
                    names = opened.schema_arrow.names
                    wanted = names if columns is None else [name for name in names if name in {*columns, *own}]
                    _need(file, names, own)
                    for rows in opened.iter_batches(size, columns=wanted):
                        kept = self._kept(rows)
                        if kept.num_rows:
                            _need(file, names, columns or ())
                            yield kept if columns is None else kept.select(list(columns))
            except (pa.ArrowException, OSError) as error:
                line = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise InputError(f"{file}: not a readable Parquet file ({line}); take it out") from None

    def _kept(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        for name, value in self.only.items():
            column = rows.column(name)
            rows = rows.filter(pc.equal(column.cast(pa.string()), value))
        if self.sample < 1:
            drawn = mix(hash_column(rows.column("request_id"), "request_id")).astype(np.float64) / 2.0**64
            rows = rows.filter(pa.array(drawn < self.sample))
        return rows


def _need(file: Path, names: Sequence[str], wanted: Sequence[str]) -> None:
    absent = next((name for name in wanted if name not in names), None)
    if absent is not None:
        raise InputError(
            f"{file}: no column {absent!r}: it has {', '.join(names[:20])}; an exposure log of this model is needed"
        )

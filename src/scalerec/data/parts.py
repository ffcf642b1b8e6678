"""Prepared rows on disk: Parquet parts that are read in the order of their names."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from scalerec.errors import InputError

ROW_GROUP = 65_536
GROUPS_A_PART = 16
EARLIER = "earlier"  # a folder beside the parts


def together(tables: Sequence[pa.Table], what: str) -> pa.Table:
    """Rows of several files in one table, moments of all time zones in UTC, numbers as wide as the widest.

    Raises:
        InputError: a column has types that do not go together.
    """
    try:
        return pa.concat_tables([table.cast(_in_utc(table.schema)) for table in tables], promote_options="permissive")
    except pa.ArrowException as error:
        raise InputError(f"{what}: the files do not go together ({error})") from None


def _in_utc(schema: pa.Schema) -> pa.Schema:
    return pa.schema(
        [
            field.with_type(pa.timestamp(field.type.unit, "UTC"))
            if pa.types.is_timestamp(field.type) and field.type.tz
            else field
            for field in schema
        ]
    )


def write_parts(folder: Path, pieces: Iterable[pa.Table]) -> int:
    """Write pieces of ROW_GROUP rows (the last may be shorter) as part-00000.parquet, ...; how many rows there are."""
    rows, groups = 0, 0
    writer: pq.ParquetWriter | None = None
    try:
        for piece in pieces:
            if groups % GROUPS_A_PART == 0:
                if writer is not None:
                    writer.close()
                part = folder / f"part-{groups // GROUPS_A_PART:05d}.parquet"
                writer = pq.ParquetWriter(part, piece.schema, compression="zstd")
            assert writer is not None
            writer.write_table(piece, row_group_size=ROW_GROUP)
            rows, groups = rows + piece.num_rows, groups + 1
    finally:
        if writer is not None:
            writer.close()
    return rows


def write_earlier(folder: Path, events: pa.Table) -> None:
    """Write events from before the log, which are only past: columns of the log, missing where not known, in order."""
    (folder / EARLIER).mkdir()
    pq.write_table(events, folder / EARLIER / "events.parquet", compression="zstd", row_group_size=ROW_GROUP)


def earlier(files: Sequence[Path]) -> pq.ParquetFile | None:
    """The events from before the log of a prepared source, if it has any."""
    path = files[0].parent / EARLIER / "events.parquet"
    return pq.ParquetFile(path) if path.exists() else None

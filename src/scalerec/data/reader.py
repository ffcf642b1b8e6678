"""Parquet -> Arrow rows, piece by piece: files may be larger than memory, a broken one is named."""

from __future__ import annotations

import glob
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scalerec.data.source import Prepared, Source
from scalerec.data.split import PARTS, ColumnSplit, NoSplit, Part, Split, TimeSplit, columns_of
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.features.numeric import numbers, zero_or_one
from scalerec.schema import Schema

PIECE_ROWS = 16_384
DICTIONARY = 1 << 20  # bytes at which writers of Parquet give it up; beside it a value takes at most 3


def find_parquet(path: str | Path) -> list[Path]:
    """The Parquet files of a file, a folder or a glob, in the order of their names; InputError when there are none."""
    path = Path(path)
    if path.is_dir():
        names = {p: p.relative_to(path).parts for p in path.rglob("*.parquet")}
        found = sorted(p for p, parts in names.items() if not any(part.startswith((".", "_")) for part in parts))
    elif path.exists():
        found = [path]
    else:
        found = sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not found:
        raise InputError(f"{path}: no Parquet file there")
    return found


@dataclass(frozen=True)
class RowGroup:
    """Where a row group lies, and the number of its first row in all the files."""

    file: Path
    number: int
    first: int
    rows: int
    file_first: int  # number of the file's first row; 0 where a column numbers the rows
    part: str = ""  # the one part of all its rows, where the file's statistics say so


class Piece(NamedTuple):
    """Some rows of one part."""

    number: int  # counted along the order of reading
    rows: pa.RecordBatch
    index: np.ndarray  # [n] their numbers in all the files, or those that the source's row column gives
    group: RowGroup


class ParquetRows:
    """The rows of a source, part by part; `counts` says what was left out."""

    def __init__(self, files: Sequence[Path], split: Split, *, skip_bad_shards: bool = False, row_column: str = ""):
        self.split = split
        self.row_column = row_column
        self.skip_bad_shards = skip_bad_shards
        self.counts: Counter[str] = Counter()
        self.row_groups: list[RowGroup] = []
        self.columns: list[str] = []
        first = 0
        for file in files:
            try:
                metadata = pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                self._bad(file, error)
                continue
            self.columns = self.columns or metadata.schema.to_arrow_schema().names
            file_first = first
            for number, part in enumerate(self._parts_of_groups(metadata)):
                rows = metadata.row_group(number).num_rows
                self.row_groups.append(RowGroup(file, number, first, rows, 0 if row_column else file_first, part))
                first += rows
        self.num_rows = first
        if not first:
            raise InputError(f"{', '.join(map(str, files))}: no rows to read")

    @staticmethod
    def of(source: Source, prepared: Prepared, *, skip_bad_shards: bool = False) -> ParquetRows:
        split, row_column = source.parts(), source.row_column
        return ParquetRows(prepared.files, split, skip_bad_shards=skip_bad_shards, row_column=row_column)

    def pieces(
        self, part: Part, columns: Sequence[str] | None = None, order: Sequence[int] | None = None, start: int = 0,
        *, dictionaries: bool = False,
    ) -> Generator[Piece, None, None]:  # fmt: skip
        """Rows of a part, row groups in `order`, pieces counted from 0, from `start` on.

        With `dictionaries` text in `columns` comes as Parquet keeps it, each different value once.

        Raises:
            InputError: a file cannot be read (unless bad shards are skipped), a column is not there.
        """
        wanted = list(columns) if columns is not None else None
        piece = 0
        for index in order if order is not None else range(len(self.row_groups)):
            group = self.row_groups[index]
            last = piece + -(-group.rows // PIECE_ROWS)
            if last <= start or group.part not in ("", part):
                piece = last
                continue
            for number, rows in enumerate(self._read(group, wanted, dictionaries)):
                if piece + number >= start:
                    first = group.first + number * PIECE_ROWS
                    yield Piece(piece + number, *self._part(rows, part, first, group), group)
            piece = last

    def batches(self, part: Part, columns: Sequence[str] | None = None) -> Iterator[pa.RecordBatch]:
        for piece in self.pieces(part, columns):
            yield piece.rows

    def _read(self, group: RowGroup, wanted: list[str] | None, dictionaries: bool) -> Iterator[pa.RecordBatch]:
        try:
            metadata = pq.read_metadata(group.file)
            coded = _coded(metadata, group.number, wanted) if dictionaries and wanted is not None else None
            with pq.ParquetFile(group.file, metadata=metadata, read_dictionary=coded) as file:
                names = file.schema_arrow.names
                if wanted is not None:
                    needed = [*wanted, *columns_of(self.split), *([self.row_column] if self.row_column else [])]
                    absent = [column for column in needed if column not in names]
                    if absent:
                        raise InputError(f"{group.file}: no column {absent[0]!r}; it has {', '.join(names[:30])}")
                    wanted = names = [column for column in names if column in needed]
                if len(set(names)) < len(names):
                    doubled = next(name for name in names if names.count(name) > 1)
                    raise InputError(f"{group.file}: two columns are named {doubled!r}: rename one of them")
                yield from file.iter_batches(PIECE_ROWS, row_groups=[group.number], columns=wanted)
        except (pa.ArrowException, OSError) as error:
            self._bad(group.file, error)

    def _parts_of_groups(self, metadata: pq.FileMetaData) -> list[str]:
        """Of each row group the one part of all its rows, "" where that is not known without reading them."""
        groups = range(metadata.num_row_groups)
        if not isinstance(self.split, (ColumnSplit, TimeSplit)):
            return [""] * len(groups)
        name, paths, schema = self.split.column, _paths(metadata), metadata.schema.to_arrow_schema()
        if paths.count(name) != 1 or name not in schema.names:
            return [""] * len(groups)
        place, kind = paths.index(name), schema.field(name).type
        return [self._one_part(metadata.row_group(group).column(place).statistics, kind) for group in groups]

    def _one_part(self, found: pq.Statistics | None, kind: pa.DataType) -> str:
        if found is None or not found.has_min_max or found.null_count != 0:
            return ""
        try:
            ends = pa.record_batch([pa.array([found.min, found.max], kind)], columns_of(self.split))
            first, last = self.split.part_of(ends, 0)
            # Between two times of one part lie only times of that part, but between two texts any other.
            known = first == last and (isinstance(self.split, TimeSplit) or found.min == found.max)
        except (InputError, ValueError, TypeError, ArithmeticError, NotImplementedError):
            return ""  # times that Python has no numbers for; a column not to split by, which reading will say
        return PARTS[first] if known else ""

    def _part(self, rows: pa.RecordBatch, part: Part, first: int, group: RowGroup) -> tuple[pa.RecordBatch, np.ndarray]:
        numbers = np.arange(first, first + rows.num_rows)
        if self.row_column:
            numbers = np.array(rows.column(self.row_column), np.int64)
        if isinstance(self.split, NoSplit):
            return rows, numbers
        try:
            mine = self.split.part_of(rows, first) == PARTS.index(part)
        except InputError as error:
            raise InputError(f"{group.file}: {error}") from None
        return (rows, numbers) if mine.all() else (rows.filter(pa.array(mine)), numbers[mine])

    def _bad(self, file: Path, error: Exception) -> None:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        if not self.skip_bad_shards:
            raise InputError(
                f"{file}: not a readable Parquet file ({line}); repair it or take it out, as --skip-bad-shards of "
                "`train` and `predict` does"
            )
        self.counts[f"{file}: unreadable, left out"] = 1


def _paths(metadata: pq.FileMetaData) -> list[str]:
    """Of all columns of numbers or text that the file holds, within lists and records too."""
    return [metadata.schema.column(i).path for i in range(metadata.num_columns)]


def _coded(metadata: pq.FileMetaData, group: int, columns: Sequence[str]) -> list[str]:
    """The paths of what is text in these columns, in lists too, and all of it coded by a dictionary in this row group.

    Where there are too many different values Parquet goes on without one, and each piece would carry all before it.
    """
    found = []
    for i, path in enumerate(_paths(metadata)):
        if metadata.schema.column(i).logical_type.type == "STRING" and path.split(".")[0] in columns:
            chunk = metadata.row_group(group).column(i)
            if chunk.has_dictionary_page and chunk.total_uncompressed_size <= DICTIONARY + 3 * chunk.num_values:
                found.append(path)
    return found


@dataclass(frozen=True)
class PartCounts:
    rows: int
    counted: dict[str, int]  # by task, the rows that count in it
    positives: dict[str, int]  # by task, of these


def check_columns(rows: ParquetRows, schema: Schema) -> None:
    """InputError unless the first file has all columns that the schema names; of the others, reading says it."""
    named = [*schema.input_columns(), *schema.label_columns(), schema.item, schema.time]
    absent = next((column for column in named if column and column not in rows.columns), None)
    if absent is not None:
        raise InputError(
            f"{rows.row_groups[0].file}: no column {absent!r}, which the schema names; "
            f"it has {', '.join(rows.columns[:30])}"
        )


def check_encoding(rows: ParquetRows, schema: Schema) -> None:
    """InputError unless the first training rows can be encoded as the schema says."""
    columns = list(dict.fromkeys([*schema.input_columns(), *schema.label_columns()]))
    piece = next((piece for piece in rows.pieces("train", columns) if piece.rows.num_rows), None)
    if piece is None:
        return
    where = str(piece.group.file)
    try:
        encoder = Encoder.fit(schema, [piece.rows])
    except InputError as error:
        raise InputError(f"{where}: {error}") from None
    encoder.encode(piece.rows, index=piece.index, where=where, first=piece.group.file_first)


def count_parts(rows: ParquetRows, schema: Schema) -> dict[Part, PartCounts]:
    """Rows of each part, and by task those that count and the positive ones, from the label columns alone.

    Raises:
        InputError: a column that the schema names is not there, a label is not 0, 1 or null.
    """
    check_columns(rows, schema)
    found: dict[Part, PartCounts] = {}
    for part in PARTS:
        total, counted = 0, {task.name: 0 for task in schema.tasks}
        positives = dict(counted)
        for piece in rows.pieces(part, schema.label_columns()):
            batch = piece.rows
            total += batch.num_rows
            for task in schema.tasks:
                values = batch.column(task.column)
                if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)
                        or pa.types.is_boolean(values.type) or pa.types.is_null(values.type)):  # fmt: skip
                    raise InputError(f"label {task.column!r} is {values.type}, must be 0 or 1")
                try:
                    label = zero_or_one(values, task.column, piece.index - piece.group.file_first)
                except InputError as error:
                    raise InputError(f"{piece.group.file}, {error}") from None
                counts = ~np.isnan(label)
                for column in filter(None, (task.mask, task.weight)):
                    counts &= np.nan_to_num(numbers(batch.column(column), column)[0]) != 0
                counted[task.name] += int(counts.sum())
                positives[task.name] += int(label[counts].sum())
        found[part] = PartCounts(total, counted, positives)
    return found


def check_parts(parts: dict[Part, PartCounts], schema: Schema, ranks: bool = True) -> None:
    """InputError when a part is empty or, for a model that ranks, when training or validation holds one class only.

    Training rows whose past events are targets too (`new_events`) do not say by themselves what is learned.
    """
    told = {"validation"} if schema.new_events else {"train", "validation"}
    for part, counts in parts.items():
        if not counts.rows:
            raise InputError(f"the {part} part holds no rows: move the cuts of --data.split")
        for task, positives in counts.positives.items() if ranks else ():
            counted = counts.counted[task]
            if part in told and positives in (0, counted):
                raise InputError(
                    f"task {task!r}: all {counted} {part} rows that count are of one class, so nothing can be "
                    "measured: move the cuts of --data.split"
                )

"""The user's own Parquet files, read where they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scalerec import config
from scalerec.data.parts import write_parts
from scalerec.data.reader import ParquetRows, find_parquet
from scalerec.data.source import Prepared, Source, Split
from scalerec.data.split import NoSplit, RandomSplit, TimeSplit, times_of
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.schema import Schema

STEPS = 65_536  # between the first and the last time of a log, at which it may be cut
SHARE = 0.1  # of the rows, for validation and for the test


class Parquet(Source):
    """A file, a folder or a glob, and a JSON file that says what the columns mean.

    Where the schema has a sequence whose list columns are not in the files, the log is replayed once to make them.
    """

    version: ClassVar[int] = 2
    kind: Literal["parquet"] = "parquet"
    path: str = ""
    schema_file: str = ""  # JSON of a Schema, as `scalerec schema infer` writes it
    split: Split | None = None  # None: the latest tenth tests, the one before validates; at random without a time

    def schema(self) -> Schema:
        if not self.schema_file:
            raise InputError(
                "--data.schema_file is missing: `scalerec schema infer FILE --out schema.json` writes a first one"
            )
        return config.read(Schema, self.schema_file)

    def files(self) -> list[Path]:
        """The files in the order of their names; InputError when there are none."""
        if not self.path:
            raise InputError("--data.path is missing: name your Parquet file, folder or glob")
        return find_parquet(self.path)

    def prepare(self, progress: Callable[[str], None] = lambda message: None) -> Prepared:
        """The files themselves; or, with histories to be made, copies that have them."""
        files, schema = self.files(), self.schema()
        lists = [name for sequence in schema.sequences for name in sequence.list_columns()]
        try:
            there = set(pq.read_schema(files[0]).names)
        except (pa.ArrowException, OSError):
            there = set(lists)  # the reader names the broken file
        absent = [name for name in lists if name not in there]
        if absent and len(absent) < len(lists):
            has = next(name for name in lists if name in there)
            raise InputError(
                f"{files[0]}: has the list column {has!r} and not {absent[0]!r}: bring the lists of all sequences, or "
                "none of them to have them made"
            )
        if absent:
            prepared = super().prepare(progress)
        else:
            split = self.split or self.usual_split(files)
            prepared = Prepared(files, split, {"path": self.path, "files": len(files)})
        split = prepared.split.model_dump_json()
        if self.split is None:
            progress(f"no --data.split: taking '{split}'")
        return prepared._replace(notes=prepared.notes | {"split": split})

    def usual_split(self, files: list[Path]) -> Split:
        """Cut in time by the schema's `time` column, in one pass over it; at random where the schema names none.

        Raises:
            InputError: fewer than three different times, or a row without one.
        """
        column = self.schema().time
        if column is None:
            return RandomSplit(validation=SHARE, test=SHARE)
        rows = ParquetRows(files, NoSplit(), skip_bad_shards=True)  # who reads them says which are bad
        ends = [(times.min(), times.max()) for times in _times(rows, column)]
        edges = np.linspace(min(first for first, _ in ends), max(last for _, last in ends), STEPS)
        counts, firsts = np.zeros(STEPS, np.int64), np.full(STEPS, np.inf)
        for times in _times(rows, column):
            step = np.searchsorted(edges, times, side="right") - 1
            counts += np.bincount(step, minlength=STEPS)
            np.minimum.at(firsts, step, times)
        steps = np.flatnonzero(counts)[::-1]  # the latest first
        if len(steps) < 3:
            raise InputError(
                f"column {column!r}: fewer than three different times, so the log cannot be cut into training, "
                "validation and test: choose another --data.split (docs/data.md)"
            )
        later, share = counts[steps].cumsum(), SHARE * rows.num_rows  # rows from the begin of a step on
        test = int(np.abs(later[:-2] - share).argmin())
        validation = test + 1 + int(np.abs(later[test + 1 : -1] - later[test] - share).argmin())
        cuts = firsts[steps]
        return TimeSplit(column=column, validation=float(cuts[validation]), test=float(cuts[test]))

    def identity(self) -> dict[str, Any]:
        stamps = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self.files()]
        return {**super().identity(), "files": stamps, "schema": self.schema().model_dump(mode="json")}

    def build(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        progress(f"replaying {self.path} for the histories of its users (the log is held in memory)")
        tables = []
        for file in self.files():
            try:
                tables.append(pq.read_table(file))
            except (pa.ArrowException, OSError) as error:
                raise InputError(f"{file}: not a readable Parquet file ({error}); repair it or take it out") from None
        try:
            log = pa.concat_tables(tables, promote_options="permissive")
        except pa.ArrowException as error:
            raise InputError(f"{self.path}: the files do not go together ({error})") from None
        write_parts(folder, history.replay_pieces(self.schema(), log))
        return {"path": self.path, "rows": log.num_rows, "histories": [s.name for s in self.schema().sequences]}


def _times(rows: ParquetRows, column: str) -> Iterator[np.ndarray]:
    for batch in rows.batches("train", [column]):
        if batch.num_rows:
            yield times_of(batch, column)

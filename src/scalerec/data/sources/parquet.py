"""The user's own Parquet files, read where they are."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from scalerec import config
from scalerec.data.histories import stamps, with_histories
from scalerec.data.reader import ParquetRows, find_parquet
from scalerec.data.source import Prepared, Source, Split
from scalerec.data.split import NoSplit, RandomSplit, TimeSplit, times_of
from scalerec.errors import InputError
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
        files = self.files()
        prepared = with_histories(files, self.schema(), progress)
        return prepared._replace(notes={"path": self.path, "files": len(files)} | prepared.notes)

    def settled(self, progress: Callable[[str], None] = lambda message: None, option: str = "--data") -> Parquet:
        """With a split by the schema's `time` where none is named, in one pass over it, and with absolute paths.

        A schema without a time is split at random.

        Raises:
            InputError: fewer than three different times, or a row without one.
        """
        split = self.split
        if split is None:
            split = self._usual_split()
            progress(f"no {option}.split: taking '{split.model_dump_json()}'")
        paths = {name: os.path.abspath(value) for name in ("path", "schema_file") if (value := getattr(self, name))}
        return self.model_copy(update={"split": split, **paths})

    def _usual_split(self) -> Split:
        column = self.schema().time
        if column is None:
            return RandomSplit(validation=SHARE, test=SHARE)
        rows = ParquetRows(self.files(), NoSplit(), skip_bad_shards=True)  # who reads them says which are bad
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
        return {**super().identity(), "files": stamps(self.files()), "schema": self.schema().model_dump(mode="json")}


def _times(rows: ParquetRows, column: str) -> Iterator[np.ndarray]:
    for piece in rows.pieces("train", [column]):
        if piece.rows.num_rows:
            try:
                yield times_of(piece.rows, column)
            except InputError as error:
                raise InputError(f"{piece.group.file}: {error}") from None

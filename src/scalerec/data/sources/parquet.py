"""The user's own Parquet files, read where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from scalerec import config
from scalerec.data.parts import write_parts
from scalerec.data.reader import find_parquet
from scalerec.data.source import Prepared, Source, Split
from scalerec.data.split import RandomSplit
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.schema import Schema


class Parquet(Source):
    """A file, a folder or a glob, and a JSON file that says what the columns mean.

    Where the schema has a sequence whose list columns are not in the files, the log is replayed once to make them.
    """

    version: ClassVar[int] = 2
    kind: Literal["parquet"] = "parquet"
    path: str = ""
    schema_file: str = ""  # JSON of a Schema, as `scalerec schema infer` writes it
    split: Split = RandomSplit()

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
        lists = {name for sequence in schema.sequences for name in sequence.list_columns()}
        try:
            absent = lists - set(pq.read_schema(files[0]).names)
        except (pa.ArrowException, OSError):
            absent = set()  # the reader names the broken file
        if absent:
            return super().prepare(progress)
        return Prepared(files, {"path": self.path, "files": len(files)})

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
        log = pa.concat_tables(tables)
        write_parts(folder, history.replay_pieces(self.schema(), log))
        return {"path": self.path, "rows": log.num_rows, "histories": [s.name for s in self.schema().sequences]}

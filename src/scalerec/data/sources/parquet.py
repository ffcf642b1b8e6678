"""The user's own Parquet files, read where they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from scalerec import config
from scalerec.data.reader import find_parquet
from scalerec.data.source import Prepared, Source
from scalerec.data.split import RandomSplit, Split
from scalerec.errors import InputError
from scalerec.schema import Schema


class Parquet(Source):
    """A file, a folder or a glob, and a JSON file that says what the columns mean."""

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

    def build(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        return {}

    def prepare(self, progress: Callable[[str], None] = lambda message: None) -> Prepared:
        """The files themselves, in the order of their names; InputError when there are none."""
        if not self.path:
            raise InputError("--data.path is missing: name your Parquet file, folder or glob")
        files = find_parquet(self.path)
        empty = next((file for file in files if not file.is_file()), None)
        if empty is not None:
            raise InputError(f"{empty}: is not a file; give --data.path a Parquet file, a folder or a glob")
        return Prepared(files, {"path": self.path, "files": len(files)})

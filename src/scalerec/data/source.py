"""A source of rows: its schema, its split, and how its Parquet comes to be on this machine."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from scalerec.config import Component
from scalerec.data.split import Split
from scalerec.schema import Schema


class Prepared(NamedTuple):
    """Parquet files that are ready to be read, in this order, their parts, and what was noted while they were made."""

    files: list[Path]
    split: Split
    notes: dict[str, Any]


class Source(Component):
    """One data set = one file of `scalerec.data.sources`: a subclass gives `schema` and `build`."""

    version: ClassVar[int] = 1  # raised when `build` writes other files than before
    row_column: ClassVar[str] = ""  # column with the rows' numbers, where these are not their places in the files
    split: Split | None

    @abstractmethod
    def schema(self) -> Schema:
        """What the columns of the prepared files mean."""

    @abstractmethod
    def build(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        """Write Parquet files into the empty `folder`, to be read in the order of their names; returns notes."""

    def best_scores(self) -> dict[str, str]:
        """Task -> column with its true probability, for data that was made by a teacher."""
        return {}

    def paired_with(self) -> Any:
        """What decides which rows are evaluated: runs that agree in it are compared row by row."""
        return self

    def identity(self) -> dict[str, Any]:
        """What decides the prepared files; by default all fields but the split."""
        return {"version": self.version, **self.model_dump(mode="json", exclude={"split"})}

    def prepare(self, progress: Callable[[str], None] = lambda message: None) -> Prepared:
        """Build the files once, atomically, in the cache folder; later calls find them there."""
        identity = json.dumps(self.identity(), sort_keys=True)
        folder = cache_root() / self.kind / hashlib.sha256(identity.encode()).hexdigest()[:12]
        if not (folder / "manifest.json").exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
            try:
                notes = self.build(building, progress)
                manifest = {"source": json.loads(identity), "notes": notes}
                (building / "manifest.json").write_text(json.dumps(manifest, indent=2))
                if not (folder / "manifest.json").exists():  # or another process was quicker, and may read it by now
                    shutil.rmtree(folder, ignore_errors=True)
                    building.rename(folder)
            finally:
                shutil.rmtree(building, ignore_errors=True)
        manifest = json.loads((folder / "manifest.json").read_text())
        files = sorted(folder.glob("*.parquet"))
        return Prepared(files, self.split or self.usual_split(files), manifest["notes"])

    def usual_split(self, files: list[Path]) -> Split:
        """What parts the prepared files where no `split` is named."""
        raise NotImplementedError(f"{self.kind} names its split")


def cache_root() -> Path:
    """Where downloads and prepared files are kept: $SCALEREC_CACHE, else ~/.cache/scalerec."""
    return Path(os.environ.get("SCALEREC_CACHE") or Path.home() / ".cache" / "scalerec")


def data_root() -> Path | None:
    """A folder with data sets that are already on this machine: $SCALEREC_DATA."""
    root = os.environ.get("SCALEREC_DATA")
    return Path(root) if root else None

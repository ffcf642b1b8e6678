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
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from scalerec.config import Component
from scalerec.data.split import Split
from scalerec.schema import Schema

if TYPE_CHECKING:
    from typing_extensions import Self


class Prepared(NamedTuple):
    """Parquet files that are ready to be read, in this order, and what was noted while they were made."""

    files: list[Path]
    notes: dict[str, Any]


class Source(Component):
    """One data set = one file of `scalerec.data.sources`: a subclass gives `schema` and `build`."""

    version: ClassVar[int] = 1  # raised when `build` writes other files than before
    row_column: ClassVar[str] = ""  # column with the rows' numbers, where these are not their places in the files
    split: Split | None  # None: `settled` chooses one

    @abstractmethod
    def schema(self) -> Schema:
        """What the columns of the prepared files mean."""

    def build(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        """Write Parquet files into the empty `folder`, to be read in the order of their names; returns notes."""
        raise NotImplementedError(f"{self.kind} has files to begin with")

    def best_scores(self) -> dict[str, str]:
        """Task -> column with its true probability, for data that was made by a teacher."""
        return {}

    def paired_with(self) -> Any:
        """What decides which rows are evaluated: runs that agree in it are compared row by row."""
        return self

    def settled(self, progress: Callable[[str], None] = lambda message: None, option: str = "--data") -> Self:
        """Itself, with what it left to its files written down: a run that keeps this means the same rows for good."""
        return self

    def parts(self) -> Split:
        """The split that is named, else the one that `settled` chooses."""
        split = self.settled().split
        assert split is not None
        return split

    def identity(self) -> dict[str, Any]:
        """What decides the prepared files; by default all fields but the split."""
        return {"version": self.version, **self.model_dump(mode="json", exclude={"split"})}

    def prepare(self, progress: Callable[[str], None] = lambda message: None) -> Prepared:
        """Build the files once; later calls find them in the cache."""
        return kept(self.kind, self.identity(), lambda folder: self.build(folder, progress))


def kept(kind: str, identity: dict[str, Any], build: Callable[[Path], dict[str, Any]]) -> Prepared:
    """The files that `build` writes into an empty folder, made once, atomically, in the cache, and its notes."""
    key = json.dumps(identity, sort_keys=True)
    folder = cache_root() / kind / hashlib.sha256(key.encode()).hexdigest()[:12]
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=".building-", dir=folder.parent))
        try:
            notes = build(building)
            (building / "manifest.json").write_text(json.dumps({"source": json.loads(key), "notes": notes}, indent=2))
            if not (folder / "manifest.json").exists():  # or another process was quicker, and may read it by now
                shutil.rmtree(folder, ignore_errors=True)
                building.rename(folder)
        finally:
            shutil.rmtree(building, ignore_errors=True)
    manifest = json.loads((folder / "manifest.json").read_text())
    return Prepared(sorted(folder.glob("*.parquet")), manifest["notes"])


def cache_root() -> Path:
    """Where downloads and prepared files are kept: $SCALEREC_CACHE, else ~/.cache/scalerec."""
    return Path(os.environ.get("SCALEREC_CACHE") or Path.home() / ".cache" / "scalerec")


def data_root() -> Path | None:
    """A folder with data sets that are already on this machine: $SCALEREC_DATA."""
    root = os.environ.get("SCALEREC_DATA")
    return Path(root) if root else None

"""Rows of what is known of users (or items), from Parquet, found by their id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from scalerec.errors import InputError
from scalerec.features.hashing import hash_column
from scalerec.features.lists import whole
from scalerec.serving.events import plain


class UserTable:
    """One row an id; of an id that is there twice the last row counts, an unknown one has an empty row."""

    def __init__(self, rows: pa.Table, column: str):
        """`column` holds the ids; all other columns are the rows' values."""
        if column not in rows.column_names:
            raise InputError(f"no column {column!r} with the ids: the table has {', '.join(rows.column_names[:20])}")
        self.column = column
        self._rows = rows.combine_chunks()
        ids = whole(self._rows.column(column))
        self._text = _is_text(ids.type)
        codes = hash_column(ids, column)
        self._order = np.argsort(codes, kind="stable")  # by code, then by row
        self._codes = codes[self._order]

    @staticmethod
    def load(path: str | Path, column: str) -> UserTable:
        """Read a file, mapped into memory as far as its encoding allows; InputError where it is not one."""
        try:
            return UserTable(pq.read_table(path, memory_map=True), column)
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path}: not a readable Parquet file ({str(error).splitlines()[0]})") from None
        except InputError as error:
            raise InputError(f"{path}: {error}") from None

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def columns(self) -> list[str]:
        """The columns of a row."""
        return [name for name in self._rows.column_names if name != self.column]

    def row(self, user: Any) -> dict[str, Any]:
        """What is known of an id, by column of the log, null where it is missing; {} where the id is unknown."""
        value = plain(user, "user")
        if value is None or isinstance(value, str) != self._text:
            return {}
        code = hash_column(pa.array([value]))[0]
        last = int(np.searchsorted(self._codes, code, side="right")) - 1
        if last < 0 or self._codes[last] != code:
            return {}
        row = int(self._order[last])
        if plain(self._rows.column(self.column)[row], self.column) != value:
            return {}  # another id of the same code
        return {name: self._rows.column(name)[row].as_py() for name in self.columns}

    def users(self, prefix: str = "", limit: int = 100) -> list[Any]:
        """Ids that begin with the text, in the order of the rows."""
        ids = whole(self._rows.column(self.column))
        if prefix:
            ids = ids.filter(pc.starts_with(ids.cast(pa.string()), plain(prefix, "prefix")))
        return [plain(value, self.column) for value in ids.drop_null()[:limit]]


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)

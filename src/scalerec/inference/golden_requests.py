"""Synthetic requests that reach every feature: what a bundle is checked with, on any machine, without anybody's data.

No row of the log is used. Values are drawn one by one, each column on its own, from what the bundle holds in any case:
the dictionaries, the borders of the buckets, and where there is only a hash, texts and numbers that are made up.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from scalerec.features.encoder import Encoder
from scalerec.schema import Categorical, Cross, MultiCategorical, Numeric, Schema, Sequence, reads

USERS, CANDIDATES = 8, 8
USUAL_LENGTH = 64  # of histories; one has as many events as the model may meet
UNKNOWN_USER, WITHOUT_VALUES, WITHOUT_HISTORY = 0, 1, 2  # users that are special
UNKNOWN_TEXT, UNKNOWN_NUMBER = "golden: never seen", -(2**53) + 1


def golden_requests(encoder: Encoder, types: dict[str, str], seed: int = 0) -> pa.RecordBatch:
    """USERS x CANDIDATES rows with every input column of the schema, the user side equal for the rows of one user.

    `types` says what the log's columns are; only whether they are text, numbers or moments counts. One user is unknown
    and so is all that is known of it, one has no value at all, one has no history; the first candidate is unknown, the
    second has no value, and among the rest single values are missing.
    """
    return _Maker(encoder, types, np.random.default_rng(seed)).rows()


class _Maker:
    def __init__(self, encoder: Encoder, types: dict[str, str], random: np.random.Generator):
        self.encoder, self.schema, self.types, self.random = encoder, encoder.schema, types, random
        self.columns: dict[str, list[Any]] = {}

    def rows(self) -> pa.RecordBatch:
        schema = self.schema
        now = 1.5e9 + 1e6 * np.sort(self.random.random(USERS))  # seconds; any moment will do
        for group in schema.groups:
            for feature in group.features:
                if isinstance(feature, Sequence):
                    self._history(feature, now)
                    continue
                for name in reads(feature):
                    if name not in self.columns and name not in (schema.user, schema.time):
                        self.columns[name] = self._column(feature, name, group.side)
        self.columns[schema.user] = self._users()
        if schema.time in schema.input_columns():
            self.columns[schema.time] = _each([self._moment(t, schema.time) for t in now])
        made = {name: self._array(name) for name in schema.input_columns()}
        return pa.record_batch(made)

    # -- values

    def _pool(self, column: str, feature: Any) -> list[Any]:
        """Values that a column may take; the last one is unknown."""
        vocabulary = self.encoder.vocabularies.get(feature.name)
        if isinstance(feature, Numeric):
            fit = self.encoder.numerics[feature.name]
            edges = [*fit.edges] or [fit.mean]
            return [*edges, edges[0] - 1, edges[-1] * 1.5 + 1, 0.0]
        if vocabulary is not None and len(vocabulary.values):
            chosen = self.random.integers(0, len(vocabulary.values), 64)
            values = vocabulary.values.take(pa.array(np.unique(chosen))).to_pylist()
            return [*values, UNKNOWN_NUMBER if vocabulary.integer else UNKNOWN_TEXT]
        if self._numeric(column):
            return [*range(1, 40), UNKNOWN_NUMBER]
        return [*(f"golden {i}" for i in range(40)), UNKNOWN_TEXT]

    def _numeric(self, column: str) -> bool:
        kind = self.types.get(column, "string").removeprefix("large_").removeprefix("list<").split(": ")[-1]
        return kind.startswith(("int", "uint", "float", "double", "half", "bool", "decimal"))

    def _column(self, feature: Any, name: str, side: str) -> list[Any]:
        if isinstance(feature, Cross):  # a feature that reads the column alone knows its values
            plain = (f for f in self.schema.features if isinstance(f, (Categorical, Numeric)))
            feature = next((f for f in plain if (f.column or f.name) == name), feature)
        pool = self._pool(name, feature)
        draw = self._several if isinstance(feature, MultiCategorical) else self._one
        values = [draw(pool[:-1], feature) for _ in range(USERS if side == "user" else USERS * CANDIDATES)]
        if isinstance(feature, MultiCategorical):  # one that will be cut
            values[-1] = self._listed([self._one(pool, feature) for _ in range(feature.max_len + 1)], feature)
        if side == "user":
            values[UNKNOWN_USER], values[WITHOUT_VALUES] = self._unknown(pool, feature), None
            return _each(values)
        for user in range(USERS):
            values[user * CANDIDATES] = self._unknown(pool, feature)
            values[user * CANDIDATES + 1] = None
            if self.random.random() < 0.2:
                values[user * CANDIDATES + int(self.random.integers(2, CANDIDATES - 1))] = None
        return values

    def _one(self, pool: list[Any], feature: Any) -> Any:
        return pool[int(self.random.integers(len(pool)))]

    def _several(self, pool: list[Any], feature: MultiCategorical) -> Any:
        count = int(self.random.integers(0, min(feature.max_len, 4) + 2))
        return self._listed([self._one(pool, feature) for _ in range(count)], feature)

    def _unknown(self, pool: list[Any], feature: Any) -> Any:
        return self._listed([pool[-1]], feature) if isinstance(feature, MultiCategorical) else pool[-1]

    @staticmethod
    def _listed(values: list[Any], feature: MultiCategorical) -> Any:
        return values if feature.separator is None else feature.separator.join(map(str, values))

    def _users(self) -> list[Any]:
        """Ids of nobody, or, where the user is a feature, of its dictionary."""
        feature = next((f for f in self.schema.features
                        if isinstance(f, Categorical) and (f.column or f.name) == self.schema.user), None)  # fmt: skip
        if feature is None:
            numeric = self._numeric(self.schema.user)
            return _each([-i - 1 if numeric else f"golden {i}" for i in range(USERS)])
        pool = self._pool(self.schema.user, feature)
        values = [pool[i % max(len(pool) - 1, 1)] for i in range(USERS)]
        values[UNKNOWN_USER] = pool[-1]
        return _each(values)

    # -- histories

    def _history(self, sequence: Sequence, now: np.ndarray) -> None:
        lengths = self.random.integers(1, min(sequence.max_len, USUAL_LENGTH) + 1, USERS)
        lengths[WITHOUT_HISTORY], lengths[-1] = 0, sequence.max_len
        for field in sequence.fields:
            pool = self._pool(sequence.column(field), self.schema.feature(field.of))
            values = [[self._one(pool, None) for _ in range(n)] for n in lengths]
            self.columns[sequence.column(field)] = _each(values)
        if sequence.time_column is not None:
            column = sequence.time_column
            ago = [np.sort(self.random.exponential(2e5, n))[::-1] for n in lengths]  # mostly within days
            times = [[self._moment(t - a, column) for a in each] for t, each in zip(now, ago)]
            self.columns[column] = _each(times)
        for column in sequence.action_columns:
            actions = [[(0, 1, None)[int(i)] for i in self.random.integers(0, 3, n)] for n in lengths]
            self.columns[column] = _each(actions)

    def _moment(self, seconds: float, column: str) -> Any:
        """In whole units, in the log's unit; for a column of moments microseconds."""
        if self._numeric(column):
            return int(seconds / self.schema.time_unit)
        return int(seconds) * 10**6

    # -- columns

    def _array(self, name: str) -> pa.Array:
        kind = self.types.get(name, "")
        times = {self.schema.time, *(sequence.time_column for sequence in self.schema.sequences)}
        if name in times and ("timestamp" in kind or "date" in kind):  # a category's moments are texts
            moment = pa.timestamp("us")
            return pa.array(self.columns[name], pa.list_(moment) if "list" in kind else moment)
        return pa.array(self.columns[name])


def _each(values: list[Any]) -> list[Any]:
    """One value a user -> one a row."""
    return [value for value in values for _ in range(CANDIDATES)]


def to_json(rows: pa.RecordBatch) -> dict[str, Any]:
    """Rows of `golden_requests` as JSON, moments in microseconds; what is equal for all rows of a user stands once."""
    found = {}
    for name, column in zip(rows.schema.names, rows.columns):
        moments = "timestamp" in str(column.type)
        values = (column.cast(_as_numbers(column.type)) if moments else column).to_pylist()
        each = CANDIDATES if values == _each(values[::CANDIDATES]) else 1
        found[name] = {"type": str(column.type), "each": each, "values": values[::each]}
    return found


def from_json(columns: dict[str, Any]) -> pa.RecordBatch:
    """The reverse of `to_json`."""
    found = {}
    for name, column in columns.items():
        values = [value for value in column["values"] for _ in range(column["each"])]
        found[name] = pa.array(values, _type(column["type"]))
    return pa.record_batch(found)


def _as_numbers(kind: pa.DataType) -> pa.DataType:
    return pa.list_(pa.int64()) if pa.types.is_list(kind) else pa.int64()


def _type(text: str) -> pa.DataType:
    if text.startswith("list<"):
        return pa.list_(_type(text.removeprefix("list<").removesuffix(">").split(": ")[-1]))
    return pa.type_for_alias(text)


def value_of(rows: pa.RecordBatch, schema: Schema, feature: str, row: int) -> str:
    """What a feature reads in one row, for a message."""
    columns = reads(schema.feature(feature))
    values = ", ".join(f"{name}={rows.column(name)[row].as_py()!r}" for name in columns)
    return values if len(values) <= 120 else values[:117] + "..."

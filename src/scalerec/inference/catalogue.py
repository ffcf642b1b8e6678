"""The items that a service knows: their columns, and their features encoded once.

V items   B candidates   n requests
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from scalerec.batch import Rows
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.schema import MultiCategorical, Numeric, Schema, reads


class Asked(NamedTuple):
    """The candidates of n requests, one request's after the other's."""

    candidates: Sequence[Any]  # [B] ids
    request: np.ndarray  # [B] int64, whose candidate it is
    given: Sequence[Mapping[str, Any]]  # [n] what each request says of all its candidates, by column
    own: Sequence[Mapping[str, Any]] | None = None  # [B] what it says of one of them


class Catalogue:
    """Item rows by id; a feature whose columns all belong to the item is encoded when the service starts."""

    def __init__(self, encoder: Encoder, items: pa.Table):
        schema = encoder.schema
        if schema.item is None or schema.item not in items.column_names:
            raise InputError(f"items: no column {schema.item!r}, which says which item a row is")
        self.schema, self.key, self.table = schema, schema.item, items.combine_chunks()
        self.ids: list[Any] = self.table[self.key].to_pylist()
        self.place = {value: i for i, value in enumerate(self.ids)}
        self.columns = [name for name in self.table.column_names if name in schema.input_columns()]
        self._chunk = {name: self.table[name].combine_chunks() for name in self.table.column_names}
        self.settled = tuple(_features(schema, within=self.columns))
        rows = pa.RecordBatch.from_arrays(list(self._chunk.values()), names=list(self._chunk))
        self.encoded = encoder.encode_side(rows, "item", self.settled, where="items")

    def __len__(self) -> int:
        return len(self.ids)

    def places(self, ids: Sequence[Any]) -> np.ndarray:
        """[B] the row of each id, -1 where nobody knows it."""
        find = self.place.get
        return np.fromiter((find(value, -1) for value in ids), np.int64, len(ids))

    def row(self, item: Any) -> dict[str, Any]:
        """The columns of one item, empty for an unknown one."""
        place = self.place.get(item)
        return {} if place is None else {name: self._chunk[name][place].as_py() for name in self._chunk}

    def encode(self, encoder: Encoder, asked: Asked) -> Rows:
        """The item side of B candidates, equal to encoding their whole rows."""
        places = self.places(asked.candidates)
        overridden = {name for row in asked.own or () for name in row}
        if (places < 0).any() or not overridden.isdisjoint(self.columns):
            return encoder.encode_side(self._rows(_columns_read(self.schema, None), places, asked), "item")
        settled = self.encoded.take(torch.from_numpy(places))
        moving = [name for name in _features(self.schema) if name not in self.settled]
        once = [f for f in moving if set(reads(self.schema.feature(f))).isdisjoint(self.columns) and not overridden]
        each = [name for name in moving if name not in once]
        parts = {frozenset(self.settled): settled}
        if each:
            rows = self._rows(_columns_read(self.schema, each), places, asked)
            parts[frozenset(each)] = encoder.encode_side(rows, "item", each)
        if once:  # the same for all candidates of a request
            names = _columns_read(self.schema, once)
            given = [column_of(name, [columns.get(name) for columns in asked.given]) for name in names]
            rows = encoder.encode_side(pa.RecordBatch.from_arrays(given, names=names), "item", once)
            parts[frozenset(once)] = rows.take(torch.from_numpy(asked.request))
        return _merged(self.schema, parts, len(places))

    def raw(self, names: Collection[str], asked: Asked) -> pa.RecordBatch:
        """Columns of B candidates as a log would hold them."""
        return self._rows(names, self.places(asked.candidates), asked)

    def _rows(self, names: Collection[str], places: np.ndarray, asked: Asked) -> pa.RecordBatch:
        return pa.RecordBatch.from_arrays([self._column(name, places, asked) for name in names], names=list(names))

    def _column(self, name: str, places: np.ndarray, asked: Asked) -> pa.Array:
        """The request's own value for a candidate, else the item's, else the request's for all, else null."""
        if name == self.key:
            known = column_of(name, list(asked.candidates))
        elif name in self.columns:
            known = self._chunk[name].take(pa.array(places, mask=places < 0))
        else:
            values = column_of(name, [columns.get(name) for columns in asked.given])
            known = values.take(pa.array(asked.request))
        if asked.own is None or not any(name in row for row in asked.own):
            return known
        values = [row.get(name, value) for row, value in zip(asked.own, known.to_pylist())]
        return _with_decimals(name, values, known.type) if pa.types.is_decimal(known.type) else column_of(name, values)


def _features(schema: Schema, within: Collection[str] | None = None) -> list[str]:
    """The item-side features, or those that read nothing but the columns `within`."""
    names = [f.name for group in schema.groups if group.side == "item" for f in group.features]
    return names if within is None else [name for name in names if set(within).issuperset(reads(schema.feature(name)))]


def _columns_read(schema: Schema, features: Collection[str] | None) -> list[str]:
    names = _features(schema) if features is None else features
    return list(dict.fromkeys(column for name in names for column in sorted(reads(schema.feature(name)))))


def _merged(schema: Schema, parts: Mapping[frozenset[str], Rows], count: int) -> Rows:
    """Rows of disjoint features side by side, columns in the layout's order."""
    if len(parts) == 1:
        return next(iter(parts.values()))
    kinds: dict[str, list[str]] = {"ids": [], "numbers": []}
    for name in _features(schema):
        feature = schema.feature(name)
        if isinstance(feature, Numeric) and feature.encoding == "linear":
            kinds["numbers"].append(name)
        elif not isinstance(feature, MultiCategorical):
            kinds["ids"].append(name)
    columns: dict[str, list[torch.Tensor]] = {"ids": [], "numbers": []}
    taken: dict[tuple[frozenset[str], str], int] = {}
    for kind, names in kinds.items():
        for name in names:
            features = next(features for features in parts if name in features)
            place = taken.get((features, kind), 0)
            columns[kind].append(getattr(parts[features], kind)[:, place])
            taken[features, kind] = place + 1
    first = next(iter(parts.values()))
    return replace(
        first,
        ids=torch.stack(columns["ids"], 1) if columns["ids"] else first.ids.new_zeros(count, 0),
        numbers=torch.stack(columns["numbers"], 1) if columns["numbers"] else first.numbers.new_zeros(count, 0),
        lists={name: held for part in parts.values() for name, held in part.lists.items()},
    )


def column_of(name: str, values: list[Any]) -> pa.Array:
    """Values of a request as a column; InputError names it where they have no common type."""
    try:
        return pa.array(values)
    except (pa.ArrowException, OverflowError):
        raise InputError(f"column {name!r}: values of one kind are needed, whole numbers within 64 bits") from None


def _with_decimals(name: str, values: list[Any], kind: pa.DataType) -> pa.Array:
    """The log's decimals beside numbers of a request: as the log's, since a category is its text, or all as floats."""
    try:
        return pa.array([Decimal(str(v)) if type(v) in (int, float) else v for v in values], kind)
    except pa.ArrowException:  # more digits than the log's have
        return column_of(name, [float(v) if isinstance(v, Decimal) else v for v in values])

"""Raw rows -> Batch: fitted once on the training rows, the same code in training and in serving."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from scalerec import config
from scalerec.batch import FIRST_ID, MISSING, UNKNOWN, Batch, Jagged, Rows
from scalerec.errors import InputError
from scalerec.features.hashing import hash_column, mix
from scalerec.features.layout import FeatureLayout, GroupLayout, Layout, Table
from scalerec.features.lists import last, lists
from scalerec.features.numeric import (
    NumericFit,
    NumericStatistics,
    bucket,
    numbers,
    standardise,
    unix_seconds,
    zero_or_one,
)
from scalerec.features.sharing import share
from scalerec.features.vocabulary import HashVocabulary, ValueCounts, Vocabulary
from scalerec.schema import Categorical, Cross, Feature, Frozen, MultiCategorical, Numeric, Schema, Sequence


class _Fitted(Frozen):
    """The part of an encoder that is small enough for JSON."""

    schema_: Schema
    numerics: dict[str, NumericFit]


class Encoder:
    """Turns Arrow rows into a Batch by a fitted schema; nothing in it changes by that, threads may share it."""

    def __init__(self, schema: Schema, vocabularies: dict[str, Vocabulary], numerics: dict[str, NumericFit]):
        self.schema = schema
        self.vocabularies = vocabularies  # of dictionaries, by feature name
        self.numerics = numerics

    # -- fitting

    @staticmethod
    def fit(schema: Schema, rows: Iterable[pa.RecordBatch]) -> Encoder:
        """Read the training rows once; memory grows with the number of distinct values, not of rows."""
        counts, statistics = _collect(schema, rows)
        vocabularies = {
            feature.name: counts[feature.name].vocabulary(feature.min_count)
            for feature in schema.features
            if feature.name in counts and isinstance(feature, (Categorical, MultiCategorical))
        }
        return Encoder(schema, vocabularies, {name: value.fit() for name, value in statistics.items()})

    def grown(self, rows: Iterable[pa.RecordBatch]) -> Encoder:
        """With the dictionary values of later rows appended; buckets stay, old ids keep their meaning."""
        counts, _ = _collect(self.schema, rows, self.vocabularies)
        vocabularies = {}
        for name, vocabulary in self.vocabularies.items():
            feature = self.schema.feature(name)
            assert isinstance(feature, (Categorical, MultiCategorical))
            vocabularies[name] = vocabulary.grown(counts[name].vocabulary(feature.min_count).values)
        return Encoder(self.schema, vocabularies, self.numerics)

    # -- encoding

    def encode(
        self, rows: pa.RecordBatch, *, index: np.ndarray | None = None, where: str = "rows", first: int = 0,
        labels: bool = True, counts: Counter[str] | None = None,
    ) -> Batch:  # fmt: skip
        """A Batch of all `rows`, equal user sides shared.

        `index` numbers the rows (default: from 0); an error names `where` and the row's number less `first`. To
        `counts` are added the rows, and what was unknown, repaired or cut on the way.

        Raises:
            InputError: a column is missing or of the wrong type, a label (also of a past event) is not 0 or 1, lists
                differ in length, a past is not in the order of its times or goes beyond its row's.
        """
        columns = self.schema.input_columns() + (self.schema.label_columns() if labels else [])
        missing = [column for column in columns if column not in rows.schema.names]
        if missing:
            raise InputError(f"{where}: no column {missing[0]!r}; it has {', '.join(rows.schema.names[:30])}")
        counts = Counter() if counts is None else counts
        counts["rows"] += rows.num_rows
        n, tasks = rows.num_rows, len(self.schema.tasks)
        index = np.arange(n) if index is None else index
        try:
            user, items = (self._rows(rows, side, index - first, counts) for side in ("user", "item"))
            targets, weights = self._targets(rows, index - first, counts) if labels else (torch.zeros(n, tasks),) * 2
        except InputError as error:
            raise InputError(f"{where}{', ' if str(error).startswith('row ') else ': '}{error}") from None
        users = torch.from_numpy(hash_column(rows.column(self.schema.user), self.schema.user).view(np.int64))
        new = torch.zeros(n, dtype=torch.int64)
        if labels and self.schema.new_events:
            new = torch.from_numpy(numbers(rows.column(self.schema.new_events), self.schema.new_events)[0]).long()
        return share(Batch(user, items, torch.arange(n), targets, weights, users, torch.from_numpy(index), new))

    def encode_side(
        self, rows: pa.RecordBatch, side: str, only: Collection[str] | None = None, where: str = "request"
    ) -> Rows:
        """One side of `rows` alone, or, with their columns in the layout's order, `only` some of its plain features.

        Raises:
            InputError: as `encode`, for the columns that these features read.
        """
        try:
            return self._rows(rows, side, np.arange(rows.num_rows), Counter(), only)
        except (InputError, KeyError) as error:
            raise InputError(f"{where}: {error}") from None

    def _rows(
        self, rows: pa.RecordBatch, side: str, number: np.ndarray, counts: Counter[str],
        only: Collection[str] | None = None,
    ) -> Rows:  # fmt: skip
        n = rows.num_rows
        ids, values = [], []
        multi: dict[str, Jagged] = {}
        actions: dict[str, Jagged] = {}
        for feature in (f for group in self.schema.groups if group.side == side for f in group.features):
            if only is not None and feature.name not in only:
                continue
            if isinstance(feature, Sequence):
                columns, lengths = _past(feature, rows, number)
                multi[feature.name] = Jagged.from_lengths(self._past_ids(feature, columns), lengths)
                if feature.actions:
                    of_event = np.repeat(number, lengths)
                    labels = [zero_or_one(columns[name], name, of_event) for name in feature.action_columns]
                    stacked = np.stack(labels, 1).astype(np.float32)
                    actions[feature.name] = Jagged.from_lengths(torch.from_numpy(stacked), lengths)
            elif isinstance(feature, MultiCategorical):
                multi[feature.name] = self._multi(feature, rows, counts)
            elif isinstance(feature, Cross):
                codes = np.zeros(n, np.uint64)
                for column in feature.of:
                    codes = mix(codes + hash_column(rows.column(column), column))
                ids.append((codes % np.uint64(feature.buckets)).astype(np.int64) + FIRST_ID)
            elif isinstance(feature, Numeric):
                column = feature.column or feature.name
                raw, repaired = numbers(rows.column(column), column)
                if repaired:
                    counts[f"{column}: NaN or infinite, read as missing"] += repaired
                fit = self.numerics[feature.name]
                if feature.encoding == "buckets":
                    ids.append(bucket(raw, fit))
                else:
                    values.append(standardise(raw, fit, feature.log))
            else:
                ids.append(self._ids(feature, rows.column(feature.column or feature.name), counts))
        times, now = self._times(rows, number) if side == "user" and only is None else ({}, None)
        return Rows(
            side,
            torch.from_numpy(np.stack(ids, 1) if ids else np.zeros((n, 0), np.int64)),
            torch.from_numpy(np.stack(values, 1) if values else np.zeros((n, 0), np.float32)),
            multi,
            times,
            actions,
            now,
        )

    def _times(self, rows: pa.RecordBatch, number: np.ndarray) -> tuple[dict[str, Jagged], torch.Tensor | None]:
        """In seconds, of the events of each sequence that keeps them, and where one does also of the rows [n].

        Raises:
            InputError: a list is not in the order of its times, or holds one later than the row's own.
        """
        times: dict[str, Jagged] = {}
        now = None
        for sequence in self.schema.sequences:
            column = sequence.time_column
            if column is None:
                continue
            if self.schema.time and now is None:
                now = torch.from_numpy(self._seconds(rows.column(self.schema.time), self.schema.time))
            flat, lengths = lists(rows.column(column), column)
            found = self._seconds(flat, column)
            _check_order(column, found, lengths, None if now is None else now.numpy(), number)
            kept, lengths = last(found, lengths, sequence.max_len)
            times[sequence.name] = Jagged.from_lengths(torch.from_numpy(kept), torch.from_numpy(lengths))
        return times, now

    def _seconds(self, column: pa.Array, name: str) -> np.ndarray:
        """A time column in seconds [n] float64."""
        return unix_seconds(column, name, self.schema.time_unit)

    def _ids(self, feature: Categorical | MultiCategorical, column: pa.Array, counts: Counter[str]) -> np.ndarray:
        vocabulary = self._vocabulary(feature)
        ids = vocabulary.ids(column, feature.column or feature.name)
        unknown = int((ids == UNKNOWN).sum())
        if unknown:
            counts[f"{feature.name}: not in the vocabulary, read as unknown"] += unknown
        return ids

    def _vocabulary(self, feature: Categorical | MultiCategorical) -> Vocabulary | HashVocabulary:
        if feature.vocabulary == "hash":
            return HashVocabulary(feature.buckets)
        return self.vocabularies[feature.name]

    def _multi(self, feature: MultiCategorical, rows: pa.RecordBatch, counts: Counter[str]) -> Jagged:
        column = feature.column or feature.name
        flat, lengths = lists(rows.column(column), column, feature.separator)
        values, kept = last(flat, lengths, feature.max_len)
        if len(values) < len(flat):
            counts[f"{feature.name}: values beyond max_len, cut"] += len(flat) - len(values)
        ids = self._ids(feature, values, counts)
        # A row without values carries the one id "missing", so that its vector is learned like any other.
        empty = kept == 0
        ids = np.insert(ids, np.cumsum(kept)[empty], MISSING)
        return Jagged.from_lengths(torch.from_numpy(ids), torch.from_numpy(kept + empty))

    def _past_ids(self, feature: Sequence, columns: dict[str, pa.Array]) -> torch.Tensor:
        """Row ids [total, fields] of the events' flat columns."""
        ids = []
        for field in feature.fields:
            of = self.schema.feature(field.of)
            assert isinstance(of, Categorical)
            ids.append(self._vocabulary(of).ids(columns[feature.column(field)], feature.column(field)))
        return torch.from_numpy(np.stack(ids, 1))

    def _targets(
        self, rows: pa.RecordBatch, number: np.ndarray, counts: Counter[str]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not self.schema.tasks:
            return torch.zeros(rows.num_rows, 0), torch.zeros(rows.num_rows, 0)
        targets, weights = [], []
        for task in self.schema.tasks:
            label = zero_or_one(rows.column(task.column), task.column, number)
            weight = np.ones(len(label)) if task.weight is None else numbers(rows.column(task.weight), task.weight)[0]
            if task.mask is not None:
                weight = weight * (np.nan_to_num(numbers(rows.column(task.mask), task.mask)[0]) != 0)
            absent = np.isnan(label) | np.isnan(weight)
            if absent.any():
                counts[f"{task.column}: no label, row not counted in its task"] += int(absent.sum())
            if (weight < 0).any():
                raise InputError(f"weights {task.weight!r} hold negative values")
            targets.append(np.where(absent, 0, label))
            weights.append(np.where(absent, 0, weight))
        return tuple(torch.from_numpy(np.stack(x, 1).astype(np.float32)) for x in (targets, weights))  # type: ignore

    # -- shape and storage

    @cached_property
    def layout(self) -> Layout:
        tables: dict[str, Table] = {}
        groups = []
        for group in self.schema.groups:
            features = [self._feature_layout(feature, tables) for feature in group.features]
            groups.append(GroupLayout(name=group.name, side=group.side, features=tuple(features)))
        return Layout(
            tables=tuple(tables.values()), groups=tuple(groups), tasks=tuple(task.name for task in self.schema.tasks)
        )

    def _feature_layout(self, feature: Feature, tables: dict[str, Table]) -> FeatureLayout:
        if isinstance(feature, Sequence):
            dims = [getattr(self.schema.feature(field.of), "dim", None) or self.schema.dim for field in feature.fields]
            names = tuple(field.of for field in feature.fields)
            task_of = {task.column: task.name for task in self.schema.tasks}
            return FeatureLayout(
                name=feature.name, kind="sequence", width=sum(dims), tables=names, query=names,
                max_len=feature.max_len, time=feature.time, runs=feature.runs,
                actions=tuple(task_of.get(label, label) for label in feature.actions),
            )  # fmt: skip
        dim = feature.dim or self.schema.dim
        if isinstance(feature, Numeric) and feature.encoding == "linear":
            return FeatureLayout(name=feature.name, kind="number", width=dim)
        if isinstance(feature, (Categorical, MultiCategorical)):
            rows = self._vocabulary(feature).rows
        else:
            rows = FIRST_ID + feature.buckets
        tables[feature.name] = Table(name=feature.name, rows=rows, dim=dim)
        if isinstance(feature, MultiCategorical):
            return FeatureLayout(
                name=feature.name, kind="multi", width=dim, tables=(feature.name,), pooling=feature.pooling,
                max_len=feature.max_len,
            )  # fmt: skip
        return FeatureLayout(name=feature.name, kind="id", width=dim, tables=(feature.name,))

    def save(self, folder: Path) -> None:
        """Write `encoder.json` and one Parquet file per dictionary into `folder`."""
        (folder / "vocabulary").mkdir(parents=True, exist_ok=True)
        fitted = _Fitted(schema_=self.schema, numerics=self.numerics)
        (folder / "encoder.json").write_text(fitted.model_dump_json(indent=1))
        for number, (name, vocabulary) in enumerate(self.vocabularies.items()):
            table = pa.table({"value": vocabulary.values}, metadata={"feature": name})
            pq.write_table(table, folder / "vocabulary" / f"{number:04d}.parquet", compression="zstd")

    @staticmethod
    def load(folder: Path) -> Encoder:
        fitted = config.read(_Fitted, folder / "encoder.json")
        vocabularies = {}
        for path in sorted((folder / "vocabulary").glob("*.parquet")):
            table = pq.read_table(path)
            name = (table.schema.metadata or {})[b"feature"].decode()
            vocabularies[name] = Vocabulary(table.column("value").combine_chunks())
        return Encoder(fitted.schema_, vocabularies, fitted.numerics)

    def same_as(self, other: Encoder) -> bool:
        """Whether both turn every row into the same ids."""
        return (
            self.schema == other.schema
            and self.numerics == other.numerics
            and self.vocabularies.keys() == other.vocabularies.keys()
            and all(v.values.equals(other.vocabularies[k].values) for k, v in self.vocabularies.items())
        )


def _collect(
    schema: Schema, rows: Iterable[pa.RecordBatch], known: dict[str, Vocabulary] | None = None
) -> tuple[dict[str, ValueCounts], dict[str, NumericStatistics]]:
    """One pass over the rows: how often each value of each dictionary occurs (in histories too), and the numbers."""
    counts: dict[str, ValueCounts] = {}
    statistics: dict[str, NumericStatistics] = {}
    for feature in schema.features:
        if isinstance(feature, (Categorical, MultiCategorical)) and feature.vocabulary == "dictionary":
            counts[feature.name] = ValueCounts(known[feature.name].integer if known else None)
        elif isinstance(feature, Numeric):
            statistics[feature.name] = NumericStatistics(feature)
    for batch in rows:
        missing = [column for column in schema.input_columns() if column not in batch.schema.names]
        if missing:
            raise InputError(f"no column {missing[0]!r}; the files have {', '.join(batch.schema.names[:30])}")
        for feature in schema.features:
            column = getattr(feature, "column", "") or feature.name
            if isinstance(feature, Categorical) and feature.name in counts:
                counts[feature.name].add(batch.column(column), column)
            elif isinstance(feature, MultiCategorical) and feature.name in counts:
                counts[feature.name].add(lists(batch.column(column), column, feature.separator)[0], column)
            elif isinstance(feature, Numeric):
                statistics[feature.name].add(numbers(batch.column(column), column)[0])
            elif isinstance(feature, Sequence):
                for field in feature.fields:
                    if field.of in counts:
                        flat, _ = lists(batch.column(feature.column(field)), feature.column(field))
                        counts[field.of].add(flat, feature.column(field))
    return counts, statistics


def _check_order(name: str, times: np.ndarray, lengths: np.ndarray, now: np.ndarray | None, number: np.ndarray) -> None:
    """InputError unless the flat times of each list never decrease and none is later than its row's time `now` [n]."""
    ends = np.cumsum(lengths)
    back = np.append(False, times[1:] < times[:-1])[: len(times)]
    back[(ends - lengths)[lengths > 0]] = False
    late = np.zeros(len(times), bool) if now is None else times > np.repeat(now, lengths)
    for wrong, what, do in (
        (back, "goes back in time", "sort each history by time, the oldest event first"),
        (late, "is later than the row's own time", "a history holds only what was before its row: cut it there"),
    ):
        if wrong.any():
            at = int(wrong.argmax())
            row = int(np.searchsorted(ends, at, side="right"))
            event = f"event {at - int(ends[row] - lengths[row]) + 1} of {lengths[row]}"
            raise InputError(f"row {number[row]}: {name!r} {what} at its {event}: {do}")


def _past(feature: Sequence, rows: pa.RecordBatch, number: np.ndarray) -> tuple[dict[str, pa.Array], torch.Tensor]:
    """The flat values of a sequence's list columns, and the one length [n] of their lists after the cut to max_len."""
    names = feature.list_columns()
    columns: dict[str, pa.Array] = {}
    first: np.ndarray | None = None
    kept = np.zeros(0, np.int64)
    for name in names:
        flat, lengths = lists(rows.column(name), name)
        first = lengths if first is None else first
        unequal = np.flatnonzero(lengths != first)
        if unequal.size:
            raise InputError(f"row {number[unequal[0]]}: lists {names[0]!r} and {name!r} differ in length")
        columns[name], kept = last(flat, lengths, feature.max_len)
    return columns, torch.from_numpy(kept)

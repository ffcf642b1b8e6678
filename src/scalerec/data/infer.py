"""A first schema for a Parquet file, guessed from names and values, for a person to edit."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalerec.data.parts import together
from scalerec.data.reader import ParquetRows
from scalerec.errors import InputError
from scalerec.schema import Categorical, Feature, Group, MultiCategorical, Numeric, Schema, Task

SAMPLE = 200_000  # rows looked at
GROUP = 6  # features to a guessed group
FAR = 1e10  # seconds since 1970 in the year 2286; milliseconds in April 1970
NEARLY_ALL = 0.9  # of the rows: with so many values a column numbers the rows
FEW = 30  # distinct whole numbers up to which a column is a category
LABEL = re.compile(
    r"^(is_|has_|did_)|label|click|like|buy|bought|purchas|convert|target|finish|skip|follow|share", re.I
)
OUTCOME = re.compile(r"play_?time|watch_?time|dwell|stay|_after|revenue|feedback|rating", re.I)
USER = re.compile(r"^(user|uid|member|customer|visitor|account|viewer|profile)(_?id)?$", re.I)
ITEM = re.compile(r"^(item|iid|video|movie|product|article|doc|ad|post|app|sku|song|news)(_?id)?$", re.I)
TIME = re.compile(r"time|date|^ts$|_ts$|timestamp|_at$", re.I)


def infer(rows: ParquetRows) -> tuple[Schema, list[str]]:
    """A schema for the first 200,000 rows, and remarks for the person who will edit it.

    Raises:
        InputError: no column looks like a user or like a label.
    """
    table = _sample(rows)
    names = table.column_names
    user = _only(names, USER, "user", "user_id")
    item = next((name for name in names if ITEM.search(name)), None)
    time = next((name for name in names if _is_time(table, name)), None)
    owner = _codes(table.column(user))
    named = [name for name in names if LABEL.search(name) and name not in (user, item, time)]
    binary = [name for name in named if _is_binary(table.column(name))]
    of_user = [name for name in binary if _constant_within(owner, table.column(name))]
    labels = [name for name in binary if name not in of_user]
    texts = [name for name in named if _is_text(table.column(name))]
    remarks = [
        *(f"{name}: the same in all rows of each user, so taken as a feature and not as a task" for name in of_user),
        *(f"{name}: left out: named like a label, but text; to learn from it make it 0, 1 or null" for name in texts),
    ]
    if not labels:
        near = f" ({remarks[0]})" if remarks else ""
        raise InputError(
            f"no column looks like a label (0 or 1, named like click or is_liked) among {', '.join(names[:30])}{near}: "
            "rename one, or write the schema by hand (docs/data.md)"
        )
    sides: dict[Literal["user", "item"], list[Feature]] = {"user": [], "item": []}
    for name in names:
        if name in (time, *labels, *texts):
            continue
        column = table.column(name)
        feature = _feature(name, column)
        if feature is None:
            remarks.append(f"{name}: left out ({column.type}, or one value only)")
            continue
        if OUTCOME.search(name) or (name in named and name not in of_user):
            remarks.append(f"{name}: known only after the row was shown? Then take it out, or the scores are too good")
        if feature.kind == "categorical" and name != user and _is_unlike(column):
            remarks.append(f"{name}: another value in nearly every row, of which nothing can be learned: take it out")
        side = "user" if name == user or (name != item and _constant_within(owner, column)) else "item"
        sides[side].append(feature)
    groups = [
        Group(name=f"{side}_{number}", side=side, features=tuple(features[first : first + GROUP]))
        for side, features in sides.items()
        for number, first in enumerate(range(0, len(features), GROUP))
    ]
    unit = 1.0
    if time is not None and not pa.types.is_temporal(table.column(time).type):
        unit = _time_unit(table.column(time))
        remarks.append(f"{time}: read as numbers of {unit:g} s each; another unit is `time_unit` in the schema")
    if time is None:
        for name in (name for name in names if TIME.search(name) and _is_text(table.column(name))):
            remarks.append(f"{name}: named like a time, but text: convert it to a timestamp to have it read as one")
        remarks.append("time: no column found: `time` is null, and without --data.split rows are split at random")
    remarks.append("groups: only cut into pieces of six; put together what belongs together")
    tasks = tuple(Task(name=re.sub(r"^(is|has|did)_", "", name), label=name) for name in labels)
    found = ", ".join(task.name for task in tasks)
    remarks.append(f"tasks: {found}; a service ranks by the first one, unless `export --fusion` says otherwise")
    return Schema(groups=tuple(groups), tasks=tasks, user=user, item=item, time=time, time_unit=unit), remarks


def _sample(rows: ParquetRows) -> pa.Table:
    """The first rows, categories of pandas as the text that they are."""
    pieces, count = [], 0
    for batch in rows.batches("train"):
        pieces.append(pa.Table.from_batches([batch]))
        count += batch.num_rows
        if count >= SAMPLE:
            break
    table = together(pieces, "schema infer")
    plain = [f.with_type(f.type.value_type) if pa.types.is_dictionary(f.type) else f for f in table.schema]
    return table.cast(pa.schema(plain)).combine_chunks()


def _feature(name: str, column: pa.ChunkedArray) -> Feature | None:
    kind = column.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        if pa.types.is_nested(kind.value_type) or pa.types.is_floating(kind.value_type):
            return None
        return MultiCategorical(name=name, note="a list: a past of the user would be a `sequence` (docs/data.md)")
    if pa.types.is_nested(kind) or pa.types.is_binary(kind) or pa.types.is_null(kind):
        return None
    distinct = pc.count_distinct(column).as_py()
    if distinct < 2:
        return None
    note = f"{distinct:,} distinct values in {len(column):,} rows"
    if _is_text(column):
        cut = next((s for s in "|;," if _share_with(column, s) > 0.5), None)
        if cut:
            return MultiCategorical(name=name, separator=cut, note=note)
        return Categorical(name=name, note=note)
    if pa.types.is_boolean(kind):
        return Categorical(name=name, note=note)
    if pa.types.is_integer(kind):
        is_id = bool(
            USER.search(name) or ITEM.search(name) or re.search(r"(^|_)(id|type|code|cat|zip|tag)s?$", name, re.I)
        )
        return Categorical(name=name, note=note) if is_id or distinct <= FEW else Numeric(name=name, note=note)
    if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return Numeric(name=name, note=note)
    return None


def _is_text(column: pa.ChunkedArray) -> bool:
    return pa.types.is_string(column.type) or pa.types.is_large_string(column.type)


def _is_unlike(column: pa.ChunkedArray) -> bool:
    """Whether hardly two of the rows that have a value have the same."""
    return pc.count_distinct(column).as_py() > NEARLY_ALL * (len(column) - column.null_count)


def _share_with(column: pa.ChunkedArray, separator: str) -> float:
    return pc.mean(pc.match_substring(column, separator)).as_py() or 0.0


def _is_binary(column: pa.ChunkedArray) -> bool:
    kind = column.type
    if not (pa.types.is_boolean(kind) or pa.types.is_integer(kind) or pa.types.is_floating(kind)):
        return False
    return {value for value in pc.unique(column.drop_null()).to_pylist() if value == value} == {0, 1}  # NaN is missing


def _is_time(table: pa.Table, name: str) -> bool:
    kind = table.column(name).type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return True
    number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    return bool(
        number
        and TIME.search(name)
        and not OUTCOME.search(name)
        and pc.count_distinct(table.column(name)).as_py() > FEW
    )


def _time_unit(column: pa.ChunkedArray) -> float:
    """The unit, in seconds, of numbers since 1970: the coarsest that puts them before 2286."""
    median = pc.approximate_median(column).as_py() or 0.0
    return next((unit for unit in (1.0, 1e-3, 1e-6, 1e-9) if median * unit < FAR), 1.0)


def _only(names: Iterable[str], pattern: re.Pattern[str], what: str, example: str) -> str:
    found = next((name for name in names if pattern.search(name)), None)
    if found is None:
        raise InputError(f"no column looks like a {what} (such as {example!r}) among {', '.join(names)}: rename one")
    return found


def _codes(column: pa.ChunkedArray) -> np.ndarray:
    coded = column.dictionary_encode(null_encoding="encode").unify_dictionaries()
    return np.concatenate([chunk.indices.to_numpy(zero_copy_only=False) for chunk in coded.chunks])


def _constant_within(owner: np.ndarray, column: pa.ChunkedArray) -> bool:
    """Whether no user shows two values, with enough users seen twice to tell."""
    if pa.types.is_nested(column.type):
        return False
    values = _codes(column)
    order = np.argsort(owner, kind="stable")
    same_owner = owner[order][1:] == owner[order][:-1]
    return bool(same_owner.sum() >= 10 and (values[order][1:] == values[order][:-1])[same_owner].all())

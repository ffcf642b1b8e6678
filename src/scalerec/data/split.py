"""Which rows train, which validate, which test: cut in time (the default for logs) or at random."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Annotated, Any, Literal, Union

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator, model_validator

from scalerec.errors import InputError
from scalerec.features.hashing import hash_column, mix
from scalerec.features.numeric import numbers, seconds
from scalerec.schema import Frozen

Part = Literal["train", "validation", "test"]
PARTS: tuple[Part, ...] = ("train", "validation", "test")
_NAMES = "train, validation or test"


def _number_or_time(value: Any, read: ValidatorFunctionWrapHandler) -> Any:
    try:
        return read(value)
    except ValidationError:  # one complaint for each of the types
        raise ValueError(f"{value!r} is no number and no ISO date or time (as in 2024-03-16)") from None


Moment = Annotated[Union[int, float, datetime], WrapValidator(_number_or_time)]  # a date is its midnight


class TimeSplit(Frozen):
    """Rows before `validation` train, those before `test` validate, the rest test; never a later row in training."""

    kind: Literal["time"] = "time"
    column: str
    validation: Moment  # in the column's own unit, or an ISO date
    test: Moment

    def part_of(self, rows: pa.RecordBatch, first: int) -> np.ndarray:
        """The part of each row [n] as an index into PARTS; `first` is the number of the first row in the files."""
        times = times_of(rows, self.column)
        is_number = _is_number(rows, self.column)
        cuts = [_moment(value, is_number, self.column) for value in (self.validation, self.test)]
        if cuts[0] >= cuts[1]:
            raise InputError(f"split: test ({self.test}) must begin after validation ({self.validation})")
        return np.searchsorted(np.asarray(cuts), times, side="right").astype(np.int8)


class RandomSplit(Frozen):
    """Rows, or all rows of one user together, drawn by a hash: the same rows whatever the order of reading."""

    kind: Literal["random"] = "random"
    by: str = ""  # a column whose equal values stay together; default: single rows
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    test: Annotated[float, Field(gt=0, lt=1)] = 0.1
    seed: int = 0

    def part_of(self, rows: pa.RecordBatch, first: int) -> np.ndarray:
        if self.by:
            keys = hash_column(_column(rows, self.by))
        else:
            keys = np.arange(first, first + rows.num_rows, dtype=np.uint64)
        uniform = mix(keys, self.seed).astype(np.float64) / 2.0**64
        cuts = [1.0 - self.validation - self.test, 1.0 - self.test]
        return np.searchsorted(np.asarray(cuts), uniform, side="right").astype(np.int8)

    @model_validator(mode="after")
    def _room_for_training(self) -> RandomSplit:
        if self.validation + self.test >= 1:
            raise ValueError("validation + test leave nothing to train on: lower them")
        return self


class NoSplit(Frozen):
    """Every row belongs to every part: for files that are only evaluated or scored."""

    kind: Literal["none"] = "none"

    def part_of(self, rows: pa.RecordBatch, first: int) -> np.ndarray:
        return np.zeros(rows.num_rows, np.int8)


class ColumnSplit(Frozen):
    """Every row says its own part in a column that holds "train", "validation" or "test"."""

    kind: Literal["column"] = "column"
    column: str

    def part_of(self, rows: pa.RecordBatch, first: int) -> np.ndarray:
        values = _column(rows, self.column)
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if not (pa.types.is_string(values.type) or pa.types.is_large_string(values.type)):
            raise InputError(f"split: column {self.column!r} is {values.type}: it must hold {_NAMES}")
        parts = pc.index_in(values, value_set=pa.array(PARTS, values.type))
        if parts.null_count:
            wrong = values.filter(parts.is_null())[0].as_py()
            raise InputError(f"split: column {self.column!r} holds {wrong!r}: every row must say {_NAMES}")
        return parts.to_numpy().astype(np.int8)


Split = Annotated[Union[TimeSplit, RandomSplit, ColumnSplit, NoSplit], Field(discriminator="kind")]


def columns_of(split: Split) -> list[str]:
    """The columns that a split reads."""
    column = getattr(split, "column", "") or getattr(split, "by", "")
    return [column] if column else []


def times_of(rows: pa.RecordBatch, column: str) -> np.ndarray:
    """A time column as float64 [n]: numbers in their own unit, timestamps and dates in seconds since 1970."""
    values = seconds(_column(rows, column))
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        raise InputError(f"column {column!r} is {values.type}, not a time: use a number, a date or a timestamp column")
    times, _ = numbers(values, column)
    missing = np.flatnonzero(np.isnan(times))
    if missing.size:
        raise InputError(
            f"column {column!r}, row {missing[0]} of a piece: no time; drop such rows or choose another column"
        )
    return times


def _column(rows: pa.RecordBatch, column: str) -> pa.Array:
    if column not in rows.schema.names:
        raise InputError(f"no column {column!r} in the files: it has {', '.join(rows.schema.names[:20])}")
    return rows.column(column)


def _is_number(rows: pa.RecordBatch, column: str) -> bool:
    return pa.types.is_integer(rows.schema.field(column).type) or pa.types.is_floating(rows.schema.field(column).type)


def _moment(value: Moment, is_number: bool, column: str) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    if is_number:
        raise InputError(f"split: column {column!r} holds numbers, so its cuts must be numbers too, not {value}")
    return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()

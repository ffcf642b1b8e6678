"""Columns of Arrow as one array; those of lists as flat values and lengths."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalerec.errors import InputError

Values = TypeVar("Values", pa.Array, np.ndarray)


def whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    """A column as one array, dictionaries written out."""
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def lists(column: pa.Array, name: str, separator: str | None = None) -> tuple[pa.Array, np.ndarray]:
    """Flat values and int64 lengths [n] of a list column, or of text cut at `separator`; a null list is empty."""
    column = whole(column)
    if separator is not None and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        column = pc.split_pattern(pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column), separator)
    if pa.types.is_null(column.type):
        return pa.array([], pa.int64()), np.zeros(len(column), np.int64)
    if not (pa.types.is_list(column.type) or pa.types.is_large_list(column.type)):
        hint = "set its `separator`" if pa.types.is_string(column.type) or pa.types.is_large_string(column.type) else ""
        raise InputError(f"column {name!r} is {column.type}, not a list{': ' + hint if hint else ''}")
    lengths = pc.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return column.flatten(), lengths


def last(values: Values, lengths: np.ndarray, max_len: int) -> tuple[Values, np.ndarray]:
    """The last `max_len` values of each list, flat, and the new lengths [n]."""
    kept = np.minimum(lengths, max_len)
    if np.array_equal(kept, lengths):
        return values, lengths
    ends = np.cumsum(lengths)
    starts = np.concatenate([[0], np.cumsum(kept)])
    places = np.arange(starts[-1]) - np.repeat(starts[:-1], kept) + np.repeat(ends - kept, kept)
    return values.take(places), kept

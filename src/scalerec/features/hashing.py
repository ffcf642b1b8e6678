"""Stable 64-bit codes: the same value gives the same code on every machine, in training and in serving."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import pyarrow as pa

from scalerec.errors import InputError

NO_VALUE = np.uint64(0x6A09E667F3BCC908)


def mix(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Scramble integers [n] into uniform uint64 (the finaliser of splitmix64)."""
    with np.errstate(over="ignore"):
        x = values.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (seed + 1)) & 0xFFFFFFFFFFFFFFFF)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return x ^ (x >> np.uint64(31))


def hash_text(text: str) -> int:
    """The 64-bit code of a text."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def hash_column(column: pa.Array, name: str = "") -> np.ndarray:
    """The uint64 code [n] of each value: numbers by value whatever their width, anything else by its text.

    Raises:
        InputError: the column (called `name`) holds lists or records.
    """
    if pa.types.is_nested(column.type):
        raise InputError(f"column {name!r} is {column.type}: only single values can be hashed")
    if pa.types.is_dictionary(column.type):
        return by_dictionary(column, lambda values: hash_column(values, name), int(NO_VALUE))
    if pa.types.is_timestamp(column.type):  # one text per moment, whatever the unit
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    number = pa.types.is_floating(column.type) or pa.types.is_integer(column.type) or pa.types.is_boolean(column.type)
    if not number:
        return by_dictionary(column.dictionary_encode(), _hash_texts, int(NO_VALUE))
    missing = column.is_null().to_numpy(zero_copy_only=False)
    if pa.types.is_floating(column.type):
        numbers = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
        missing = missing | ~np.isfinite(numbers)
        numbers = np.where(missing, 0.0, numbers)
        whole = (np.floor(numbers) == numbers) & (np.abs(numbers) < 2.0**63)
        integers = np.where(whole, numbers, 0.0).astype(np.int64)
        codes = np.where(whole, mix(integers.view(np.uint64)), mix(numbers.view(np.uint64), 1))
    else:
        values = column.cast(pa.int64(), safe=False).fill_null(0).to_numpy(zero_copy_only=False)
        codes = mix(values.view(np.uint64))
    return np.where(missing, NO_VALUE, codes)


def _hash_texts(values: pa.Array) -> np.ndarray:
    return np.fromiter((hash_text(str(value)) for value in values.to_pylist()), np.uint64, len(values))


def by_dictionary(column: pa.DictionaryArray, work: Callable[[pa.Array], np.ndarray], missing: int) -> np.ndarray:
    """work(values) of the different values, spread over the column [n], and `missing` for null."""
    values = column.dictionary
    if len(values) > len(column) or values.null_count:  # of a whole file, or with null among them
        column = column.dictionary_decode().dictionary_encode()
    found = work(column.dictionary)
    of_values = np.append(found, found.dtype.type(missing))
    return of_values[column.indices.cast(pa.int64()).fill_null(-1).to_numpy()]

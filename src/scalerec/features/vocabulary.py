"""Values <-> row ids: a dictionary that only ever grows at its end, or a hash."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalerec.batch import FIRST_ID, MISSING, UNKNOWN
from scalerec.errors import InputError
from scalerec.features.compiled import hash_table, places
from scalerec.features.hashing import NO_VALUE, by_dictionary, hash_column

_FRACTION = -(2**62) - 1  # stands for every fraction in a column of whole numbers


def keys(column: pa.Array, name: str, integer: bool | None = None) -> pa.Array:
    """A column as int64 or text keys, NaN as null; `integer` is the kind seen in fitting (None: decide now)."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_timestamp(column.type):  # one text per moment, whatever the unit
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    if pa.types.is_floating(column.type):
        column = column.cast(pa.float64())  # a value has one text, whatever its width
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, pa.float64()))
        whole = pc.all(pc.equal(column, pc.floor(column))).as_py() in (True, None)
        if integer or (integer is None and whole):
            # A fraction was never in an integer dictionary: send it to a value that is not there either.
            whole = pc.equal(column, pc.floor(column))
            column = pc.if_else(whole, column.cast(pa.int64(), safe=False), pa.scalar(_FRACTION, pa.int64()))
    elif pa.types.is_boolean(column.type) or pa.types.is_unsigned_integer(column.type):
        column = column.cast(pa.int64(), safe=False)
    if pa.types.is_null(column.type):
        return column.cast(pa.int64() if integer else pa.string())
    is_integer = pa.types.is_integer(column.type)
    if integer and not is_integer:
        raise InputError(f"column {name!r} is {column.type}, but was a whole number when the encoder was fitted")
    if is_integer and integer is not False:
        return column.cast(pa.int64())
    try:
        return column.cast(pa.large_string())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        raise InputError(f"column {name!r} is {column.type}: a categorical needs whole numbers or text") from None


class Vocabulary:
    """Row ids of a dictionary: value i has id FIRST_ID + i, for good."""

    def __init__(self, values: pa.Array):
        self.values = values
        self.integer = pa.types.is_integer(values.type)
        if self.integer:
            self._numbers = values.to_numpy(zero_copy_only=False)
            self._slots = hash_table(self._numbers)
        else:
            self._index = {value: i for i, value in enumerate(values.to_pylist())}

    @property
    def rows(self) -> int:
        return FIRST_ID + len(self.values)

    def ids(self, column: pa.Array, name: str) -> np.ndarray:
        """Row ids [n]: MISSING for null, UNKNOWN for a value that was not there when it was fitted."""
        if pa.types.is_dictionary(column.type):
            return by_dictionary(column, lambda values: self.ids(values, name), MISSING)
        column = keys(column, name, self.integer)
        if not self.integer:
            return by_dictionary(column.dictionary_encode(), self._of_texts, MISSING)
        numbers = (column.fill_null(0) if column.null_count else column).to_numpy()
        found = places(self._numbers, self._slots, numbers, UNKNOWN, FIRST_ID)
        if column.null_count:
            found[column.is_null().to_numpy(zero_copy_only=False)] = MISSING
        return found

    def _of_texts(self, values: pa.Array) -> np.ndarray:
        unknown = UNKNOWN - FIRST_ID
        return np.fromiter((self._index.get(v, unknown) + FIRST_ID for v in values.to_pylist()), np.int64, len(values))

    def grown(self, values: pa.Array) -> Vocabulary:
        """With new values appended in the given order; ids of old values stay."""
        known = set(self.values.to_pylist())
        new = [value for value in values.to_pylist() if value not in known]
        return Vocabulary(pa.concat_arrays([self.values, pa.array(new, self.values.type)]))


class HashVocabulary:
    """Row ids by hash: nothing to fit, collisions accepted."""

    def __init__(self, buckets: int):
        self.buckets = buckets

    @property
    def rows(self) -> int:
        return FIRST_ID + self.buckets

    def ids(self, column: pa.Array, name: str) -> np.ndarray:
        codes = hash_column(column, name)
        hashed = (codes % np.uint64(self.buckets)).astype(np.int64) + FIRST_ID
        return np.where(codes == NO_VALUE, MISSING, hashed)


class ValueCounts:
    """How often each value occurred, over any number of column pieces."""

    def __init__(self, integer: bool | None = None) -> None:
        self.counts: Counter[int | str] = Counter()
        self.integer = integer
        self._grows = integer is not None  # a dictionary whose ids stay

    def add(self, column: pa.Array, name: str) -> None:
        found = keys(column, name, self.integer).drop_null()
        if self.integer is None and len(found):
            self.integer = pa.types.is_integer(found.type)
        counts = {entry["values"]: entry["counts"] for entry in pc.value_counts(found).to_pylist()}
        if _FRACTION in counts and not self._grows:
            # All numbers were whole so far: they get the texts that they would have had beside a fraction.
            texts = pa.array(self.counts, pa.int64()).cast(pa.float64()).cast(pa.large_string()).to_pylist()
            self.counts, self.integer = Counter(dict(zip(texts, self.counts.values()))), False
            return self.add(column, name)
        counts.pop(_FRACTION, None)
        self.counts.update(counts)

    def vocabulary(self, min_count: int) -> Vocabulary:
        """The values that occurred at least `min_count` times, in the order of the values."""
        kept = sorted(value for value, count in self.counts.items() if count >= min_count)
        return Vocabulary(pa.array(kept, pa.int64() if self.integer else pa.large_string()))

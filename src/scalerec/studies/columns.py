"""Two versions of one column, row by row: how many differ, by how much, and what the difference looks like.

n rows
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalerec.errors import InputError
from scalerec.features.hashing import hash_column
from scalerec.features.lists import lists
from scalerec.features.numeric import numbers, seconds

Kind = Literal["value", "quantity", "time"]  # of the last two, differences have a size

RELATIVE = 1e-6  # differences of quantities that float32 makes
MOMENT = 5e-7  # half a microsecond: what float64 seconds since 1970 may be off
KEPT = 2_000  # differing rows kept to look at
PIECE = 256  # of them from one piece, so that they come from all over the log
MOST_PAIRS = 5
LEAST = 3  # rows that show a pair of values: what fewer have may tell who they are


class Comparison:
    """One column of rows that were served against the same rows of the training log, added piece by piece."""

    def __init__(self, name: str, *, kind: Kind = "value", shown: bool = True):
        self.name = name
        self.kind: Kind = kind
        self.shown = shown  # values may be printed: not of the column that says who
        self.rows = self.differ = self.other_length = 0
        self.types: tuple[str, str] = ("", "")
        self.listed = False
        self._kept: list[tuple[Any, Any]] = []  # (served, trained) of differing rows
        self._places: list[int] = []  # from 0, of the first difference in lists
        self._largest = 0.0

    def add(self, served: pa.Array, trained: pa.Array) -> np.ndarray:
        """Whether each row [n] differs; missing equals missing, NaN and infinity too, and no list an empty one."""
        served, trained = _plain(served), _plain(trained)
        self.rows += len(served)
        self.types = (str(served.type), str(trained.type))
        if pa.types.is_nested(served.type) != pa.types.is_nested(trained.type) and not (
            pa.types.is_null(served.type) or pa.types.is_null(trained.type)
        ):
            differs = np.ones(len(served), bool)
        elif pa.types.is_nested(served.type) or pa.types.is_nested(trained.type):
            self.listed = True
            differs = self._lists(served, trained)
        else:
            differs = ~equal(served, trained, self.kind)
            self._largest = max(self._largest, self._gap(served, trained))
        self.differ += int(differs.sum())
        some = np.flatnonzero(differs)
        room = min(PIECE, KEPT - len(self._kept))
        if len(some) and room > 0:
            index = pa.array(some[np.linspace(0, len(some) - 1, min(room, len(some))).astype(np.int64)])
            self._kept += zip(served.take(index).to_pylist(), trained.take(index).to_pylist())
        return differs

    def _lists(self, served: pa.Array, trained: pa.Array) -> np.ndarray:
        flat_s, lengths_s = lists(served, self.name)
        flat_t, lengths_t = lists(trained, self.name)
        common = np.minimum(lengths_s, lengths_t)
        row = np.repeat(np.arange(len(common)), common)
        place = np.arange(len(row)) - np.repeat(np.cumsum(common) - common, common)
        in_s, in_t = ((np.cumsum(x) - x)[row] + place for x in (lengths_s, lengths_t))
        values_s, values_t = flat_s.take(pa.array(in_s)), flat_t.take(pa.array(in_t))
        other = np.flatnonzero(~equal(values_s, values_t, self.kind))
        first = np.where(lengths_s == lengths_t, np.iinfo(np.int64).max, common)
        np.minimum.at(first, row[other], place[other])
        differs = first < np.iinfo(np.int64).max
        self.other_length += int((lengths_s != lengths_t).sum())
        if len(self._places) < KEPT:
            self._places += first[differs][:PIECE].tolist()
        same = pa.array((lengths_s == lengths_t)[row])
        self._largest = max(self._largest, self._gap(values_s.filter(same), values_t.filter(same)))
        return differs

    def _gap(self, served: pa.Array, trained: pa.Array) -> float:
        if self.kind == "value" or not all(_is_number(array.type) for array in (served, trained)):
            return 0.0
        gaps = np.abs(_floats(served) - _floats(trained))
        return float(np.nanmax(gaps)) if not np.isnan(gaps).all() else 0.0

    def found(self) -> dict[str, Any]:
        """What there is to say, ready for JSON."""
        share = self.differ / self.rows if self.rows else 0.0
        entry: dict[str, Any] = {"column": self.name, "rows": self.rows, "differ": self.differ, "share": share}
        if not self.differ:
            return entry
        entry["types"] = list(self.types)
        if self.listed:
            entry["other_length"] = self.other_length / self.rows
            entry["first_place"] = float(np.median(self._places)) + 1
        served, trained = self._quantities()
        if len(served):
            entry["median_difference"] = float(np.median(np.abs(served - trained)))
            entry["largest_difference"] = self._largest
        entry["looks_like"] = self._looks_like(served, trained)
        if self.shown:
            entry["pairs"] = self._pairs()
        return entry

    def _quantities(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the differing rows' numbers those that are there on both sides, served and trained."""
        if self.kind == "value":
            return np.empty(0), np.empty(0)
        kept = self._kept
        if self.listed:
            kept = [
                pair for s, t in kept if isinstance(s, list) and isinstance(t, list) and len(s) == len(t)
                for pair in zip(s, t)
            ]  # fmt: skip
        whole = [(s, t) for s, t in kept if isinstance(s, (int, float)) and isinstance(t, (int, float))]
        served, trained = (np.array([pair[i] for pair in whole], np.float64) for i in (0, 1))
        return served, trained

    def _looks_like(self, served: np.ndarray, trained: np.ndarray) -> str:
        """What most of the differing rows have in common, "" where nothing known."""
        name = list_pattern if self.listed else scalar_pattern
        patterns = Counter(name(s, t) for s, t in self._kept)
        pattern, count = patterns.most_common(1)[0]
        # Times of a history that is late by one event would look shifted by a constant as well.
        if pattern:
            return f"{pattern} ({count / len(self._kept):.0%} of the differing rows)"
        return relation(served, trained)

    def _pairs(self) -> list[tuple[str, str, float]]:
        """The most frequent (served, trained, share of the differing rows); of lists, where they first differ."""
        pairs = Counter(_first_pair(s or [], t or []) if self.listed else (_text(s), _text(t)) for s, t in self._kept)
        frequent = [entry for entry in pairs.most_common(MOST_PAIRS) if entry[1] >= LEAST]
        return [(*pair, count / len(self._kept)) for pair, count in frequent]


def equal(served: pa.Array, trained: pa.Array, kind: Kind) -> np.ndarray:
    """Whether values [n] agree: quantities up to rounding, times to the microsecond, other numbers and all whole ones
    exactly, all else by its text."""
    here, there = (array.is_valid().to_numpy(zero_copy_only=False) for array in (served, trained))
    if pa.types.is_null(served.type) or pa.types.is_null(trained.type):
        return here == there
    if pa.types.is_integer(served.type) and pa.types.is_integer(trained.type):
        a, b = (array.fill_null(0).cast(pa.int64(), safe=False).to_numpy() for array in (served, trained))
        same = a == b
    elif _is_number(served.type) and _is_number(trained.type):
        if kind == "value":  # as the encoder takes ids: by value, whatever the width
            same = hash_column(served) == hash_column(trained)
        else:
            a, b = (np.nan_to_num(_floats(array)) for array in (served, trained))
            same = np.abs(a - b) <= (MOMENT if kind == "time" else RELATIVE * np.maximum(np.abs(a), np.abs(b)))
    elif _is_number(served.type) or _is_number(trained.type):
        same = np.zeros(len(served), bool)  # text for a number: the encoder takes them for different values
    else:
        try:
            a, b = (array.cast(pa.large_string()) for array in (served, trained))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
            raise InputError(f"values of {served.type} and {trained.type} cannot be compared") from None
        same = pc.equal(a, b).fill_null(False).to_numpy(zero_copy_only=False)
    return np.where(here & there, same, here == there)


def relation(served: np.ndarray, trained: np.ndarray) -> str:
    """The factor or the shift that turns trained numbers [n] into served ones, "" where there is none."""
    if len(served) < 3:
        return ""
    some = (served != 0) & (trained != 0)
    if some.mean() > 0.9:
        low, middle, high = np.quantile(served[some] / trained[some], (0.05, 0.5, 0.95))
        if high - low <= 1e-3 * abs(middle) and not 0.8 < middle < 1.25:
            unit = {1e3: " (milliseconds for seconds?)", 1e-3: " (seconds for milliseconds?)"}
            near = next((text for factor, text in unit.items() if abs(middle / factor - 1) < 0.01), "")
            return f"served is {middle:.4g} times the trained{near}"
    low, middle, high = np.quantile(served - trained, (0.05, 0.5, 0.95))
    if middle and high - low <= 1e-3 * abs(middle):
        return f"served is the trained {'plus' if middle > 0 else 'minus'} {abs(middle):.6g}"
    return ""


def scalar_pattern(served: Any, trained: Any) -> str:
    if served is None:
        return "served is missing"
    if trained is None:
        return "trained is missing"
    if isinstance(served, str) != isinstance(trained, str):
        return "text for a number" if isinstance(served, str) else "a number for text"
    if isinstance(served, str):
        if served.strip().casefold() == trained.strip().casefold():
            return "only case or spaces differ"
    return ""


def list_pattern(served: list | None, trained: list | None) -> str:
    """How a served list came from the trained one; the end of a history is its newest event."""
    if not isinstance(served or [], list) or not isinstance(trained or [], list):
        return "a single value for a list" if not isinstance(served, list) else "a list for a single value"
    s, t = served or [], trained or []
    if not s:
        return "served is empty"
    if len(s) < len(t) and t[-len(s) :] == s:
        return "served misses the oldest"
    if len(s) > len(t) and (not t or s[-len(t) :] == t):
        return "served has more of the oldest"
    for first, second, what in ((s, t, "misses the last"), (t, s, "has more at the end:")):
        for many in range(1, min(len(second), 11)):
            rest = second[:-many]
            # A list that is cut to a length has one older event more for each newer one that it misses. A short rest
            # would be found by chance.
            if len(first) >= len(rest) >= len(second) / 2 and first[-len(rest) :] == rest:
                return f"served {what} {many}"
    if s == t[::-1]:
        return "the order is reversed"
    if Counter(map(str, s)) == Counter(map(str, t)):
        return "the same values in another order"
    return ""


def _first_pair(served: list, trained: list) -> tuple[str, str]:
    if not isinstance(served, list) or not isinstance(trained, list):
        return _text(served), _text(trained)
    common = min(len(served), len(trained))
    at = next((i for i in range(common) if served[i] != trained[i]), common)
    return tuple(_text(values[at]) if at < len(values) else "(end)" for values in (served, trained))  # type: ignore


def _text(value: Any) -> str:
    if value is None:
        return "(missing)"
    if isinstance(value, list):
        return f"list of {len(value)}"
    if isinstance(value, float) and not value.is_integer():
        return f"{value:.6g}"
    return f"{value:.0f}" if isinstance(value, float) else str(value)[:40]


def _plain(column: pa.Array) -> pa.Array:
    """Times as seconds, booleans as numbers, NaN as missing; lists of such as well."""
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        flat, lengths = lists(column, "")
        return pa.LargeListArray.from_arrays(pa.array(np.append(0, np.cumsum(lengths))), _plain(flat))
    column = seconds(column)
    if pa.types.is_boolean(column.type):
        return column.cast(pa.int8())
    if pa.types.is_floating(column.type):
        return pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    return column


def _is_number(kind: pa.DataType) -> bool:
    checks: tuple[Callable[[pa.DataType], bool], ...] = (
        pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal, pa.types.is_boolean,
    )  # fmt: skip
    return any(check(kind) for check in checks)


def _floats(column: pa.Array) -> np.ndarray:
    return numbers(column, "")[0]

"""Numbers -> buckets of equal frequency, or standardised values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalerec.batch import FIRST_ID, MISSING
from scalerec.errors import InputError
from scalerec.features.compiled import buckets
from scalerec.schema import Frozen, Numeric

_SAMPLE = 200_000  # values kept for the quantiles, a uniform sample of all


class NumericFit(Frozen):
    """What fitting found out about one numeric feature."""

    edges: tuple[float, ...]  # inner borders of the buckets, ascending
    mean: float
    std: float  # of the transformed values


def numbers(column: pa.Array, name: str) -> tuple[np.ndarray, int]:
    """A column as float64 [n] with NaN where missing, and how many values were NaN or infinite (read as missing)."""
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (
        pa.types.is_integer(column.type)
        or pa.types.is_floating(column.type)
        or pa.types.is_boolean(column.type)
        or pa.types.is_decimal(column.type)
        or pa.types.is_null(column.type)
    ):
        raise InputError(f"column {name!r} is {column.type}, not a number: make it categorical or convert it")
    if pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())
    values = column.cast(pa.float64(), safe=False).to_numpy(zero_copy_only=False)
    broken = ~np.isfinite(values)
    repaired = int(broken.sum()) - column.null_count
    return np.where(broken, np.nan, values), repaired


def zero_or_one(column: pa.Array, name: str, number: np.ndarray) -> np.ndarray:
    """Labels [n], NaN where missing; InputError where one is not 0 or 1, with the number [n] of its row."""
    label, _ = numbers(column, name)
    wrong = np.flatnonzero(~np.isin(label, (0, 1)) & ~np.isnan(label))
    if wrong.size:
        raise InputError(f"row {number[wrong[0]]}: label {name!r} is {label[wrong[0]]:g}, must be 0 or 1")
    return label


def seconds(column: pa.Array) -> pa.Array:
    """Timestamps and dates as seconds since 1970, numbers as they are."""
    if not (pa.types.is_timestamp(column.type) or pa.types.is_date(column.type)):
        return column
    return pc.divide(column.cast(pa.timestamp("us"), safe=False).cast(pa.int64()).cast(pa.float64(), safe=False), 1e6)


def unix_seconds(column: pa.Array, name: str, unit: float) -> np.ndarray:
    """A time column in seconds [n] float64: timestamps and dates since 1970, numbers times their `unit`.

    Raises:
        InputError: an entry without a time.
    """
    moments = seconds(column)
    found, _ = numbers(moments, name)
    missing = int(np.isnan(found).sum())
    if missing:
        raise InputError(f"column {name!r}: {missing} entries without a time: fill or drop them")
    return found * (unit if moments is column else 1.0)


def transform(values: np.ndarray, log: bool) -> np.ndarray:
    return np.sign(values) * np.log1p(np.abs(values)) if log else values


class NumericStatistics:
    """Mean, spread and a uniform sample of a stream of numbers."""

    def __init__(self, feature: Numeric):
        self.feature = feature
        self.count, self.mean, self.squares = 0, 0.0, 0.0  # squares: summed distances to the mean
        self._sample, self._priority = np.empty(0, np.float32), np.empty(0)
        self._random = np.random.default_rng(0)

    def add(self, values: np.ndarray) -> None:
        values = values[np.isfinite(values)]
        z = transform(values, self.feature.log)
        if len(z):  # merged with what was there (Chan et al.): sums of squares would cancel for large numbers
            count, shift = self.count + len(z), z.mean() - self.mean
            self.squares += ((z - z.mean()) ** 2).sum() + shift**2 * self.count * len(z) / count
            self.count, self.mean = count, self.mean + shift * len(z) / count
        # Keeping the values with the smallest random priorities is a uniform sample of all that were seen.
        sample = np.concatenate([self._sample, _single(values)])
        priority = np.concatenate([self._priority, self._random.random(len(values))])
        keep = np.argpartition(priority, _SAMPLE)[:_SAMPLE] if len(sample) > _SAMPLE else slice(None)
        self._sample, self._priority = sample[keep], priority[keep]

    def fit(self) -> NumericFit:
        if not self.count:
            return NumericFit(edges=(), mean=0.0, std=1.0)
        std = (self.squares / self.count) ** 0.5
        inner = np.linspace(0, 1, self.feature.buckets + 1)[1:-1]
        edges = np.unique(np.quantile(self._sample, inner, method="inverted_cdf"))
        std = std if std > 1e-12 * abs(self.mean) else 1.0  # the spread of equal numbers is a rounding error, or 0
        return NumericFit(edges=tuple(edges.tolist()), mean=float(self.mean), std=float(std))


def bucket(values: np.ndarray, fit: NumericFit) -> np.ndarray:
    """Row ids [n]; the order of the values decides, so no transform is needed before it.

    In single precision, so that a number from a float32 file and the same in a float64 request share a bucket.
    """
    return buckets(_single(values), np.asarray(fit.edges, np.float32), FIRST_ID, MISSING)


def _single(values: np.ndarray) -> np.ndarray:
    """In float32, what lies beyond it at its end."""
    limit = np.finfo(np.float32).max
    return np.clip(values, -limit, limit).astype(np.float32)


def standardise(values: np.ndarray, fit: NumericFit, log: bool) -> np.ndarray:
    """Transformed values [n] with mean 0 and spread 1 on the fitted rows, NaN where missing."""
    return _single((transform(values, log) - fit.mean) / fit.std)

"""Time columns in seconds, whatever they are kept as."""

from __future__ import annotations

from datetime import date, datetime

import numpy as np
import pyarrow as pa
import pytest

from scalerec.errors import InputError
from scalerec.features.numeric import unix_seconds

MOMENT = datetime(2001, 9, 9, 1, 46, 40)  # 1e9 seconds


@pytest.mark.parametrize(("column", "expected"), [
    (pa.array([3, 10]), [180, 600]),
    (pa.array([0.5], pa.float32()), [30]),
    (pa.array([3, 3]).dictionary_encode(), [180, 180]),
    (pa.array([MOMENT], pa.timestamp("ns")), [1e9]),
    (pa.array([MOMENT], pa.timestamp("s")), [1e9]),
    (pa.array([MOMENT], pa.timestamp("ms", tz="UTC")), [1e9]),
    (pa.array([date(1970, 1, 2)]), [86_400]),
    (pa.array([], pa.int64()), []),
], ids=lambda value: str(getattr(value, "type", "")))  # fmt: skip
def test_numbers_have_a_unit_and_moments_none(column: pa.Array, expected: list[float]):
    found = unix_seconds(column, "time", 60.0)
    assert found.dtype == np.float64 and found.tolist() == expected


@pytest.mark.parametrize("column", [
    pa.array([1, None]), pa.array([1.0, float("nan")]), pa.array([MOMENT, None]), pa.array(["1", "2"]),
], ids=lambda column: str(column.type))  # fmt: skip
def test_what_is_no_time_is_refused(column: pa.Array):
    words = "not a number" if pa.types.is_string(column.type) else "1 entries without a time"
    with pytest.raises(InputError, match=f"column 'when'.*{words}"):
        unix_seconds(column, "when", 1.0)

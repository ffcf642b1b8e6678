"""Figures for programs and for people. A figure that there is not is NaN here, null in JSON and a dash in a table."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(found: Any, indent: int | None = None) -> str:
    """JSON that every program can read: it knows no NaN and no infinity, so null is written for both."""
    return json.dumps(_finite(found), indent=indent, allow_nan=False)


def from_json(text: str) -> Any:
    """Figures that `to_json` wrote, NaN where there is null."""
    return _numbers(json.loads(text))


def shown(value: float, form: str) -> str:
    """A figure in this format, as in ".4f"."""
    return "-" if math.isnan(value) else format(value, form)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, (list, tuple)) else value


def _numbers(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _numbers(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_numbers(each) for each in value]
    return math.nan if value is None else value

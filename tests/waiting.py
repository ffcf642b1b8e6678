"""Waiting for what another thread or process does, instead of for a while."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any


def wait_for(true: Callable[[], Any], seconds: float = 30) -> None:
    """Return as soon as `true()` holds; AssertionError when it does not within `seconds`."""
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not true after {seconds} s"
        time.sleep(0.01)

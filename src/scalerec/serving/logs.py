"""One JSON object a line on standard error: what happened to the service, never who asked for what.

No user, no item, no list, no key, no address and no text of an exception, which may hold any of them: an error is told
by its class and the places in the code that it went through.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import traceback
from typing import Any

logger = logging.getLogger("scalerec.serving")


class _Lines(logging.Formatter):
    """Formats a record; of records that others write only their own fixed text is kept, not its arguments."""

    def format(self, record: logging.LogRecord) -> str:
        fields: dict[str, Any] = getattr(record, "fields", {})
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "event": "event_loop_failed" if record.name == "asyncio" else str(record.msg),  # its texts hold arguments
            **fields,
        }
        if record.exc_info and record.exc_info[1] is not None:
            line |= error_fields(record.exc_info[1])
        return json.dumps(line, default=str)


def start() -> None:
    """Send the records of the service, uvicorn and asyncio to standard error as JSON lines; for the command only."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines())
    for name in ("scalerec.serving", "uvicorn.error", "asyncio"):
        log = logging.getLogger(name)
        log.handlers, log.propagate = [handler], False
        log.setLevel(logging.INFO if name == "scalerec.serving" else logging.WARNING)


def say(event: str, level: int = logging.INFO, **fields: Any) -> None:
    """Log an event with fields that name no person, item or key."""
    logger.log(level, event, extra={"fields": fields})


def error_fields(error: BaseException) -> dict[str, Any]:
    """What may be told of an exception: its class and where it went through."""
    frames = traceback.extract_tb(error.__traceback__)[-12:]
    return {"error": type(error).__name__, "at": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]}


class Once:
    """Says that something fails when it begins to, and when it works again, not each time in between."""

    def __init__(self, what: str):
        self.what, self.failing = what, False

    def failed(self, error: BaseException) -> None:
        if not self.failing:
            self.failing = True
            say(f"{self.what}_failed", logging.ERROR, **error_fields(error))

    def worked(self) -> None:
        if self.failing:
            self.failing = False
            say(f"{self.what}_works_again")

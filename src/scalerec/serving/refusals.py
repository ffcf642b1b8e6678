"""What goes wrong below the routes, as an answer: which status, which field, when to try again."""

from __future__ import annotations

import re

from scalerec.errors import InputError
from scalerec.inference.batching import Overloaded, TooLate
from scalerec.serving.requests import Refused
from scalerec.serving.store import StoreUnavailable

_EVENT = re.compile(r"event (\d+) \(.*?\): (.*)", re.DOTALL)
_FIELD = re.compile(r"(?:no )?'([^']{1,128})'")


def refused_by(error: Exception) -> Refused:
    """The refusal that an exception stands for; the exception itself where it stands for none."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Overloaded):
        return Refused(503, "too many requests wait for this model", retry_after=1)
    if isinstance(error, TooLate):
        return Refused(503, "its turn did not come in time", retry_after=1)
    if isinstance(error, StoreUnavailable):
        return Refused(503, "the store is unavailable: nothing was taken up, send it again", retry_after=1)
    if isinstance(error, InputError):
        return Refused(422, str(error)[:300], _field(str(error)))
    raise error


def _field(message: str) -> str:
    """The field that an InputError of the engine or the store speaks of."""
    event = _EVENT.match(message)
    named = _FIELD.search(event[2] if event else message)
    if event:
        return f"events[{event[1]}].{named[1]}" if named else f"events[{event[1]}]"
    return named[1] if named else ""

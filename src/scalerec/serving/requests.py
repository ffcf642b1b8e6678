"""What a request may look like, read straight from its bytes; every limit is named here or in `settings.Limits`.

Values are taken strictly: a text is not a number, true is not 1, NaN is nothing. Which columns there are and of what
kind is the bundle's to say (`columns`).
"""

from __future__ import annotations

import json
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, GetCoreSchemaHandler, StringConstraints, ValidationError
from pydantic_core import CoreSchema

TEXT, LIST, NAME = 1_024, 1_000, 128  # characters of a value, entries of a list value, characters of a name
ID = 256  # characters of an id
MOST = 16_384  # candidates and filters; `Limits.candidates` may be lower
WHOLE = 2**63  # whole numbers lie within 64 bits
EXACT = 2**53  # times: whole numbers that a float64 holds too


class Refused(Exception):
    """A request that is not answered: an HTTP status, what is wrong, and the field that is."""

    def __init__(self, status: int, message: str, field: str = "", retry_after: float | None = None):
        super().__init__(message)
        self.status, self.message, self.field, self.retry_after = status, message, field, retry_after


class _OneOf:
    """Makes a union report one plain sentence at its own place instead of one report for each member."""

    def __init__(self, message: str):
        self.message = message

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        union: Any = schema["schema"] if schema["type"] == "nullable" else schema
        if union["type"] == "union":
            union["custom_error_type"] = "kind"
            union["custom_error_message"] = self.message
        return schema


Whole = Annotated[int, Field(ge=-WHOLE, lt=WHOLE)]
Text = Annotated[str, StringConstraints(max_length=TEXT)]
Scalar = Whole | float | bool | Text | None
Id = Annotated[
    Whole | Annotated[str, StringConstraints(min_length=1, max_length=ID)],
    _OneOf(f"must be a whole number of 64 bits or a text of 1 to {ID} characters"),
]
Value = Annotated[
    Scalar | Annotated[list[Scalar], Field(max_length=LIST)],
    _OneOf(
        f"must be null, true, false, a finite number (whole ones of 64 bits), a text of up to {TEXT:,} characters "
        f"or a list of up to {LIST:,} of these"
    ),
]
Time = Annotated[
    Annotated[int, Field(ge=-EXACT, le=EXACT)]
    | Annotated[float, Field(ge=-EXACT, le=EXACT)]
    | Annotated[str, StringConstraints(min_length=8, max_length=40)],
    _OneOf("must be a finite number in the log's unit, or a moment as ISO 8601 where the log has timestamps"),
]
Name = Annotated[str, StringConstraints(min_length=1, max_length=NAME)]


class Strict(BaseModel):
    """A record that takes nothing for something else, and refuses unknown fields."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class Candidate(BaseModel):
    """An item with columns that only this request knows of it."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    __pydantic_extra__: dict[str, Value] = Field(init=False)

    id: Id


class RankRequest(Strict):
    """Which of these candidates for this user?"""

    user: Id
    candidates: Annotated[
        list[Annotated[Id | Candidate, _OneOf('must be an id, or an object {"id": ..., columns...}')]],
        Field(min_length=1, max_length=MOST),
    ]
    context: dict[str, Value] = Field({}, max_length=LIST)
    time: Time | None = Field(None, description="when it is asked, by default now")
    model: Name | None = Field(None, description="by default the one of the user's bucket")
    tasks: list[Name] | None = Field(None, min_length=1, max_length=100, description="whose scores to give")


class ExplainRequest(RankRequest):
    """What carried the scores of these candidates?"""


class RecommendRequest(Strict):
    """Which of all items for this user?"""

    user: Id
    k: int = Field(20, ge=1, le=MOST)
    retrieve: int = Field(500, ge=1, le=MOST, description="items that are ranked")
    filter_seen: bool = True
    allow: list[Id] | None = Field(None, max_length=MOST, description="these items and no others")
    deny: list[Id] = Field([], max_length=MOST)
    context: dict[str, Value] = Field({}, max_length=LIST)
    time: Time | None = None
    model: Name | None = Field(None, description="the one that ranks; by default that of the user's bucket")
    retriever: Name | None = Field(None, description='a model that retrieves, or "popularity"')


class Event(BaseModel):
    """A row of the log: what was shown and what the user did."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    __pydantic_extra__: dict[str, Value] = Field(init=False)

    event_id: Annotated[str, StringConstraints(min_length=1, max_length=ID)]
    user: Id
    time: Time


class EventsRequest(Strict):
    """Events, all of them taken or none; each `event_id` counts once."""

    events: list[Event] = Field(min_length=1, max_length=10_000)


class ActivateRequest(Strict):
    """Which bundle a model's name shall stand for from now on."""

    path: Annotated[str, StringConstraints(min_length=1, max_length=4_096)] | None = Field(
        None, description="a bundle's folder beside those that the service was started with; default: the same again"
    )


Read = TypeVar("Read", bound=BaseModel)


def read(kind: type[Read], body: bytes) -> Read:
    """A request from the bytes of its body.

    Raises:
        Refused: 400 where it is not JSON, 422 where a field is wrong, which is named.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        if first["type"] == "json_invalid":
            raise Refused(400, f"not JSON: {first['msg'][:200]}", "body") from None
        message, where = first["msg"], first["loc"]
        if len(where) == 2 and where[0] == "candidates":
            message, where = _inside(body, where) or (message, where)
        raise Refused(422, message[:300], path(where) or "body") from None


def _inside(body: bytes, where: tuple[int | str, ...]) -> tuple[str, tuple[int | str, ...]] | None:
    """What is wrong inside a candidate that is an object; reading stays fast where all is well."""
    try:
        Candidate.model_validate_json(json.dumps(json.loads(body)[where[0]][where[1]]))
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        return (first["msg"], (*where, *first["loc"])) if first["loc"] else None
    except (ValueError, RecursionError):
        pass
    return None


def path(location: tuple[int | str, ...]) -> str:
    """`events[3].time` of ("events", 3, "time")."""
    text = ""
    for part in location:
        text += f"[{part}]" if isinstance(part, int) else f".{part[:NAME]}" if text else part[:NAME]
    return text

"""What is answered: records for the OpenAPI document and for readers, and the plain dicts that are really sent.

An answer is not validated again: tests hold it against its record.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from scalerec.features import history

if TYPE_CHECKING:
    from scalerec.serving.models import Served

Id = int | str


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Item(_Answer):
    """A candidate with its scores."""

    id: Id
    score: float | None = Field(description="fused over the tasks")
    scores: dict[str, float | None] = Field(description="probability by task")


class Ranked(_Answer):
    """Candidates, best first."""

    request_id: str
    model: str
    version: str
    bucket: int | None = Field(description="the user's bucket, 0 to 9999; null where the request named the model")
    items: list[Item]
    cold: bool = Field(description="the user has no history")
    stale: bool = Field(description="the store is unavailable: the history is the last known one")
    time: float | str | None = Field(description="the moment the scores are of")
    clock_behind: bool = Field(description="the request's time was before the user's last event, whose time was taken")
    unknown_items: list[Id] = Field(description="candidates that the bundle does not know")
    defaults: list[str] = Field(description="input columns that nobody gave, read as missing or by their default")
    timing: dict[str, float] = Field(description="milliseconds: store, features, user, candidates, total")


class Retrieved(_Answer):
    """An item that was found, and where it stood before ranking."""

    id: Id
    place: int
    similarity: float | None


class Recommended(Ranked):
    """The best of all items."""

    retrieved: list[Retrieved]
    source: str = Field(description='the model that retrieved, or "popularity"')
    removed: dict[str, int] = Field(description="items kept out by each filter: seen, deny, allow")


class Explained(_Answer):
    """How much of each candidate's fused score goes when one token is left out."""

    request_id: str
    model: str
    version: str
    tokens: list[str]
    tasks: list[str]
    scores: list[float | None]
    effect: list[list[float | None]] = Field(description="one row for each token, one number for each candidate")
    reason: str = Field(description="why there are no tokens, where there are none")


class Appended(_Answer):
    """How many events are new, and how many were there already."""

    appended: int
    repeated: int


class User(_Answer):
    """What the service knows of one user."""

    user: Id
    columns: dict[str, Any]
    history: dict[str, list[dict[str, Any]]]


class Users(_Answer):
    users: list[Id]


class ItemRow(_Answer):
    """The columns of one item."""

    id: Id
    columns: dict[str, Any]


class Log(_Answer):
    """Names of the log's columns that an event needs."""

    user: str
    item: str | None
    time: str | None
    time_unit: float = Field(description="seconds in one unit of a numeric time")
    labels: list[str] = Field(description="what the user did: of tasks, and what decides which events are kept")
    columns: list[str] = Field(description="other columns that histories are made of; those of a known item are known")


class ModelRow(_Answer):
    """One loaded bundle."""

    name: str
    version: str
    precision: str
    ranks: bool
    retrieves: bool
    tasks: list[str]
    active: bool = Field(description="requests that name no model may get it")
    default: bool = Field(description="the one that most of them get")
    items: int = Field(description="of the catalogue")
    context: dict[str, Any] = Field(description="columns of the moment, with what is taken where a request has none")
    context_columns: list[str] = Field(description="all that a request's context may set: of the moment and the user")
    log: Log


class Models(_Answer):
    models: list[ModelRow]
    weights: dict[str, float]


class Activated(_Answer):
    name: str
    version: str
    previous: str


class Health(_Answer):
    status: str


class Ready(_Answer):
    ready: bool
    store: bool
    models: int
    draining: bool


class Refusal(_Answer):
    """Why a request was not answered, and which of its fields has to change."""

    error: str
    field: str


def order_of(served: Served, scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Best first (equal ones as they were asked), and the fused score [B]."""
    fused = served.engine.fused(scores)
    return np.argsort(-fused, kind="stable"), fused


def items_of(
    served: Served, ids: Sequence[Any], order: np.ndarray, fused: np.ndarray, scores: np.ndarray, tasks: Sequence[str]
) -> list[dict[str, Any]]:
    columns = [served.engine.tasks.index(task) for task in tasks]
    rows = scores[order][:, columns].tolist()
    return [
        {"id": ids[place], "score": score, "scores": dict(zip(tasks, row))}
        for place, score, row in zip(order.tolist(), fused[order].tolist(), rows)
    ]


def model_of(one: Served, weights: Mapping[str, float], default: bool) -> dict[str, Any]:
    schema, needed = one.engine.schema, history.columns(one.engine.schema)
    marks = [sequence.where for sequence in schema.sequences if sequence.where]
    labels = list(dict.fromkeys([*(task.column for task in schema.tasks), *marks]))
    others = [name for name in needed if name not in (schema.user, schema.item, schema.time, *labels)]
    return {
        "name": one.name, "version": one.bundle.version, "precision": one.bundle.precision, "ranks": one.ranks,
        "retrieves": one.searching is not None, "tasks": list(one.engine.tasks), "active": weights[one.name] > 0,
        "default": default, "items": len(one.places), "context": dict(one.bundle.context),
        "context_columns": one.columns.of_context,
        "log": {
            "user": schema.user, "item": schema.item, "time": schema.time, "time_unit": schema.time_unit,
            "labels": labels, "columns": others,
        },
    }  # fmt: skip

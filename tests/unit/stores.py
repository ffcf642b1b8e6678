"""A schema with every kind of sequence, events for it, and a Redis to keep them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from scalerec.schema import Categorical, Group, Schema, Sequence, SequenceField, Task
from scalerec.serving.events import Event
from scalerec.serving.redis_store import RedisStore
from scalerec.serving.store import open_store

ITEM = (SequenceField(of="item"),)
SCHEMA = Schema(
    groups=(
        Group(
            name="past",
            side="user",
            features=(
                Categorical(name="user"),
                Sequence(name="all", fields=(*ITEM, SequenceField(of="maker")), time=True, actions=("buy",), max_len=3),
                Sequence(name="liked", fields=ITEM, where="like", max_len=2),
                Sequence(name="slow", fields=(SequenceField(of="maker"),), runs=True, max_len=2),
            ),
        ),
        Group(
            name="item", side="item", features=(Categorical(name="item", column="item_id"), Categorical(name="maker"))
        ),
    ),
    tasks=(Task(name="like"), Task(name="buy", mask="shown")),
    user="user",
    item="item_id",
    time="time",
)
LISTS = [column for sequence in SCHEMA.sequences for column in sequence.list_columns()]
TYPES = {
    "user": pa.int64(), "time": pa.int64(), "item_id": pa.int64(), "maker": pa.string(), "like": pa.int8(),
    "buy": pa.int8(), "shown": pa.int8(),
}  # fmt: skip


def columns(**changes: Any) -> dict[str, Any]:
    return {"time": 10, "item_id": 5, "maker": "m", "like": 1, "buy": 0, "shown": 1} | changes


def event(name: str, user: Any = 1, **changes: Any) -> Event:
    return Event(name, user, columns(**changes))


def emptied(url: str) -> None:
    store = open_store(url, SCHEMA)
    assert isinstance(store, RedisStore)
    store._redis.flushall()
    store.close()

"""A data set that fits on a page and holds every kind of feature: what all contract checks run on."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from scalerec.batch import Batch, Jagged, Rows
from scalerec.features.encoder import Encoder
from scalerec.schema import (
    Categorical,
    Cross,
    Group,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
    SequenceField,
    Task,
)

USERS, ROWS_A_USER, ITEMS = 12, 5, 16

SCHEMA = Schema(
    groups=(
        Group(
            name="profile",
            side="user",
            features=(
                Categorical(name="user"),
                Categorical(name="city", vocabulary="hash", buckets=20, dim=4),
                Numeric(name="age", buckets=4),
                Numeric(name="income", encoding="linear", dim=5),
                MultiCategorical(name="interests", dim=6),
            ),
        ),
        Group(
            name="past",
            side="user",
            features=(
                # Read with the candidate as query: both fields are features of the item side.
                Sequence(
                    name="seen",
                    fields=(SequenceField(of="item"), SequenceField(of="author")),
                    time=True,
                    actions=("click",),
                    max_len=4,
                ),
                # No candidate has a city, so this one can only be averaged.
                Sequence(name="visited", fields=(SequenceField(of="city"),), max_len=3),
            ),
        ),
        Group(
            name="item",
            side="item",
            features=(
                Categorical(name="item"),
                Categorical(name="author", vocabulary="hash", buckets=10, dim=4),
                MultiCategorical(name="words", separator="|", pooling="sum", dim=6, max_len=3),
            ),
        ),
        Group(
            name="figures",
            side="item",
            features=(
                Numeric(name="price", encoding="linear", log=False, dim=3),
                Numeric(name="views", buckets=5, dim=4),
                Cross(name="city_author", of=("city", "author"), buckets=30, dim=4),
            ),
        ),
    ),
    tasks=(Task(name="click"), Task(name="buy", mask="click", weight="worth")),
    user="user",
    item="item",
    time="time",
    dim=8,
)


@dataclass(frozen=True, repr=False)
class World:
    """Raw rows, the encoder fitted on them, and the batch that it makes of them."""

    rows: pa.RecordBatch
    encoder: Encoder
    batch: Batch


def make_world() -> World:
    """60 rows of 12 users; `click` depends on the item alone, `buy` on the user alone, so both are easy to learn."""
    rows = pa.RecordBatch.from_pylist([row(user, number) for number in range(ROWS_A_USER) for user in range(USERS)])
    encoder = Encoder.fit(SCHEMA, [rows])
    batch = encoder.encode(rows)
    assert len(batch.user) == USERS
    return World(rows, encoder, batch)


def row(user: int, number: int) -> dict[str, object]:
    """A raw row; what belongs to the user is the same in all of their rows."""
    random = np.random.default_rng([user, number])
    own = np.random.default_rng(user)
    past = 0 if user % 4 == 1 else user % 6 + 1
    item = int(random.integers(ITEMS))
    return {
        "user": f"u{user}",
        "city": f"c{user % 5}",
        "age": None if user % 5 == 2 else float(own.integers(18, 70)),
        "income": None if user % 3 == 2 else float(own.normal(50, 10)),
        "interests": [f"i{value}" for value in own.integers(0, 6, user % 3)],
        "seen_item": own.integers(0, ITEMS, past).tolist(),
        "seen_author": [f"a{value}" for value in own.integers(0, 8, past)],
        "seen_time": (1e9 + np.sort(own.integers(0, 1000, past))).tolist(),
        "seen_click": own.integers(0, 2, past).tolist(),
        "visited_city": None if user % 3 == 0 else [f"c{value}" for value in own.integers(0, 5, user % 4)],
        "time": 1e9 + 2000,
        "item": item,
        "author": f"a{item % 7}",
        "words": "|".join(f"w{value}" for value in random.integers(0, 9, item % 4)),
        "price": None if item % 5 == 4 else float(item) + 0.5,
        "views": None if item % 6 == 5 else int(random.integers(0, 1000)),
        "click": item % 2,
        "buy": user % 2,
        "worth": 1.0 + item % 3,
    }


def without_pasts(batch: Batch) -> Batch:
    """The same rows, each user's histories empty."""

    def empty(jagged: Jagged) -> Jagged:
        return Jagged(jagged.values[:0], torch.zeros_like(jagged.offsets))

    pasts = [sequence.name for sequence in SCHEMA.sequences]
    lists = {name: empty(value) if name in pasts else value for name, value in batch.user.lists.items()}
    times = {name: empty(value) for name, value in batch.user.times.items()}
    actions = {name: empty(value) for name, value in batch.user.actions.items()}
    return replace(batch, user=replace(batch.user, lists=lists, times=times, actions=actions))


def other_items(batch: Batch) -> Batch:
    """The same users and rows with the candidates moved on by one place."""
    items: Rows = batch.items.take(torch.arange(len(batch)).roll(1))
    return replace(batch, items=items)

"""What the MovieLens sources share: ratings, users and items as tables -> rows of a ranking log."""

from __future__ import annotations

import hashlib
import re
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalerec.data.download import fetch_zip
from scalerec.data.parts import ROW_GROUP, write_parts
from scalerec.data.running import Earlier, codes, rate
from scalerec.data.source import Source, cache_root, data_root
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.schema import (
    Categorical,
    Cross,
    Feature,
    Group,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
    SequenceField,
    Side,
    Task,
)

LIKED, DISLIKED = 4, 2  # stars: at least, at most
AGES = (1, 18, 25, 35, 45, 50, 56)  # lower ends of the buckets


class Tables(NamedTuple):
    """The data set in one form, wherever it came from."""

    ratings: pa.Table  # user_id, item_id, rating, time (unix seconds); a user's equal times in this order
    users: pa.Table  # user_id, age, gender, occupation, zip3
    items: pa.Table  # item_id, year, genres ("A|B")
    notes: dict[str, Any]


class MovieLens(Source):
    """Ratings as a ranking log: will the user like (4 or 5 stars) or dislike (1 or 2) what he rates next?"""

    @abstractmethod
    def read(self, progress: Callable[[str], None]) -> Tables: ...

    def schema(self) -> Schema:
        past = (SequenceField(of="item_id"), SequenceField(of="year"))
        groups = (
            _group("user", "user", "user_id age gender occupation zip3"),
            _group("user_so_far", "user", "", f"user_seconds_since_previous {_so_far('user')}"),
            Group(
                name="history",
                side="user",
                features=(
                    Sequence(name="rated", fields=past, time=True),
                    Sequence(name="liked", fields=past, time=True, where="like"),
                    Sequence(name="disliked", fields=past, time=True, where="dislike"),
                ),
            ),
            _group("item", "item", "item_id year genre_set", "", MultiCategorical(name="genres", separator="|")),
            _group("item_so_far", "item", "", f"item_seconds_since_previous {_so_far('item')}"),
            _group(
                "affinity",
                "item",
                "",
                "user_genre_ratings user_genre_mean_rating user_genre_like_rate",
                *(Cross(name=f"{who}_x_genre_set", of=(who, "genre_set")) for who in ("age", "gender", "occupation")),
            ),
            _group("context", "item", "hour weekday", "", Cross(name="weekday_x_hour", of=("weekday", "hour"))),
        )
        tasks = (Task(name="like"), Task(name="dislike"))
        return Schema(groups=groups, tasks=tasks, user="user_id", item="item_id", time="time")

    def build(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        ratings, users, items, notes = self.read(progress)
        order = np.lexsort((np.arange(ratings.num_rows), ratings["user_id"].to_numpy(), ratings["time"].to_numpy()))
        rows = ratings.take(pa.array(order))
        stars = rows["rating"].to_numpy()
        for name, label in {"like": stars >= LIKED, "dislike": stars <= DISLIKED}.items():
            rows = rows.append_column(name, pa.array(label.astype(np.int8)))
        items = items.append_column("genre_set", items["genres"])
        rows = _joined(_joined(rows, users, "user_id"), items, "item_id")
        rows = _with_running_statistics(_with_clock(rows))
        progress(f"{rows.num_rows:,} ratings; writing them with their histories")
        write_parts(folder, history.replay_pieces(self.schema(), rows, size=ROW_GROUP))
        return notes | {
            "rows": rows.num_rows,
            "users": pc.count_distinct(rows["user_id"]).as_py(),
            "items": pc.count_distinct(rows["item_id"]).as_py(),
            "rates": {name: round(pc.mean(rows[name]).as_py(), 4) for name in ("like", "dislike")},
        }


def find(name: str, files: tuple[str, ...]) -> Path | None:
    """The folder `name` with one of the files, under $SCALEREC_DATA or among the downloads."""
    folders = [root / name for root in (data_root(), cache_root() / "downloads") if root is not None]
    return next((folder for folder in folders if any((folder / file).exists() for file in files)), None)


Fetch = tuple[str, Callable[[Path], None]]  # from where, and how to get it into a folder


def official(name: str, files: tuple[str, ...]) -> Fetch:
    url = f"https://files.grouplens.org/datasets/movielens/{name}.zip"
    return url, lambda folder: fetch_zip(url, files, folder)


def fetch(name: str, ways: list[Fetch], progress: Callable[[str], None]) -> Path:
    """Get the folder `name` into the downloads, the first way that works; InputError with all that was tried."""
    folder = cache_root() / "downloads" / name
    tried = [str(root / name) for root in (data_root(), cache_root() / "downloads") if root is not None]
    for where, way in ways:
        progress(f"fetching {name} from {where}")
        try:
            way(folder)
            return folder
        except OSError as error:
            progress(f"{where}: {error}")
            tried.append(f"{where} ({error})")
    raise InputError(f"{name} is not to be had; tried {'; '.join(tried)}: put its folder there and set SCALEREC_DATA")


def check(ratings: pa.Table, file: Path, expected: str) -> None:
    """InputError unless the ratings, in whatever order, are those of the published data set."""
    columns = [ratings[name].to_numpy().astype("<i8") for name in ("user_id", "item_id", "rating", "time")]
    rows = np.stack(columns, 1)[np.lexsort(columns[::-1])]
    found = hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()
    if found != expected:
        raise InputError(
            f"{file}: not the published ratings ({len(rows)} rows, checksum {found[:12]}, not {expected[:12]}): delete "
            "its folder to have it fetched again"
        )


def title_year(title: str) -> int | None:
    """1995 of "Toy Story (1995)"."""
    years = re.findall(r"\((\d{4})\)", title)
    return int(years[-1]) if years else None


def age_bucket(age: int) -> int:
    return max(bucket for bucket in AGES if bucket <= max(age, 1))


def _group(name: str, side: Side, categorical: str, numeric: str = "", *others: Feature) -> Group:
    """A group of plain features, their columns given in one text each, and others."""
    numbers = [Numeric(name=column, log=column.endswith(("_ratings", "_previous"))) for column in numeric.split()]
    ids = [Categorical(name=column) for column in categorical.split()]
    return Group(name=name, side=side, features=(*ids, *numbers, *others))


def _so_far(key: str) -> str:
    return f"{key}_ratings {key}_mean_rating {key}_like_rate {key}_dislike_rate"


def _joined(rows: pa.Table, table: pa.Table, key: str) -> pa.Table:
    place = pc.index_in(rows[key], value_set=table[key].combine_chunks())
    for name in table.column_names:
        if name != key:
            rows = rows.append_column(name, table[name].take(place))
    return rows


def _with_clock(rows: pa.Table) -> pa.Table:
    """Adds hour and weekday (0 is Monday) in UTC."""
    times = rows["time"].to_numpy()
    rows = rows.append_column("hour", pa.array(times // 3600 % 24))
    return rows.append_column("weekday", pa.array((times // 86_400 + 3) % 7))


def _with_running_statistics(rows: pa.Table) -> pa.Table:
    """Adds what had been rated before each row: by its user, of its item, by its user in the item's genres."""
    times = rows["time"].to_numpy()
    happened = {name: rows[name].to_numpy() for name in ("rating", "like", "dislike")}
    everything = Earlier(np.zeros(len(times), np.int64), times)
    prior = {"rating": 3.0, "like": 0.5, "dislike": 0.5}
    expected = {name: rate(everything.sum(happened[name]), everything.count(), prior[name]) for name in happened}
    columns: dict[str, np.ndarray] = {}
    for key in ("user", "item"):
        earlier = Earlier(codes(rows[f"{key}_id"]), times)
        count = earlier.count()
        means = {name: rate(earlier.sum(values), count, expected[name]) for name, values in happened.items()}
        columns[f"{key}_ratings"] = count
        columns[f"{key}_mean_rating"] = means["rating"]
        columns[f"{key}_like_rate"] = means["like"]
        columns[f"{key}_dislike_rate"] = means["dislike"]
        columns[f"{key}_seconds_since_previous"] = times - earlier.time()
        if key == "user":
            expected_of_user = means

    lists = pc.split_pattern(rows["genres"], "|").combine_chunks()
    row = pc.list_parent_indices(lists).to_numpy()
    genre = pa.chunked_array([pc.list_flatten(lists)])
    user = pa.chunked_array([rows["user_id"].combine_chunks().take(pa.array(row))])
    earlier = Earlier(codes(user, genre), times[row])

    def of_row(values: np.ndarray) -> np.ndarray:
        return np.bincount(row, values, minlength=len(times))

    count = of_row(earlier.count())
    columns["user_genre_ratings"] = count
    for name, column in {"rating": "mean_rating", "like": "like_rate"}.items():
        total = of_row(earlier.sum(happened[name][row]))
        columns[f"user_genre_{column}"] = rate(total, count, expected_of_user[name])
    for name, values in columns.items():
        rows = rows.append_column(name, pa.array(values.astype(np.float32), from_pandas=True))
    return rows

"""MovieLens 1M (Harper and Konstan, 2015): 1,000,209 ratings of 3,706 films by 6,040 users, 2000-04 to 2003-02.

Reads the official files, or a copy in which the order of each user's ratings is known but most times are estimates.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq

from scalerec.data.sources._movielens import MovieLens, Tables, fetch, find, official, title_year
from scalerec.data.split import Split, TimeSplit
from scalerec.errors import InputError

FOLDER = "ml-1m"
FILES = ("ratings.dat", "users.dat", "movies.dat")
COPY_FILES = ("ratings.parquet", "users.parquet", "movies.parquet")


class MovieLens1M(MovieLens):
    """The ratings in time order, cut 80/10/10."""

    kind: Literal["movielens_1m"] = "movielens_1m"
    split: Split = TimeSplit(column="time", validation=975_800_329, test=978_225_365)

    def read(self, progress: Callable[[str], None]) -> Tables:
        folder = find(FOLDER, (FILES[0], COPY_FILES[0])) or fetch(FOLDER, [official(FOLDER, FILES)], progress)
        progress(f"reading {folder}")
        return _read_official(folder) if (folder / FILES[0]).exists() else _read_copy(folder)


def _read_official(folder: Path) -> Tables:
    """In the order of the file, which decides between a user's equal times."""
    ratings = _dat(folder / "ratings.dat", "user_id item_id rating time")
    users = _dat(folder / "users.dat", "user_id gender age occupation zip")
    movies = _dat(folder / "movies.dat", "item_id title genres")
    return Tables(ratings, _users(users), _items(movies), {"times": "exact"})


def _read_copy(folder: Path) -> Tables:
    """In the order of `seq_pos` inside a user; ratings without one have neither order nor time."""
    ratings, users, movies = (pq.read_table(folder / name) for name in COPY_FILES)
    kept = ratings.filter(pc.is_valid(ratings["seq_pos"]))
    place, user = kept["seq_pos"].to_numpy(), kept["user_id"].to_numpy()
    kept = kept.take(pa.array(np.lexsort((place, user))))
    times, user = kept["ts_est"].to_numpy().astype(np.int64), kept["user_id"].to_numpy()
    back = np.flatnonzero((times[1:] < times[:-1]) & (user[1:] == user[:-1]))
    if back.size:
        raise InputError(f"{folder / COPY_FILES[0]}: user {user[back[0]]}: ts_est goes back along seq_pos")
    exact = pc.sum(pc.is_valid(kept["ts_exact"])).as_py() / kept.num_rows
    notes = {
        "times": f"{exact:.1%} exact, {1 - exact:.1%} interpolated between exact ones; the order in a user is exact",
        "dropped_without_order": ratings.num_rows - kept.num_rows,
    }
    renamed = kept.select(["user_id", "movie_id", "rating"]).rename_columns(["user_id", "item_id", "rating"])
    wide = [renamed[name].cast(pa.int64()) for name in renamed.column_names]
    return Tables(
        pa.table([*wide, pa.array(times)], names=[*renamed.column_names, "time"]),
        _users(users),
        _items(movies.rename_columns(["item_id" if name == "movie_id" else name for name in movies.column_names])),
        notes,
    )


def _users(users: pa.Table) -> pa.Table:
    zip3 = pc.utf8_slice_codeunits(users["zip"].cast(pa.string()), 0, 3)
    columns = {name: users[name].cast(pa.int64()) for name in ("user_id", "age", "occupation")}
    return pa.table(columns | {"gender": users["gender"].cast(pa.string()), "zip3": zip3})


def _items(movies: pa.Table) -> pa.Table:
    years = pa.array([title_year(title) for title in movies["title"].to_pylist()], pa.int64())
    genres = movies["genres"].cast(pa.string())
    return pa.table({"item_id": movies["item_id"].cast(pa.int64()), "year": years, "genres": genres})


def _dat(path: Path, columns: str) -> pa.Table:
    """A file with fields between "::", Latin-1, without a header."""
    if not path.exists():
        raise InputError(f"{path}: no such file; unpack the whole {FOLDER} archive")
    return csv.read_csv(
        io.BytesIO(path.read_bytes().replace(b"::", b"\t")),
        read_options=csv.ReadOptions(column_names=columns.split(), encoding="latin1"),
        parse_options=csv.ParseOptions(delimiter="\t", quote_char=False),
        convert_options=csv.ConvertOptions(column_types={"zip": pa.string(), "title": pa.string()}),
    )

"""MovieLens 100K (Harper and Konstan, 2015): 100,000 ratings of 1,682 films by 943 users, 1997-09 to 1998-04.

Reads the official files or the same rows in RecBole's atomic files. Those write titles otherwise, give the year of the
title where the official file has the release date, and spell genres out: here the year is the title's in both.
"""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pyarrow as pa

from scalerec.data.download import fetch_from_wheel
from scalerec.data.sources._movielens import MovieLens, Tables, age_bucket, check, fetch, find, official, title_year
from scalerec.data.split import Split, TimeSplit
from scalerec.errors import InputError

FOLDER = "ml-100k"
FILES = ("u.data", "u.item", "u.user", "u.genre")
RECBOLE, RECBOLE_FILES = "recbole==1.2.1", ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
SHA256 = "ec862504a8c24b195f5194e51fb18bb2d59428d00d96d6d1c63433a3bd5f2f47"  # of the sorted ratings


class MovieLens100K(MovieLens):
    """The ratings in time order, cut 80/10/10."""

    kind: Literal["movielens_100k"] = "movielens_100k"
    split: Split = TimeSplit(column="time", validation=889_237_269, test=891_382_309)

    def read(self, progress: Callable[[str], None]) -> Tables:
        folder = find(FOLDER, (FILES[0], RECBOLE_FILES[0]))
        if folder is None:
            copy = f"the copy inside the {RECBOLE} wheel", lambda path: fetch_from_wheel(RECBOLE, RECBOLE_FILES, path)
            folder = fetch(FOLDER, [official(FOLDER, FILES), copy], progress)
        progress(f"reading {folder}")
        is_official = (folder / FILES[0]).exists()
        tables = _read_official(folder) if is_official else _read_recbole(folder)
        check(tables.ratings, folder / (FILES if is_official else RECBOLE_FILES)[0], SHA256)
        return tables


def _read_official(folder: Path) -> Tables:
    genres = [name for name, _ in _rows(folder / "u.genre", "|", 2)]
    items = [
        (int(row[0]), title_year(row[1]), "|".join(name for name, flag in zip(genres, row[5:]) if flag == "1"))
        for row in _rows(folder / "u.item", "|", 24)
    ]
    users = [(row[0], row[1], row[2], row[3], row[4]) for row in _rows(folder / "u.user", "|", 5)]
    return _tables(_rows(folder / "u.data", "\t", 4), users, items)


def _read_recbole(folder: Path) -> Tables:
    ratings, items, users = (
        _rows(folder / name, "\t", width, header=True) for name, width in zip(RECBOLE_FILES, (4, 4, 5))
    )
    films = [
        (int(item), int(year) if year.isdigit() else title_year(title), genres.replace(" ", "|"))
        for item, title, year, genres in items
    ]
    return _tables(ratings, [(user, age, gender, work, code) for user, age, gender, work, code in users], films)


def _tables(ratings: list[list[str]], users: list[tuple[str, ...]], items: list[tuple[int, int | None, str]]) -> Tables:
    """Ratings by user, then item, so that equal times have one order whatever the file's."""
    numbers = sorted((int(user), int(item), int(rating), int(float(time))) for user, item, rating, time in ratings)
    return Tables(
        _columns(numbers, ("user_id", "item_id", "rating", "time")),
        _columns(
            [(int(user), age_bucket(int(age)), gender, work, code[:3]) for user, age, gender, work, code in users],
            ("user_id", "age", "gender", "occupation", "zip3"),
        ),
        _columns(items, ("item_id", "year", "genres")),
        {},
    )


def _columns(rows: list, names: tuple[str, ...]) -> pa.Table:
    return pa.table(dict(zip(names, map(pa.array, zip(*rows)))))


def _rows(path: Path, separator: str, width: int, header: bool = False) -> list[list[str]]:
    """The lines of a text file cut at the separator; the official files are Latin-1, RecBole's UTF-8 have a header."""
    with path.open(encoding="utf-8" if header else "latin-1", newline="") as file:
        rows = [row for row in csv.reader(file, delimiter=separator, quoting=csv.QUOTE_NONE) if row]
    short = next((i for i, row in enumerate(rows) if len(row) != width), None)
    if short is not None:
        raise InputError(f"{path}: row {short + 1} has {len(rows[short])} fields, not {width}: fetch the file again")
    return rows[1:] if header else rows

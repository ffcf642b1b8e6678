"""MovieLens: the official files, RecBole's and the re-assembled ones, all tiny; where the data comes from."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from scalerec.data.source import Source
from scalerec.data.sources import _movielens, movielens_100k
from scalerec.data.sources.movielens_1m import MovieLens1M
from scalerec.data.sources.movielens_100k import MovieLens100K
from scalerec.errors import InputError


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCALEREC_DATA", str(tmp_path / "data"))


def prepared(source: Source) -> pa.Table:
    table = pa.concat_tables(pq.read_table(file) for file in source.prepare().files)
    schema = source.schema()
    assert schema.time is not None
    assert set(schema.input_columns() + schema.label_columns() + [schema.time]) <= set(table.column_names)
    return table


def write(path: Path, header: str, rows: list, separator: str = ",", encoding: str = "utf-8") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ([header] if header else []) + [separator.join(map(str, row)) for row in rows]
    path.write_bytes(("\n".join(lines) + "\n").encode(encoding))


FILMS = {
    1: ("Toy Story (1995)", "Animation|Comedy"),
    2: ("Caché, Le (2005)", "Drama"),
    3: ("Alien (1979)", "Drama|Sci-Fi"),
}
PEOPLE = {1: (24, "M", "technician", "85711"), 2: (7, "F", "student", "T8H1N"), 3: (73, "M", "retired", "55455")}
GENRES = ["unknown", "Animation", "Comedy", "Drama", "Sci-Fi", *(f"other{i}" for i in range(14))]


def stars(count: int = 9, seed: int = 0) -> list[tuple[int, int, int, int]]:
    draw = random.Random(seed)
    pairs = [(user, film) for user in PEOPLE for film in FILMS]
    draw.shuffle(pairs)
    return [(u, i, draw.randrange(1, 6), 881_250_949 + draw.randrange(5) * 4_000) for u, i in pairs[:count]]


def write_official_100k(folder: Path, ratings: list) -> None:
    write(folder / "u.data", "", ratings, "\t")
    write(folder / "u.genre", "", [(name, i) for i, name in enumerate(GENRES)], "|")
    flags = {film: [int(name in genres.split("|")) for name in GENRES] for film, (_, genres) in FILMS.items()}
    films = [(film, title, "01-Jan-1996", "", "http://x", *flags[film]) for film, (title, _) in FILMS.items()]
    write(folder / "u.item", "", films, "|", "latin-1")
    write(folder / "u.user", "", [(user, *person) for user, person in PEOPLE.items()], "|")


def write_recbole_100k(folder: Path, ratings: list) -> None:
    write(folder / "ml-100k.inter", "user_id:token\titem_id:token\trating:float\ttimestamp:float", ratings, "\t")
    films = [(film, title[:-7], title[-5:-1], genres.replace("|", " ")) for film, (title, genres) in FILMS.items()]
    write(
        folder / "ml-100k.item",
        "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq",
        films,
        "\t",
    )
    people = [(user, *person) for user, person in PEOPLE.items()]
    write(
        folder / "ml-100k.user",
        "user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token",
        people,
        "\t",
    )


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(movielens_100k, "check", lambda ratings, file, expected: None)


@pytest.mark.usefixtures("unchecked")
def test_movielens_100k_is_the_same_from_either_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ratings = stars()
    write_official_100k(tmp_path / "data" / "ml-100k", ratings)
    first = prepared(MovieLens100K())
    monkeypatch.delenv("SCALEREC_DATA")
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "another"))
    write_recbole_100k(tmp_path / "another" / "downloads" / "ml-100k", ratings[::-1])
    assert prepared(MovieLens100K()) == first
    row = next(row for row in first.to_pylist() if (row["user_id"], row["item_id"]) == (2, 2))
    assert (row["year"], row["genres"], row["age"], row["zip3"]) == (2005, "Drama", 1, "T8H")
    rating = next(r for u, i, r, _ in ratings if (u, i) == (2, 2))
    assert (row["rating"], row["like"], row["dislike"]) == (rating, rating >= 4, rating <= 2)


@pytest.mark.usefixtures("unchecked")
def test_movielens_running_statistics_equal_a_loop(tmp_path: Path) -> None:
    write_official_100k(tmp_path / "data" / "ml-100k", stars())
    rows = prepared(MovieLens100K()).to_pylist()
    assert [row["time"] for row in rows] == sorted(row["time"] for row in rows)

    def mean(past: list[dict], prior: float) -> float:
        return (sum(r["rating"] for r in past) + 10 * prior) / (len(past) + 10)

    for row in rows:
        past = [r for r in rows if r["time"] < row["time"]]
        mine = [r for r in past if r["user_id"] == row["user_id"]]
        of_item = [r for r in past if r["item_id"] == row["item_id"]]
        assert (row["user_ratings"], row["item_ratings"]) == (len(mine), len(of_item))
        everybody = mean(past, 3.0)
        assert row["user_mean_rating"] == pytest.approx(mean(mine, everybody))
        assert row["item_mean_rating"] == pytest.approx(mean(of_item, everybody))
        genres = [r for g in row["genres"].split("|") for r in mine if g in r["genres"].split("|")]
        assert row["user_genre_ratings"] == len(genres)
        assert row["user_genre_mean_rating"] == pytest.approx(mean(genres, mean(mine, everybody)))
        assert row["rated_item_id"] == [r["item_id"] for r in mine]
        assert row["liked_time"] == [r["time"] for r in mine if r["rating"] >= 4]
        assert row["disliked_year"] == [r["year"] for r in mine if r["rating"] <= 2]


@pytest.mark.usefixtures("unchecked")
def test_movielens_features_do_not_depend_on_what_happens_now_or_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = stars()
    now = sorted(row[3] for row in log)[5]
    other = [(u, i, 6 - r if t >= now else r, t) for u, i, r, t in log]
    seen = []
    for rows, cache in ((log, "before"), (other, "after")):
        write_official_100k(tmp_path / "data" / "ml-100k", rows)
        monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / cache))
        table = prepared(MovieLens100K())
        seen.append(table.filter(pc.less_equal(table["time"], now)).select(MovieLens100K().schema().input_columns()))
    assert seen[0].num_rows >= 6
    assert seen[0] == seen[1]


def test_movielens_100k_refuses_other_ratings(tmp_path: Path) -> None:
    write_official_100k(tmp_path / "data" / "ml-100k", stars())
    with pytest.raises(InputError, match=r"u\.data: not the published ratings \(9 rows"):
        MovieLens100K().prepare()


def test_movielens_100k_names_a_cut_file(tmp_path: Path) -> None:
    write_official_100k(tmp_path / "data" / "ml-100k", stars())
    with (tmp_path / "data" / "ml-100k" / "u.data").open("a") as file:
        file.write("1\t2")
    with pytest.raises(InputError, match=r"u\.data: row 10 has 2 fields, not 4"):
        MovieLens100K().prepare()


@pytest.mark.usefixtures("unchecked")
def test_movielens_100k_falls_back_to_the_copy_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(_movielens, "fetch_zip", offline)
    monkeypatch.setattr(movielens_100k, "fetch_from_wheel", lambda name, files, path: write_recbole_100k(path, stars()))
    said: list[str] = []
    assert MovieLens100K().prepare(said.append).notes["rows"] == 9
    assert any("no route to host" in line for line in said)


def test_movielens_100k_lists_all_that_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(_movielens, "fetch_zip", offline)
    monkeypatch.setattr(movielens_100k, "fetch_from_wheel", offline)
    with pytest.raises(
        InputError, match=r"data/ml-100k; .*downloads/ml-100k; https://files\.grouplens.*recbole==1\.2\.1"
    ):
        MovieLens100K().prepare()


def write_users_and_movies_1m(folder: Path) -> None:
    people = [(user, sex, age, 4, zip_) for user, (age, sex, _, zip_) in PEOPLE.items()]
    write(folder / "users.dat", "", people, "::", "latin-1")
    write(folder / "movies.dat", "", [(film, *rest) for film, rest in FILMS.items()], "::", "latin-1")


def test_movielens_1m_official_files(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "ml-1m"
    write_users_and_movies_1m(folder)
    ratings = [(1, 3, 5, 100), (1, 1, 4, 50), (1, 2, 1, 50), (2, 1, 3, 70)]
    write(folder / "ratings.dat", "", ratings, "::", "latin-1")
    rows = prepared(MovieLens1M()).to_pylist()
    assert [(r["user_id"], r["item_id"], r["time"]) for r in rows] == [(1, 1, 50), (1, 2, 50), (2, 1, 70), (1, 3, 100)]
    assert rows[3]["rated_item_id"] == [1, 2]  # the order of the file between equal times
    assert (rows[1]["year"], rows[1]["zip3"], rows[1]["genre_set"]) == (2005, "857", "Drama")


def test_movielens_1m_copy_keeps_the_known_order(tmp_path: Path) -> None:
    folder = tmp_path / "data" / "ml-1m"
    folder.mkdir(parents=True)
    pq.write_table(
        pa.table(
            {
                "user_id": pa.array([1, 1, 1, 2, 1], pa.int16()),
                "movie_id": pa.array([3, 2, 1, 1, 1], pa.int16()),
                "rating": pa.array([5, 4, 3, 2, 1], pa.int8()),
                "seq_pos": pa.array([2, 1, 0, 0, None], pa.int16()),
                "ts_exact": pa.array([90, None, 50, 60, None], pa.int32()),
                "ts_est": pa.array([90, 50, 50, 60, None], pa.int32()),
            }
        ),
        folder / "ratings.parquet",
    )
    people = {"user_id": [1, 2], "gender": ["M", "F"], "age": [25, 1], "occupation": [4, 5], "zip": ["85711", "T8H1N"]}
    pq.write_table(pa.table(people), folder / "users.parquet")
    films = {"movie_id": list(FILMS), "title": [t for t, _ in FILMS.values()], "genres": [g for _, g in FILMS.values()]}
    pq.write_table(pa.table(films), folder / "movies.parquet")
    source = MovieLens1M()
    assert [(r["user_id"], r["item_id"]) for r in prepared(source).to_pylist()] == [(1, 1), (1, 2), (2, 1), (1, 3)]
    notes = source.prepare().notes
    assert notes["dropped_without_order"] == 1
    assert notes["times"].startswith("75.0% exact, 25.0% interpolated")

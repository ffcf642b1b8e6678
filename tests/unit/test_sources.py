"""The sources: official formats on tiny files, nothing that looks ahead, and teachers whose best score is known."""

from __future__ import annotations

import hashlib
import json
import os
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalerec.config import component
from scalerec.data import download, parts, running
from scalerec.data.source import Source
from scalerec.data.sources import _movielens, kuairand, movielens_100k, synthetic
from scalerec.data.sources.kuairand import KuaiRand
from scalerec.data.sources.movielens_1m import MovieLens1M
from scalerec.data.sources.movielens_100k import MovieLens100K
from scalerec.data.sources.parquet import Parquet
from scalerec.data.sources.synthetic import Synthetic
from scalerec.errors import InputError
from scalerec.schema import Categorical, Group, Schema, Task


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


# ------------------------------------------------------------------------------------------------ every source

EVERY = [
    MovieLens100K(),
    MovieLens1M(),
    KuaiRand(),
    KuaiRand(video_statistics=True, running_statistics=False),
    Synthetic(rows=5_000, teacher="flat", seed=3),
    Parquet(path="p", schema_file="s"),
]


@pytest.mark.parametrize("source", EVERY, ids=lambda source: source.kind)
def test_a_source_survives_json(source: Source) -> None:
    assert component(json.loads(source.model_dump_json())) == source


@pytest.mark.parametrize("source", EVERY[:-1], ids=lambda source: source.kind)
def test_groups_have_about_the_same_width(source: Source) -> None:
    schema = source.schema()
    widths = {
        group.name: sum(len(f.fields) if f.kind == "sequence" else 1 for f in group.features) for group in schema.groups
    }
    assert max(widths.values()) <= 9, widths
    assert min(widths.values()) >= 2, widths
    assert sum(widths.values()) == pytest.approx(np.median(list(widths.values())) * len(widths), rel=0.25)


def test_only_the_split_leaves_the_prepared_files_alone() -> None:
    split = KuaiRand().split.model_copy(update={"test": 20220507})
    assert KuaiRand(split=split).identity() == KuaiRand().identity()
    assert Synthetic(seed=1).identity() != Synthetic(seed=2).identity()


# ------------------------------------------------------------------------------------------------ running sums


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-1, 2), st.integers(0, 4), st.integers(0, 3)), max_size=20))
def test_earlier_equals_a_loop(rows: list[tuple[int, int, int]]) -> None:
    keys, times, values = (np.array(column, np.int64) for column in zip(*rows)) if rows else [np.zeros(0, np.int64)] * 3
    earlier = running.Earlier(keys, times)
    pasts = [[r for r in rows if r[0] == key >= 0 and r[1] < time] for key, time, _ in rows]
    assert earlier.count().tolist() == [len(past) for past in pasts]
    assert earlier.sum(values).tolist() == [sum(r[2] for r in past) for past in pasts]
    assert [None if np.isnan(t) else t for t in earlier.time()] == [
        max((r[1] for r in past), default=None) for past in pasts
    ]


def test_codes_are_one_to_one_and_negative_for_nulls() -> None:
    left = pa.chunked_array([["a", "b"], ["a", None, "a"]])
    right = pa.chunked_array([[1, 1, 2, 1, 1]])
    first, second, third, fourth, fifth = running.codes(left, right)
    assert len({first, second, third}) == 3
    assert first == fifth
    assert fourth < 0


def test_parts_hold_sixteen_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "GROUPS_A_PART", 2)
    assert parts.write_parts(tmp_path, (pa.table({"x": [i, i]}) for i in range(5))) == 10
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert pq.read_table(files[1])["x"].to_pylist() == [2, 2, 3, 3]
    assert pq.read_metadata(files[0]).row_group(0).column(0).compression == "ZSTD"


# ------------------------------------------------------------------------------------------------ KuaiRand

LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
LOG = LOG_HEADER.split(",")
MIDNIGHT_MS = 1_650_816_000_000 - 8 * 3_600_000  # 2022-04-25 00:00 in UTC+8
VIDEOS = {  # id: (author, tag, duration)
    0: (10, '"39,68"', 20_000),
    1: (10, "3", 8_000),
    2: (11, "", 0),
    3: (12, "3", 60_000),
}


def impressions(count: int = 60, seed: int = 0) -> list[dict[str, int]]:
    """Official log rows with equal times, a video of unknown duration and, at the end, an exact repeat."""
    draw = random.Random(seed)
    rows = []
    for _ in range(count):
        minute, video = draw.randrange(14 * 24 * 60 // 97) * 97, draw.randrange(4)
        flag = {name: draw.randrange(2) for name in LOG if name.startswith("is_")}
        duration = VIDEOS[video][2]
        row = dict.fromkeys(LOG, 0) | flag | {
            "user_id": draw.randrange(3),
            "video_id": video,
            "date": 20220425 + minute // 1440 if minute < 6 * 1440 else 20220501 + (minute - 6 * 1440) // 1440,
            "hourmin": minute % 1440 // 60 * 100,
            "time_ms": MIDNIGHT_MS + minute * 60_000,
            "long_view": draw.randrange(2),
            "play_time_ms": draw.choice([0, 2_999, 3_000, 7_600, 19_000, duration]),
            "duration_ms": duration,
            "tab": draw.randrange(2),
        }  # fmt: skip
        rows.append(row)
    return [*rows, dict(rows[4])]


def write_kuairand(folder: Path, log: list[dict[str, int]]) -> None:
    half = len(log) // 2
    for name, rows in zip(kuairand.LOGS, (log[:half], log[half:])):
        write(folder / name, LOG_HEADER, [row.values() for row in rows])
    numbers = "follow_user_num fans_user_num friend_user_num register_days".split()
    users = (
        ["user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"]
        + [column for name in numbers for column in (name, f"{name.removesuffix('_num')}_num_range")][:6]
        + ["register_days", "register_days_range"]
        + list(kuairand.ONEHOT)
    )
    profile = ["full_active", 0, -124, 1, 514, "500+", 150, '"[100,1k)"', 3, '"[1,5)"', 1_000, "730+"]
    flags = [i % 3 for i in range(17)]
    write(
        folder / "user_features_pure.csv", ",".join(users), [[u, *profile, *flags, "" if u else 1.0] for u in range(3)]
    )
    write(
        folder / "video_features_basic_pure.csv",
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
        "music_id,music_type,tag",
        [
            [
                video,
                author,
                "NORMAL",
                "2022-04-10",
                "Web",
                0.0,
                float(length or 1),
                720.0,
                1280.0,
                9_170_219_122,
                9.0,
                tag,
            ]
            for video, (author, tag, length) in VIDEOS.items()
        ],
    )
    columns = [column for group in kuairand.STATISTICS.values() for column in group.split()]
    write(
        folder / "video_features_statistic_pure.csv",
        ",".join(["video_id", *columns]),
        [[video, *(float(i) + 0.5 for i in range(len(columns)))] for video in reversed(VIDEOS)],
    )


@pytest.fixture
def kuairand_folder(tmp_path: Path) -> Path:
    return tmp_path / "data" / kuairand.OFFICIAL


def test_kuairand_official_files(kuairand_folder: Path) -> None:
    log = impressions()
    write_kuairand(kuairand_folder, log)
    source = KuaiRand(video_statistics=True)
    table = prepared(source)
    notes = source.prepare().notes
    assert (notes["rows"], notes["exact_repeats_dropped"]) == (60, 1)
    assert table["time_ms"].to_pylist() == sorted(row["time_ms"] for row in log[:-1])
    assert len(source.schema().groups) == 13 + len(kuairand.STATISTICS)
    assert sum(len(columns.split()) for columns in kuairand.STATISTICS.values()) == 51

    kept = {(r["user_id"], r["video_id"], r["time_ms"], r["play_time_ms"], r["tab"]): r for r in log}
    measured = {"play_time_ms", "profile_stay_time", "comment_stay_time", "is_click", "is_like", "finish", "skip"}
    assert not measured & set(source.schema().input_columns())
    assert len(kept) == 60
    for row in table.to_pylist():
        raw = next(r for r in log if all(r[c] == row[c] for c in ("user_id", "video_id", "time_ms", "tab", "date"))
                   and (r["is_click"], r["is_like"], r["long_view"], r["is_hate"], r["is_comment"])
                   == (row["click"], row["like"], row["long_view"], row["hate"], row["comment"])
                   and int(r["play_time_ms"] < 3_000) == row["skip"])  # fmt: skip
        author, tag, duration = VIDEOS[row["video_id"]]
        assert (row["author_id"], row["tag"]) == (author, tag.strip('"') or None)
        assert row["main_tag"] == (tag.strip('"').split(",")[0] or None)
        assert row["duration_ms"] == (duration or None)
        assert row["finish"] == (None if not duration else int(raw["play_time_ms"] >= 0.95 * duration))
        minutes = (row["time_ms"] - MIDNIGHT_MS) // 60_000
        assert (row["hour"], row["weekday"]) == (minutes // 60 % 24, minutes // 1440 % 7)  # 2022-04-25 was a Monday
        assert row["upload_age_days"] == pytest.approx(15 + minutes / 1440, rel=1e-5)
        assert (row["fans_user_num_range"], row["onehot_feat17"]) == ("[100,1k)", 1 if not row["user_id"] else None)
        assert (row["follow_user_num"], row["video_follow_user_num"]) != (row["video_follow_user_num"],) * 2
        assert row["music_type"] == 9


def test_kuairand_histories_and_running_statistics_equal_a_loop(kuairand_folder: Path) -> None:
    write_kuairand(kuairand_folder, impressions())
    rows = prepared(KuaiRand()).to_pylist()
    expected = {"click": 0.5, "long_view": 0.5, "finish": 0.5, "skip": 0.5, "like": 0.5}

    def rate(past: list[dict], name: str, prior: float) -> float:
        known = [r[name] for r in past if r[name] is not None]
        return (sum(known) + 10 * prior) / (len(known) + 10)

    for row in rows:
        past = [r for r in rows if r["time_ms"] < row["time_ms"]]
        mine = [r for r in past if r["user_id"] == row["user_id"]]
        assert row["watched_video_id"] == [r["video_id"] for r in mine]
        assert row["watched_main_tag"] == [r["main_tag"] for r in mine]
        assert row["long_viewed_author_id"] == [r["author_id"] for r in mine if r["long_view"]]
        assert row["liked_video_id"] == [r["video_id"] for r in mine if r["like"]]
        for key, column in {"video": "video_id", "author": "author_id", "user": "user_id"}.items():
            same = [r for r in past if r[column] == row[column]]
            assert row[f"{key}_impressions"] == len(same)
            for name, prior in expected.items():
                found = rate(same, name, rate(past, name, prior))
                assert row[f"{key}_{name}_rate"] == pytest.approx(found, rel=1e-5)
        previous = max((r["time_ms"] for r in mine), default=None)
        since = None if previous is None else (row["time_ms"] - previous) / 1000
        assert row["user_seconds_since_previous"] == pytest.approx(since)
        by_author = [r for r in mine if r["author_id"] == row["author_id"]]
        by_tag = [r for r in mine if r["main_tag"] == row["main_tag"] is not None]
        assert (row["user_author_impressions"], row["user_tag_impressions"]) == (len(by_author), len(by_tag))
        assert row["user_author_long_views"] == sum(r["long_view"] for r in by_author)
        assert row["user_tag_long_views"] == sum(r["long_view"] for r in by_tag)


def test_kuairand_features_do_not_depend_on_what_happens_now_or_later(kuairand_folder: Path) -> None:
    log = impressions()[:-1]
    log = [row | {"tab": i} for i, row in enumerate(log)]  # tells rows apart
    now = sorted(row["time_ms"] for row in log)[30]
    other = [
        row | {name: 1 - row[name] for name in (*kuairand.OTHER_LABELS, "is_click", "is_like", "long_view")}
        | {"play_time_ms": 12_345} if row["time_ms"] >= now else row
        for row in log
    ]  # fmt: skip
    same_past(KuaiRand(), lambda rows: write_kuairand(kuairand_folder, rows), log, other, now, "tab")


def same_past(
    source: Source, put: Callable[[list], None], log: list, other: list, now: int, key: str, expect: int = 20
) -> None:
    """The features of rows until `now` are the same whatever is changed in rows from `now` on."""
    features = [c for c in source.schema().input_columns() if c not in ("date",)]
    seen = []
    for i, rows in enumerate((log, other)):
        put(rows)
        os.environ["SCALEREC_CACHE"] = f"{os.environ['SCALEREC_CACHE']}-{i}"
        table = prepared(source)
        time = source.schema().time
        assert time is not None
        kept = sorted((r for r in table.to_pylist() if r[time] <= now), key=lambda r: (r[key], r[time]))
        seen.append(([{c: r[c] for c in features} for r in kept], table.num_rows))
    assert seen[0] == seen[1]
    assert len(seen[0][0]) >= expect


def test_kuairand_says_where_to_get_it() -> None:
    with pytest.raises(InputError, match=r"kuairand: .*zenodo\.org"):
        KuaiRand().prepare()


def test_kuairand_names_a_missing_file(kuairand_folder: Path) -> None:
    write_kuairand(kuairand_folder, impressions())
    (kuairand_folder / "user_features_pure.csv").unlink()
    with pytest.raises(InputError, match=r"user_features_pure\.csv: no such file"):
        KuaiRand().prepare()


REAL = Path(os.environ.get("SCALEREC_DATA") or "/nowhere")


@pytest.mark.skipif(not (REAL / kuairand.COPY).is_dir(), reason="needs the data set under SCALEREC_DATA")
def test_kuairand_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEREC_DATA", str(REAL))
    source = KuaiRand()
    table, notes = prepared(source), source.prepare().notes
    assert (table.num_rows, notes["exact_repeats_dropped"]) == (222_869, 5_460)
    assert notes["rates"] == {"finish": 0.1681, "skip": 0.4091, "long_view": 0.3164, "click": 0.449, "like": 0.0174}
    assert np.all(np.diff(table["time_ms"].to_numpy()) >= 0)


# ------------------------------------------------------------------------------------------------ MovieLens

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
def test_movielens_features_do_not_depend_on_what_happens_now_or_later(tmp_path: Path) -> None:
    log = stars()
    now = sorted(row[3] for row in log)[5]
    other = [(u, i, 6 - r if t >= now else r, t) for u, i, r, t in log]
    put = lambda rows: write_official_100k(tmp_path / "data" / "ml-100k", rows)  # noqa: E731
    same_past(MovieLens100K(), put, log, other, now, "item_id", expect=5)


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


# ------------------------------------------------------------------------------------------------ downloads


def test_fetch_zip_takes_all_files_or_none(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("deep/x.txt", "1")
    folder = tmp_path / "out" / "a"
    with pytest.raises(OSError, match=r"holds no y\.txt"):
        download.fetch_zip((tmp_path / "a.zip").as_uri(), ["x.txt", "y.txt"], folder)
    assert not folder.exists()
    download.fetch_zip((tmp_path / "a.zip").as_uri(), ["x.txt"], folder)
    assert (folder / "x.txt").read_text() == "1"
    (tmp_path / "b.zip").write_bytes(b"<html>")
    with pytest.raises(OSError, match="not a zip archive"):
        download.fetch_zip((tmp_path / "b.zip").as_uri(), ["x.txt"], folder)


# ------------------------------------------------------------------------------------------------ synthetic

GOLDEN = {  # sha256 of the labels (int8, click and like) of the first 1,000 rows of 20,000, seed 0
    "grouped": "?",
    "flat": "?",
}


@pytest.mark.parametrize("teacher", ["grouped", "flat"])
def test_synthetic_has_the_promised_difficulty_and_never_changes(teacher: Any) -> None:
    source = Synthetic(rows=20_000, teacher=teacher)
    table, notes = prepared(source), source.prepare().notes
    for task in synthetic.TASKS:
        assert 0.80 <= notes["bayes_auc"][task] <= 0.85
        assert 0.27 <= notes["base_rate"][task] <= 0.33
        probability, label = table[f"p_{task}"].to_numpy(), table[task].to_numpy()
        assert abs(probability.mean() - label.mean()) < 0.01
        assert f"p_{task}" not in source.schema().input_columns()
    labels = np.stack([table[task].to_numpy()[:1_000] for task in synthetic.TASKS], 1)
    assert hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest() == GOLDEN[teacher]
    share = notes["rows_whose_value_occurs_20_times"]
    assert sum(value > 0.7 for value in share.values()) >= 24, share


@pytest.mark.parametrize("teacher", ["grouped", "flat"])
def test_synthetic_histories_are_those_the_teacher_used(teacher: Any) -> None:
    source = Synthetic(rows=4_000, teacher=teacher, seed=5)
    rows = prepared(source).to_pylist()
    world = synthetic.World.draw(4_000, 5)
    truth = synthetic.Teacher.draw(teacher, world, 5)
    fixed = truth.fixed(world.values(slice(None)))
    past: dict[int, list[int]] = {}
    item = synthetic.FIELDS[synthetic.ITEM]
    for i, row in enumerate(rows):
        mine = past.setdefault(row["user"], [])
        assert row[f"clicked_{item}"] == mine[-synthetic.HISTORY :]
        told = sum(truth.items[j] for j in row[f"clicked_{item}"]) / (len(row[f"clicked_{item}"]) + synthetic.DOUBT)
        logit = fixed[i] + (truth.taste[:, row["user"]] * told).sum(1)
        assert [row["p_click"], row["p_like"]] == pytest.approx(1 / (1 + np.exp(-logit)))
        if row["click"]:
            mine.append(row[item])
    assert any(len(items) > synthetic.HISTORY for items in past.values())


def test_synthetic_entities_keep_their_fields() -> None:
    table = prepared(Synthetic(rows=2_000))
    of_user = {
        (row["user"], *(row[name] for name in synthetic.FIELDS[: synthetic.USER_FIELDS])) for row in table.to_pylist()
    }
    of_item = {tuple(row[name] for name in synthetic.FIELDS[synthetic.ITEM_FIELDS]) for row in table.to_pylist()}
    assert len(of_user) == len({user for user, *_ in of_user})
    assert len(of_item) == len({item for item, *_ in of_item})


def test_synthetic_seeds_and_teachers_differ() -> None:
    first, again, flat = (
        prepared(s)
        for s in (Synthetic(rows=2_000), Synthetic(rows=2_000, seed=1), Synthetic(rows=2_000, teacher="flat"))
    )
    assert first["user_a_0"] != again["user_a_0"]
    assert first["user_a_0"] == flat["user_a_0"]
    assert first["click"] != flat["click"]


# ------------------------------------------------------------------------------------------------ own files


def test_parquet_reads_files_where_they_are(tmp_path: Path) -> None:
    schema = Schema(
        groups=(Group(name="all", side="item", features=(Categorical(name="x"),)),), tasks=(Task(name="y"),), user="u"
    )
    (tmp_path / "schema.json").write_text(schema.model_dump_json())
    logs = tmp_path / "logs"
    logs.mkdir()
    for name in ("b", "a"):
        pq.write_table(pa.table({"u": [1], "x": [2], "y": [0]}), logs / f"{name}.parquet")
    schema_file = str(tmp_path / "schema.json")
    files = [logs / "a.parquet", logs / "b.parquet"]
    for path, found in {logs: files, logs / "*.parquet": files, files[1]: files[1:]}.items():
        source = Parquet(path=str(path), schema_file=schema_file)
        assert source.prepare().files == found
        assert source.schema() == schema


def test_parquet_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("empty", "nothing.parquet", "no/*.parquet"):
        with pytest.raises(InputError, match=path.replace("*", r"\*")):
            Parquet(path=str(tmp_path / path), schema_file="s.json").prepare()
    with pytest.raises(InputError, match=r"s\.json: no such file"):
        Parquet(path="x", schema_file=str(tmp_path / "s.json")).schema()

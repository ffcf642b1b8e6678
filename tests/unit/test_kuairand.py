"""KuaiRand: the official files of a tiny log, and nothing that is known only after the impression."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from scalerec.data.source import Source
from scalerec.data.sources import kuairand
from scalerec.data.sources.kuairand import KuaiRand
from scalerec.errors import InputError

REAL = Path(os.environ.get("SCALEREC_DATA") or "/nowhere")


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


def write(path: Path, header: str, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [header, *(",".join(map(str, row)) for row in rows)]
    path.write_bytes(("\n".join(lines) + "\n").encode())


LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
LOG = LOG_HEADER.split(",")
MIDNIGHT_MS = 1_650_816_000_000  # 2022-04-25 00:00 in UTC+8
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
    numbers = ["follow_user_num", "fans_user_num", "friend_user_num"]
    users = (
        ["user_id", "user_active_degree", "is_lowactive_period", "is_live_streamer", "is_video_author"]
        + [column for name in numbers for column in (name, f"{name}_range")]
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
        assert row["follow_user_num"] == 514 != row["video_follow_user_num"]
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


def test_kuairand_features_do_not_depend_on_what_happens_now_or_later(
    kuairand_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = impressions()[:-1]
    log = [row | {"tab": i} for i, row in enumerate(log)]  # tells rows apart
    now = sorted(row["time_ms"] for row in log)[30]
    other = [
        row | {name: 1 - row[name] for name in (*kuairand.OTHER_LABELS, "is_click", "is_like", "long_view")}
        | {"play_time_ms": 12_345} if row["time_ms"] >= now else row
        for row in log
    ]  # fmt: skip
    seen = []
    for rows, cache in ((log, "before"), (other, "after")):
        write_kuairand(kuairand_folder, rows)
        monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / cache))
        table = prepared(KuaiRand())
        kept = table.filter(pc.less_equal(table["time_ms"], now)).select(KuaiRand().schema().input_columns())
        seen.append(sorted(kept.to_pylist(), key=lambda row: row["tab"]))
    assert len(seen[0]) >= 30
    assert seen[0] == seen[1]


def test_kuairand_says_where_to_get_it() -> None:
    with pytest.raises(InputError, match=r"kuairand: .*zenodo\.org"):
        KuaiRand().prepare()


def test_kuairand_names_a_missing_file(kuairand_folder: Path) -> None:
    write_kuairand(kuairand_folder, impressions())
    (kuairand_folder / "user_features_pure.csv").unlink()
    with pytest.raises(InputError, match=r"user_features_pure\.csv: no such file"):
        KuaiRand().prepare()


@pytest.mark.skipif(not (REAL / kuairand.COPY).is_dir(), reason="needs the data set under SCALEREC_DATA")
def test_kuairand_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEREC_DATA", str(REAL))
    source = KuaiRand()
    table, notes = prepared(source), source.prepare().notes
    assert (table.num_rows, notes["exact_repeats_dropped"]) == (222_869, 5_460)
    assert notes["rates"] == {"finish": 0.1681, "skip": 0.4091, "long_view": 0.3164, "click": 0.449, "like": 0.0174}
    assert np.all(np.diff(table["time_ms"].to_numpy()) >= 0)

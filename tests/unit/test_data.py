"""From files to batches: which rows belong to which part, what a broken file does, and that a stream can be resumed."""

from __future__ import annotations

import datetime
import itertools
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from scalerec import config
from scalerec.batch import Batch
from scalerec.data import loader as loader_module
from scalerec.data import reader
from scalerec.data.loader import Loader, Position, ahead
from scalerec.data.reader import ParquetRows, PartCounts, check_parts, count_parts, find_parquet
from scalerec.data.split import PARTS, NoSplit, Part, RandomSplit, Split, TimeSplit
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.schema import Categorical, Group, Schema, Task

UTC = datetime.timezone.utc
SCHEMA = Schema(
    groups=(
        Group(name="user", side="user", features=(Categorical(name="user"),)),
        Group(name="item", side="item", features=(Categorical(name="item", vocabulary="hash", buckets=50),)),
    ),
    tasks=(Task(name="y"),),
    user="user",
)


def table(first: int, rows: int) -> pa.Table:
    """Rows first, first + 1, ... of a log: 7 users in turn, time and item are the row's number."""
    numbers = np.arange(first, first + rows)
    return pa.table({"user": [f"u{n % 7}" for n in numbers], "item": numbers, "time": numbers, "y": numbers % 2})


def write(folder: Path, *sizes: int, row_group: int = 10) -> list[Path]:
    """One log as files of these many rows."""
    paths, first = [], 0
    for number, size in enumerate(sizes):
        paths.append(folder / f"part-{number}.parquet")
        pq.write_table(table(first, size), paths[-1], row_group_size=row_group)
        first += size
    return paths


def flat(lists: Iterable[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(lists))


def numbers(pieces: Iterator[Any]) -> list[int]:
    return [int(n) for piece in pieces for n in piece.index]


# -- splits


def parts_of(split: Any, column: Any, first: int = 0) -> list[int]:
    rows = pa.RecordBatch.from_arrays([column if isinstance(column, pa.Array) else pa.array(column)], names=["t"])
    return split.part_of(rows, first).tolist()


@pytest.mark.parametrize("kind", [pa.int64(), pa.int32(), pa.uint8(), pa.float32()])
def test_a_split_in_time_by_numbers(kind):
    split = TimeSplit(column="t", validation=10, test=20)
    assert parts_of(split, pa.array([9, 10, 19, 20, 25, 0], kind)) == [0, 1, 1, 2, 2, 0]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "Asia/Tokyo"])
def test_a_split_in_time_by_timestamps(unit, zone):
    moments = [datetime.datetime(2024, 1, day, hour, tzinfo=UTC) for day, hour in ((9, 23), (10, 0), (19, 23), (20, 0))]
    column = pa.array(moments, pa.timestamp("us", "UTC")).cast(pa.timestamp(unit, "UTC"))
    column = column.cast(pa.timestamp(unit, zone)) if zone != "UTC" else column
    for validation in ("2024-01-10", datetime.date(2024, 1, 10), datetime.datetime(2024, 1, 10, tzinfo=UTC)):
        split = TypeAdapter(Split).validate_python(
            {"kind": "time", "column": "t", "validation": validation, "test": "2024-01-20T00:00:00"}
        )
        assert parts_of(split, column) == [0, 1, 1, 2]
        assert TypeAdapter(Split).validate_json(split.model_dump_json()).part_of is not None


@pytest.mark.parametrize("kind", [pa.date32(), pa.date64()])
def test_a_split_in_time_by_dates(kind):
    split = TimeSplit(column="t", validation=datetime.date(2024, 1, 10), test=datetime.date(2024, 1, 20))
    days = [datetime.date(2024, 1, day) for day in (9, 10, 19, 20)]
    assert parts_of(split, pa.array(days, kind)) == [0, 1, 1, 2]


def test_cuts_in_nanoseconds():
    day = 86_400 * 10**9
    split = TimeSplit(column="t", validation=19_000 * day, test=19_001 * day)
    assert parts_of(split, [18_999 * day, 19_000 * day, 19_001 * day]) == [0, 1, 2]


@pytest.mark.parametrize("zone", ["", "+02:00"])
@pytest.mark.parametrize("cut", ["2024-01-10", "2024-01-10T00:00:00", "2024-01-10T12:30:00"])
def test_a_split_in_time_survives_json(cut, zone):
    cut += zone if "T" in cut else ""
    split = TypeAdapter(Split).validate_python({"kind": "time", "column": "t", "validation": cut, "test": "2024-02-01"})
    back = TypeAdapter(Split).validate_json(split.model_dump_json())
    hours = [datetime.datetime(2024, 1, 9) + datetime.timedelta(minutes=30 * n) for n in range(100)]
    assert parts_of(back, pa.array(hours)) == parts_of(split, pa.array(hours))
    cut_at = datetime.datetime.fromisoformat(cut)
    cut_at = cut_at.astimezone(UTC).replace(tzinfo=None) if cut_at.tzinfo else cut_at
    assert parts_of(split, pa.array(hours)) == [int(hour >= cut_at) for hour in hours]


@pytest.mark.parametrize(
    ("column", "cut", "words"),
    [
        (["2024-01-10"], 1, "'t' is string, not a time: use a number, a date or a timestamp column"),
        ([1, None], 1, "'t', row 1 of a piece: no time"),
        ([1.0, float("nan")], 1, "'t', row 1 of a piece: no time"),
        ([datetime.datetime(2024, 1, 1), None], datetime.date(2024, 1, 1), "'t', row 1 of a piece: no time"),
        ([1], datetime.date(2024, 1, 1), "'t' holds numbers, so its cuts must be numbers too"),
    ],
)
def test_a_column_that_is_no_time_is_refused(column, cut, words):
    with pytest.raises(InputError, match=words):
        parts_of(TimeSplit(column="t", validation=cut, test=cut), column)


def test_a_cut_that_is_no_time_is_refused_in_one_line():
    split = {"kind": "time", "column": "t", "validation": "16.03.2024", "test": "2024-03-17"}
    with pytest.raises(
        InputError, match=r"validation: '16\.03\.2024' is no number and no ISO date or time .as in [-\d]+.$"
    ):
        config.parse(TimeSplit, split, "options")


def test_a_split_by_a_column_that_is_not_there():
    for split in (TimeSplit(column="x", validation=1, test=2), RandomSplit(by="x")):
        with pytest.raises(InputError, match="no column 'x' in the files: it has t"):
            parts_of(split, [1])


def test_cuts_in_the_wrong_order_are_refused():
    with pytest.raises((InputError, ValidationError)):
        parts_of(TimeSplit(column="t", validation=20, test=10), [5, 15, 25])


def test_a_random_split_has_its_sizes():
    split = RandomSplit(validation=0.2, test=0.3)
    found = np.bincount(parts_of(split, [0] * 20_000)) / 20_000
    assert found == pytest.approx([0.5, 0.2, 0.3], abs=0.02)
    assert parts_of(split, [0] * 100) != parts_of(RandomSplit(validation=0.2, test=0.3, seed=1), [0] * 100)


@pytest.mark.parametrize("sizes", [(0.5, 0.5), (0.9, 0.2)])
def test_a_random_split_leaves_something_to_train_on(sizes):
    with pytest.raises(ValidationError, match="leave nothing to train on"):
        RandomSplit(validation=sizes[0], test=sizes[1])


@given(st.integers(0, 1000), st.lists(st.integers(0, 40), max_size=5))
@settings(deadline=None, max_examples=40)
def test_a_random_split_of_rows_follows_their_numbers(first, cuts):
    split = RandomSplit()
    whole = parts_of(split, [0] * 40, first)
    edges = sorted({0, 40, *cuts})
    assert [p for a, b in itertools.pairwise(edges) for p in parts_of(split, [0] * (b - a), first + a)] == whole


@given(st.lists(st.sampled_from(["a", "b", "c", "d", None]), min_size=1), st.randoms())
@settings(deadline=None, max_examples=40)
def test_a_random_split_of_users_follows_the_users(users, random):
    split = RandomSplit(by="t", validation=0.3, test=0.3)
    found = dict(zip(users, parts_of(split, pa.array(users, pa.string()))))
    shuffled = random.sample(users, len(users))
    column = pa.array(shuffled, pa.string())
    for again in (column, column.cast(pa.large_string()), column.dictionary_encode()):
        assert parts_of(split, again, first=random.randrange(100)) == [found[user] for user in shuffled]


# -- finding files


def test_files_are_found(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    names = ["2.parquet", "10.parquet", "a/b/3.parquet", ".hidden.parquet", "_meta.parquet", "notes.txt"]
    names += ["_delta_log/00.checkpoint.parquet", "a/.tmp/part.parquet"]  # of writers at work
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_parquet(tmp_path)]
    assert found == ["10.parquet", "2.parquet", "a/b/3.parquet"]
    assert find_parquet(tmp_path / "2.parquet") == [tmp_path / "2.parquet"]
    assert find_parquet(f"{tmp_path}/1*.parquet") == [tmp_path / "10.parquet"]
    for nothing in (tmp_path / "4.parquet", tmp_path / "x*.parquet", tmp_path / "no" / "*.parquet"):
        with pytest.raises(InputError, match=r"\.parquet: no Parquet file there"):
            find_parquet(nothing)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: no Parquet file there"):
        find_parquet(tmp_path / "empty")


# -- reading


file_sizes = st.lists(st.integers(0, 45), min_size=1, max_size=4).filter(any)


@given(file_sizes, st.integers(1, 30), st.integers(1, 30), st.data())
@settings(deadline=None, max_examples=30)
def test_pieces_are_numbered_rows_from_any_start(tmp_path_factory, sizes, row_group, piece_rows, data):
    files = write(tmp_path_factory.mktemp("log"), *sizes, row_group=row_group)
    rows = ParquetRows(files, NoSplit())
    assert rows.num_rows == sum(sizes)
    order = data.draw(st.permutations(range(len(rows.row_groups))))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "PIECE_ROWS", piece_rows)
        pieces = list(rows.pieces("train", order=order))
        start = data.draw(st.integers(0, len(pieces)))
        assert numbers(rows.pieces("train", order=order, start=start)) == numbers(iter(pieces[start:]))
    assert [piece.number for piece in pieces] == list(range(len(pieces)))
    assert all(piece.rows.column("item").to_pylist() == piece.index.tolist() for piece in pieces)
    assert all(piece.rows.num_rows <= piece_rows for piece in pieces)
    assert sorted(numbers(iter(pieces))) == list(range(sum(sizes)))


@pytest.mark.parametrize(
    "split", [TimeSplit(column="time", validation=20, test=27), RandomSplit(), RandomSplit(by="user", validation=0.4)]
)
def test_the_parts_make_up_the_whole(tmp_path, split):
    files = write(tmp_path, 25, 13)
    rows = ParquetRows(files, split)
    found = {part: numbers(rows.pieces(part)) for part in PARTS}
    assert sorted(flat(found.values())) == list(range(38))
    assert numbers(ParquetRows(files, NoSplit()).pieces("test")) == list(range(38))
    if isinstance(split, TimeSplit):
        assert found == {"train": list(range(20)), "validation": list(range(20, 27)), "test": list(range(27, 38))}


@pytest.mark.parametrize("kind", [pa.int64(), pa.float32(), pa.timestamp("ms"), pa.timestamp("ns", "UTC"), pa.date32()])
def test_row_groups_of_other_parts_are_not_read(tmp_path, monkeypatch, kind):
    """Where the file says between which times its rows lie."""
    day = 1 if pa.types.is_integer(kind) or pa.types.is_floating(kind) else datetime.timedelta(days=1)
    begin = 0 if day == 1 else datetime.datetime(2024, 1, 1)
    times = pa.array([begin + day * n for n in range(40)], pa.timestamp("us") if begin else pa.int64()).cast(kind)
    pq.write_table(pa.table({"time": times, "other": pa.array([[n] for n in range(40)])}), tmp_path / "log", 10)
    rows = ParquetRows([tmp_path / "log"], TimeSplit(column="time", validation=begin + day * 20, test=begin + day * 35))
    assert [group.part for group in rows.row_groups] == ["train", "train", "validation", ""]
    read: list[int] = []
    monkeypatch.setattr(ParquetRows, "_read", lambda self, group, *_: read.append(group.number) or iter(()))
    for part, groups in (("train", [0, 1, 3]), ("validation", [2, 3]), ("test", [3])):
        read.clear()
        assert list(rows.pieces(part)) == [] and read == groups


def test_only_text_with_few_values_stays_coded(tmp_path):
    """Arrow adds what Parquet does not code to the dictionary: each piece would carry all values before it."""
    rows = 80_000
    columns = {"few": [f"v{n % 9}" for n in range(rows)], "many": [f"a value of its own, {n}" for n in range(rows)]}
    columns["lists"] = [[text] for text in columns["few"]]
    pq.write_table(pa.table(columns), tmp_path / "log")
    pieces = ParquetRows([tmp_path / "log"], NoSplit()).pieces("train", list(columns), dictionaries=True)
    found = [piece.rows for piece in pieces]
    types = {name: found[0].schema.field(name).type for name in columns}
    assert pa.types.is_dictionary(types["few"]) and pa.types.is_dictionary(types["lists"].value_type)
    assert types["many"] == pa.string()
    for name, values in columns.items():
        assert [value for piece in found for value in piece.column(name).to_pylist()] == values


def test_row_groups_of_unknown_times_are_read(tmp_path):
    """No statistics, a null among them, nanoseconds that Python has no time for, a column that is no time."""
    split = TimeSplit(column="time", validation=10, test=20)
    columns = {
        "null": pa.array([1, None]), "odd": pa.array([1, 10**18 + 1]).cast(pa.timestamp("ns")),
        "far": pa.array([0, 2**62]).cast(pa.timestamp("us")), "text": pa.array(["a", "b"]),
        "lists": pa.array([[1], [2]]), "late": pa.array([9, 10]),
    }  # fmt: skip
    for name, column in columns.items():
        pq.write_table(pa.table({"time": column}), tmp_path / name)
        assert [group.part for group in ParquetRows([tmp_path / name], split).row_groups] == [""]
    twice = pa.table({"t": pa.array([{"b": 1}, {"b": 2}]), "t.b": [11, 30]})
    pq.write_table(twice, tmp_path / "twice")
    for columns in (["t", "t.b"], ["t"]):
        pq.write_table(twice.select(columns), tmp_path / "twice")
        rows = ParquetRows([tmp_path / "twice"], TimeSplit(column="t.b", validation=10, test=20))
        assert rows.row_groups[0].part == ""
    pq.write_table(pa.table({"time": [1, 2]}), tmp_path / "bare", write_statistics=False)
    rows = ParquetRows([tmp_path / "bare"], split)
    assert rows.row_groups[0].part == "" and numbers(rows.pieces("train")) == [0, 1]


def test_a_random_split_does_not_depend_on_row_groups(tmp_path):
    found = []
    for row_group in (3, 10, 100):
        folder = tmp_path / str(row_group)
        folder.mkdir()
        rows = ParquetRows(write(folder, 25, 13, row_group=row_group), RandomSplit())
        found.append({part: numbers(rows.pieces(part)) for part in PARTS})
    assert found[0] == found[1] == found[2]


def test_only_wanted_columns_are_read(tmp_path):
    rows = ParquetRows(write(tmp_path, 25), TimeSplit(column="time", validation=20, test=22))
    piece = next(rows.pieces("train", ["item"]))
    assert piece.rows.schema.names == ["item", "time"]
    with pytest.raises(InputError, match=r"part-0\.parquet: no column 'price'; it has user, item, time, y"):
        next(rows.pieces("train", ["item", "price"]))


def test_a_file_without_a_column_is_named(tmp_path):
    files = write(tmp_path, 10, 10)
    pq.write_table(table(10, 10).drop_columns(["item"]), files[1])
    with pytest.raises(InputError, match=r"part-1\.parquet: no column 'item'"):
        numbers(ParquetRows(files, NoSplit()).pieces("train", ["item"]))


def test_a_bad_split_column_is_named_with_its_file(tmp_path):
    rows = ParquetRows(write(tmp_path, 10), TimeSplit(column="user", validation=1, test=2))
    with pytest.raises(InputError, match=r"part-0\.parquet: column 'user' is string"):
        numbers(rows.pieces("train"))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def not_parquet(path: Path) -> None:
    path.write_bytes(b"user,item\n1,2\n" * 100)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-200])


def without_its_head(path: Path) -> None:
    """The footer is whole, the pages are not where it says."""
    path.write_bytes(path.read_bytes()[300:])


def corrupt_pages(path: Path) -> None:
    """The footer is whole, the pages are noise."""
    content = bytearray(path.read_bytes())
    footer = int.from_bytes(content[-8:-4], "little") + 8
    content[4:-footer] = bytes(np.random.default_rng(0).integers(0, 256, len(content) - footer - 4, np.uint8))
    path.write_bytes(bytes(content))


BROKEN = [empty, not_parquet, truncated, without_its_head, corrupt_pages]


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_file_is_named(tmp_path, damage):
    files = write(tmp_path, 20, 20, 20)
    damage(files[1])
    with pytest.raises(
        InputError, match=r"part-1\.parquet: not a readable Parquet file .*--skip-bad-shards of `train`"
    ):
        numbers(ParquetRows(files, NoSplit()).pieces("train"))


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_file_is_left_out_and_counted(tmp_path, damage):
    files = write(tmp_path, 20, 20, 20)
    damage(files[1])
    rows = ParquetRows(files, NoSplit(), skip_bad_shards=True)
    found = [row for piece in rows.pieces("train") for row in piece.rows.column("item").to_pylist()]
    assert found == [*range(20), *range(40, 60)]
    assert rows.counts == {f"{files[1]}: unreadable, left out": 1}


@pytest.mark.parametrize("skip", [False, True])
def test_files_without_rows(tmp_path, skip):
    files = write(tmp_path, 0, 20, 0)
    assert numbers(ParquetRows(files, NoSplit(), skip_bad_shards=skip).pieces("train")) == list(range(20))
    with pytest.raises(InputError, match=r"part-0\.parquet.*part-2\.parquet: no rows to read"):
        ParquetRows([files[0], files[2]], NoSplit(), skip_bad_shards=skip)


def test_parts_are_counted_and_must_be_usable(tmp_path):
    files = write(tmp_path, 25, 15)
    counts = count_parts(ParquetRows(files, TimeSplit(column="time", validation=20, test=29)), SCHEMA)
    assert {part: (found.rows, found.positives["y"]) for part, found in counts.items()} == {
        "train": (20, 10),
        "validation": (9, 4),
        "test": (11, 6),
    }
    check_parts(counts, SCHEMA)
    for test, words in (
        (19.9, "the validation part holds no rows"),
        (20.5, "all 1 validation rows that count are of one class"),
    ):
        counts = count_parts(ParquetRows(files, TimeSplit(column="time", validation=19.5, test=test)), SCHEMA)
        with pytest.raises(InputError, match=words):
            check_parts(counts, SCHEMA)


def test_only_labels_that_count_are_counted(tmp_path):
    log = {
        "user": [1] * 6, "item": [1] * 6, "y": [1, 1, None, 0, 1, 0],
        "mask": [1, 1, 1, 0, None, 1], "weight": [1.0, 0.5, 1.0, 1.0, 1.0, 0.0],
    }  # fmt: skip
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    tasks = (Task(name="plain", label="y"), Task(name="masked", label="y", mask="mask", weight="weight"))
    schema = SCHEMA.model_copy(update={"tasks": tasks})
    counts = count_parts(ParquetRows([tmp_path / "log.parquet"], NoSplit()), schema)
    assert counts["train"].counted == {"plain": 5, "masked": 2}
    assert counts["train"].positives == {"plain": 3, "masked": 2}
    with pytest.raises(InputError, match="'masked': all 2 train rows that count are of one class"):
        check_parts(counts, schema)


def test_classes_are_asked_for_where_they_are_learned():
    one_class, both = PartCounts(9, {"y": 9}, {"y": 9}), PartCounts(9, {"y": 9}, {"y": 4})
    of_past = SCHEMA.model_copy(update={"new_events": "new"})  # the past has targets that no row shows
    check_parts({"train": one_class, "validation": both, "test": both}, of_past)
    parts = {"train": both, "validation": one_class, "test": both}
    with pytest.raises(InputError, match="all 9 validation rows that count are of one class"):
        check_parts(parts, of_past)
    check_parts(parts, SCHEMA, ranks=False)
    with pytest.raises(InputError, match="the test part holds no rows"):
        check_parts(parts | {"test": PartCounts(0, {"y": 0}, {"y": 0})}, SCHEMA, ranks=False)


# -- loading


class Log:
    """57 rows in two files, pieces of at most 6 rows."""

    def __init__(self, folder: Path):
        self.files = write(folder, 33, 24)
        self.rows = ParquetRows(self.files, NoSplit())
        self.encoder = Encoder.fit(SCHEMA, self.rows.batches("train"))

    def loader(self, part: Part = "train", batch_size: int = 8, split: Any = None, **options: Any) -> Loader:
        rows = ParquetRows(self.files, split or NoSplit())
        return Loader(rows, self.encoder, part, batch_size, **{"seed": 0, "window_rows": 20, **options})


@pytest.fixture
def log(tmp_path, monkeypatch) -> Log:
    monkeypatch.setattr(reader, "PIECE_ROWS", 6)
    return Log(tmp_path)


def indices(batches: Any) -> list[list[int]]:
    return [batch.index.tolist() for batch in batches]


def epoch(loader: Loader, number: int = 0, start: Position | None = None) -> list[tuple[list[int], Position]]:
    stream = loader.epoch(number) if start is None else loader.epoch(number, start)
    return [(batch.index.tolist(), position) for batch, position in stream]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("window_rows", [1, 20, 1000])
@pytest.mark.parametrize("batch_size", [1, 8, 100])
def test_an_epoch_has_every_row_once(log, seed, window_rows, batch_size):
    found = indices(log.loader(seed=seed, window_rows=window_rows, batch_size=batch_size))
    assert sorted(flat(found)) == list(range(57))
    assert all(len(batch) == batch_size for batch in found[:-1]) and 0 < len(found[-1]) <= batch_size
    if seed is None:
        assert flat(found) == list(range(57))


@pytest.mark.parametrize("split", [RandomSplit(validation=0.3), TimeSplit(column="time", validation=13, test=40)])
def test_an_epoch_of_a_part_has_its_rows(log, split):
    for part in PARTS:
        expected = numbers(ParquetRows(log.files, split).pieces(part))
        assert sorted(flat(indices(log.loader(part, split=split)))) == expected


def test_batches_hold_the_rows_they_name(log):
    whole = log.encoder.encode(pa.Table.from_batches(log.rows.batches("train")).combine_chunks().to_batches()[0])
    for batch in log.loader():
        expected = whole.take(batch.index)
        assert torch.equal(batch.items.ids, expected.items.ids) and torch.equal(batch.labels, expected.labels)
        assert torch.equal(batch.users, expected.users)
        assert torch.equal(batch.user.ids[batch.user_of_row], expected.user.ids[expected.user_of_row])


def test_the_pieces_of_a_window_do_not_outlive_it(log, monkeypatch):
    pieces: list[weakref.ref[Batch]] = []
    encode = Encoder.encode

    def remembered(*rows: Any, **named: Any) -> Batch:
        batch = encode(*rows, **named)
        pieces.append(weakref.ref(batch))
        return batch

    monkeypatch.setattr(Encoder, "encode", remembered)
    with ThreadPoolExecutor(1) as pool:
        _, window, order = next(log.loader()._windows(0, 0, pool, 1))
    assert len(pieces) > 1 and all(piece() is None for piece in pieces)
    assert len(window) == len(order) >= 20


def test_the_same_seed_gives_the_same_batches(log):
    assert epoch(log.loader()) == epoch(log.loader())
    assert epoch(log.loader(), 3) == epoch(log.loader(), 3)


@pytest.fixture
def torch_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_any_number_of_threads_makes_the_same_batches_and_counts(log, torch_threads):
    """Values that the encoder does not know are counted once each, whoever met them."""
    encoder = Encoder.fit(SCHEMA, [table(0, 3).to_batches()[0]])
    made = []
    for threads in (1, 2, 3, 9):
        torch.set_num_threads(threads)
        loader = log.loader(batch_size=5)
        loader.encoder = encoder
        batches = [(b.index.tolist(), b.user.ids[b.user_of_row].tolist(), b.items.ids.tolist()) for b in loader]
        made.append((batches, loader.counts))
    assert all(one == made[0] for one in made)
    assert made[0][1] == {"rows": 57, "user: not in the vocabulary, read as unknown": 57 - 25}


def test_reading_shares_nothing_out_among_threads_of_torch(log, monkeypatch, torch_threads):
    """OpenMP counts them: with more than there are cores those of a training would sleep between operations."""
    torch.set_num_threads(3)
    met: list[tuple[str, int]] = []

    def noted(name: str, work: Any) -> Any:
        def noting(*given: Any, **named: Any) -> Any:
            met.append((name, torch.get_num_threads()))
            return work(*given, **named)

        return noting

    for owner, name in ((Encoder, "encode"), (loader_module, "share"), (Batch, "take")):
        monkeypatch.setattr(owner, name, noted(name, getattr(owner, name)))
    assert sum(map(len, log.loader(rank=0, world=2))) > 20
    assert set(met) == {("encode", 1), ("share", 1), ("take", 1)} and torch.get_num_threads() == 3


def test_errors_of_encoding_come_out_of_the_loader(log, torch_threads):
    """After all that was good, with no thread left behind, though the error is still at hand."""
    wrong = table(33, 9).set_column(3, "y", pa.array([0, 1, 0, 1, 0, 2, 0, 1, 0]))
    pq.write_table(wrong, log.files[1])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        before, found = set(threading.enumerate()), []
        with pytest.raises(InputError, match=r"part-1.parquet, row 5: label 'y' is 2") as caught:
            found.extend(batch.index.tolist() for batch in log.loader(seed=None, batch_size=6))
        assert caught.value and started(before) == [] and flat(found) == list(range(33 - 33 % 6))


def test_errors_of_reading_come_after_what_was_good(log, torch_threads):
    pq.write_table(table(33, 24).drop_columns("item"), log.files[1])
    for threads in (1, 3):
        torch.set_num_threads(threads)
        before, found = set(threading.enumerate()), []
        with pytest.raises(InputError, match="no column 'item'") as caught:
            found.extend(batch.index.tolist() for batch in log.loader(seed=None, batch_size=6))
        assert caught.value and started(before) == [] and flat(found) == list(range(33 - 33 % 6))


def test_epochs_and_seeds_differ(log):
    orders = [epoch(log.loader(), 0), epoch(log.loader(), 1), epoch(log.loader(seed=1), 0)]
    assert len({tuple(flat(rows for rows, _ in order)) for order in orders}) == 3
    assert epoch(log.loader(seed=None), 0) == epoch(log.loader(seed=None), 1)


@pytest.mark.parametrize("options", [{"window_rows": 1}, {"window_rows": 1000, "batch_size": 100}])
def test_windows_and_the_rows_in_them_are_shuffled_anew(log, tmp_path, options):
    """With small windows row groups are in another order; in one window over one row group only the rows can be."""
    if options["window_rows"] > 1:
        pq.write_table(table(0, 57), log.files[0])
        log.files.pop()
    orders = {
        tuple(flat(rows for rows, _ in epoch(log.loader(seed=seed, **options), number)))
        for seed, number in ((0, 0), (0, 1), (1, 0))
    }
    groups = {tuple(row // 10 if row < 33 else 4 for row in order[::6]) for order in orders}
    assert len(orders) == len(groups) == 3


def test_a_window_mixes_row_groups(log):
    first = indices(log.loader(window_rows=20, batch_size=20))[0]
    groups = [row // 10 if row < 33 else 4 + (row - 33) // 10 for row in first]
    changes = sum(a != b for a, b in itertools.pairwise(groups))
    assert changes > len(set(groups)) > 1


@pytest.mark.parametrize("window_rows", [1, 7, 20])
def test_a_window_ends_with_the_piece_that_fills_it(log, window_rows):
    windows = Counter(position.piece for _, position in epoch(log.loader(window_rows=window_rows, batch_size=1)))
    *full, last = windows.values()
    assert full and all(window_rows <= rows < window_rows + 6 for rows in full) and last < window_rows + 6


def test_every_order_of_a_window_is_possible(log):
    """The row that comes first is any of the rows, over enough seeds."""
    firsts = {next(iter(log.loader(window_rows=1000, batch_size=1, seed=seed))).index.item() for seed in range(40)}
    assert len(firsts) > 15


@pytest.mark.parametrize("options", [{}, {"batch_size": 7, "window_rows": 1}, {"batch_size": 25}, {"seed": None}])
@pytest.mark.parametrize("split", [NoSplit(), TimeSplit(column="time", validation=16, test=41), RandomSplit()])
def test_an_epoch_goes_on_from_any_position(log, options, split):
    whole = epoch(log.loader(split=split, **options), 2)
    for done, (_, position) in enumerate(whole, 1):
        assert epoch(log.loader(split=split, **options), 2, position) == whole[done:]
    assert epoch(log.loader(split=split, **options), 2, Position()) == whole


@pytest.mark.parametrize("world", [2, 3, 8])
def test_ranks_share_out_each_batch(log, world):
    whole = indices(log.loader(batch_size=9))
    ranks = [indices(log.loader(batch_size=9, rank=rank, world=world)) for rank in range(world)]
    for number, batch in enumerate(whole):
        shares = [rank[number] for rank in ranks]
        assert sorted(flat(shares)) == sorted(batch)
        assert max(map(len, shares)) - min(map(len, shares)) <= 1
    positions = [position for _, position in epoch(log.loader(batch_size=9))]
    for rank in range(world):
        assert [position for _, position in epoch(log.loader(batch_size=9, rank=rank, world=world))] == positions


def test_loading_without_a_broken_file(log, tmp_path):
    corrupt_pages(log.files[0])
    rows = ParquetRows(log.files, NoSplit(), skip_bad_shards=True)
    loader = Loader(rows, log.encoder, "train", 8, seed=0, window_rows=20)
    whole = epoch(loader)
    assert sorted(flat(found for found, _ in whole)) == list(range(33, 57))
    for done, (_, position) in enumerate(whole, 1):
        assert epoch(loader, 0, position) == whole[done:]


def test_a_bad_label_is_named_by_its_row_in_its_file(log):
    bad = table(33, 24)
    labels = [0] * 24
    labels[17] = 5
    pq.write_table(bad.set_column(3, "y", pa.array(labels)), log.files[1], row_group_size=10)
    with pytest.raises(InputError, match=r"part-1\.parquet, row 17: label 'y' is 5"):
        list(log.loader())


# -- the thread that works ahead


def started(before: set[threading.Thread]) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread not in before]


def stream_of(values: Iterable[Any]) -> Iterator[Any]:
    yield from values


@pytest.mark.parametrize("values", [list(range(100)), [], [None, 0, ()]])
@pytest.mark.parametrize("depth", [1, 3])
def test_items_come_in_order(values, depth):
    assert list(ahead(stream_of(values), depth)) == values


def test_it_stays_only_a_little_ahead():
    made: list[int] = []
    waiting = threading.Event()

    def items() -> Iterator[int]:
        for number in range(50):
            made.append(number)
            if number == 3:  # one is taken, three are held, and nothing is made that would have no place
                waiting.set()
            yield number

    stream = ahead(items(), 3)
    next(stream)
    assert waiting.wait(10)
    time.sleep(0.05)
    stream.close()
    assert made == [0, 1, 2, 3]


def test_the_threads_end_with_the_consumer(log):
    before = set(threading.enumerate())
    stream = log.loader(batch_size=1).epoch()
    next(stream)
    threads = started(before)
    assert threads
    stream.close()
    for thread in threads:
        thread.join(10)
    assert started(before) == []


def test_the_threads_end_with_the_epoch(log):
    before = set(threading.enumerate())
    stream = log.loader().epoch()
    next(stream)
    threads = started(before)
    assert len(list(stream)) == 7
    for thread in threads:
        thread.join(10)
    assert started(before) == []


@pytest.mark.parametrize("error", [InputError("row 3"), OSError("disk"), KeyboardInterrupt()])
def test_errors_come_out_after_what_was_good(error):
    def items() -> Iterator[int]:
        yield 1
        yield 2
        raise error

    stream = ahead(items(), 5)
    assert [next(stream), next(stream)] == [1, 2]
    with pytest.raises(type(error)):
        next(stream)


def test_batches_without_rows_can_be_joined(log):
    batch = next(iter(log.loader()))
    nothing = batch.take(torch.arange(0))
    assert Batch.cat([nothing, batch, nothing]).index.tolist() == batch.index.tolist()


def test_python_ends_while_a_window_is_being_made(tmp_path):
    """Readers within readers: the innermost is stopped first, and nobody waits for what it would have made."""
    script = (
        "import time\n"
        "from scalerec.data.loader import ahead\n"
        "def slow():\n    while True:\n        time.sleep(0.05)\n        yield 1\n"
        "def pairs(items):\n    for item in items:\n        yield item, next(items)\n"
        "batches = ahead(pairs(ahead(pairs(ahead(slow(), 2)), 1)), 4)\n"
        "print(next(batches))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("((1, 1)"), done.stderr

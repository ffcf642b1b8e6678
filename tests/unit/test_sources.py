"""What every source keeps to, and what they share: sums over the past, parts, downloads; the user's own files."""

from __future__ import annotations

import json
import zipfile
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
from scalerec.data.reader import ParquetRows
from scalerec.data.source import Prepared, Source, kept
from scalerec.data.sources.kuairand import KuaiRand
from scalerec.data.sources.movielens_1m import MovieLens1M
from scalerec.data.sources.movielens_100k import MovieLens100K
from scalerec.data.sources.parquet import Parquet
from scalerec.data.sources.synthetic import Synthetic
from scalerec.data.split import PARTS, RandomSplit, TimeSplit
from scalerec.errors import InputError
from scalerec.schema import Categorical, Group, Schema, Sequence, SequenceField, Task

ITEM = Categorical(name="i")
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


def with_times(folder: Path, times: list | np.ndarray) -> Parquet:
    schema = Schema(
        groups=(Group(name="all", side="item", features=(Categorical(name="x"),)),), tasks=(Task(name="y"),), user="u",
        time="t",
    )  # fmt: skip
    (folder / "schema.json").write_text(schema.model_dump_json())
    constant = {name: pa.repeat(0, len(times)) for name in ("u", "x", "y")}
    pq.write_table(pa.table({"t": times, **constant}), folder / "log.parquet", row_group_size=100)
    return Parquet(path=str(folder / "log.parquet"), schema_file=str(folder / "schema.json"))


@pytest.mark.parametrize(
    ("times", "rows", "test"),
    [
        (np.random.default_rng(0).permutation(1000), (800, 100, 100), 900),
        (np.repeat([20220420, 20220421, 20220422, 20220423], [500, 300, 60, 140]), (800, 60, 140), 20220423),
        (np.array([1, 2, 2, 2, 2, 3], "datetime64[s]"), (1, 4, 1), 3),
        (np.arange(1000) * 1e-3 + 1.7e9, (800, 100, 100), 1.7e9 + 0.9),
    ],
    ids=["shuffled", "days", "few", "milliseconds"],
)
def test_a_log_without_a_split_is_cut_in_time(tmp_path: Path, times: np.ndarray, rows: tuple, test: float) -> None:
    said: list[str] = []
    source = with_times(tmp_path, times)
    settled = source.settled(said.append, "--data.of")
    assert isinstance(settled.split, TimeSplit)
    assert settled.split.test == pytest.approx(test, rel=1e-13)
    assert said == [f"no --data.of.split: taking '{settled.split.model_dump_json()}'"]
    assert settled.settled(said.append) == settled and len(said) == 1
    found = ParquetRows.of(source, source.prepare())
    assert tuple(sum(batch.num_rows for batch in found.batches(part)) for part in PARTS) == rows


def test_a_log_of_two_times_or_missing_ones_asks_for_a_split(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"column 't': fewer than three different times.*--data.split"):
        with_times(tmp_path, [5, 5, 6]).settled()
    with pytest.raises(InputError, match=r"log\.parquet: column 't', row 1 of a piece: no time"):
        with_times(tmp_path, [5, None, 6]).settled()
    source = with_times(tmp_path, [5, 5, 6])
    assert source.model_copy(update={"split": RandomSplit()}).settled().split == RandomSplit()


def test_a_settled_source_means_the_same_files_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_times(tmp_path, [1, 2, 3])
    monkeypatch.chdir(tmp_path)
    source = Parquet(path="log.parquet", schema_file="schema.json").settled()
    monkeypatch.chdir("/")
    assert source.settled() == source
    assert source.prepare().files == [tmp_path / "log.parquet"]


def past_of_items(*names: str) -> Schema:
    past = tuple(Sequence(name=name, fields=(SequenceField(of="i"),)) for name in names)
    return Schema(
        groups=(
            Group(name="past", side="user", features=past), Group(name="item", side="item", features=(ITEM,)),
        ), tasks=(Task(name="y"),), user="u", item="i", time="t",
    )  # fmt: skip


def test_lists_are_all_brought_or_all_made(tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(past_of_items("h", "g").model_dump_json())
    log = {"u": [1, 1], "i": [1, 2], "t": [1, 2], "y": [0, 1], "h_i": [[], [1]]}
    pq.write_table(pa.table(log), tmp_path / "log.parquet")
    with pytest.raises(InputError, match="has the list column 'h_i' and not 'g_i'"):
        Parquet(path=str(tmp_path / "log.parquet"), schema_file=str(tmp_path / "schema.json")).prepare()


def test_files_of_different_widths_are_replayed_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))
    (tmp_path / "schema.json").write_text(past_of_items("h").model_dump_json())
    (tmp_path / "log").mkdir()
    for name, kind, times in (("a", pa.int64(), [1, 2]), ("b", pa.int32(), [3])):
        log = pa.table({"u": [1] * len(times), "i": pa.array(times, kind), "t": times, "y": [0] * len(times)})
        pq.write_table(log, tmp_path / "log" / f"{name}.parquet")
    source = Parquet(path=str(tmp_path / "log"), schema_file=str(tmp_path / "schema.json"))
    assert pq.read_table(source.prepare().files[0])["h_i"].to_pylist() == [[], [1], [1, 2]]
    pq.write_table(pa.table({"u": [1], "i": ["x"], "t": [4], "y": [0]}), tmp_path / "log" / "c.parquet")
    with pytest.raises(InputError, match="the files do not go together"):
        source.prepare()


def test_what_another_process_prepared_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path))

    def write(folder: Path) -> dict[str, Any]:
        pq.write_table(pa.table({"x": [1]}), folder / "a.parquet")
        return {"by": "the quicker"}

    def slowly(folder: Path) -> dict[str, Any]:
        made = write(folder)
        theirs.append(kept("test", {"number": 1}, write))
        return made | {"by": "the slower"}

    theirs: list[Prepared] = []
    found = kept("test", {"number": 1}, slowly)
    assert found == theirs[0] and found.notes == {"by": "the quicker"} and found.files[0].exists()
    assert not list(found.files[0].parent.parent.glob(".building-*"))


def test_parquet_names_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path in ("empty", "nothing.parquet", "no/*.parquet"):
        with pytest.raises(InputError, match=path.replace("*", r"\*")):
            Parquet(path=str(tmp_path / path), schema_file="s.json").prepare()
    with pytest.raises(InputError, match=r"s\.json: no such file"):
        Parquet(path="x", schema_file=str(tmp_path / "s.json")).schema()

"""The log of another source as sequences: which events are examples, what their lists hold, what is a target."""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scalerec.config import component
from scalerec.data.loader import Loader
from scalerec.data.parts import write_earlier
from scalerec.data.reader import ParquetRows
from scalerec.data.source import Source
from scalerec.data.sources.kuairand import KuaiRand
from scalerec.data.sources.movielens_1m import MovieLens1M
from scalerec.data.sources.parquet import Parquet
from scalerec.data.sources.sequences import Sequences
from scalerec.data.sources.synthetic import Synthetic
from scalerec.data.split import PARTS, ColumnSplit, NoSplit, RandomSplit, TimeSplit
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.features.encoder import Encoder
from scalerec.schema import Categorical, Group, Numeric, Schema, Sequence, SequenceField, Task

REAL = Path(os.environ.get("SCALEREC_DATA") or "/nowhere")
SCHEMA = Schema(
    groups=(
        Group(
            name="user",
            side="user",
            features=(
                Categorical(name="city"),
                Numeric(name="age"),
                Sequence(name="liked", fields=(SequenceField(of="item"),), where="like"),
            ),
        ),
        Group(
            name="item",
            side="item",
            features=(Categorical(name="tab"), Categorical(name="item", column="item_id"), Categorical(name="maker")),
        ),
    ),
    tasks=(Task(name="likes", label="like", mask="shown"), Task(name="buy")),
    user="user",
    item="item_id",
    time="time",
    time_unit=60.0,
    dim=4,
)
COLUMNS = {
    "user": pa.string(), "time": pa.int64(), "item_id": pa.int64(), "maker": pa.string(), "tab": pa.int64(),
    "city": pa.string(), "age": pa.float64(), "like": pa.int8(), "shown": pa.int8(), "buy": pa.int8(),
}  # fmt: skip
SPLIT = TimeSplit(column="time", validation=3, test=4)

# user, time, item; in the order of the files
LOG = [
    ("a", 1, 10),
    ("b", 1, 20),
    ("a", 3, 11),
    ("a", 3, 12),  # at the time of row 2
    ("c", 2, 30),
    ("a", 2, 13),
    ("b", 5, 21),
    ("d", 1, 40),
    ("d", 2, 41),
    ("d", 3, 42),
    (None, 2, 50),
    ("a", 4, None),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))


def row(user: Any, time: int, item: Any, **more: Any) -> dict[str, Any]:
    fixed = {"maker": "m", "tab": 0, "city": "x", "age": 1.0, "like": 0, "shown": 1, "buy": 1}
    return {"user": user, "time": time, "item_id": item} | fixed | more


def source(folder: Path, rows: list[dict[str, Any]], split: Any = SPLIT, files: int = 1) -> Parquet:
    """The rows as Parquet files, their histories with them."""
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()})
    table = history.replay(SCHEMA, table)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "schema.json").write_text(SCHEMA.model_dump_json())
    for number, part in enumerate(np.array_split(np.arange(len(rows)), files)):
        pq.write_table(table.take(pa.array(part)), folder / f"{number}.parquet", row_group_size=2)
    return Parquet(path=str(folder), schema_file=str(folder / "schema.json"), split=split)


def read(sequences: Sequences) -> list[dict[str, Any]]:
    return pa.concat_tables(pq.read_table(file) for file in sequences.prepare().files).to_pylist()


def by_part(rows: list[dict[str, Any]]) -> dict[str, dict[int, tuple[list, int]]]:
    """Part -> row number -> the items of its list and how many of them are new."""
    found: dict[str, dict] = {part: {} for part in PARTS}
    for row in rows:
        assert row["row"] not in found[row["part"]]
        found[row["part"]][row["row"]] = (row["events_item"], row["new_events"])
    return found


# -- which rows, with which past


def test_public_tests_the_last_event_and_trains_on_all_before(tmp_path: Path) -> None:
    sequences = Sequences(of=source(tmp_path / "log", [row(*entry) for entry in LOG]), protocol="public")
    tested = {3: ([10, 13, 11], 0), 6: ([20], 0), 9: ([40, 41], 0)}
    assert by_part(read(sequences)) == {
        "train": {2: ([10, 13], 2), 1: ([], 0), 8: ([40], 1)},
        "validation": tested,
        "test": tested,
    }
    notes = sequences.prepare().notes
    assert notes["users"] == 4
    assert notes["users with too few events, left out"] == 1
    assert notes["rows without a user"] == 1
    assert notes["rows without an item"] == 1
    assert notes["training events that are targets"] == 6
    assert "looks at the test" in notes["validation"]


def test_validated_holds_out_two_events(tmp_path: Path) -> None:
    sequences = Sequences(of=source(tmp_path / "log", [row(*entry) for entry in LOG]), protocol="validated")
    assert by_part(read(sequences)) == {
        "train": {5: ([10], 1), 7: ([], 0)},
        "validation": {2: ([10, 13], 0), 8: ([40], 0)},
        "test": {3: ([10, 13, 11], 0), 9: ([40, 41], 0)},
    }
    assert sequences.prepare().notes["users with too few events, left out"] == 2


def test_time_keeps_every_row_that_is_evaluated(tmp_path: Path) -> None:
    sequences = Sequences(of=source(tmp_path / "log", [row(*entry) for entry in LOG]))
    assert by_part(read(sequences)) == {
        "train": {5: ([10], 1), 1: ([], 0), 4: ([], 0), 8: ([40], 1)},
        "validation": {2: ([10, 13], 0), 3: ([10, 13], 0), 9: ([40, 41], 0)},  # equal times do not see each other
        "test": {6: ([20], 0), 11: ([10, 13, 11, 12], 0)},
    }
    notes = sequences.prepare().notes
    assert (notes["train rows"], notes["validation rows"], notes["test rows"]) == (4, 3, 2)


def test_evaluated_rows_without_a_user_are_kept(tmp_path: Path) -> None:
    rows = [row("a", 1, 1), row("a", 1, 2), row(None, 1, 3), row(None, 3, 4), row(None, 5, 5), row("a", 5, 6)]
    found = by_part(read(Sequences(of=source(tmp_path / "log", rows))))
    assert found["train"] == {1: ([1], 1)}
    assert found["validation"] == {3: ([], 0)}
    assert found["test"] == {4: ([], 0), 5: ([1, 2], 0)}


def test_a_gap_ends_a_session(tmp_path: Path) -> None:
    rows = [row("a", time, time) for time in (0, 1, 6, 7, 8, 30)]
    of = source(tmp_path / "log", [*rows, row("b", 8, 9)], TimeSplit(column="time", validation=31, test=32))
    found = by_part(read(Sequences(of=of, session_gap=5 * 60)))  # a unit of time is a minute
    assert found["train"] == {
        1: ([0], 1), 4: ([0, 1, 6, 7], 2), 5: ([0, 1, 6, 7, 8], 0), 6: ([], 0),
    }  # fmt: skip
    found = by_part(read(Sequences(of=of, session_gap=5 * 60 + 1)))
    assert found["train"] == {4: ([0, 1, 6, 7], 4), 5: ([0, 1, 6, 7, 8], 0), 6: ([], 0)}


def test_a_session_longer_than_the_list_is_counted_or_cut(tmp_path: Path) -> None:
    split = TimeSplit(column="time", validation=31, test=32)
    of = source(tmp_path / "log", [row("a", time, time) for time in range(7)], split)
    sequences = Sequences(of=of, max_len=3)
    assert by_part(read(sequences))["train"] == {6: ([3, 4, 5], 3)}
    notes = sequences.prepare().notes
    assert notes["training events that are targets"] == 4
    assert notes["training events that are never a target, more than 3 before the end"] == 3
    sequences = Sequences(of=of, max_len=3, session_events=3)
    assert by_part(read(sequences))["train"] == {2: ([0, 1], 2), 5: ([2, 3, 4], 2), 6: ([3, 4, 5], 0)}


entries = st.tuples(st.sampled_from(["a", "b", "c", "d", None]), st.integers(0, 9), st.booleans())


@settings(max_examples=60, deadline=None)
@given(
    log=st.lists(entries, min_size=1, max_size=30),
    gap=st.sampled_from([None, 120.0, 240.0]),
    longest=st.sampled_from([None, 2]),
    max_len=st.sampled_from([1, 3, 50]),
    split=st.sampled_from([SPLIT, TimeSplit(column="time", validation=8, test=9), RandomSplit(test=0.3)]),
)
def test_every_training_event_is_a_target_once_and_nobody_looks_ahead(
    log: list, gap: Any, longest: Any, max_len: int, split: Any
) -> None:
    rows = [row(user, time, number if known else None) for number, (user, time, known) in enumerate(log)]
    with tempfile.TemporaryDirectory() as name:
        of = source(Path(name) / "log", rows, split, files=min(2, len(rows)))
        sequences = Sequences(of=of, max_len=max_len, session_gap=gap, session_events=longest)
        folder = Path(name) / "out"
        folder.mkdir()
        try:
            notes = sequences.build(folder, lambda message: None)
        except InputError:
            assert all(user is None or not known for user, _, known in log)
            return
        written = pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("*.parquet"))).to_pylist()
        inner = {part: list(ParquetRows(sorted((Path(name) / "log").glob("*.parquet")), split).pieces(part))
                 for part in PARTS}  # fmt: skip
    part_of = {int(number): part for part, pieces in inner.items() for piece in pieces for number in piece.index}

    targets: Counter[int] = Counter()
    for found in written:
        user, time = log[found["row"]][:2]
        assert part_of[found["row"]] == found["part"]
        for item, moment in zip(found["events_item"], found["events_time"]):
            assert (log[item][0], log[item][1]) == (user, moment)
            assert (moment, item) < (time, found["row"])
            assert found["part"] == "train" or moment < time
        past = [e for e in range(len(log)) if log[e][0] == user is not None and log[e][2] and log[e][1] < time]
        if found["part"] != "train":
            assert found["events_item"] == sorted(past, key=lambda e: (log[e][1], e))[-max_len:]
            assert found["new_events"] == 0
        else:
            new = found["events_item"][len(found["events_item"]) - found["new_events"] :]
            targets.update([*new, found["row"]])
            assert len(new) <= max_len
    training = [e for e, (user, _, known) in enumerate(log) if user and known and part_of[e] == "train"]
    missed = notes[f"training events that are never a target, more than {max_len} before the end"]
    assert set(targets) <= set(training)
    assert all(count == 1 for count in targets.values())
    assert len(targets) == len(training) - missed == notes["training events that are targets"]
    assert not missed or (longest is None and max_len < 30)
    evaluated = [e for e in part_of if part_of[e] != "train"]
    assert sorted(found["row"] for found in written if found["part"] != "train") == sorted(evaluated)


@pytest.mark.parametrize("protocol", ["time", "public", "validated"])
@pytest.mark.parametrize("partition_rows", [1, 4, 7])
def test_any_number_of_partitions_gives_the_same_rows(
    protocol: Any, partition_rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row(*entry, city=f"in {entry[0]}") for entry in LOG] + [row(None, time, time) for time in range(6)]
    sequences = Sequences(
        of=source(tmp_path / "log", rows, files=2), protocol=protocol, context=("city",), auxiliary=("tab",)
    )

    def build(name: str) -> tuple[list, dict]:
        folder = tmp_path / name
        folder.mkdir()
        notes = sequences.build(folder, lambda message: None)
        table = pa.concat_tables(pq.read_table(file) for file in sorted(folder.glob("*.parquet")))
        return sorted(table.to_pylist(), key=lambda row: (row["part"], row["row"])), notes

    whole = build("whole")
    monkeypatch.setattr(Sequences, "partition_rows", partition_rows)
    assert build("pieces") == whole


# -- what the rows hold


def test_the_past_keeps_actions_times_and_changes(tmp_path: Path) -> None:
    rows = [
        row("a", 0, 1, maker="x", tab=7, like=1, buy=0),
        row("a", 1, 2, maker=None, tab=7, like=None, buy=1),
        row("a", 2, 3, maker="y", tab=8, like=1, shown=0, buy=None),
        row("a", 2, 4, maker="y", tab=8),
        row("a", 3, 5, tab=7, city="z"),
    ]
    of = source(tmp_path / "log", rows)
    sequences = Sequences(of=of, protocol="public", fields=("maker",), auxiliary=("tab",), context=("city",))
    schema, found = sequences.schema(), read(sequences)
    test = next(row for row in found if row["part"] == "test")
    assert test["events_item"] == [1, 2, 3, 4]
    assert test["events_maker"] == ["x", None, "y", "y"]
    assert test["events_time"] == [0, 1, 2, 2]
    assert test["events_like"] == [1, None, None, 0]  # a masked label is none
    assert test["events_buy"] == [0, 1, None, 1]
    assert test["tab_changes_tab"] == [7, 8]
    assert test["tab_changes_time"] == [0, 2]
    assert test["tab"] == 7
    assert test["city"] == "z"
    assert not {"liked_item", "age"} & set(test)

    prepared = sequences.prepare()
    reader = ParquetRows.of(sequences, prepared)
    encoder = Encoder.fit(schema, reader.batches("train", schema.input_columns()))
    piece = next(piece for piece in reader.pieces("train") if piece.rows.num_rows)
    batch = encoder.encode(piece.rows, index=piece.index)
    assert batch.index.tolist() == [3]
    assert batch.new_events is not None and batch.new_events.tolist() == [3]
    assert batch.user.now is not None and batch.user.now.tolist() == [120.0]
    assert batch.user.times["events"].values.tolist() == [0.0, 60.0, 120.0]
    assert batch.user.actions["events"].values.isnan().tolist() == [[False, False], [True, False], [True, True]]


def test_a_history_kept_online_is_the_one_of_the_files(tmp_path: Path) -> None:
    rows = [row("a", time, time, like=time % 2, shown=shown) for time, shown in enumerate([1, 0, None, 1, 1])]
    sequences = Sequences(of=source(tmp_path / "log", rows), protocol="public")
    state: history.State = {}
    for event in rows[:-1]:
        state = history.append(state, event, sequences.schema())
    test = next(found for found in read(sequences) if found["part"] == "test")
    online = history.as_columns(state, sequences.schema())
    assert online == {name: test[name] for name in online}
    assert online["events_like"] == [0, None, None, 1]


def test_the_label_of_a_masked_row_stays_as_it_was_and_does_not_count(tmp_path: Path) -> None:
    sequences = Sequences(of=source(tmp_path / "log", [row("a", 0, 1), row("a", 5, 2, like=1, shown=0)]))
    (found,) = ParquetRows.of(sequences, sequences.prepare()).batches("test")
    assert found["like"].to_pylist() == [1]
    assert Encoder.fit(sequences.schema(), [found]).encode(found).weights.tolist() == [[0.0, 1.0]]


def test_two_tasks_with_one_label_are_refused_where_it_is_an_action(tmp_path: Path) -> None:
    shared = SCHEMA.model_copy(update={"tasks": (*SCHEMA.tasks, Task(name="all likes", label="like"))})
    (tmp_path / "schema.json").write_text(shared.model_dump_json())
    of = Parquet(path="p", schema_file=str(tmp_path / "schema.json"))
    with pytest.raises(InputError, match=r"two tasks have the label 'like': .* --data\.actions false"):
        Sequences(of=of).schema()
    assert len(Sequences(of=of, actions=False).schema().tasks) == 3


def test_schema_of_sequences(tmp_path: Path) -> None:
    of = source(tmp_path / "log", [row(*entry) for entry in LOG])
    schema = Sequences(of=of, fields=("maker", "item"), auxiliary=("tab", "city"), context=("city",)).schema()
    held = {group.name: (group.side, [feature.name for feature in group.features]) for group in schema.groups}
    assert held == {
        "context": ("user", ["city"]),
        "events": ("user", ["events"]),
        "auxiliary": ("user", ["tab_changes", "city_changes"]),
        "item": ("item", ["item", "maker", "tab"]),
    }
    assert [field.of for field in schema.sequences[0].fields] == ["item", "maker"]
    assert schema.sequences[0].actions == ("like", "buy")
    assert (schema.tasks, schema.user, schema.item, schema.time) == (SCHEMA.tasks, "user", "item_id", "time")
    assert (schema.time_unit, schema.dim, schema.new_events) == (60.0, 4, "new_events")
    plain = Sequences(of=of, actions=False).schema()
    assert [group.name for group in plain.groups] == ["events", "item"]
    assert plain.sequences[0].actions == ()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fields": ("makers",)}, "--data.fields: 'makers' is no item-side .* did you mean 'maker'"),
        ({"fields": ("city",)}, "'city' is no item-side categorical feature of parquet"),
        ({"auxiliary": ("age",)}, "--data.auxiliary: 'age' is no categorical feature"),
        ({"context": ("item",)}, "'item' is no user-side categorical feature of parquet; did you mean 'city'"),
    ],
)
def test_a_wrong_name_names_the_nearest(options: dict, words: str, tmp_path: Path) -> None:
    of = source(tmp_path / "log", [row(*entry) for entry in LOG])
    with pytest.raises(InputError, match=words):
        Sequences(of=of, **options).schema()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"time": None}, "must name the `time` and the `item`"),
        ({"item": None}, "must name the `time` and the `item`"),
        ({"item": "like"}, "no item-side categorical feature reads 'like'"),
        ({"user": "row"}, "'row' is a name that sequences add"),
        ({"tasks": (Task(name="events_time"),)}, "'events_time' is a name that sequences add"),
    ],
)
def test_a_log_that_makes_no_sequences_is_refused(change: dict, words: str, tmp_path: Path) -> None:
    (tmp_path / "schema.json").write_text(SCHEMA.model_copy(update=change).model_dump_json())
    with pytest.raises(InputError, match=words):
        Sequences(of=Parquet(path="p", schema_file=str(tmp_path / "schema.json"))).schema()


def test_options_that_do_not_go_together_are_refused(tmp_path: Path) -> None:
    of = source(tmp_path / "log", [row("a", 1, 1)])
    with pytest.raises(ValidationError, match="session_gap: protocol 'public'"):
        Sequences(of=of, protocol="public", session_gap=60)
    with pytest.raises(ValidationError, match="sequences of sequences"):
        Sequences(of=Sequences(of=of))
    with pytest.raises(InputError, match=r"--data\.of\.split"):
        Sequences(of=of.model_copy(update={"split": NoSplit()})).prepare()
    with pytest.raises(InputError, match="no user has enough events for protocol 'validated'"):
        Sequences(of=of, protocol="validated").prepare()


# -- as a source


@pytest.mark.parametrize("inner", [MovieLens1M(), KuaiRand(), Synthetic(rows=5_000)], ids=lambda inner: inner.kind)
def test_sequences_survive_json(inner: Source) -> None:
    sequences = Sequences(of=inner, max_len=7, protocol="public")
    found = component(json.loads(sequences.model_dump_json()))
    assert found == sequences
    assert type(found.of) is type(inner)
    assert found.schema().sequences[0].fields[0].of == sequences.schema().item


def test_the_cache_knows_the_inner_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [row(*entry) for entry in LOG]
    of = source(tmp_path / "log", rows)
    known = Sequences(of=of).identity()
    assert Sequences(of=of).identity() == known
    assert Sequences(of=of.model_copy(update={"split": RandomSplit()})).identity() != known
    with pytest.raises(ValueError, match=r"--data\.of\.split"):
        Sequences(of=of, split=NoSplit())
    assert Sequences(of=of, max_len=3).identity() != known
    source(tmp_path / "log", [*rows, row("z", 9, 9)])
    assert Sequences(of=of).identity() != known
    made = Sequences(of=Synthetic(rows=5_000)).identity()
    assert Sequences(of=Synthetic(rows=5_000, seed=1)).identity() != made
    monkeypatch.setattr(Synthetic, "version", Synthetic.version + 1)
    assert Sequences(of=Synthetic(rows=5_000)).identity() != made


def test_evaluated_rows_pair_with_those_of_the_source_itself(tmp_path: Path) -> None:
    inner = Synthetic(rows=5_000)
    sequences = Sequences(of=inner, max_len=20)
    assert sequences.best_scores() == inner.best_scores()
    columns = ["user", "item_a_0", "click", "p_click"]
    for part in ("validation", "test"):
        found = []
        for each in (inner, sequences):
            pieces = list(ParquetRows.of(each, each.prepare()).pieces(part, columns))
            index = np.concatenate([piece.index for piece in pieces])
            table = pa.Table.from_batches([piece.rows.select(columns) for piece in pieces])
            found.append((np.sort(index).tolist(), table.take(pa.array(np.argsort(index)))))
        assert found[0] == found[1]


def test_only_row_groups_of_the_part_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sequences = Sequences(of=source(tmp_path / "log", [row(*entry) for entry in LOG]))
    rows = ParquetRows.of(sequences, sequences.prepare())
    assert [group.part for group in rows.row_groups] == list(PARTS)
    assert [piece.number for piece in rows.pieces("test")] == [2]
    assert sum(piece.rows.num_rows for piece in rows.pieces("train", ["user"])) == 4


def test_training_on_sequences_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Sequences, "partition_rows", 300)  # row groups of all parts in turn
    sequences = Sequences(of=Synthetic(rows=2_000), max_len=5)
    rows, schema = ParquetRows.of(sequences, sequences.prepare()), sequences.schema()
    assert len(rows.row_groups) > 15
    encoder = Encoder.fit(schema, rows.batches("train", schema.input_columns()))
    loader = Loader(rows, encoder, "train", 7, seed=1, window_rows=20)
    whole = list(loader.epoch(1))
    seen = np.sort(np.concatenate([batch.index.numpy() for batch, _ in whole]))
    assert len(np.unique(seen)) == len(seen) == rows.num_rows - 600  # 200 validate, 400 test
    for cut in (1, 4, len(whole) - 2):
        again = list(loader.epoch(1, whole[cut - 1][1]))
        assert [batch.index.tolist() for batch, _ in again] == [batch.index.tolist() for batch, _ in whole[cut:]]


def test_a_column_says_the_part() -> None:
    split = ColumnSplit(column="part")
    names = ["test", "train", "validation", "train"]
    for values in (pa.array(names), pa.array(names).dictionary_encode(), pa.array(names, pa.large_string())):
        assert split.part_of(pa.record_batch({"part": values}), 0).tolist() == [2, 0, 1, 0]
    for wrong, words in ((["train", "dev"], "holds 'dev'"), (["train", None], "holds None"), ([1, 2], "is int64")):
        with pytest.raises(InputError, match=f"'part' {words}.*train, validation or test"):
            split.part_of(pa.record_batch({"part": wrong}), 0)
    with pytest.raises(InputError, match="no column 'part'"):
        split.part_of(pa.record_batch({"x": [1]}), 0)


def test_a_file_with_mixed_row_groups_is_split_by_its_column(tmp_path: Path) -> None:
    parts = ["train", "test", "train", "train", "validation", None]
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.table({"part": parts, "n": [10, 11, 12, 13, 14, 15]}), path, row_group_size=2)
    rows = ParquetRows([path], ColumnSplit(column="part"), row_column="n")
    assert [group.part for group in rows.row_groups] == ["", "train", ""]
    pieces = rows.pieces("train", [])
    assert [next(pieces).index.tolist() for _ in range(2)] == [[10], [12, 13]]
    with pytest.raises(InputError, match=r"rows\.parquet.*holds None"):
        next(pieces)


@pytest.mark.slow
@pytest.mark.skipif(not (REAL / "ml-1m").is_dir(), reason="needs the data set under SCALEREC_DATA")
def test_movielens_1m_has_one_sequence_a_user() -> None:
    sequences = Sequences(of=MovieLens1M(), protocol="public")
    prepared = sequences.prepare()
    rows = ParquetRows.of(sequences, prepared)
    for part in PARTS:
        found = pa.Table.from_batches(list(rows.batches(part, ["user_id", "events_item_id", "new_events"])))
        assert len(found["user_id"].unique()) == found.num_rows == 6040
        assert max(len(events) for events in found["events_item_id"].to_pylist()) == 200
        if part == "train":
            assert [len(events) for events in found["events_item_id"].to_pylist()] == found["new_events"].to_pylist()


@pytest.mark.parametrize("partition_rows", [1_000_000, 4])
@pytest.mark.parametrize("protocol", ["time", "public", "validated"])
def test_events_from_before_the_log_are_past_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, partition_rows: int, protocol: Any
):
    monkeypatch.setattr(Sequences, "partition_rows", partition_rows)
    of = source(tmp_path / "log", [row(user, time, item) for user, time, item in LOG])
    of = of.model_copy(update={"path": str(tmp_path / "log" / "0.parquet")})
    before = {"user": ["a", "a", "e"], "time": [0, 0, 0], "item_id": [1, 2, 3], "like": [1, None, 1]}
    write_earlier(tmp_path / "log", pa.table(before))
    with_past = by_part(read(Sequences(of=of, protocol=protocol)))
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "other"))
    (tmp_path / "log" / "earlier" / "events.parquet").unlink()
    without = by_part(read(Sequences(of=of, protocol=protocol)))
    assert all(rows.keys() <= with_past[part].keys() for part, rows in without.items())
    assert with_past["train"].keys() == without["train"].keys()
    for part, rows in without.items():
        for number, (items, new) in rows.items():
            past = [1, 2] if LOG[number][0] == "a" else []
            assert with_past[part][number] == ([*past, *items], new)

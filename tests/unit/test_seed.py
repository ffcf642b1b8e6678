"""Stores filled from logs: what is in them is what training's files say, whatever the log and its parts."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalerec.data.parts import write_earlier
from scalerec.data.reader import ParquetRows
from scalerec.data.source import Prepared, Source
from scalerec.data.sources.parquet import Parquet
from scalerec.data.sources.sequences import Sequences
from scalerec.data.split import TimeSplit
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.models import dcnv2
from scalerec.schema import Schema
from scalerec.serving.events import Event
from scalerec.serving.seed import _renewed, seed_from, write_state
from scalerec.serving.store import Store, open_store
from scalerec.serving.tables import UserTable
from tests.contract import world
from tests.contract.world import row
from tests.unit.bundles import saved_run
from tests.unit.stores import LISTS, SCHEMA

USERS, ROWS, VALIDATION, TEST = 6, 160, 60, 80


def log(moments: bool = False) -> pa.Table:
    """Rows in no order, some without a user, with many equal times; one user only comes in the test."""
    random = np.random.default_rng(0)
    time = random.integers(0, 100, ROWS)
    user = random.integers(0, USERS, ROWS)
    user = np.where(time < TEST, user % (USERS - 1), user)
    times = pa.array(time * 1_000_000, pa.timestamp("us")) if moments else pa.array(time)
    return pa.table(
        {
            "user": pa.array(user, mask=random.random(ROWS) < 0.05),
            "time": times,
            "item_id": random.integers(0, 9, ROWS),
            "maker": pa.array(random.choice(["x", "y"], ROWS)).dictionary_encode(),
            "like": random.integers(0, 2, ROWS).astype(bool),
            "buy": pa.array(random.integers(0, 2, ROWS), mask=random.random(ROWS) < 0.2),
            "shown": random.integers(0, 2, ROWS).astype(np.float32),
        }
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))


def source(folder: Path, rows: pa.Table, schema: Schema = SCHEMA) -> Parquet:
    for part in range(2):
        pq.write_table(rows.slice(part * ROWS // 2, ROWS // 2), folder / f"log-{part}.parquet", row_group_size=30)
    (folder / "schema.json").write_text(schema.model_dump_json())
    cuts = (VALIDATION, TEST)
    if pa.types.is_timestamp(rows["time"].type):
        cuts = tuple(datetime(1970, 1, 1, 0, cut // 60, cut % 60) for cut in cuts)
    split = TimeSplit(column="time", validation=cuts[0], test=cuts[1])
    return Parquet(path=str(folder / "log-*.parquet"), schema_file=str(folder / "schema.json"), split=split)


def rows_of_test(data: Source) -> list[dict[str, Any]]:
    schema = data.schema()
    lists = [column for sequence in schema.sequences for column in sequence.list_columns()]
    batches = ParquetRows.of(data, data.prepare()).batches("test", [*history.columns(schema), schema.user, *lists])
    return sorted(pa.Table.from_batches(batches).to_pylist(), key=lambda row: row["time"])


def goes_on(store: Store, data: Source) -> int:
    """Each row of the test by time: its lists in training's files are what the store gives; then it happens."""
    schema, compared = data.schema(), 0
    lists = [column for sequence in schema.sequences for column in sequence.list_columns()]
    for number, logged in enumerate(rows_of_test(data)):
        if logged["user"] is None:
            continue
        state = store.history(logged["user"], before=logged["time"])
        assert history.as_columns(state, schema) == {column: logged[column] for column in lists}
        store.append([Event(str(number), logged["user"], logged)])
        compared += len(lists)
    return compared


@pytest.mark.parametrize("moments", [False, True])
@pytest.mark.parametrize("partition_rows", [1_000_000, 50])
def test_a_store_goes_on_where_the_log_ends(tmp_path: Path, moments: bool, partition_rows: int) -> None:
    data = source(tmp_path, log(moments))
    store = open_store(f"lmdb:{tmp_path / 'store'}", SCHEMA)
    said: list[str] = []
    counts = seed_from(
        data, store, parts=("train", "validation"), progress=said.append, partition_rows=partition_rows
    )  # fmt: skip
    assert counts["users"] == USERS - 1 and counts["events"] > 0
    assert store.kinds == {"time": "moment" if moments else "number", "item_id": "number", "maker": "text",
                           "like": "number", "buy": "number", "shown": "number"}  # fmt: skip
    assert said[-1].startswith(f"histories of {USERS - 1} users")
    assert goes_on(store, data) > 50
    with pytest.raises(InputError, match="not empty"):
        seed_from(data, store)
    store.close()


def test_the_whole_log_is_its_events_one_by_one(tmp_path: Path) -> None:
    rows = log()
    data, store, expected = source(tmp_path, rows), open_store("memory:", SCHEMA), open_store("memory:", SCHEMA)
    seed_from(data, store)
    some = [(str(number), row["user"], row) for number, row in enumerate(rows.to_pylist()) if row["user"] is not None]
    expected.append([Event(*event) for event in some])
    for user in range(USERS):
        assert store.known(user) == expected.known(user)
        for before in range(60, 100, 7):
            assert store.history(user, before) == expected.history(user, before)


def test_only_until_a_time(tmp_path: Path) -> None:
    data, store, whole = source(tmp_path, log(True)), open_store("memory:", SCHEMA), open_store("memory:", SCHEMA)
    seed_from(data, store, until="1970-01-01T00:01:10Z")
    seed_from(data, whole)
    for user in range(USERS):
        assert store.history(user) == whole.history(user, before=datetime(1970, 1, 1, 0, 1, 10))
    with pytest.raises(InputError, match="until 70: no time like those in column 'time'"):
        seed_from(data, open_store("memory:", SCHEMA), until=70)
    nothing = open_store("memory:", SCHEMA)
    seed_from(data, nothing, until="1969-01-01")
    assert nothing.users() == []


def test_files_may_write_moments_in_different_zones(tmp_path: Path) -> None:
    rows = history.replay(SCHEMA, log(True))
    data, store, expected = source(tmp_path, rows), open_store("memory:", SCHEMA), open_store("memory:", SCHEMA)
    seed_from(data, expected)
    for part, zone in enumerate(("Europe/Berlin", "UTC")):
        moments = rows["time"].cast(pa.timestamp("ms" if part else "us", zone))
        zoned = rows.set_column(rows.column_names.index("time"), "time", moments)
        pq.write_table(zoned.slice(part * ROWS // 2, ROWS // 2), tmp_path / f"log-{part}.parquet")
    seed_from(data.model_copy(), store)
    assert store.users() == expected.users() != []
    for user in store.users():
        assert store.history(user) == expected.history(user)


def test_sequences_are_filled_from_the_log_that_they_are_of(tmp_path: Path) -> None:
    data = Sequences(of=source(tmp_path, log()), max_len=4, fields=("maker",), auxiliary=("maker",))
    store = open_store("memory:", data.schema())
    seed_from(data, store, parts=("train", "validation"))
    assert goes_on(store, data) > 50
    public = data.model_copy(update={"protocol": "public"})
    with pytest.raises(InputError, match="'public' has no parts in time"):
        seed_from(public, open_store("memory:", data.schema()), parts=("train",))


class Begun(Parquet):
    """A log with events from before it."""

    kind: Any = "begun"

    def prepare(self, progress: Any = print) -> Prepared:
        return Source.prepare(self, progress)

    def build(self, folder: Path, progress: Any) -> dict[str, Any]:
        rows = pq.read_table(self.files()[0].parent, schema=None)
        before = log().filter(pa.array(np.arange(ROWS) % 5 == 0))
        before = before.set_column(1, "time", pa.array(np.full(before.num_rows, -5)))
        before = pa.concat_tables([before, before.slice(0, 1).set_column(0, "user", pa.array([77]))])
        write_earlier(folder, before.drop_columns(["buy"]))
        empty = before.set_column(5, "buy", pa.nulls(before.num_rows, pa.int64()))
        whole = pa.concat_tables([empty, rows], promote_options="permissive")
        for piece in history.replay_pieces(self.schema(), whole, only=np.arange(empty.num_rows, whole.num_rows)):
            pq.write_table(piece, folder / "part-00000.parquet")
        return {}


def test_what_was_before_the_log_is_there(tmp_path: Path) -> None:
    (tmp_path / "log").mkdir()
    plain = source(tmp_path / "log", log())
    (tmp_path / "log" / "schema.json").rename(tmp_path / "schema.json")
    data = Begun(path=str(tmp_path / "log"), schema_file=str(tmp_path / "schema.json"), split=plain.split)
    store = open_store("memory:", SCHEMA)
    seed_from(data, store, parts=("train", "validation"))
    assert 77 in store.users()  # never in the log itself
    assert USERS - 1 in store.users()
    assert goes_on(store, data) > 50


def test_a_log_with_lists_alone_ends_before_its_last_rows(tmp_path: Path) -> None:
    whole = history.replay(SCHEMA, log()).drop_columns(["maker"])
    data, store, said = source(tmp_path, whole), open_store("memory:", SCHEMA), []
    seed_from(data, store, progress=said.append)
    assert any("no column 'maker': histories end before each user's last row" in line for line in said)
    last = {row["user"]: row for row in sorted(whole.to_pylist(), key=lambda row: row["time"])}
    for user in range(USERS):
        assert history.as_columns(store.history(user), SCHEMA) == {column: last[user][column] for column in LISTS}


def test_another_schema_is_refused(tmp_path: Path) -> None:
    data = source(tmp_path, log())
    with pytest.raises(InputError, match="another schema"):
        seed_from(data, open_store("memory:", SCHEMA.model_copy(update={"time_unit": 2.0})))


# -- tables of users


def test_rows_are_found_by_their_id(tmp_path: Path) -> None:
    rows = pa.table(
        {
            "user": pa.array(["a", "b", "1", "a"]).dictionary_encode(), "age": [1, None, 3, 4],
            "tags": [["x"], [], None, ["y", "z"]], "born": pa.array([0] * 4, pa.timestamp("s")),
        }
    )  # fmt: skip
    pq.write_table(rows, tmp_path / "users.parquet")
    table = UserTable.load(tmp_path / "users.parquet", "user")
    assert table.row("a") == {"age": 4, "tags": ["y", "z"], "born": datetime(1970, 1, 1)}
    assert table.row("b")["age"] is None
    assert table.columns == ["age", "tags", "born"]
    for unknown in ("c", 1, 1.0, None, 2**62, float("nan")):
        assert table.row(unknown) == {}
    assert table.users("a") == ["a", "a"] and table.users("", 2) == ["a", "b"]


@pytest.mark.parametrize("kind", [pa.int32(), pa.uint64(), pa.float64()])
def test_rows_are_found_by_numbers(kind: pa.DataType) -> None:
    table = UserTable(pa.table({"id": pa.array([5, 10, None], kind), "age": [1, 2, 3]}), "id")
    assert table.row(5) == table.row(5.0) == table.row(np.int8(5)) == {"age": 1}
    assert table.row("5") == table.row(6) == table.row(None) == {}
    assert table.users("1") == [10] and len(table) == 3
    with pytest.raises(InputError, match="'user' is a list"):
        table.row([1])


def test_a_table_without_its_ids_or_unreadable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "users.parquet").write_text("no")
    with pytest.raises(InputError, match="not a readable Parquet file"):
        UserTable.load(tmp_path / "users.parquet", "user")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "users.parquet")
    with pytest.raises(InputError, match=r"users.parquet: no column 'user'"):
        UserTable.load(tmp_path / "users.parquet", "user")
    assert UserTable(pa.table({"user": pa.array([], pa.string())}), "user").row("a") == {}


# -- a folder for a service


def exported(folder: Path, name: str, rows: list[dict[str, Any]]) -> Path:
    """A run of the contract world's schema, whose state is in `folder`/state."""
    run = saved_run(folder / name, dcnv2.tiny(), pa.RecordBatch.from_pylist(rows))
    write_state(run, folder / "state", lambda message: None)
    return next((folder / "state").iterdir())


def test_a_later_run_s_users_replace_their_rows_and_histories_stay(tmp_path: Path) -> None:
    log = [row(user, number) for number in range(4) for user in range(6)]
    held = exported(tmp_path, "first", log)
    store = open_store(f"lmdb:{held}", world.SCHEMA)
    events = {user: store.history(user) for user in store.users()}
    store.close()
    more = [{**row(user, 9), "city": "moved"} for user in range(4, 8)]
    assert exported(tmp_path, "second", more) == held
    users = UserTable.load(held / "users.parquet", "user")
    assert len(users) == 8  # u4 and u5 in one row each
    assert [users.row(f"u{user}")["city"] == "moved" for user in range(8)] == [False] * 4 + [True] * 4
    assert users.row("u1")["age"] == row(1, 3)["age"]
    store = open_store(f"lmdb:{held}", world.SCHEMA)
    assert events and {user: store.history(user) for user in store.users()} == events
    store.close()
    assert [file.name for file in held.glob(".building*")] == []


def test_what_only_the_file_knows_stays(tmp_path: Path) -> None:
    old = pa.table({"user": [3, 1, 2], "city": ["c", "a", "b"], "age": [30, 10, 20]})
    pq.write_table(old, tmp_path / "users.parquet")
    new = pa.table({"user": [1, 4], "city": pa.array(["x", "y"]).dictionary_encode(), "likes": [[1], [3, 4]]})
    assert _renewed(tmp_path / "users.parquet", new, "user").to_pylist() == [
        {"user": 1, "city": "x", "likes": [1], "age": 10},
        {"user": 4, "city": "y", "likes": [3, 4], "age": None},
        {"user": 3, "city": "c", "likes": None, "age": 30},
        {"user": 2, "city": "b", "likes": None, "age": 20},
    ]
    with pytest.raises(InputError, match=r"holds other types than this run .*city.* new --state folder"):
        _renewed(tmp_path / "users.parquet", pa.table({"user": [1], "city": [7]}), "user")


def test_a_state_that_failed_leaves_nothing_and_is_repeated(tmp_path: Path, monkeypatch) -> None:
    log = [row(user, number) for number in range(4) for user in range(6)]

    def broken(*of: Any, **more: Any) -> Any:
        raise InputError("the log broke")

    with monkeypatch.context() as patched:
        patched.setattr("scalerec.serving.seed.seed", broken)
        with pytest.raises(InputError, match="the log broke"):
            exported(tmp_path, "first", log)
    assert list((tmp_path / "state").rglob("*")) == []
    held = exported(tmp_path, "again", log)
    with monkeypatch.context() as patched:  # what was there already stays
        patched.setattr("scalerec.serving.seed.os.replace", broken)
        with pytest.raises(InputError, match="the log broke"):
            exported(tmp_path, "second", log)
    assert (held / "users.parquet").is_file() and not list(held.glob(".building*"))

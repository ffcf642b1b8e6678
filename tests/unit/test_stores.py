"""What the single stores promise beyond the list of all, and what is served while one cannot be reached."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lmdb
import pyarrow as pa
import pytest

from scalerec.errors import InputError
from scalerec.features import history
from scalerec.features.encoder import Encoder
from scalerec.schema import Categorical, Group, Schema, Sequence, SequenceField
from scalerec.serving.events import Event, kinds_of
from scalerec.serving.lmdb_store import LMDBStore
from scalerec.serving.store import MemoryStore, Remembered, StoreUnavailable, open_store
from tests.redis_server import BINARY, MISSING, RedisServer
from tests.unit.stores import LISTS, SCHEMA, columns, emptied, event


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip(MISSING)
    server = RedisServer(tmp_path_factory.mktemp("redis"), "--appendfsync", "no")
    server.start()
    yield server
    server.kill()


@pytest.mark.parametrize("kind", ["lmdb", "redis"])
def test_another_process_finds_what_was_written(kind: str, request, tmp_path: Path) -> None:
    """As far as one process can show it: the store is closed and opened again."""
    if kind == "redis":
        url = request.getfixturevalue("redis_server").url
        emptied(url)
    else:
        url = f"lmdb:{tmp_path / 'store'}"
    store = open_store(url, SCHEMA)
    store.load([("x", {"slow": ((1, ("m",)),)})], {"maker": "text"})
    store.append([event("a")])
    store.close()
    again = open_store(url, SCHEMA)
    assert again.append([event("a")]) == [False]
    assert (again.count(), again.users(), again.kinds) == (1, [1, "x"], {"maker": "text"})
    assert again.history(1)["all"] == ((5, "m", 10, 0),)
    again.close()
    first, second = SCHEMA.groups
    features = list(first.features)
    features[2] = features[2].model_copy(update={"max_len": 3})
    other = SCHEMA.model_copy(update={"groups": (first.model_copy(update={"features": tuple(features)}), second)})
    with pytest.raises(InputError, match=r"another schema \(sequence 'liked' is another\)"):
        open_store(url, other)
    with pytest.raises(InputError, match=r"another schema \(its unit is another\)"):
        open_store(url, SCHEMA.model_copy(update={"time_unit": 0.001}))
    wider = SCHEMA.model_copy(update={"dim": 77, "new_events": "new"})  # nothing that histories depend on
    open_store(url, wider).close()


def test_a_store_of_an_unknown_kind_is_refused() -> None:
    for url in ("sqlite:x", "lmdb:", "", "redis:x"):
        with pytest.raises(InputError, match="use lmdb:FOLDER"):
            open_store(url, SCHEMA)


def test_a_log_without_times_keeps_the_order_of_arrival() -> None:
    group = SCHEMA.groups[0]
    features = tuple(f.model_copy(update={"time": False}) if isinstance(f, Sequence) else f for f in group.features)
    groups = (group.model_copy(update={"features": features}), SCHEMA.groups[1])
    store = open_store("memory:", SCHEMA.model_copy(update={"time": None, "groups": groups}))
    for i in range(60):
        store.append([event(str(i), item_id=i)])
    assert store.history(1)["all"] == ((57, "m", 0), (58, "m", 0), (59, "m", 0))
    assert len(store.past(1)["all"]) == 35


def test_a_column_of_the_user_needs_no_second_mention() -> None:
    past = Sequence(name="who", fields=(SequenceField(of="user"),), max_len=2)
    groups = (Group(name="past", side="user", features=(Categorical(name="user"), past)),)
    store = open_store("memory:", SCHEMA.model_copy(update={"groups": groups}))
    store.append([Event("a", 7, {"time": 1})])
    assert store.history(7) == {"who": ((7,),)}


@pytest.mark.parametrize("url", ["memory:", "lmdb:"])
def test_a_time_of_another_kind_than_before_is_refused_whatever_kept_it(url: str, tmp_path: Path) -> None:
    """Here no sequence keeps its times, and the events with a like are not in the list of those with a buy."""
    past = tuple(Sequence(name=name, fields=(SequenceField(of="item"),), where=name) for name in ("like", "buy"))
    group = SCHEMA.groups[0].model_copy(update={"features": past})
    schema = SCHEMA.model_copy(update={"groups": (group, SCHEMA.groups[1])})
    schema = Schema.model_validate_json(schema.model_dump_json())
    store = open_store(url + (str(tmp_path) if url == "lmdb:" else ""), schema)
    assert store.append([event("e1", time=1000, like=1, buy=0)]) == [True]
    with pytest.raises(InputError, match=r"'time' is a moment, but in the user's earlier events it is a number"):
        store.append([event("e2", time="2024-01-01T00:00:00Z", like=0, buy=1)])
    assert store.known(1).last == 1000
    store.close()


def test_kinds_come_from_what_an_encoder_can_read() -> None:
    lists = {column: [] for column in LISTS}
    encoder = Encoder.fit(SCHEMA, [pa.RecordBatch.from_pylist([{"user": 1, **lists, **columns()}])])
    assert kinds_of(encoder) == {"item_id": "number", "maker": "text"}
    store = open_store("memory:", SCHEMA, kinds_of(encoder))
    with pytest.raises(InputError, match="'item_id' is a text, the log has a number"):
        store.append([event("a", item_id="5")])


# -- LMDB


def test_the_map_grows_by_itself_while_others_read(tmp_path: Path) -> None:
    store = LMDBStore(tmp_path / "store", SCHEMA, first_bytes=1 << 16)
    stop, read = threading.Event(), [0]

    def reader() -> None:
        while not stop.is_set():
            read.append(len(store.history(0).get("all", ())))
            time.sleep(0.001)

    threads = [threading.Thread(target=reader) for _ in range(2)]
    for thread in threads:
        thread.start()
    for first in range(0, 3000, 500):
        store.append([event(str(i), user=i % 400, time=i, maker="m" * 40) for i in range(first, first + 500)])
    stop.set()
    for thread in threads:
        thread.join()
    assert store._env.info()["map_size"] > 1 << 16
    assert store.count() == 3000 and len(store.history(0)["all"]) == 3
    store.close()


def test_a_full_map_says_so_and_loses_nothing(tmp_path: Path) -> None:
    store = LMDBStore(tmp_path / "store", SCHEMA, first_bytes=1 << 16, most_bytes=1 << 18)
    kept = 0

    def fill() -> None:
        nonlocal kept
        while True:
            store.append([event(f"{kept} {i}", user=kept) for i in range(20)])
            kept += 1

    with pytest.raises(StoreUnavailable, match="262,144 bytes that it may have; nothing was lost"):
        fill()
    assert kept > 5
    assert store.healthy() and store.count() == 20 * kept
    assert all(store.history(user) for user in range(kept)) and not store.history(kept)
    store.close()
    larger = LMDBStore(tmp_path / "store", SCHEMA)
    assert larger.append([event(f"{user} 0", user=user) for user in range(kept + 1)]) == [False] * kept + [True]
    larger.close()


def test_one_wrong_batch_leaves_the_others_of_its_commit_alone(tmp_path: Path) -> None:
    store = LMDBStore(tmp_path / "store", SCHEMA)
    store.append([event("first")])
    told: dict[str, Any] = {}

    def write(name: str, **changes: Any) -> None:
        try:
            told[name] = store.append([event(name, **changes)])
        except InputError as error:
            told[name] = error

    batches = {"right": {}, "wrong": {"item_id": "text"}, "also right": {"user": 2}}
    threads = [threading.Thread(target=write, args=(name,), kwargs=changes) for name, changes in batches.items()]
    with store._writing:  # all wait, so all share the next commit
        for thread in threads:
            thread.start()
        while len(store._queue) < 3:
            time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert told["right"] == told["also right"] == [True]
    assert "'item_id' is a text" in str(told["wrong"])
    assert store.count() == 3
    store.close()


def test_after_a_panic_the_store_is_opened_again(tmp_path: Path) -> None:
    """LMDB refuses everything after it could not write its first pages, until it is opened again."""
    store = LMDBStore(tmp_path / "store", SCHEMA)
    store.append([event("a")])

    class Panics:
        real = store._env

        def begin(self, write: bool = False) -> Any:
            raise lmdb.PanicError("MDB_PANIC: update of meta page failed or environment had fatal error")

        def close(self) -> None:
            self.real.close()

    for call in (lambda: store.append([event("b", time=11)]), lambda: store.history(1)):
        store._env, Panics.real = Panics(), store._env
        with pytest.raises(StoreUnavailable, match="MDB_PANIC"):
            call()
        assert [entry[2] for entry in store.history(1)["all"]] == [10]
    opens = store._open
    store._env, Panics.real = Panics(), store._env

    def fails(create: bool) -> None:
        assert not create, "a store that has gone is not begun anew"
        raise lmdb.DiskError("Input/output error")

    store._open = fails  # and as long as it cannot be opened, every call says so and tries again
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="cannot be read"):
            store.history(1)
    store._open = opens
    with pytest.raises(StoreUnavailable):
        store.history(1)
    assert store.append([event("a"), event("b", time=11)]) == [False, True]
    store.close()


def test_a_folder_that_is_no_store_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be opened"):
        open_store(f"lmdb:{tmp_path / 'file'}", SCHEMA)
    (tmp_path / "data.mdb").write_bytes(b"not a database" * 1000)
    with pytest.raises(InputError, match="cannot be opened"):
        open_store(f"lmdb:{tmp_path}", SCHEMA)


# -- Redis


def test_replicas_that_write_one_user_at_once_lose_nothing(redis_server) -> None:
    emptied(redis_server.url)
    replicas = [open_store(redis_server.url, SCHEMA) for _ in range(4)]
    told: list[bool] = []

    def write(number: int) -> None:
        for i in range(40):  # every event is sent by two replicas
            told.extend(replicas[number].append([event(f"{number % 2} {i}", time=i, item_id=2 * i + number % 2)]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(told) == replicas[0].count() == 80
    kept = [entry[0] for _, entry in replicas[1].past(1)["all"]]
    assert sorted(kept[-10:]) == list(range(70, 80)) and len(set(kept)) == len(kept)


def test_a_server_that_does_not_answer_is_given_up_quickly() -> None:
    with socket.socket() as silent:  # accepts and says nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        began = time.monotonic()
        store = open_store(f"redis://:secret@127.0.0.1:{silent.getsockname()[1]}/0", SCHEMA)
        with pytest.raises(StoreUnavailable) as told:
            store.append([event("a")])
        assert not store.healthy()
        assert time.monotonic() - began < 8
        assert "secret" not in str(told.value)


def test_a_broken_url_is_refused() -> None:
    with pytest.raises(InputError, match="use redis://HOST:PORT/0"):
        open_store("redis://host:port/0", SCHEMA)


# -- the last known state


class Flaky(MemoryStore):
    down = False
    asked = 0

    def past(self, user: Any) -> history.Past:
        self.asked += 1
        if self.down:
            raise StoreUnavailable("away")
        return super().past(user)

    def _write(self, rows: Any) -> list[bool]:
        if self.down:
            raise StoreUnavailable("away")
        return super()._write(rows)


def test_what_was_known_last_is_served_and_called_stale() -> None:
    flaky = Flaky(SCHEMA)
    store = Remembered(flaky, users=2, retry_s=0.2)
    store.append([event("a"), event("b", user=2), event("c", user=3)])
    for user in (1, 2, 3):  # the first is forgotten again
        assert not store.known(user).stale
    store.append([event("d", user=3, time=11)])
    flaky.down = True
    known = store.known(3)
    assert known.stale and store.stale and [entry[2] for entry in known.history["all"]] == [10, 11]
    assert list(known.seen) == [5]
    assert store.known(1) == ({}, [], True, None)
    assert store.history(3, before=11) == {"all": ((5, "m", 10, 0),), "liked": ((5,),), "slow": (("m",),)}
    asked = flaky.asked
    store.known(2)
    assert flaky.asked == asked  # not asked again at once
    with pytest.raises(StoreUnavailable):
        store.append([event("e", user=3)])
    flaky.down = False
    time.sleep(0.25)
    assert not store.known(3).stale and not store.stale
    assert store.append([event("e", user=3)]) == [True]
    assert store.count() == 5 and store.users("3") == [3] and store.healthy()
    store.close()

"""Stores of histories: one list of promises, kept in memory, in LMDB and in a real Redis."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from scalerec.errors import InputError
from scalerec.features import history
from scalerec.serving.events import Event, by_text
from scalerec.serving.store import MemoryStore, Store, StoreUnavailable, open_store
from tests.redis_server import BINARY, MISSING, RedisServer
from tests.unit.stores import LISTS, SCHEMA, TYPES, columns, emptied, event


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory) -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip(MISSING)
    server = RedisServer(tmp_path_factory.mktemp("redis"), "--appendfsync", "no")
    server.start()
    yield server
    server.kill()


@pytest.fixture(params=["memory", "lmdb", "redis"])
def fresh(request, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Makes empty stores."""
    made: list[Store] = []

    def make() -> Store:
        for store in made:
            store.close()
        made.clear()
        if request.param == "memory":
            url = "memory:"
        elif request.param == "lmdb":
            url = f"lmdb:{tmp_path / str(len(list(tmp_path.iterdir())))}"
        else:
            url = request.getfixturevalue("redis_server").url
            emptied(url)
        made.append(open_store(url, SCHEMA))
        return made[0]

    yield make
    for store in made:
        store.close()


@pytest.fixture
def store(fresh) -> Store:
    return fresh()


# -- what every store promises


def test_events_come_back_as_the_history_of_their_user(store: Store) -> None:
    assert store.history("user 1") == {}
    assert store.append([event("a"), event("b", time=11, item_id=6, like=0), event("c", user=2)]) == [True] * 3
    assert store.history(1) == {
        "all": ((5, "m", 10, 0), (6, "m", 11, 0)), "liked": ((5,),), "slow": (("m",),)
    }  # fmt: skip
    assert store.history(2)["all"] == ((5, "m", 10, 0),)
    assert store.history(3) == {}
    assert list(store.seen(1)) == [5, 6]
    assert store.count() == 3
    assert store.healthy()


def test_an_event_id_is_taken_once(store: Store) -> None:
    assert store.append([event("a"), event("a", item_id=7), event("b", time=11)]) == [True, False, True]
    assert store.append([event("b", item_id=9), event("a", user=2), event("c", time=12)]) == [False, False, True]
    assert [entry[2] for entry in store.history(1)["all"]] == [10, 11, 12]
    assert store.history(2) == {}
    assert store.count() == 3


def test_an_empty_batch_is_nothing(store: Store) -> None:
    assert store.append([]) == []
    assert store.count() == 0


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [(1, "1", False), (1, 1.0, True), (1, np.int32(1), True), ("a", "b", False), (0.5, pa.scalar(0.5), True),
     ("x" * 600, "x" * 599 + "y", False), ("ü'\"\\\n\0", "ü'\"\\\n", False), (-(2**63), 2**63 - 1, False)],
)  # fmt: skip
def test_users_are_told_apart_by_value(store: Store, one: Any, other: Any, same: bool) -> None:
    store.append([event("a", user=one)])
    assert store.history(one)["all"] == ((5, "m", 10, 0),)
    assert bool(store.history(other)) == same
    assert store.users() == [one]
    assert type(store.users()[0]) is type(one)


def test_users_are_found_by_how_their_ids_begin(store: Store) -> None:
    users = [12, 1, "12", "1b", 2, "é1", '"quoted"', -3, "a"]
    store.append([event(str(number), user=user) for number, user in enumerate(users)])
    assert store.users("1") == sorted([12, 1, "12", "1b"], key=by_text)
    assert store.users("12", 1) in ([12], ["12"])
    assert store.users("é") == ["é1"]
    assert store.users('"') == ['"quoted"']
    assert store.users("-") == [-3]
    assert store.users("", 100) == sorted(users, key=by_text)
    assert store.users("zzz") == []


def test_values_of_numpy_and_arrow_are_plain(store: Store) -> None:
    found = event(
        "a", time=np.int64(3), item_id=np.uint16(5), maker=np.str_("m"), like=np.bool_(True), buy=pa.scalar(1),
        shown=np.float32(1),
    )  # fmt: skip
    store.append([found])
    assert store.history(1) == {"all": ((5, "m", 3, 1),), "liked": ((5,),), "slow": (("m",),)}
    assert [type(value) for value in store.history(1)["all"][0]] == [int, str, int, int]


def test_what_is_not_finite_is_missing(store: Store) -> None:
    nan, inf = float("nan"), float("inf")
    store.append([event("a", like=nan, buy=1, shown=inf), event("b", item_id=nan, maker="n"), event("c", shown=nan)])
    assert store.history(1)["all"] == ((5, "m", 10, None), (5, "m", 10, None))
    assert store.history(1)["liked"] == ((5,),)
    assert store.history(1)["slow"] == (("m",), ("n",)) or store.history(1)["slow"] == (("n",), ("m",))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"time": None}, "'time' is missing"),
        ({"time": float("nan")}, "'time' is missing or not finite"),
        ({"time": "monday"}, "'time' is 'monday', not a time"),
        ({"time": [1]}, "'time' is a list"),
        ({"item_id": 2**70}, "'item_id' is a whole number beyond 64 bits"),
        ({"item_id": {"a": 1}}, "'item_id' is a dict"),
        ({"maker": "\ud800"}, "'maker' is not valid text"),
        ({"maker": "x" * 5000}, "'maker' is a text of 5000 characters"),
        ({"like": "yes"}, "'like' is text"),
        ({"buy": 2}, "'buy' is 2: a label is 0 or 1"),
        ({"shown": "yes"}, "'shown' is text"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_of_its_batch_is_taken(store: Store, changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=f"event 1 .'b'.: {words}"):
        store.append([event("a"), event("b", **changes)])
    assert store.history("user 1") == {}
    assert store.append([event("a")]) == [True]


@pytest.mark.parametrize("column", ["time", "item_id", "maker", "like", "buy", "shown"])
def test_a_missing_column_is_named(store: Store, column: str) -> None:
    given_columns = {name: value for name, value in columns().items() if name != column}
    with pytest.raises(InputError, match=f"no '{column}', which the schema's sequences need"):
        store.append([Event("a", 1, given_columns)])


@pytest.mark.parametrize("user", [None, float("inf"), 2**70, [1], {"a": 1}, "\udfff"])
def test_a_user_that_is_no_id_is_refused(store: Store, user: Any) -> None:
    with pytest.raises(InputError, match="'user'"):
        store.append([event("a", user=user)])
    with pytest.raises(InputError, match="'user'"):
        store.history(user)


@pytest.mark.parametrize("name", ["", None, 7])
def test_an_event_id_must_be_a_text(store: Store, name: Any) -> None:
    with pytest.raises(InputError, match="'event_id'"):
        store.append([event(name)])


def test_a_value_of_another_kind_than_before_is_refused(store: Store) -> None:
    store.append([event("a")])
    with pytest.raises(InputError, match=r"event 0 .'b'.: 'item_id' is a text, but in .* it is a number"):
        store.append([event("b", item_id="5")])
    with pytest.raises(InputError, match="'time' is a moment, but in"):
        store.append([event("b", time="2024-01-01")])
    with pytest.raises(InputError, match="'maker'"):
        store.append([event("new", user=9), event("b", user=9, maker=1)])
    assert store.append([event("b", time=11, maker=None), event("new", user=9)]) == [True, True]
    with pytest.raises(InputError, match="is no time like"):
        store.history(1, "2024-01-01")


def test_moments_are_kept_in_utc(store: Store) -> None:
    east = timezone(timedelta(hours=2))
    times = [
        datetime(2024, 1, 1, 12), "2024-01-01T12:00:01Z", datetime(2024, 1, 1, 14, 0, 2, tzinfo=east),
        np.datetime64("2024-01-01T12:00:03", "ns"), pa.scalar(datetime(2024, 1, 1, 12, 0, 4), pa.timestamp("ns")),
    ]  # fmt: skip
    for number, moment in enumerate(times):
        store.append([event(str(number), user=number, time=moment)])
        assert store.history(number)["all"] == ((5, "m", datetime(2024, 1, 1, 12, 0, number), 0),)
        assert store.history(number, before="2024-01-01T12:00:00") == {}


def test_late_events_go_to_their_place_and_a_moment_can_be_asked_for(store: Store) -> None:
    names = ["a", "b", "c", "d", "e"]
    for name, at in zip(names, [10, 30, 20, 30, 40]):
        store.append([event(name, time=at, item_id=ord(name), maker="x" if name != "c" else "y")])
    told = [entry[0] for entry in store.history(1)["all"]]
    assert told == [ord(name) for name in "bde"]
    assert store.history(1, before=40)["all"] == tuple((ord(n), m, t, 0) for n, m, t in
                                                       [("c", "y", 20), ("b", "x", 30), ("d", "x", 30)])  # fmt: skip
    assert store.history(1, before=30)["slow"] == (("x",), ("y",))
    assert store.history(1, before=40)["slow"] == (("y",), ("x",))
    assert store.history(1, before=10) == {}


def test_many_events_at_one_time_hide_none_before_them(store: Store) -> None:
    store.append([event(f"old {i}", time=i, item_id=i) for i in range(3)])
    store.append([event(f"new {i}", time=9, item_id=100 + i) for i in range(200)])
    assert [entry[0] for entry in store.history(1, before=9)["all"]] == [0, 1, 2]
    assert [entry[0] for entry in store.history(1)["all"]] == [297, 298, 299]


events = st.fixed_dictionaries(
    {
        "user": st.integers(1, 2), "time": st.integers(0, 6), "item_id": st.one_of(st.none(), st.integers(0, 9)),
        "maker": st.sampled_from(["x", "y", None]), "like": st.sampled_from([0, 1, 2, None]),
        "buy": st.sampled_from([0, 1, None]), "shown": st.sampled_from([0, 1, 7, None]),
    }
)  # fmt: skip


def replayed(rows: list[dict[str, Any]]) -> list[dict[str, list]]:
    """The lists of every row, by training's code, of the rows in this order."""
    table = pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in TYPES.items()})
    return history.replay(SCHEMA, table).select(LISTS).to_pylist()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(events, max_size=20), size=st.sampled_from([1, 3, 20]), again=st.booleans())
def test_histories_are_those_of_training(fresh, rows: list[dict], size: int, again: bool) -> None:
    """Every row's lists by `replay` are what the store gives at its time, however late the events came."""
    store = fresh()
    batch = [Event(str(number), row["user"], row) for number, row in enumerate(rows)]
    for first in range(0, len(batch), size):
        store.append(batch[first : first + size])
    if again:
        assert not any(store.append(batch[::-1]))
    for row, expected in zip(rows, replayed(rows)):
        assert history.as_columns(store.history(row["user"], before=row["time"]), SCHEMA) == expected
    end = [{**row, "time": 99} for row in rows]
    for row, expected in zip(rows, replayed(rows + end)[len(rows) :]):
        assert history.as_columns(store.history(row["user"]), SCHEMA) == expected
    assert store.count() == len(rows)


def test_writers_at_once_lose_and_double_nothing(store: Store) -> None:
    """Eight threads send the same 60 events of three users, each in another order and in pieces."""
    sent = [event(str(i), user=i % 3, time=i, item_id=i) for i in range(60)]
    told: list[bool] = []

    def write(number: int) -> None:
        mine = np.random.default_rng(number).permutation(len(sent))
        for chunk in np.array_split(mine, 12):
            told.extend(store.append([sent[i] for i in chunk]))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(told) == store.count() == 60
    for user in range(3):
        kept = store.past(user)["all"]
        assert len(kept) <= 3 + 32
        assert [entry[0] for _, entry in kept] == [i for i in range(60) if i % 3 == user][-len(kept) :]
        assert [entry[0] for entry in store.history(user)["all"]] == [51 + user, 54 + user, 57 + user]


def test_a_store_is_filled_only_when_it_is_empty(store: Store) -> None:
    pasts = [(1, {"all": ((3, (7, "m", 3, 1)),), "liked": ((None, (7,)),)}), ("x", {"slow": ((1, ("m",)),)}), (2, {})]
    store.load(pasts, {"maker": "text"})
    assert store.history(1) == {"all": ((7, "m", 3, 1),), "liked": ((7,),)}
    assert store.history("x") == {"slow": (("m",),)}
    assert store.count() == 0
    with pytest.raises(InputError, match="'maker' is a number, the log has a text"):
        store.append([event("a", maker=4)])
    store.append([event("a", time=2)])
    assert store.history(1)["all"] == ((5, "m", 2, 0), (7, "m", 3, 1))
    assert store.history(1)["liked"] == ((7,), (5,))
    with pytest.raises(InputError, match="not empty"):
        store.load(pasts, {})


def test_a_fill_that_was_cut_off_is_noticed_and_done_again(fresh) -> None:
    store = fresh()
    if isinstance(store, MemoryStore):
        return  # nothing of it is left

    def broken() -> Iterator[tuple[Any, history.Past]]:
        for user in range(3_000):
            yield f"user {user}", {"slow": ((1, ("m",)),)}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.load(broken(), {})
    for call in (lambda: store.append([event("a")]), lambda: store.history(1)):
        with pytest.raises(StoreUnavailable, match="a fill was cut off"):
            call()
    assert not store.healthy()
    store.load([(2, {"slow": ((1, ("m",)),)})], {})
    assert store.healthy() and store.users() == [2] and store.history("user 1") == {}

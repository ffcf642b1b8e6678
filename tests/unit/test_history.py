"""A user's past: replayed over a log it is what appending event by event gives, and never looks ahead."""

from __future__ import annotations

import datetime
import math
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalerec.errors import InputError
from scalerec.features import history
from scalerec.schema import Categorical, Group, Schema, Sequence, SequenceField, Task

SCHEMA = Schema(
    groups=(
        Group(
            name="user",
            side="user",
            features=(
                Categorical(name="user"),
                Sequence(
                    name="seen",
                    fields=(SequenceField(of="item"), SequenceField(of="author", column="seen_by", event="maker")),
                    time=True,
                    max_len=3,
                ),
                Sequence(name="liked", fields=(SequenceField(of="item"),), where="like", max_len=2),
            ),
        ),
        Group(
            name="item", side="item", features=(Categorical(name="item", column="item_id"), Categorical(name="author"))
        ),
    ),
    tasks=(Task(name="like"),),
    user="user",
    item="item_id",
    time="time",
)
LISTS = ["seen_item", "seen_by", "seen_time", "liked_item"]
COLUMNS = {"user": pa.string(), "time": pa.int64(), "item_id": pa.int64(), "maker": pa.string(), "like": pa.int8()}

events = st.fixed_dictionaries(
    {
        "user": st.sampled_from(["a", "b", "c", None]),
        "time": st.integers(0, 6),
        "item_id": st.one_of(st.none(), st.integers(0, 9)),
        "maker": st.sampled_from(["x", "y", None]),
        "like": st.sampled_from([0, 1, 2, None]),
    }
)


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in COLUMNS.items()})


def naive(rows: list[dict[str, Any]], initial: dict[str, dict[str, list[tuple]]]) -> list[dict[str, list]]:
    """Written apart from the code: for every row, look at every other row."""
    found = []
    for row in rows:
        seen, liked = [], []
        if row["user"] is not None:
            seen += initial.get(row["user"], {}).get("seen", [])
            liked += initial.get(row["user"], {}).get("liked", [])
            earlier = [e for e in rows if e["user"] == row["user"] and e["time"] < row["time"]]
            for e in sorted(earlier, key=lambda e: e["time"]):
                if e["item_id"] is not None:
                    seen.append((e["item_id"], e["maker"], e["time"]))
                    if e["like"]:
                        liked.append((e["item_id"],))
        seen, liked = seen[-3:], liked[-2:]
        lists = [[e[0] for e in seen], [e[1] for e in seen], [e[2] for e in seen], [e[0] for e in liked]]
        found.append(dict(zip(LISTS, lists)))
    return found


INITIAL = {
    "a": {"seen": [(7, "x", -9), (8, None, -8), (9, "y", -7), (5, "y", -6)], "liked": [(9,)]},
    "c": {"liked": [(1,), (2,), (3,)]},
    "never seen": {"seen": [(1, "x", -5)]},
}


def frozen(initial: dict) -> dict[str, history.State]:
    return {user: {name: tuple(entries) for name, entries in state.items()} for user, state in initial.items()}


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(events, max_size=25), start=st.sampled_from([{}, INITIAL]), size=st.sampled_from([1, 4, 100]))
def test_replay_equals_the_naive_history(rows: list[dict], start: dict, size: int) -> None:
    log = table(rows)
    replayed = pa.concat_tables(history.replay_pieces(SCHEMA, log, frozen(start), size))
    assert replayed.select(log.column_names) == log
    assert replayed.select(LISTS).to_pylist() == naive(rows, start)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(events, max_size=25))
def test_replay_equals_append_event_by_event(rows: list[dict]) -> None:
    rows = [row | {"time": time} for time, row in enumerate(rows)]
    states: dict[Any, history.State] = frozen(INITIAL)
    told = []
    for row in rows:
        state = states.get(row["user"], {}) if row["user"] is not None else {}
        told.append(history.as_columns(state, SCHEMA))
        states[row["user"]] = history.append(state, row, SCHEMA)
    assert history.replay(SCHEMA, table(rows), frozen(INITIAL)).select(LISTS).to_pylist() == told


def test_append_leaves_the_old_state_alone() -> None:
    event = {"user": "a", "time": 1, "item_id": 4, "maker": "x", "like": 1}
    before = history.append({}, event, SCHEMA)
    after = history.append(before, event | {"time": 2}, SCHEMA)
    assert before == {"seen": ((4, "x", 1),), "liked": ((4,),)}
    assert after["seen"] == ((4, "x", 1), (4, "x", 2))
    assert history.append(after, event | {"item_id": None}, SCHEMA) == after
    assert len(history.append(after, event | {"like": None}, SCHEMA)["liked"]) == 2


def test_append_names_the_missing_column() -> None:
    with pytest.raises(InputError, match=r"'maker'.*'seen'"):
        history.append({}, {"time": 1, "item_id": 4}, SCHEMA)


def test_equal_times_do_not_see_each_other_and_keep_file_order() -> None:
    rows = [
        {"user": "a", "time": time, "item_id": item, "maker": None, "like": 0}
        for time, item in [(5, 1), (2, 2), (2, 3), (9, 4)]
    ]
    lists = history.replay(SCHEMA, table(rows))["seen_item"].to_pylist()
    assert lists == [[2, 3], [], [], [2, 3, 1]]


def test_numbers_that_are_not_finite_are_missing() -> None:
    """As stores take them: no event, no user, not kept by `where`; never a time."""
    nan, row = float("nan"), {"user": 1.0, "maker": None}
    rows = [
        row | {"time": 1.0, "item_id": 1.0, "like": nan}, row | {"time": 2.0, "item_id": nan, "like": 1.0},
        row | {"time": 3.0, "item_id": 2.0, "like": 1.0}, row | {"time": 4.0, "item_id": 3.0, "like": 0.0},
        row | {"time": 5.0, "item_id": 9.0, "like": 1.0, "user": nan},
        row | {"time": 6.0, "item_id": 9.0, "like": 1.0, "user": nan},
    ]  # fmt: skip
    log = pa.Table.from_pylist(rows)
    log = log.set_column(log.column_names.index("maker"), "maker", pa.nulls(6, pa.string()))
    found = history.replay(SCHEMA, log)
    assert found["seen_item"].to_pylist() == [[], [1.0], [1.0], [1.0, 2.0], [], []]
    assert found["liked_item"].to_pylist() == [[], [], [], [2.0], [], []]
    late = log.set_column(log.column_names.index("time"), "time", pa.array([1.0, 2.0, nan, 4.0, 5.0, 6.0]))
    with pytest.raises(InputError, match="'time' has 1 rows without a time"):
        history.replay(SCHEMA, late)


def test_an_empty_log_gets_its_columns() -> None:
    empty = history.replay(SCHEMA, table([]))
    assert empty.num_rows == 0
    assert empty.column_names[-len(LISTS) :] == LISTS


@pytest.mark.parametrize("unit", ["s", "ns"])
def test_timestamps_are_kept_as_they_are(unit: str) -> None:
    moments = [datetime.datetime(2024, 1, day) for day in (3, 1, 2)]
    rows = [{"user": "a", "time": 0, "item_id": i, "maker": None, "like": 1} for i in range(3)]
    log = table(rows).set_column(1, "time", pa.array(moments, pa.timestamp(unit)))
    log = log.set_column(4, "like", pa.array([True, False, True]))
    replayed = history.replay(SCHEMA, log)
    assert replayed["seen_item"].to_pylist() == [[1, 2], [], [1]]
    assert replayed["seen_time"].type == pa.list_(pa.timestamp(unit))
    assert replayed["liked_item"].to_pylist() == [[2], [], []]


def test_errors_name_the_column() -> None:
    rows = table([{"user": "a", "time": 1, "item_id": 1, "maker": "x", "like": 1}])
    with pytest.raises(InputError, match="no column 'maker'"):
        history.replay(SCHEMA, rows.drop_columns(["maker"]))
    with pytest.raises(InputError, match="'time' has 1 rows without a time"):
        history.replay(SCHEMA, rows.set_column(1, "time", pa.array([None], pa.int64())))
    with pytest.raises(InputError, match="'time' is string"):
        history.replay(SCHEMA, rows.set_column(1, "time", pa.array(["monday"])))
    with pytest.raises(InputError, match="'like' is string"):
        history.replay(SCHEMA, rows.set_column(4, "like", pa.array(["yes"])))
    with pytest.raises(InputError, match="name the `time` column"):
        history.replay(SCHEMA.model_copy(update={"time": None}), rows)


# -- slowly changing series, actions, equal times in order, some rows only

SERIES = Schema(
    groups=(
        Group(
            name="past",
            side="user",
            features=(
                Sequence(name="slow", fields=(SequenceField(of="maker"),), time=True, runs=True, max_len=4),
                Sequence(name="bought", fields=(SequenceField(of="maker"),), where="like", runs=True, max_len=2),
                Sequence(name="all", fields=(SequenceField(of="item"),), time=True, actions=("like", "buy"), max_len=3),
            ),
        ),
        Group(
            name="item", side="item", features=(Categorical(name="item", column="item_id"), Categorical(name="maker"))
        ),
    ),
    tasks=(Task(name="like"), Task(name="buy")),
    user="user",
    item="item_id",
    time="time",
)
SERIES_LISTS = [column for sequence in SERIES.sequences for column in sequence.list_columns()]
BEFORE = {
    "a": {"slow": [("x", -2), ("y", -1)], "bought": [("y",)], "all": [(5, -9, 1, None)] * 5},
    "b": {"slow": [("x", -1)]},
}


def series(rows: list[dict[str, Any]]) -> pa.Table:
    return table(rows).append_column("buy", pa.array([row.get("buy") for row in rows], pa.int8()))


def told_by_append(rows: list[dict[str, Any]], initial: dict) -> list[dict[str, list]]:
    """What appending event by event says before each row, the rows in the order of time, then of the list."""
    states: dict[Any, history.State] = frozen(initial)
    told: dict[int, dict[str, list]] = {}
    for number in sorted(range(len(rows)), key=lambda number: rows[number]["time"]):
        row = rows[number]
        state = states.get(row["user"], {}) if row["user"] is not None else {}
        told[number] = history.as_columns(state, SERIES)
        states[row["user"]] = history.append(state, {"buy": None} | row, SERIES)
    return [told[number] for number in range(len(rows))]


@settings(max_examples=200, deadline=None)
@given(rows=st.lists(events, max_size=25), start=st.sampled_from([{}, BEFORE]), size=st.sampled_from([1, 4, 100]))
def test_ordered_replay_equals_append_event_by_event(rows: list[dict], start: dict, size: int) -> None:
    replayed = pa.concat_tables(history.replay_pieces(SERIES, series(rows), frozen(start), size, ties="ordered"))
    assert replayed.select(SERIES_LISTS).to_pylist() == told_by_append(rows, start)


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(events, max_size=15), chosen=st.data(), ties=st.sampled_from(["hidden", "ordered"]))
def test_only_some_rows_have_the_lists_they_have_among_all(rows: list[dict], chosen: st.DataObject, ties: Any) -> None:
    log = series(rows)
    only = chosen.draw(st.lists(st.integers(0, max(len(rows) - 1, 0)), max_size=2 * len(rows)))
    some = pa.concat_tables(
        history.replay_pieces(SERIES, log, frozen(BEFORE), 4, only=np.array(only, np.int64), ties=ties)
    )
    whole = pa.concat_tables(history.replay_pieces(SERIES, log, frozen(BEFORE), ties=ties))
    assert some.to_pylist() == whole.take(pa.array(only, pa.int64())).to_pylist()


def test_runs_keep_the_first_of_equal_values() -> None:
    rows = [
        {"user": user, "time": time, "item_id": 1, "maker": maker, "like": 0}
        for time, (user, maker) in enumerate([*(("a", maker) for maker in "AABBBA"), ("b", "A"), ("a", "A")])
    ]
    replayed = history.replay(SERIES, series(rows)).to_pylist()
    assert replayed[7]["slow_maker"] == ["A", "B", "A"]
    assert replayed[7]["slow_time"] == [0, 2, 5]
    assert replayed[3]["slow_maker"] == ["A", "B"]
    assert replayed[6]["slow_maker"] == []


def test_a_null_neither_stands_in_a_run_nor_ends_it() -> None:
    rows = [
        {"user": "a", "time": time, "item_id": 1, "maker": maker, "like": 0}
        for time, maker in enumerate([None, "A", None, "A", "B", None, "B", "x"])
    ]
    assert history.replay(SERIES, series(rows))["slow_maker"].to_pylist()[-1] == ["A", "B"]


def test_a_run_goes_on_from_before_the_log() -> None:
    rows = [
        {"user": user, "time": time, "item_id": 1, "maker": maker, "like": 0}
        for time, (user, maker) in enumerate([("a", "y"), ("b", "y"), ("a", "x"), ("a", "x"), ("b", "z")])
    ]
    replayed = history.replay(SERIES, series(rows), frozen(BEFORE))
    assert replayed["slow_maker"].to_pylist()[2:] == [["x", "y"], ["x", "y", "x"], ["x", "y"]]
    assert replayed["slow_time"].to_pylist()[3] == [-2, -1, 2]


def test_actions_are_kept_and_null_stays_null() -> None:
    actions = [(1, None), (None, 0), (0, 1), (1, 1)]
    rows = [
        {"user": "a", "time": time, "item_id": time, "maker": "x", "like": like, "buy": buy}
        for time, (like, buy) in enumerate(actions)
    ]
    last = history.replay(SERIES, series(rows)).to_pylist()[3]
    assert last["all_item"] == [0, 1, 2]
    assert last["all_like"] == [1, None, 0]
    assert last["all_buy"] == [None, 0, 1]
    with pytest.raises(InputError, match="no column 'buy'"):
        history.replay(SERIES, series(rows).drop_columns(["buy"]))
    with pytest.raises(InputError, match=r"'buy'.*'all'"):
        history.append({}, {"time": 1, "item_id": 1, "maker": "x", "like": 1}, SERIES)


# -- actions that a task does not count

COUNTED = SERIES.model_copy(
    update={
        "groups": (
            Group(
                name="past",
                side="user",
                features=(
                    Sequence(
                        name="all", fields=(SequenceField(of="item"),), time=True, actions=("like", "buy", "read")
                    ),
                    Sequence(name="liked", fields=(SequenceField(of="item"),), where="like", actions=("both", "buy")),
                ),
            ),
            SERIES.groups[1],
        ),
        "tasks": (
            Task(name="likes", label="like", mask="shown"),
            Task(name="buy", weight="worth"),
            Task(name="both", mask="shown", weight="worth"),
        ),
    }
)
counted_events = st.fixed_dictionaries(
    {
        "user": st.sampled_from(["a", "b", None]),
        "item_id": st.one_of(st.none(), st.integers(0, 9)),
        "maker": st.just("x"),
        **{label: st.sampled_from([0, 1, None]) for label in ("like", "buy", "read", "both")},
        "shown": st.sampled_from([0, 1, 7, None]),
        "worth": st.sampled_from([0.0, 1.0, 0.25, math.nan, math.inf, None]),
    }
)


def counted_log(rows: list[dict[str, Any]]) -> pa.Table:
    kinds = COLUMNS | {name: pa.int8() for name in ("buy", "read", "both", "shown")} | {"worth": pa.float64()}
    return pa.table({name: pa.array([row[name] for row in rows], kind) for name, kind in kinds.items()})


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(counted_events, max_size=15))
def test_replay_and_append_keep_the_same_actions_and_only_counted_ones(rows: list[dict]) -> None:
    rows = [row | {"time": time} for time, row in enumerate(rows)]
    states: dict[Any, history.State] = {}
    told, expected = [], []
    for row in rows:
        state = states.get(row["user"], {}) if row["user"] is not None else {}
        told.append(history.as_columns(state, COUNTED))
        states[row["user"]] = history.append(state, row, COUNTED)
        past = [e for e in rows if e["user"] == row["user"] is not None and e["time"] < row["time"]]
        past = [e for e in past if e["item_id"] is not None]
        shown = [e["shown"] in (1, 7) for e in past]
        worth = [e["worth"] in (1.0, 0.25) for e in past]
        liked = [i for i, e in enumerate(past) if e["like"]]
        buys = [e["buy"] if paid else None for e, paid in zip(past, worth)]
        both = [e["both"] if seen and paid else None for e, seen, paid in zip(past, shown, worth)]
        expected.append(
            {
                "all_item": [e["item_id"] for e in past],
                "all_time": [e["time"] for e in past],
                "all_like": [e["like"] if seen else None for e, seen in zip(past, shown)],
                "all_buy": buys,
                "all_read": [e["read"] for e in past],  # no task has it
                "liked_item": [past[i]["item_id"] for i in liked],  # `where` asks the log, not a task
                "liked_both": [both[i] for i in liked],
                "liked_buy": [buys[i] for i in liked],
            }
        )
    assert told == expected
    assert history.replay(COUNTED, counted_log(rows)).select(list(told[0]) if told else []).to_pylist() == told


EVENT = {"user": "a", "time": 1, "item_id": 4, "like": 1, "buy": 1, "read": 1, "both": 1, "shown": True, "worth": 2.5}


@pytest.mark.parametrize(("column", "sequence"), [("shown", "all"), ("worth", "all"), ("both", "liked")])
def test_what_decides_whether_an_action_counts_must_be_there(column: str, sequence: str) -> None:
    assert history.append({}, EVENT, COUNTED) == {"all": ((4, 1, 1, 1, 1),), "liked": ((4, 1, 1),)}
    without = {name: value for name, value in EVENT.items() if name != column}
    with pytest.raises(InputError, match=f"event: no '{column}', which sequence '{sequence}' needs"):
        history.append({}, without, COUNTED)
    log = counted_log([EVENT | {"maker": "x", "shown": 1}])
    with pytest.raises(InputError, match=f"no column '{column}'"):
        history.replay(COUNTED, log.drop_columns([column]))


def test_a_mask_of_text_is_refused() -> None:
    with pytest.raises(InputError, match="'shown' is string, not a number"):
        history.append({}, EVENT | {"shown": "yes"}, COUNTED)
    log = counted_log([EVENT | {"maker": "x", "shown": 1}])
    log = log.set_column(log.column_names.index("shown"), "shown", pa.array(["yes"]))
    with pytest.raises(InputError, match="'shown' is string, not a number"):
        history.replay(COUNTED, log)


def test_masked_labels_of_any_type_become_null() -> None:
    log = counted_log([EVENT | {"maker": "x", "shown": shown, "time": shown} for shown in (0, 1, 2)])
    for like in (pa.array([True, False, True]), pa.array([1, 0, 1]).dictionary_encode(), pa.nulls(3)):
        found = history.replay(COUNTED.model_copy(update={"groups": (
            Group(name="past", side="user", features=(COUNTED.sequences[0],)), SERIES.groups[1],
        )}), log.set_column(log.column_names.index("like"), "like", like))  # fmt: skip
        assert found["all_like"].to_pylist()[2] == [None, like[1].as_py()]


def test_ordered_ties_see_the_rows_before_them() -> None:
    rows = [
        {"user": "a", "time": time, "item_id": item, "maker": None, "like": 0}
        for time, item in [(5, 1), (2, 2), (2, 3), (9, 4), (5, 5)]
    ]
    ordered = pa.concat_tables(history.replay_pieces(SERIES, series(rows), ties="ordered"))
    assert ordered["all_item"].to_pylist() == [[2, 3], [], [2], [3, 1, 5], [2, 3, 1]]
    assert history.replay(SERIES, series(rows))["all_item"].to_pylist() == [[2, 3], [], [], [3, 1, 5], [2, 3]]

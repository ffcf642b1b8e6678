"""Events that come late end where replay has them: `history.insert` and `history.until` against training's replay."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scalerec.errors import InputError
from scalerec.features import history
from tests.unit.test_history import COUNTED, SCHEMA, SERIES, SERIES_LISTS, events, series


def inserted(rows: list[dict[str, Any]], order: list[int], spare: int = 32) -> dict[Any, history.Past]:
    """The pasts of all users after the rows came in this order."""
    pasts: dict[Any, history.Past] = {}
    for number in order:
        row = {"buy": None} | rows[number]
        if row["user"] is not None:
            pasts[row["user"]] = history.insert(pasts.get(row["user"], {}), row, SERIES, spare)
    return pasts


@settings(max_examples=150, deadline=None)
@given(rows=st.lists(events, max_size=25), shuffled=st.randoms(use_true_random=False))
def test_what_comes_late_ends_where_replay_has_it(rows: list[dict], shuffled: Any) -> None:
    """Whatever the order of arrival: only rows of equal times come in the order of the file."""
    arrival = sorted(range(len(rows)), key=lambda number: (shuffled.random(), number))
    same = [(rows[number]["user"], rows[number]["time"]) for number in arrival]
    turns = {key: iter(sorted(n for n, k in zip(arrival, same) if k == key)) for key in set(same)}
    pasts = inserted(rows, [next(turns[key]) for key in same])
    told = history.replay(SERIES, series(rows)).select(SERIES_LISTS).to_pylist()
    for row, expected in zip(rows, told):
        state = history.until(pasts.get(row["user"], {}), SERIES, before=row["time"])
        assert history.as_columns(state, SERIES) == expected


@settings(max_examples=100, deadline=None)
@given(rows=st.lists(events, max_size=40), spare=st.integers(0, 3))
def test_in_order_a_past_is_what_append_gives(rows: list[dict], spare: int) -> None:
    rows = [row | {"time": time} for time, row in enumerate(rows)]
    states: dict[Any, history.State] = {}
    for row in rows:
        if row["user"] is not None:
            states[row["user"]] = history.append(states.get(row["user"], {}), {"buy": None} | row, SERIES)
    pasts = inserted(rows, list(range(len(rows))), spare)
    assert {user: history.until(past, SERIES) for user, past in pasts.items()} == states
    most = {sequence.name: sequence.max_len + max(spare, 1) for sequence in SERIES.sequences}
    assert all(len(past) <= most[name] for lists in pasts.values() for name, past in lists.items())


def test_insert_leaves_the_old_past_alone_and_names_what_it_needs() -> None:
    event = {"user": "a", "time": 2, "item_id": 4, "maker": "x", "like": 1, "buy": None}
    before = history.insert({}, event, SERIES, 1)
    after = history.insert(before, event | {"time": 1, "item_id": 5}, SERIES, 1)
    assert [time for time, _ in before["all"]] == [2] and [time for time, _ in after["all"]] == [1, 2]
    assert history.columns(SERIES) == ["maker", "time", "like", "item_id", "buy"]
    assert history.columns(COUNTED) == ["item_id", "time", "like", "buy", "read", "shown", "worth", "both"]
    assert history.columns(SCHEMA.model_copy(update={"groups": SCHEMA.groups[1:]})) == []
    with pytest.raises(InputError, match=r"'maker'.*'slow'"):
        history.insert({}, {"time": 1, "item_id": 4, "like": 0, "buy": 0}, SERIES, 1)


def test_what_comes_late_parts_a_run() -> None:
    rows = [
        {"user": "a", "time": time, "item_id": 1, "maker": maker, "like": 0}
        for time, maker in [(1, "A"), (3, "A"), (4, "A"), (6, "B"), (2, "C"), (0, "A"), (5, "B")]
    ]
    past = inserted(rows, list(range(len(rows))))["a"]
    assert history.until(past, SERIES)["slow"] == (("A", 0), ("C", 2), ("A", 3), ("B", 5))
    assert history.until(past, SERIES, before=3)["slow"] == (("A", 0), ("C", 2))

"""What one example for many targets saves: every target alone, with exactly what was before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scalerec.batch import Batch
from scalerec.models.sequential import SequentialModel
from scalerec.studies.describe import impressions, session_cost
from tests.unit.sequences import DAY, batch, model_of

LENGTHS, SLOW, NEW = [5, 0, 3, 8], [3, 2, 0, 4], [4, 0, 3, 2]


def examples() -> Batch:
    """Four users; times are whole months, so that many of both series are equal."""
    found = batch(LENGTHS, slow=SLOW, new=NEW)
    coarse = {
        name: replace(past, values=past.values // (30 * DAY) * (30 * DAY)) for name, past in found.user.times.items()
    }
    return replace(found, user=replace(found.user, times=coarse))


def lists_of(of: Batch, name: str, user: int) -> list[tuple[float, ...]]:
    """(id, time) of each entry of one user's series."""
    ids, times = (kept[name].take(torch.tensor([user])).values.flatten() for kept in (of.user.lists, of.user.times))
    return list(zip(ids.tolist(), times.tolist()))


def cut_by_hand(model: SequentialModel, of: Batch) -> list[tuple[list, list, float]]:
    """Main series, slow series and moment of each target, from the row backwards."""
    assert of.user.now is not None
    found = []
    for user, new in enumerate(NEW):
        past, slow = lists_of(of, "events", user), lists_of(of, "tabs", user)
        found.append((past, slow, float(of.user.now[user])))
        for back in range(1, new + 1):
            moment = past[len(past) - back][1]
            found.append((past[: len(past) - back], [entry for entry in slow if entry[1] < moment], moment))
    return [target for target in found if model.ranks or target[0]]


@pytest.mark.parametrize("goal", ["ranking", "joint", "retrieval"])
def test_each_target_has_what_was_before_it(goal: str) -> None:
    model, whole = model_of(slow=True, goal=goal), examples()
    each = impressions(model, whole)
    assert each.new_events is None and each.user.now is not None
    expected = cut_by_hand(model, whole)
    assert len(each) == len(expected) == (11 if goal == "retrieval" else 13)
    for row, (past, slow, moment) in enumerate(expected):
        assert (lists_of(each, "events", row), lists_of(each, "tabs", row)) == (past, slow)
        assert float(each.user.now[row]) == moment
    assert each.user.actions["events"].offsets.equal(each.user.lists["events"].offsets)
    cost = session_cost(model, whole)
    assert cost["targets"] == len(each) and cost["saving"] == model.flops(each) / model.flops(whole)


def test_rows_alone_save_nothing() -> None:
    model = model_of(slow=True)
    assert session_cost(model, replace(examples(), new_events=None))["saving"] == 1

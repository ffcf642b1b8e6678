"""What one example for many targets saves: every target alone, with exactly what was before it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from scalerec.batch import Batch
from scalerec.models.sequential import SequentialModel
from scalerec.studies.describe import figures, impressions, session_cost
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
    model, whole = model_of(slow=True, goal=goal, actions="interleaved"), examples()
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


def test_rows_are_counted_beside_their_different_user_sides() -> None:
    """One user with three histories is three user sides."""
    model, whole = model_of(), batch([5, 3, 2], [0, 0, 0, 1, 2])
    found = figures(model, whole)
    assert (found["rows"], found["user_sides"]) == (5, 3) and "users" not in found


def test_rows_alone_save_nothing() -> None:
    model = model_of(slow=True)
    assert session_cost(model, replace(examples(), new_events=None))["saving"] == 1


@pytest.mark.parametrize(("options", "targets"), [
    ({"goal": "ranking", "actions": "interleaved"}, 13),
    ({"goal": "ranking", "actions": "additive"}, 4), ({"goal": "ranking", "actions": "none"}, 4),
    ({"goal": "joint", "actions": "additive"}, 12),  # of the past only what is next, so not the first of a life
    ({"goal": "joint", "actions": "interleaved", "variant": "production"}, 4),
    ({"goal": "retrieval", "variant": "production"}, 3),
], ids=str)  # fmt: skip
def test_only_what_is_learned_from_is_a_target(options: dict, targets: int) -> None:
    model, whole = model_of(slow=True, **options), examples()
    assert len(impressions(model, whole)) == targets
    terms = model.objective(whole)
    assert max(term.weight for term in terms.values()) <= targets
    if options["goal"] == "ranking":
        assert terms["like"].weight == targets
    if targets <= 4:
        assert session_cost(model, whole)["saving"] <= 1


def test_rows_that_share_a_user_are_counted_as_they_are_trained() -> None:
    """Each with the history of its own, as `objective` takes them apart."""
    model, whole = model_of(actions="interleaved"), batch([5, 3], [0, 0, 1], new=[2, 4, 1])
    assert len(whole.user) == 2
    assert session_cost(model, whole) == session_cost(model, whole.unshared())
    assert session_cost(model, whole)["targets"] == 3 + 5 + 2

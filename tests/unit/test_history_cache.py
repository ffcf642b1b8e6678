"""Cached histories: whatever was kept before, the state is the one computed from nothing (docs/generative.md)."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch

from scalerec.batch import Jagged, Rows
from scalerec.errors import InputError
from scalerec.inference import forward_delta as delta_module
from scalerec.inference.forward_delta import forward_delta, latest
from scalerec.inference.history_cache import Counts, HistoryCache, model_identity
from scalerec.models.sasrec import SASRecConfig
from tests.unit.sequences import (
    DAY,
    NOW,
    RESEARCH,
    assert_same,
    awake,
    batch,
    first,
    full,
    jagged,
    layout,
    life,
    model_of,
)  # fmt: skip

LARGE = 1 << 30


def edited(user: Rows, event: int, item: int | None = None, time: float | None = None, flip: bool = False) -> Rows:
    """The user with an id, a time or an action of one past event changed."""

    def put(kept: dict[str, Jagged], value: float) -> dict[str, Jagged]:
        values = kept["events"].values.clone()
        values[event] = value
        return {**kept, "events": replace(kept["events"], values=values)}

    if item is not None:
        user = replace(user, lists=put(user.lists, item))
    if time is not None:
        user = replace(user, times=put(user.times, time))
    return replace(user, actions=put(user.actions, 1 - user.actions["events"].values[event].item())) if flip else user


def without(user: Rows, event: int) -> Rows:
    def drop(kept: dict[str, Jagged]) -> dict[str, Jagged]:
        past = kept["events"].values
        rest = torch.cat([past[:event], past[event + 1 :]])
        return {**kept, "events": jagged(rest, [len(rest)])}

    return replace(user, lists=drop(user.lists), times=drop(user.times), actions=drop(user.actions))


def growth(user: Rows, slow: int | None, draw: torch.Generator) -> list[Rows]:
    """Requests of a user whose events come one by one, in the order of time, at moments that sometimes repeat."""
    comings = [(t, 0) for t in user.times["events"].values.tolist()]
    comings += [(t, 1) for t in user.times["tabs"].values.tolist()] if slow is not None else []
    order = torch.randperm(len(comings), generator=draw).tolist()
    comings = sorted((comings[i] for i in order), key=lambda coming: coming[0])
    many, requests, now = [0, 0], [], comings[0][0] - 1
    requests.append(first(user, 0, 0, now))
    for time, kind in comings:
        many[kind] += 1
        for _ in range(int(torch.randint(1, 3, (), generator=draw))):
            now = max(now, time) + float(torch.randint(0, 3, (), generator=draw)) * 1000.0
            requests.append(first(user, many[0], many[1], now))
    return requests


@pytest.mark.parametrize("variant", ["research", "production"])
@pytest.mark.parametrize("actions", ["interleaved", "additive", "none"])
@pytest.mark.parametrize(("context", "slow"), [(False, None), (True, None), (False, 5), (True, 5)])
@pytest.mark.parametrize("attention", ["silu", "softmax"])
def test_a_growing_history_is_as_if_computed_anew(
    variant: Any, actions: Any, context: bool, slow: int | None, attention: Any
):
    draw = torch.Generator().manual_seed(7)
    depth = 1 + int(torch.randint(0, 4, (), generator=draw))
    options: dict[str, Any] = {"variant": variant, "actions": actions, "attention": attention, "num_layers": depth}
    model = model_of(context, slow is not None, **options)
    cache = HistoryCache(model, "one", LARGE)
    for user in growth(life(12, slow, 3, context), slow, draw):
        assert_same(cache.state("u", user), full(model, user))
    counts = cache.counts()
    assert counts.misses == 1 and counts.recomputed_shifted == counts.recomputed_model == 0
    if variant == "production":
        assert counts.recomputed_production > 10 and counts.partial_hits == 0
    else:
        assert counts.partial_hits > 10 and counts.tokens_reused > 2 * counts.tokens_computed
        assert counts.hits > 0


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("biases", [(True, True), (True, False), (False, True), (False, False)])
def test_layers_and_biases(layers: int, biases: tuple[bool, bool], monkeypatch: pytest.MonkeyPatch):
    """Also with more new tokens than are computed together."""
    monkeypatch.setattr(delta_module, "ROWS", 3)
    options = {"num_layers": layers, "position_bias": biases[0], "time_bias": biases[1]}
    model = model_of(True, True, actions="interleaved", **options)
    user = life(12, 5, context=True)
    for start in (1, 4, 11):
        kept = forward_delta(model, None, first(user, start, 2)).kept
        for events in (start, 12):
            found = forward_delta(model, kept, first(user, events, 5, NOW + 5))
            assert 0 < found.reused < len(found.kept)
            assert_same(found.state, full(model, first(user, events, 5, NOW + 5)))


def test_only_the_last_token_waits_for_the_request():
    """Each token asks at the time of the next; without a bias of time the last one is settled too."""
    user = life(9)
    for timed, reused in ((True, 8), (False, 9)):
        model = model_of(time_bias=timed)
        kept = forward_delta(model, None, first(user, 9)).kept
        again, later, longer = (
            forward_delta(model, kept, u)
            for u in (first(user, 9), first(user, 9, now=NOW + 1), replace(life(10), now=user.now))
        )
        assert (again.reused, again.outcome) == (9, "settled")
        assert again.kept.keys[0] is kept.keys[0], "nothing is copied where nothing is new"
        assert later.reused == reused
        assert longer.outcome in ("changed", "grown")


def test_candidates_score_alike_over_a_kept_history():
    model = model_of(True, True, actions="interleaved")
    whole = replace(batch([12], [0] * 7, True, [5]), user=life(12, 5, context=True))
    cache = HistoryCache(model, "one", LARGE)
    with torch.no_grad():
        for events in range(13):
            request = replace(whole, user=first(whole.user, events, 3, NOW + events))
            expected = model(request).logits
            (items,) = model.embeddings(request.items)
            for micro in (1, 3, 7, 64):
                model.config = model.config.model_copy(update={"micro_batch": micro})
                found = model.score(cache.state("u", request.user), items, request.user_of_row).logits
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert cache.counts().hits == 13 * 3


EDITS = {
    "id": lambda user: edited(user, 4, item=int(user.lists["events"].values[4, 0]) % 26 + 4),
    "time": lambda user: edited(user, 4, time=float(user.times["events"].values[4]) + 3 * DAY),
    "action": lambda user: edited(user, 4, flip=True),
}


@pytest.mark.parametrize("edit", EDITS, ids=str)
@pytest.mark.parametrize("actions", ["interleaved", "additive"])
def test_an_edited_history_is_computed_from_the_edit_on(edit: str, actions: Any):
    model = model_of(actions=actions, max_len=12)
    user = first(life(10), 10)
    cache = HistoryCache(model, "one", LARGE)
    before = cache.state("u", user)
    other = EDITS[edit](user)
    after = cache.state("u", other)
    assert_same(after, full(model, other))
    assert not torch.allclose(before.hidden[-1], after.hidden[-1])
    counts, each = cache.counts(), 2 if actions == "interleaved" else 1
    assert counts.recomputed_changed == 1 and counts.partial_hits == counts.hits == 0
    # The token before the edit has another query time when the edit is one of time.
    content = 4 * each - (edit == "time")
    assert counts.tokens_reused == content + (edit == "action" and actions == "interleaved")


def test_an_event_that_enters_before_the_last_one():
    model = model_of(actions="none")
    whole = first(life(10), 10)
    cache = HistoryCache(model, "one", LARGE)
    cache.state("u", without(whole, 8))
    assert_same(cache.state("u", whole), full(model, whole))
    assert cache.counts().recomputed_changed == 1
    assert 0 < cache.counts().tokens_reused <= 8


def test_content_enters_before_a_slow_entry_of_the_same_time():
    """Equal times: content comes first, so a new event can move tokens that were the last (docs/generative.md)."""
    model = model_of(slow=True)
    user = life(3, 1)
    day = {"events": [1.0, 2.0, 5.0], "tabs": [5.0]}
    user = replace(
        user, times={name: jagged(torch.tensor(t).double() * DAY + 1e9, [len(t)]) for name, t in day.items()}
    )
    cache = HistoryCache(model, "one", LARGE)
    for events in (2, 3):
        found = cache.state("u", first(user, events, 1))
        assert_same(found, full(model, first(user, events, 1)))
    assert cache.counts().recomputed_changed == 1
    # Both events before are settled: the second asks at the same time as before, now that of the new event.
    assert cache.counts().tokens_reused == 2


def test_beyond_the_longest_history_all_places_move():
    model = model_of(True, max_len=6)
    user = life(9, context=True, seed=2)
    cache = HistoryCache(model, "one", LARGE)
    for events in range(5, 10):
        request = first(user, events, now=NOW + events)
        kept = {
            name: {"events": jagged(getattr(request, name)["events"].values[-6:], [min(events, 6)])}
            for name in ("lists", "times", "actions")
        }
        assert_same(cache.state("u", request), full(model, replace(request, **kept)))
    counts = cache.counts()
    assert (counts.misses, counts.partial_hits, counts.recomputed_shifted) == (1, 1, 3)
    assert len(latest(model, user).lists["events"].values) == 6


def test_equal_times_and_empty_histories():
    for options in ({}, {"actions": "interleaved"}, {"variant": "production"}):
        model = model_of(True, True, **options)
        user = life(12, 5, context=True)
        still = {name: replace(t, values=torch.full_like(t.values, 1e9)) for name, t in user.times.items()}
        user = replace(user, times=still)
        cache = HistoryCache(model, "one", LARGE)
        for events in (0, 0, 1, 1, 3, 12, 0, 12):
            request = first(user, events, min(events, 5), 1e9)
            assert_same(cache.state("u", request), full(model, request))
    plain = model_of()
    cache = HistoryCache(plain, "one", LARGE)
    for events in (0, 0, 1):
        assert_same(cache.state("u", first(life(3), events)), full(plain, first(life(3), events)))
    assert (cache.counts().hits, cache.counts().partial_hits) == (1, 1)


def test_the_users_own_features_change_everything():
    model = model_of(True)
    user = life(8, context=True)
    cache = HistoryCache(model, "one", LARGE)
    cache.state("u", user)
    moved = replace(user, ids=user.ids % 6 + 3)
    assert not torch.equal(moved.ids, user.ids)
    assert_same(cache.state("u", moved), full(model, moved))
    assert cache.counts().recomputed_changed == 1 and cache.counts().tokens_reused == 0


def test_a_history_kept_by_another_checkpoint_is_not_used():
    one, other = model_of(), model_of()
    with torch.no_grad():
        other.layers[0].get_parameter("weight").mul_(1.1)
    assert model_identity(one) == model_identity(model_of()) != model_identity(other)
    user = first(life(8), 8)
    cache = HistoryCache(one, model_identity(one), LARGE)
    cache.state("u", user)
    cache.use(other, model_identity(other))
    found = cache.state("u", user)
    assert_same(found, full(other, user))
    assert not torch.allclose(found.hidden, full(one, user).hidden)
    assert cache.counts().recomputed_model == 1 and cache.counts().tokens_reused == 0
    cache.state("u", user)
    assert cache.counts().hits == 1


def test_identity_is_of_weights_tables_and_configuration():
    model = model_of()
    before = model_identity(model)
    assert model_identity(model_of(time_log_base=0.6)) != before
    for _, table in model.embeddings.table_weights():
        table[5, 0] += 1
        break
    assert model_identity(model) != before


def test_the_least_recently_used_is_evicted_and_bytes_are_exact():
    model = model_of(num_layers=3)
    user = first(life(8), 8)
    one = forward_delta(model, None, user).kept
    heads, qk, v, dim = (RESEARCH[name] for name in ("num_heads", "qk_dim", "v_dim", "dim"))
    told_by = one.told_by.shape[1]
    # L n h (d_qk + d_v) floats, the last rows, and what they were computed from.
    size = 8 * (3 * heads * (qk + v) * 4 + dim * 4 + told_by * 8 + 2 * 8)
    assert one.nbytes == size
    cache = HistoryCache(model, "one", 2 * size)
    for key in "abacba":  # b leaves for c, then a for b, then c for a
        cache.state(key, user)
    counts = cache.counts()
    assert (counts.misses, counts.hits, counts.evictions, counts.entries) == (5, 1, 3, 2)
    assert counts.bytes == 2 * size
    cache.state("b", user)
    assert cache.counts().hits == 2
    cache.forget("b")
    cache.forget("nobody")
    assert (cache.counts().entries, cache.counts().bytes) == (1, size)


def test_a_state_larger_than_the_budget_is_served_and_not_kept():
    model = model_of()
    user = life(8)
    size = forward_delta(model, None, first(user, 4)).kept.nbytes
    cache = HistoryCache(model, "one", size)
    cache.state("u", first(user, 4))
    assert cache.counts().bytes == size
    assert_same(cache.state("u", first(user, 8)), full(model, first(user, 8)))
    assert cache.counts() == replace(
        Counts(), misses=1, partial_hits=1, too_large=1, tokens_reused=3, tokens_computed=4 + 5
    )


def test_a_state_in_use_stays_as_it_was():
    model = model_of()
    user = life(8)
    cache = HistoryCache(model, "one", LARGE)
    state = cache.state("u", first(user, 7))
    before = [t.clone() for t in (*state.keys, *state.values, state.hidden)]
    cache.state("u", first(user, 8, now=NOW + DAY))
    for one, other in zip(before, (*state.keys, *state.values, state.hidden)):
        assert torch.equal(one, other)


def test_two_threads():
    """Of one user and of several, with too small a budget for all: every state right, every byte accounted for."""
    model = model_of(True, True, actions="interleaved")
    lives = {key: life(12, 5, seed, True) for seed, key in enumerate("abc")}
    requests = [
        (key, first(lives[key], events, min(events, 5), NOW + events)) for events in range(1, 13) for key in "aabc"
    ]
    expected = [full(model, user) for _, user in requests]
    cache = HistoryCache(model, "one", 2 * forward_delta(model, None, requests[-1][1]).kept.nbytes)
    failures = []

    def serve(order: list[int]) -> None:
        try:
            for i in order:
                assert_same(cache.state(*requests[i]), expected[i])
        except BaseException as error:
            failures.append(error)

    orders = [torch.randperm(len(requests), generator=torch.Generator().manual_seed(s)).tolist() for s in (1, 2)]
    threads = [threading.Thread(target=serve, args=(order,)) for order in orders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    counts = cache.counts()
    served = [getattr(counts, name) for name in vars(counts) if name.endswith("hits") or name.startswith("recomputed")]
    assert sum(served) + counts.misses == 2 * len(requests)
    for key in "abc":
        cache.forget(key)
    assert (cache.counts().entries, cache.counts().bytes) == (0, 0)


def test_what_cannot_be_kept():
    model = model_of()
    with pytest.raises(InputError, match="one user at a time, not 2"):
        forward_delta(model, None, batch([3, 4]).user)
    with pytest.raises(InputError, match=r"model\.eval"):
        forward_delta(model.train(), None, batch([3]).user)
    with pytest.raises(InputError, match="budget_bytes -1"):
        HistoryCache(model, "one", -1)
    with pytest.raises(InputError, match="only HSTU"):
        HistoryCache(awake(SASRecConfig(dim=8), layout()), "one", 0)

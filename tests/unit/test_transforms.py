"""Stochastic length by its formula (HSTU section 3.2) and exact chances; negatives by their range, shape and chance."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from scalerec.batch import Batch, Jagged, Rows
from scalerec.config import parse
from scalerec.data.transforms import Negatives, StochasticLength
from scalerec.errors import InputError
from scalerec.features.layout import FeatureLayout, GroupLayout, Layout, Table

ITEMS = 40  # rows of the item table
SEQUENCES = (
    FeatureLayout(name="moves", kind="sequence", width=2, tables=("city",), runs=True),
    FeatureLayout(name="events", kind="sequence", width=4, tables=("item", "genre"), query=("item", "genre")),
)
LAYOUT = Layout(
    tables=(
        Table(name="city", rows=9, dim=2),
        Table(name="item", rows=ITEMS, dim=2),
        Table(name="genre", rows=7, dim=2),
    ),
    groups=(
        GroupLayout(name="past", side="user", features=SEQUENCES),
        GroupLayout(
            name="candidate",
            side="item",
            features=(
                FeatureLayout(name="genre", kind="id", width=2, tables=("genre",)),
                FeatureLayout(name="item", kind="id", width=2, tables=("item",)),
            ),
        ),
    ),
    tasks=("like",),
)


def layout(longest):
    """The layout with events of at most so many."""
    events = SEQUENCES[1].model_copy(update={"max_len": longest})
    past = GroupLayout(name="past", side="user", features=(SEQUENCES[0], events))
    return Layout(tables=LAYOUT.tables, groups=(past, LAYOUT.groups[1]), tasks=LAYOUT.tasks)


def make_batch(lengths, user_of_row=None, new_events=None, seed=0):
    """Users with so many events; event i of all has genre i and label i, so that what belongs together is seen."""
    torch.manual_seed(seed)
    lengths = torch.tensor(lengths)
    total, users = int(lengths.sum()), len(lengths)
    user_of_row = torch.arange(users) if user_of_row is None else torch.tensor(user_of_row)
    rows = len(user_of_row)
    number = torch.arange(total)
    events = torch.stack([torch.randint(3, ITEMS, (total,)), number], 1)
    times = torch.randint(1, 1000, (total,)).double().cumsum(0)
    moves = Jagged.from_lengths(torch.arange(users)[:, None], torch.ones_like(lengths))
    user = Rows(
        "user", torch.zeros(users, 0), torch.zeros(users, 0),
        {"events": Jagged.from_lengths(events, lengths), "moves": moves},
        {"events": Jagged.from_lengths(times, lengths)},
        {"events": Jagged.from_lengths(number[:, None].float(), lengths)},
    )  # fmt: skip
    items = Rows("item", torch.randint(3, 7, (rows, 2)), torch.zeros(rows, 0), {}, {})
    return Batch(
        user, items, user_of_row, torch.ones(rows, 1), torch.ones(rows, 1), torch.arange(rows), torch.arange(rows),
        None if new_events is None else torch.tensor(new_events),
    )  # fmt: skip


def random(seed=0):
    return np.random.default_rng(seed)


def events(batch):
    """The numbers of each user's events."""
    past = batch.user.lists["events"]
    return [part[:, 1].tolist() for part in past.values.split(past.lengths.tolist())]


# Stochastic length

TABLE = {  # every user as long as allowed: (L, chance to stay whole, sparsity in %)
    1.6: {1024: (256, 0.0625, 70.3), 2048: (445, 0.0474, 74.6), 4096: (776, 0.0359, 78.2), 8192: (1351, 0.0272, 81.2)},
    1.7: {1024: (362, 0.125, 56.6), 2048: (652, 0.1015, 61.2), 4096: (1176, 0.0825, 65.4), 8192: (2120, 0.0670, 69.2)},
    1.8: {1024: (512, 0.25, 37.5), 2048: (955, 0.2176, 41.8), 4096: (1782, 0.1895, 45.8), 8192: (3326, 0.1649, 49.6)},
    1.9: {1024: (724, 0.5, 14.7), 2048: (1398, 0.4665, 16.9), 4096: (2702, 0.4353, 19.2), 8192: (5220, 0.4061, 21.6)},
}


@pytest.mark.parametrize(("alpha", "max_len"), [(alpha, n) for alpha, row in TABLE.items() for n in row])
def test_table_of_the_specification(alpha, max_len):
    length, whole, sparsity = TABLE[alpha][max_len]
    transform = StochasticLength(alpha=alpha)
    full = np.full(3, max_len)
    assert transform.length(max_len) == length
    assert transform.keep_whole(full, max_len) == pytest.approx(whole, abs=5e-5)
    assert 100 * transform.sparsity(full, max_len) == pytest.approx(sparsity, abs=0.06)  # 14.648 is printed as 14.7


def test_sparsity_is_what_the_transform_leaves_out():
    lengths = [200, 60, 20, 5, 120] * 400
    transform = StochasticLength(alpha=1.7, selector="random")
    found = transform(make_batch(lengths), layout(200), random())
    left = len(found.user.lists["events"].values) / sum(lengths)
    assert 1 - left == pytest.approx(transform.sparsity(np.array(lengths), 200), abs=0.015)


@pytest.mark.parametrize("length", [40, 64, 100, 250])
def test_share_of_whole_histories_is_within_three_sigma(length):
    transform, users = StochasticLength(alpha=1.8), 4000  # L = 63, always whole below
    batch = make_batch([length] * users)
    lengths = transform(batch, layout(100), random(length)).user.lists["events"].lengths
    chance = 1.0 if length <= 63 else min(1, 100**1.8 / length**2)
    whole = (lengths == length).double().mean().item()
    assert abs(whole - chance) <= 3 * (chance * (1 - chance) / users) ** 0.5
    assert set(lengths.tolist()) <= {length, 63}


@pytest.mark.parametrize("selector", ["weighted", "greedy", "random"])
def test_events_stay_together_in_order_and_in_their_list(selector):
    batch = make_batch([30, 0, 3, 80, 80, 1, 17], new_events=[4, 0, 3, 80, 0, 1, 5])
    transform = StochasticLength(alpha=1.5, selector=selector)  # L = 26
    found, before = transform(batch, layout(80), random(1)), events(batch)
    assert transform.length(80) == 26
    for user, (kept, all_of_them) in enumerate(zip(events(found), before)):
        assert kept == sorted(set(kept)) and set(kept) <= set(all_of_them)
        assert len(kept) in {len(all_of_them), 26}
        new = all_of_them[len(all_of_them) - int(batch.new_events[user]) :]
        assert found.new_events is not None and found.new_events[user] == len(set(new) & set(kept))
        if selector == "greedy":
            assert kept == all_of_them[-len(kept) :] or not kept
    assert [len(kept) for kept in events(found)] != [len(kept) for kept in before]  # something was cut
    number = found.user.lists["events"].values[:, 1]
    past = batch.user
    torch.testing.assert_close(found.user.lists["events"].values, past.lists["events"].values[number])
    torch.testing.assert_close(found.user.times["events"].values, past.times["events"].values[number])
    torch.testing.assert_close(found.user.actions["events"].values, past.actions["events"].values[number])
    for kept in (found.user.times, found.user.actions):
        assert kept["events"].offsets.tolist() == found.user.lists["events"].offsets.tolist()
    assert found.user.lists["moves"] is past.lists["moves"]


def test_new_events_of_rows_that_share_a_user():
    batch = make_batch([50, 40], user_of_row=[1, 0, 1, 1], new_events=[40, 2, 7, 0])
    found = StochasticLength(alpha=1.2, selector="random")(batch, layout(50), random(3))
    kept, before = events(found), events(batch)
    assert len(kept[1]) < 40 and found.new_events is not None
    for row, (user, new) in enumerate([(1, 40), (0, 2), (1, 7), (1, 0)]):
        assert found.new_events[row] == len(set(before[user][len(before[user]) - new :]) & set(kept[user]))


def test_weights_are_those_of_sampling_by_age():
    """Ages 9, 3, 0 weigh 1/4, 3/4, 1; two of three events are drawn, one after the other without replacement."""
    users, weights = 20_000, [0.25, 0.75, 1.0]
    batch = make_batch([3] * users)
    stamps = torch.tensor([1.0, 7.0, 10.0]).double().repeat(users)
    times = {"events": Jagged(stamps, batch.user.times["events"].offsets)}
    batch = replace(batch, user=replace(batch.user, times=times))
    transform = StochasticLength(alpha=1.3)  # L = 2, whole with 3^1.3 / 9 = 0.46
    kept = [tuple(number % 3 for number in user) for user in events(transform(batch, layout(3), random(5)))]
    cut = [pair for pair in kept if len(pair) == 2]
    chance = dict.fromkeys([(0, 1), (0, 2), (1, 2)], 0.0)
    for first, second in permutations(range(3), 2):
        pair = min(first, second), max(first, second)
        chance[pair] += weights[first] / 2 * weights[second] / (2 - weights[first])
    for pair, expected in chance.items():
        sigma = (expected * (1 - expected) / len(cut)) ** 0.5
        assert abs(cut.count(pair) / len(cut) - expected) <= 3 * sigma


def test_equal_times_weigh_the_same():
    batch = make_batch([4] * 3000)
    times = {
        "events": batch.user.times["events"].map(
            lambda values: torch.ones_like(values) if values.is_floating_point() else values
        )
    }
    batch = replace(batch, user=replace(batch.user, times=times))
    found = StochasticLength(alpha=1.1)(batch, layout(4), random(6))  # L = 2
    cut = [number % 4 for user in events(found) if len(user) == 2 for number in user]
    shares = np.bincount(cut) / len(cut)
    assert shares == pytest.approx([0.25] * 4, abs=0.03)


def test_the_seed_decides_and_nothing_is_changed_in_place():
    batch = make_batch([60] * 30, new_events=[60] * 30)
    copy = make_batch([60] * 30, new_events=[60] * 30)
    transform = StochasticLength(alpha=1.6)
    first, same, other = (transform(batch, layout(60), random(seed)) for seed in (1, 1, 2))
    assert events(first) == events(same) != events(other)
    torch.testing.assert_close(batch.user.lists["events"].values, copy.user.lists["events"].values)
    assert batch.new_events is not None and batch.new_events.tolist() == [60] * 30


def test_alpha_two_is_off():
    batch = make_batch([500, 3])
    assert StochasticLength()(batch, LAYOUT, random()) is batch


def test_weights_need_times():
    batch = make_batch([60] * 5)
    batch = replace(batch, user=replace(batch.user, times={}))
    with pytest.raises(InputError, match="needs the events' times"):
        StochasticLength(alpha=1.5)(batch, layout(60), random())
    found = StochasticLength(alpha=1.5, selector="random")(batch, layout(60), random())
    assert len(found.user.lists["events"].values) < 300


# Negatives


def test_negatives_of_each_position_are_uniform_over_the_real_ids():
    found = Negatives(count=50)(make_batch([300, 0, 100]), LAYOUT, random())
    assert found.negatives is not None and found.negatives.shape == (400, 50)
    counts = np.bincount(found.negatives.flatten().numpy(), minlength=ITEMS)
    assert not counts[:3].any() and len(counts) == ITEMS
    share, draws = 1 / (ITEMS - 3), 400 * 50
    assert np.abs(counts[3:] / draws - share).max() < 4 * (share * (1 - share) / draws) ** 0.5


def test_negatives_of_rows_that_share_a_user_are_their_own():
    batch = make_batch([5, 2], user_of_row=[1, 0, 1])
    found = Negatives(count=3)(batch, LAYOUT, random())
    assert found.negatives is not None and found.negatives.shape == (5 + 2 * 2, 3)


def test_shared_negatives():
    found = Negatives(count=512, how="shared")(make_batch([3, 4]), LAYOUT, random())
    assert found.negatives is not None and found.negatives.shape == (512,)
    assert set(found.negatives.tolist()) == set(range(3, ITEMS))


def test_in_batch_negatives_are_items_of_the_batch_each_as_likely():
    batch = make_batch([6, 0, 1])
    past = batch.user.lists["events"]
    ids = torch.tensor([[8, 0], [8, 1], [8, 2], [9, 3], [1, 4], [2, 5], [30, 6]])  # 1 and 2: unknown, missing
    user = replace(batch.user, lists=batch.user.lists | {"events": Jagged(ids, past.offsets)})
    items = replace(batch.items, ids=torch.tensor([[3, 31], [4, 8], [5, 0]]))
    found = Negatives(count=8000, how="in_batch")(replace(batch, user=user, items=items), LAYOUT, random())
    assert found.negatives is not None
    drawn, counts = np.unique(found.negatives.numpy(), return_counts=True)
    assert drawn.tolist() == [8, 9, 30, 31]
    assert counts / 8000 == pytest.approx([0.25] * 4, abs=0.02)


def test_in_batch_negatives_are_of_the_items_that_are_foreseen():
    """Another feature of a row may share their table."""
    candidate = LAYOUT.groups[1]
    shown_before = FeatureLayout(name="shown_before", kind="id", width=2, tables=("item",))
    groups = (LAYOUT.groups[0], candidate.model_copy(update={"features": (shown_before, *candidate.features[1:])}))
    of = Layout(tables=LAYOUT.tables, groups=groups, tasks=LAYOUT.tasks)
    batch = make_batch([0, 0])
    batch = replace(batch, items=replace(batch.items, ids=torch.tensor([[4, 8], [5, 9]])))
    found = Negatives(count=100, how="in_batch")(batch, of, random())
    assert found.negatives is not None and set(found.negatives.tolist()) == {8, 9}


def test_batch_without_known_items_draws_from_the_table():
    batch = make_batch([0, 0])
    batch = replace(batch, items=replace(batch.items, ids=torch.ones(2, 2, dtype=torch.long)))
    found = Negatives(count=500, how="in_batch")(batch, LAYOUT, random())
    assert found.negatives is not None and found.negatives.min() >= 3 and found.negatives.shape == (500,)


@pytest.mark.parametrize("how", ["per_position", "shared", "in_batch"])
def test_the_seed_decides_the_negatives(how):
    batch = make_batch([20, 30])
    first, same, other = (Negatives(count=9, how=how)(batch, LAYOUT, random(seed)).negatives for seed in (1, 1, 2))
    assert first is not None and same is not None and other is not None
    assert first.tolist() == same.tolist() != other.tolist()
    assert batch.negatives is None and first.dtype == torch.int64


def test_no_negatives():
    batch = make_batch([2])
    assert Negatives(count=0)(batch, LAYOUT, random()) is batch


def test_empty_table_has_no_negatives():
    tables = tuple(table.model_copy(update={"rows": 3}) for table in LAYOUT.tables)
    empty = Layout(tables=tables, groups=LAYOUT.groups, tasks=LAYOUT.tasks)
    with pytest.raises(InputError, match="'item' has no item"):
        Negatives()(make_batch([2]), empty, random())


# Which sequence


def test_main_sequence():
    assert LAYOUT.main_sequence().name == "events"  # the first that is not a slowly changing series
    slow = GroupLayout(name="past", side="user", features=SEQUENCES[:1])
    with pytest.raises(InputError, match="no sequence of events"):
        Layout(tables=LAYOUT.tables, groups=(slow,), tasks=()).main_sequence()


@pytest.mark.parametrize("config", [{"alpha": 1.0}, {"alpha": 2.1}, {"selector": "oldest"}, {"max_len": 0}])
def test_bad_stochastic_length(config):
    with pytest.raises(InputError, match=next(iter(config))):
        parse(StochasticLength, config, "training.stochastic_length")
    with pytest.raises(ValidationError):
        StochasticLength(**config)

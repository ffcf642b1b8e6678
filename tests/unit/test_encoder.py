"""The encoder: what every kind of column becomes, and that a row becomes the same alone, in a piece or in a file."""

from __future__ import annotations

import datetime
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scalerec.batch import FIRST_ID, MISSING, UNKNOWN, Batch, Rows
from scalerec.errors import InputError
from scalerec.features.compiled import buckets, distinct, fold
from scalerec.features.encoder import Encoder
from scalerec.features.hashing import hash_column, hash_text
from scalerec.features.vocabulary import Vocabulary
from scalerec.schema import (
    Categorical,
    Cross,
    Feature,
    Group,
    MultiCategorical,
    Numeric,
    Schema,
    Sequence,
    SequenceField,
    Task,
)


def schema_of(*items: Feature, user: tuple[Feature, ...] = ()) -> Schema:
    return Schema(
        groups=(
            Group(name="user", side="user", features=(Categorical(name="user"), *user)),
            Group(name="item", side="item", features=items or (Categorical(name="x"),)),
        ),
        tasks=(Task(name="y"),),
        user="user",
    )


def rows_of(**columns: Any) -> pa.RecordBatch:
    """A record batch of these columns (Arrow arrays or lists), with a user and a label where they are not given."""
    arrays = {name: value if isinstance(value, pa.Array) else pa.array(value) for name, value in columns.items()}
    n = len(next(iter(arrays.values())))
    arrays = {"user": pa.array(["u"] * n), "y": pa.array([0] * n), **arrays}
    return pa.RecordBatch.from_arrays(list(arrays.values()), names=list(arrays))


def ids(feature: Feature, fitted: Any, encoded: Any) -> list[int]:
    """Ids of `encoded` after fitting the one feature `x` on `fitted`."""
    encoder = Encoder.fit(schema_of(feature), [rows_of(x=fitted)])
    return encoder.encode(rows_of(x=encoded)).items.ids[:, 0].tolist()


def lists_of(feature: Feature, fitted: Any, encoded: Any) -> list[list[int]]:
    encoder = Encoder.fit(schema_of(feature), [rows_of(x=fitted)])
    return as_lists(encoder.encode(rows_of(x=encoded)).items, "x")


def as_lists(rows: Rows, name: str) -> list[list[Any]]:
    jagged = rows.lists[name]
    return [jagged.values[a:b].tolist() for a, b in zip(jagged.offsets.tolist(), jagged.offsets[1:].tolist())]


X = Categorical(name="x")

# -- dictionaries


@pytest.mark.parametrize(
    ("fitted", "encoded", "expected"),
    [
        ([7, 5, 5], [5, 7, 6, None], [3, 4, UNKNOWN, MISSING]),
        (["b", "a"], ["a", "b", "c", None, ""], [3, 4, UNKNOWN, MISSING, UNKNOWN]),
        ([True, False], [False, True, None], [3, 4, MISSING]),
        ([7.0, 5.0, float("nan")], [5, 7, 6], [3, 4, UNKNOWN]),
        ([7, 5], [5.0, 7.0, 6.5, float("nan"), float("inf"), None], [3, 4, UNKNOWN, MISSING, MISSING, MISSING]),
        ([2.5, 1.5], [1.5, 2.5, 3.5], [3, 4, UNKNOWN]),
        (pa.array([1.1, 1.1, 2.5], pa.float32()), pa.array([1.1, 2.5], pa.float32()), [3, 4]),
        (pa.array([1.1, 1.1, 2.5], pa.float32()), [float(np.float32(1.1)), 2.5], [3, 4]),
        (["1", "2"], [2, 1, 3], [4, 3, UNKNOWN]),
        ([7, 5], pa.nulls(2), [MISSING, MISSING]),
        (["b", "a"], pa.nulls(2), [MISSING, MISSING]),
        (pa.nulls(2), ["a", None], [UNKNOWN, MISSING]),
        (pa.array([2**63 + 9, 3], pa.uint64()), pa.array([2**63 + 9, 3, 4], pa.uint64()), [3, 4, UNKNOWN]),
        (pa.array([3, 4], pa.int8()), pa.array([3, 4], pa.int64()), [3, 4]),
        (pa.array(["a"], pa.large_string()), pa.array(["a"], pa.string()), [3]),
        ([datetime.date(2024, 1, 2), datetime.date(2024, 1, 1)], [datetime.date(2024, 1, 1)], [3]),
        (["日本", "é"], ["é", "日本"], [3, 4]),
    ],
)
def test_dictionary_ids(fitted, encoded, expected):
    assert ids(X, fitted, encoded) == expected


@pytest.mark.parametrize("values", [["a", "b", "a"], [7, 8, 7]])
@pytest.mark.parametrize("feature", [X, Categorical(name="x", vocabulary="hash", buckets=1000)])
def test_dictionary_encoded_columns_are_read_like_plain_ones(feature, values):
    plain, packed = pa.array(values), pa.array(values).dictionary_encode()
    expected = ids(feature, plain, plain)
    assert len(set(expected)) == 2
    assert ids(feature, packed, plain) == ids(feature, plain, packed) == ids(feature, packed, packed) == expected


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=8), st.permutations(["c", "a", "d", None, "b"]))
@settings(deadline=None, max_examples=60)
def test_a_dictionary_says_the_same_whatever_else_it_holds(values, order):
    """Larger than the column, with null among its values, or beside it."""
    plain = pa.array(values, pa.string())
    places = [None if value is None and len(values) % 2 else order.index(value) for value in values]
    coded = pa.DictionaryArray.from_arrays(pa.array(places, pa.uint8()), pa.array(order, pa.string()))
    assert coded.to_pylist() == plain.to_pylist()
    assert hash_column(coded).tolist() == hash_column(plain).tolist()
    vocabulary = Vocabulary(pa.array(["b", "a"], pa.large_string()))
    assert vocabulary.ids(coded, "x").tolist() == vocabulary.ids(plain, "x").tolist()


def test_values_rarer_than_min_count_are_unknown():
    feature = Categorical(name="x", min_count=2)
    assert ids(feature, ["a", "b", "b", "c", "c", "c"], ["a", "b", "c"]) == [UNKNOWN, 3, 4]


def test_counts_add_up_over_pieces_and_histories():
    past = Sequence(name="past", fields=(SequenceField(of="x"),))
    schema = schema_of(Categorical(name="x", min_count=3), user=(past,))
    pieces = [rows_of(x=["a", "b"], past_x=[["c", "a"], []]), rows_of(x=["a", "b"], past_x=[["c", "c"], ["b"]])]
    encoder = Encoder.fit(schema, pieces)
    assert encoder.encode(rows_of(x=["a", "b", "c"], past_x=[[]] * 3)).items.ids[:, 0].tolist() == [3, 4, 5]


def test_unknown_values_are_counted():
    encoder = Encoder.fit(schema_of(), [rows_of(x=["a"])])
    counts = Counter()
    encoder.encode(rows_of(x=["a", "b", "c", None]), counts=counts)
    encoder.encode(rows_of(x=["b"]), counts=counts)
    assert counts == {"rows": 5, "x: not in the vocabulary, read as unknown": 3}


@given(st.lists(st.integers(0, 20), min_size=1), st.lists(st.integers(0, 40)), st.booleans())
@settings(deadline=None, max_examples=40)
def test_growth_appends_and_never_moves_an_id(first, later, as_text):
    def column(values: list[int]) -> pa.Array:
        return pa.array([f"v{v}" for v in values], pa.string()) if as_text else pa.array(values, pa.int64())

    old = Encoder.fit(schema_of(), [rows_of(x=column(first))])
    new = old.grown([rows_of(x=column(later))] if later else [])
    before, after = (e.encode(rows_of(x=column(list(range(41))))).items.ids[:, 0].tolist() for e in (old, new))
    for value, (a, b) in enumerate(zip(before, after)):
        assert b == a if value in first else (b == UNKNOWN) == (value not in later)
    assert sorted(i for i in after if i != UNKNOWN) == list(range(FIRST_ID, FIRST_ID + len({*first, *later})))
    assert new.layout.table["x"].rows == FIRST_ID + len({*first, *later})
    assert new.same_as(new.grown([rows_of(x=column(first))]))


def test_growth_keeps_buckets_and_scales():
    schema = schema_of(Numeric(name="x", buckets=4), Numeric(name="z", encoding="linear"))
    old = Encoder.fit(schema, [rows_of(x=[1.0, 2.0, 3.0], z=[1.0, 2.0, 3.0])])
    assert old.grown([rows_of(x=[100.0], z=[100.0])]).numerics == old.numerics


# -- hashes


def splitmix64(state: int) -> int:
    """The first output of the generator of that name (Steele et al., 2014), in plain integers."""
    x = (state + 0x9E3779B97F4A7C15) % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_hash_codes_never_change():
    """Checkpoints are worth nothing when these move."""
    texts = [13020603013274838756, 3405396810240292928, 4223062404410717160]
    assert hash_column(pa.array(["", "a", "日本", None])).tolist() == [*texts, 7640891576956012808]
    numbers = [0, -1, 2**40]
    assert hash_column(pa.array(numbers)).tolist() == [splitmix64(number % 2**64) for number in numbers]
    assert splitmix64(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("kind", [pa.int8(), pa.uint16(), pa.int64(), pa.float64()])
def test_whole_numbers_hash_by_value(kind):
    feature = Categorical(name="x", vocabulary="hash", buckets=10_000)
    assert ids(feature, [1], pa.array([0, 1, 99, None], kind)) == ids(feature, ["a"], [0, 1, 99, None])


@given(st.lists(st.text(max_size=5), min_size=1), st.integers(1, 50))
@settings(deadline=None, max_examples=40)
def test_hashed_ids_lie_in_the_table(values, buckets):
    feature = Categorical(name="x", vocabulary="hash", buckets=buckets)
    found = ids(feature, ["other"], pa.array(values))
    assert all(FIRST_ID <= i < FIRST_ID + buckets for i in found)
    assert found == [FIRST_ID + hash_text(value) % buckets for value in values]


def test_a_hashed_float_is_the_same_beside_a_fraction():
    feature = Categorical(name="x", vocabulary="hash", buckets=10_000)
    assert ids(feature, [1.0], [3.0, 2.5])[0] == ids(feature, [1.0], [3.0])[0]


# -- numbers


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=60), st.integers(2, 12), st.booleans())
@settings(deadline=None, max_examples=60)
def test_buckets_are_cut_at_quantiles(values, buckets, log):
    found = ids(Numeric(name="x", buckets=buckets, log=log), values, values)
    edges = np.unique(np.quantile(values, np.linspace(0, 1, buckets + 1)[1:-1], method="inverted_cdf"))
    assert found == [FIRST_ID + int((edges < value).sum()) for value in values]


@given(st.integers(0, 700), st.integers(0, 200), st.integers(0, 9))
@settings(deadline=None, max_examples=60)
def test_buckets_are_places_among_the_edges(edges, count, seed):
    """However many there are, equal values and the ends of the line among them."""
    random = np.random.default_rng(seed)
    borders = np.unique(random.integers(-400, 400, edges)).astype(np.float32)
    values = random.integers(-500, 500, count).astype(np.float32)
    values[random.random(count) < 0.1] = np.nan
    expected = np.where(np.isnan(values), MISSING, FIRST_ID + np.searchsorted(borders, values))
    assert buckets(values, borders, FIRST_ID, MISSING).tolist() == expected.tolist()


@given(st.lists(st.integers(0, 2**64 - 1).map(lambda n: n % 5 + (n & ~0xFF)), max_size=300))
@settings(deadline=None, max_examples=60)
def test_different_values_in_the_order_of_their_first_places(values):
    first, place = distinct(np.array(values, np.uint64))
    order = list(dict.fromkeys(values))
    assert [values[i] for i in first] == order and [order[i] for i in place] == values
    assert first.tolist() == [values.index(value) for value in order]


@given(st.lists(st.lists(st.integers(0, 2), max_size=4), min_size=1, max_size=12))
@settings(deadline=None, max_examples=100)
def test_lists_have_one_code_where_they_are_equal(lists):
    """Whatever is missing, moved or repeated in one of them, and not where another list begins."""
    codes = np.zeros(len(lists), np.uint64)
    offsets = np.cumsum([0, *map(len, lists)])
    fold(codes, np.array([n for one in lists for n in one], np.uint8), offsets)
    assert len(set(codes.tolist())) == len({tuple(one) for one in lists})


def test_buckets_are_equally_full():
    values = np.random.default_rng(0).permutation(1000).astype(float)
    found = ids(Numeric(name="x", buckets=10), values, values)
    counts = np.bincount(found)
    assert len(counts) == FIRST_ID + 10 and (abs(counts[FIRST_ID:] - 100) <= 1).all()


def test_numbers_outside_the_fitted_range_go_to_the_outer_buckets():
    assert ids(Numeric(name="x", buckets=3), [1.0, 2.0, 3.0], [-1e300, 1e300]) == [3, 5]


def test_missing_and_broken_numbers_are_missing_and_the_broken_ones_counted():
    encoder = Encoder.fit(schema_of(Numeric(name="x", buckets=2)), [rows_of(x=[1.0, 2.0, math.inf, math.nan])])
    counts = Counter()
    batch = encoder.encode(rows_of(x=[1.0, math.nan, math.inf, -math.inf, None, 2.0]), counts=counts)
    assert batch.items.ids[:, 0].tolist() == [3, MISSING, MISSING, MISSING, MISSING, 4]
    assert counts["x: NaN or infinite, read as missing"] == 3


@pytest.mark.parametrize("log", [False, True])
def test_linear_numbers_are_standardised(log):
    values = np.random.default_rng(0).normal(3, 40, 500)
    schema = schema_of(Numeric(name="x", encoding="linear", log=log))
    encoder = Encoder.fit(schema, [rows_of(x=values[:123]), rows_of(x=[None, math.inf]), rows_of(x=values[123:])])
    found = encoder.encode(rows_of(x=[*values, None, math.nan])).items.numbers
    z = np.sign(values) * np.log(1 + np.abs(values)) if log else values
    np.testing.assert_allclose(found[:500, 0], (z - z.mean()) / z.std(), rtol=1e-5, atol=1e-6)
    assert found[500:].isnan().all() and found.dtype == torch.float32


@pytest.mark.parametrize("values", [[], [None, None], [5.0, 5.0]])
def test_numbers_without_spread_do_no_harm(values):
    schema = schema_of(Numeric(name="x", encoding="linear"), Numeric(name="z"))
    column = pa.array(values, pa.float64())
    encoder = Encoder.fit(schema, [rows_of(x=column, z=column)] if values else [])
    found = encoder.encode(rows_of(x=[5.0, 6.0], z=[5.0, None])).items
    assert found.numbers.isfinite().all()
    assert found.ids[:, 0].tolist() == [3, MISSING]


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.1, 3.3, 1e9 + 0.1])
def test_a_constant_leaves_other_values_in_reach(value, log):
    """Its spread is no rounding error by which the next value would be divided."""
    schema = schema_of(Numeric(name="x", encoding="linear", log=log))
    encoder = Encoder.fit(schema, [rows_of(x=[value] * n) for n in (100, 77, 3)])
    found = encoder.encode(rows_of(x=[value, value + 1])).items.numbers
    assert found[0].abs() < 1e-5 and found[1].abs() < 2


@pytest.mark.parametrize(
    "column",
    [
        pa.array([1, 2, 3]),
        pa.array([True, False, True]),
        pa.array([1, 2, 3]).cast(pa.decimal128(30, 2)),
        pa.array([1.0, 2.0, 3.0]).dictionary_encode(),
        pa.array([2**60, 2**60 + 1, 0]),
    ],
)
def test_every_numeric_type_is_a_number(column):
    expected = np.argsort(np.argsort(np.array(column.to_pylist(), float), kind="stable"), kind="stable")
    found = np.array(ids(Numeric(name="x", buckets=64), column, column))
    assert (np.diff(found[np.argsort(expected)]) >= 0).all() and len(set(found)) >= 2


def test_the_spread_of_large_numbers():
    values = 1.7e9 + np.arange(100) / 50
    schema = schema_of(Numeric(name="x", encoding="linear", log=False))
    encoder = Encoder.fit(schema, [rows_of(x=values)])
    assert encoder.numerics["x"].std == pytest.approx(values.std(), rel=0.01)


def test_a_number_is_in_the_same_bucket_in_single_precision():
    values = np.array([0.1, 0.3, 0.7, 0.9])
    encoder = Encoder.fit(schema_of(Numeric(name="x", buckets=4)), [rows_of(x=pa.array(values, pa.float32()))])
    single, double = (encoder.encode(rows_of(x=pa.array(values, kind))) for kind in (pa.float32(), pa.float64()))
    assert torch.equal(single.items.ids, double.items.ids)


# -- several values


def test_lists_of_values():
    feature = MultiCategorical(name="x")
    fitted = [["a", "b"], ["c"]]
    encoded = [["c", "a"], [], None, ["z", None, "b"]]
    assert lists_of(feature, fitted, encoded) == [[5, 3], [MISSING], [MISSING], [UNKNOWN, MISSING, 4]]
    for kind in (pa.large_list(pa.string()), pa.list_(pa.large_string())):
        assert lists_of(feature, fitted, pa.array(encoded, kind)) == lists_of(feature, fitted, encoded)
    assert lists_of(feature, fitted, [[], []]) == [[MISSING], [MISSING]]
    assert lists_of(MultiCategorical(name="x"), [[1, 2]], [[], None]) == [[MISSING], [MISSING]]


def test_values_in_text():
    feature = MultiCategorical(name="x", separator="|")
    assert lists_of(feature, ["a|b", "c"], ["c|a", "", None, "z|b"]) == [[5, 3], [MISSING], [MISSING], [UNKNOWN, 4]]
    packed = pa.array(["c|a", "b", "c|a"]).dictionary_encode()
    assert lists_of(feature, ["a|b", "c"], packed) == [[5, 3], [4], [5, 3]]


def test_only_the_last_values_are_kept_and_the_others_counted():
    encoder = Encoder.fit(schema_of(MultiCategorical(name="x", max_len=2)), [rows_of(x=[[1, 2, 3, 4]])])
    counts = Counter()
    found = encoder.encode(rows_of(x=[[1, 2, 3], [4], [1, 2, 3, 4]]), counts=counts)
    assert as_lists(found.items, "x") == [[4, 5], [6], [5, 6]]
    assert counts["x: values beyond max_len, cut"] == 3


# -- sequences

PAST = Sequence(
    name="past", fields=(SequenceField(of="item"), SequenceField(of="shop", column="shops")), time=True, max_len=3
)
WITH_PAST = schema_of(Categorical(name="item"), Categorical(name="shop", vocabulary="hash", buckets=50), user=(PAST,))


def past_rows(items: Any, shops: Any, times: Any, **more: Any) -> pa.RecordBatch:
    n = len(items)
    return rows_of(item=["a"] * n, shop=[1] * n, past_item=items, shops=shops, past_time=times, **more)


FITTED_PAST = Encoder.fit(WITH_PAST, [past_rows([["b", "c"]], [[1, 2]], [[1, 2]])])


def test_a_past_is_read_through_the_tables_of_its_features():
    assert [table.name for table in FITTED_PAST.layout.tables] == ["user", "item", "shop"]
    feature = FITTED_PAST.layout.sides["user"].sequences[0]
    assert (feature.tables, feature.query, feature.width) == (("item", "shop"),) * 2 + (32,)
    batch = FITTED_PAST.encode(past_rows([["b", "z", None]], [[1, 1, None]], [[1, 2, 3]]))
    shop = batch.items.ids[0, 1].item()
    assert as_lists(batch.user, "past") == [[[4, shop], [UNKNOWN, shop], [MISSING, MISSING]]]


def test_the_newest_events_are_kept():
    batch = FITTED_PAST.encode(past_rows([["a", "b", "c", "a", "b"], ["c"]], [[1] * 5, [1]], [[5, 6, 7, 8, 9], [4.5]]))
    assert [[event[0] for event in events] for events in as_lists(batch.user, "past")] == [[5, 3, 4], [5]]
    assert batch.user.times["past"].values.tolist() == [7, 8, 9, 4.5]
    assert torch.equal(batch.user.times["past"].offsets, batch.user.lists["past"].offsets)


@pytest.mark.parametrize("empty", [[[], []], [None, None], pa.nulls(2)])
def test_empty_pasts(empty):
    batch = FITTED_PAST.encode(past_rows(empty, empty, empty))
    assert as_lists(batch.user, "past") == [[]]
    assert batch.user.lists["past"].values.shape == (0, 2)
    assert batch.user_of_row.tolist() == [0, 0]


def test_times_may_be_timestamps():
    moments = [[datetime.datetime(2024, 1, 1), datetime.datetime(2024, 1, 2)]]
    batch = FITTED_PAST.encode(past_rows([["a", "b"]], [[1, 2]], moments))
    assert batch.user.times["past"].values.tolist() == [1704067200.0, 1704153600.0]


@pytest.mark.parametrize(
    ("items", "shops", "times", "words"),
    [
        ([["a"], ["a", "b"]], [[1], [1]], [[1], [1, 2]], "part 3, row 1: lists 'past_item' and 'shops' differ"),
        ([["a"], ["a", "b"]], [[1], [1, 2]], [[1], [1]], "part 3, row 1: lists 'past_item' and 'past_time' differ"),
        ([["a"], ["a"]], [[1], None], [[1], [1]], "part 3, row 1: lists 'past_item' and 'shops' differ"),
    ],
)
def test_lists_of_unequal_length_are_refused(items, shops, times, words):
    with pytest.raises(InputError, match=words):
        FITTED_PAST.encode(past_rows(items, shops, times), where="part 3")


def test_long_lists_of_unequal_length_are_refused():
    with pytest.raises(InputError, match="differ in length"):
        FITTED_PAST.encode(past_rows([["a"] * 5], [[1] * 4], [[1] * 5]))


def test_unequal_lists_are_named_by_their_row_in_the_file():
    with pytest.raises(InputError, match="row 42"):
        FITTED_PAST.encode(past_rows([["a"], ["a"]], [[1], []], [[1], [1]]), index=np.array([140, 142]), first=100)


# -- crosses


def test_a_cross_is_one_id_for_each_combination():
    feature = Cross(name="x", of=("a", "b"), buckets=100_000)
    encoder = Encoder.fit(schema_of(feature), [])
    pairs = [(a, b) for a in ("u", "v", None) for b in (1, 2, 3, None)]
    batch = encoder.encode(rows_of(a=[a for a, _ in pairs], b=[b for _, b in pairs]))
    found = batch.items.ids[:, 0].tolist()
    assert len(set(found)) == len(pairs) and min(found) >= FIRST_ID and max(found) < FIRST_ID + 100_000
    codes = [splitmix64((splitmix64(hash_text("u")) + splitmix64(b)) % 2**64) for b in (1, 2, 3)]
    assert found[:3] == [FIRST_ID + code % 100_000 for code in codes]
    swapped = encoder.encode(rows_of(a=[1], b=["u"]))
    assert swapped.items.ids.item() != found[0]
    whole_floats = encoder.encode(rows_of(a=["u"], b=[1.0]))
    assert whole_floats.items.ids.item() == found[0]


# -- actions, the time of the request, new events

WITH_ACTIONS = Schema(
    groups=(
        Group(
            name="user",
            side="user",
            features=(
                Sequence(
                    name="past", fields=(SequenceField(of="item"),), time=True, actions=("like", "buy"), max_len=2
                ),
            ),
        ),
        Group(name="item", side="item", features=(Categorical(name="item"),)),
    ),
    tasks=(Task(name="likes", label="like"), Task(name="buy")),
    user="user",
    item="item",
    time="at",
    time_unit=60.0,
    new_events="new",
)


def acted(rows: int = 1, *, first: int = 0, schema: Schema = WITH_ACTIONS, **columns: Any) -> Batch:
    fixed = {
        "user": ["u"] * rows, "item": [1] * rows, "at": [3] * rows, "new": [1] * rows, "like": [0] * rows,
        "buy": [1] * rows, "past_item": [[1, 2, 1]] * rows, "past_time": [[0, 1, 2]] * rows,
        "past_like": [[1, 0, None]] * rows, "past_buy": [[True, True, False]] * rows,
    }  # fmt: skip
    batch = pa.RecordBatch.from_pydict({name: pa.array(columns.get(name, value)) for name, value in fixed.items()})
    return Encoder.fit(schema, [batch]).encode(batch, where="day", index=np.arange(first, first + rows))


def test_a_past_keeps_actions_and_the_row_its_time_and_new_events():
    batch = acted()
    actions = batch.user.actions["past"]
    assert actions.values.dtype == torch.float32
    assert actions.values[0].tolist() == [0, 1]
    assert actions.values[1, 0].isnan() and actions.values[1, 1] == 0
    assert torch.equal(actions.offsets, batch.user.lists["past"].offsets)
    assert batch.user.times["past"].values.tolist() == [60.0, 120.0]
    assert batch.user.now is not None and batch.user.now.tolist() == [180.0]
    assert batch.user.now.dtype == torch.float64
    assert batch.new_events is not None and batch.new_events.tolist() == [1]
    request = pa.RecordBatch.from_pylist(
        [{"user": "u", "item": 1, "at": 9, "past_item": [1], "past_time": [1], "past_like": [1], "past_buy": [0]}]
    )
    asked = Encoder.fit(WITH_ACTIONS, []).encode(request, labels=False)
    assert asked.new_events is not None and asked.new_events.tolist() == [0]


def test_rows_of_a_user_at_different_times_or_after_other_actions_are_apart():
    batch = acted(4, at=[3, 4, 3, 3], past_like=[[1, 0, 0], [1, 0, 0], [1, 0, 1], [1, 0, 0]], new=[0, 1, 2, 3])
    assert batch.user_of_row.tolist() == [0, 1, 2, 0]
    assert batch.user.now is not None and batch.user.now.tolist() == [180.0, 240.0, 180.0]
    assert batch.user.actions["past"].take(torch.tensor([2])).values[:, 0].tolist() == [0, 1]
    taken = batch.take(torch.tensor([3, 1]))
    both = Batch.cat([taken, batch])
    for rows, expected in ((taken, [180.0, 240.0]), (both, [180.0, 240.0, 180.0, 240.0, 180.0, 180.0])):
        assert rows.user.now is not None and rows.user.now[rows.user_of_row].tolist() == expected
    assert both.new_events is not None and both.new_events.tolist() == [3, 1, 0, 1, 2, 3]


def test_an_action_unlike_itself_is_the_same_when_both_are_unknown():
    batch = acted(2, past_like=[[1, 0, None], [1, 0, None]])
    assert batch.user_of_row.tolist() == [0, 0]


@pytest.mark.parametrize("wrong", [2, 5, -1, 0.5])
def test_a_label_in_a_past_is_0_or_1_or_missing(wrong):
    likes = [[1, 0, 1], [1, None, math.nan], [0, 1, wrong], [1, 1, 7]]
    with pytest.raises(InputError, match=f"^day, row 42: label 'past_like' is {wrong}, must be 0 or 1$"):
        acted(4, past_like=likes, first=40)
    with pytest.raises(InputError, match=f"^day, row 0: label 'past_buy' is {wrong}, must be 0 or 1$"):
        acted(1, past_buy=[[0, wrong, 1]])
    assert len(acted(2, past_like=likes[:2])) == 2


def test_two_tasks_with_one_label_cannot_keep_it_in_a_past():
    tasks = [{"name": "likes", "label": "like"}, {"name": "like"}]
    wrong = WITH_ACTIONS.model_dump(mode="json") | {"tasks": tasks}
    with pytest.raises(ValueError, match=r"sequence 'past': .* two tasks have the label 'like'"):
        Schema.model_validate(wrong)
    for group in wrong["groups"]:
        group["features"] = [
            feature | ({"actions": ["buy"]} if "actions" in feature else {}) for feature in group["features"]
        ]
    assert len(Schema.model_validate(wrong).tasks) == 2


# -- the order of a past


@pytest.mark.parametrize(
    ("times", "at", "words"),
    [
        ([[0, 1, 2], [0, 2, 1]], [3, 3], "row 11: 'past_time' goes back in time at its event 3 of 3: sort each"),
        ([[0, 1, 2], [2, 1, 3]], [3, 3], "row 11: 'past_time' goes back in time at its event 2 of 3"),  # before the cut
        ([[1, 2, 4], [0, 0, 0]], [3, 3], "row 10: 'past_time' is later than the row's own time at its event 3 of 3"),
        ([[0, 1, 2], [4, 4, 4]], [3, 3], "row 11: 'past_time' is later than the row's own time at its event 1 of 3"),
    ],
)
def test_a_past_out_of_order_or_after_its_row_is_refused(times, at, words):
    with pytest.raises(InputError, match=f"^day, {words}"):
        acted(2, past_time=times, at=at, first=10)


def test_equal_times_are_in_order_and_a_new_list_may_begin_earlier():
    assert len(acted(3, past_time=[[1, 1, 1], [0, 3, 3], [0, 0, 1]], at=[1, 3, 9])) == 3


def test_without_times_of_rows_only_the_order_is_checked():
    timeless = WITH_ACTIONS.model_copy(update={"time": None})
    assert acted(1, past_time=[[7, 8, 9]], schema=timeless).user.now is None
    with pytest.raises(InputError, match="goes back in time at its event 2 of 3"):
        acted(1, past_time=[[7, 6, 9]], schema=timeless)


@given(st.lists(st.tuples(st.lists(st.integers(0, 4), max_size=4), st.integers(2, 4)), min_size=1, max_size=6))
@settings(deadline=None, max_examples=150)
def test_the_order_is_checked_as_a_loop_would(pasts):
    columns = {"past_time": pa.array([past for past, _ in pasts], pa.list_(pa.int64())), "at": [at for _, at in pasts]}
    for name in ("item", "like", "buy"):
        columns[f"past_{name}"] = pa.array([[1] * len(past) for past, _ in pasts], pa.list_(pa.int64()))
    back = [row for row, (past, _) in enumerate(pasts) if past != sorted(past)]
    late = [row for row, (past, at) in enumerate(pasts) if any(time > at for time in past)]
    if not back and not late:
        assert acted(len(pasts), **columns).user.times["past"].offsets[-1] <= 2 * len(pasts)
        return
    words = f"row {back[0]}: 'past_time' goes back" if back else f"row {late[0]}: 'past_time' is later"
    with pytest.raises(InputError, match=f"^day, {words}"):
        acted(len(pasts), **columns)


def test_a_log_without_tasks():
    schema = WITH_ACTIONS.model_copy(update={"tasks": ()})
    rows = pa.RecordBatch.from_pydict(
        {"user": ["u"] * 2, "item": [1, 2], "at": [1, 2], "new": [0, 0],
         **{f"past_{name}": [[], [1]] for name in ("item", "time", "like", "buy")}}
    )  # fmt: skip
    encoder = Encoder.fit(schema, [rows])
    for batch in (encoder.encode(rows), encoder.encode(rows, labels=False)):
        assert batch.labels.shape == batch.weights.shape == (2, 0)
    assert encoder.layout.tasks == ()


# -- labels


def labelled(**columns: Any) -> Batch:
    schema = Schema(
        groups=schema_of().groups, tasks=(Task(name="y"), Task(name="z", label="w", weight="g", mask="m")), user="user"
    )
    encoder = Encoder.fit(schema, [])
    n = len(columns.get("y", columns.get("w")))
    return encoder.encode(
        rows_of(**{"x": ["a"] * n, "y": [0] * n, "w": [0] * n, "g": [1.0] * n, "m": [1] * n, **columns}),
        index=np.arange(110, 110 + n),
        where="day.parquet",
        first=100,
    )


@pytest.mark.parametrize("y", [[0, 1, None], [False, True, None], [0.0, 1.0, math.nan]])
def test_labels_and_missing_labels(y):
    batch = labelled(y=y)
    assert batch.labels[:, 0].tolist() == [0, 1, 0]
    assert batch.weights[:, 0].tolist() == [1, 1, 0]
    assert batch.index.tolist() == [110, 111, 112]


def test_weights_and_masks():
    batch = labelled(w=[1, 1, 1, 0, 1], g=[0.5, 2.0, 3.0, None, 0.0], m=[1, 0, 5, 1, 1])
    assert batch.weights[:, 1].tolist() == [0.5, 0, 3, 0, 0]
    assert batch.labels[:, 1].tolist() == [1, 1, 1, 0, 1]
    assert batch.weights[:, 0].tolist() == [1] * 5


def test_a_null_mask_does_not_count():
    assert labelled(w=[1, 1], m=[1, None]).weights[:, 1].tolist() == [1, 0]


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"y": [0, 1, 2]}, "day.parquet, row 12: label 'y' is 2, must be 0 or 1"),
        ({"y": [0.5]}, "day.parquet, row 10: label 'y' is 0.5"),
        ({"w": [1, -1]}, "day.parquet, row 11: label 'w' is -1"),
        ({"y": ["1"]}, "column 'y' is string, not a number"),
        ({"w": [1, 1], "g": [1.0, -1.0]}, "day.parquet: weights 'g' hold negative values"),
    ],
)
def test_bad_labels_are_refused_with_their_place(columns, words):
    with pytest.raises(InputError, match=words):
        labelled(**columns)


def test_a_request_needs_no_labels():
    encoder = Encoder.fit(schema_of(), [])
    rows = pa.RecordBatch.from_pylist([{"user": "u", "x": "a"}])
    batch = encoder.encode(rows, labels=False)
    assert batch.labels.tolist() == [[0]] and batch.weights.tolist() == [[0]]
    with pytest.raises(InputError, match="rows: no column 'y'; it has user, x"):
        encoder.encode(rows)


# -- wrong columns


def test_a_missing_column_is_named():
    with pytest.raises(InputError, match="no column 'x'; the files have"):
        Encoder.fit(schema_of(), [rows_of(z=[1])])
    encoder = Encoder.fit(schema_of(), [rows_of(x=[1])])
    with pytest.raises(InputError, match=r"day\.parquet: no column 'x'; it has user, y, z"):
        encoder.encode(rows_of(z=[1]), where="day.parquet")


WRONG_TYPES = [
    (X, [1], ["a"], "'x' is string, but was a whole number when the encoder was fitted"),
    (X, ["a"], [["a"]], r"'x' is list<.*: a categorical needs whole numbers or text"),
    (X, ["a"], [b"\xff"], "'x' is binary"),
    (Numeric(name="x"), [1.0], ["a"], "'x' is string, not a number"),
    (Numeric(name="x"), [1.0], [datetime.datetime(2024, 1, 1)], "'x' is timestamp.*, not a number"),
    (MultiCategorical(name="x"), [["a"]], ["a|b"], "'x' is string, not a list: set its `separator`"),
    (MultiCategorical(name="x"), [["a"]], [1], "'x' is int64, not a list"),
]


@pytest.mark.parametrize(("feature", "fitted", "encoded", "words"), WRONG_TYPES)
def test_a_column_of_the_wrong_type_is_refused(feature, fitted, encoded, words):
    encoder = Encoder.fit(schema_of(feature), [rows_of(x=fitted)])
    with pytest.raises(InputError, match=words):
        encoder.encode(rows_of(x=encoded))


@pytest.mark.parametrize(
    "feature", [Categorical(name="x", vocabulary="hash"), Cross(name="c", of=("x", "user"))], ids=["hash", "cross"]
)
def test_lists_are_not_hashed(feature):
    encoder = Encoder.fit(schema_of(feature), [])
    with pytest.raises(InputError, match=r"'x' is list<"):
        encoder.encode(rows_of(x=[["a"]]))


@pytest.mark.parametrize(("feature", "fitted", "encoded", "words"), WRONG_TYPES[1:])
def test_a_column_of_the_wrong_type_is_refused_in_fitting(feature, fitted, encoded, words):
    with pytest.raises(InputError, match=words):
        Encoder.fit(schema_of(feature), [rows_of(x=encoded)])


def test_a_column_of_the_wrong_type_is_named_with_its_file():
    encoder = Encoder.fit(schema_of(), [rows_of(x=[1])])
    with pytest.raises(InputError, match=r"day\.parquet"):
        encoder.encode(rows_of(x=["a"]), where="day.parquet")


# -- a row is the same wherever it comes from

EVERYTHING = Schema(
    groups=(
        Group(
            name="user",
            side="user",
            features=(
                Categorical(name="user"),
                Categorical(name="city", vocabulary="hash", buckets=11),
                Numeric(name="age", buckets=3),
                Numeric(name="income", encoding="linear"),
                MultiCategorical(name="tags"),
                Sequence(
                    name="past", fields=(SequenceField(of="item"), SequenceField(of="city")), time=True, max_len=2
                ),
            ),
        ),
        Group(
            name="item",
            side="item",
            features=(
                Categorical(name="item"),
                Categorical(name="flag"),
                MultiCategorical(name="words", separator=" ", vocabulary="hash", buckets=7, max_len=2, pooling="sum"),
                Numeric(name="price", encoding="linear", log=False),
                Cross(name="cross", of=("city", "item"), buckets=13),
            ),
        ),
    ),
    tasks=(Task(name="y", weight="weight"), Task(name="z", mask="flag_z")),
    user="user",
)
ARROW = pa.schema(
    {
        "user": pa.string(),
        "city": pa.string(),
        "age": pa.float64(),
        "income": pa.float64(),
        "tags": pa.list_(pa.int64()),
        "past_item": pa.list_(pa.int64()),
        "past_city": pa.list_(pa.string()),
        "past_time": pa.list_(pa.float64()),
        "item": pa.int64(),
        "flag": pa.bool_(),
        "words": pa.string(),
        "price": pa.float64(),
        "y": pa.int64(),
        "weight": pa.float64(),
        "z": pa.bool_(),
        "flag_z": pa.int8(),
    }
)


def maybe(strategy: st.SearchStrategy) -> st.SearchStrategy:
    return st.one_of(st.none(), strategy)


items, cities = st.integers(0, 4), st.sampled_from(["x", "y", ""])
events = st.lists(st.tuples(maybe(items), maybe(cities), st.integers(0, 9).map(float)), max_size=3).map(
    lambda past: sorted(past, key=lambda event: event[2])
)
raw_rows = st.fixed_dictionaries(
    {
        "user": maybe(st.sampled_from(["a", "b"])),
        "city": maybe(cities),
        "age": maybe(st.sampled_from([1.0, 2.5, math.nan, math.inf])),
        "income": maybe(st.sampled_from([1.0, -20.0, math.nan])),
        "tags": maybe(st.lists(maybe(st.integers(0, 3)), max_size=2)),
        "past": maybe(events),
        "item": maybe(items),
        "flag": maybe(st.booleans()),
        "words": maybe(st.sampled_from(["", "p", "p q", "q p p"])),
        "price": maybe(st.floats(-10, 10)),
        "y": maybe(st.integers(0, 1)),
        "weight": st.sampled_from([0.0, 0.5, 1.0]),
        "z": st.booleans(),
        "flag_z": st.integers(0, 1),
    }
).map(
    lambda row: {
        **{name: value for name, value in row.items() if name != "past"},
        **{
            f"past_{field}": None if row["past"] is None else [event[i] for event in row["past"]]
            for i, field in enumerate(("item", "city", "time"))
        },
    }
)


def everything(rows: list[dict]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist(rows, schema=ARROW)


FITTED = Encoder.fit(
    EVERYTHING,
    [everything([{"user": u, "age": float(n), "income": n, "tags": [n], "item": n, "flag": n % 2 == 0, "price": n}
                 for u in ("a", "b") for n in range(4)])],
)  # fmt: skip


def bits(values: torch.Tensor) -> list:
    """Exact, and NaN equal to NaN."""
    return values.view(torch.int32).tolist() if values.dtype == torch.float32 else values.tolist()


def meaning(batch: Batch) -> list[tuple]:
    """What each row of a batch is, its user's side included."""
    sides = []
    for rows in (batch.user.take(batch.user_of_row), batch.items):
        lists = [as_lists(rows, name) for name in rows.lists]
        times = [as_lists(Rows(rows.side, rows.ids, rows.numbers, rows.times, {}), name) for name in rows.times]
        sides += [rows.ids.tolist(), bits(rows.numbers), *lists, *times]
    return list(zip(*sides, bits(batch.labels), bits(batch.weights), batch.users.tolist(), strict=True))


@given(st.lists(raw_rows, min_size=1, max_size=8), st.data())
@settings(deadline=None, max_examples=60)
def test_a_row_is_the_same_in_any_company(rows, data):
    whole = everything(rows)
    expected = meaning(FITTED.encode(whole))
    cut = data.draw(st.integers(0, len(rows)))
    pieces = [FITTED.encode(piece) for piece in (whole.slice(0, cut), whole.slice(cut))]
    assert meaning(pieces[0]) + meaning(pieces[1]) == expected
    assert meaning(Batch.cat(pieces)) == expected
    assert meaning(FITTED.encode(everything(rows[cut:]))) == expected[cut:]
    alone = data.draw(st.integers(0, len(rows) - 1))
    # as a request comes: Python values, types as Arrow guesses them, null where nothing is known
    assert meaning(FITTED.encode(pa.RecordBatch.from_pylist([rows[alone]]))) == [expected[alone]]
    packed = [
        column.dictionary_encode() if pa.types.is_string(column.type) or pa.types.is_integer(column.type) else column
        for column in whole.columns
    ]
    assert meaning(FITTED.encode(pa.RecordBatch.from_arrays(packed, whole.schema.names))) == expected
    order = data.draw(st.permutations(range(len(rows))))
    taken = FITTED.encode(whole).take(torch.tensor(order))
    assert meaning(taken) == [expected[i] for i in order]


@given(st.lists(raw_rows, min_size=1, max_size=8))
@settings(deadline=None, max_examples=60)
def test_users_are_shared_where_all_of_their_side_is_equal(rows):
    batch = FITTED.encode(everything(rows))
    single = [FITTED.encode(everything([row])) for row in rows]
    # the item side and the labels made equal, so that only the user side is compared
    sides = [meaning(Batch(one.user, single[0].items, *(getattr(single[0], f) for f in
                     ("user_of_row", "labels", "weights", "users", "index")))) for one in single]  # fmt: skip
    for i, side in enumerate(sides):
        assert batch.user_of_row[i] == batch.user_of_row[sides.index(side)]
        for j in range(i):
            assert (batch.user_of_row[i] == batch.user_of_row[j]) == (side == sides[j])
    firsts = [batch.user_of_row.tolist().index(user) for user in range(len(batch.user))]
    assert firsts == sorted(firsts)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"tags": [1, 2]}, {"tags": [2, 1]}),
        ({"past_item": [1, 2]}, {"past_item": [2, 1]}),
        ({"past_time": [1.0, 2.0]}, {"past_time": [1.0, 3.0]}),
        ({"income": 1.0}, {"income": 1.0001}),
        ({"income": None}, {"income": 0.0}),
        ({"tags": [1, 1]}, {"tags": [1]}),
    ],
)
def test_users_with_any_difference_are_apart(one, other):
    same = {"user": "a", "income": 3.0, "past_item": [1, 1], "past_city": ["x", "x"], "past_time": [0.0, 0.0]}
    batch = FITTED.encode(everything([{**same, **one}, {**same, **other}, {**same, **one}]))
    assert batch.user_of_row.tolist() == [0, 1, 0]


@given(st.lists(raw_rows, min_size=1, max_size=8), st.integers(0, 8))
@settings(deadline=None, max_examples=40)
def test_fitting_in_pieces_is_fitting_at_once(rows, cut):
    whole = everything(rows)
    once = Encoder.fit(EVERYTHING, [whole])
    pieces = Encoder.fit(EVERYTHING, [whole.slice(0, cut), whole.slice(cut)])
    for name, vocabulary in once.vocabularies.items():
        assert vocabulary.values.equals(pieces.vocabularies[name].values)
    for name, fit in once.numerics.items():
        assert fit.edges == pieces.numerics[name].edges
        assert (fit.mean, fit.std) == pytest.approx((pieces.numerics[name].mean, pieces.numerics[name].std))


def test_fractions_in_a_later_piece():
    pieces = [[1.0, 2.0], [2.5, 1.0]]
    fitted = [Encoder.fit(schema_of(), [rows_of(x=piece) for piece in order]) for order in (pieces, pieces[::-1])]
    for encoder in fitted:
        assert encoder.encode(rows_of(x=[3.5])).items.ids.item() == UNKNOWN
        found = encoder.encode(rows_of(x=[1.0, 2.0, 2.5])).items.ids[:, 0].tolist()
        assert UNKNOWN not in found and found == fitted[0].encode(rows_of(x=[1.0, 2.0, 2.5])).items.ids[:, 0].tolist()
    whole = Encoder.fit(schema_of(), [rows_of(x=[1.0, 2.0])])  # ids that stay: a fraction was never among them
    assert whole.grown([rows_of(x=[2.5])]).encode(rows_of(x=[2.5])).items.ids.item() == UNKNOWN


def test_no_rows():
    batch = FITTED.encode(everything([]))
    assert len(batch) == len(batch.user) == 0 and batch.items.ids.shape == (0, 3)
    rows = everything([{"user": "a", "item": 1}])
    assert meaning(Batch.cat([batch, FITTED.encode(rows), batch])) == meaning(FITTED.encode(rows))


# -- kept


@given(st.lists(raw_rows, min_size=1, max_size=6), st.lists(raw_rows, min_size=1, max_size=6))
@settings(deadline=None, max_examples=15)
def test_an_encoder_read_back_is_the_same(tmp_path_factory, fitted, rows):
    folder: Path = tmp_path_factory.mktemp("encoder")
    encoder = Encoder.fit(EVERYTHING, [everything(fitted)])
    encoder.save(folder)
    back = Encoder.load(folder)
    assert back.same_as(encoder) and back.layout == encoder.layout
    assert meaning(back.encode(everything(rows))) == meaning(encoder.encode(everything(rows)))


def test_a_huge_number_does_not_spoil_the_encoder_file(tmp_path):
    encoder = Encoder.fit(schema_of(Numeric(name="x")), [rows_of(x=[1.0, 1e300, 2.0])])
    encoder.save(tmp_path)
    assert Encoder.load(tmp_path).same_as(encoder)


def test_encoders_of_other_values_are_not_the_same():
    first, same, other = (Encoder.fit(schema_of(), [rows_of(x=x)]) for x in (["a"], ["a"], ["b"]))
    assert first.same_as(same) and not first.same_as(other)


def test_a_broken_encoder_file_is_named(tmp_path):
    FITTED.save(tmp_path)
    (tmp_path / "encoder.json").write_text("{")
    with pytest.raises(InputError, match=r"encoder\.json: not JSON"):
        Encoder.load(tmp_path)


def test_a_copy_of_a_schema_works_its_features_out_anew():
    assert WITH_ACTIONS.sequences is WITH_ACTIONS.sequences
    less = WITH_ACTIONS.model_copy(update={"groups": WITH_ACTIONS.groups[:1]})
    assert less.features == WITH_ACTIONS.groups[0].features != WITH_ACTIONS.features

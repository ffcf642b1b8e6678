"""Retrieval against a sort of all scores: order, ties, filters, blocks; faiss against exact; the popular items."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from benchmarks.serving_world import NOW, make, sequence_schema
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.inference import retrieval
from scalerec.inference.bundle import load
from scalerec.inference.engine import Ask, Engine
from scalerec.inference.retrieval import Popular, Retriever
from scalerec.models.two_tower import TwoTowerConfig
from scalerec.schema import Categorical, Group, Schema
from scalerec.serving.store import open_store


def bundle(
    vectors: torch.Tensor, names: list[Any] | None = None, order: list[int] | None = None, extra: int = 0
) -> Any:
    """A bundle of items 100, 101, ... with these vectors, in `order` of popularity; `extra` items without a vector."""
    count = len(vectors)
    names = list(range(100, 100 + count)) if names is None else names
    schema = Schema(
        groups=(
            Group(name="user", side="user", features=(Categorical(name="user"),)),
            Group(name="item", side="item", features=(Categorical(name="thing", column="item"),)),
        ),
        tasks=(), user="user", item="item", dim=4,
    )  # fmt: skip
    rows = pa.RecordBatch.from_pydict({"user": ["a"] * count, "item": names})
    encoder = Encoder.fit(schema, [rows])
    table = [names[place] for place in order or range(count)]
    table += [-value if isinstance(value, int) else value + "!" for value in names[:extra]]
    items = pa.table({"item": table, "popularity": list(range(len(table), 0, -1))})
    model = SimpleNamespace(retrieves=True, item_table=SimpleNamespace(name="thing"))
    return SimpleNamespace(name="toy", vectors=vectors, encoder=encoder, items=items, model=model)


def unit(count: int, dim: int, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def few_scores(count: int, seed: int) -> torch.Tensor:
    """Unit vectors along axes: every score is 0, 1 or -1 exactly, so that ties are everywhere."""
    random = np.random.default_rng(seed)
    vectors = torch.zeros(count, 4)
    vectors[torch.arange(count), torch.from_numpy(random.integers(0, 4, count))] = 1.0
    return vectors * torch.from_numpy(random.choice([-1.0, 1.0], (count, 1))).float()


def expected(scores, order, count, exclude, allow, deny) -> list[tuple[int, float]]:
    """By a stable sort of everything."""
    left = [i for i in order if i not in exclude and i not in deny and (allow is None or i in allow)]
    return [(i, scores[i]) for i in sorted(left, key=lambda i: -scores[i])[:count]]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equal_to_a_stable_sort_of_everything_whatever_the_blocks_and_filters(data: Any):
    count = data.draw(st.integers(1, 60))
    vectors = few_scores(count, data.draw(st.integers(0, 9)))
    order = data.draw(st.permutations(range(count)))
    queries = few_scores(data.draw(st.integers(1, 5)), 77)
    ids = st.sets(st.integers(90, 100 + count + 10))
    exclude = [data.draw(ids) for _ in queries]
    allow = data.draw(st.none() | ids)
    deny = data.draw(ids)
    k = data.draw(st.integers(0, count + 5))
    piece, retrieval.PIECE = retrieval.PIECE, data.draw(st.sampled_from([1, 7, 40, 1000]))
    try:
        found = Retriever(bundle(vectors, order=order)).search(queries, k, exclude=exclude, allow=allow, deny=deny)
    finally:
        retrieval.PIECE = piece
    for row, (its, scores) in enumerate(zip(found, (queries @ vectors.T).tolist())):
        by_id = {100 + i: score for i, score in enumerate(scores)}
        assert list(its) == expected(by_id, [100 + i for i in order], k, exclude[row], allow, deny)
        everything = set(by_id)
        seen, denied = exclude[row] & everything, (deny & everything) - exclude[row]
        removed = {"seen": len(seen), "deny": len(denied)}
        if allow is not None:
            removed["allow"] = len(everything - allow - seen - denied)
        assert its.removed == removed
        assert its.unknown == sum(len(given - everything) for given in (exclude[row], deny, allow or set()))


def test_many_queries_equal_one_at_a_time_and_cosines_are_right():
    vectors, queries = unit(500, 16), unit(150, 16, 1)
    retriever = Retriever(bundle(vectors))
    found = retriever.search(3 * queries, 20)  # the length of a query does not matter
    scores = (queries @ vectors.T).numpy()
    for row in range(150):
        best = np.argsort(-scores[row], kind="stable")[:20]
        assert [value for value, _ in found[row]] == (100 + best).tolist()
        np.testing.assert_allclose([score for _, score in found[row]], scores[row][best], atol=1e-6)
        assert [value for value, _ in retriever.search(queries[row : row + 1], 20)[0]] == (100 + best).tolist()
    assert retriever.recall(queries) == 1.0


def test_a_hundred_thousand_excluded_ids():
    vectors = unit(150_000, 8)
    retriever = Retriever(bundle(vectors))
    query = unit(1, 8, 5)
    everything = [value for value, _ in retriever.search(query, 150_000)[0]]
    assert len(everything) == 150_000
    gone = set(everything[:100_000])
    (found,) = retriever.search(query, 500, exclude=[gone])
    assert [value for value, _ in found] == everything[100_000:100_500]
    assert found.removed == {"seen": 100_000, "deny": 0}
    (found,) = retriever.search(query, 500, deny=gone, allow=set(everything[99_990:100_010]))
    assert [value for value, _ in found] == everything[100_000:100_010]
    assert found.removed == {"seen": 0, "deny": 100_000, "allow": 49_990}


def test_items_without_a_vector_are_never_found_and_nobody_is_found_twice():
    retriever = Retriever(bundle(unit(30, 4), extra=5))
    (found,) = retriever.search(unit(1, 4, 3), 100)
    assert sorted(value for value, _ in found) == list(range(100, 130))
    (found,) = retriever.search(unit(1, 4, 3), 100, exclude=[{-100}])  # without a vector, but in the catalogue
    assert found.unknown == 0


def test_text_ids_and_ids_of_the_wrong_kind():
    names = [f"i{i}" for i in range(9)]
    retriever = Retriever(bundle(unit(9, 4), names=names))
    (found,) = retriever.search(unit(1, 4, 3), 3, exclude=[["i0", 5, None, "i0"]])
    assert "i0" not in dict(found) and found.unknown == 2 and found.removed["seen"] == 1
    with pytest.raises(InputError, match="deny: holds a list"):
        retriever.search(unit(1, 4, 3), 3, deny=[["i0"]])


@pytest.mark.parametrize(
    ("queries", "message"),
    [(torch.ones(2, 5), "width 4"), (torch.ones(4), "width 4"), (torch.full((1, 4), torch.nan), "diverged")],
)
def test_queries_that_do_not_fit(queries, message):
    with pytest.raises(InputError, match=message):
        Retriever(bundle(unit(9, 4))).search(queries, 3)


def test_what_does_not_retrieve_says_so():
    wrong = bundle(unit(9, 4))
    wrong.vectors = None
    with pytest.raises(InputError, match="does not retrieve"):
        Retriever(wrong)
    with pytest.raises(InputError, match="diverged"):
        Retriever(bundle(torch.full((9, 4), torch.nan)))
    with pytest.raises(InputError, match="exact or faiss"):
        Retriever(bundle(unit(9, 4)), "annoy")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="2 lists of excluded items for 1"):
        Retriever(bundle(unit(9, 4))).search(unit(1, 4), 3, exclude=[[], []])
    assert Retriever(bundle(unit(9, 4))).search(torch.zeros(0, 4), 3) == []


def test_faiss_reaches_its_recall_and_keeps_to_the_filters():
    pytest.importorskip("faiss")
    vectors, queries = unit(4000, 16), unit(40, 16, 1)
    toy = bundle(vectors, extra=3)
    exact, approximate = Retriever(toy), Retriever(toy, "faiss")
    assert approximate.recall(queries) >= 0.95
    found, right = approximate.search(queries, 10), exact.search(queries, 10)
    for mine, theirs in zip(found, right):
        scores = dict(theirs)
        for value, score in mine:
            assert score == pytest.approx(scores.get(value, score), abs=1e-5)
    gone = [[value for value, _ in its] for its in exact.search(queries, 50)]
    for its, mine in zip(gone, approximate.search(queries, 10, exclude=gone, deny=[105])):
        assert len(mine) == 10 and not {105, *its} & dict(mine).keys() and mine.removed["seen"] == 50
    few = list(range(100, 120))  # too few in the lists looked at: exact then
    for mine, theirs in zip(approximate.search(queries[:2], 30, allow=few), exact.search(queries[:2], 30, allow=few)):
        assert list(dict(mine)) == list(dict(theirs)) and len(mine) == 20


def test_without_faiss_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install -e '.\[faiss\]'"):
        Retriever(bundle(unit(9, 4)), "faiss")


def test_popular_items_in_order_with_the_same_filters():
    popular = Popular(pa.table({"item": ["a", "b", "c", "d"], "popularity": [9, 7, 7, 1]}), "item")
    assert popular.search(2) == [("a", 9.0), ("b", 7.0)]
    found = popular.search(9, exclude=["a", "z"], deny=["c", "a"], allow=["a", "b", "c"])
    assert found == [("b", 7.0)] and found.removed == {"seen": 1, "deny": 1, "allow": 1} and found.unknown == 1
    assert popular.search(0) == [] and popular.search(-1) == []


def test_a_bundle_finds_what_its_model_would(tmp_path):
    """Whole: a model with random weights, exported; its queries against the catalogue that evaluation ranks."""
    world = make(
        tmp_path / "world", "two", TwoTowerConfig(dim=8, hidden=(16,)), sequence_schema(20, 8), [5, 12, 9] * 4, 40
    )
    loaded = load(world.bundle)
    engine, retriever = Engine(loaded), Retriever(loaded)
    store = open_store(world.state, world.schema)
    asks = [Ask(user, {}, store.history(user), (), (), NOW) for user in (1, 2, 3)]
    seen = [store.seen(user) for user in (1, 2, 3)]
    store.close()
    queries = engine.queries(asks)
    with torch.inference_mode():
        scores = queries @ loaded.model.catalogue().T
    values = loaded.encoder.vocabularies["item"].values.to_pylist()
    everything = set(loaded.items["item"].to_pylist())
    for row, found in enumerate(retriever.search(queries, 7, exclude=seen)):
        order = [values[i] for i in (-scores[row]).argsort(stable=True).tolist()]
        assert [item for item, _ in found] == [i for i in order if i in everything and i not in seen[row]][:7]
        assert found.removed["seen"] == len(everything & set(seen[row]))

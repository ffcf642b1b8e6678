"""The engine: a request has the scores that training code gives to its whole rows, however they are put together."""

from __future__ import annotations

from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from scalerec.errors import InputError
from scalerec.inference.catalogue import Catalogue
from scalerec.inference.engine import Ask, Engine
from scalerec.models import dcnv2, dlrm_mlp, hstu, rankmixer, sasrec
from tests.contract.world import ITEMS, SCHEMA, USERS, make_world, row

MODELS = {module.__name__.rsplit(".", 1)[1]: module.tiny() for module in (rankmixer, dcnv2, dlrm_mlp, hstu)}
OF_ITEM = ("item", "author", "words", "price")  # `views` belongs to the moment
HISTORY = {"seen": ("seen_item", "seen_author", "seen_time", "seen_click"), "visited": ("visited_city",)}


@pytest.fixture(scope="module")
def world():
    return make_world()


def items() -> pa.Table:
    """One row an item, in no order."""
    found = {}
    for number in range(8):
        for user in range(USERS):
            logged = row(user, number)
            found[logged["item"]] = {name: logged[name] for name in OF_ITEM}
    assert len(found) == ITEMS
    return pa.Table.from_pylist([found[item] for item in sorted(found, key=lambda item: item * 7 % ITEMS)])


def engine_of(world, config, **options: Any) -> Engine:
    torch.manual_seed(0)
    model = config.build(world.encoder.layout).eval()
    with torch.no_grad():  # rows of unknown and missing values start at zero: here they shall differ
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    bundle = SimpleNamespace(
        name="b", version="v", precision="fp32", encoder=world.encoder, layout=world.encoder.layout, model=model,
        items=items(), context={"views": 7}, fusion={"click": 1.0, "buy": 0.5}, vectors=None,
    )  # fmt: skip
    return Engine(bundle, **options)  # type: ignore[arg-type]


def asked(user: int, candidates: list[Any], **more: Any) -> Ask:
    logged = row(user, 0)
    state = {}
    for name, columns in HISTORY.items():
        lists = [logged[column] or [] for column in columns]
        state[name] = tuple(zip(*lists))
    columns = {name: logged[name] for name in ("city", "age", "income", "interests")} | more.pop("columns", {})
    return Ask(logged["user"], columns, state, candidates, now=logged["time"], **more)


def by_training(engine: Engine, ask: Ask, rows: list[dict[str, Any]]) -> np.ndarray:
    """Probabilities of rows as a log would hold them, by `Encoder.encode` and the whole model."""
    batch = engine.bundle.encoder.encode(pa.RecordBatch.from_pylist(rows), labels=False)
    with torch.inference_mode():
        return torch.sigmoid(engine.bundle.model(batch).logits).numpy()


def logged(ask: Ask, user: int, views: Any = 7) -> list[dict[str, Any]]:
    table = {found["item"]: found for found in items().to_pylist()}
    of_user = {name: value for name, value in row(user, 0).items() if name not in (*OF_ITEM, "views")} | dict(
        ask.columns
    )
    empty = dict.fromkeys(OF_ITEM)
    rows = [{**empty, **of_user, "views": views, **table.get(item, {}), "item": item} for item in ask.candidates]
    return [{**logged, **own} for logged, own in zip(rows, ask.own)] if ask.own else rows


@pytest.mark.parametrize("kind", MODELS)
def test_scores_are_those_of_training(world, kind):
    engine = engine_of(world, MODELS[kind])
    for user in range(USERS):
        ask = asked(user, list(range(ITEMS)))
        found = engine.rank([ask])[0].scores
        np.testing.assert_allclose(found, by_training(engine, ask, logged(ask, user)), atol=2e-6)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("share", [True, False])
def test_requests_together_are_as_each_alone(world, kind, share):
    engine = engine_of(world, MODELS[kind], share=share)
    asks = [asked(user, [user % ITEMS, 3, 3][: 1 + user % 3]) for user in range(6)]
    together = engine.rank(asks)
    for ask, ranked in zip(asks, together):
        np.testing.assert_allclose(ranked.scores, engine.rank([ask])[0].scores, atol=2e-6)
        assert set(ranked.milliseconds) == {"features", "user", "candidates"}


@pytest.mark.parametrize("kind", MODELS)
def test_unknown_items_and_columns_of_the_request(world, kind):
    engine = engine_of(world, MODELS[kind])
    for ask, views in (
        (asked(1, [5, 99, 2]), 7),  # an item nobody knows
        (asked(2, [5, 2], own=[{"price": 3.5}, {"views": 100}]), 7),  # columns of the item, and of the moment, for one
        (asked(3, [1, 4, 6], columns={"views": 300}), 300),  # a context for all
        (asked(4, [1, 99], columns={"city": "nowhere", "views": None}), None),  # an unknown city crosses with authors
        (asked(5, [7], columns={"age": None, "interests": None}), 7),
    ):
        found = engine.rank([ask])[0].scores
        np.testing.assert_allclose(found, by_training(engine, ask, logged(ask, int(ask.user[1:]), views)), atol=2e-6)


@pytest.mark.parametrize("price", [12.5, 12, 12.345])
def test_numbers_of_a_request_go_beside_decimals_of_the_log(world, price):
    engine = engine_of(world, MODELS["rankmixer"])
    ask = asked(2, [99, 5, 6], own=[{"price": price}, {}, {"price": None}])
    table = engine.catalogue.table
    prices = table["price"].cast(pa.decimal128(6, 2))
    rounded = table.set_column(table.column_names.index("price"), "price", prices.cast(pa.float64()))
    engine.catalogue = Catalogue(engine.bundle.encoder, rounded)
    expected = engine.rank([ask])[0].scores
    decimals = rounded.set_column(table.column_names.index("price"), "price", prices)
    engine.catalogue = Catalogue(engine.bundle.encoder, decimals)
    np.testing.assert_allclose(engine.rank([ask])[0].scores, expected, atol=2e-6)
    found = engine.raw([ask])["price"].to_pylist()
    assert float(found[0]) == price and found[2] is None
    if price == 12.5:  # as the log writes it: where a price is a category, it is its text
        assert str(found[0]) == "12.50" and isinstance(found[1], Decimal)
    with pytest.raises(InputError, match="price"):
        engine.rank([ask._replace(own=[{"price": "dear"}, {}, {}])])


def test_raw_rows_are_those_of_a_log(world):
    engine = engine_of(world, MODELS["rankmixer"])
    ask = asked(3, [1, 99, 4], own=[{}, {"price": 2.5}, {}])
    raw = engine.raw([ask])
    assert set(raw.schema.names) == set(SCHEMA.input_columns())
    expected = logged(ask, 3)
    for found, wanted in zip(raw.to_pylist(), expected):
        assert {name: found[name] for name in found} == {
            name: wanted[name] if wanted[name] is not None or name != "visited_city" else [] for name in found
        }
    np.testing.assert_allclose(by_training(engine, ask, raw.to_pylist()), engine.rank([ask])[0].scores, atol=2e-6)


def test_a_grown_history_reuses_the_state(world):
    engine = engine_of(world, MODELS["hstu"])
    ask = asked(3, [1, 2, 3])
    assert [engine.rank([ask])[0].cached for _ in range(2)] == ["misses", "hits"]
    later = ask._replace(history={**ask.history, "seen": (*ask.history["seen"], (4, "a4", 1e9 + 1999, 1))[-4:]})
    again = engine.rank([later])[0]
    np.testing.assert_allclose(again.scores, engine_of(world, MODELS["hstu"]).rank([later])[0].scores, atol=2e-6)
    assert again.cached in ("partial_hits", "recomputed_shifted")


@pytest.mark.parametrize("kind", MODELS)
def test_no_candidates_no_scores(world, kind):
    assert engine_of(world, MODELS[kind]).rank([asked(0, [])])[0].scores.shape == (0, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"own": [{}]}, "columns of 1 for 2"),
        ({"own": [{"price": "dear"}, {}]}, "price"),
        ({"columns": {"age": "old"}}, "age"),
        ({"columns": {"income": 2**70}}, "income"),
        ({"columns": {"city": ["a"]}}, "city"),
        ({"history": {"seen": ((1, "a", 1e9, 1), ("two", "a", 1e9, 1))}}, "seen_item"),
        ({"candidates": [1, "one"]}, "item"),
        ({"candidates": ["one", "two"]}, "item"),
        ({"history": {"seen": ((1, "a", 1e9 + 5, 1), (2, "b", 1e9, 0))}}, "goes back in time"),
        ({"history": {"seen": ((1, "a", 1e9 + 5000, 1),)}}, "later than"),
    ],
)
def test_what_does_not_fit_is_named(world, change, message):
    ask = asked(0, [1, 2])
    if "columns" in change:
        change = {"columns": {**ask.columns, **change["columns"]}}
    with pytest.raises(InputError, match=message):
        engine_of(world, MODELS["rankmixer"]).rank([ask._replace(**change)])


def test_fusion_is_a_product_of_powers(world):
    engine = engine_of(world, MODELS["dcnv2"])
    scores = np.array([[0.5, 0.25], [0.2, 1.0]], np.float32)
    np.testing.assert_allclose(engine.fused(scores), [0.5 * 0.5, 0.2], rtol=1e-6)


@pytest.mark.parametrize("kind", MODELS)
def test_ablations_begin_with_the_whole_and_leave_the_model_alone(world, kind):
    engine = engine_of(world, MODELS[kind])
    ask = asked(3, [1, 2, 3])
    before = engine.rank([ask])[0].scores
    found = engine.ablations(ask)
    np.testing.assert_allclose(found.pop(""), before, atol=2e-6)
    assert len(found) >= 4 and any(np.abs(scores - before).max() > 1e-4 for scores in found.values())
    np.testing.assert_array_equal(engine.rank([ask])[0].scores, before)


def test_leaving_out_an_event_is_a_history_without_it(world):
    engine = engine_of(world, MODELS["hstu"])
    ask = asked(3, [1, 2])
    seen = ask.history["seen"]
    shorter = ask._replace(history={**ask.history, "seen": (*seen[:-2], seen[-1])})
    np.testing.assert_allclose(engine.ablations(ask)["seen[-2]"], engine.rank([shorter])[0].scores, atol=2e-6)


def test_queries_are_unit_vectors_of_models_that_retrieve(world):
    for config in (hstu.tiny(), sasrec.tiny()):
        engine = engine_of(world, config)
        asks = [asked(user, []) for user in range(4)]
        found = engine.queries(asks)
        batch = world.encoder.encode(pa.RecordBatch.from_pylist([row(user, 0) for user in range(4)]))
        expected = engine.bundle.model.queries(batch).detach()
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=0)
    with pytest.raises(InputError, match="does not retrieve"):
        engine_of(world, MODELS["dcnv2"]).queries(asks)

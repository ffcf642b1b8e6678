"""The service over fakes of nothing but the network: answers, refusals that name the field, what it survives."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from scalerec.inference.engine import Ask
from scalerec.serving import answers, exposure
from scalerec.serving.states import States
from scalerec.serving.store import MemoryStore, Remembered, StoreUnavailable
from tests.contract.world import ITEMS, make_world
from tests.unit.serving import NOW, client_of, event, service_of
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture(scope="module")
def shared(world):
    """A service whose tests change nothing."""
    service = service_of(world)
    with client_of(service) as client:
        yield client, service


@pytest.fixture
def fresh(world):
    service = service_of(world)
    with client_of(service) as client:
        yield client, service


def post(client: Any, path: str, body: Any, status: int = 200, **headers: str) -> Any:
    content = body if isinstance(body, (bytes, str)) else json.dumps(body)
    found = client.post(f"/v1/{path}", content=content, headers={"content-type": "application/json", **headers})
    assert found.status_code == status, found.text
    return found.json()


# -- scores


def test_a_ranking_is_the_engine_s_best_first(shared):
    client, service = shared
    candidates = [3, {"id": 5, "price": 2.5}, 99, 7]
    found = post(client, "rank", {"user": "u2", "candidates": candidates, "context": {"views": 30}, "time": NOW})
    answers.Ranked.model_validate(found)
    engine = service.models.by_name["rankmixer"].engine
    ask = Ask("u2", {**service.users[0].row("u2"), "views": 30}, {}, [3, 5, 99, 7], [{}, {"price": 2.5}, {}, {}], NOW)
    scores = engine.rank([ask])[0].scores
    fused = engine.fused(scores)
    assert [item["id"] for item in found["items"]] == [ask.candidates[i] for i in np.argsort(-fused)]
    by_id = {item["id"]: item for item in found["items"]}
    for place, item in enumerate(ask.candidates):
        assert by_id[item]["score"] == pytest.approx(fused[place], abs=1e-6)
        assert by_id[item]["scores"] == pytest.approx(dict(zip(engine.tasks, scores[place])), abs=1e-6)
    assert found["unknown_items"] == [99] and found["cold"] and not found["stale"] and found["time"] == NOW
    assert "views" not in found["defaults"] and found["model"] == "rankmixer" and found["version"] == "v1"
    assert set(found["timing"]) == {"store", "features", "user", "candidates", "total"}


def test_a_user_nobody_knows_is_scored_from_defaults(shared):
    client, _ = shared
    found = post(client, "rank", {"user": "nobody", "candidates": [1, 2]})
    assert found["cold"] and {"age", "city", "views"} <= set(found["defaults"])
    assert post(client, "rank", {"user": "nobody", "candidates": [1], "tasks": ["buy"]})["items"][0][
        "scores"
    ].keys() == {"buy"}


def test_every_answer_is_as_documented(fresh):
    client, _ = fresh
    answers.Appended.model_validate(post(client, "events", {"events": [event(1), event(2)]}))
    answers.Recommended.model_validate(post(client, "recommend", {"user": "u1", "k": 3}))
    found = answers.Explained.model_validate(post(client, "explain", {"user": "u1", "candidates": [1, 2]}))
    assert len(found.effect) == len(found.tokens) > 0 and {len(row) for row in found.effect} == {2}
    for path, record in (
        ("v1/users?prefix=u", answers.Users), ("v1/users/u1", answers.User), ("v1/items/3", answers.ItemRow),
        ("v1/models", answers.Models), ("healthz", answers.Health), ("readyz", answers.Ready),
    ):  # fmt: skip
        found = client.get(f"/{path}")
        assert found.status_code == 200, found.text
        record.model_validate(found.json())
    assert client.get("/v1/users/u1").json()["history"]["seen"][-1] == {
        "item": 2, "author": "a2", "time": NOW + 20, "click": 1,
    }  # fmt: skip
    assert client.get("/v1/users?prefix=u1").json()["users"][0] == "u1"


def test_a_context_may_set_what_is_listed_and_nothing_else(shared):
    client, service = shared
    for model in client.get("/v1/models").json()["models"]:
        assert model["context"] == {"views": 7}
        assert {"views", "age", "city", "income"} <= set(model["context_columns"])
        inputs = service.models.by_name[model["name"]].engine.schema.input_columns()
        for name in {*inputs, *model["context_columns"]}:
            body = {"user": "u1", "candidates": [1], "context": {name: None}, "model": model["name"]}
            post(client, "rank", body, 200 if name in model["context_columns"] else 422)


def test_decimals_are_shown_as_numbers(fresh):
    client, service = fresh
    catalogue = service.models.by_name["rankmixer"].engine.catalogue
    assert catalogue._chunk["price"].type == pa.float64()
    catalogue._chunk["price"] = catalogue._chunk["price"].cast(pa.decimal128(6, 2), safe=False)
    assert client.get("/v1/items/3").json()["columns"]["price"] == float(catalogue.row(3)["price"])


def test_a_history_follows_the_events_and_moves_the_scores(fresh):
    client, _ = fresh
    asked = {"user": "u3", "candidates": list(range(ITEMS)), "time": NOW + 1000, "model": "hstu"}
    before = post(client, "rank", asked)
    assert post(client, "events", {"events": [event(i, "u3") for i in range(4)]}) == {"appended": 4, "repeated": 0}
    assert post(client, "events", {"events": [event(3, "u3"), event(4, "u3")]}) == {"appended": 1, "repeated": 1}
    after = post(client, "rank", asked)
    assert before["cold"] and not after["cold"] and before["bucket"] is None
    scores = [{item["id"]: item["score"] for item in found["items"]} for found in (before, after)]
    assert scores[0] != scores[1]


def test_a_clock_that_went_back_is_served_as_of_the_last_event(fresh):
    client, service = fresh
    post(client, "events", {"events": [event(1, "u3"), event(2, "u3")]})
    asked = {"user": "u3", "candidates": [1, 2, 3]}
    behind = post(client, "rank", {**asked, "time": NOW - 50})
    assert behind["clock_behind"] and behind["time"] == NOW + 20
    after = post(client, "rank", {**asked, "time": NOW + 21})
    assert not after["clock_behind"]
    assert "scalerec_clock_behind_total 1.0" in service.metrics.text().decode()
    # At the moment of the event itself a row of the training log does not know it yet.
    same = post(client, "rank", {**asked, "time": NOW + 20})
    assert not same["clock_behind"] and same["time"] == NOW + 20
    assert {i["id"]: i["score"] for i in same["items"]} != {i["id"]: i["score"] for i in behind["items"]}


def test_recommendations_are_retrieved_filtered_and_ranked(fresh):
    client, service = fresh
    post(client, "events", {"events": [event(i, "u3") for i in range(3)]})
    found = post(client, "recommend", {"user": "u3", "k": 4, "retrieve": 8, "deny": [5, 77]})
    assert found["source"] == "hstu" and len(found["items"]) == 4 and len(found["retrieved"]) == 8
    places = {one["id"]: one for one in found["retrieved"]}
    assert not places.keys() & {0, 1, 2, 5} and [one["place"] for one in found["retrieved"]] == list(range(1, 9))
    likeness = [one["similarity"] for one in found["retrieved"]]
    assert likeness == sorted(likeness, reverse=True) and found["removed"] == {"seen": 3, "deny": 1}
    assert {item["id"] for item in found["items"]} <= places.keys()
    ranked = post(client, "rank", {"user": "u3", "candidates": list(places), "time": found["time"]})
    assert [item["id"] for item in ranked["items"]][:4] == [item["id"] for item in found["items"]]
    assert set(found["timing"]) == {"store", "retrieve", "features", "user", "candidates", "total"}
    few = post(client, "recommend", {"user": "u3", "allow": [1, 4, 6], "filter_seen": False, "k": 9})
    assert {item["id"] for item in few["items"]} == {1, 4, 6} and few["removed"]["allow"] == ITEMS - 3
    none = post(client, "recommend", {"user": "u3", "allow": [1]})
    assert none["items"] == [] and none["retrieved"] == []
    assert service.models.by_name["hstu"].in_flight == 0


def test_a_cold_user_gets_what_is_popular(shared):
    client, _ = shared
    found = post(client, "recommend", {"user": "new", "k": 2, "retrieve": 3})
    assert found["source"] == "popularity" and found["cold"]
    assert [one["id"] for one in found["retrieved"]] == [ITEMS - 1, ITEMS - 2, ITEMS - 3]
    assert post(client, "recommend", {"user": "u2", "retriever": "popularity"})["source"] == "popularity"


# -- refusals


RANK, EVENTS, RECOMMEND = "rank", "events", "recommend"
BAD = [
    (RANK, b"{", 400, "body"),
    (RANK, b"", 400, "body"),
    (RANK, b'"\xff"', 400, "body"),
    (RANK, b'{"user": "\\ud800", "candidates": [1]}', 400, "body"),
    (RANK, b"[" * 100_000, 400, "body"),
    (RANK, [], 422, "body"),
    (RANK, {"candidates": [1]}, 422, "user"),
    (RANK, {"user": None, "candidates": [1]}, 422, "user"),
    (RANK, {"user": True, "candidates": [1]}, 422, "user"),
    (RANK, {"user": 7, "candidates": [1]}, 422, "user"),
    (RANK, {"user": "x" * 257, "candidates": [1]}, 422, "user"),
    (RANK, {"user": "u1", "candidates": []}, 422, "candidates"),
    (RANK, {"user": "u1", "candidates": list(range(100_000))}, 422, "candidates"),
    (RANK, {"user": "u1", "candidates": list(range(5_000))}, 422, "candidates"),
    (RANK, {"user": "u1", "candidates": "all"}, 422, "candidates"),
    (RANK, {"user": "u1", "candidates": [1, 2.5]}, 422, "candidates[1]"),
    (RANK, {"user": "u1", "candidates": [1, "2"]}, 422, "candidates[1]"),
    (RANK, {"user": "u1", "candidates": [1, 2**63]}, 422, "candidates[1]"),
    (RANK, {"user": "u1", "candidates": [{"price": 1}]}, 422, "candidates[0].id"),
    (RANK, {"user": "u1", "candidates": [1, {"id": 2, "price": "dear"}]}, 422, "candidates[1].price"),
    (RANK, {"user": "u1", "candidates": [{"id": 2, "prize": 1}]}, 422, "candidates[0].prize"),
    (RANK, {"user": "u1", "candidates": [{"id": 2, "age": 31}]}, 422, "candidates[0].age"),
    (RANK, {"user": "u1", "candidates": [1], "context": {"views": "many"}}, 422, "context.views"),
    (RANK, {"user": "u1", "candidates": [1], "context": {"views": True}}, 422, "context.views"),
    (RANK, {"user": "u1", "candidates": [1], "context": {"seen_item": [1]}}, 422, "context.seen_item"),
    (RANK, {"user": "u1", "candidates": [1], "context": {"price": 3.0}}, 422, "context.price"),
    (RANK, {"user": "u1", "candidates": [1], "context": {"user": "u2"}}, 422, "context.user"),
    (RANK, {"user": "u1", "candidates": [1], "context": {"age": [1]}}, 422, "context.age"),
    (RANK, {"user": "u1", "candidates": [1], "context": {"interests": [1, "i2"]}}, 422, "context.interests"),
    (RANK, {"user": "u1", "candidates": [1], "context": {"age": {"a": 1}}}, 422, "context.age"),
    (RANK, b'{"user": "u1", "candidates": [1], "context": {"age": NaN}}', 422, "context.age"),
    (RANK, b'{"user": "u1", "candidates": [1], "context": {"age": 1e999}}', 422, "context.age"),
    (RANK, b'{"user": "u1", "candidates": [1], "time": NaN}', 422, "time"),
    (RANK, {"user": "u1", "candidates": [1], "time": 10**30}, 422, "time"),
    (RANK, {"user": "u1", "candidates": [1], "time": "2024-01-31T12:00:00Z"}, 422, "time"),
    (RANK, {"user": "u1", "candidates": [1], "time": "yesterday"}, 422, "time"),
    (RANK, {"user": "u1", "candidates": [1], "model": "gpt"}, 422, "model"),
    (RANK, {"user": "u1", "candidates": [1], "tasks": ["click", "like"]}, 422, "tasks[1]"),
    (RANK, {"user": "u1", "candidates": [1], "more": 1}, 422, "more"),
    (RECOMMEND, {"user": "u1", "k": 0}, 422, "k"),
    (RECOMMEND, {"user": "u1", "k": "3"}, 422, "k"),
    (RECOMMEND, {"user": "u1", "retrieve": 5_000}, 422, "retrieve"),
    (RECOMMEND, {"user": "u1", "deny": [1, "a"]}, 422, "deny[1]"),
    (RECOMMEND, {"user": "u1", "retriever": "rankmixer"}, 422, "retriever"),
    (EVENTS, {"events": []}, 422, "events"),
    (EVENTS, {"events": [event(1)] * 1_001}, 422, "events"),
    (EVENTS, {"events": [event(1), event(2, event_id=3)]}, 422, "events[1].event_id"),
    (EVENTS, {"events": [event(1), event(2, user=3)]}, 422, "events[1].user"),
    (EVENTS, {"events": [event(1), event(2, item="three")]}, 422, "events[1].item"),
    (EVENTS, {"events": [event(1), event(2, item=None)]}, 422, "events[1].item"),
    (EVENTS, {"events": [event(1), event(2, click=2)]}, 422, "events[1].click"),
    (EVENTS, {"events": [event(1), event(2, colour="red")]}, 422, "events[1].colour"),
    (EVENTS, {"events": [event(1), event(2, city=["c1"])]}, 422, "events[1].city"),
    (EVENTS, {"events": [event(1), event(2, time=time.time() * 1000)]}, 422, "events[1].time"),
    (EVENTS, {"events": [event(1), {k: v for k, v in event(2).items() if k != "time"}]}, 422, "events[1].time"),
    (EVENTS, {"events": [event(1), {k: v for k, v in event(2).items() if k != "click"}]}, 422, "events[1].click"),
]


@pytest.mark.parametrize(("path", "body", "status", "field"), BAD, ids=[f"{i}-{b[3]}" for i, b in enumerate(BAD)])
def test_what_is_wrong_is_named(shared, path, body, status, field):
    client, service = shared
    found = post(client, path, body, status)
    assert found["field"] == field and len(found["error"]) < 600
    assert service.states.kept[0].store.count() == 0  # of events none was written, the right ones neither


def test_other_refusals(shared):
    client, _ = shared
    json_type = {"content-type": "application/json"}
    big = b'{"user": "' + b"x" * (10 << 20) + b'"}'
    assert client.post("/v1/rank", content=big, headers=json_type).status_code == 413
    pieces = (big[first : first + 65_536] for first in range(0, len(big), 65_536))  # of a length that nobody says
    assert client.post("/v1/rank", content=pieces, headers=json_type).status_code == 413
    assert client.post("/v1/rank", content=b"{}", headers={"content-type": "text/plain"}).status_code == 415
    assert client.get("/v1/rank").status_code == 405
    assert client.get("/v1/none").json()["error"]
    assert client.get("/v1/items/77").status_code == 404
    assert client.get("/v1/items/%00%ff").status_code == 404
    assert client.get("/v1/users/nobody").status_code == 404
    assert client.get("/v1/users?limit=0").json()["field"] == "limit"
    assert client.get("/page/../app.py").status_code == 404 and client.get("/page/..%2fapp.py").status_code == 404
    assert client.get("/docs").status_code == 404


def test_pages_of_other_sites_are_kept_out(shared):
    client, _ = shared
    assert client.get("/v1/models", headers={"host": "evil.example:8000"}).status_code == 421
    assert client.get("/v1/models", headers={"host": "127.0.0.1.evil.example"}).status_code == 421
    assert client.get("/v1/models", headers={"host": ""}).status_code == 421
    for host in ("localhost:8000", "[::1]:8000", "127.0.0.2"):
        assert client.get("/v1/models", headers={"host": host}).status_code == 200
    assert client.get("/v1/models", headers={"origin": "https://evil.example"}).status_code == 403
    assert client.get("/v1/models", headers={"origin": "null"}).status_code == 403
    found = client.get("/v1/models", headers={"origin": "http://127.0.0.1:8000"})
    assert found.status_code == 200 and "access-control-allow-origin" not in found.headers
    assert client.get("/healthz", headers={"host": "10.0.0.3:8000"}).status_code == 200  # a load balancer's probe


def test_the_page_has_no_outside_host(shared):
    client, _ = shared
    found = client.get("/")
    assert found.status_code == 200 and "default-src 'none'" in found.headers["content-security-policy"]
    assert client.get("/page/icon.svg").headers["content-type"].startswith("image/svg+xml")


def test_the_document_says_what_routes_take(shared):
    client, _ = shared
    found = client.get("/openapi.json").json()
    assert set(found["paths"]) >= {
        "/v1/rank",
        "/v1/recommend",
        "/v1/events",
        "/v1/explain",
        "/v1/models/{name}/activate",
    }
    assert "RankRequest" in found["components"]["schemas"] and "Ranked" in found["components"]["schemas"]


# -- pressure and faults


def test_a_full_queue_and_a_passed_deadline_are_503(world):
    service = service_of(world, ("rankmixer",), limits={"queue": 1, "wait_ms": 300})
    served = service.models.by_name["rankmixer"]
    go, real = threading.Event(), served.engine.rank
    served.ranking._work = lambda asks: (go.wait(60), real(asks))[1]
    codes: list[tuple[int, str]] = []
    with client_of(service) as client:

        def ask() -> None:
            body = json.dumps({"user": "u1", "candidates": [1]})
            found = client.post("/v1/rank", content=body, headers={"content-type": "application/json"})
            codes.append((found.status_code, found.headers.get("retry-after", "")))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(codes) == 5)  # all but the one that is at work
        go.set()
        for thread in threads:
            thread.join()
    assert sorted(codes) == [(200, "")] + [(503, "1")] * 5
    assert service.in_flight == 0 and served.in_flight == 0


def test_one_that_breaks_is_500_and_says_nothing_of_people(world, caplog):
    service = service_of(world, ("rankmixer",))
    served = service.models.by_name["rankmixer"]

    def broken(asks: list[Ask]) -> list[Any]:
        raise ValueError(f"cannot score {asks[0].user} with {asks[0].candidates}")

    served.ranking._work = broken
    with client_of(service) as client, caplog.at_level("INFO", logger="scalerec.serving"):
        for _ in range(3):
            found = post(client, "rank", {"user": "u1", "candidates": [14]}, 500)
    assert "u1" not in str(found) and found["field"] == ""
    said = [record for record in caplog.records if record.msg == "requests_failed"]
    assert len(said) == 1 and "u1" not in json.dumps(said[0].fields) and said[0].fields["error"] == "ValueError"


class Flaky(MemoryStore):
    """A store that can be taken away."""

    away = False

    def past(self, user: Any) -> Any:
        self._there()
        return super().past(user)

    def _write(self, rows: Any) -> Any:
        self._there()
        return super()._write(rows)

    def healthy(self) -> bool:
        return not self.away

    def _there(self) -> None:
        if self.away:
            raise StoreUnavailable("gone")


def test_without_the_store_ranking_goes_on_from_what_is_remembered(world):
    made: list[Flaky] = []

    def opener(url: str, schema: Any, kinds: Any) -> Any:
        made.append(Flaky(schema, kinds))
        return made[0]

    service = service_of(world, ("rankmixer",), states=States(["redis://nowhere/0"], opener))
    assert isinstance(service.states.kept[0].store, Remembered)
    with client_of(service) as client:
        post(client, "events", {"events": [event(1, "u3")]})
        asked = {"user": "u3", "candidates": [1, 2, 3], "time": NOW + 100}
        before = post(client, "rank", asked)
        made[0].away = True
        stale = post(client, "rank", asked)
        assert stale["stale"] and not before["stale"] and stale["items"] == before["items"]
        refused = client.post("/v1/events", json={"events": [event(2, "u3")]})
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        service.states.look()
        assert client.get("/readyz").status_code == 503 and client.get("/healthz").status_code == 200
        assert "scalerec_store_healthy 0.0" in client.get("/metrics").text
        made[0].away = False
        service.states.look()
        assert client.get("/readyz").status_code == 200
        assert post(client, "events", {"events": [event(2, "u3")]}) == {"appended": 1, "repeated": 0}
        service.states.kept[0].store._down_until = 0.0
        assert not post(client, "rank", asked)["stale"]


def test_a_store_of_this_machine_that_cannot_be_read_leaves_scores_without_a_history(world):
    def opener(url: str, schema: Any, kinds: Any) -> Any:
        store = Flaky(schema, kinds)
        store.away = True
        return store

    with client_of(service_of(world, ("rankmixer",), states=States(["memory:"], opener))) as client:
        found = post(client, "rank", {"user": "u3", "candidates": [1, 2]})
        assert found["stale"] and found["cold"] and len(found["items"]) == 2
        assert post(client, "recommend", {"user": "u3"})["source"] == "popularity"
        assert post(client, "events", {"events": [event(1)]}, 503)["error"]
        assert client.get("/v1/users/u3").status_code == 503


# -- the exposure log


def test_what_was_served_is_in_the_exposure_log(world, tmp_path):
    import pyarrow.parquet as pq

    service = service_of(world, ("rankmixer", "hstu"), exposures=tmp_path / "log")
    engine = service.models.by_name["rankmixer"].engine
    with client_of(service) as client:
        post(client, "events", {"events": [event(i, "u3") for i in range(3)]})
        asked = {"user": "u3", "candidates": [4, {"id": 9, "price": 3.0}], "time": NOW + 500}
        ranked = post(client, "rank", asked)
        shown = post(client, "recommend", {"user": "u3", "k": 2, "model": "hstu"})
    files = sorted((tmp_path / "log").glob("*.parquet"))
    tables = {table["model"][0].as_py(): table for table in map(pq.read_table, files)}
    rows = tables["rankmixer"].to_pylist()
    assert [row["item"] for row in rows] == [item["id"] for item in ranked["items"]]
    assert [row["place"] for row in rows] == [1, 2] and {row["request_id"] for row in rows} == {ranked["request_id"]}
    assert [row["score.click"] for row in rows] == pytest.approx([i["scores"]["click"] for i in ranked["items"]])
    assert {row["bucket"] for row in rows} == {ranked["bucket"]} and rows[0]["time"] == NOW + 500
    assert {name for name in rows[0] if name.startswith("raw.")} == {
        f"raw.{name}" for name in engine.schema.input_columns()
    }
    by_item = {row["item"]: row for row in rows}
    assert by_item[9]["raw.price"] == 3.0 and by_item[9]["raw.seen_item"] == [0, 1, 2]
    assert {f"encoded.{feature.name}" for feature in engine.schema.features} <= set(rows[0])
    other = tables["hstu"].to_pylist()
    assert [row["item"] for row in other] == [item["id"] for item in shown["items"]] and other[0]["bucket"] is None


def test_a_full_disk_is_counted_and_serving_goes_on(world, tmp_path, monkeypatch, caplog):
    service = service_of(world, ("rankmixer",), exposures=tmp_path, exposure_rows=1)

    def full(path: Any, tables: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exposure, "write_file", full)
    with client_of(service) as client, caplog.at_level("INFO", logger="scalerec.serving"):
        for _ in range(3):
            post(client, "rank", {"user": "u1", "candidates": [1, 2]})
            time.sleep(0.05)
    assert 'scalerec_exposure_rows_total{outcome="dropped_disk"} 6.0' in service.metrics.text().decode()
    assert [record.msg for record in caplog.records].count("exposures_failed") == 1
    assert not list(tmp_path.iterdir())


def test_a_full_queue_drops_exposures_and_a_rate_draws_them(world, tmp_path):
    service = service_of(world, ("rankmixer",), exposures=tmp_path, exposure_queue=2, exposure_rate=1.0)
    log = service.exposures
    assert log is not None
    log._queue.maxsize = 1
    served = service.models.by_name["rankmixer"]
    ask = Ask("u1", {}, {}, [1, 2, 3], (), NOW)
    shown = exposure.Shown("r", 0.0, served.engine, None, ask, np.zeros(3), np.zeros((3, 2), np.float32))
    for _ in range(200):
        log.offer(shown)
    log.close()
    text = service.metrics.text().decode()
    assert 'outcome="dropped_queue"' in text and 'outcome="written"' in text
    log.rate = 0.0
    log.offer(shown)
    assert log.depth() == 0
    service._close()

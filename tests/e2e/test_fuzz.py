"""Nothing that can be sent makes the service fail or hang: requests made from its OpenAPI document, and worse ones."""

from __future__ import annotations

import json
import os
import random
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.strategies import data, sampled_from

from tests.e2e.running import ITEMS, START, Running, make_bundles

schemathesis = pytest.importorskip("schemathesis")
checks = pytest.importorskip("schemathesis.specs.openapi.checks")
# What a request may hold beyond its form is the bundle's to say, and there are no keys on loopback.
EXCLUDED = [checks.positive_data_acceptance, checks.ignored_auth]
EXAMPLES = int(os.environ.get("SCALEREC_FUZZ_EXAMPLES", "40"))  # of each operation
SECONDS = 20
OPERATIONS = (
    "POST /v1/rank", "POST /v1/recommend", "POST /v1/explain", "POST /v1/events", "GET /v1/users",
    "GET /v1/users/{user}", "GET /v1/items/{id}", "GET /v1/models", "POST /v1/models/{name}/activate",
    "GET /healthz", "GET /readyz",
)  # fmt: skip
ROUTES = ("rank", "recommend", "explain", "events", "models/shop/activate")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    os.environ["SCALEREC_CACHE"] = str(folder / "cache")
    bundle = make_bundles(folder)[0]
    state, users = folder / "state", folder / "users.parquet"
    with Running(bundle, "--state", state, "--users", users, "--exposures", folder / "log", "--rate", "0") as running:
        yield running
        metrics = running.client.get("/metrics").text
        assert 'status="500"' not in metrics
        assert running.stop() == 0
        events = {json.loads(line)["event"] for line in running.lines}
        assert events <= {"listening", "activated", "draining", "stopped"}, running.lines


@pytest.mark.slow
@pytest.mark.parametrize("label", OPERATIONS)
def test_requests_from_the_document(service, label):
    """No 5xx, no hang; status, type and form of the answer as documented; what the document forbids is refused."""
    document = schemathesis.openapi.from_url(f"{service.url}/openapi.json")
    operations = {one.label: one for one in (found.ok() for found in document.get_all_operations())}
    assert set(operations) == set(OPERATIONS)

    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None)
    @given(data())
    def ask(drawn):
        case = drawn.draw(
            operations[label].as_strategy(generation_mode=drawn.draw(sampled_from(list(schemathesis.GenerationMode))))
        )
        if label.endswith("/activate") and isinstance(case.body, dict):
            case.body.pop("path", None)
        case.validate_response(case.call(timeout=SECONDS), excluded_checks=EXCLUDED)

    ask()


# -- worse than the document can say


def right(route: str) -> dict[str, Any]:
    event = {"event_id": "e", "user": 1, "time": START, "item_id": 1, "click": 1}
    return {
        "rank": {"user": 1, "candidates": [1, {"id": 2, "price": 1.5}], "context": {"hour": 3}, "time": START + 10**7},
        "recommend": {"user": 1, "k": 3, "retrieve": 9, "allow": [1, 2], "deny": [3], "context": {"hour": 3}},
        "explain": {"user": 1, "candidates": [1, 2]},
        "events": {"events": [event, {**event, "event_id": "f"}]},
        "models/shop/activate": {},
    }[route]


HOSTILE: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**31, 2**53 + 1, 2**63 - 1, 2**63, -(2**63) - 1, 10**40, 1e308, -0.0,
    "", "a", "1", " ", "\0", "NaN", "ab" * 5_000, "\u202e", "💥" * 300, "' OR 1=1 --", "../../etc/passwd", "{}",
    "1970-01-01T00:00:00Z", "9999-12-31T23:59:59+14:00", "0001-01-01T00:00:00-14:00",
    [], [[]], [None], [1, "a"], ["a"] * 2_000, {}, {"id": 1}, {"a": {"b": {}}}, {"": ""}, list(range(100_000)),
]  # fmt: skip
LITERALS = ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5_000, '"\\ud800"', '"\\ud800\\u0041"', "01", "1."]
BODIES = [
    b"", b" ", b"null", b"[]", b'"', b"{", b"{}", b"}", b"\xff\xfe", b"\xef\xbb\xbf{}", b"[" * 200_000,
    b'{"a":' * 50_000,
    b'{"user": 1, "user": 2, "candidates": [1]}', b'{"user": 1, "candidates": [1]} x', b"x" * (10 << 20),
    b'{"user": 1, "candidates": [' + b"1," * 5_000_000 + b"1]}", b'{"' + b"k" * 1_000_000 + b'": 1}',
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, one in inner for found in places(one, (*path, key)))] if path else [
        found for key, one in inner for found in places(one, (key,))
    ]  # fmt: skip


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    copy = json.loads(json.dumps(value))
    at = copy
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = new
    return copy


def send(service: Running, route: str, body: bytes) -> httpx.Response:
    found = service.client.post(
        f"/v1/{route}", content=body, headers={"content-type": "application/json"}, timeout=SECONDS
    )
    assert found.status_code < 500, (route, body[:300], found.text)
    if found.status_code != 200:
        said = found.json()
        assert said["error"] and len(found.content) < 2_000
        assert found.status_code != 422 or said["field"], (route, body[:300], said)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("route", ROUTES)
def test_hostile_values_at_every_place(service, route):
    body = right(route)
    assert send(service, route, json.dumps(body).encode()).status_code == 200
    for path in places(body):
        for value in HOSTILE:
            if not (isinstance(value, list) and len(value) > 10_000 and len(path) > 1):
                send(service, route, json.dumps(put(body, path, value)).encode())
        for text in LITERALS:
            send(service, route, json.dumps(put(body, path, "#")).replace('"#"', text).encode())
        if isinstance(path[-1], str):
            send(service, route, json.dumps(put(body, (*path[:-1], path[-1] + "x"), 1)).encode())
    assert send(service, route, json.dumps(body).encode()).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_hostile_bodies(service, route):
    for body in BODIES:
        if not (route.endswith("activate") and body in (b"", b"{}")):
            assert send(service, route, body).status_code in (400, 413, 422) or body.startswith(b'{"user": 1, "user"')
    for cut in (1, 7, 20):
        send(service, route, json.dumps(right(route)).encode()[:-cut])


def test_the_named_cases(service):
    """Those of the issue: what comes back, and the field that it names."""
    for body, field in (
        ({"user": 1, "candidates": []}, "candidates"),
        ({"user": 1, "candidates": list(range(100_000))}, "candidates"),
        ({"user": 1, "candidates": [1], "context": {"wind": 3}}, "context.wind"),
        ({"user": 1, "candidates": [10**30]}, "candidates[0]"),
        ({"user": "1", "candidates": [1]}, "user"),
    ):
        found = send(service, "rank", json.dumps(body).encode())
        assert (found.status_code, found.json()["field"]) == (422, field)
    found = send(service, "rank", b'{"user": 10, "candidates": [1], "context": {"price": NaN}}')
    assert (found.status_code, found.json()["field"]) == (422, "context.price")
    found = send(service, "rank", json.dumps({"user": 10**6, "candidates": [10**6]}).encode()).json()
    assert found["cold"] and found["unknown_items"] == [10**6] and found["items"][0]["score"] is not None


def test_what_was_sent_before_did_not_poison_anybody(service):
    """Whatever events were taken up, every user can still be ranked."""
    random.seed(0)
    users = service.client.get("/v1/users?limit=1000").json()["users"]
    for user in random.sample(users, min(len(users), 200)):
        found = send(service, "rank", json.dumps({"user": user, "candidates": list(range(ITEMS))}).encode())
        assert found.status_code == 200, found.text

"""What the serving benchmarks decide by: the search for the largest rate, verdicts on a load test, the made-up log."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks import peers_serving, serving_load, serving_world
from scalerec.serving.bench import Request
from scalerec.serving.client import Answer


def test_the_largest_rate_is_found_by_halving(monkeypatch: pytest.MonkeyPatch):
    """A service whose p99 grows with the rate and breaks at 100 a second."""
    probed: list[float] = []

    def probe(url: str, path: str, world: Any, rate: float, seconds: float, seed: int) -> dict[str, Any]:
        probed.append(rate)
        errors = {"503": 1} if rate > 100 else {}
        return {"errors": errors, "p99_ms": 1000 / max(120 - rate, 1), "throughput_per_s": rate}

    monkeypatch.setattr(peers_serving, "probe", probe)
    monkeypatch.setattr(peers_serving, "drawn", lambda *_: iter(()))
    monkeypatch.setattr(peers_serving, "requests_a_second", lambda *_, **__: (150.0, []))
    world: Any = None
    found = peers_serving.most("", "", world, limit=20, seconds=1, steps=12, seed=0)
    assert found["rate"] == pytest.approx(70, abs=0.1) and found["p99_ms"] <= 20  # 1000 / (120 - 70)
    found = peers_serving.most("", "", world, limit=1e9, seconds=1, steps=12, seed=0)
    assert found["rate"] == pytest.approx(100, abs=0.1)
    assert peers_serving.most("", "", world, limit=1, seconds=1, steps=5, seed=0)["rate"] == 0
    assert max(probed) < 165


GOOD = {
    "steady_errors": 0, "wrong_answers": 0, "steady_p50_ms": 10.0, "steady_p99_ms": 25.0, "wait_ms": 100.0,
    "memory_mib_before": 500.0, "memory_mib_after": 505.0, "overload_refused": 10, "overload_other_errors": 0,
    "overload_refused_p99_ms": 20.0, "overload_accepted_p99_ms": 110.0, "overload_accepted_per_s": 50.0,
    "most_per_s": 100.0, "after_errors": 0, "after_p99_ms": 30.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "fails"),
    [
        ({}, set()),
        ({"steady_errors": 1}, {"no_error"}),
        ({"wrong_answers": 1}, {"no_error"}),
        ({"memory_mib_after": 520.0}, {"memory"}),
        ({"steady_p50_ms": 8.0}, {"tail"}),
        ({"overload_refused": 0, "overload_refused_p99_ms": None}, {"refusals"}),
        ({"overload_other_errors": 1}, {"refusals"}),
        ({"overload_refused_p99_ms": 150.0}, {"refusals"}),
        ({"overload_accepted_p99_ms": 130.0}, {"accepted"}),
        ({"overload_accepted_p99_ms": None}, {"accepted"}),
        ({"overload_accepted_per_s": 49.0}, {"goodput"}),
        ({"after_p99_ms": 40.0}, {"recovers"}),
        ({"after_errors": 1}, {"recovers"}),
        ({"steady_p99_ms": None}, {"tail", "accepted", "recovers"}),
    ],
)
def test_verdicts_of_a_load_test(changes: dict[str, Any], fails: set[str]):
    found = serving_load.verdicts(GOOD | changes)
    assert {name for name, (holds, _) in found.items() if not holds} == fails


def test_answers_are_looked_at():
    wrong: Counter[str] = Counter()
    request = Request(0.0, "/v1/rank", json.dumps({"candidates": [1, 2]}).encode())

    def look(status: int, body: Any, fields: dict[str, str] | None = None) -> str:
        wrong.clear()
        serving_load.look(request, Answer(status, json.dumps(body).encode(), fields or {}), wrong)
        return ",".join(wrong)

    assert look(200, {"items": [{"id": 2}, {"id": 1}]}) == ""
    assert look(200, {"items": [{"id": 2}]}) == "other items than asked"
    assert look(503, {"error": "full"}, {"retry-after": "1"}) == ""
    assert "Retry-After" in look(503, {"error": "full"}) and "Retry-After" in look(429, {}, {"retry-after": "1"})
    assert look(500, {}) == "status 500"


def test_memory_is_compared_between_the_second_and_the_last_fifth():
    watch = serving_load.Watch(SimpleNamespace(memory=1.0))  # type: ignore[arg-type]
    watch.samples = [1.0] * 10 + [5.0] * 10 + [6.0] * 20 + [9.0] * 10
    assert watch.growth() == (5.0, 9.0)


def test_the_log_is_in_the_order_of_time_and_items_keep_their_columns():
    log = serving_world.make_log([3, 20, 7], items=5)
    columns = {name: log[name].to_numpy() for name in log.column_names}
    assert np.unique(columns["user"], return_counts=True)[1].tolist() == [3, 20, 7]
    assert (np.diff(columns["time"]) >= 0).all() and columns["time"].max() <= serving_world.NOW
    for item in np.unique(columns["item"]):
        mine = columns["item"] == item
        assert all(len(np.unique(columns[name][mine])) == 1 for name in ("author", "category", "duration"))

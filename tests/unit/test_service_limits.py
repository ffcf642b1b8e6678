"""What a service holds to where clients are slow, odd or many: bodies that do not come, limits that nobody named."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError
from starlette.requests import Request

from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.inference.engine import Ask
from scalerec.serving import bench, exposure, logs
from scalerec.serving.app import body
from scalerec.serving.requests import Refused
from scalerec.serving.settings import Limits
from scalerec.serving.states import States
from scalerec.serving.store import MemoryStore
from tests.contract.world import SCHEMA, World, make_world
from tests.unit.serving import NOW, client_of, event, items, service_of, settings_of


@pytest.fixture(scope="module")
def world():
    return make_world()


def post(client: Any, path: str, asked: Any, status: int = 200) -> Any:
    found = client.post(f"/v1/{path}", content=json.dumps(asked), headers={"content-type": "application/json"})
    assert found.status_code == status, found.text
    return found.json()


@pytest.mark.parametrize("sent", [[], [{"type": "http.request", "body": b"{", "more_body": True}]])
def test_a_body_that_does_not_come_is_not_waited_for(sent):
    """Neither its end nor, after a head alone, its beginning."""
    messages = iter(sent)

    async def receive() -> Any:
        for message in messages:
            return message
        await asyncio.Event().wait()

    headers = [(b"content-type", b"application/json"), (b"content-length", b"50")]
    request = Request({"type": "http", "method": "POST", "headers": headers}, receive)
    with pytest.raises(Refused) as refused:
        asyncio.run(asyncio.wait_for(body(request, Limits(body_seconds=0.05)), 5))
    assert refused.value.status == 408


def test_a_limit_on_candidates_refuses_no_number_that_nobody_said(world):
    with client_of(service_of(world, limits={"candidates": 6})) as client:
        found = post(client, "recommend", {"user": "u2"})
        assert len(found["retrieved"]) == len(found["items"]) == 6
        assert post(client, "recommend", {"user": "u2", "retrieve": 7}, 422)["field"] == "retrieve"
        assert post(client, "recommend", {"user": "u2", "k": 7}, 422)["field"] == "k"


def timeless(world: World) -> World:
    """The world with sequences that keep no times."""
    groups = [
        group.model_copy(update={"features": tuple(
            feature.model_copy(update={"time": False}) if feature.kind == "sequence" else feature
            for feature in group.features
        )})
        for group in SCHEMA.groups
    ]  # fmt: skip
    encoder = Encoder.fit(SCHEMA.model_copy(update={"groups": tuple(groups)}), [world.rows])
    return World(world.rows, encoder, encoder.encode(world.rows))


def test_histories_without_times_hide_the_request_s_moment_too(world):
    service = service_of(timeless(world), ("rankmixer",))
    seen: list[Any] = []
    served = service.models.by_name["rankmixer"]
    real = served.engine.rank
    served.ranking._work = lambda asks: (seen.extend(asks), real(asks))[1]
    with client_of(service) as client:
        post(client, "events", {"events": [event(0), event(1)]})  # at NOW and ten seconds later
        for asked, events, behind in ((NOW + 10, 1, False), (NOW + 11, 2, False), (NOW + 5, 2, True)):
            found = post(client, "rank", {"user": "u1", "candidates": [1], "time": asked})
            assert len(seen[-1].history["seen"]) == events and found["clock_behind"] == behind, asked
        assert found["time"] == NOW + 10


def test_an_item_is_found_whatever_its_id(world):
    with client_of(service_of(world, ("rankmixer",))) as client:
        post(client, "events", {"events": [event(0, user="a/b")]})
        assert client.get("/v1/users/a%2Fb").json()["user"] == "a/b"
        assert client.get("/v1/items/a%2Fb").json()["error"] == "id: no such item in this bundle"


def shown(service: Any, candidates: list[Any], own: Any = ()) -> exposure.Shown:
    engine = service.models.by_name["rankmixer"].engine
    count = len(candidates)
    ask = Ask("u1", {}, {}, candidates, own, NOW)
    return exposure.Shown("r", 0.0, engine, None, ask, np.zeros(count), np.zeros((count, 2), np.float32))


def test_large_requests_are_not_made_into_rows_together(world, tmp_path, monkeypatch):
    """Each row carries its user's history: 64 requests of thousands of candidates would not fit into memory."""
    monkeypatch.setattr(exposure, "_TOGETHER_ROWS", 100)
    service = service_of(world, ("rankmixer",), exposures=tmp_path)
    log, its = service.exposures, shown(service, [1] * 40)
    assert log is not None
    log.close()  # its thread ends; here the queue is read by hand
    for _ in range(10):
        log.offer(its)
    assert [len(log._waiting()) for _ in range(4)] == [3, 3, 3, 1]
    service.models.close()


def test_a_request_of_other_types_does_not_take_a_file_of_others_with_it(world, tmp_path: Path):
    service = service_of(world, ("rankmixer",), exposures=tmp_path)
    assert service.exposures is not None and "words" in items().column_names
    service.exposures.offer(shown(service, [1, 2]))
    service.exposures.offer(shown(service, [3], [{"words": ["a", "b"]}]))
    service.exposures.close()
    service.models.close()
    assert sum(pq.read_metadata(file).num_rows for file in tmp_path.glob("*.parquet")) == 3


def test_a_store_that_is_away_is_said_once_though_reads_go_on(world, caplog):
    class Away(MemoryStore):
        def healthy(self) -> bool:
            return False

    service = service_of(world, ("rankmixer",), states=States(["memory:"], lambda url, schema, kinds: Away(schema)))
    service.states.look(), service.states.look()
    assert [record.msg for record in caplog.records] == ["store_failed"] and not service.states.well
    service.models.close()


def test_the_event_loop_s_complaints_name_nobody(monkeypatch):
    """What asyncio says of a task that failed unseen holds its arguments and the text of its error."""
    out, loggers = io.StringIO(), [logging.getLogger(name) for name in ("scalerec.serving", "uvicorn.error", "asyncio")]
    for logger in loggers:
        for name in ("handlers", "propagate", "level"):
            monkeypatch.setattr(logger, name, getattr(logger, name))
    monkeypatch.setattr("sys.stderr", out)
    logs.start()
    loop = asyncio.new_event_loop()
    loop.call_exception_handler({"message": "Exception in callback f('u17')", "exception": ValueError("user u17")})
    loop.close()
    said = json.loads(out.getvalue())
    assert said["event"] == "event_loop_failed" and said["error"] == "ValueError" and "u17" not in out.getvalue()


def test_a_share_of_users_is_finite():
    with pytest.raises(ValidationError, match="finite"):
        settings_of(weights={"rankmixer": float("inf")})


def test_a_key_file_that_is_not_there_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="key: No such file"):
        bench._lines(tmp_path / "key")

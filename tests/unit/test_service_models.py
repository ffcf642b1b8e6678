"""Models of a service: users dealt by weight, a bundle swapped while clients ask, two histories at once."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from scalerec.errors import InputError
from scalerec.serving import logs
from scalerec.serving.deadline import Lane, within
from scalerec.serving.models import BUCKETS, Models
from scalerec.serving.requests import Refused
from scalerec.serving.service import Service
from scalerec.serving.states import States
from tests.contract.world import SCHEMA, make_world
from tests.unit.serving import bundle_of, client_of, event, served_of, service_of, settings_of
from tests.waiting import wait_for


@pytest.fixture(scope="module")
def world():
    return make_world()


def both(world: Any, **changes: Any) -> Models:
    settings = settings_of(**changes)
    return Models([served_of(bundle_of(world, kind), settings) for kind in ("rankmixer", "hstu")], settings)


def test_users_are_dealt_by_weight_and_stay(world):
    models = both(world, weights={"rankmixer": 3, "hstu": 1})
    dealt = Counter(models.pick(user, None)[0].name for user in range(20_000))
    assert dealt["hstu"] / 20_000 == pytest.approx(0.25, abs=0.01)
    again = both(world, weights={"rankmixer": 3, "hstu": 1})
    other = both(world, weights={"rankmixer": 3, "hstu": 1}, salt="b")
    picks = [[each.pick(user, None)[0].name for user in range(500)] for each in (models, again, other)]
    assert picks[0] == picks[1] != picks[2]
    assert {models.bucket(user) // 1000 for user in range(500)} == set(range(BUCKETS // 1000))
    assert models.pick(7, "hstu") == (models.by_name["hstu"], None)
    assert both(world).weights == {"rankmixer": 1.0, "hstu": 0.0}
    for wrong in ({"other": 1.0}, {"hstu": 0.0}):
        with pytest.raises(InputError, match="--weights"):
            both(world, weights=wrong)


def test_two_bundles_of_one_name_are_refused(world):
    settings = settings_of()
    with pytest.raises(InputError, match=r"second bundle named 'rankmixer'.*export .* --name NAME"):
        Models([served_of(bundle_of(world, "rankmixer"), settings) for _ in range(2)], settings)


def swapping(world: Any, tmp_path: Path, **changes: Any) -> tuple[Service, list[Any]]:
    """A service whose activations make a new version each, and all that it loaded."""
    made: list[Any] = []

    def loading(folder: Path) -> Any:
        if folder.name == "corrupt":
            raise InputError(f"{folder}: weights.safetensors: not the file that was signed")
        name = "other" if folder.name == "other" else "rankmixer"
        made.append(
            served_of(bundle_of(world, "rankmixer", name=name, version=f"v{2 + len(made)}", folder=folder), settings)
        )
        return made[-1]

    settings = settings_of(**changes)
    first = served_of(bundle_of(world, "rankmixer", folder=tmp_path / "one"), settings)
    second = served_of(bundle_of(world, "hstu", folder=tmp_path / "two"), settings)
    return Service(settings, Models([first, second], settings), States(["memory:"]), [], loading), made


def activate(client: Any, name: str, status: int = 200, **body: Any) -> Any:
    found = client.post(f"/v1/models/{name}/activate", json=body)
    assert found.status_code == status, found.text
    return found.json()


def test_a_swap_under_load_drops_no_request(world, tmp_path):
    service, made = swapping(world, tmp_path)
    stop, seen, failed = threading.Event(), Counter(), []
    with client_of(service) as client:

        def ask(number: int) -> None:
            body = json.dumps({"user": f"u{number}", "candidates": list(range(10)), "model": "rankmixer"})
            while not stop.is_set():
                found = client.post("/v1/rank", content=body, headers={"content-type": "application/json"})
                if found.status_code != 200:
                    failed.append(found.text)
                else:
                    seen[found.json()["version"]] += 1

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        first = service.models.by_name["rankmixer"]
        wait_for(lambda: seen["v1"] or failed)
        for number in range(4):
            found = activate(client, "rankmixer", path=str(tmp_path / "one"))
            assert found == {"name": "rankmixer", "version": f"v{number + 2}", "previous": f"v{number + 1}"}
            wait_for(lambda version=found["version"]: seen[version] or failed)
        stop.set()
        for thread in threads:
            thread.join()
        wait_for(lambda: all(one.ranking._closed for one in (first, *made[:-1])))  # and the old ones are gone
        assert not made[-1].ranking._closed
    assert not failed and set(seen) == {"v1", "v2", "v3", "v4", "v5"}


def test_an_activation_that_cannot_be_leaves_what_serves(world, tmp_path):
    service, made = swapping(world, tmp_path)
    with client_of(service) as client:
        assert activate(client, "none", 404)["field"] == "name"
        assert "not the file" in activate(client, "rankmixer", 422, path=str(tmp_path / "corrupt"))["error"]
        for outside in ("/etc", str(tmp_path.parent), str(tmp_path / "one" / ".." / ".." / "x"), "\0", "x" * 4096):
            assert activate(client, "rankmixer", 422, path=outside)["field"] == "path"
        assert "is named 'other'" in activate(client, "rankmixer", 422, path=str(tmp_path / "other"))["error"]
        assert made[-1].ranking._closed
        assert activate(client, "rankmixer", 422, path=3)["field"] == "path"
        rows = {row["name"]: row["version"] for row in client.get("/v1/models").json()["models"]}
        assert rows == {"rankmixer": "v1", "hstu": "v1"}


def test_activating_what_had_no_share_gives_it_all(world, tmp_path):
    service, _ = swapping(world, tmp_path, weights={"hstu": 1.0})
    with client_of(service) as client:
        activate(client, "rankmixer")
        assert client.get("/v1/models").json()["weights"] == {"rankmixer": 1.0, "hstu": 0.0}


def other_schema() -> Any:
    """The world's schema with a shorter history."""
    groups = []
    for group in SCHEMA.groups:
        features = tuple(
            feature.model_copy(update={"max_len": 2}) if feature.name == "seen" else feature
            for feature in group.features
        )
        groups.append(group.model_copy(update={"features": features}))
    return SCHEMA.model_copy(update={"groups": tuple(groups)})


def test_a_bundle_that_keeps_other_histories_is_not_activated(world, tmp_path):
    service, made = swapping(world, tmp_path)
    loading = service._loading

    def other(folder: Path) -> Any:
        found = loading(folder)
        found.engine.schema = other_schema()
        return found

    service._loading = other
    with client_of(service) as client:
        assert "other histories" in activate(client, "rankmixer", 422)["error"]
    assert made[0].ranking._closed


def test_models_of_two_kinds_of_histories_each_have_theirs(world):
    states = States(["memory:"])
    service = service_of(world, ("rankmixer",), states=states)
    columns = service.models.by_name["rankmixer"].columns
    second = type(columns)(world.encoder, bundle_of(world, "rankmixer").items, {})
    second.schema = other_schema()
    states.add("second", second, {}, lambda item: {})
    assert len(states.kept) == 2
    with client_of(service) as client:
        found = client.post("/v1/events", json={"events": [event(i, "u9") for i in range(4)]})
        assert found.json() == {"appended": 4, "repeated": 0}
        lengths = [len(one.store.history("u9")["seen"]) for one in states.kept]
        assert lengths == [4, 2]
    picky = States(["memory:"])
    picky.add("rankmixer", columns, {}, lambda item: {})
    picky.add("second", second, {second.schema.item: "text"}, lambda item: {})
    with client_of(service_of(world, ("rankmixer",), states=picky)) as client:
        refused = client.post("/v1/events", json={"events": [event(0, "u9")]})
        assert refused.status_code == 422 and "a text there" in refused.json()["error"], refused.text
    assert [one.store.count() for one in picky.kept] == [0, 0]  # what the second refuses is not in the first either
    elsewhere = States(["redis://h/0"], lambda url, schema, kinds: states.kept[0].store)
    elsewhere.add("rankmixer", columns, {}, lambda item: {})
    with pytest.raises(InputError, match="one --state for each"):
        elsewhere.add("second", second, {}, lambda item: {})


def test_an_item_is_as_the_first_model_knows_it_that_knows_it(world):
    states = States(["memory:"])
    service = service_of(world, states=states)
    (kept,) = states.kept
    assert list(kept.models) == ["rankmixer", "hstu"]
    first, second = (service.models.by_name[name].columns for name in kept.models)
    states.add("rankmixer", first, {}, lambda item: {1: {"author": "old"}}.get(item, {}))
    states.add("hstu", second, {}, lambda item: {"author": "new"})
    assert [kept.row(item)["author"] for item in (1, 2)] == ["old", "new"]
    assert len(states.kept) == 1 and list(kept.models) == ["rankmixer", "hstu"]
    second.events = {**second.events, "weather": []}
    assert kept.reads("weather") and not kept.reads("wind")


def test_a_retriever_reads_what_it_knows_of_the_context(world):
    service = service_of(world)
    del service.models.by_name["hstu"].columns.inputs["views"]  # as if its schema had no such column
    body = {"user": "u9", "context": {"views": 3, "age": 20}, "k": 2}
    with client_of(service) as client:
        client.post("/v1/events", json={"events": [event(1, "u9")]})
        found = client.post("/v1/recommend", json=body)
        assert found.status_code == 200 and found.json()["source"] == "hstu", found.text
        refused = client.post("/v1/recommend", json={**body, "context": {"age": 20, "wind": 1}})
        assert refused.json()["field"] == "context.wind"


def test_a_state_that_nothing_goes_to_is_refused(world):
    with pytest.raises(InputError, match="nothing goes there"):
        service_of(world, state=("memory:", "memory:"))


# -- what never takes forever


def test_work_is_given_up_and_lanes_are_full():
    async def run() -> None:
        with pytest.raises(Refused) as refused:
            await within(0.02, asyncio.sleep(5))
        assert refused.value.status == 503
        assert await within(1, asyncio.sleep(0.01, "done")) == "done"
        task = asyncio.create_task(within(5, asyncio.sleep(5)))
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        lane, go = Lane("things", workers=1, waiting=1), threading.Event()
        waiting = [asyncio.create_task(lane.run(lambda: go.wait(5))) for _ in range(2)]
        await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="too many things"):
            await lane.run(lambda: None)
        go.set()
        assert await asyncio.gather(*waiting) == [True, True]
        assert await lane.run(lambda: 3) == 3
        go.clear()
        for _ in range(2):  # given up by who asked, but the thread is not done with it, or has it before it
            with pytest.raises(Refused, match="too long"):
                await within(0.01, lane.run(lambda: go.wait(5)))
        waits = asyncio.create_task(lane.run(lambda: 4))  # in the place of the one that never began
        await asyncio.sleep(0.01)
        with pytest.raises(Refused, match="too many things"):
            await lane.run(lambda: None)
        go.set()
        assert await waits == 4
        lane.close()

    asyncio.run(run())


def test_logs_are_json_and_hold_no_text_of_errors():
    formatter = logs._Lines()
    try:
        raise ValueError("user 12345 bought 678")
    except ValueError as error:
        fields = logs.error_fields(error)
        record = logging.LogRecord(
            "uvicorn.error", logging.ERROR, "f", 1, "Failed for %s", ("12345",), (ValueError, error, None)
        )
    line = json.loads(formatter.format(record))
    assert line["error"] == fields["error"] == "ValueError" and line["event"] == "Failed for %s"
    assert "12345" not in json.dumps(line)

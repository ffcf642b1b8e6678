"""Who may come in: keys at rest and at the door, rates, and what a service refuses to be started as."""

from __future__ import annotations

import argparse
import json
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from scalerec.errors import InputError
from scalerec.serving import command, keys
from scalerec.serving.app import create_app
from scalerec.serving.settings import Settings
from tests.contract.world import make_world
from tests.unit.serving import client_of, service_of


@pytest.fixture(scope="module")
def world():
    return make_world()


# -- keys


def test_a_key_is_kept_as_a_salted_hash(tmp_path):
    file = tmp_path / "keys.json"
    first, second = keys.add(file, "web"), keys.add(file, "ops", admin=True)
    text = file.read_text()
    assert first not in text and first.rpartition("_")[2] not in text
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    entries = keys.read(file)
    assert [entry.role for entry in entries] == ["use", "admin"] and entries[0].salt != entries[1].salt
    known = keys.Keys(file)
    assert known.known(first) is None  # never seen: a hash is needed
    assert known.check(first).name == "web" and known.check(second).name == "ops"
    assert known.known(first).name == "web"
    wrong = first[:-1] + ("A" if first[-1] != "A" else "B")
    assert known.check(wrong) is None and known.known(wrong) is None
    for nothing in ("", "sr_", "sr_000000000000_" + "a" * 32, first + "\n", "ключ"):
        assert known.check(nothing) is None and known.known(nothing) is None
    with pytest.raises(InputError, match="already"):
        keys.add(file, "web")
    keys.remove(file, "web")
    assert keys.Keys(file).check(first) is None
    with pytest.raises(InputError, match="no key 'web'; there is ops"):
        keys.remove(file, "web")


def hashed_from_now(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The secrets that are hashed, as they come."""
    hashed: list[str] = []
    real = keys._hash
    monkeypatch.setattr(keys, "_hash", lambda secret, salt: (hashed.append(secret), real(secret, salt))[1])
    return hashed


def test_guessing_is_slow_and_an_unknown_id_costs_no_hash(tmp_path, monkeypatch):
    file = tmp_path / "keys.json"
    right = keys.add(file, "web")
    known = keys.Keys(file)
    hashed = hashed_from_now(monkeypatch)
    known.check("sr_" + "0" * 12 + "_" + "a" * 32)
    assert not hashed
    started = time.monotonic()
    for number in range(40):
        known.check(right[:16] + f"{number:032}")
    assert len(hashed) <= 6 + 5 * (time.monotonic() - started)


def test_the_command_makes_lists_and_removes_keys(tmp_path, capsys):
    file = str(tmp_path / "keys.json")

    def run(*words: str, admin: bool = False, as_json: bool = False) -> str:
        command.key(argparse.Namespace(action=words[0], words=list(words[1:]), admin=admin, json=as_json))
        return capsys.readouterr().out

    made = run("add", "web", file).strip()
    assert keys.Keys(Path(file)).check(made)
    assert json.loads(run("add", "ops", file, admin=True, as_json=True))["key"].startswith("sr_")
    assert [one["role"] for one in json.loads(run("list", file, as_json=True))] == ["use", "admin"]
    run("remove", "web", file)
    assert "web" not in run("list", file)
    with pytest.raises(InputError, match="NAME FILE"):
        run("add", file)
    with pytest.raises(InputError, match="name"):
        run("add", "a name with spaces", file)


def test_a_right_key_that_many_requests_bring_at_once_is_right_for_all(tmp_path, monkeypatch):
    file = tmp_path / "keys.json"
    right = keys.add(file, "web")
    known = keys.Keys(file)
    hashed = hashed_from_now(monkeypatch)
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(known.check, [right] * 64))
    assert all(found) and len(hashed) == 1


# -- the door


@pytest.fixture
def guarded(world, tmp_path):
    file = tmp_path / "keys.json"
    made = {"use": keys.add(file, "web"), "admin": keys.add(file, "ops", admin=True)}
    service = service_of(world, ("rankmixer",), keys=file, host="0.0.0.0", limits={"rate": 20})
    with client_of(service) as client:
        yield client, made


def test_without_a_key_nothing_but_health(guarded):
    client, made = guarded
    for path in ("/healthz", "/readyz"):
        assert client.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/openapi.json", "/v1/none"):
        found = client.get(path)
        assert found.status_code == 401 and found.headers["www-authenticate"] == "Bearer", path
    assert client.get("/v1/models", headers={"x-api-key": made["use"]}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": f"Bearer {made['use']}"}).status_code == 200
    assert client.get("/v1/models", headers={"authorization": f"Basic {made['use']}"}).status_code == 401
    assert client.get("/v1/models", headers={"x-api-key": made["use"][:-2] + "zz"}).status_code == 401
    assert client.get("/v1/models", headers={"x-api-key": b"\xff\xfe"}).status_code == 401


def test_the_page_and_users_are_not_there_unless_switched_on(guarded):
    client, made = guarded
    for path in ("/", "/page/icon.svg", "/v1/users", "/v1/users/u1"):
        assert client.get(path, headers={"x-api-key": made["admin"]}).status_code == 404


def test_roles(guarded, world, tmp_path):
    client, made = guarded
    body = {"content": b"{}", "headers": {"x-api-key": made["use"], "content-type": "application/json"}}
    assert client.post("/v1/models/rankmixer/activate", **body).status_code == 403
    with client_of(service_of(world, ("rankmixer",), keys=tmp_path / "keys.json", host="0.0.0.0", page=True)) as paged:
        assert paged.get("/").status_code == 200  # holds no data
        assert paged.get("/v1/users").status_code == 401
        assert paged.get("/v1/users", headers={"x-api-key": made["use"]}).status_code == 403
        assert paged.get("/v1/users", headers={"x-api-key": made["admin"]}).status_code == 200


def test_a_path_that_ends_in_a_line_break_is_no_way_around_the_role(world, tmp_path):
    """The router's `$` takes a line break at the end; the table of who may go where has to as well."""
    made = {role: keys.add(tmp_path / "keys.json", role, admin=role == "admin") for role in ("use", "admin")}
    service = service_of(world, ("rankmixer",), keys=tmp_path / "keys.json", host="0.0.0.0", page=True)
    with client_of(service) as client:
        for role, key in made.items():
            said = {"x-api-key": key, "content-type": "application/json"}
            assert client.get("/v1/users%0A", headers=said).status_code == 404, role
            assert client.post("/v1/models/none/activate%0A", content=b"{}", headers=said).status_code == 404
            assert client.post("/v1/rank%0A", content=b"{}", headers=said).status_code == 404
        assert client.get("/v1/users%0A").status_code == 401


def test_a_key_that_is_removed_is_out_within_a_second(world, tmp_path):
    file = tmp_path / "keys.json"
    first, second = keys.add(file, "a"), keys.add(file, "b")
    with client_of(service_of(world, ("rankmixer",), keys=file)) as client:

        def status(key: str) -> int:
            return client.get("/v1/models", headers={"x-api-key": key}).status_code

        assert status(first) == status(second) == 200
        keys.remove(file, "a")
        third = keys.add(file, "c")
        time.sleep(1.1)
        assert (status(first), status(second), status(third)) == (401, 200, 200)
        file.write_text("{")
        time.sleep(1.1)
        assert (status(first), status(second)) == (401, 200)


def test_each_key_has_a_rate(guarded):
    client, made = guarded
    codes = [client.get("/v1/models", headers={"x-api-key": made["use"]}) for _ in range(60)]
    refused = [found for found in codes if found.status_code == 429]
    assert refused and refused[0].headers["retry-after"] == "1" and len(codes) - len(refused) >= 20
    assert client.get("/v1/models", headers={"x-api-key": made["admin"]}).status_code == 200
    assert client.get("/healthz").status_code == 200


# -- what it refuses to be


def test_no_open_door_by_accident(tmp_path):
    def settings(**said: Any) -> Settings:
        return Settings(bundles=(Path("b"),), **said)

    for host in ("127.0.0.1", "127.8.0.1", "::1", "localhost"):
        assert settings(host=host).loopback and settings(host=host).shows_people
    for said in ({"host": "0.0.0.0"}, {"host": "::"}, {"host": "my.machine"}, {"names": ("shop.example",)}):
        with pytest.raises(ValidationError, match="--keys FILE"):
            settings(**said)
        assert not settings(**said, without_keys=True).shows_people
        assert not settings(**said, keys=tmp_path / "k").shows_people
        assert settings(**said, keys=tmp_path / "k", page=True).shows_people
        with pytest.raises(ValidationError, match="histories"):
            settings(**said, without_keys=True, page=True)


def test_a_proxy_s_name_is_let_in(world, tmp_path):
    keys.add(tmp_path / "k", "web")
    service = service_of(world, ("rankmixer",), names=("shop.example",), keys=tmp_path / "k")
    with client_of(service) as client:
        assert client.get("/v1/models", headers={"host": "shop.example"}).status_code == 401
        assert client.get("/v1/models", headers={"host": "other.example"}).status_code == 421


def test_options_become_settings_and_errors_name_them(tmp_path):
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers()

    def add(name: str, run: Any, help: str, overridable: bool) -> argparse.ArgumentParser:
        made = commands.add_parser(name)
        made.set_defaults(run=run, json=False)
        return made

    command.add(add)
    read = parser.parse_args
    found = command.settings_of(read(["serve", "a", "b", "--weights", "x=0.9,y=0.1", "--state", "s", "--page"]))
    assert found.bundles == (Path("a"), Path("b")) and found.weights == {"x": 0.9, "y": 0.1} and found.state == ("s",)
    for wrong, said in (
        (["--weights", "x"], "--weights x"), (["--host", "0.0.0.0"], "--keys FILE"), (["--port", "99999"], "port"),
        (["--exposure-rate", "2"], "exposure_rate"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=said):
            command.settings_of(read(["serve", "a", *wrong]))


def test_a_folder_that_is_no_bundle_is_an_input_error(tmp_path):
    with pytest.raises(InputError):
        create_app(Settings(bundles=(tmp_path,)))

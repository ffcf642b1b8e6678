"""The load generator against a small server that does what the test wants: arrivals, latencies, errors, limits."""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from scalerec.errors import InputError
from scalerec.serving import bench
from scalerec.serving.client import Client, Lost


class Server:
    """Answers JSON on a port of its own, in a thread; `behave` says how: (path, body) -> (status, answer, seconds)."""

    def __init__(self, behave):
        self.behave, self.asked, self.connections = behave, [], 0
        self.port = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                path = head.split(" ")[1]
                length = [int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")]
                body = await reader.readexactly(length[0]) if length else b""
                self.asked.append((path, json.loads(body) if body else None, head))
                status, answer, seconds = self.behave(path, body)
                if status == 0:
                    break
                await asyncio.sleep(seconds)
                text = json.dumps(answer).encode()
                for piece in (f"HTTP/1.1 {status} X\r\ncontent-length: {len(text)}\r\n\r\n".encode(), text):
                    writer.write(piece)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    @contextmanager
    def running(self) -> Iterator[str]:
        loop, ready = asyncio.new_event_loop(), threading.Event()

        async def serve() -> None:
            server = await asyncio.start_server(self.talk, "127.0.0.1", 0)
            self.port = server.sockets[0].getsockname()[1]
            ready.set()

        def main() -> None:
            loop.create_task(serve())
            loop.run_forever()
            for task in asyncio.all_tasks(loop):
                task.cancel()
            loop.run_until_complete(asyncio.sleep(0.01))
            loop.close()

        thread = threading.Thread(target=main)
        thread.start()
        ready.wait(10)
        try:
            yield f"http://127.0.0.1:{self.port}"
        finally:
            loop.call_soon_threadsafe(loop.stop)
            thread.join(10)


def fine(path: str, body: bytes):
    return 200, {"ok": True}, 0.0


SMALL = {"users": ["a", "b", "c"], "items": list(range(50)), "seconds": 1.0, "warm_up": 0.2, "rate": 80.0}


def test_arrivals_are_a_seeded_poisson_process():
    moments = bench.arrivals(500, 40, 3)
    assert np.array_equal(moments, bench.arrivals(500, 40, 3))
    assert not np.array_equal(moments[:50], bench.arrivals(500, 40, 4)[:50])
    assert abs(len(moments) - 20_000) < 600 and moments[-1] <= 40 and (np.diff(moments) >= 0).all()
    gaps = np.diff(moments)
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.05)  # exponential


def test_the_mix_of_users_is_as_asked():
    users = bench.Users([f"s{i}" for i in range(500)], [f"l{i}" for i in range(500)])
    endless = bench.bodies(users, range(40), candidates=5, repeated=0.3, long=0.25, seed=1, model="m")
    drawn = list(itertools.islice(endless, 4000))
    kinds = Counter(kind for _, kinds in drawn for kind in kinds)
    assert kinds["repeated"] / 4000 == pytest.approx(0.3, abs=0.03)
    assert kinds["long"] / 4000 == pytest.approx(0.25, abs=0.04)
    last = []
    for text, (length, kind) in drawn:
        body = json.loads(text)
        assert body["model"] == "m" and len(set(body["candidates"])) == 5 and body["user"][0] == length[0]
        if kind == "repeated":
            assert body["user"] in last[-bench.RECENT :]
        else:
            last.append(body["user"])
    few = bench.bodies(bench.Users(["a"], []), range(3), candidates=8, repeated=0, long=1, seed=1)
    text, kinds = next(few)
    assert kinds == ("short", "new") and len(json.loads(text)["candidates"]) == 8


def test_figures_of_a_fast_service(tmp_path):
    server = Server(fine)
    with server.running() as url:
        found = bench.bench(url, **SMALL, out=tmp_path / "figure.png", model="m", key="secret")
    assert found["errors"] == {} and found["error_share"] == 0
    assert found["requests"] == sum(1 for at in bench.arrivals(80, 1, 0) if at >= 0.2)
    assert 0 < found["p50_ms"] <= found["p95_ms"] <= found["p99_ms"] <= found["max_ms"] < 500
    assert found["kinds"]["short"]["n"] == found["requests"]
    assert (tmp_path / "figure.png").stat().st_size > 5_000
    path, body, head = server.asked[0]
    assert path == "/v1/rank" and len(body["candidates"]) == 100 and body["model"] == "m"
    assert "Authorization: Bearer secret" in head
    assert json.loads(json.dumps(found)) == found


def test_a_pause_of_the_service_is_charged_to_all_who_came_in_it():
    """A closed loop would have seen one slow answer."""
    free, lock = [0.0], threading.Lock()

    def one_after_another(path: str, body: bytes):
        with lock:
            now = asyncio.get_running_loop().time()
            busy = 0.4 if len(server.asked) == 30 else 0.0005
            free[0] = max(free[0], now) + busy
            return 200, {}, free[0] - now

    server = Server(one_after_another)
    with server.running() as url:
        found = bench.bench(url, **{**SMALL, "warm_up": 0.0})
    assert found["max_ms"] > 350
    assert found["p95_ms"] > 200  # a third of the requests came in the pause


def test_errors_by_status_and_the_service_that_hangs_up():
    count = itertools.count()

    def moody(path: str, body: bytes):
        return ((200, {}, 0), (503, {}, 0), (200, {}, 5.0), (0, {}, 0), (200, {}, 0))[next(count) % 5]

    with Server(moody).running() as url:
        found = bench.bench(url, **SMALL, timeout_s=0.2)
    # A connection that had answered before and is closed instead of answering is tried again on a new one.
    assert found["errors"]["503"] > 3 and found["errors"]["timeout"] > 3
    good = found["kinds"]["short"]["n"]
    assert good == found["requests"] - sum(found["errors"].values()) and found["p99_ms"] < 200
    assert found["errors_latency"]["max_ms"] >= 200


def test_nothing_but_errors_has_no_latency(tmp_path):
    with Server(lambda path, body: (503, {}, 0)).running() as url:
        found = bench.bench(url, **SMALL, out=tmp_path / "figure.png")
    assert found["p50_ms"] is None and found["error_share"] == 1 and found["throughput_per_s"] == 0
    bench.show(found)


def test_users_and_items_are_asked_of_the_service():
    def service(path: str, body: bytes):
        if path.startswith("/v1/users?"):
            return 200, {"users": ["x y", 2, 3, 4]}, 0
        if path.startswith("/v1/users/"):
            events = {"x%20y": 3, "2": 9, "3": 1, "4": 30}[path.rpartition("/")[2]]
            return 200, {"user": 0, "columns": {}, "history": {"seen": [{}] * events, "other": [{}]}}, 0
        if path == "/v1/recommend":
            return 200, {"retrieved": [{"id": i} for i in (7, 8)], "items": []}, 0
        return 200, {}, 0

    server = Server(service)
    options = {"rate": 60.0, "seconds": 1.0, "warm_up": 0.0, "candidates": 2}
    with server.running() as url:
        found = bench.bench(url, **options)
        asked = [body for path, body, _ in server.asked if path == "/v1/rank"]
        assert {body["user"] for body in asked} == {"x y", 2, 3, 4}
        assert all(sorted(body["candidates"]) == [7, 8] for body in asked)
        assert found["users"] == 4 and found["kinds"]["long"]["n"] > 5 and found["kinds"]["repeated"]["n"] > 5
        server.asked.clear()
        bench.bench(url, **options, recommend=True, users=["u"])
        assert {path for path, _, _ in server.asked} == {"/v1/recommend"}
        assert server.connections < 60  # kept and used again


@pytest.mark.parametrize(
    ("url", "changes", "message"),
    [
        ("http://example.invalid", {}, "needs --remote"),
        ("ftp://127.0.0.1", {}, "not the address"),
        ("http://127.0.0.1:99999999", {}, "not the address"),
        ("http://127.0.0.1:9", {}, "is the service running"),
        ("http://127.0.0.1:9", {"rate": 1e6}, "at most"),
        ("http://127.0.0.1:9", {"seconds": 4000.0}, "at most"),
        ("http://127.0.0.1:9", {"warm_up": 1.0}, "shorter than the whole"),
        ("http://127.0.0.1:9", {"long": 1.5}, "within 0 and 1"),
    ],
)
def test_what_cannot_be_done_says_why(url, changes, message):
    given = {**SMALL, "users": [], **changes}
    with pytest.raises(InputError, match=message):
        bench.bench(url, **given)


def test_a_service_that_shows_no_users_names_the_way_out():
    with Server(lambda path, body: (404, {}, 0)).running() as url, pytest.raises(InputError, match="--users FILE"):
        bench.bench(url, rate=10, seconds=1, warm_up=0)
    with Server(lambda p, b: (200, {"users": []}, 0)).running() as url, pytest.raises(InputError, match="knows no"):
        bench.bench(url, rate=10, seconds=1, warm_up=0)


def test_the_client_gives_up_on_what_is_not_http_and_never_mixes_answers():
    def behave(path: str, body: bytes):
        number = json.loads(body)["n"]
        return 200, {"n": number}, 0.3 if number % 3 == 0 else 0.0

    async def story(url: str) -> None:
        client = Client(url, connections=4)

        async def ask(n: int) -> None:
            try:
                answer = await client.post("/x", json.dumps({"n": n}).encode(), 0.1)
            except asyncio.TimeoutError:
                assert n % 3 == 0
            else:
                assert json.loads(answer.body) == {"n": n} and n % 3

        await asyncio.gather(*(ask(n) for n in range(60)))
        client.close()

    with Server(behave).running() as url:
        bench.in_loop(story(url))

    async def rubbish() -> None:
        async def talk(reader, writer):
            await reader.read(100)
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0)
        client = Client(f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
        with pytest.raises(Lost, match="Content-Length"):
            await client.get("/")
        client.close()
        server.close()

    asyncio.run(rubbish())


def test_the_command_reads_files_and_prints_json(tmp_path, capsys):
    (tmp_path / "users").write_text("1\nanna\n\n")
    (tmp_path / "items").write_text("5\n-6\n")
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true")
    bench.add(lambda name, run, help, overridable: parser)
    with Server(fine).running() as url:
        words = [url, "--users", str(tmp_path / "users"), "--items", str(tmp_path / "items"), "--json"]
        words += ["--rate", "30", "--seconds", "0.5", "--warm-up", "0"]
        bench.run(parser.parse_args(words))
        found = json.loads(capsys.readouterr().out)
        assert found["users"] == 2 and found["items"] == 2 and found["requests"] > 3
        bench.run(parser.parse_args([word for word in words if word != "--json"]))
        assert "answers a second" in capsys.readouterr().out
    (tmp_path / "items").write_text("\n")
    with pytest.raises(InputError, match="no ids"):
        bench.read_ids(tmp_path / "items")
    with pytest.raises(InputError, match="No such file"):
        bench.read_ids(tmp_path / "none")

"""What a store has acknowledged is there: after kill -9, after an outage of Redis, on a disk that is full."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from pathlib import Path

import pytest

from benchmarks.store_faults import SCHEMA, event, killed, lost_or_doubled
from scalerec.serving.lmdb_store import LMDBStore
from scalerec.serving.store import Remembered, StoreUnavailable, open_store
from tests.redis_server import BINARY, MISSING, RedisServer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    if BINARY is None:
        pytest.skip(MISSING)
    (tmp_path / "redis").mkdir()
    server = RedisServer(tmp_path / "redis")
    server.start()
    yield server
    server.kill()


@pytest.mark.slow
def test_kill_9_during_writes_loses_and_doubles_nothing(tmp_path: Path) -> None:
    url, told = f"lmdb:{tmp_path / 'store'}", []
    for kill in range(4):
        told += killed(url, seconds=0.15 + 0.1 * kill, first=kill)
        assert len(set(told)) == len(told) > 0
        assert lost_or_doubled(url, told) == ([], [])
    # Two writers at once, one of which is killed.
    told += killed(url, seconds=0.3, first=90, beside=True)
    assert lost_or_doubled(url, told) == ([], [])


@pytest.mark.slow
def test_the_check_finds_what_is_lost_and_what_is_doubled(tmp_path: Path) -> None:
    """The comparison can fail."""
    url = f"lmdb:{tmp_path / 'store'}"
    store = open_store(url, SCHEMA)
    store.append([event("1 0"), event("1 1")])
    twice = event("1 2")
    store.append([twice, twice._replace(event_id="another id")])
    store.close()
    assert lost_or_doubled(url, ["1 0", "1 7"]) == (["1 7"], ["1 2"])


@pytest.mark.slow
def test_redis_stopped_and_started_again(server: RedisServer) -> None:
    store = Remembered(open_store(server.url, SCHEMA), retry_s=0.2)
    assert store.append([event("1 0"), event("1 1")]) == [True, True]
    fresh = store.known(1)
    assert not fresh.stale and len(fresh.history["all"]) == 2
    server.kill()
    began = time.monotonic()
    assert store.known(1) == fresh._replace(stale=True)
    assert store.known("nobody") == ({}, [], True, None)
    with pytest.raises(StoreUnavailable):
        store.append([event("1 2")])
    assert not store.healthy()
    assert time.monotonic() - began < 3
    server.start()
    time.sleep(0.25)
    assert store.known(1) == fresh
    assert store.append([event("1 1"), event("1 2")]) == [False, True]
    assert store.healthy() and store.count() == 3
    store.close()


@pytest.mark.slow
def test_a_service_may_start_before_its_redis(server: RedisServer) -> None:
    server.kill()
    store = Remembered(open_store(server.url, SCHEMA), retry_s=0.1)
    assert store.known(1) == ({}, [], True, None)
    server.start()
    time.sleep(0.15)
    assert store.append([event("1 0")]) == [True]
    assert not store.known(1).stale
    store.close()


@pytest.mark.slow
def test_redis_without_memory_refuses_and_loses_nothing(server: RedisServer) -> None:
    server.kill()
    server.options = ("--maxmemory", "3mb", "--maxmemory-policy", "noeviction")
    server.start()
    store = open_store(server.url, SCHEMA)
    kept = 0

    def fill() -> None:
        nonlocal kept
        while kept < 500:
            store.append([event(f"{kept} {i}") for i in range(100)])
            kept += 1

    with pytest.raises(StoreUnavailable, match=r"full, .*maxmemory"):
        fill()
    assert kept and all(len(store.history(user)["all"]) == 100 for user in range(kept))
    store.close()


def grow(folder: Path) -> None:
    """In another process: more events than the map has room for at first."""
    store = LMDBStore(folder, SCHEMA, first_bytes=1 << 16)
    for user in range(100, 130):
        store.append([event(f"{user} {number}") for number in range(100)])
    store.close()


@pytest.mark.slow
def test_a_map_that_another_process_let_grow_is_taken_over(tmp_path: Path) -> None:
    ours = LMDBStore(tmp_path / "store", SCHEMA, first_bytes=1 << 16)
    ours.append([event("1 0")])
    other = get_context("forkserver").Process(target=grow, args=(tmp_path / "store",))
    other.start()
    other.join()
    assert other.exitcode == 0
    assert len(ours.history(110)["all"]) == 100 and ours.count() == 3001
    assert ours.append([event("1 0"), event("1 1")]) == [False, True]
    assert (tmp_path / "store" / "data.mdb").stat().st_size > 1 << 16
    ours.close()


# A real disk with a limit needs root; a limit on the size of files makes the same write fail.
FULL = """
import resource, signal, sys
from benchmarks.store_faults import SCHEMA, event
from scalerec.serving.store import StoreUnavailable, open_store
store = open_store(sys.argv[1], SCHEMA)
store.append([event(f"{user} 0") for user in range(50)])
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
import os
size = os.stat(sys.argv[1].partition(":")[2] + "/data.mdb").st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 8192, hard))
try:
    store.append([event(f"{user} 1") for user in range(50, 3000)])
    sys.exit("it was written")
except StoreUnavailable as error:
    print(error)
print(store.count(), len(store.history(7)["all"]), store.history(77))
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
print(sum(store.append([event(f"{user} 1") for user in range(3000)])), store.count())
"""


@pytest.mark.slow
def test_a_full_disk_is_said_and_nothing_is_lost(tmp_path: Path) -> None:
    url = f"lmdb:{tmp_path / 'store'}"
    done = subprocess.run(
        [sys.executable, "-c", FULL, url], env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said, after, again = done.stdout.splitlines()
    assert "not written, the disk is full or failing" in said and said.endswith("nothing was lost")
    assert after == "50 1 {}"
    assert again == "3000 3050"

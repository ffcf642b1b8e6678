"""A bundle with random weights over a made-up log, the histories of its users, and a service of it as a process.

Random weights cost as much to compute with as trained ones, and nothing measured here depends on how good a score is.
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from scalerec import checkpoint
from scalerec.data.reader import ParquetRows
from scalerec.data.sources.parquet import Parquet
from scalerec.features.encoder import Encoder
from scalerec.inference.bundle import export
from scalerec.inference.rows_of import user_rows
from scalerec.models.base import ModelConfig
from scalerec.schema import Categorical, Cross, Feature, Group, Numeric, Schema, SequenceField, Task
from scalerec.schema import Sequence as Past
from scalerec.serving.bench import in_loop
from scalerec.serving.client import Client
from scalerec.serving.seed import seed_from
from scalerec.serving.store import open_store
from scalerec.training.run import Run, TrainingConfig

NOW = 1.7e9
STARTED_WITHIN = 300.0  # seconds
KEPT = 2.0  # seconds that an idle connection surely stays open; uvicorn closes it after five


@dataclass(frozen=True)
class World:
    """What a service is started with."""

    folder: Path
    schema: Schema
    short: list[int]  # users with histories below the median, and above
    long: list[int]
    items: list[int]

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    @property
    def state(self) -> str:
        return f"lmdb:{self.folder / 'state'}"

    @property
    def users_file(self) -> Path:
        return self.folder / "users.parquet"


def ranking_schema(events: int, dim: int) -> Schema:
    """A feed: profile, past of up to `events`, item and moment; twelve features and two tasks."""
    groups = (
        _group("profile", "user", Categorical(name="user"), Categorical(name="city"), Categorical(name="gender"),
               Numeric(name="age", buckets=16)),
        _group("past", "user", Past(name="watched", fields=(SequenceField(of="item"), SequenceField(of="author")),
                                    time=True, max_len=events)),
        _group("item", "item", Categorical(name="item"), Categorical(name="author"), Categorical(name="category"),
               Numeric(name="duration", buckets=32)),
        _group("moment", "item", Categorical(name="hour"), Categorical(name="device"),
               Cross(name="city_category", of=("city", "category"), buckets=2**12)),
    )  # fmt: skip
    return _schema(groups, dim)


def sequence_schema(events: int, dim: int) -> Schema:
    """The item and nothing else, for a model on the past alone."""
    groups = (
        _group("past", "user", Past(name="watched", fields=(SequenceField(of="item"),), time=True, max_len=events)),
        _group("item", "item", Categorical(name="item")),
    )
    return _schema(groups, dim)


def _group(name: str, side: Any, *features: Feature) -> Group:
    return Group(name=name, side=side, features=features)


def _schema(groups: tuple[Group, ...], dim: int) -> Schema:
    tasks = (Task(name="click"), Task(name="like"))
    return Schema(groups=groups, tasks=tasks, user="user", item="item", time="time", dim=dim)


def make_log(lengths: Sequence[int], items: int, seed: int = 0) -> pa.Table:
    """The rows of users 1, 2, ... with so many events each within a year, all events in the order of time."""
    random = np.random.default_rng(seed)
    user = np.repeat(np.arange(1, len(lengths) + 1), lengths)
    item = random.integers(1, items + 1, len(user))
    time = np.floor(NOW - random.uniform(0, 3.15e7, len(user)))
    order = np.argsort(time, kind="stable")
    user, item, time = user[order], item[order], time[order]
    return pa.table(
        {
            "user": user, "item": item, "time": time, "city": user % 97, "gender": user % 3, "age": 18.0 + user % 60,
            "author": item % 1999, "category": item % 53, "duration": 5.0 + (item * 7919) % 600,
            "hour": random.integers(0, 24, len(user)), "device": random.integers(0, 5, len(user)),
            "click": random.integers(0, 2, len(user)), "like": random.integers(0, 2, len(user)),
        }
    )  # fmt: skip


def make(folder: Path, name: str, model: ModelConfig, schema: Schema, lengths: Sequence[int], items: int) -> World:
    """Write the log, a checkpoint with random weights, its bundle, the users' rows and histories into `folder`."""
    folder.mkdir(parents=True)
    log = make_log(lengths, items)
    pq.write_table(log, folder / "log.parquet")
    (folder / "schema.json").write_text(schema.model_dump_json())
    source = Parquet(path=str(folder / "log.parquet"), schema_file=str(folder / "schema.json"))
    run = Run(name=name, data=source, model=model, training=TrainingConfig(select="last"))
    rows = ParquetRows.of(source, source.prepare())
    encoder = Encoder.fit(schema, rows.batches("train", schema.input_columns()))
    torch.manual_seed(0)
    weights = model.build(encoder.layout).eval().state_dict()
    checkpoint.save(folder / "run", run.model_dump(mode="json"), encoder, encoder.layout, weights, {}, {"step": 0})
    del weights
    export(folder / "run", folder / "bundle", name=name)
    pq.write_table(user_rows(folder / "run"), folder / "users.parquet")
    store = open_store(f"lmdb:{folder / 'state'}", schema)
    seed_from(source, store)
    store.close()
    middle = float(np.median(lengths))
    users = {long: [u for u, n in enumerate(lengths, 1) if (n > middle) == long] for long in (False, True)}
    known = pq.read_table(folder / "bundle" / "items.parquet", columns=["item"])["item"].to_pylist()
    return World(folder, schema, users[False], users[True], known)


# -- a service as a process

CHILD = """
import sys
from functools import partial
from scalerec.serving import command, models
plain = command.settings_of
changes = {}
if "alone" in sys.argv[1].split(","):
    changes = {"batch_rows": 1, "batch_wait_ms": 0.0}
if "unshared" in sys.argv[1].split(","):
    models.Engine = partial(models.Engine, share=False)
command.settings_of = lambda options: plain(options).model_copy(update=changes)
import argparse
parser = argparse.ArgumentParser()
commands = parser.add_subparsers()
def add(name, run, help, overridable):
    made = commands.add_parser(name)
    made.add_argument("--json", action="store_true")
    made.set_defaults(run=run)
    return made
command.add(add)
options = parser.parse_args(sys.argv[2:])
options.run(options)
"""


class Process:
    """A server in a process of its own, which says its address in a line of JSON on standard output."""

    def __init__(self, command: Sequence[str], environment: dict[str, str], ready: str):
        """Returns once GET `ready` is answered with 200."""
        self.child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.said: deque[str] = deque(maxlen=50)
        threading.Thread(target=self._listen, daemon=True).start()
        self.url = self._address()
        self._wait(ready)

    def _listen(self) -> None:
        assert self.child.stderr is not None
        for line in self.child.stderr:
            self.said.append(line)

    def _address(self) -> str:
        assert self.child.stdout is not None
        for line in self.child.stdout:
            if line.startswith("{"):
                return json.loads(line)["url"]
        self.child.wait(10)
        raise SystemExit("the service did not start:\n" + "".join(self.said))

    def _wait(self, path: str) -> None:
        until = time.monotonic() + STARTED_WITHIN
        while time.monotonic() < until and self.child.poll() is None:
            connection = http.client.HTTPConnection(self.url.removeprefix("http://"), timeout=10)
            try:
                connection.request("GET", path)
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            finally:
                connection.close()
            time.sleep(0.1)
        self.stop()
        raise SystemExit(f"the service did not answer {path}:\n" + "".join(self.said))

    @property
    def memory(self) -> float:
        """Resident MiB of the process and its children."""
        import psutil

        whole = psutil.Process(self.child.pid)
        return sum(part.memory_info().rss for part in [whole, *whole.children(recursive=True)]) / 2**20

    def stop(self) -> None:
        """End it and its children, politely first."""
        if self.child.poll() is None:
            self.child.terminate()
            try:
                self.child.wait(20)
            except subprocess.TimeoutExpired:
                pass
        try:
            os.killpg(self.child.pid, signal.SIGKILL)  # its own session: nobody else's processes
        except ProcessLookupError:
            pass
        self.child.wait()


@contextmanager
def serving(
    world: World, *, threads: int, switches: Sequence[str] = (), state: str = "", words: Sequence[str] = ()
) -> Iterator[Process]:
    """`scalerec serve` of the world, with as many requests a second as come; switches "alone", "unshared"."""
    command = [sys.executable, "-c", CHILD, ",".join(switches), "serve", str(world.bundle), "--json", "--port", "0"]
    command += ["--state", state or world.state, "--users", str(world.users_file), "--rate", "0"]
    command += ["--drain-seconds", "0", "--threads", str(threads), *words]
    process = Process(command, os.environ | {"OMP_NUM_THREADS": str(threads)}, "/readyz")
    try:
        yield process
    finally:
        process.stop()


# -- clients that wait for their answers


class Caller:
    """One client on one kept connection, blocking: nothing of an event loop in its times."""

    def __init__(self, url: str):
        self.connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=300)
        self.asked = 0.0

    def post(self, path: str, body: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        """Seconds until the answer was there, and the answer."""
        text = json.dumps(body)
        if self.asked and time.perf_counter() - self.asked > KEPT:  # the service may have closed it
            self.connection.close()
            self.connection.connect()
        start = time.perf_counter()
        self.connection.request("POST", path, text, {"Content-Type": "application/json"})
        answer = self.connection.getresponse()
        content = answer.read()
        self.asked = time.perf_counter()
        seconds = self.asked - start
        if answer.status != 200:
            raise SystemExit(f"{path}: {answer.status} {content[:500].decode(errors='replace')}")
        return seconds, json.loads(content)

    def close(self) -> None:
        self.connection.close()


def requests_a_second(
    url: str, path: str, bodies: Iterator[tuple[bytes, tuple[str, ...]]], *, clients: int, seconds: float,
    warm_up: float = 1.0,
) -> tuple[float, list[float]]:  # fmt: skip
    """Of clients that each ask again when they are answered: answers a second, and milliseconds, after the warm-up."""

    async def story() -> tuple[float, list[float]]:
        client = Client(url, connections=clients)
        start = time.perf_counter()
        took: list[float] = []

        async def ask_again() -> None:
            while (sent := time.perf_counter()) < start + warm_up + seconds:
                answer = await client.post(path, next(bodies)[0], 60.0)
                if answer.status != 200:
                    raise SystemExit(f"{path}: {answer.status} {answer.body[:300].decode(errors='replace')}")
                done = time.perf_counter()
                if start + warm_up <= done <= start + warm_up + seconds:
                    took.append(1e3 * (done - sent))

        await asyncio.gather(*(ask_again() for _ in range(clients)))
        client.close()
        return len(took) / seconds, took

    return in_loop(story())

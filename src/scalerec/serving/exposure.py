"""The exposure log: what was shown to whom, from which columns, encoded how, with which scores; Parquet files.

One row a shown item: request_id, served_at, time (of the request, in the log's unit), model, version, bucket (null
where the request named its model), user, item, place, score, `score.<task>`, `raw.<column>`, `encoded.<feature>`.

Requests go into a queue of fixed length; a thread of its own makes rows of them and writes a file when it has enough
or the oldest has waited long enough. What does not fit into the queue or on the disk is dropped and counted: showing
items goes on. A process that is killed loses the rows that were not in a file yet.
"""

from __future__ import annotations

import os
import queue
import random
import re
import threading
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from scalerec.errors import InputError
from scalerec.features.encoded import encoded_columns
from scalerec.inference.engine import Ask, Engine
from scalerec.serving import logs
from scalerec.serving.metrics import Metrics
from scalerec.serving.settings import Settings

_TICK = 0.5  # seconds between looks at the clock
_HELD_BYTES = 256 << 20  # of rows in memory, however few they are
_TOGETHER, _TOGETHER_ROWS = 64, 4_096  # requests made into rows at once; each row carries its user's history


class Shown(NamedTuple):
    """One request that was answered."""

    request_id: str
    served_at: float  # seconds since 1970
    engine: Engine
    bucket: int | None
    ask: Ask  # its candidates are the shown items, best first
    fused: np.ndarray  # [k]
    scores: np.ndarray  # [k, tasks]


class ExposureLog:
    """Takes requests without waiting; writes them from a thread of its own."""

    def __init__(self, settings: Settings, metrics: Metrics):
        assert settings.exposures is not None
        self.folder, self.rate = settings.exposures, settings.exposure_rate
        self.rows, self.seconds = settings.exposure_rows, settings.exposure_seconds
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"--exposures {self.folder}: {error.strerror or error}") from None
        self._written = metrics.exposed.labels("written")
        self._dropped = {why: metrics.exposed.labels(f"dropped_{why}") for why in ("queue", "disk", "columns")}
        self._queue: queue.Queue[Shown | None] = queue.Queue(settings.exposure_queue)
        self._held: dict[tuple[str, str], list[pa.Table]] = {}
        self._held_rows = self._held_bytes = 0
        self._since: float | None = None  # when the oldest held row came
        self._number = 0
        self._disk, self._columns = logs.Once("exposures"), logs.Once("exposure_columns")
        self._random = random.Random()
        self._thread = threading.Thread(target=self._run, name="scalerec-exposures", daemon=True)
        self._thread.start()

    def offer(self, shown: Shown) -> None:
        """Log a request if it is drawn; never waits."""
        if self.rate < 1 and self._random.random() >= self.rate:
            return
        try:
            self._queue.put_nowait(shown)
        except queue.Full:
            self._dropped["queue"].inc(len(shown.ask.candidates))

    def depth(self) -> int:
        return self._queue.qsize()

    def close(self, grace_s: float = 10.0) -> None:
        """Write what there is; blocks until then."""
        try:
            self._queue.put(None, timeout=grace_s)
        except queue.Full:
            return
        self._thread.join(grace_s)

    # -- the writing thread

    def _run(self) -> None:
        while True:
            shown = self._waiting()
            by_engine: dict[int, list[Shown]] = {}
            for one in shown:
                if one is not None:
                    by_engine.setdefault(id(one.engine), []).append(one)
            for its in by_engine.values():
                self._take(its)
            if None in shown:
                self._write()
                return
            self._write_if_due()

    def _waiting(self) -> list[Shown | None]:
        """What is in the queue, at most `_TOGETHER`: encoded at once it takes a fraction of the time."""
        found: list[Shown | None] = []
        rows = 0
        try:
            found.append(self._queue.get(timeout=_TICK))
            while len(found) < _TOGETHER and found[-1] is not None:
                rows += len(found[-1].ask.candidates)
                if rows >= _TOGETHER_ROWS:
                    break
                found.append(self._queue.get_nowait())
        except queue.Empty:
            pass
        return found

    def _take(self, shown: list[Shown]) -> None:
        """Rows of requests to one engine."""
        try:
            table = rows_of(shown)
            self._columns.worked()
        except Exception as error:  # a request that was served may still not fit into columns; never end the thread
            if len(shown) > 1:
                for one in shown:
                    self._take([one])
                return
            self._columns.failed(error)
            self._dropped["columns"].inc(len(shown[0].ask.candidates))
            return
        engine = shown[0].engine
        self._held.setdefault((engine.bundle.name, engine.bundle.version), []).append(table)
        self._held_rows, self._held_bytes = self._held_rows + len(table), self._held_bytes + table.nbytes
        self._since = self._since or time.monotonic()

    def _write_if_due(self) -> None:
        full = self._held_rows >= self.rows or self._held_bytes >= _HELD_BYTES
        if full or (self._since is not None and time.monotonic() - self._since >= self.seconds):
            self._write()

    def _write(self) -> None:
        """One file for each model's rows, complete before it has its name."""
        held, self._held, self._since = self._held, {}, None
        self._held_rows = self._held_bytes = 0
        for (model, version), tables in ((key, some) for key, all_of in held.items() for some in _alike(all_of)):
            rows = sum(map(len, tables))
            try:
                write_file(self._path(model, version), tables)
                self._written.inc(rows)
                self._disk.worked()
            except (OSError, pa.ArrowException) as error:
                self._dropped["disk" if isinstance(error, OSError) else "columns"].inc(rows)
                self._disk.failed(error)

    def _path(self, model: str, version: str) -> Path:
        self._number += 1
        now = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%S")
        name = re.sub(r"[^\w.-]", "_", model).lstrip("._") or "model"
        return self.folder / f"{name}-{version}-{now}-{os.getpid()}-{self._number:06d}.parquet"


def rows_of(shown: Sequence[Shown]) -> pa.Table:
    """The rows of requests to one engine."""
    engine, asks = shown[0].engine, [one.ask for one in shown]
    request = np.repeat(np.arange(len(shown)), [len(ask.candidates) for ask in asks])

    def each(values: list[Any], kind: pa.DataType | None = None) -> pa.Array:
        """A value a request, for all its rows."""
        return pa.array(values, kind).take(pa.array(request))

    moments = [datetime.fromtimestamp(one.served_at, timezone.utc) for one in shown]
    utc = pa.timestamp("us", "UTC")
    timeless = asks[0].now is None
    columns: dict[str, pa.Array] = {
        "request_id": each([one.request_id for one in shown]),
        "served_at": each(moments, utc),
        "time": each(moments, utc) if timeless else each([ask.now for ask in asks]),
        "model": each([engine.bundle.name] * len(shown)),
        "version": each([engine.bundle.version] * len(shown)),
        "bucket": each([one.bucket for one in shown], pa.int32()),
        "user": each([ask.user for ask in asks]),
        "item": pa.array([item for ask in asks for item in ask.candidates]),
        "place": pa.array([i + 1 for ask in asks for i in range(len(ask.candidates))], pa.int32()),
        "score": pa.array(np.concatenate([one.fused for one in shown]).astype(np.float64)),
    }
    scores = np.concatenate([one.scores for one in shown])
    columns |= {f"score.{task}": pa.array(column) for task, column in zip(engine.tasks, scores.T)}
    raw = engine.raw(asks)
    columns |= {f"raw.{name}": raw.column(name) for name in raw.schema.names}
    encoded = encoded_columns(engine.encode(asks), engine.bundle.layout)
    columns |= {f"encoded.{name}": column for name, column in encoded.items()}
    return pa.table(columns)


def _alike(tables: list[pa.Table]) -> list[list[pa.Table]]:
    """All together, or those of each schema where a request brought values of another type than the others."""
    try:
        pa.unify_schemas([table.schema for table in tables], promote_options="permissive")
        return [tables]
    except pa.ArrowException:
        apart: dict[pa.Schema, list[pa.Table]] = {}
        for table in tables:
            apart.setdefault(table.schema, []).append(table)
        return list(apart.values())


def write_file(path: Path, tables: Sequence[pa.Table]) -> None:
    """All rows in one file that has its name only when it is whole and on the disk."""
    table = pa.concat_tables(tables, promote_options="permissive")
    temporary = path.with_name(f".{path.name}")
    try:
        with temporary.open("wb") as file:
            pq.write_table(table, file, compression="zstd")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise

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
            try:
                shown = self._queue.get(timeout=_TICK)
            except queue.Empty:
                self._write_if_due()
                continue
            if shown is None:
                self._write()
                return
            self._take(shown)
            self._write_if_due()

    def _take(self, shown: Shown) -> None:
        try:
            table = rows_of(shown)
            self._columns.worked()
        except Exception as error:  # a request that was served may still not fit into columns; never end the thread
            self._columns.failed(error)
            self._dropped["columns"].inc(len(shown.ask.candidates))
            return
        key = (shown.engine.bundle.name, shown.engine.bundle.version)
        self._held.setdefault(key, []).append(table)
        self._since = self._since or time.monotonic()

    def _write_if_due(self) -> None:
        held = sum(len(table) for tables in self._held.values() for table in tables)
        if held >= self.rows or (self._since is not None and time.monotonic() - self._since >= self.seconds):
            self._write()

    def _write(self) -> None:
        """One file for each model's rows, complete before it has its name."""
        held, self._held, self._since = self._held, {}, None
        for (model, version), tables in held.items():
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


def rows_of(shown: Shown) -> pa.Table:
    """The rows of one request."""
    engine, ask, count = shown.engine, shown.ask, len(shown.ask.candidates)
    served_at = datetime.fromtimestamp(shown.served_at, timezone.utc)

    def same(value: Any, kind: pa.DataType | None = None) -> pa.Array:
        return pa.array([value] * count, kind)

    columns: dict[str, pa.Array] = {
        "request_id": same(shown.request_id),
        "served_at": same(served_at, pa.timestamp("us", "UTC")),
        "time": same(served_at, pa.timestamp("us", "UTC")) if ask.now is None else same(ask.now),
        "model": same(engine.bundle.name),
        "version": same(engine.bundle.version),
        "bucket": same(shown.bucket, pa.int32()),
        "user": same(ask.user),
        "item": pa.array(list(ask.candidates)),
        "place": pa.array(np.arange(1, count + 1, dtype=np.int32)),
        "score": pa.array(shown.fused.astype(np.float64)),
    }
    columns |= {f"score.{task}": pa.array(column) for task, column in zip(engine.tasks, shown.scores.T)}
    raw = engine.raw(ask)
    columns |= {f"raw.{name}": raw.column(name) for name in raw.schema.names}
    encoded = encoded_columns(engine.encode([ask]), engine.bundle.layout)
    columns |= {f"encoded.{name}": column for name, column in encoded.items()}
    return pa.table(columns)


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

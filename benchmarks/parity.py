"""A test split replayed through HTTP, each event posted as it happened, against offline evaluation of the same run.

    python -m benchmarks.parity RUN [--rows N] [--precision fp32 bf16 int8] [--state memory:] [--json]

The run is exported, a service of its own is started on loopback, and every event of the log is posted in order. Before
an event of the test part is posted, its row is asked for as a candidate. Columns that the log's pipeline works out
(running rates, clocks) come with the request, as a feature store would give them; histories are the service's own.
`auc_difference` and `uauc_difference` are the largest over the tasks, `score_difference` over all rows and tasks.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import torch
from rich.console import Console
from rich.table import Table as Grid

from scalerec import checkpoint, evaluate
from scalerec.config import component
from scalerec.data.parts import earlier
from scalerec.data.reader import ParquetRows
from scalerec.data.source import Source
from scalerec.data.sources.sequences import Sequences
from scalerec.data.split import NoSplit
from scalerec.inference import bundle
from scalerec.schema import Categorical, Cross, Schema, Sequence

TOGETHER = 1_000  # events of one request, before the test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--rows", type=int, default=0, help="only the first rows of the test part; 0: all")
    parser.add_argument("--precision", nargs="+", default=["fp32", "bf16", "int8"])
    parser.add_argument("--state", default="memory:")
    parser.add_argument("--json", action="store_true")
    chosen = parser.parse_args()
    console = Console(stderr=True)
    saved = checkpoint.load(chosen.run)
    offline = by_evaluation(saved)
    events, asked = the_log(saved, offline, chosen.rows)
    found: dict[str, Any] = {"run": str(saved.run["name"]), "rows": len(asked), "events": len(events)}
    with tempfile.TemporaryDirectory() as folder:
        exported = bundle.export(chosen.run, Path(folder) / "bundle")
        for precision in chosen.precision:
            started = time.perf_counter()
            with service(exported.folder, precision, chosen.state, console) as client:
                scores = replay(client, saved.encoder.schema, list(saved.layout.tasks), events, asked, console)
            measured = compared(offline, asked, scores, list(saved.layout.tasks))
            measured["seconds"] = round(time.perf_counter() - started, 1)
            found |= {f"{key}_{precision}": value for key, value in measured.items()}
            console.print(precision, measured)
    grid = Grid("precision", *measured, title=f"{found['run']}, {len(asked):,} test rows through HTTP")
    for precision in chosen.precision:
        grid.add_row(precision, *(f"{found[f'{key}_{precision}']:.3g}" for key in measured))
    Console().print(grid)
    if chosen.json:
        print(json.dumps(found))


def by_evaluation(saved: checkpoint.Checkpoint) -> evaluate.Predictions:
    """What offline evaluation says of every test row."""
    source = component(saved.run["data"])
    assert isinstance(source, Source)
    rows = ParquetRows.of(source, source.prepare())
    pieces = rows.pieces("test", [*saved.encoder.schema.input_columns(), *saved.encoder.schema.label_columns()])
    batches = (saved.encoder.encode(piece.rows, index=piece.index, where="test") for piece in pieces)
    parts = (batch.take(part) for batch in batches for part in torch.arange(len(batch)).split(evaluate.BATCH))
    return evaluate.predict(saved.model(), parts)


def the_log(saved: checkpoint.Checkpoint, offline: evaluate.Predictions, most: int) -> tuple[list, list[int]]:
    """All events of the log by time, as (row number or -1, columns), and the rows that are asked for."""
    source = component(saved.run["data"])
    assert isinstance(source, Source)
    inner = source.of if isinstance(source, Sequences) else source
    prepared = inner.prepare()
    rows = ParquetRows(prepared.files, NoSplit())
    lists = {column for sequence in inner.schema().sequences for column in sequence.list_columns()}
    names = [name for name in rows.columns if name not in lists]
    schema = saved.encoder.schema
    assert schema.time is not None
    events: list[tuple[int, dict[str, Any]]] = []
    before = earlier(prepared.files)
    if before is not None:
        events += [(-1, row) for row in before.read().to_pylist()]
    for piece in rows.pieces("train", names):
        kept = piece.rows.select([name for name in names if name in piece.rows.schema.names])
        events += zip(piece.index.tolist(), pa.Table.from_batches([kept]).to_pylist())
    clock = schema.time
    events.sort(key=lambda event: event[1][clock])  # stable: equal times in the order of the log
    tested = set(offline.index.tolist())
    asked = [row for row, _ in events if row in tested]
    asked = asked[:most] if most else asked
    last = {row: place for place, (row, _) in enumerate(events)}[asked[-1]]
    return events[: last + 1], asked


@contextlib.contextmanager
def service(folder: Path, precision: str, state: str, console: Console) -> Iterator[httpx.Client]:
    """A service of the bundle in a process of its own."""
    command = [sys.executable, "-m", "scalerec", "serve", str(folder), "--port", "0", "--precision", precision]
    process = subprocess.Popen([*command, "--state", state], stderr=subprocess.PIPE, text=True, env=os.environ)
    assert process.stderr is not None
    try:
        address = None
        for line in process.stderr:
            if match := re.search(r"http://127\.0\.0\.1:\d+", line):
                address = match[0]
                break
            console.print(line.rstrip(), markup=False)
        if address is None:
            raise SystemExit(f"the service did not start: exit code {process.wait()}")
        threading.Thread(target=process.stderr.read, daemon=True).start()  # or the pipe fills
        with httpx.Client(base_url=address, timeout=60) as client:
            for _ in range(300):  # it has the port before it answers
                with contextlib.suppress(httpx.TransportError):
                    if client.get("/readyz").status_code == 200:
                        break
                time.sleep(0.1)
            yield client
    finally:
        process.terminate()
        process.wait(30)


def replay(
    client: httpx.Client, schema: Schema, tasks: list[str], events: list, asked: list[int], console: Console
) -> np.ndarray:
    """[rows, tasks] what the service says of each asked row just before its event."""
    wanted, needed = set(asked), columns_of_events(schema)
    sides = columns_of_sides(schema)
    scores: dict[int, list[float]] = {}
    waiting: list[dict[str, Any]] = []
    assert schema.time is not None
    first = min(columns[schema.time] for row, columns in events if row in wanted)

    def post() -> None:
        for start in range(0, len(waiting), TOGETHER):
            check(client.post("/v1/events", json={"events": waiting[start : start + TOGETHER]}))
        waiting.clear()

    moment = None
    for number, (row, columns) in enumerate(events):
        if columns[schema.time] != moment and (columns[schema.time] >= first or len(waiting) >= TOGETHER):
            post()  # all of one moment at once: events of equal times do not see each other
        moment = columns[schema.time]
        if row in wanted:
            scores[row] = ask(client, schema, tasks, sides, columns)
        if columns[schema.user] is not None:
            event = {name: plain(columns.get(name)) for name in needed}
            waiting.append({**event, "event_id": f"{row}-{number}", "user": columns[schema.user], "time": moment})
        if number % 20_000 == 0:
            console.print(f"{number:,} of {len(events):,} events, {len(scores):,} rows scored", highlight=False)
    return np.array([scores[row] for row in asked])


def ask(client: httpx.Client, schema: Schema, tasks: list[str], sides: dict[str, list[str]], columns: dict) -> list:
    """The service's probabilities for one row of the log."""
    own = {name: plain(columns.get(name)) for name in sides["item"] if name not in (schema.item, schema.user)}
    body = {
        "user": columns[schema.user], "candidates": [{"id": columns[schema.item], **own}], "time": columns[schema.time],
        "context": {n: plain(columns.get(n)) for n in sides["user"] if n not in (schema.user, schema.time)},
    }  # fmt: skip
    (item,) = check(client.post("/v1/rank", json=body))["items"]
    return [item["scores"][task] for task in tasks]


def columns_of_events(schema: Schema) -> list[str]:
    """The columns of the log that the schema's sequences keep or ask."""
    names = [schema.item]
    for sequence in schema.sequences:
        for field in sequence.fields:
            feature = schema.feature(field.of)
            assert isinstance(feature, Categorical)
            names.append(field.event or feature.column or feature.name)
        for label in sequence.actions:
            names += [label, *schema.counting_columns(label)]
        names.append(sequence.where)
    return [name for name in dict.fromkeys(names) if name and name not in (schema.user, schema.time)]


def columns_of_sides(schema: Schema) -> dict[str, list[str]]:
    """The plain input columns of each side; one that both read is the user's."""
    found: dict[str, list[str]] = {"user": [], "item": []}
    for group in schema.groups:
        for feature in group.features:
            if isinstance(feature, Sequence):
                continue
            found[group.side] += feature.of if isinstance(feature, Cross) else [feature.column or feature.name]
    found["item"] = [name for name in dict.fromkeys(found["item"]) if name not in found["user"]]
    return found


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check(response: httpx.Response) -> dict[str, Any]:
    if response.status_code != 200:
        raise SystemExit(f"{response.request.url}: {response.status_code} {response.text[:500]}")
    return response.json()


def compared(offline: evaluate.Predictions, asked: list[int], scores: np.ndarray, tasks: list[str]) -> dict[str, float]:
    """The largest differences of a score, and over the tasks of AUC and UAUC."""
    place = {row: i for i, row in enumerate(offline.index.tolist())}
    rows = np.array([place[row] for row in asked])
    offline = evaluate.Predictions(*(values[rows] for values in offline))
    both = [evaluate.tables(p, tasks) for p in (offline, offline._replace(probabilities=scores.astype(np.float32)))]
    found = {"score_difference": float(np.abs(offline.probabilities - scores).max())}
    for metric in ("auc", "uauc"):
        found[f"{metric}_difference"] = max(abs(both[0][task][metric] - both[1][task][metric]) for task in tasks)
    return found


if __name__ == "__main__":
    main()

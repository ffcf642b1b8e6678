"""Requests a second at equal p99: `scalerec serve` against a LitServe service around the same model.

    python -m benchmarks.peers_serving --install      # once: LitServe into an environment of its own
    python -m benchmarks.peers_serving [--environment DIR] [--threads N] [--p99 MS] [--json]

Both serve one bundle of rankmixer.small() with random weights (`serving_world`) in fp32 with as many threads (all cores
but one, which the servers' loops and this process need), and get the same requests: one user, 20 candidates, half of
the users asked for a moment ago. Both are asked from this process, in turn. The largest rate of Poisson arrivals that a
service answers with a p99 within `--p99` milliseconds and without an error is found by halving an interval (open loop,
so a p99 holds all waiting). Without `--p99` the limit is five times the median latency of the slowest of them when one
client asks: all can keep it, none is far from its limits.

LitServe is measured twice: plain, as it comes (`peer_speedup`), and with its own batching switched on
(`peer_batching_speedup`). Its service does what its documentation shows: one worker, rows of the request put together
from tables in memory, encoded by training's encoder, scored by the model. Before anything is timed, all must give the
same scores.
"""

from __future__ import annotations

import argparse
import json
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.environment import install, python_of, say, versions, without_scalerec
from benchmarks.machine import describe_machine, options, refuse_if_busy
from benchmarks.serving_world import NOW, Caller, Process, World, make, ranking_schema, requests_a_second, serving
from scalerec.data.source import cache_root
from scalerec.features import history
from scalerec.models import rankmixer
from scalerec.serving.bench import Request, Users, arrivals, bodies, in_loop, play, summary
from scalerec.serving.client import Client
from scalerec.serving.store import open_store
from scalerec.serving.tables import UserTable

PEER = Path(__file__).parent / "peers" / "serving_litserve.py"
NEEDS = PEER.with_suffix(".txt")
CANDIDATES = 20
SAME = 1e-4
SIDES = ("ours", "peer", "peer_batching")
WARM_UP = 1.0  # seconds of each probe that are not counted


# -- the peer


def peer_variables(threads: int) -> dict[str, str]:
    """The environment's own packages, and this checkout's scalerec, whose model and encoder it serves."""
    source = Path(__file__).parents[1] / "src"
    return without_scalerec() | {"PYTHONPATH": str(source), "OMP_NUM_THREADS": str(threads)}


@contextmanager
def litserve(world: World, environment: Path, threads: int, *words: str) -> Iterator[Process]:
    with socket.socket() as door:
        door.bind(("127.0.0.1", 0))
        port = door.getsockname()[1]
    command = [str(python_of(environment)), str(PEER), "--world", str(world.folder), "--port", str(port)]
    process = Process([*command, "--threads", str(threads), *words], peer_variables(threads), "/health")
    try:
        yield process
    finally:
        process.stop()


def write_pasts(world: World) -> None:
    """What the service finds in its store and its users' rows, as one table for the peer."""
    store, users = open_store(world.state, world.schema), UserTable.load(world.users_file, world.schema.user)
    everybody = [*world.short, *world.long]
    rows = [
        {world.schema.user: user, **users.row(user), **history.as_columns(store.history(user), world.schema)}
        for user in everybody
    ]
    store.close()
    pq.write_table(pa.Table.from_pylist(rows), world.folder / "pasts.parquet")


# -- measuring


def drawn(world: World, seed: int) -> Iterator[tuple[bytes, tuple[str, ...]]]:
    users = Users(world.short, world.long)
    return bodies(users, world.items, candidates=CANDIDATES, repeated=0.5, long=0.5, seed=seed, time=NOW + 60)


def check_same(world: World, urls: dict[str, tuple[str, str]]) -> float:
    """The largest difference of a score between the services; stops where they do not do the same."""
    callers = {name: (Caller(url), path) for name, (url, path) in urls.items()}
    worst = 0.0
    for text, _ in islice(drawn(world, 99), 20):
        asked = json.loads(text)
        found = {name: caller.post(path, asked)[1] for name, (caller, path) in callers.items()}
        by_item = {row["id"]: [*row["scores"].values()] for row in found.pop("ours")["items"]}
        ours = np.array([by_item[item] for item in asked["candidates"]])
        worst = max([worst, *(float(np.abs(ours - np.array(one["scores"])).max()) for one in found.values())])
    for caller, _ in callers.values():
        caller.close()
    if not worst <= SAME:
        raise SystemExit(f"scores differ by {worst:.1e}, more than {SAME}: not the same work")
    return worst


def probe(url: str, path: str, world: World, rate: float, seconds: float, seed: int) -> dict[str, Any]:
    """Figures of an open loop at `rate`."""
    endless = drawn(world, seed)
    whole = seconds + WARM_UP
    asked = [Request(at, path, *next(endless)) for at in arrivals(rate, whole, seed).tolist()]

    async def story() -> dict[str, Any]:
        client = Client(url, connections=800)
        sent = await play(client, asked, timeout_s=20.0)
        client.close()
        return summary(sent, whole, WARM_UP)

    return in_loop(story())


def most(url: str, path: str, world: World, limit: float, seconds: float, steps: int, seed: int) -> dict[str, Any]:
    """The largest rate with a p99 within `limit` ms: from half of what 16 clients get up by halves, then halving."""
    rate = 0.5 * requests_a_second(url, path, drawn(world, seed), clients=16, seconds=seconds)[0]
    low, high, best = 0.0, 0.0, {"rate": 0.0, "p99_ms": None}
    for step in range(steps):
        found = probe(url, path, world, rate, seconds, seed + step)
        if not found["errors"] and found["p99_ms"] is not None and found["p99_ms"] <= limit:
            low, best = rate, {"rate": found["throughput_per_s"], "p99_ms": found["p99_ms"]}
        else:
            high = rate
        rate = (low + high) / 2 if high else 1.5 * rate
    return best


def measure(world: World, urls: dict[str, tuple[str, str]], given: argparse.Namespace) -> dict[str, Any]:
    """All services in turn, for as many rounds."""
    medians = {}
    for name, (url, path) in urls.items():
        _, took = requests_a_second(url, path, drawn(world, 7), clients=1, seconds=given.seconds)
        medians[name] = median(took)
    limit = given.p99 or 5 * max(medians.values())
    say(f"one client: {', '.join(f'{n} {m:.1f} ms' for n, m in medians.items())}; p99 limit {limit:.0f} ms")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in urls}
    for turn in range(given.rounds):
        for name, (url, path) in urls.items():
            found[name].append(most(url, path, world, limit, given.seconds, given.steps, 100 * turn))
            say(f"round {turn + 1}, {name}: {found[name][-1]['rate']:.0f}/s")
    figures: dict[str, Any] = {"p99_limit_ms": limit}
    for name in urls:
        figures[f"per_s_{name}"] = median(one["rate"] for one in found[name])
        kept = [one["p99_ms"] for one in found[name] if one["rate"]]
        figures[f"p99_ms_{name}"] = median(kept) if kept else None
        figures[f"alone_p50_ms_{name}"] = medians[name]
    for key, name in (("peer_speedup", "peer"), ("peer_batching_speedup", "peer_batching")):
        ratios = [a["rate"] / b["rate"] for a, b in zip(found["ours"], found[name]) if b["rate"]]
        if ratios:
            figures |= {key: median(ratios), f"{key}_low": min(ratios), f"{key}_high": max(ratios)}
    return figures


def run(given: argparse.Namespace, environment: Path, folder: Path) -> dict[str, Any]:
    lengths = [10] * 100 + [200] * 100
    world = make(folder / "world", "small", rankmixer.small(), ranking_schema(50, 32), lengths, 5_000)
    write_pasts(world)
    with ExitStack() as held:
        started = {
            "ours": (held.enter_context(serving(world, threads=given.threads)), "/v1/rank"),
            "peer": (held.enter_context(litserve(world, environment, given.threads)), "/predict"),
        }
        batching = ("--batch", "16", "--wait", "2")
        batched = held.enter_context(litserve(world, environment, given.threads, *batching))
        started["peer_batching"] = (batched, "/predict")
        urls = {name: (process.url, path) for name, (process, path) in started.items()}
        worst = check_same(world, urls)
        return measure(world, urls, given) | {"largest_difference": worst}


def show(found: dict[str, Any], machine: dict[str, Any]) -> None:
    title = (
        f"rankmixer.small(), {CANDIDATES} candidates; most requests a second with p99 <= {found['p99_limit_ms']:.0f} ms"
    )
    grid = Table("", *SIDES, title=title, caption=", ".join(f"{k} {v}" for k, v in machine.items()))
    for key, what in (("per_s", "requests/s"), ("p99_ms", "p99, ms"), ("alone_p50_ms", "p50 of one client, ms")):
        values = [found[f"{key}_{name}"] for name in SIDES]
        grid.add_row(what, *("" if value is None else f"{value:.1f}" for value in values))
    ratios = [f"{found[key]:.2f}x" if key in found else "" for key in ("peer_speedup", "peer_batching_speedup")]
    grid.add_row("ours over it", "", *ratios)
    Console().print(grid)


def arguments() -> argparse.Namespace:
    parser = options("scalerec serve against a LitServe service around the same model: requests a second at equal p99")
    place = cache_root() / "peers" / "litserve"
    parser.add_argument("--environment", type=Path, default=place, metavar="DIR", help="of the peer")
    parser.add_argument("--install", action="store_true", help="make that environment first, if need be")
    parser.add_argument("--threads", type=int, default=0, help="of each model (default: all cores but one)")
    parser.add_argument("--p99", type=float, default=0.0, metavar="MS", help="the limit that all have to keep")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=8.0, help="of a probe of one rate")
    parser.add_argument("--steps", type=int, default=7, help="probes of a service in a round")
    parser.add_argument("--quick", action="store_true", help="very short, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        given = argparse.Namespace(**{**vars(given), "rounds": 1, "seconds": 1.0, "steps": 4})
    return given


def main() -> None:
    given = arguments()
    environment = given.environment.absolute()
    if given.install and isinstance(versions(environment, PEER, peer_variables(1)), str):
        install(environment, NEEDS)
    known = versions(environment, PEER, peer_variables(1))
    if isinstance(known, str):
        say(f"skipped, nothing compared with LitServe: {known}")
        say(f"`python -m benchmarks.peers_serving --install --environment {environment}` makes it")
        return print(json.dumps({"skipped": known})) if given.json else None
    busy = refuse_if_busy(given.even_if_busy)
    machine: dict[str, Any] = describe_machine()
    given.threads = given.threads or max(1, int(machine["cores"]) - 1)
    machine["threads"] = given.threads
    with tempfile.TemporaryDirectory(prefix="scalerec-peers-") as folder:
        found = run(given, environment, Path(folder))
    show(found, machine)
    if given.json:
        peer = {f"peer_{name}": value for name, value in known.items()}
        print(json.dumps(found | machine | peer | {"rounds": given.rounds, "busy": busy, "quick": given.quick}))


if __name__ == "__main__":
    main()

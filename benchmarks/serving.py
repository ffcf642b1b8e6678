"""What serving costs beside the model, and what batching, sharing, the history cache and int8 save.

    python -m benchmarks.serving [--only overhead|batching|cache|memory] [--threads N] [--quick] [--json]

All models have random weights over a made-up log (`serving_world`), all services are `scalerec serve` in a process of
their own on this machine, asked over HTTP from this one. Everything is measured in turn, as ratios within a round,
then their median and spread.

`overhead`: rankmixer_100m, one user and 500 candidates: p50 over HTTP / p50 of the bare forward pass of the same batch,
which is encoded beforehand; `engine_overhead` is that of `Engine.rank` without HTTP. `int8_memory`: bytes of its
weights in int8 / fp32. `batching_speedup`: rankmixer.small(), 20 candidates, 16 clients that ask again when answered:
requests/s / those of the same service with `batch_rows` 1 and every candidate bringing its user along.
`cache_speedup`: HSTU, a past of 1024 events, 500 candidates: a user's first request / the second, over HTTP.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, options, refuse_if_busy
from benchmarks.serving_world import (
    NOW,
    Caller,
    World,
    make,
    ranking_schema,
    requests_a_second,
    sequence_schema,
    serving,
)
from benchmarks.turns import spread
from scalerec.inference import bundle
from scalerec.inference.engine import Ask, Engine
from scalerec.inference.precision import nbytes
from scalerec.models import rankmixer
from scalerec.models.hstu import HSTUConfig
from scalerec.serving.bench import Users, bodies
from scalerec.serving.store import open_store
from scalerec.serving.tables import UserTable

Result = TypeVar("Result")
PARTS = ("overhead", "batching", "cache", "memory")
WANTED = {"overhead": "<= 1.25", "batching_speedup": ">= 2", "cache_speedup": ">= 3", "int8_memory": "<= 0.3"}
SAME = 1e-4  # two ways to the same score may differ so much
DIM = 32  # of embeddings


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def large_world(scratch: Path, quick: bool) -> World:
    model = rankmixer.small() if quick else rankmixer.rankmixer_100m()
    return make(scratch / "large", "large", model, ranking_schema(50, DIM), [10] * 30 + [120] * 30, 5_000)


# -- overhead


def overhead(world: World, threads: int, rounds: int, candidates: int) -> dict[str, float]:
    """A request over HTTP, by the engine, and the forward pass alone, in turn."""
    engine = Engine(bundle.load(world.bundle))
    asks = asks_of(world, rounds, candidates)
    bare, inside, over = [], [], []
    with serving(world, threads=threads) as process:
        caller = Caller(process.url)
        for turn, ask in enumerate(asks):
            batch = engine.encode([ask])
            with torch.inference_mode():
                forward = timed(lambda batch=batch: engine.bundle.model(batch).logits)
            ranked = timed(lambda ask=ask: engine.rank([ask])[0].scores)
            served = caller.post("/v1/rank", {"user": ask.user, "candidates": list(ask.candidates), "time": ask.now})
            if turn < 2:  # a warm-up
                continue
            check_same(torch.sigmoid(forward[1]).numpy(), ranked[1], ask, served[1])
            for times, (seconds, _) in zip((bare, inside, over), (forward, ranked, served)):
                times.append(seconds)
        caller.close()
    p50 = {name: 1e3 * median(times) for name, times in (("bare", bare), ("engine", inside), ("http", over))}
    ratios = [a / b for a, b in zip(over, bare)]
    return {
        "overhead": p50["http"] / p50["bare"],
        "overhead_low": min(ratios),
        "overhead_high": max(ratios),
        "engine_overhead": p50["engine"] / p50["bare"],
        **{f"p50_ms_{name}": value for name, value in p50.items()},
    }


def asks_of(world: World, rounds: int, candidates: int) -> list[Ask]:
    """Requests as the service makes them of its store and its users' rows."""
    random = np.random.default_rng(1)
    store, users = open_store(world.state, world.schema), UserTable.load(world.users_file, world.schema.user)
    asks = []
    for turn in range(rounds + 2):
        user = [*world.short, *world.long][int(random.integers(len(world.short) + len(world.long)))]
        items = random.choice(world.items, min(candidates, len(world.items)), replace=False).tolist()
        asks.append(Ask(user, users.row(user), store.history(user), items, (), NOW + 60.0 * turn))
    store.close()
    return asks


def check_same(forward: np.ndarray, ranked: np.ndarray, ask: Ask, served: dict[str, Any]) -> None:
    """Stop unless all three have scored the same."""
    place = {item: i for i, item in enumerate(ask.candidates)}
    over_http = np.empty_like(ranked)
    for item in served["items"]:
        over_http[place[item["id"]]] = [*item["scores"].values()]
    worst = max(float(np.abs(ranked - other).max()) for other in (forward, over_http))
    if not worst <= SAME:
        raise SystemExit(f"scores differ by {worst:.1e}, more than {SAME}: not the same work")


def memory(world: World) -> dict[str, float]:
    """Bytes of the weights in int8 over those in fp32."""
    sizes = {p: nbytes(bundle.load(world.bundle, p, verify=False).model) for p in ("fp32", "bf16", "int8")}
    return {
        "int8_memory": sizes["int8"] / sizes["fp32"],
        "bf16_memory": sizes["bf16"] / sizes["fp32"],
        "fp32_mib": sizes["fp32"] / 2**20,
    }


# -- batching and sharing


def batching(scratch: Path, threads: int, rounds: int, seconds: float, clients: int) -> dict[str, float]:
    """The service against itself with every request alone and every candidate with its user."""
    lengths = [10] * 100 + [200] * 100
    world = make(scratch / "small", "small", rankmixer.small(), ranking_schema(50, DIM), lengths, 5_000)
    drawn = {"candidates": 20, "repeated": 0.5, "long": 0.5}
    rates: dict[str, list[float]] = {"with": [], "without": []}
    tails: dict[str, list[float]] = {"with": [], "without": []}
    with (
        serving(world, threads=threads) as usual,
        serving(world, threads=threads, switches=("alone", "unshared")) as plain,
    ):
        for turn in range(rounds):
            for name, process in (("with", usual), ("without", plain)):
                asked = bodies(Users(world.short, world.long), world.items, seed=turn, **drawn)
                rate, took = requests_a_second(process.url, "/v1/rank", asked, clients=clients, seconds=seconds)
                rates[name].append(rate)
                tails[name].append(float(np.quantile(took, 0.99)))
    return {
        **spread("batching_speedup", [a / b for a, b in zip(rates["with"], rates["without"])]),
        **{f"per_s_{name}_batching": median(values) for name, values in rates.items()},
        **{f"p99_ms_{name}_batching": median(values) for name, values in tails.items()},
        "clients": clients,
    }


# -- the history cache


def cache(
    scratch: Path, threads: int, rounds: int, events: int, candidates: int, model: HSTUConfig
) -> dict[str, float]:
    """First and second requests of users whose past was posted as events, over HTTP and by the engine."""
    lengths = [20] * 200
    world = make(scratch / "hstu", "hstu", model, sequence_schema(events, model.dim), lengths, 3_000)
    random = np.random.default_rng(2)
    served: list[tuple[float, float]] = []
    inside: list[tuple[float, float]] = []
    engine = Engine(bundle.load(world.bundle))
    with serving(world, threads=threads, state="memory:") as process:
        caller = Caller(process.url)
        for turn in range(rounds + 2):
            user = 10**6 + turn
            past = list(
                zip(random.choice(world.items, events).tolist(), (NOW - 60.0 * np.arange(events, 0, -1)).tolist())
            )
            post_events(caller, user, past)
            items = random.choice(world.items, min(candidates, len(world.items)), replace=False).tolist()
            body = {"user": user, "candidates": items}
            pair = [caller.post("/v1/rank", {**body, "time": NOW + 60.0 * ask})[0] for ask in range(2)]
            history = {"watched": tuple(past)}
            asks = [Ask(user, {}, history, items, (), NOW + 60.0 * ask) for ask in range(2)]
            own = [timed(lambda ask=ask: engine.rank([ask])[0].cached) for ask in asks]
            if own[0][1] != "misses" or own[1][1] not in ("hits", "partial_hits"):
                raise SystemExit(f"the cache said {own[0][1]} and {own[1][1]}, not a miss and a hit")
            if turn > 1:  # two for warm-up
                served.append((pair[0], pair[1]))
                inside.append((own[0][0], own[1][0]))
        caller.close()
    return {
        **spread("cache_speedup", [cold / warm for cold, warm in served]),
        **spread("cache_speedup_engine", [cold / warm for cold, warm in inside]),
        "p50_ms_cold": 1e3 * median(cold for cold, _ in served),
        "p50_ms_warm": 1e3 * median(warm for _, warm in served),
        "p50_ms_cold_engine": 1e3 * median(cold for cold, _ in inside),
        "p50_ms_warm_engine": 1e3 * median(warm for _, warm in inside),
        "history": events,
    }


def post_events(caller: Caller, user: int, past: list[tuple[int, float]]) -> None:
    """The past as the service hears of it."""
    rows = [
        {"event_id": f"{user}-{n}", "user": user, "time": when, "item": item} for n, (item, when) in enumerate(past)
    ]
    for first in range(0, len(rows), 500):
        caller.post("/v1/events", {"events": rows[first : first + 500]})


# -- all of it


def arguments() -> argparse.Namespace:
    parser = options((__doc__ or "").splitlines()[0])
    parser.add_argument("--only", action="append", choices=PARTS, help="measure this alone; again for more")
    for name, default, help in (
        ("threads", 0, "of the model, here and in the services (default: all cores)"),
        ("rounds", 15, "of single requests"), ("candidates", 500, ""),
        ("load-rounds", 5, "of 16 clients"), ("clients", 16, ""), ("load-seconds", 10, "of such a round"),
        ("history", 1024, "events of HSTU's users"), ("dim", 64, "of HSTU"), ("layers", 4, "of HSTU"),
        ("heads", 2, "of HSTU"),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default, help=help)
    parser.add_argument("--quick", action="store_true", help="very small, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        small = {"rounds": 2, "candidates": 30, "load_rounds": 1, "load_seconds": 1, "history": 40, "dim": 16}
        given = argparse.Namespace(**{**vars(given), **small, "layers": 1})
    given.only = given.only or list(PARTS)
    given.threads = given.threads or int(describe_machine()["cores"])
    return given


def measure(given: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if {"overhead", "memory"} & set(given.only):
        world = large_world(scratch, given.quick)
        if "overhead" in given.only:
            found |= overhead(world, given.threads, given.rounds, given.candidates)
        if "memory" in given.only:
            found |= memory(world)
    if "batching" in given.only:
        found |= batching(scratch, given.threads, given.load_rounds, given.load_seconds, given.clients)
    if "cache" in given.only:
        each = given.dim // given.heads
        model = HSTUConfig(
            goal="ranking", dim=given.dim, num_layers=given.layers, num_heads=given.heads, qk_dim=each, v_dim=each
        )
        found |= cache(scratch, given.threads, given.rounds, given.history, given.candidates, model)
    return found | {"rounds": given.rounds, "candidates": given.candidates}


def show(found: dict[str, Any], machine: dict[str, Any]) -> None:
    grid = Table("", "median", "spread", "wanted", caption=", ".join(f"{k} {v}" for k, v in machine.items()))
    for name, wanted in WANTED.items():
        if name in found:
            ends = [found.get(f"{name}_{end}") for end in ("low", "high")]
            between = "" if None in ends else "{:.3g} to {:.3g}".format(*ends)
            grid.add_row(name, f"{found[name]:.3g}", between, wanted)
    for name, value in found.items():
        if name.startswith(("p50", "p99", "per_s", "engine", "bf16", "cache_speedup_engine")):
            grid.add_row(name, f"{value:.4g}", "", "")
    Console().print(grid)


def main() -> None:
    given = arguments()
    busy = refuse_if_busy(given.even_if_busy)
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="scalerec-serving-") as scratch:
        found = measure(given, Path(scratch))
    machine = describe_machine()
    show(found, machine)
    if given.json:
        print(json.dumps(found | machine | {"busy": busy, "quick": given.quick}))


if __name__ == "__main__":
    main()

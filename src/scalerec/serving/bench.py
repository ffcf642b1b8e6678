"""Load on a running service as users make it: they come when they come, whether or not the last one was answered.

Open loop: the moments of sending are drawn beforehand (Poisson, seeded), and a latency counts from that moment, so that
a service which stops for a second is charged for all who came in that second.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import selectors
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import numpy as np

from scalerec.errors import InputError
from scalerec.serving.client import Answer, Client, Lost

Result = TypeVar("Result")
MOST_REQUESTS, MOST_SECONDS, MOST_RATE = 1_000_000, 3_600, 50_000
RECENT = 64  # a repeated user is one of so many last ones
CONNECTIONS = 800  # select() watches less than 1024
LATE = 0.010  # seconds behind its own timetable from which the generator is to blame


class Request(NamedTuple):
    """What to send, and when."""

    at: float  # seconds after the start
    path: str
    body: bytes
    kinds: tuple[str, ...] = ()  # "short" or "long" history, "new" or "repeated" user


class Sent(NamedTuple):
    """What became of a request; seconds after the start."""

    request: Request
    sent: float
    done: float
    status: str  # of HTTP, "timeout" or "connection"

    @property
    def latency(self) -> float:
        return self.done - self.request.at


class Users(NamedTuple):
    """Whom to ask for, in two classes by the length of their history; `long` may be empty."""

    short: list[Any]
    long: list[Any]


# -- what to send


def arrivals(rate: float, seconds: float, seed: int) -> np.ndarray:
    """Moments of a Poisson process of `rate` a second, ascending, within `seconds`."""
    random = np.random.default_rng(seed)
    number = random.poisson(rate * seconds)
    return np.sort(random.uniform(0, seconds, number))


def bodies(
    users: Users, items: Sequence[Any], *, candidates: int, repeated: float, long: float, seed: int, **more: Any
) -> Iterator[tuple[bytes, tuple[str, ...]]]:
    """Endless requests: a share `repeated` for users of a moment ago, of the others a share `long` with a long past.

    Without `items` a request is one for recommendations; `more` goes into every request.
    """
    random = np.random.default_rng([seed, 1])
    decks = {name: _deck(whom, random) for name, whom in zip(("short", "long"), users) if whom}
    recent: deque[tuple[Any, str]] = deque(maxlen=RECENT)
    while True:
        if recent and random.random() < repeated:
            (user, length), kind = recent[int(random.integers(len(recent)))], "repeated"
        else:
            length, kind = "long" if random.random() < long else "short", "new"
            length = length if length in decks else next(iter(decks))
            user = next(decks[length])
            recent.append((user, length))
        body = {"user": user, **more}
        if items:
            places = random.choice(len(items), candidates, replace=candidates > len(items))
            body["candidates"] = [items[place] for place in places.tolist()]
        yield json.dumps(body).encode(), (length, kind)


def _deck(users: Sequence[Any], random: np.random.Generator) -> Iterator[Any]:
    """Everybody in turn, shuffled again after each round."""
    while True:
        for place in random.permutation(len(users)).tolist():
            yield users[place]


async def discover(client: Client, *, most: int = 200) -> tuple[Users, list[Any]]:
    """Users by the length of their history, split at the median, and items, as the service itself tells them.

    Raises:
        InputError: it does not tell, or knows nobody.
    """
    listed = (await _json(client, f"/v1/users?prefix=&limit={most}")).get("users", [])
    if not listed:
        raise InputError("the service knows no users: post events first, or give --users FILE")
    found = [await _json(client, f"/v1/users/{quote(str(user), safe='')}") for user in listed]
    lengths = [max((len(events) for events in one["history"].values()), default=0) for one in found]
    middle = float(np.median(lengths))
    users = Users(*([u for u, n in zip(listed, lengths) if (n > middle) == long] for long in (False, True)))
    items: dict[Any, None] = {}
    for user in listed[:4]:
        body = json.dumps({"user": user, "k": 1, "retrieve": 1000, "filter_seen": False}).encode()
        answer = await client.post("/v1/recommend", body, 60.0)
        if answer.status != 200:
            raise InputError(f"/v1/recommend: {answer.status} {answer.body[:200].decode(errors='replace')}")
        items.update(dict.fromkeys(row["id"] for row in json.loads(answer.body)["retrieved"]))
    return users, list(items)


async def _json(client: Client, path: str) -> dict[str, Any]:
    answer = await client.get(path)
    if answer.status in (401, 403, 404):
        raise InputError(
            f"{path}: {answer.status}, the service does not show its users: give --users FILE and --items FILE, "
            "or --key-file with an admin's key"
        )
    if answer.status != 200:
        raise InputError(f"{path}: {answer.status} {answer.body[:200].decode(errors='replace')}")
    return json.loads(answer.body)


# -- sending


def in_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """Run `work` in a loop whose timers are not rounded to milliseconds."""
    loop = asyncio.SelectorEventLoop(selectors.SelectSelector())
    try:
        return loop.run_until_complete(work)
    finally:
        rest = asyncio.all_tasks(loop)
        for task in rest:
            task.cancel()
        if rest:
            loop.run_until_complete(asyncio.wait(rest))
        loop.close()


async def play(
    client: Client, requests: Sequence[Request], *, timeout_s: float = 10.0,
    check: Callable[[Request, Answer], None] | None = None,
) -> list[Sent]:  # fmt: skip
    """Send each request at its moment, without waiting for answers to others; `check` looks at every answer.

    Python's garbage collector rests: it would walk through all that was sent, 0.3 s for 100,000 requests, and the
    service would be charged for it.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        return await _play(client, requests, timeout_s, check)
    finally:
        if collecting:
            gc.enable()


async def _play(
    client: Client, requests: Sequence[Request], timeout_s: float, check: Callable[[Request, Answer], None] | None
) -> list[Sent]:
    start = time.perf_counter() + 0.05

    async def one(request: Request) -> Sent:
        sent = time.perf_counter() - start
        try:
            answer = await client.post(request.path, request.body, timeout_s)
            status = str(answer.status)
        except (asyncio.TimeoutError, TimeoutError):
            return Sent(request, sent, time.perf_counter() - start, "timeout")
        except (Lost, OSError):
            return Sent(request, sent, time.perf_counter() - start, "connection")
        done = time.perf_counter() - start
        if check is not None:
            check(request, answer)
        return Sent(request, sent, done, status)

    tasks = []
    for request in requests:
        wait = start + request.at - time.perf_counter()
        if wait > 0:
            await asyncio.sleep(wait)
        tasks.append(asyncio.ensure_future(one(request)))
    return list(await asyncio.gather(*tasks))


# -- figures


def summary(all_sent: Sequence[Sent], seconds: float, warm_up: float) -> dict[str, Any]:
    """Latencies in milliseconds, answers a second and errors by status, of what was due after the warm-up."""
    sent = [one for one in all_sent if one.request.at >= warm_up]
    good = [one for one in sent if one.status == "200"]
    bad = [one for one in sent if one.status != "200"]
    last = max((one.done for one in good), default=0.0)
    lag = [one.sent - one.request.at for one in sent]
    found: dict[str, Any] = {
        "requests": len(sent),
        "asked_per_s": len(sent) / (seconds - warm_up),
        "throughput_per_s": len(good) / max(last - warm_up, seconds - warm_up),
        **latencies(good),
        "errors": dict(Counter(one.status for one in bad).most_common()),
        "error_share": len(bad) / max(len(sent), 1),
        "generator_late_p99_ms": 1e3 * float(np.quantile(lag, 0.99)) if lag else 0.0,
    }
    if bad:
        found["errors_latency"] = latencies(bad)
    kinds = sorted({kind for one in good for kind in one.request.kinds})
    found["kinds"] = {kind: latencies([one for one in good if kind in one.request.kinds]) for kind in kinds}
    return found


def latencies(sent: Sequence[Sent]) -> dict[str, Any]:
    """Quantiles in milliseconds from the intended moment, None of nothing, and the number of requests."""
    values = 1e3 * np.array([one.latency for one in sent])
    shares = {"p50_ms": 0.5, "p95_ms": 0.95, "p99_ms": 0.99, "max_ms": 1.0}
    found = {name: float(np.quantile(values, share)) if sent else None for name, share in shares.items()}
    return {"n": len(sent), **found}


def draw(sent: Sequence[Sent], figures: dict[str, Any], warm_up: float, file: Path) -> None:
    """Latency against the moment of sending, on a logarithmic axis, refusals apart."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    for name, good, color, marker in (("answered", True, "C0", "."), ("refused or failed", False, "C3", "x")):
        its = [one for one in sent if (one.status == "200") == good]
        if its:
            moments, values = [one.request.at for one in its], [1e3 * one.latency for one in its]
            axes.scatter(moments, values, s=12, color=color, marker=marker, label=name, linewidths=0.7)
    for name, line in (("p50_ms", "-"), ("p99_ms", "--")):
        if figures[name] is not None:
            axes.axhline(figures[name], color="grey", linewidth=1, linestyle=line, label=name)
    if warm_up:
        axes.axvspan(0, warm_up, color="grey", alpha=0.15, label="warm-up, not counted")
    title = f"{figures['asked_per_s']:.0f} requests/s asked, {figures['throughput_per_s']:.0f} answered"
    axes.set(yscale="log", xlabel="seconds", ylabel="ms from the intended moment", title=title)
    axes.legend(loc="upper right")
    figure.savefig(file, dpi=130)


# -- the command


def bench(
    url: str, *, rate: float = 50.0, seconds: float = 30.0, warm_up: float = 5.0, candidates: int = 100,
    recommend: bool = False, repeated: float = 0.5, long: float = 0.5, users: Sequence[Any] = (),
    items: Sequence[Any] = (), model: str | None = None, key: str | None = None, seed: int = 0, timeout_s: float = 10.0,
    remote: bool = False, out: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Load the service at `url` for `seconds` and return the figures; `warm_up` of them are not counted.

    Raises:
        InputError: limits are exceeded, the service is elsewhere and `remote` is not set, or it does not answer.
    """
    if not (0 < rate <= MOST_RATE and 0 <= warm_up < seconds <= MOST_SECONDS and rate * seconds <= MOST_REQUESTS):
        raise InputError(
            f"rate {rate:g} for {seconds:g} s after {warm_up:g} s of warm-up: at most {MOST_RATE:,} a second, "
            f"{MOST_SECONDS:,} s and {MOST_REQUESTS:,} requests, and a warm-up shorter than the whole"
        )
    if candidates < 1 or timeout_s <= 0 or not (0 <= repeated <= 1 and 0 <= long <= 1):
        raise InputError("candidates and timeout must be above 0, shares of repeated and long users within 0 and 1")
    headers = {"Authorization": f"Bearer {key}"} if key else {}

    async def story() -> tuple[list[Sent], dict[str, int]]:
        client = Client(url, headers=headers, connections=CONNECTIONS)
        if not (client.loopback or remote):
            raise InputError(f"{client.host} is not this machine: loading a service of others needs --remote")
        whom, what = Users(list(users), []), list(items)
        try:
            if not users or not (items or recommend):
                found = await discover(client)
                whom, what = (whom if users else found[0]), what or found[1]
            more = {"model": model} if model else {}
            endless = bodies(
                whom, [] if recommend else what,
                candidates=candidates, repeated=repeated, long=long, seed=seed, **more,
            )  # fmt: skip
            path = "/v1/recommend" if recommend else "/v1/rank"
            moments = arrivals(rate, seconds, seed).tolist()
            requests = [Request(at, path, *next(endless)) for at in moments]
            sent = await play(client, requests, timeout_s=timeout_s)
        except (OSError, Lost, asyncio.TimeoutError) as error:
            reason = str(error) or "no answer"
            raise InputError(f"{url}: {reason}: is the service running? `scalerec serve BUNDLE`") from None
        finally:
            client.close()
        return sent, {"users": len(whom.short) + len(whom.long), "items": len(what)}

    sent, sizes = in_loop(story())
    figures = summary(sent, seconds, warm_up)
    if out is not None:
        draw(sent, figures, warm_up, out)
    return figures | sizes | {"rate": rate, "seconds": seconds, "warm_up": warm_up, "seed": seed}


def add(command: Callable[..., argparse.ArgumentParser]) -> None:
    """Add `bench-serve`; `command(name, run, help, overridable)` makes its parser."""
    parser = command("bench-serve", run, "load a running service as users would, and say how long they wait", False)
    parser.add_argument("url", help="of a running service, http://127.0.0.1:8000")
    for name, default, help in (
        ("rate", 50.0, "requests a second, on average"),
        ("seconds", 30.0, "how long, with the warm-up"),
        ("warm-up", 5.0, "seconds at the start that are not counted"),
        ("repeated", 0.5, "share of requests for users asked for a moment ago"),
        ("long", 0.5, "share of the other requests for users with a longer history than the median's"),
        ("timeout", 10.0, "seconds after which a request is given up"),
    ):
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{help} (default: {default:g})")
    parser.add_argument("--candidates", type=int, default=100, help="of each request (default: 100)")
    parser.add_argument("--recommend", action="store_true", help="ask /v1/recommend instead of /v1/rank")
    parser.add_argument("--users", type=Path, metavar="FILE", help="ids, one a line (default: ask the service)")
    parser.add_argument("--items", type=Path, metavar="FILE", help="ids, one a line (default: ask the service)")
    parser.add_argument("--model", help="its name (default: that of the user's bucket)")
    parser.add_argument("--key-file", type=Path, metavar="FILE", help="a file that holds the API key")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--remote", action="store_true", help="the service may be on another machine")
    parser.add_argument("--out", type=Path, metavar="FIGURE.png", help="latency against time")


def run(options: argparse.Namespace) -> None:
    """`scalerec bench-serve`: a table for people, by --json one object."""
    figures = bench(
        options.url, rate=options.rate, seconds=options.seconds, warm_up=options.warm_up,
        candidates=options.candidates, recommend=options.recommend, repeated=options.repeated, long=options.long,
        users=read_ids(options.users), items=read_ids(options.items), model=options.model,
        key=_lines(options.key_file)[0] if options.key_file else None, seed=options.seed,
        timeout_s=options.timeout, remote=options.remote, out=options.out,
    )  # fmt: skip
    if options.json:
        print(json.dumps(figures))
    else:
        show(figures)
    if figures["generator_late_p99_ms"] > 1e3 * LATE:
        late = figures["generator_late_p99_ms"]
        print(
            f"the generator itself was {late:.0f} ms late (p99): the machine is busy, latencies too high",
            file=sys.stderr,
        )


def show(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    grid = Table("ms", "n", "p50", "p95", "p99", "max", title=f"{figures['throughput_per_s']:,.1f} answers a second")
    rows = {"answered": figures, **figures["kinds"]}
    if "errors_latency" in figures:
        rows["refused or failed"] = figures["errors_latency"]
    for name, of in rows.items():
        values = [of[f"{quantile}_ms"] for quantile in ("p50", "p95", "p99", "max")]
        grid.add_row(name, f"{of['n']:,}", *("" if value is None else f"{value:.1f}" for value in values))
    console = Console()
    console.print(grid)
    for status, number in figures["errors"].items():
        console.print(f"{status}: {number:,} requests", highlight=False)


def read_ids(file: Path | None) -> list[Any]:
    """Ids of a file, one a line; a line of digits is a whole number."""
    lines = [] if file is None else _lines(file)
    return [int(line) if line.lstrip("-").isdecimal() else line for line in lines]


def _lines(file: Path) -> list[str]:
    """The lines of a file that are not empty; InputError where there are none."""
    try:
        found = [line for text in file.read_text().splitlines() if (line := text.strip())]
    except OSError as error:
        raise InputError(f"{file}: {error.strerror}") from None
    if not found:
        raise InputError(f"{file}: no ids or key in it, one a line is needed")
    return found

"""A service under load for minutes: at 70 % of what it can do, at 300 %, and after that.

    python -m benchmarks.serving_load [--minutes 10] [--overload-seconds 30] [--threads N] [--out DIR] [--json]

rankmixer.small() with random weights (`serving_world`), 20 candidates, served by `scalerec serve` as it comes in a
process of its own; its model has all cores but one, which the event loop and this process need. The maximum is what 32
clients get who ask again when they are answered. Then, in open loop:

70 %    no error; no growth of memory: its median in the last fifth of the time is within 2 % (or 8 MiB) of that in
        the second fifth; p99 <= 3 x p50
300 %   refused with 503 or 429, a Retry-After and a JSON error, p99 of refusals <= the 25 ms that a request may wait
        under overload; those who are accepted keep their p99: <= that at 70 % and those 25 ms; and are at least half
        as many a second as the maximum
after   70 % again: no error, p99 <= 1.5 x that of before
"""

from __future__ import annotations

import argparse
import json
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, options, refuse_if_busy
from benchmarks.serving_world import Process, World, make, ranking_schema, requests_a_second, serving
from scalerec.models import rankmixer
from scalerec.serving.bench import Request, Sent, Users, arrivals, bodies, draw, in_loop, latencies, play, summary
from scalerec.serving.client import Answer, Client
from scalerec.serving.settings import Limits

CANDIDATES, CLIENTS = 20, 32
PATH = "/v1/rank"
SETTLE = 5.0  # seconds at the start of a phase that are not counted
GROWTH, SLACK_MIB = 0.02, 8.0


class Watch:
    """The service's memory, once a second."""

    def __init__(self, process: Process):
        self.process, self.samples = process, [process.memory]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look, daemon=True)

    def _look(self) -> None:
        while not self._over.wait(1.0):
            self.samples.append(self.process.memory)

    @contextmanager
    def looking(self) -> Iterator[None]:
        self._thread.start()
        try:
            yield
        finally:
            self._over.set()
            self._thread.join()

    def growth(self) -> tuple[float, float]:
        """Median MiB of the second fifth of the time, and of the last."""
        fifth = max(len(self.samples) // 5, 1)
        second = self.samples[fifth : 2 * fifth] or self.samples
        return float(np.median(second)), float(np.median(self.samples[-fifth:]))


def phase(
    process: Process, world: World, rate: float, seconds: float, seed: int
) -> tuple[dict[str, Any], list[Sent], Counter[str]]:
    """An open loop at `rate`: figures, all requests, and what was wrong with answers that refuse."""
    whole = seconds + SETTLE
    endless = bodies(
        Users(world.short, world.long), world.items, candidates=CANDIDATES, repeated=0.5, long=0.5, seed=seed
    )
    asked = [Request(at, PATH, *next(endless)) for at in arrivals(rate, whole, seed).tolist()]
    wrong: Counter[str] = Counter()

    async def story() -> list[Sent]:
        client = Client(process.url, connections=800)
        sent = await play(client, asked, timeout_s=30.0, check=lambda request, answer: look(request, answer, wrong))
        client.close()
        return sent

    sent = in_loop(story())
    return summary(sent, whole, SETTLE), sent, wrong


def look(request: Request, answer: Answer, wrong: Counter[str]) -> None:
    """Count what an answer lacks."""
    try:
        found = json.loads(answer.body)
    except ValueError:
        wrong["not JSON"] += 1
        return
    if answer.status == 200:
        wanted = json.loads(request.body)["candidates"]
        if sorted(row["id"] for row in found["items"]) != sorted(wanted):
            wrong["other items than asked"] += 1
    elif answer.status not in (429, 503):
        wrong[f"status {answer.status}"] += 1
    elif "retry-after" not in answer.fields or not found.get("error"):
        wrong["a refusal without Retry-After or reason"] += 1


def measure(given: argparse.Namespace, folder: Path) -> dict[str, Any]:
    lengths = [10] * 100 + [200] * 100
    world = make(folder / "world", "small", rankmixer.small(), ranking_schema(50, 32), lengths, 5_000)
    wait = Limits().overload_ms
    with serving(world, threads=given.threads) as process:
        asked = bodies(
            Users(world.short, world.long), world.items, candidates=CANDIDATES, repeated=0.5, long=0.5, seed=9
        )
        most, _ = requests_a_second(process.url, PATH, asked, clients=CLIENTS, seconds=given.measure_seconds, warm_up=3)
        watch = Watch(process)
        with watch.looking():
            steady, sent, wrong = phase(process, world, 0.7 * most, 60 * given.minutes, 1)
        before, after = watch.growth()
        over, over_sent, over_wrong = phase(process, world, 3 * most, given.overload_seconds, 2)
        time.sleep(1)
        again, _, again_wrong = phase(process, world, 0.7 * most, given.after_seconds, 3)
        memory_end = process.memory
    if given.out:
        given.out.mkdir(parents=True, exist_ok=True)
        draw(sent, steady, SETTLE, given.out / "serving_load_70.png")
        draw(over_sent, over, SETTLE, given.out / "serving_load_300.png")
    refused = latencies([one for one in over_sent if one.request.at >= SETTLE and one.status in ("429", "503")])
    found: dict[str, Any] = {
        "most_per_s": most, "wait_ms": wait, "minutes": given.minutes,
        "steady_requests": steady["requests"], "steady_errors": sum(steady["errors"].values()),
        "steady_p50_ms": steady["p50_ms"], "steady_p99_ms": steady["p99_ms"], "steady_max_ms": steady["max_ms"],
        "memory_mib_before": before, "memory_mib_after": after, "memory_mib_end": memory_end,
        "overload_requests": over["requests"], "overload_refused": refused["n"],
        "overload_other_errors": sum(n for status, n in over["errors"].items() if status not in ("429", "503")),
        "overload_accepted_per_s": over["throughput_per_s"], "overload_accepted_p99_ms": over["p99_ms"],
        "overload_refused_p50_ms": refused["p50_ms"], "overload_refused_p99_ms": refused["p99_ms"],
        "after_errors": sum(again["errors"].values()), "after_p99_ms": again["p99_ms"],
        "wrong_answers": sum((wrong + over_wrong + again_wrong).values()),
        "generator_late_p99_ms": max(one["generator_late_p99_ms"] for one in (steady, over, again)),
    }  # fmt: skip
    for what, number in (wrong + over_wrong + again_wrong).items():
        print(f"{number} answers: {what}")
    return found | {f"holds_{name}": holds for name, (holds, _) in verdicts(found).items()}


def verdicts(found: dict[str, Any]) -> dict[str, tuple[bool, str]]:
    """Whether each promise holds, and by what."""

    def within(value: float | None, limit: float | None) -> bool:
        return value is not None and limit is not None and value <= limit

    steady, wait = found["steady_p99_ms"], found["wait_ms"]
    allowed = max(found["memory_mib_before"] * (1 + GROWTH), found["memory_mib_before"] + SLACK_MIB)
    ratio = steady / found["steady_p50_ms"] if steady else float("nan")
    return {
        "no_error": (
            found["steady_errors"] == 0 and found["wrong_answers"] == 0,
            f"{found['steady_errors']} errors, {found['wrong_answers']} wrong answers",
        ),
        "memory": (
            within(found["memory_mib_after"], allowed),
            f"{found['memory_mib_before']:.0f} -> {found['memory_mib_after']:.0f} MiB",
        ),
        "tail": (ratio <= 3, f"p99 / p50 {ratio:.2f}"),
        "refusals": (
            found["overload_refused"] > 0
            and not found["overload_other_errors"]
            and within(found["overload_refused_p99_ms"], wait),
            f"{found['overload_refused']} refused, p99 {found['overload_refused_p99_ms'] or float('nan'):.0f} ms; "
            f"{found['overload_other_errors']} other errors",
        ),
        "accepted": (
            within(found["overload_accepted_p99_ms"], (steady or float("nan")) + wait),
            f"p99 {found['overload_accepted_p99_ms'] or float('nan'):.0f} ms, at 70 % {steady or float('nan'):.0f} ms",
        ),
        "goodput": (
            found["overload_accepted_per_s"] >= 0.5 * found["most_per_s"],
            f"{found['overload_accepted_per_s']:.0f} accepted a second of {found['most_per_s']:.0f} at most",
        ),
        "recovers": (
            not found["after_errors"] and within(found["after_p99_ms"], 1.5 * (steady or float("nan"))),
            f"{found['after_errors']} errors, p99 {found['after_p99_ms'] or float('nan'):.0f} ms",
        ),
    }


def arguments() -> argparse.Namespace:
    parser = options((__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10.0, help="at 70 %%")
    parser.add_argument("--overload-seconds", type=float, default=30.0, help="at 300 %%")
    parser.add_argument("--after-seconds", type=float, default=30.0, help="at 70 %% again")
    parser.add_argument("--measure-seconds", type=float, default=15.0, help="for the maximum")
    parser.add_argument("--threads", type=int, default=0, help="of the model (default: all cores but one)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for figures of latency against time")
    parser.add_argument("--quick", action="store_true", help="seconds, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        short = {"minutes": 0.1, "overload_seconds": 4.0, "after_seconds": 3.0, "measure_seconds": 2.0}
        given = argparse.Namespace(**{**vars(given), **short})
    given.threads = given.threads or max(1, int(describe_machine()["cores"]) - 1)
    return given


def main() -> None:
    given = arguments()
    busy = refuse_if_busy(given.even_if_busy)
    machine = describe_machine() | {"threads": given.threads}
    with tempfile.TemporaryDirectory(prefix="scalerec-load-") as folder:
        found = measure(given, Path(folder))
    title = f"{found['most_per_s']:.0f} requests/s at most; {given.minutes:g} min at 70 %, then 300 %"
    grid = Table("", "", "", title=title, caption=", ".join(f"{k} {v}" for k, v in machine.items()))
    for name, (holds, by) in verdicts(found).items():
        grid.add_row(name, "holds" if holds else "FAILS", by)
    Console().print(grid)
    if given.json:
        print(json.dumps(found | machine | {"busy": busy, "quick": given.quick}))
    if not given.quick and not all(holds for holds, _ in verdicts(found).values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()

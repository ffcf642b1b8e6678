"""Kill a writer of events with SIGKILL again and again: every acknowledged event is in the store, none is twice.

python -m benchmarks.store_faults [--kills 20] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from itertools import count
from multiprocessing import get_context
from multiprocessing.connection import Connection

from rich.console import Console
from rich.table import Table

from scalerec.schema import Categorical, Group, Schema, Sequence, SequenceField
from scalerec.serving.events import Event
from scalerec.serving.store import open_store

USERS, MOST = 4, 50_000  # of one writer; events kept of each
EVENTS = Sequence(name="all", fields=(SequenceField(of="item"),), time=True, max_len=MOST)
SCHEMA = Schema(
    groups=(
        Group(name="past", side="user", features=(EVENTS,)),
        Group(name="item", side="item", features=(Categorical(name="item"),)),
    ),
    tasks=(), user="user", item="item", time="time",
)  # fmt: skip


def event(name: str) -> Event:
    """The event "7 3" is the third of user 7; its item is its name, by which it is found again."""
    user, number = map(int, name.split())
    return Event(name, user, {"item": name, "time": number})


def write(url: str, first: int, told: Connection) -> None:
    """Events without end, in batches of one to four users' next ones; each batch is told when it is safe."""
    store = open_store(url, SCHEMA)
    for number in count(1):
        names = [f"{first * USERS + user} {number}" for user in range(1 + number % USERS)]
        assert all(store.append([event(name) for name in names]))
        told.send(names)


def killed(url: str, seconds: float, first: int, *, beside: bool = False) -> list[str]:
    """The events that a writer had acknowledged when it was killed after some seconds of writing; `beside` another."""
    processes = get_context("forkserver")
    processes.set_forkserver_preload(["scalerec.serving.lmdb_store"])  # imports take longer than the writing
    writers = []
    for number in range(first, first + 1 + beside):
        ours, theirs = processes.Pipe(duplex=False)
        writer = processes.Process(target=write, args=(url, number, theirs), daemon=True)
        writer.start()
        theirs.close()
        writers.append((writer, ours))
    names = [name for _, ours in writers for name in ours.recv()]  # they are writing
    time.sleep(seconds)
    for writer, _ in writers:
        writer.kill()
    for writer, ours in writers:
        writer.join()
        while True:
            try:
                names += ours.recv()
            except (EOFError, OSError):
                break
    return names


def lost_or_doubled(url: str, told: list[str]) -> tuple[list[str], list[str]]:
    """Of the acknowledged events those that are not in the store, and all that are there more than once."""
    store = open_store(url, SCHEMA)
    found: dict[str, int] = {}
    for user in store.users(limit=1_000_000):
        for _, (item, *_) in store.past(user)["all"]:
            found[item] = found.get(item, 0) + 1
    assert sum(found.values()) == store.count(), "the count is not that of the events"
    assert not any(store.append([event(name) for name in told if name in found])), "an event was taken a second time"
    store.close()
    return [name for name in told if name not in found], [name for name, times in found.items() if times > 1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    chance = random.Random(options.seed)
    told: list[str] = []
    lost: list[str] = []
    doubled: list[str] = []
    table = Table("kill", "after s", "acknowledged", "lost", "twice")
    with tempfile.TemporaryDirectory() as folder:
        url = f"lmdb:{folder}"
        for kill in range(options.kills):
            seconds = chance.uniform(0.02, 1.0)
            mine = killed(url, seconds, 2 * kill, beside=kill % 2 == 1)
            told += mine
            lost, doubled = lost_or_doubled(url, told)
            table.add_row(str(kill + 1), f"{seconds:.2f}", str(len(mine)), str(len(lost)), str(len(doubled)))
    Console().print(table)
    found = {"kills": options.kills, "acknowledged": len(told), "lost": len(lost), "twice": len(doubled)}
    text = f"{len(told)} events acknowledged, {len(lost)} lost, {len(doubled)} twice"
    print(json.dumps(found) if options.json else text)
    raise SystemExit(bool(lost or doubled))


if __name__ == "__main__":
    main()

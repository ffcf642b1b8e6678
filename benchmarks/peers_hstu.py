"""HSTU of scalerec against that of RecTools on MovieLens-1M: seconds per epoch, HR@10 after equal epochs, time to it.

    python -m benchmarks.peers_hstu --install      # once: RecTools into an environment of its own
    python -m benchmarks.peers_hstu [--environment DIR] [--epochs 10] [--threads N] [--json]

In turn on the same cores: peer, ours, peer, ours for a few epochs each (seconds per epoch; their ratio within each
round, and the median of the rounds), then both for `--epochs` (HR@10 by the same function, from the places of the same
test events). An epoch lasts from the end of the one before, the first, which is kept apart, from the start of training;
reading and preparing data, evaluating and saving are outside on both sides. `seconds_to_peer_hr10` is the time so
measured of the epochs that ours needed for the peer's last HR@10. The peer's results are kept and used again by a call
with the same options, on the same kind of machine; `--fresh` measures anew.

The same on both sides: the latest 200 events before the last, in the same order, and that last event as test, ranked
among all items but the past that the model was shown; width 50, 2 blocks, 1 head; biases by place and by time with the
same buckets, asked at the time of the next event; dropout 0.2 of input and output product; cosine over 0.05, softmax
over the target and 128 items drawn uniformly for each position; Adam, rate 1e-3, betas 0.9 and 0.98; batches of 128
users; float32; threads and torch, where the pins allow it.

Not the same, since RecTools has no option for it: its LayerNorms learn scale and shift; weights start by Xavier's rule
(ours as in the published code); places count from the end and histories are padded to 200; attention is divided by 200
(ours by 211); a drawn item that is the target counts as a negative (ours leaves it out). It batches in the training
process, its default; ours reads ahead in a thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from benchmarks.environment import install, python_of, say, versions, without_scalerec
from benchmarks.machine import describe_machine, options, refuse_if_busy
from scalerec.data.source import cache_root

RECIPE = "hstu_movielens_1m"
PEER = Path(__file__).parent / "peers" / "hstu_rectools.py"
NEEDS = PEER.with_suffix(".txt")
NEVER = 10**9  # steps


# -- the peer's environment


def missing(environment: Path) -> str:
    """Why there is no peer to compare with; empty when there is one."""
    found = versions(environment, PEER, without_scalerec())
    return found if isinstance(found, str) else ""


# -- the same data for both


@dataclass(frozen=True)
class Data:
    """What both train on: `recipe` names it for ours, `folder` has the peer's files."""

    recipe: str
    folder: Path
    users: np.ndarray  # [n] of the test rows, in the order of the files
    targets: np.ndarray  # [n] the item of each

    def digest(self) -> str:
        files = sorted(self.folder.glob("*.parquet"))
        return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def prepare(folder: Path, users: int) -> Data:
    """The prepared sequences of the recipe as files for the peer; of the first `users` users only, where not 0."""
    from scalerec.data.sources.parquet import Parquet
    from scalerec.data.split import ColumnSplit
    from scalerec.recipes.catalogue import find

    run = find(RECIPE)
    rows = pa.concat_tables(pq.read_table(file) for file in run.data.prepare(say).files)
    recipe = RECIPE
    folder.mkdir(parents=True, exist_ok=True)
    if users:
        first = rows.filter(pc.equal(rows["part"], "test"))["user_id"].slice(0, users)
        rows = rows.filter(pc.is_in(rows["user_id"], value_set=first.combine_chunks()))
        slice_of = folder / "ours"
        slice_of.mkdir(exist_ok=True)
        pq.write_table(rows, slice_of / "rows.parquet")
        (slice_of / "schema.json").write_text(run.data.schema().model_dump_json())
        data = Parquet(
            path=str(slice_of / "rows.parquet"), schema_file=str(slice_of / "schema.json"),
            split=ColumnSplit(column="part"),
        )  # fmt: skip
        recipe = str(slice_of / "run.json")
        Path(recipe).write_text(run.model_copy(update={"data": data}).model_dump_json())
    train, test = (rows.filter(pc.equal(rows["part"], part)).combine_chunks() for part in ("train", "test"))
    pq.write_table(interactions(train, with_row=True), folder / "train.parquet")
    pq.write_table(interactions(test, with_row=False), folder / "seen.parquet")
    asked = {"user_id": test["user_id"], "datetime": _datetimes(test["time"].to_numpy())}
    pq.write_table(pa.table(asked), folder / "asked.parquet")
    return Data(recipe, folder, test["user_id"].to_numpy(), test["item_id"].to_numpy())


def interactions(rows: pa.Table, with_row: bool) -> pa.Table:
    """One line for each event of the rows' lists, in order, and `with_row` one for the row's own event after them."""
    lists = [rows[f"events_{name}"].combine_chunks() for name in ("item_id", "time")]
    lengths = pc.list_value_length(lists[0]).to_numpy(zero_copy_only=False)
    owner = np.repeat(np.arange(len(rows)), lengths)
    items, times = (np.asarray(pc.list_flatten(column)) for column in lists)
    if with_row:
        owner = np.concatenate([owner, np.arange(len(rows))])
        items = np.concatenate([items, rows["item_id"].to_numpy()])
        times = np.concatenate([times, rows["time"].to_numpy()])
    order = np.argsort(owner, kind="stable")
    return pa.table({
        "user_id": rows["user_id"].to_numpy()[owner[order]], "item_id": items[order],
        "datetime": _datetimes(times[order]), "weight": np.ones(len(order)),
    })  # fmt: skip


def _datetimes(seconds: np.ndarray) -> pa.Array:
    return pa.array(seconds.astype(np.int64) * 10**9, pa.timestamp("ns"))


# -- runs


@dataclass
class Bench:
    """Runs of both sides under the same conditions."""

    data: Data
    environment: Path
    kept: Path  # folder with the peer's results
    threads: int
    seed: int
    even_if_busy: bool
    reused: list[str] = field(default_factory=list)
    busy: bool = False

    def variables(self) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(self.threads), "MKL_NUM_THREADS": str(self.threads), "CUDA_VISIBLE_DEVICES": ""}

    def peer(self, what: str, epochs: int, evaluate: list[int]) -> dict[str, Any]:
        """Train the peer, or take what an earlier call kept: seconds of each epoch, its best ten after some."""
        name = "-".join(map(str, ["peer", *what.split(), epochs, *evaluate]))
        file = self.kept / f"{name}.json"
        if file.exists():
            found = json.loads(file.read_text())
            if self.even_if_busy or not found["busy"]:
                say(f"peer, {what}: kept in {file}, not trained again (--fresh does)")
                self.reused.append(what)
                self.busy |= found["busy"]
                return found
        busy = refuse_if_busy(self.even_if_busy)
        say(f"peer, {what}: {epochs} epochs")
        result = self.kept / "result.json"
        words = ["--epochs", str(epochs), "--threads", str(self.threads), "--seed", str(self.seed)]
        words += ["--out", str(result), *(["--evaluate", *map(str, evaluate)] if evaluate else [])]
        command = [str(python_of(self.environment)), str(PEER), str(self.data.folder), *words]
        self._run(command, without_scalerec())
        found = json.loads(result.read_text()) | {"busy": busy}
        file.write_text(json.dumps(found))
        self.busy |= busy
        return found

    def ours(self, what: str, epochs: int, evaluate: bool) -> Path:
        """Train the recipe; the folder of the run."""
        self.busy |= refuse_if_busy(self.even_if_busy)
        say(f"ours, {what}: {epochs} epochs")
        folder = self.kept / "-".join(["ours", *what.split()])
        shutil.rmtree(folder, ignore_errors=True)
        changes = {
            "epochs": epochs, "evaluate_every": 0 if evaluate else NEVER, "save_every": NEVER, "threads": self.threads,
            "log_every": 1, "tensorboard": "false",
        }  # fmt: skip
        words = [word for name, value in changes.items() for word in (f"--training.{name}", str(value))]
        command = [sys.executable, "-m", "scalerec", "train", self.data.recipe, "--out", str(folder), "--quiet"]
        self._run([*command, "--seed", str(self.seed), *words], dict(os.environ))
        return folder

    def _run(self, command: list[str], environment: dict[str, str]) -> None:
        done = subprocess.run(command, env=environment | self.variables(), capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\nfailed: {done.stderr[-2000:]}")


def log_of(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "log.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def epoch_seconds(steps: list[dict[str, Any]]) -> list[float]:
    """Seconds of each epoch of a run that logged every step and did nothing in between."""
    ends = {line["epoch"]: line["seconds"] for line in steps}
    return np.diff([ends[epoch] for epoch in sorted(ends)], prepend=0.0).tolist()


# -- figures


def places(best: list[list[int]], targets: np.ndarray) -> np.ndarray:
    """The place of each target in its list of the best, from 1 on; infinite where it is not among them."""
    hits = np.asarray(best) == targets[:, None]
    return np.where(hits.any(1), hits.argmax(1) + 1.0, np.inf)


def speeds(rounds: list[tuple[list[float], list[float]]]) -> dict[str, float]:
    """Of rounds (seconds of the peer's epochs, of ours): their medians and spreads without the first, and the ratio."""
    found: dict[str, float] = {}
    later = [tuple(side[1:] or side for side in pair) for pair in rounds]
    for place, name in enumerate(("peer", "ours")):
        seconds = [second for pair in later for second in pair[place]]
        found[f"seconds_per_epoch_{name}"] = median(seconds)
        found |= {f"seconds_per_epoch_{name}_low": min(seconds), f"seconds_per_epoch_{name}_high": max(seconds)}
        found[f"first_epoch_{name}"] = median(pair[place][0] for pair in rounds)
    ratios = [median(peer) / median(ours) for peer, ours in later]
    found |= {"peer_speedup": median(ratios), "peer_speedup_low": min(ratios), "peer_speedup_high": max(ratios)}
    return found


def time_to(found: dict[str, float], wanted: float, ours: list[float], epochs: int) -> dict[str, float]:
    """Seconds of training to HR@10 `wanted`, which the peer had after `epochs`; `ours` is HR@10 after each epoch."""

    def seconds(name: str, number: int) -> float:
        return found[f"first_epoch_{name}"] + (number - 1) * found[f"seconds_per_epoch_{name}"]

    times = {"seconds_of_peer": seconds("peer", epochs)}
    needed = next((number for number, value in enumerate(ours, 1) if value >= wanted), None)
    if needed is None:
        return times  # not reached: no figure
    times |= {"epochs_to_peer_hr10": needed, "seconds_to_peer_hr10": seconds("ours", needed)}
    return times | {"time_speedup": times["seconds_of_peer"] / times["seconds_to_peer_hr10"]}


def measure(bench: Bench, epochs: int, timing_epochs: int, rounds: int) -> dict[str, Any]:
    """All runs, in turn, as one flat table of figures."""
    from scalerec import topk

    turns = []
    for number in range(1, rounds + 1):
        peer = bench.peer(f"round {number}", timing_epochs, [])["seconds"]
        folder = bench.ours(f"round {number}", timing_epochs, evaluate=False)
        turns.append((peer, epoch_seconds(log_of(folder, "train"))))
        found = speeds(turns)
        took = ", ".join(f"{name} {found[f'seconds_per_epoch_{name}']:.2f}" for name in ("peer", "ours"))
        say(f"seconds per epoch so far: {took}")
    found: dict[str, Any] = speeds(turns)

    evaluated = sorted({epoch for epoch in (1, 2, 5, *range(10, epochs, 10)) if epoch < epochs} | {epochs})
    peer = bench.peer("quality", epochs, evaluated)
    folder = bench.ours("quality", epochs, evaluate=True)
    # In this protocol validation is the test, so that the log has HR@10 after every epoch.
    ours = [line["tasks"]["next"]["hr@10"] for line in log_of(folder, "validation")]
    of_peer = {epoch: places(peer["top"][str(epoch)], bench.data.targets) for epoch in evaluated}
    theirs = {epoch: topk.table(place)["hr@10"] for epoch, place in of_peer.items()}
    last = pq.read_table(folder / "test.parquet")["next_place"].to_numpy()
    found |= {"hr10_ours": topk.table(last)["hr@10"], "hr10_peer": theirs[epochs]}
    difference = topk.paired_bootstrap(bench.data.users, of_peer[epochs], last)
    found["hr10_difference"] = found["hr10_ours"] - found["hr10_peer"]
    found |= {"hr10_difference_low": difference.low, "hr10_difference_high": difference.high}
    for epoch in evaluated:
        found |= {f"hr10_ours_{epoch}": ours[epoch - 1], f"hr10_peer_{epoch}": theirs[epoch]}
    found |= time_to(found, theirs[epochs], ours, epochs)
    found |= {"epochs": epochs, "timing_epochs": timing_epochs, "rounds": rounds, "test_events": len(bench.data.users)}
    about = {name: peer[name] for name in ("peer_items", "peer_parameters", "rectools", "lightning", "torch_peer")}
    return found | about | {"kept_peer_runs": len(bench.reused), "busy": bench.busy}


def show(found: dict[str, Any], machine: dict[str, Any]) -> None:
    title = f"HSTU, {found['test_events']:,} users; medians of {found['rounds']} rounds, HR@10 after equal epochs"
    table = Table(title=title, caption=", ".join(f"{name} {value}" for name, value in machine.items()))
    for heading in ("", "RecTools", "scalerec", ""):
        table.add_column(heading, justify="left" if not heading else "right")
    both = [f"{found[f'seconds_per_epoch_{name}']:.2f}" for name in ("peer", "ours")]
    spread = f"{found['peer_speedup']:.1f}x ({found['peer_speedup_low']:.1f} to {found['peer_speedup_high']:.1f})"
    table.add_row("seconds per epoch", *both, spread)
    table.add_row("first epoch", *(f"{found[f'first_epoch_{name}']:.2f}" for name in ("peer", "ours")), "")
    for epoch in sorted(int(name.rpartition("_")[2]) for name in found if name.startswith("hr10_ours_")):
        values = [found[f"hr10_{name}_{epoch}"] for name in ("peer", "ours")]
        interval = f"{found['hr10_difference_low']:+.4f} to {found['hr10_difference_high']:+.4f}"
        shown = f"95 %: {interval}" if epoch == found["epochs"] else ""
        table.add_row(f"HR@10 after {epoch}", *(f"{value:.4f}" for value in values), shown)
    reached = found.get("seconds_to_peer_hr10", math.nan)
    again = f"{found['time_speedup']:.1f}x" if "time_speedup" in found else "not reached"
    table.add_row("seconds to that HR@10", f"{found['seconds_of_peer']:.0f}", f"{reached:.0f}", again)
    Console().print(table)


def arguments() -> argparse.Namespace:
    parser = options("HSTU of scalerec against that of RecTools: seconds per epoch, and HR@10 after equal epochs")
    place = cache_root() / "peers"
    parser.add_argument("--environment", type=Path, default=place / "rectools", metavar="DIR", help="of the peer")
    parser.add_argument("--install", action="store_true", help="make that environment first, if need be")
    parser.add_argument("--scratch", type=Path, default=place / "hstu", metavar="DIR", help="what is kept")
    parser.add_argument("--fresh", action="store_true", help="train the peer again, whatever is kept")
    parser.add_argument("--epochs", type=int, default=10, help="after which HR@10 is compared")
    parser.add_argument("--timing-epochs", type=int, default=3, help="of each timed run; the first is kept apart")
    parser.add_argument("--rounds", type=int, default=2, help="of timed runs, peer and ours in turn")
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--users", type=int, default=0, help="only the first so many, to see whether all works")
    chosen = parser.parse_args()
    if min(chosen.epochs, chosen.timing_epochs, chosen.rounds) < 1:
        parser.error("--epochs, --timing-epochs and --rounds must be at least 1")
    return chosen


def main() -> None:
    chosen = arguments()
    environment = chosen.environment.absolute()
    if chosen.install and missing(environment):
        install(environment, NEEDS)
    reason = missing(environment)
    if reason:
        print(f"skipped, nothing compared with RecTools: {reason}", file=sys.stderr)
        print(f"`python -m benchmarks.peers_hstu --install --environment {environment}` makes it", file=sys.stderr)
        return print(json.dumps({"skipped": reason})) if chosen.json else None
    refuse_if_busy(chosen.even_if_busy)

    machine: dict[str, Any] = describe_machine()
    threads = chosen.threads or int(machine["cores"])
    machine |= {"threads": threads}
    scratch = chosen.scratch.absolute()
    data = prepare(scratch / f"data-{chosen.users or 'all'}", chosen.users)
    same = [data.digest(), PEER.read_text(), NEEDS.read_text(), machine["cpu"], machine["cores"], threads, chosen.seed]
    kept = scratch / hashlib.sha256(json.dumps(same).encode()).hexdigest()[:12]
    if chosen.fresh:
        shutil.rmtree(kept, ignore_errors=True)
    kept.mkdir(parents=True, exist_ok=True)
    bench = Bench(data, environment, kept, threads, chosen.seed, chosen.even_if_busy)
    found = measure(bench, chosen.epochs, chosen.timing_epochs, chosen.rounds)
    if bench.reused:
        say(f"of the peer not measured now but kept: {', '.join(bench.reused)}; --fresh measures in turn")
    show(found, machine)
    if chosen.json:
        print(json.dumps(found | machine | {"seed": chosen.seed, "users": chosen.users}))


if __name__ == "__main__":
    main()

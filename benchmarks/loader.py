"""What reading costs: how long training steps wait for it, how far it is from bare Parquet, what it keeps in memory.

    python -m benchmarks.loader [--rows 100000] [--rounds 5] [--json]

KuaiRand with all features and histories, batches of 512 training rows.

`data_wait`: share of the time of the first 100 steps of `rankmixer.tiny()` in an epoch that they wait for a batch, all
but the first, which is `first_batch_s`. A loader that never lets a step wait still takes its time from the cores: what
it needs for a row is one over `loader_rows_s`, what a row's training needs with all batches in memory one over
`memory_rows_s`.

`scan_share`: rows a second of the loader alone (read, encoded, shuffled, batched) over those of the quickest bare scan
that pyarrow has for the same columns.

`memory_ratio`: peak memory of a whole training of the tiny RankMixer on ten times `--rows` synthetic rows, over that on
one time.

Of all threads and, in keys that end in `_one_thread`, of one thread of torch (the loader encodes on as many, pyarrow
has its pool in both). Where KuaiRand is not at hand the first two are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow.parquet as pq
import torch
from pyarrow import dataset
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, options, refuse_if_busy
from benchmarks.turns import by_threads, endings, in_turn, spread
from scalerec.data.reader import PIECE_ROWS
from scalerec.errors import InputError
from scalerec.models import rankmixer
from scalerec.recipes import kuairand
from scalerec.training.log import Log
from scalerec.training.run import Run, TrainingConfig
from scalerec.training.train import Training

BATCH = 512
STEPS = 100  # of training in a round

CHILD = """
import sys
from benchmarks.machine import peak_mib
from scalerec.cli import main
code = main(sys.argv[1:])
print(peak_mib())
raise SystemExit(code)
"""


def peak(rows: int, scratch: Path) -> float:
    """Peak resident memory in MiB of one epoch of the tiny RankMixer on `rows` synthetic rows."""
    changes = {
        "data.rows": rows, "model.dim": 64, "model.num_tokens": 8, "model.ffn_dim": 128,
        "training.window_rows": 32_768, "training.tensorboard": "false",
    }  # fmt: skip
    words = [word for path, value in changes.items() for word in (f"--{path}", str(value))]
    for task in (["data", "rankmixer_synthetic", "--data.rows", str(rows), "--json"], None):
        arguments = task or ["train", "rankmixer_synthetic", "--out", str(scratch / str(rows)), "--quiet", *words]
        done = subprocess.run([sys.executable, "-c", CHILD, *arguments], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
    return float(done.stdout.split()[-1])


class World:
    """KuaiRand's training rows, a model, and the two ways to read."""

    def __init__(self, folder: Path):
        config = TrainingConfig(batch_size=BATCH, threads=torch.get_num_threads(), tensorboard=False)
        data = kuairand.rankmixer_kuairand_statistics().data
        run = Run(name="loader", data=data, model=rankmixer.tiny(), training=config)
        self.training = Training(run, folder, log=Log(folder, quiet=True, tensorboard=False))
        self.training.model.train()
        self.rows = self.training.parts["train"].rows
        self.files = sorted({str(group.file) for group in self.training.rows.row_groups})
        self.kept = list(islice(self.training.loader, STEPS))
        self.first = self.waited = 0.0

    def steps(self) -> None:
        self.waited, self.first = 0.0, -1.0
        batches = iter(self.training.loader)
        for _ in range(STEPS):
            start = time.perf_counter()
            batch = next(batches)
            took = time.perf_counter() - start
            if self.first < 0:
                self.first = took
            else:
                self.waited += took
            self.training.step(batch)

    def in_memory(self) -> None:
        for batch in self.kept:
            self.training.step(batch)

    def alone(self) -> None:
        for _ in self.training.loader:
            pass

    def scan(self, scanner: bool) -> None:
        """Every batch of the columns that the loader reads, by one of pyarrow's two ways."""
        columns = self.training.loader.columns
        if scanner:
            for _ in dataset.dataset(self.files).scanner(columns=columns, batch_size=PIECE_ROWS).to_batches():
                pass
            return
        for file in self.files:
            with pq.ParquetFile(file) as opened:
                for _ in opened.iter_batches(PIECE_ROWS, columns=columns):
                    pass


def reading(rounds: int) -> dict[str, float]:
    """`data_wait`, `scan_share` and what they come from."""
    with tempfile.TemporaryDirectory() as scratch:
        world = World(Path(scratch) / "run")
        waits: list[float] = []

        def steps() -> None:
            start = time.perf_counter()
            world.steps()
            waits.append(world.waited / (time.perf_counter() - start - world.first))

        seconds = in_turn({"steps": steps, "memory": world.in_memory}, rounds)
        found = spread("data_wait", waits[1:]) | {"first_batch_s": world.first}
        found |= {
            f"{name}_rows_s": STEPS * BATCH / median(seconds[call])
            for name, call in (("train", "steps"), ("memory", "memory"))
        }
        scans = {"scanner": lambda: world.scan(True), "batches": lambda: world.scan(False)}
        seconds = in_turn({"alone": world.alone, **scans}, rounds)
        best = min(scans, key=lambda name: median(seconds[name]))
        all_rows = world.training.rows.num_rows  # a scan reads the rows of all parts
        rates = [world.rows / a / (all_rows / b) for a, b in zip(seconds["alone"], seconds[best])]
        found |= spread("scan_share", rates)
        return found | {
            "loader_rows_s": world.rows / median(seconds["alone"]),
            "scan_rows_s": all_rows / median(seconds[best]),
        }


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    busy = refuse_if_busy(chosen.even_if_busy)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("SCALEREC_CACHE", scratch)
        small, large = (peak(rows, Path(scratch)) for rows in (chosen.rows, 10 * chosen.rows))
    machine, threads = describe_machine(), endings()
    found: dict[str, Any] = {}
    try:
        found |= by_threads(lambda: reading(chosen.rounds), threads)
    except InputError as error:
        Console(stderr=True).print(f"data_wait and scan_share left out: {error}", highlight=False)
    found |= {"memory_ratio": large / small, "small_mib": small, "large_mib": large, "rows": chosen.rows, "busy": busy}
    table = Table("", "threads", "value", "spread")
    for name in ("data_wait", "scan_share"):
        for ending, count in threads.items():
            if name in found:
                low, high = found[f"{name}_low{ending}"], found[f"{name}_high{ending}"]
                table.add_row(name, str(count), f"{found[name + ending]:.3f}", f"{low:.3f} to {high:.3f}")
    table.add_row("memory_ratio", str(threads[""]), f"{large / small:.3f}", f"{large:,.0f} over {small:,.0f} MiB")
    Console().print(table)
    if chosen.json:
        print(json.dumps({**found, **machine}))


if __name__ == "__main__":
    main()

"""Seconds per row and peak memory of a training step as one size grows and all others stay.

    python -m benchmarks.scaling [--rounds 5] [--out scaling.png] [--json]

RankMixer on the synthetic log in fp32: width D, tokens T, layers L, rows of a batch, from a middle of D = 256 (hidden
width 720), T = 16, L = 2, 512 rows; and the rows of embedding tables (50 of them, 16 wide, 2,048 rows a batch, uniform
ids), whose step is lookup, gradient and Adagrad. Every point has a process of its own: memory is its peak less what
bare Python has, torch and scalerec (some 450 MiB) included.

The figure has logarithmic axes, beside each line what would be proportional to the FLOPs of a row (tables: constant).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from benchmarks.machine import describe_machine, options, peak_mib, refuse_if_busy

MIDDLE = {"dim": 256, "tokens": 16, "layers": 2, "rows": 512}
SWEEPS = {
    "dim": (64, 128, 256, 512, 1024, 1536),
    "tokens": (4, 8, 16, 32, 64),
    "layers": (1, 2, 4, 8, 16),
    "rows": (16, 64, 256, 512, 2048, 8192),
    "table_rows": (1_000, 10_000, 100_000, 1_000_000),
}
LABELS = {
    "dim": "width D", "tokens": "tokens T", "layers": "layers L", "rows": "rows of a batch",
    "table_rows": "rows of a table",
}  # fmt: skip
TABLES, WIDTH, LOOKED_UP = 50, 16, 2048


def point(size: dict[str, int], rounds: int) -> dict[str, float]:
    """Seconds and FLOPs of a row of one step, and its memory, measured in this process."""
    from benchmarks.turns import in_turn

    with tempfile.TemporaryDirectory() as scratch:
        make = tables if "table_rows" in size else model
        begin = peak_mib()
        step, rows, flops = make(size, Path(scratch))
        seconds = in_turn({"step": step}, rounds)["step"]
        mib = peak_mib() - begin  # before FLOPs are counted: that takes the kernels' plain twins, with memory of theirs
        return {"seconds_per_row": median(seconds) / rows, "flops_per_row": flops() / rows, "mib": mib}


def model(size: dict[str, int], folder: Path) -> tuple[Callable[[], None], int, Callable[[], float]]:
    """A step of RankMixer, its rows, and what counts its FLOPs."""
    from benchmarks.training_step import Case
    from scalerec.models.rankmixer import RankMixerConfig

    dim, rows = size["dim"], size["rows"]
    config = RankMixerConfig(
        dim=dim, num_tokens=size["tokens"], num_layers=size["layers"], ffn_dim=dim * 45 // 16, head="linear"
    )
    case = Case(config, rows, "fp32", folder / "run")
    return case.step, rows, lambda: sum(p.flops * count for p, count in case.products(case.train).items())


def tables(size: dict[str, int], _: Path) -> tuple[Callable[[], None], int, Callable[[], float]]:
    """A step of embedding tables, with other ids each time."""
    import torch

    from benchmarks.embedding import Ours, stepping
    from scalerec.training.optim import OptimizerConfig

    count = size["table_rows"]
    ours = Ours(torch.zeros(1, 1, 1).expand(TABLES, count, WIDTH))
    step = stepping(ours, OptimizerConfig().build_embedding(ours.collection.sparse_parameters()))
    slope = torch.randn(LOOKED_UP, TABLES * WIDTH)
    return lambda: step(torch.randint(count, (LOOKED_UP, TABLES)), slope), LOOKED_UP, lambda: 0.0


def measure(rounds: int) -> list[dict[str, Any]]:
    """All points, each in a process of its own."""
    found = []
    for axis, values in SWEEPS.items():
        for value in values:
            size = {"table_rows": value} if axis == "table_rows" else {**MIDDLE, axis: value}
            command = [sys.executable, "-m", "benchmarks.scaling", "--point", json.dumps(size), "--rounds", str(rounds)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{axis} {value}: {done.stderr[-2000:]}")
            found.append({"axis": axis, "value": value, **json.loads(done.stdout.splitlines()[-1])})
            Console(stderr=True).print(f"{LABELS[axis]} {value:,}: {1e6 * found[-1]['seconds_per_row']:,.1f} us a row")
    return found


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Two rows of panels, time and memory, one column an axis."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator

    figure, panels = plt.subplots(2, len(SWEEPS), figsize=(3.2 * len(SWEEPS), 5.6), squeeze=False, layout="constrained")
    for column, axis in enumerate(SWEEPS):
        mine = [entry for entry in found if entry["axis"] == axis]
        values = [entry["value"] for entry in mine]
        times = [1e6 * entry["seconds_per_row"] for entry in mine]
        flops = [entry["flops_per_row"] or 1.0 for entry in mine]
        middle = len(mine) // 2
        expected = [times[middle] * value / flops[middle] for value in flops]
        panels[0][column].loglog(values, expected, "--", color="#888888", label="as its FLOPs")
        for panel, series in ((panels[0][column], times), (panels[1][column], [entry["mib"] for entry in mine])):
            panel.loglog(values, series, "o-", color="#1f5fa8")
            panel.set_xticks(values, [f"{value:,}" for value in values], fontsize="x-small")
            panel.minorticks_off()
            panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            panel.grid(True, alpha=0.3)
        panels[0][column].set_title(LABELS[axis])
        panels[1][column].set_xlabel(LABELS[axis])
    panels[0][0].set_ylabel("microseconds a row")
    panels[1][0].set_ylabel("peak memory, MiB")
    panels[0][0].legend(frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = options("seconds per row and peak memory as sizes grow")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="where to draw the figure")
    parser.add_argument("--point", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.point:
        print(json.dumps(point(json.loads(given.point), given.rounds)))
        return
    busy = refuse_if_busy(given.even_if_busy)
    found = measure(given.rounds)
    if given.out:
        draw(found, given.out)
    machine = describe_machine()
    grid = Grid("", "size", "us a row", "GFLOPS", "peak MiB", caption=", ".join(f"{k} {v}" for k, v in machine.items()))
    for entry in found:
        speed = entry["flops_per_row"] / entry["seconds_per_row"] / 1e9
        shown = f"{speed:,.0f}" if speed else ""
        times = f"{1e6 * entry['seconds_per_row']:,.1f}"
        grid.add_row(LABELS[entry["axis"]], f"{entry['value']:,}", times, shown, f"{entry['mib']:,.0f}")
    Console().print(grid)
    if given.json:
        keys = ("seconds_per_row", "flops_per_row", "mib")
        flat = {f"{entry['axis']}_{entry['value']}_{key}": entry[key] for entry in found for key in keys}
        print(json.dumps(flat | machine | {"rounds": given.rounds, "busy": busy}))


if __name__ == "__main__":
    main()

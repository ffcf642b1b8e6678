"""Peak memory of a whole training on ten times the rows, over that on one time.

python -m benchmarks.loader [--rows 100000] [--json]
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, options, refuse_if_busy

CHILD = """
import resource, sys
from scalerec.cli import main
code = main(sys.argv[1:])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
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
    return int(done.stdout.split()[-1]) / (2**20 if sys.platform == "darwin" else 2**10)


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--rows", type=int, default=100_000)
    chosen = parser.parse_args()
    busy = refuse_if_busy(chosen.even_if_busy)
    with tempfile.TemporaryDirectory() as scratch:
        os.environ.setdefault("SCALEREC_CACHE", scratch)
        small, large = (peak(rows, Path(scratch)) for rows in (chosen.rows, 10 * chosen.rows))
    table = Table("rows", "peak MiB")
    table.add_row(f"{chosen.rows:,}", f"{small:,.0f}")
    table.add_row(f"{10 * chosen.rows:,}", f"{large:,.0f}")
    Console().print(table)
    found = {"memory_ratio": large / small, "small_mib": small, "large_mib": large, "rows": chosen.rows, "busy": busy}
    print(json.dumps({**found, **describe_machine()}) if chosen.json else f"memory_ratio {large / small:.3f}")


if __name__ == "__main__":
    main()

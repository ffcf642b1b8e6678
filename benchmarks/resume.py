"""Kill a training with SIGKILL again and again, resume it, and compare every bit with a run that was never killed.

python -m benchmarks.resume [--kills 20] [--json]
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scalerec.hardware import cores

OPTIONS = {
    "data.rows": 20_000, "training.epochs": 2, "training.batch_size": 256, "training.save_every": 7,
    "training.log_every": 1, "training.window_rows": 4_000, "model.dropout": 0.1, "training.tensorboard": "false",
}  # fmt: skip


def command(folder: Path, *more: str) -> list[str]:
    changes = [word for path, value in OPTIONS.items() for word in (f"--{path}", str(value))]
    recipe = ["train", "rankmixer_synthetic", "--out", str(folder), *changes, *more]
    return [sys.executable, "-m", "scalerec", *recipe]


def losses(folder: Path) -> list[dict[str, Any]]:
    """Every logged line without the clock; a line cut by the kill does not count."""
    found = []
    for line in (folder / "log.jsonl").read_text().splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        entry.pop("seconds")
        found.append(entry)
    return found


def outcome(folder: Path) -> dict[str, Any]:
    """Everything that must not depend on a kill: losses, metrics, scores, and the bytes of weights and states."""
    files = sorted((folder / "checkpoints").glob("*/*.safetensors"))
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics.pop("seconds")
    return {
        "losses": losses(folder),
        "metrics": metrics,
        "scores": (folder / "test.parquet").read_bytes(),
        "weights": {f"{file.parent.name}/{file.name}": file.read_bytes() for file in files},
    }


def killed(
    folder: Path, step: int, environment: dict[str, str], command: Callable[..., list[str]] = command
) -> tuple[int, int]:
    """Train into `folder`, kill -9 once `step` is logged, resume to the end: (step killed after, step resumed from)."""
    running = subprocess.Popen(command(folder), env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = folder / "log.jsonl"
    while running.poll() is None:
        seen = losses(folder)[-1]["step"] if log.exists() and log.stat().st_size else 0
        if seen >= step:
            break
        time.sleep(0.001)
    running.send_signal(signal.SIGKILL)
    running.wait()
    seen = losses(folder)[-1]["step"]
    done = subprocess.run(command(folder, "--resume"), env=environment, capture_output=True, text=True)
    said = re.search(r"from step (\d+)", done.stderr)
    if done.returncode or not said:
        raise SystemExit(f"resuming after a kill at step {seen} failed: {done.stderr[-2000:]}")
    return seen, int(said.group(1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--threads", type=int, default=cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads)}
    chance = random.Random(options.seed)
    table = Table("kill", "killed after step", "resumed from step", "identical")
    identical = 0
    with tempfile.TemporaryDirectory() as scratch:
        whole = Path(scratch) / "whole"
        subprocess.run(
            command(whole), env=environment, check=True, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
        )
        expected = outcome(whole)
        last = max(entry["step"] for entry in expected["losses"])
        for kill in range(options.kills):
            folder = Path(scratch) / f"kill-{kill}"
            seen, resumed = killed(folder, chance.randint(1, last - 1), environment)
            same = outcome(folder) == expected
            identical += same
            table.add_row(str(kill + 1), str(seen), str(resumed), "yes" if same else "NO")
            Console(stderr=True).print(f"kill {kill + 1}: after {seen}, resumed from {resumed}, identical: {same}")
    Console().print(table)
    found = {"kills": options.kills, "identical": identical, "steps": last, "threads": options.threads}
    print(json.dumps(found) if options.json else f"{identical} of {options.kills} ends are bit-identical")
    raise SystemExit(identical != options.kills)


if __name__ == "__main__":
    main()

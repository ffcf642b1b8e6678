"""What a run says while it runs: progress for people, `log.jsonl` for machines, TensorBoard for pictures."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from scalerec.checkpoint import write_atomically
from scalerec.results import shown, to_json

SHOWN = ("auc", "uauc", "log_loss", "calibration", "hr@10", "hr@50", "hr@200", "ndcg@10", "mrr")


class Log:
    """Writes to `folder`; `rewind` forgets what a killed run wrote after what it resumes from."""

    def __init__(self, folder: Path, *, quiet: bool = False, tensorboard: bool = True):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        self.console = Console(stderr=True, quiet=quiet)
        self._tensorboard_folder = folder / "tensorboard" if tensorboard else None
        self._writer: Any = None
        self._purge_step: int | None = None
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._epoch = -1
        self._began, self._rows = time.monotonic(), 0

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._writer is not None:
            self._writer.close()

    def say(self, message: str) -> None:
        self.console.print(message, highlight=False, markup=False, soft_wrap=True)

    def counts(self, counts: Counter[str]) -> None:
        """Everything that was dropped, repaired or unknown, once."""
        for what, number in sorted(counts.items()):
            if what != "rows":
                self.say(f"  {what}: {number:,}")

    def progress(self, epoch: int, epochs: int, rows: int, total_rows: int, loss: float) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[speed]}"),
                TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self._task = self._progress.add_task("", total=total_rows, speed="")
            self._progress.start()
        assert self._task is not None
        if epoch != self._epoch:
            self._epoch, self._began, self._rows = epoch, time.monotonic(), 0
            self._progress.reset(self._task, total=total_rows)
        self._rows += rows
        speed = self._rows / max(time.monotonic() - self._began, 1e-9)
        description = f"epoch {epoch + 1}/{epochs}  loss {loss:.4f}"
        self._progress.update(self._task, advance=rows, description=description, speed=f"{speed:,.0f} rows/s")

    def write(self, kind: str, step: int, values: dict[str, Any], seconds: float) -> None:
        entry = {"kind": kind, "step": step, **values, "seconds": round(seconds, 3)}
        with self.path.open("a") as file:
            file.write(to_json(entry) + "\n")
        for task, table in values.get("tasks", {}).items():
            line = "  ".join(f"{name} {shown(table[name], '.4f')}" for name in SHOWN if name in table)
            self.say(f"step {step}  {kind}  {task:<10} {line}")
        self._to_tensorboard(kind, step, values)

    def rewind(self, step: int, *, evaluated: bool) -> None:
        """Back to what was kept at `step`, before or after the evaluation there."""
        self._purge_step = step + 1
        if self.path.exists():
            lines = [line for line in self.path.read_text().splitlines() if _before(line, step, evaluated)]
            write_atomically(self.path, "".join(line + "\n" for line in lines))

    def _to_tensorboard(self, kind: str, step: int, values: dict[str, Any]) -> None:
        if self._tensorboard_folder is None:
            return
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only when it is wanted

            self._writer = SummaryWriter(str(self._tensorboard_folder), purge_step=self._purge_step)
        flat = {name: value for name, value in values.items() if isinstance(value, (int, float))}
        for task, table in values.get("tasks", {}).items():
            flat |= {f"{task}/{name}": value for name, value in table.items()}
        for name, value in flat.items():
            self._writer.add_scalar(f"{kind}/{name}", value, step)
        for name, value in values.items():
            if isinstance(value, list):
                self._writer.add_histogram(f"{kind}/{name}", np.array(value, dtype=np.float32), step)


def _before(line: str, step: int, evaluated: bool) -> bool:
    try:
        entry = json.loads(line)
        return entry["step"] < step or (entry["step"] == step and (evaluated or entry["kind"] != "validation"))
    except (json.JSONDecodeError, KeyError):
        return False  # the half-written last line of a killed run

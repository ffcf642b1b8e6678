"""(model, batches) -> predictions -> a table per task; the same for whatever can be called on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from scalerec import metrics
from scalerec.batch import Batch, Outputs


class Predictions(NamedTuple):
    """Scores of n rows for T tasks, in the order of the rows."""

    probabilities: np.ndarray  # [n, T] float32
    labels: np.ndarray  # [n, T]
    weights: np.ndarray  # [n, T]
    users: np.ndarray  # [n] int64 codes
    index: np.ndarray  # [n] row numbers in the files


@torch.inference_mode()
def predict(model: Callable[[Batch], Outputs], batches: Iterable[Batch]) -> Predictions:
    """Probabilities of every row of `batches`; the model is taken as it is (eager, compiled, exported, sharded)."""
    parts = []
    for batch in batches:
        tensors = (torch.sigmoid(model(batch).logits.float()), batch.labels, batch.weights, batch.users, batch.index)
        parts.append(Predictions(*(tensor.cpu().numpy() for tensor in tensors)))
    return Predictions(*(np.concatenate([getattr(part, field) for part in parts]) for field in Predictions._fields))


def tables(
    predictions: Predictions, tasks: Iterable[str], rows: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of each task over its rows (those with a weight), or over the part of them where `rows` [n] is true."""
    found = {}
    for j, task in enumerate(tasks):
        counted = predictions.weights[:, j] > 0
        if rows is not None:
            counted &= rows
        found[task] = metrics.table(
            predictions.users[counted], predictions.labels[counted, j], predictions.probabilities[counted, j]
        )
    return found


def write(predictions: Predictions, tasks: Iterable[str], path: Path) -> None:
    """Predictions as Parquet: row, user code, and per task its label, weight and score."""
    columns: dict[str, np.ndarray] = {"row": predictions.index, "user": predictions.users}
    for j, task in enumerate(tasks):
        columns[f"{task}_label"] = predictions.labels[:, j]
        columns[f"{task}_weight"] = predictions.weights[:, j]
        columns[f"{task}_score"] = predictions.probabilities[:, j]
    temporary = path.with_name(f".{path.name}.new")
    pq.write_table(pa.table(columns), temporary, compression="zstd")
    temporary.replace(path)


def read(path: Path, tasks: Iterable[str]) -> Predictions:
    """The reverse of `write`."""
    table = pq.read_table(path)

    def stack(suffix: str) -> np.ndarray:
        return np.stack([table.column(f"{task}_{suffix}").to_numpy() for task in tasks], 1)

    tasks = list(tasks)
    return Predictions(
        stack("score"), stack("label"), stack("weight"), table.column("user").to_numpy(), table.column("row").to_numpy()
    )

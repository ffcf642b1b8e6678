"""(model, batches) -> predictions -> a table per task; the same for whatever can be called on a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from scalerec import metrics, topk
from scalerec.batch import Batch, Outputs
from scalerec.errors import InputError
from scalerec.models.sequential import SequentialModel

BATCH = 1024  # rows: so that evaluating takes no more memory than training
NEXT = "next"  # what retrieval is measured as, beside the tasks


class Predictions(NamedTuple):
    """Scores of n rows for T tasks, in the order of the rows."""

    probabilities: np.ndarray  # [n, T] float32
    labels: np.ndarray  # [n, T]
    weights: np.ndarray  # [n, T]
    users: np.ndarray  # [n] int64 codes
    index: np.ndarray  # [n] row numbers in the files
    places: np.ndarray  # [n, 1] rank of the row's item among all, NaN where none is asked; [n, 0] without retrieval


@torch.inference_mode()
def predict(model: Callable[[Batch], Outputs], batches: Iterable[Batch]) -> Predictions:
    """Scores of every row of `batches`; the model is taken as it is (eager, compiled, exported, sharded)."""
    retriever = model if isinstance(model, SequentialModel) and model.retrieves else None
    catalogue = torch.zeros(0) if retriever is None else retriever.catalogue()
    parts: list[Predictions] = []
    for batch in batches:
        if retriever is None:
            logits, places = model(batch).logits, batch.labels.new_zeros(len(batch), 0)
        else:
            logits, place = retriever.logits_and_places(batch, catalogue)
            places = place[:, None]
        tensors = (torch.sigmoid(logits.float()), batch.labels, batch.weights, batch.users, batch.index, places)
        parts.append(Predictions(*(tensor.cpu().numpy() for tensor in tensors)))
        # Few and ever larger: thousands of small arrays would pin the memory that the batches between them gave back.
        while len(parts) > 1 and len(parts[-2].index) <= len(parts[-1].index):
            parts[-2:] = [_joined(parts[-2:])]
    if not parts:
        raise InputError("no rows to evaluate: choose another part or file, or move the cuts of --data.split")
    return _joined(parts)


def _joined(parts: list[Predictions]) -> Predictions:
    return Predictions(*map(np.concatenate, zip(*parts)))


def tables(
    predictions: Predictions, tasks: Iterable[str], rows: np.ndarray | None = None
) -> dict[str, dict[str, float]]:
    """Metrics of each task over its rows (those with a weight), or over the part of them where `rows` [n] is true.

    What a model is not made for is left out: tasks of one that only retrieves; `next`, its own, of one that only ranks.
    """
    found = {}
    for j, task in enumerate(tasks if predictions.probabilities.shape[1] else ()):
        counted = predictions.weights[:, j] > 0
        if rows is not None:
            counted &= rows
        found[task] = metrics.table(
            predictions.users[counted], predictions.labels[counted, j], predictions.probabilities[counted, j]
        )
    if predictions.places.shape[1]:
        asked = ~np.isnan(predictions.places[:, 0])
        found[NEXT] = topk.table(predictions.places[asked if rows is None else asked & rows, 0])
    return found


def write(predictions: Predictions, tasks: Iterable[str], path: Path) -> None:
    """Predictions as Parquet: row, user code, per task its label, weight and score, and the place of the row's item."""
    columns: dict[str, np.ndarray] = {"row": predictions.index, "user": predictions.users}
    for j, task in enumerate(tasks):
        columns[f"{task}_label"] = predictions.labels[:, j]
        columns[f"{task}_weight"] = predictions.weights[:, j]
        if predictions.probabilities.shape[1]:
            columns[f"{task}_score"] = predictions.probabilities[:, j]
    if predictions.places.shape[1]:
        columns[f"{NEXT}_place"] = predictions.places[:, 0]
    temporary = path.with_name(f".{path.name}.new")
    pq.write_table(pa.table(columns), temporary, compression="zstd")
    temporary.replace(path)


def read(path: Path, tasks: Sequence[str]) -> Predictions:
    """The reverse of `write`."""
    table = pq.read_table(path)

    def stack(names: list[str]) -> np.ndarray:
        columns = [table.column(name).to_numpy() for name in names if name in table.column_names]
        return np.stack(columns, 1) if columns else np.zeros((len(table), 0), np.float32)

    scores, labels, weights = ([f"{task}_{what}" for task in tasks] for what in ("score", "label", "weight"))
    users, rows = table.column("user").to_numpy(), table.column("row").to_numpy()
    return Predictions(stack(scores), stack(labels), stack(weights), users, rows, stack([f"{NEXT}_place"]))

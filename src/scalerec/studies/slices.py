"""Metrics of a trained run on any part, any files, and any slice of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa

from scalerec import checkpoint, metrics, topk
from scalerec.batch import UNKNOWN
from scalerec.config import override, parse
from scalerec.data.histories import with_histories
from scalerec.data.loader import Loader
from scalerec.data.parts import together
from scalerec.data.reader import ParquetRows, find_parquet
from scalerec.data.split import NoSplit, Part
from scalerec.errors import InputError
from scalerec.evaluate import BATCH, NEXT, Predictions
from scalerec.evaluate import predict as predict_batches
from scalerec.evaluate import tables as tables_of
from scalerec.features.encoder import Encoder
from scalerec.schema import Categorical
from scalerec.training.run import Run

MOST_VALUES = 50  # slices shown
REPLICATES = 200
OF_PLACES = ("hr@10", "ndcg@10")  # what has an interval, of retrieval


def evaluate_run(
    folder: Path, *, part: Part = "test", data: str | None = None, by: str | None = None, keep_rate: float = 1.0,
    changes: dict[str, str] | None = None, progress: Callable[[str], None] = lambda message: None,
) -> dict[str, dict[str, dict[str, float]]]:  # fmt: skip
    """Slice -> task -> metrics; without `by` the one slice is the part itself.

    Of more than 50 values to slice by, those with the most rows are slices, and all others are one together.

    Raises:
        InputError: no checkpoint, files without the columns of its schema, a column to slice by that is not there, a
            `keep_rate` for a model without probabilities.
    """
    saved = checkpoint.load(folder)
    model = saved.model()
    if keep_rate != 1.0 and not model.ranks:
        raise InputError(
            f"--keep-rate {keep_rate}: {saved.run['model']['kind']} in {folder} only retrieves and has no "
            "probabilities to correct: leave it out"
        )
    run = override(parse(Run, saved.run, str(folder)), changes or {})
    if data:
        files = with_histories(find_parquet(data), saved.encoder.schema, progress).files
        rows, part = ParquetRows(files, NoSplit()), "train"
    else:
        rows = ParquetRows.of(run.data, run.data.prepare(), skip_bad_shards=run.skip_bad_shards)
    predictions = predict_batches(model, Loader(rows, saved.encoder, part, BATCH))
    if keep_rate != 1.0:
        corrected = metrics.recalibrate(predictions.probabilities, keep_rate).astype(np.float32)
        predictions = predictions._replace(probabilities=corrected)
    tasks = saved.layout.tasks
    if by is None:
        found = tables_of(predictions, tasks)
        intervals = {task: _intervals(predictions, j) for j, task in enumerate(tasks) if task in found}
        if NEXT in found:
            intervals[NEXT] = _intervals_of_places(predictions)
        return {Path(data).name if data else part: {name: table | intervals[name] for name, table in found.items()}}
    values = _values(rows, part, by, saved.encoder, predictions)
    found, counts = np.unique(values, return_counts=True)
    largest = found[np.sort(np.argsort(-counts, kind="stable")[:MOST_VALUES])]
    tables = {str(value): tables_of(predictions, tasks, values == value) for value in largest}
    if len(found) > len(largest):
        rest = f"{len(found) - len(largest):,} other values together"
        tables[rest] = tables_of(predictions, tasks, ~np.isin(values, largest))
    return tables


def _intervals(predictions: Predictions, j: int) -> dict[str, float]:
    """95 % intervals of task j's AUC and UAUC over redrawn users, where there are enough of them."""
    counted = predictions.weights[:, j] > 0
    arrays = predictions.users[counted], predictions.labels[counted, j], predictions.probabilities[counted, j]
    found = {}
    for metric in ("auc", "uauc"):
        try:
            estimate = metrics.bootstrap(*arrays, metric=metric, replicates=REPLICATES)
        except InputError:  # too few users: the metric stands without an interval
            continue
        found |= {f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
    return found


def _intervals_of_places(predictions: Predictions) -> dict[str, float]:
    """The same of what retrieval is measured by: each metric is its difference to one that never finds anything."""
    asked = ~np.isnan(predictions.places[:, 0])
    users, places = predictions.users[asked], predictions.places[asked, 0]
    found = {}
    for metric in OF_PLACES if len(np.unique(users)) > 1 else ():
        estimate = topk.paired_bootstrap(users, np.full_like(places, np.inf), places, metric, REPLICATES)
        found |= {f"{metric}_low": estimate.low, f"{metric}_high": estimate.high}
    return found


def _values(rows: ParquetRows, part: Part, by: str, encoder: Encoder, predictions: Predictions) -> np.ndarray:
    """The slice [n] of each scored row, as text."""
    schema = encoder.schema
    cold = {"cold_user": schema.user, "cold_item": schema.item}
    if by in cold:
        feature = next(
            (f for f in schema.features if isinstance(f, Categorical) and (f.column or f.name) == cold[by]), None
        )
        if feature is None or feature.name not in encoder.vocabularies:
            raise InputError(
                f"--by {by}: column {cold[by]!r} is no categorical feature with a dictionary in this schema"
            )
        vocabulary = encoder.vocabularies[feature.name]
        column = feature.column or feature.name
        unknown = [vocabulary.ids(b.column(column), column) == UNKNOWN for b in rows.batches(part, [column])]
        return np.where(np.concatenate(unknown), "new", "known")
    pieces = [pa.table({by: piece.column(by)}) for piece in rows.batches(part, [by])]
    flat = together(pieces, f"--by {by}").column(by)
    if pa.types.is_nested(flat.type):
        raise InputError(f"--by {by}: is {flat.type}; slice by a column of single values")
    return np.asarray([str(value) for value in flat.to_pylist()])

"""Gradient-boosted trees on the same columns: the outside reference that stands in every comparison."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from scalerec import evaluate
from scalerec.batch import Batch
from scalerec.data.reader import ParquetRows
from scalerec.data.split import Part
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.features.numeric import numbers
from scalerec.schema import Categorical, Cross, Numeric
from scalerec.training.run import Run

LARGE = 1000  # a vocabulary beyond it is given as ordered codes: splits over sets of so many values overfit
PARAMETERS = {
    "objective": "binary", "metric": "auc", "learning_rate": 0.05, "num_leaves": 63, "min_data_in_leaf": 50,
    "feature_fraction": 0.7, "bagging_fraction": 0.8, "bagging_freq": 1, "cat_smooth": 20.0, "verbosity": -1,
    "deterministic": True,
}  # fmt: skip
MOST_TREES, PATIENCE = 1000, 50
FITTED: tuple[Part, ...] = ("train", "validation")


class Table(NamedTuple):
    """One part as trees read it."""

    features: np.ndarray  # [n, F] float32, NaN where missing
    labels: np.ndarray  # [n, T]
    weights: np.ndarray  # [n, T]
    users: np.ndarray  # [n]
    index: np.ndarray  # [n]


def train(run: Run, out: Path, seed: int) -> dict[str, Any]:
    """One LightGBM model per task, stopped early on validation; writes `test.parquet` and returns metrics.

    Numbers go in raw, categories as categories, a list as its length; crosses are left to the trees.

    Raises:
        InputError: lightgbm is not installed.
    """
    try:
        import lightgbm
    except ImportError:
        raise InputError("the reference needs LightGBM: pip install -e '.[lightgbm]'") from None
    rows = ParquetRows.of(run.data, run.data.prepare(), skip_bad_shards=run.skip_bad_shards)
    schema = run.data.schema()
    encoder = Encoder.fit(schema, rows.batches("train", schema.input_columns()))
    began = time.monotonic()  # the span that networks note: rows read and encoded, training, its validation
    tables = {part: _table(rows, encoder, part) for part in FITTED}
    parameters = {**PARAMETERS, "seed": seed, "num_threads": run.training.threads or torch.get_num_threads()}
    boosters = []
    for j in range(len(schema.tasks)):
        sets: dict[str, Any] = {}
        for part in FITTED:
            table = tables[part]
            keep = table.weights[:, j] > 0
            sets[part] = lightgbm.Dataset(
                table.features[keep], table.labels[keep, j], weight=table.weights[keep, j], reference=sets.get("train"),
                categorical_feature=_categorical(encoder),
            )  # fmt: skip
        stop = lightgbm.early_stopping(PATIENCE, verbose=False)
        boosters.append(lightgbm.train(parameters, sets["train"], MOST_TREES, [sets["validation"]], callbacks=[stop]))
    found: dict[str, Any] = {
        "name": f"lightgbm_{run.data.kind}",
        "trees": sum(booster.best_iteration for booster in boosters),
        "seconds": time.monotonic() - began,
    }
    tables["test"] = _table(rows, encoder, "test")
    scores = {
        part: [booster.predict(tables[part].features, num_iteration=booster.best_iteration) for booster in boosters]
        for part in ("validation", "test")
    }
    out.mkdir(parents=True, exist_ok=True)
    predictions = {
        part: evaluate.Predictions(
            np.stack(values, 1).astype(np.float32), *tables[part][1:], np.zeros((len(values[0]), 0))
        )
        for part, values in scores.items()
    }
    tasks = encoder.layout.tasks
    evaluate.write(predictions["test"], tasks, out / "test.parquet")
    return {**found, **{part: evaluate.tables(values, tasks) for part, values in predictions.items()}}


def _table(rows: ParquetRows, encoder: Encoder, part: Part) -> Table:
    pieces = [piece for piece in rows.pieces(part) if piece.rows.num_rows]
    batches = [encoder.encode(piece.rows, index=piece.index, where=str(piece.group.file)) for piece in pieces]
    features = [_features(batch, encoder, piece.rows) for batch, piece in zip(batches, pieces)]
    batch = Batch.cat(batches)
    arrays = (batch.labels, batch.weights, batch.users, batch.index)
    return Table(np.concatenate(features), *(array.numpy() for array in arrays))


def _features(batch: Batch, encoder: Encoder, rows: Any) -> np.ndarray:
    columns = []
    sides = {"user": batch.user.take(batch.user_of_row), "item": batch.items}
    place = {f.name: (side, j) for side, shape in encoder.layout.sides.items() for j, f in enumerate(shape.ids)}
    lists = {name: jagged for side in sides.values() for name, jagged in side.lists.items()}
    for feature in _used(encoder):
        if isinstance(feature, Numeric):
            columns.append(numbers(rows.column(feature.column or feature.name), feature.name)[0])
        elif isinstance(feature, Categorical):
            side, j = place[feature.name]
            columns.append(sides[side].ids[:, j].numpy())
        else:
            columns.append(lists[feature.name].lengths.numpy())
    return np.stack([np.asarray(column, np.float32) for column in columns], 1)


def _used(encoder: Encoder) -> list[Any]:
    return [feature for feature in encoder.schema.features if not isinstance(feature, Cross)]


def _categorical(encoder: Encoder) -> list[int]:
    """Places of the features that trees split by sets of values."""
    table = encoder.layout.table
    return [i for i, f in enumerate(_used(encoder)) if isinstance(f, Categorical) and table[f.name].rows <= LARGE]

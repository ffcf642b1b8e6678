"""Gradient-boosted trees on the same columns: the outside reference that stands in every comparison."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from scalerec import evaluate
from scalerec.data.loader import Loader
from scalerec.data.reader import Rows
from scalerec.data.split import Part
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.features.lists import lists
from scalerec.features.numeric import numbers
from scalerec.schema import Categorical, MultiCategorical, Numeric, Sequence
from scalerec.training.run import Run

LARGE = 1000  # a vocabulary beyond it is given to the trees as ordered codes: splits over sets of its values overfit


def train(run: Run, out: Path, seed: int) -> dict:
    """One LightGBM model per task with early stopping on validation; writes what `training.train` writes.

    Numbers go in raw, categories as categories, a list as its length and its last value; crosses are left to the trees.

    Raises:
        InputError: lightgbm is not installed.
    """
    try:
        import lightgbm
    except ImportError:
        raise InputError("the reference needs LightGBM: pip install 'scalerec[lightgbm]'") from None
    began = time.monotonic()
    rows = Rows.of(run.data, run.data.prepare())
    schema = run.data.schema()
    encoder = Encoder.fit(schema, rows.batches("train", schema.input_columns()))
    parts: list[Part] = ["train", "validation", "test"]
    matrices = {part: _matrix(rows, encoder, part) for part in parts}
    categorical = _categorical(encoder)
    parameters = {
        "objective": "binary", "learning_rate": 0.05, "num_leaves": 63, "min_data_in_leaf": 50, "max_cat_threshold": 32,
        "feature_fraction": 0.7, "bagging_fraction": 0.8, "bagging_freq": 1, "cat_smooth": 20.0, "seed": seed,
        "verbosity": -1, "num_threads": run.training.threads or torch.get_num_threads(), "deterministic": True,
    }  # fmt: skip
    scores: dict[str, list[np.ndarray]] = {"validation": [], "test": []}
    trees = 0
    for j, task in enumerate(schema.tasks):
        sets = {}
        for part in ("train", "validation"):
            x, batch = matrices[part]
            keep = batch.weights[:, j].numpy() > 0
            sets[part] = lightgbm.Dataset(
                x[keep], batch.labels[keep, j].numpy(), weight=batch.weights[keep, j].numpy(),
                categorical_feature=categorical, reference=sets.get("train"), free_raw_data=False,
            )  # fmt: skip
        booster = lightgbm.train(
            {**parameters, "metric": "auc"}, sets["train"], 1000, valid_sets=[sets["validation"]],
            callbacks=[lightgbm.early_stopping(50, verbose=False)],
        )  # fmt: skip
        trees += booster.best_iteration
        for part, values in scores.items():
            values.append(np.asarray(booster.predict(matrices[part][0], num_iteration=booster.best_iteration)))
    out.mkdir(parents=True, exist_ok=True)
    found = {"name": f"lightgbm_{run.data.kind}", "seconds": time.monotonic() - began, "trees": trees}
    tasks = encoder.layout.tasks
    for part, values in scores.items():
        batch = matrices[part][1]
        predictions = evaluate.Predictions(
            np.stack(values, 1).astype(np.float32), batch.labels.numpy(), batch.weights.numpy(), batch.users.numpy(),
            batch.index.numpy(),
        )  # fmt: skip
        found[part] = evaluate.tables(predictions, tasks)
        if part == "test":
            evaluate.write(predictions, tasks, out / "test.parquet")
    return found


def _matrix(rows: Rows, encoder: Encoder, part: Part):
    """Features [n, F] as float32 with NaN where missing, and the encoded rows beside them."""
    pieces = list(rows.pieces(part))
    columns = [_columns(piece.rows, encoder) for piece in pieces]
    from scalerec.batch import Batch

    batches = [encoder.encode(piece.rows, index=piece.index) for piece in pieces if piece.rows.num_rows]
    return np.concatenate(columns), Batch.cat(batches)


def _columns(rows: pa.RecordBatch, encoder: Encoder) -> np.ndarray:
    found = []
    for feature in encoder.schema.features:
        if isinstance(feature, Numeric):
            found.append(numbers(rows.column(feature.column or feature.name), feature.name)[0])
        elif isinstance(feature, Categorical):
            found.append(encoder._ids(feature, rows.column(feature.column or feature.name)))
        elif isinstance(feature, (MultiCategorical, Sequence)):
            column = feature.column or feature.name if isinstance(feature, MultiCategorical) else feature.column(feature.fields[0])
            _, lengths = lists(rows.column(column), column, getattr(feature, "separator", None))
            found.append(lengths)
    return np.stack([np.asarray(x, np.float32) for x in found], 1)


def _categorical(encoder: Encoder) -> list[int]:
    kept = [f for f in encoder.schema.features if isinstance(f, (Numeric, Categorical, MultiCategorical, Sequence))]
    return [
        i for i, f in enumerate(kept) if isinstance(f, Categorical) and encoder.layout.table[f.name].rows <= LARGE
    ]

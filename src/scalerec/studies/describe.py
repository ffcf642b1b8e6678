"""What a run would build: which features land in which token, parameters by part, operations, memory."""

from __future__ import annotations

from typing import Any

import torch

from scalerec.batch import Batch
from scalerec.data.reader import ParquetRows
from scalerec.features.encoder import Encoder
from scalerec.models.base import Model
from scalerec.training.run import Run

ROWS = 512  # the batch of the paper's FLOPs column


def describe(run: Run) -> dict[str, Any]:
    """Figures of a run's model on its data, for a batch of 512 rows; nothing of the model is allocated."""
    rows = ParquetRows.of(run.data, run.data.prepare())
    schema = run.schema()
    encoder = Encoder.fit(schema, rows.batches("train", schema.input_columns()))
    batch = encoder.encode(next(b for b in rows.batches("train") if b.num_rows).slice(0, ROWS))
    with torch.device("meta"):
        model = run.model.build(encoder.layout)
    return {**figures(model, batch), "name": run.name, "tokens": tokens(model), "groups": groups(model)}


def figures(model: Model, batch: Batch) -> dict[str, Any]:
    """Parameters by part, forward multiply-accumulates, FLOPs a row and embedding memory."""
    parts = model.parts()
    flops = model.flops(batch)
    dense = sum(parts.values())
    return {
        "parameters": parts,
        "dense_parameters": dense,
        "embedding_parameters": model.layout.embedding_parameters,
        "embedding_bytes": 4 * model.layout.embedding_parameters,
        "rows": len(batch),
        "users": len(batch.user),
        "forward_macs": flops // 2,
        "forward_flops": flops,
        "training_flops": 3 * flops,
        "flops_per_row": flops / len(batch),
        "flops_per_parameter": flops / dense,
    }


def tokens(model: Model) -> list[dict[str, Any]]:
    """For models with tokens: the side of each and its features, "name[a:b]" where only those columns are in it."""
    tokenizer = getattr(model, "tokenizer", None)
    return [{"side": side, "features": names} for side, names in tokenizer.describe()] if tokenizer else []


def groups(model: Model) -> list[dict[str, Any]]:
    return [
        {"name": g.name, "side": g.side, "width": g.width, "features": [f.name for f in g.features]}
        for g in model.layout.groups
    ]

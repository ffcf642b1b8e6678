"""What a run would build: which features land in which token, parameters by part, operations, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from scalerec.batch import Batch, Jagged
from scalerec.data.reader import ParquetRows
from scalerec.features.encoder import Encoder
from scalerec.models.base import Model
from scalerec.models.sequential import SequentialModel
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
    found = {**figures(model, batch), "name": run.name, "tokens": tokens(model), "groups": groups(model)}
    if isinstance(model, SequentialModel):
        found["sequences"] = session_cost(model, batch)
    return found


def session_cost(model: SequentialModel, batch: Batch) -> dict[str, float]:
    """What one example for many targets saves against an example for each of them (spec C.10), in forward FLOPs."""
    each = impressions(model, batch)
    together, apart = model.flops(batch), model.flops(each)
    return {"examples": len(batch), "targets": len(each), "flops": together, "flops_apart": apart,
            "saving": apart / together}  # fmt: skip


def impressions(model: SequentialModel, batch: Batch) -> Batch:
    """Every target of a training batch as a row of its own with the past before it; rows stand in for its events."""
    name = model.series.name
    new = torch.zeros(len(batch), dtype=torch.long) if batch.new_events is None else batch.new_events
    row = torch.repeat_interleave(torch.arange(len(batch)), new + 1)
    back = torch.arange(len(row)) - torch.repeat_interleave((new + 1).cumsum(0) - new - 1, new + 1)  # 0: the row itself
    each = replace(batch.take(row).unshared(), new_events=None)
    past = each.user.lists[name]
    place = torch.arange(len(past.values)) - torch.repeat_interleave(past.offsets[:-1], past.lengths)
    before = place < torch.repeat_interleave(past.lengths - back, past.lengths)
    cut = Jagged.from_lengths(past.values[before], past.lengths - back)
    return replace(each, user=replace(each.user, lists={**each.user.lists, name: cut}))


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

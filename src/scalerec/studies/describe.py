"""What a run would build: which features land in which token, parameters by part, operations, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from scalerec.batch import Batch, Jagged, Rows
from scalerec.data.reader import ParquetRows
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.models.base import Model
from scalerec.models.sequential import SequentialModel
from scalerec.training.run import Run

ROWS = 512  # the batch of the paper's FLOPs column


def describe(run: Run) -> dict[str, Any]:
    """Figures of a run's model on its data, for a batch of 512 rows; nothing of the model is allocated."""
    rows = ParquetRows.of(run.data, run.data.prepare(), skip_bad_shards=run.skip_bad_shards)
    schema = run.schema()
    encoder = Encoder.fit(schema, rows.batches("train", schema.input_columns()))
    piece = next((piece for piece in rows.batches("train") if piece.num_rows), None)
    if piece is None:
        raise InputError("the train part holds no rows: move the cuts of --data.split")
    batch = encoder.encode(piece.slice(0, ROWS))
    with torch.device("meta"):
        model = run.model.build(encoder.layout)
    found = {**figures(model, batch), "name": run.name, "tokens": tokens(model), "groups": groups(model)}
    if isinstance(model, SequentialModel):
        found["sequences"] = session_cost(model, spread(rows, encoder))
    return found


def spread(rows: ParquetRows, encoder: Encoder) -> Batch:
    """Up to 512 training examples from all over the log: where it begins, lives are short."""
    step, seen, some = max(rows.num_rows // (8 * ROWS), 1), 0, []
    for piece in rows.batches("train"):
        chosen = np.arange(-seen % step, piece.num_rows, step)
        seen += piece.num_rows
        if len(chosen):
            some.append(encoder.encode(piece.take(pa.array(chosen))))
    batch = Batch.cat(some)
    return batch.take(torch.linspace(0, len(batch) - 1, min(len(batch), ROWS)).long())


def session_cost(model: SequentialModel, batch: Batch) -> dict[str, float]:
    """What one example for many targets saves against an example for each of them, in forward FLOPs."""
    batch = batch.unshared()
    each = impressions(model, batch)
    together, apart = model.flops(batch), model.flops(each)
    return {"examples": len(batch), "targets": len(each), "flops": together, "flops_apart": apart,
            "saving": apart / together}  # fmt: skip


def impressions(model: SequentialModel, batch: Batch) -> Batch:
    """Every target of a training batch (U = B) as a row of its own with what was before it, the row for its events.

    To foresee an event takes one before it, so the first of a life is a target only where its labels are.
    """
    name = model.series.name
    past = batch.user.lists[name]
    owner = torch.repeat_interleave(torch.arange(len(batch)), past.lengths)
    new = torch.bincount(owner[model.new_events(batch)], minlength=len(batch))
    row = torch.repeat_interleave(torch.arange(len(batch)), new + 1)
    back = torch.arange(len(row)) - torch.repeat_interleave((new + 1).cumsum(0) - new - 1, new + 1)  # 0: the row itself
    target = (back < past.lengths[row]) & model.retrieves
    target |= model.ranks & (back == 0) | model.ranks_past
    row, back = row[target], back[target]
    each = replace(batch.take(row).unshared(), new_events=None)
    return replace(each, user=before(each.user, name, back))


def before(user: Rows, name: str, back: Tensor) -> Rows:
    """Each user as of the event of the series `name` that is `back` [U] before the end; 0 leaves a user as it is."""
    past, now = user.lists[name], user.now
    many = {name: past.lengths - back}
    if now is not None and name in user.times:
        times = torch.cat([user.times[name].values, now.new_zeros(1)])
        now = torch.where(back > 0, times[past.offsets[1:] - back], now)
        for other, kept in user.times.items():
            if other != name:
                owner = torch.repeat_interleave(torch.arange(len(kept)), kept.lengths)
                earlier = torch.bincount(owner[kept.values < now[owner]], minlength=len(kept))
                many[other] = torch.where(back > 0, earlier, kept.lengths)

    def cut(kept: dict[str, Jagged]) -> dict[str, Jagged]:
        return {key: _first(lists, many[key]) if key in many else lists for key, lists in kept.items()}

    return replace(user, lists=cut(user.lists), times=cut(user.times), actions=cut(user.actions), now=now)


def _first(lists: Jagged, many: Tensor) -> Jagged:
    """The first `many` [n] of each list."""
    place = torch.arange(len(lists.values)) - torch.repeat_interleave(lists.offsets[:-1], lists.lengths)
    return Jagged.from_lengths(lists.values[place < torch.repeat_interleave(many, lists.lengths)], many)


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
        "user_sides": len(batch.user),  # computed once for equal ones: a user has one for each of its histories
        "forward_macs": flops // 2,
        "forward_flops": flops,
        "training_flops": 3 * flops,
        "flops_per_row": flops / len(batch),
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

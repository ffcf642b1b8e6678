"""A Batch as Arrow columns, one for each feature: what the exposure log keeps of it and is held against.

B rows   U users
"""

from __future__ import annotations

import pyarrow as pa
from torch import Tensor

from scalerec.batch import Batch, Jagged, Rows
from scalerec.features.layout import Layout


def encoded_columns(batch: Batch, layout: Layout) -> dict[str, pa.Array]:
    """Per feature its B row ids (int64), standardised numbers (float32, null where missing), or lists of ids.

    Of a sequence with several fields a list holds the ids of the first event, then those of the second, and so on.
    """
    found: dict[str, pa.Array] = {}
    for rows, place in ((batch.user, batch.user_of_row), (batch.items, None)):
        side = layout.sides[rows.side]
        found |= {feature.name: _plain(rows.ids[:, i], place) for i, feature in enumerate(side.ids)}
        found |= {feature.name: _numbers(rows, i, place) for i, feature in enumerate(side.numbers)}
        found |= {feature.name: _lists(rows.lists[feature.name], place) for feature in (*side.multi, *side.sequences)}
    return found


def _plain(values: Tensor, place: Tensor | None) -> pa.Array:
    return pa.array((values if place is None else values[place]).numpy())


def _numbers(rows: Rows, column: int, place: Tensor | None) -> pa.Array:
    values = rows.numbers[:, column]
    return pa.array((values if place is None else values[place]).numpy(), from_pandas=True)


def _lists(jagged: Jagged, place: Tensor | None) -> pa.Array:
    chosen = jagged if place is None else jagged.take(place)
    width = chosen.values.shape[1] if chosen.values.dim() > 1 else 1
    offsets = pa.array((chosen.offsets * width).numpy())
    return pa.LargeListArray.from_arrays(offsets, pa.array(chosen.values.reshape(-1).numpy()))

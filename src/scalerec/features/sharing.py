"""One user, many rows: equal user sides are kept once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from scalerec.batch import Batch, Rows, bits
from scalerec.features.compiled import fold_columns, fold_lists


def share(batch: Batch) -> Batch:
    """The same rows with equal user sides merged, users in the order of their first row."""
    code = _codes(batch.user)[batch.user_of_row.numpy()]
    _, first, inverse = np.unique(code, return_index=True, return_inverse=True)
    # In the order of their first row, so that a batch of one row and a larger one agree on who is user 0.
    order = np.argsort(first)
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    representatives = batch.user_of_row[torch.from_numpy(first[order])]
    return replace(
        batch, user=batch.user.take(representatives), user_of_row=torch.from_numpy(rank[inverse.reshape(-1)])
    )


def _codes(user: Rows) -> np.ndarray:
    """A 64-bit code [U] of everything on each user's side."""
    codes = np.zeros(len(user), np.uint64)
    for columns in (user.ids, user.numbers, *([] if user.now is None else [user.now])):
        fold_columns(codes, _by_row(columns))
    for jagged in (*user.lists.values(), *user.times.values(), *user.actions.values()):
        fold_lists(codes, _by_row(jagged.values), jagged.offsets.numpy())
    return codes


def _by_row(values: Tensor) -> np.ndarray:
    """[n] or [n, k] of any kind -> its bits [n, k]."""
    return bits(values).reshape(len(values), -1 if len(values) else 0)

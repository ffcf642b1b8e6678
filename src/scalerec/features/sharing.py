"""One user, many rows: equal user sides are kept once."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from scalerec.batch import Batch, Rows
from scalerec.features.hashing import mix


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
    code = np.zeros(len(user), np.uint64)
    with np.errstate(over="ignore"):
        for j in range(user.ids.shape[1]):
            code = mix(code + user.ids[:, j].numpy().view(np.uint64))
        for j in range(user.numbers.shape[1]):
            code = mix(code + user.numbers[:, j].numpy().view(np.uint32))
        if user.now is not None:
            code = mix(code + user.now.numpy().view(np.uint64))
        for jagged in (*user.lists.values(), *user.times.values(), *user.actions.values()):
            values = jagged.values.contiguous().numpy()
            values = (values[:, None] if values.ndim == 1 else values).view(f"u{values.itemsize}")
            lengths = jagged.lengths.numpy()
            position = np.arange(len(values)) - np.repeat(jagged.offsets[:-1].numpy(), lengths)
            mixed = mix(position.astype(np.uint64))
            for j in range(values.shape[1]):
                mixed = mix(mixed + values[:, j])
            sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
            offsets = jagged.offsets.numpy()
            code = mix(code + sums[offsets[1:]] - sums[offsets[:-1]] + lengths.view(np.uint64))
    return code

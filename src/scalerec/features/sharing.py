"""One user, many rows: equal user sides are kept once."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from scalerec.batch import Batch, Rows, bits
from scalerec.features.compiled import distinct, fold


def share(batch: Batch) -> Batch:
    """The same rows with equal user sides merged, users in the order of their first row.

    In that order a batch of one row and a larger one agree on who is user 0.
    """
    first, place = distinct(_codes(batch.user)[batch.user_of_row.numpy()])
    users = batch.user_of_row[torch.from_numpy(first)]
    if torch.equal(users, torch.arange(len(batch.user))):
        return batch
    return replace(batch, user=batch.user.take(users), user_of_row=torch.from_numpy(place))


def _codes(user: Rows) -> np.ndarray:
    """A 64-bit code [U] of everything on each user's side."""
    codes = np.zeros(len(user), np.uint64)
    for columns in (user.ids, user.numbers, *([] if user.now is None else [user.now])):
        width = math.prod(columns.shape[1:])
        fold(codes, bits(columns), np.arange(len(user) + 1) * width)
    for jagged in (*user.lists.values(), *user.times.values(), *user.actions.values()):
        width = math.prod(jagged.values.shape[1:])
        fold(codes, bits(jagged.values), jagged.offsets.numpy() * width)
    return codes

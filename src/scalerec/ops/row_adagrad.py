"""Adagrad on the rows of a table that a step has touched, on a CPU (Duchi et al., 2011; spec A.11).

torch sorts the rows to add up their gradients and then passes over what it gathered a dozen times; here a hash table
finds equal rows, and each row's sums and weights are read and written once. The plain twin, for any device, is in
`training.optim`.

n looked-up rows, with repeats   V rows of the table   d width
"""

from __future__ import annotations

import numpy as np
from numba import njit
from torch import Tensor

from scalerec.ops._threads import in_threads, worth

ALONE = 2_000  # rows that are not worth a second thread


def row_adagrad(weight: Tensor, total: Tensor, rows: Tensor, values: Tensor, lr: float, eps: float) -> None:
    """a += g^2, w -= lr g / (sqrt(a) + eps) in place, g being the sum of a row's gradients in the order they come.

    Args:
        weight: [V, d] float32.
        total: [V, d] float32, or [V, 1]: a row's mean square.
        rows: [n] int64, values: [n, d] their gradients.

    Raises IndexError where the table has no such row.
    """
    count = worth(len(rows), ALONE)
    table, sums = weight.detach().numpy(), total.numpy()
    ids, gradients = rows.contiguous().numpy(), values.contiguous().numpy()
    rate, least = np.float32(lr), np.float32(eps)
    # Each thread takes rows by their hash, so that sums do not depend on the number of threads.
    in_threads(lambda part: _part(table, sums, ids, gradients, rate, least, part, count), count)


@njit(nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy", cache=True)
def _part(weight, total, rows, values, lr, eps, part, parts):  # pragma: no cover - compiled
    width, bits = values.shape[1], 4
    while 1 << bits < 2 * len(rows):
        bits += 1
    slots = np.full(1 << bits, -1, np.int32)
    found = np.empty(len(rows), np.int64)
    sums = np.empty(values.shape, np.float32)
    count = 0
    for i in range(len(rows)):
        row = rows[i]
        if row < 0 or row >= len(weight):
            raise IndexError("a gradient is of a row that the table does not have")
        mixed = np.uint64(row) * np.uint64(0x9E3779B97F4A7C15)
        if (mixed >> np.uint64(40)) % np.uint64(parts) != part:
            continue
        slot = np.int64(mixed >> np.uint64(64 - bits))
        while slots[slot] >= 0 and found[slots[slot]] != row:
            slot = (slot + 1) & ((1 << bits) - 1)
        at = slots[slot]
        if at < 0:
            slots[slot] = count
            found[count] = row
            sums[count] = values[i]
            count += 1
        else:
            for k in range(width):
                sums[at, k] += values[i, k]
    rowwise = total.shape[1] < width
    for at in range(count):
        row = found[at]
        if rowwise:
            square = np.float32(0)
            for k in range(width):
                square += sums[at, k] * sums[at, k]
            total[row, 0] += square / np.float32(width)
            rate = lr / (np.sqrt(total[row, 0]) + eps)
            for k in range(width):
                weight[row, k] -= rate * sums[at, k]
        else:
            for k in range(width):
                total[row, k] += sums[at, k] * sums[at, k]
                weight[row, k] -= lr * sums[at, k] / (np.sqrt(total[row, k]) + eps)

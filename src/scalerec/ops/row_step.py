"""Adagrad and AdamW on the rows of a table that a step has touched, on a CPU.

torch sorts the rows to add up their gradients and then passes over what it gathered a dozen times; here a hash table
finds equal rows, and each row's state and weights are read and written once. The plain twins, for any device, are in
`training.optim`.

n looked-up rows, with repeats   V rows of the table   d width
"""

from __future__ import annotations

from collections.abc import Callable

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
    state = weight.detach().numpy(), total.numpy()
    rates = np.float32(lr), np.float32(eps)
    _by_row(rows, values, len(weight), lambda found, sums: _adagrad(*state, found, sums, *rates))


def row_adamw(
    weight: Tensor, first: Tensor, second: Tensor, steps: Tensor, rows: Tensor, values: Tensor, lr: float,
    betas: tuple[float, float], eps: float, decay: float,
) -> None:  # fmt: skip
    """The same with moments m and v, t counting a row's own steps (Loshchilov & Hutter 2019, algorithm 2), in place.

    t += 1; m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2; w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) +
    decay w).

    Args:
        weight, first: [V, d] float32.
        second: [V, d] float32, or [V, 1]: v of a row's mean square.
        steps: [V, 1] int32.
        rows: [n] int64, values: [n, d] their gradients.

    Raises IndexError where the table has no such row.
    """
    state = weight.detach().numpy(), first.numpy(), second.numpy(), steps.numpy()
    rates = np.float32(lr), np.float32(eps), np.float32(decay)
    _by_row(rows, values, len(weight), lambda found, sums: _adamw(*state, found, sums, *betas, *rates))


def _by_row(rows: Tensor, values: Tensor, height: int, update: Callable[[np.ndarray, np.ndarray], None]) -> None:
    """update(rows, sums of their gradients), each row once."""
    ids, gradients = rows.contiguous().numpy(), values.contiguous().numpy()
    parts = worth(len(ids), ALONE)
    # Each thread takes rows by their hash, so that sums do not depend on the number of threads.
    in_threads(lambda part: update(*_summed(ids, gradients, height, part, parts)), parts)


@njit(nogil=True, cache=True)
def _summed(rows, values, height, part, parts):  # pragma: no cover - compiled
    """The rows of a part, each once, and the sums of their gradients."""
    width, bits = values.shape[1], 4
    while 1 << bits < 2 * len(rows):
        bits += 1
    slots = np.full(1 << bits, -1, np.int32)
    found = np.empty(len(rows), np.int64)
    sums = np.empty(values.shape, np.float32)
    count = 0
    for i in range(len(rows)):
        row = rows[i]
        if row < 0 or row >= height:
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
    return found[:count], sums[:count]


@njit(nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy", cache=True)
def _adagrad(weight, total, rows, sums, lr, eps):  # pragma: no cover - compiled
    width = sums.shape[1]
    rowwise = total.shape[1] < width
    for at in range(len(rows)):
        row = rows[at]
        if rowwise:
            total[row, 0] += _mean_square(sums[at])
            rate = lr / (np.sqrt(total[row, 0]) + eps)
            for k in range(width):
                weight[row, k] -= rate * sums[at, k]
        else:
            for k in range(width):
                total[row, k] += sums[at, k] * sums[at, k]
                weight[row, k] -= lr * sums[at, k] / (np.sqrt(total[row, k]) + eps)


@njit(nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy", cache=True)
def _adamw(weight, first, second, steps, rows, sums, b1, b2, lr, eps, decay):  # pragma: no cover - compiled
    width = sums.shape[1]
    rowwise = second.shape[1] < width
    new, new_square = np.float32(1 - b1), np.float32(1 - b2)
    for at in range(len(rows)):
        row = rows[at]
        steps[row, 0] += 1
        # In float64: 1 - 0.999^t loses four digits in float32 at the first steps.
        rate = lr / np.float32(1 - b1 ** np.float64(steps[row, 0]))
        unbias = np.float32(1) / np.float32(1 - b2 ** np.float64(steps[row, 0]))
        if rowwise:
            second[row, 0] += new_square * (_mean_square(sums[at]) - second[row, 0])
            rate /= np.sqrt(second[row, 0] * unbias) + eps
        for k in range(width):
            gradient = sums[at, k]
            first[row, k] += new * (gradient - first[row, k])
            step = rate * first[row, k]
            if not rowwise:
                second[row, k] += new_square * (gradient * gradient - second[row, k])
                step /= np.sqrt(second[row, k] * unbias) + eps
            weight[row, k] -= step + lr * decay * weight[row, k]


@njit(nogil=True, fastmath={"contract", "reassoc"}, cache=True)
def _mean_square(gradient):  # pragma: no cover - compiled
    square = np.float32(0)
    for k in range(len(gradient)):
        square += gradient[k] * gradient[k]
    return square / np.float32(len(gradient))

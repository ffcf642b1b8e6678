"""What becomes of each pair of a row and a key in a tile, in one pass over it: biases, SiLU, its slope, the mask.

Compiled for float32, float64, and bfloat16 whose bits come as uint16; what is in between is float32 or wider.

P sequences and heads, the heads of a sequence one after the other   G sequences   R rows   C keys
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from scalerec.ops._bf16 import float_of, get, put

WIDE = 16  # numbers at once: the rest of a row would be worked out one by one
LANES = 4  # copies of the time table that gradients are added to in turns: the same entry twice in a row waits
_compiled = njit(nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"}, error_model="numpy", cache=True)


@_compiled
def weigh(x, per, real, first, stride, left, position, time, buckets):  # pragma: no cover - compiled
    """x [P, R, C] before the biases -> the weights SiLU(x + biases), in place; zero where a row does not see a key.

    Args:
        per: so many of P belong to one sequence.
        real: [G] rows of each sequence that are not padded; those behind them see nothing.
        first: row r stands at the place first + stride r, key c at left + c, and no row sees a key behind its place.
        position: [2N - 1] by key less row, or [0]; time [buckets], or [0]; buckets [G, R, C].
    """
    rows, keys = x.shape[1:]
    z, one = np.zeros(-(-keys // WIDE) * WIDE, position.dtype), position.dtype.type(1)
    for p in range(len(x)):
        for r in range(rows):
            row, place = x[p, r], first + stride * r
            seen = max(0, min(keys, place - left + 1)) if r < real[p // per] else 0
            _score(z, row, seen, left - place, position, time, buckets, p // per, r)
            for c in range(-(-seen // WIDE) * WIDE):
                z[c] /= one + _exp(-z[c])
            for c in range(seen):
                put(row, c, z[c])
            for c in range(seen, keys):
                row[c] = 0


@_compiled
def slopes(
    x, dx, per, real, first, stride, left, position, time, buckets, d_position, d_time
):  # pragma: no cover - compiled
    """As `weigh`, while dx [P, R, C] turns from the gradient of the weights into that of x; it is added to the biases'.

    Args:
        d_position, d_time: float64, of the shapes of position and time.
    """
    rows, keys = x.shape[1:]
    z, one = np.zeros(-(-keys // WIDE) * WIDE, position.dtype), position.dtype.type(1)
    share = np.empty_like(z)
    reach = keys + stride * (rows - 1)
    by_gap = np.empty(reach if len(position) else 0, position.dtype)  # the first is that of the last row and first key
    lowest = left - first - stride * (rows - 1) + len(position) // 2
    by_bucket = np.empty((len(time), LANES), position.dtype)
    for p in range(len(x)):
        by_gap[:] = 0
        by_bucket[:] = 0
        for r in range(rows):
            row, slope, place = x[p, r], dx[p, r], first + stride * r
            seen = max(0, min(keys, place - left + 1)) if r < real[p // per] else 0
            _score(z, row, seen, left - place, position, time, buckets, p // per, r)
            for c in range(-(-seen // WIDE) * WIDE):
                share[c] = one / (one + _exp(-z[c]))
            for c in range(seen):
                weight = z[c] * share[c]
                put(row, c, weight)
                z[c] = get(slope, c) * (share[c] + weight * (one - share[c]))
                put(slope, c, z[c])
            for c in range(seen, keys):
                row[c] = 0
                slope[c] = 0
            if len(position):
                mine = by_gap[stride * (rows - 1 - r) :]
                for c in range(seen):
                    mine[c] += z[c]
            if len(time):
                its = buckets[p // per, r]
                for c in range(seen):
                    by_bucket[its[c], c % LANES] += z[c]
        for i in range(min(len(by_gap), len(position) - lowest)):
            d_position[lowest + i] += by_gap[i]
        for i in range(len(time)):
            for lane in range(LANES):
                d_time[i] += by_bucket[i, lane]


@_compiled
def _score(z, row, seen, gap, position, time, buckets, g, r):  # pragma: no cover - compiled
    """z [C] becomes the row with its biases; `gap` is that of its first key."""
    for c in range(seen):
        z[c] = get(row, c)
    if len(position):
        places = position[gap + len(position) // 2 :]
        for c in range(seen):
            z[c] += places[c]
    if len(time):
        its = buckets[g, r]
        for c in range(seen):
            z[c] += time[its[c]]


# -- numbers


def _exp(x) -> Any:
    """e^x; of float32 within two units in the last place and clamped to normal numbers, but without a call."""
    raise NotImplementedError


@overload(_exp, jit_options={"fastmath": {"contract"}})
def _exp_of(x):  # pragma: no cover - compiled
    if x != types.float32:
        return lambda x: math.exp(x)

    def exp(x):
        x = min(max(x, np.float32(-87)), np.float32(88))
        n = np.floor(x * np.float32(1.44269504) + np.float32(0.5))
        f = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # x - n ln 2 in two parts
        y = np.float32(1 / 5040)
        y = y * f + np.float32(1 / 720)
        y = y * f + np.float32(1 / 120)
        y = y * f + np.float32(1 / 24)
        y = y * f + np.float32(1 / 6)
        y = y * f + np.float32(0.5)
        y = y * f + np.float32(1)
        y = y * f + np.float32(1)
        return y * float_of(np.uint32((np.int32(n) + 127) << 23))

    return exp

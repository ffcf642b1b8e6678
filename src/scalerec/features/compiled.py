"""The loops of encoding over every value of every list, compiled; they run without the interpreter's lock.

n values   V values of a dictionary   U users
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_compiled: Any = njit(nogil=True, error_model="numpy", cache=True)


@_compiled
def hash_table(values):  # pragma: no cover - compiled
    """Where each of `values` [V] int64, all different, stands: open addressing, at most half full, -1 where free."""
    bits = 2
    while 1 << bits < 2 * len(values):
        bits += 1
    slots = np.full(1 << bits, -1, np.int64)
    for i in range(len(values)):
        slot = _slot(values[i], bits)
        while slots[slot] >= 0:
            slot = (slot + 1) & (len(slots) - 1)
        slots[slot] = i
    return slots


@_compiled
def places(values, slots, wanted, otherwise, shift):  # pragma: no cover - compiled
    """`shift` + the place in `values` of each of `wanted` [n], or `otherwise`; `slots` is the table of `values`."""
    found = np.empty(len(wanted), np.int64)
    bits = 0
    while 1 << bits < len(slots):
        bits += 1
    for i in range(len(wanted)):
        slot = _slot(wanted[i], bits)
        while slots[slot] >= 0 and values[slots[slot]] != wanted[i]:
            slot = (slot + 1) & (len(slots) - 1)
        found[i] = slots[slot] + shift if slots[slot] >= 0 else otherwise
    return found


@_compiled
def _slot(value, bits):  # pragma: no cover - compiled
    return np.int64((np.uint64(value) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits))


@_compiled
def buckets(values, edges, shift, missing):  # pragma: no cover - compiled
    """`shift` + how many of `edges`, ascending, lie below each of `values` [n], or `missing` for NaN."""
    found = np.empty(len(values), np.int64)
    for i in range(len(values)):
        value, below, left = values[i], 0, len(edges)
        while left > 1:  # a search without branches, which nobody could foresee
            half = left >> 1
            below += half * (edges[below + half - 1] < value)
            left -= half
        if left and edges[below] < value:
            below += 1
        found[i] = missing if np.isnan(value) else shift + below
    return found


@_compiled
def fold_columns(codes, values):  # pragma: no cover - compiled
    """Mix the bits of `values` [U, k] (unsigned) into `codes` [U] uint64, in place."""
    for i in range(len(codes)):
        code = codes[i]
        for j in range(values.shape[1]):
            code = _mix(code + np.uint64(values[i, j]))
        codes[i] = code


@_compiled
def fold_lists(codes, values, offsets):  # pragma: no cover - compiled
    """The same of lists: list i is values[offsets[i]:offsets[i + 1]], [total, k]."""
    for i in range(len(codes)):
        code = _mix(codes[i] + np.uint64(offsets[i + 1] - offsets[i]))
        for at in range(offsets[i], offsets[i + 1]):
            for j in range(values.shape[1]):
                code = _mix(code + np.uint64(values[at, j]))
        codes[i] = code


@_compiled
def _mix(x):  # pragma: no cover - compiled
    """As `hashing.mix`."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

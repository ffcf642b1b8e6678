"""The loops of encoding over every value of every list, compiled; they run without the interpreter's lock.

n values   V values of a dictionary   U users
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import njit

_compiled: Any = njit(nogil=True, error_model="numpy", cache=True)

_COUNTED = 256  # edges: up to so many, comparing with all of them (eight or sixteen values at a time) beats a search


@_compiled
def _free_slots(count):  # pragma: no cover - compiled
    """The empty table of `count` values and the logarithm of its size: open addressing, at most half full, -1 free."""
    bits = 2
    while 1 << bits < 2 * count:
        bits += 1
    return np.full(1 << bits, -1, np.int64), bits


@_compiled
def hash_table(values):  # pragma: no cover - compiled
    """Where each of `values` [V] int64, all different, stands."""
    slots, bits = _free_slots(len(values))
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
def distinct(values):  # pragma: no cover - compiled
    """Where each of the different `values` [n] uint64 stands first, in that order, and which of these each one is."""
    slots, bits = _free_slots(len(values))
    first, place = np.empty(len(values), np.int64), np.empty(len(values), np.int64)
    count = 0
    for i in range(len(values)):
        slot = _slot(values[i], bits)
        while slots[slot] >= 0 and values[first[slots[slot]]] != values[i]:
            slot = (slot + 1) & (len(slots) - 1)
        if slots[slot] < 0:
            slots[slot] = count
            first[count] = i
            count += 1
        place[i] = slots[slot]
    return first[:count].copy(), place


@_compiled
def _slot(value, bits):  # pragma: no cover - compiled
    return np.int64((np.uint64(value) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - bits))


@_compiled
def buckets(values, edges, shift, missing):  # pragma: no cover - compiled
    """`shift` + how many of `edges`, ascending, lie below each of `values` [n], or `missing` for NaN."""
    found = np.empty(len(values), np.int64)
    if len(edges) > _COUNTED:
        for i in range(len(values)):
            found[i] = missing if np.isnan(values[i]) else shift + np.searchsorted(edges, values[i])
        return found
    below = np.empty(64, np.int32)
    for first in range(0, len(values), len(below)):
        some = values[first : first + len(below)]
        below[:] = 0
        for edge in edges:
            for i in range(len(some)):
                below[i] += edge < some[i]
        for i in range(len(some)):
            found[first + i] = missing if np.isnan(some[i]) else shift + below[i]
    return found


@_compiled
def fold(codes, values, offsets):  # pragma: no cover - compiled
    """Mix the bits of list i, values[offsets[i]:offsets[i + 1]] (unsigned), into codes[i] [U] uint64, in place.

    By a sum of what each value gives at its place in the list: none waits for the one before it.
    """
    for i in range(len(codes)):
        one = values[offsets[i] : offsets[i + 1]]
        code = codes[i] + np.uint64(len(one))
        for place in range(len(one)):
            code += _mix(np.uint64(one[place]) + np.uint64(place) * np.uint64(0xD1B54A32D192ED03))
        codes[i] = _mix(code)


@_compiled
def _mix(x):  # pragma: no cover - compiled
    """As `hashing.mix`."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

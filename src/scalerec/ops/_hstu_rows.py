"""Tokens one behind the other -> sequences side by side, head by head, and back: one pass over memory each.

G sequences   h heads   n rows of a sequence, padded in front and behind   d width
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from scalerec.ops._bf16 import array, compiled, get, put
from scalerec.ops._hstu_plan import Places
from scalerec.ops._threads import scratch


def pack(name: str, x: Tensor, places: Places, begin: int, end: int) -> Tensor:
    """x [T, h, d] of the sequences [begin, end) -> [G, h, n, d], zero where padded."""
    out = scratch(name, x.dtype, end - begin, x.shape[1], places.longest, x.shape[2])
    _pack(*_numbers(x), *_of(places, begin, end), array(out))
    return out


def unpack(found: Tensor, x: Tensor, places: Places, begin: int, end: int, add: bool = False) -> None:
    """found [G, h, n, d] -> into x [T, h, d], or added to it."""
    _unpack(array(found), *_of(places, begin, end), *_numbers(x), add)


def _numbers(x: Tensor) -> tuple[np.ndarray, int, int]:
    """All from the first number of x [T, h, d] to its last, and the steps from token to token and from head to head."""
    if x.stride(2) != 1:
        x = x.contiguous()
    count = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride())) + 1
    return array(x.as_strided((count,), (1,))), x.stride(0), x.stride(1)


def _of(places: Places, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    first, length, before = (x[begin:end].numpy() for x in places[:3])
    return first, length, before


@compiled
def _pack(numbers, by_token, by_head, first, length, before, out):  # pragma: no cover - compiled
    sequences, heads, _, width = out.shape
    for g in range(sequences):
        for h in range(heads):
            to = out[g, h]
            to[: before[g]] = 0
            to[before[g] + length[g] :] = 0
            for i in range(length[g]):
                source, row = numbers[(first[g] + i) * by_token + h * by_head :], to[before[g] + i]
                for j in range(width):
                    row[j] = source[j]


@compiled
def _unpack(found, first, length, before, numbers, by_token, by_head, add):  # pragma: no cover - compiled
    sequences, heads, _, width = found.shape
    for g in range(sequences):
        for h in range(heads):
            for i in range(length[g]):
                row = found[g, h, before[g] + i]
                to = numbers[(first[g] + i) * by_token + h * by_head :]
                if add:
                    for j in range(width):
                        put(to, j, get(to, j) + get(row, j))
                else:
                    for j in range(width):
                        put(to, j, get(row, j))

"""bf16 in compiled code, where it goes by its bits (uint16): the upper half of a float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload
from torch import Tensor

compiled: Any = njit(nogil=True, fastmath={"contract", "reassoc"}, error_model="numpy", cache=True)


def array(tensor: Tensor) -> np.ndarray:
    """The memory of a tensor; of bf16 its bits."""
    tensor = tensor.detach()
    return (tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor).numpy()


def widen(values: np.ndarray, bits: np.ndarray) -> None:
    """Put [n] float32, or bf16 as float32, into the float32 whose bits are `bits` [n or more] uint32."""
    raise NotImplementedError("compiled code alone calls it")


@overload(widen)
def _widen_of(values, bits):  # pragma: no cover - compiled; numba wants the bare names
    if values.dtype == types.uint16:

        def widened(values, bits):
            for i in range(len(values)):
                bits[i] = np.uint32(values[i]) << np.uint32(16)
    else:

        def widened(values, bits):
            wide = bits.view(np.float32)
            for i in range(len(values)):
                wide[i] = values[i]

    return widened


def narrow(bits: np.ndarray, out: np.ndarray) -> None:
    """The reverse, into `out` [n]: to the nearest bf16, ties to even."""
    raise NotImplementedError("compiled code alone calls it")


@overload(narrow)
def _narrow_of(bits, out):  # pragma: no cover - compiled
    if out.dtype == types.uint16:

        def narrowed(bits, out):
            for i in range(len(out)):
                out[i] = (bits[i] + np.uint32(0x7FFF) + ((bits[i] >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    else:

        def narrowed(bits, out):
            wide = bits.view(np.float32)
            for i in range(len(out)):
                out[i] = wide[i]

    return narrowed


# Number by number, inside loops that do more.


def _bitcast(source: Any, target: Any, to: Any) -> Any:
    """The same bits as a number of another type."""

    @intrinsic
    def cast(context, number):
        def codegen(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], to)

        return target(source), codegen

    return cast


float_of = _bitcast(types.uint32, types.float32, ir.FloatType())
_bits_of = _bitcast(types.float32, types.uint32, ir.IntType(32))


def get(row: np.ndarray, at: int) -> Any:
    """The number that stands at a place."""
    raise NotImplementedError("compiled code alone calls it")


@overload(get)
def _get_of(row, at):  # pragma: no cover - compiled
    if row.dtype == types.uint16:
        return lambda row, at: float_of(np.uint32(row[at]) << np.uint32(16))
    return lambda row, at: row[at]


def put(row: np.ndarray, at: int, value: Any) -> None:
    """Write a number down at a place; bf16 to the nearest, ties to even."""
    raise NotImplementedError("compiled code alone calls it")


@overload(put)
def _put_of(row, at, value):  # pragma: no cover - compiled
    if row.dtype != types.uint16:

        def exactly(row, at, value):
            row[at] = value

        return exactly

    def rounded(row, at, value):
        bits = _bits_of(np.float32(value))
        row[at] = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)

    return rounded

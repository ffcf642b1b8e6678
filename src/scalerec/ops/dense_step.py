"""RMSProp and AdamW of all dense parameters in one pass over each, on a CPU (Tieleman & Hinton 2012; Loshchilov 2019).

torch passes over a parameter six to ten times; here its gradient, its state and itself are read and written once, which
is all that a step of a hundred million parameters has to wait for. Gradients may be bf16, and a copy of the weights in
bf16 (`ops.halved`) is written along. The plain twins, for any
device, are torch's own optimisers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from scalerec.ops._bf16 import array, compiled, narrow, widen
from scalerec.ops._threads import in_threads, piece, worth
from scalerec.ops.halved import kept, renewed

CHUNK = 2048  # entries in the first cache
ALONE = 100_000  # entries that are not worth a second thread


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """Euclidean norm of all gradients together, float32 or bf16."""
    arrays = [array(gradient.view(-1)) for gradient in gradients]
    threads = _threads(arrays)
    sums = [0.0] * threads

    def task(thread: int) -> None:
        sums[thread] = sum(_squares(one, *piece(len(one), thread, threads)) for one in arrays)

    in_threads(task, threads)
    return float(np.sqrt(sum(sums)))


def rmsprop(
    weights: Sequence[Tensor], squares: Sequence[Tensor], gradients: Sequence[Tensor], *, lr: float, smoothing: float,
    eps: float, decay: float, scale: float,
) -> None:  # fmt: skip
    """With g the gradient times `scale`, and decay w: v = a v + (1 - a) g^2, w -= lr g / (sqrt(v) + eps), in place.

    Weights and squares are float32, gradients float32 or bf16, all contiguous.
    """
    numbers = [np.float32(x) for x in (lr, smoothing, 1 - smoothing, eps, decay, scale)]
    _over([weights, squares, gradients], lambda arrays, lo, hi: _rmsprop(*arrays, lo, hi, *numbers))


def adamw(
    weights: Sequence[Tensor], firsts: Sequence[Tensor], seconds: Sequence[Tensor], gradients: Sequence[Tensor], *,
    lr: float, betas: tuple[float, float], eps: float, decay: float, scale: float, steps: int,
) -> None:  # fmt: skip
    """With g the gradient times `scale` and t = `steps`, from 1: the moments m and v of g and g^2 with decays b1, b2;

    w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w), in place.
    """
    unbiased = [1 - beta**steps for beta in betas]
    given = (*betas, 1 - betas[0], 1 - betas[1], lr / unbiased[0], unbiased[1] ** -0.5, eps, lr * decay, scale)
    numbers = [np.float32(x) for x in given]
    _over([weights, firsts, seconds, gradients], lambda arrays, lo, hi: _adamw(*arrays, lo, hi, *numbers))


def _over(tensors: Sequence[Sequence[Tensor]], kernel: Callable[[Sequence[np.ndarray], int, int], None]) -> None:
    """The kernel on every parameter (the first of `tensors`) and its copy in bf16, each thread on its own piece."""
    weights, *others = tensors
    nothing = torch.empty(0, dtype=torch.bfloat16)
    halves = [nothing if (half := kept(weight)) is None else half for weight in weights]
    of_parameter = [[array(tensor.view(-1)) for tensor in of_one] for of_one in zip(weights, halves, *others)]
    threads = _threads([arrays[0] for arrays in of_parameter])

    def task(thread: int) -> None:
        for arrays in of_parameter:
            kernel(arrays, *piece(len(arrays[0]), thread, threads))

    in_threads(task, threads)
    for weight in weights:
        torch.autograd.graph.increment_version(weight)  # as torch's own operations in place do
        renewed(weight)


def _threads(arrays: Sequence[np.ndarray]) -> int:
    return worth(sum(map(len, arrays)), ALONE)


@compiled
def _squares(gradient, lo, hi):  # pragma: no cover - compiled
    total, bits = 0.0, np.empty(CHUNK, np.uint32)
    wide = bits.view(np.float32)
    for first in range(lo, hi, CHUNK):
        count = min(CHUNK, hi - first)
        widen(gradient[first : first + count], bits)
        part = np.float32(0)
        for i in range(count):
            part += wide[i] * wide[i]
        total += part
    return total


@compiled
def _rmsprop(weight, half, square, gradient, lo, hi, lr, smoothing, fresh, eps, decay, scale):  # pragma: no cover
    bits = np.empty(CHUNK, np.uint32)
    wide = bits.view(np.float32)
    for first in range(lo, hi, CHUNK):
        stop = min(first + CHUNK, hi)
        w, v = weight[first:stop], square[first:stop]
        widen(gradient[first:stop], bits)
        for i in range(len(w)):
            g = wide[i] * scale + decay * w[i]
            v[i] = smoothing * v[i] + fresh * g * g
            w[i] -= lr * g / (np.sqrt(v[i]) + eps)
            wide[i] = w[i]
        if len(half):
            narrow(bits, half[first:stop])


@compiled
def _adamw(
    weight, half, first_moment, second_moment, gradient, lo, hi, beta1, beta2, fresh1, fresh2, lr, correction, eps,
    decay, scale,
):  # pragma: no cover - compiled  # fmt: skip
    bits = np.empty(CHUNK, np.uint32)
    wide = bits.view(np.float32)
    for first in range(lo, hi, CHUNK):
        stop = min(first + CHUNK, hi)
        w, m, v = weight[first:stop], first_moment[first:stop], second_moment[first:stop]
        widen(gradient[first:stop], bits)
        for i in range(len(w)):
            g = wide[i] * scale
            m[i] = beta1 * m[i] + fresh1 * g
            v[i] = beta2 * v[i] + fresh2 * g * g
            w[i] -= lr * m[i] / (np.sqrt(v[i]) * correction + eps) + decay * w[i]
            wide[i] = w[i]
        if len(half):
            narrow(bits, half[first:stop])

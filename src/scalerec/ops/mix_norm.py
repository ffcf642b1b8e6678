"""What RankMixer does between its products: tokens mixed, added, normalised, in one pass over a row on a CPU.

torch writes each of these to memory, a dozen times the size of the tokens for a block and its gradient; here a row's
tokens stay in the cache. The plain twins are `mix_add_norm_reference` and `add_norm_reference`.

B rows   T tokens   D width
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from scalerec.ops._bf16 import array, compiled, get, put
from scalerec.ops._threads import in_threads, piece, worth
from scalerec.ops.token_mixing import token_mixing

FORMATS = (torch.float32, torch.bfloat16)
ALONE = 200_000  # entries that are not worth a second thread


def mix_add_norm(x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LN(Mix(x) + x) with as many heads as tokens (RankMixer eq. 1, 3-5), [B, T, D] -> the same, in its format."""
    if not _compilable(x_BTD, weight_D, bias_D) or x_BTD.shape[2] % max(x_BTD.shape[1], 1):
        return mix_add_norm_reference(x_BTD, weight_D, bias_D, eps)
    return _MixAddNorm.apply(x_BTD.contiguous(), weight_D, bias_D, eps)


def mix_add_norm_reference(x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """The definition."""
    return add_norm_reference(token_mixing(x_BTD, x_BTD.shape[1]), x_BTD, weight_D, bias_D, eps)


def add_norm(y_BTD: Tensor, x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """LN(y + x), [B, T, D] both -> the same, in the format of x; float32 in between where that is bf16."""
    if not _compilable(x_BTD, weight_D, bias_D) or y_BTD.dtype not in FORMATS or y_BTD.shape != x_BTD.shape:
        return add_norm_reference(y_BTD, x_BTD, weight_D, bias_D, eps)
    # Token after token, as products of each token's own leave them: what they get back lies the same way.
    return _AddNorm.apply(y_BTD.transpose(0, 1).contiguous(), x_BTD.contiguous(), weight_D, bias_D, eps)


def add_norm_reference(y_BTD: Tensor, x_BTD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float) -> Tensor:
    """The definition."""
    return functional.layer_norm(y_BTD + x_BTD, weight_D.shape, weight_D, bias_D, eps)


def _compilable(x: Tensor, weight: Tensor, bias: Tensor) -> bool:
    """Plain tensors on a CPU whose shapes fit; whatever else they are is for torch to take or to refuse."""
    plain = all(type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu" for tensor in (x, weight, bias))
    formats = x.dtype in FORMATS and weight.dtype == bias.dtype == torch.float32
    fits = x.dim() == 3 and weight.shape == bias.shape == x.shape[2:]
    return plain and formats and fits and not torch.compiler.is_compiling()


class _MixAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        scales = torch.empty(x.shape[:2])  # one over the deviation
        arrays = [array(tensor) for tensor in (x, weight, bias, scales, out)]
        _over_rows(x, lambda _, lo, hi: _mix_forward(*arrays, np.float32(eps), lo, hi))
        ctx.save_for_backward(x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scales = ctx.saved_tensors
        dx = torch.empty_like(x)
        arrays = [array(tensor) for tensor in (x, weight, scales, gradients[0].contiguous(), dx)]
        sums = _over_rows(x, lambda sums, lo, hi: _mix_backward(*arrays, sums, lo, hi))
        return dx, torch.from_numpy(sums[0]), torch.from_numpy(sums[1]), None


class _AddNorm(torch.autograd.Function):
    """y [T, B, D], x [B, T, D]."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        out = torch.empty_like(x)
        scales = torch.empty(x.shape[:2])
        arrays = [array(tensor) for tensor in (y, x, weight, bias, scales, out)]
        _over_rows(x, lambda _, lo, hi: _add_forward(*arrays, np.float32(eps), lo, hi))
        ctx.save_for_backward(y, x, weight, scales)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        y, x, weight, scales = ctx.saved_tensors
        dy, dx = torch.empty_like(y), torch.empty_like(x)
        arrays = [array(tensor) for tensor in (y, x, weight, scales, gradients[0].contiguous(), dy, dx)]
        sums = _over_rows(x, lambda sums, lo, hi: _add_backward(*arrays, sums, lo, hi))
        return dy, dx, torch.from_numpy(sums[0]), torch.from_numpy(sums[1]), None


def _over_rows(x: Tensor, kernel: Callable[[np.ndarray, int, int], None]) -> np.ndarray:
    """The kernel on all rows, each thread on some; the sum of what they put into [2, D]."""
    rows = len(x)
    threads = min(worth(x.numel(), ALONE), max(rows, 1))
    sums = np.zeros((threads, 2, x.shape[2]), np.float32)
    in_threads(lambda t: kernel(sums[t], *piece(rows, t, threads)), threads)
    return sums.sum(0)


# A row's sum of squares and what follows from it are loops of their own: compiled code checks before each loop whether
# what it writes overlaps what it reads, and gives vectors up where there is too much to check.


@compiled
def _mixed(x, u):  # pragma: no cover - compiled
    """u = Mix(x) + x, [T, D]."""
    tokens, dim = x.shape
    part = dim // tokens
    for h in range(tokens):
        own, to = x[h], u[h]
        for t in range(tokens):
            other, first, begin = x[t], t * part, h * part
            for k in range(part):
                to[first + k] = get(own, first + k) + get(other, begin + k)


@compiled
def _added(y, x, u):  # pragma: no cover - compiled
    """u = y + x, [D]."""
    for k in range(len(u)):
        u[k] = get(y, k) + get(x, k)


@compiled
def _normalise(u, weight, bias, eps, out):  # pragma: no cover - compiled
    """out = LN(u), [D]; one over the deviation."""
    dim = len(u)
    total = np.float32(0)
    for k in range(dim):
        total += u[k]
    mean = total / np.float32(dim)
    total = np.float32(0)
    for k in range(dim):
        total += (u[k] - mean) * (u[k] - mean)
    scale = np.float32(1) / np.sqrt(total / np.float32(dim) + eps)
    for k in range(dim):
        put(out, k, (u[k] - mean) * scale * weight[k] + bias[k])
    return scale


@compiled
def _slope(u, weight, scale, gradient, dweight, dbias):  # pragma: no cover - compiled
    """The gradient of u [D], in its place, from that of LN(u); those of weight and bias are added."""
    dim = len(u)
    share = np.float32(1) / np.float32(dim)
    total = np.float32(0)
    for k in range(dim):
        total += u[k]
    mean, plain, along = total * share, np.float32(0), np.float32(0)
    for k in range(dim):
        g = get(gradient, k) * weight[k]
        at = (u[k] - mean) * scale
        plain += g
        along += g * at
        u[k] = at
    plain, along = plain * share, along * share
    for k in range(dim):
        dweight[k] += get(gradient, k) * u[k]
    for k in range(dim):
        dbias[k] += get(gradient, k)
    for k in range(dim):
        u[k] = scale * (get(gradient, k) * weight[k] - plain - u[k] * along)


@compiled
def _written(u, out):  # pragma: no cover - compiled
    for k in range(len(u)):
        put(out, k, u[k])


@compiled
def _mix_forward(x, weight, bias, scales, out, eps, lo, hi):  # pragma: no cover - compiled
    u = np.empty(x.shape[1:], np.float32)
    for b in range(lo, hi):
        _mixed(x[b], u)
        for t in range(x.shape[1]):
            scales[b, t] = _normalise(u[t], weight, bias, eps, out[b, t])


@compiled
def _mix_backward(x, weight, scales, gradient, dx, sums, lo, hi):  # pragma: no cover - compiled
    u, row = np.empty(x.shape[1:], np.float32), np.empty(x.shape[1:], np.float32)
    for b in range(lo, hi):
        _mixed(x[b], u)
        for t in range(x.shape[1]):
            _slope(u[t], weight, scales[b, t], gradient[b, t], sums[0], sums[1])
        _mixed(u, row)  # its own transpose, and so is the sum
        for t in range(x.shape[1]):
            _written(row[t], dx[b, t])


@compiled
def _add_forward(y, x, weight, bias, scales, out, eps, lo, hi):  # pragma: no cover - compiled
    u = np.empty(x.shape[2], np.float32)
    for b in range(lo, hi):
        for t in range(x.shape[1]):
            _added(y[t, b], x[b, t], u)
            scales[b, t] = _normalise(u, weight, bias, eps, out[b, t])


@compiled
def _add_backward(y, x, weight, scales, gradient, dy, dx, sums, lo, hi):  # pragma: no cover - compiled
    u = np.empty(x.shape[2], np.float32)
    for b in range(lo, hi):
        for t in range(x.shape[1]):
            _added(y[t, b], x[b, t], u)
            _slope(u, weight, scales[b, t], gradient[b, t], sums[0], sums[1])
            _written(u, dx[b, t])
            _written(u, dy[t, b])

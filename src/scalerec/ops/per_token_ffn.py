"""Every token's own two-layer network in bf16 on a CPU, token by token (RankMixer eq. 6-9).

A token's activations stay in the cache from one product to the next, threads meet once, weights are rounded once a
step (`ops.halved`), and the backward pass writes what it needs transposed: products of transposed bf16 matrices take
half as long again. The plain twin is `per_token_ffn_reference`.

B rows   T tokens   D width   F hidden width
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from scalerec.ops._bf16 import array, compiled, narrow, widen
from scalerec.ops._threads import in_threads, piece, scratch
from scalerec.ops.halved import halved
from scalerec.ops.per_token import per_token_linear

BLOCK = 32  # columns that are transposed at a time, of twice as many rows


def per_token_ffn(x_BTD: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """GELU(x W1_t + b1_t) W2_t + b2_t, [B, T, D] -> [B, T, D]; bf16 under autocast, which a CPU does token by token.

    Args:
        up: W1 [T, D, F], up_bias: b1 [T, F], down: W2 [T, F, D], down_bias: b2 [T, D].

    Gradients of weights are products in bf16 then, and stay so where a weight's `grad_dtype` is bf16.
    """
    bf16 = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == torch.bfloat16
    if bf16 and not torch.compiler.is_compiling() and all(map(_plain, (x_BTD, up, down))) and up.dtype == torch.float32:
        return _PerTokenFFN.apply(x_BTD, up, up_bias, down, down_bias)
    return per_token_ffn_reference(x_BTD, up, up_bias, down, down_bias)


def _plain(tensor: Tensor) -> bool:
    """Not on another device, nor something in a tensor's place."""
    return type(tensor) in (Tensor, nn.Parameter) and tensor.device.type == "cpu"


def per_token_ffn_reference(x_BTD: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
    """The definition, as batched products in whatever format the operands or autocast have."""
    h_TBF = functional.gelu(per_token_linear(x_BTD.transpose(0, 1), up, up_bias))
    return per_token_linear(h_TBF, down, down_bias).transpose(0, 1)


class _PerTokenFFN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BTD: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor) -> Tensor:
        rows, tokens, dim = x_BTD.shape
        hidden = up.shape[2]
        w1, w2 = halved(up.contiguous()), halved(down.contiguous())
        b1, b2 = up_bias.detach().numpy(), down_bias.detach().numpy()
        x = torch.empty(tokens, rows, dim, dtype=torch.bfloat16)
        z = torch.empty(tokens, rows, hidden, dtype=torch.bfloat16)  # before GELU
        y = torch.empty(tokens, rows, dim, dtype=torch.bfloat16)
        values, _ = _tables()
        threads = min(torch.get_num_threads(), tokens)
        mode = torch.is_inference_mode_enabled()  # which is each thread's own matter

        def task(thread: int) -> None:
            h = scratch("ffn h", torch.bfloat16, rows, hidden)
            with torch.inference_mode(mode), torch.no_grad():
                for t in range(*piece(tokens, thread, threads)):
                    x[t].copy_(x_BTD[:, t])
                    torch.mm(x[t], w1[t], out=z[t])  # `addmm` fills its output with the bias first
                    _bias_gelu(array(z[t]), b1[t], values, array(h))
                    torch.mm(h, w2[t], out=y[t])
                    _biased(array(y[t]), b2[t])

        in_threads(task, threads)
        ctx.save_for_backward(x, z, w1, w2)
        ctx.grad_dtypes = [getattr(weight, "grad_dtype", weight.dtype) or weight.dtype for weight in (up, down)]
        ctx.input_dtype = x_BTD.dtype
        return y.transpose(0, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        dy_BTD = gradients[0].bfloat16()
        x, z, w1, w2 = ctx.saved_tensors
        tokens, rows, dim = x.shape
        hidden = z.shape[2]
        dx = torch.empty_like(x)
        dw1, dw2 = (torch.empty(weight.shape, dtype=dtype) for weight, dtype in zip((w1, w2), ctx.grad_dtypes))
        db1, db2 = torch.empty(tokens, hidden), torch.empty(tokens, dim)
        values, slopes = _tables()
        threads = min(torch.get_num_threads(), tokens)

        def task(thread: int) -> None:
            dh = scratch("ffn dh", torch.bfloat16, rows, hidden)
            h_t = scratch("ffn h_t", torch.bfloat16, hidden, rows)
            x_t = scratch("ffn x_t", torch.bfloat16, dim, rows)
            with torch.no_grad():
                for t in range(*piece(tokens, thread, threads)):
                    dy = dy_BTD[:, t].contiguous()
                    torch.mm(dy, w2[t].t(), out=dh)
                    _through_gelu(array(z[t]), array(dh), slopes, db1[t].numpy())
                    _look_up_transposed(array(z[t]), values, array(h_t))
                    _transpose(array(x[t]), array(x_t))
                    _product(h_t, dy, dw2[t])
                    _product(x_t, dh, dw1[t])
                    torch.mm(dh, w1[t].t(), out=dx[t])
                    _sum(array(dy), db2[t].numpy())

        in_threads(task, threads)
        return dx.transpose(0, 1).to(ctx.input_dtype), dw1, db1, dw2, db2


def _product(a: Tensor, b: Tensor, out: Tensor) -> None:
    """a b in bf16 into `out` of any float."""
    if out.dtype == torch.bfloat16:
        torch.mm(a, b, out=out)
    else:
        out.copy_(torch.mm(a, b, out=scratch("ffn dw", torch.bfloat16, *out.shape)))


@cache
def _tables() -> tuple[np.ndarray, np.ndarray]:
    """GELU of every bf16 number, as bits, and its slope in float32, exact to their last digit."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16).double()
    density = torch.exp(-every.square() / 2) / (2 * torch.pi) ** 0.5
    below = torch.special.ndtr(every)
    slopes = torch.where(every.isinf(), below, below + every * density)
    return array(functional.gelu(every).bfloat16()), slopes.float().numpy()


@compiled
def _look_up_transposed(z, values, out):  # pragma: no cover - compiled
    rows, columns = z.shape
    for j0 in range(0, columns, BLOCK):
        for i0 in range(0, rows, 2 * BLOCK):
            for j in range(j0, min(j0 + BLOCK, columns)):
                for i in range(i0, min(i0 + 2 * BLOCK, rows)):
                    out[j, i] = values[z[i, j]]


@compiled
def _transpose(x, out):  # pragma: no cover - compiled
    rows, columns = x.shape
    for j0 in range(0, columns, BLOCK):
        for i0 in range(0, rows, 2 * BLOCK):
            for j in range(j0, min(j0 + BLOCK, columns)):
                for i in range(i0, min(i0 + 2 * BLOCK, rows)):
                    out[j, i] = x[i, j]


# Row by row in steps that each are vectors: widen, compute, narrow.


@compiled
def _biased(z, bias):  # pragma: no cover - compiled
    """z += bias in place."""
    columns = z.shape[1]
    bits = np.empty(columns, np.uint32)
    wide = bits.view(np.float32)
    for i in range(z.shape[0]):
        row = z[i]
        widen(row, bits)
        for j in range(columns):
            wide[j] += bias[j]
        narrow(bits, row)


@compiled
def _bias_gelu(z, bias, values, out):  # pragma: no cover - compiled
    """z += bias in place, and its GELU."""
    columns = z.shape[1]
    bits = np.empty(columns, np.uint32)
    wide = bits.view(np.float32)
    for i in range(z.shape[0]):
        row, to = z[i], out[i]
        widen(row, bits)
        for j in range(columns):
            wide[j] += bias[j]
        narrow(bits, row)
        for j in range(columns):
            to[j] = values[row[j]]


@compiled
def _through_gelu(z, gradient, slopes, sums):  # pragma: no cover - compiled
    """`gradient` times the slope at z, in place; what it sums to over rows."""
    columns = z.shape[1]
    bits = np.empty(columns, np.uint32)
    wide = bits.view(np.float32)
    sums[:] = 0
    for i in range(z.shape[0]):
        at, row = z[i], gradient[i]
        widen(row, bits)
        for j in range(columns):
            wide[j] *= slopes[at[j]]
        for j in range(columns):
            sums[j] += wide[j]
        narrow(bits, row)


@compiled
def _sum(x, out):  # pragma: no cover - compiled
    """Over rows."""
    columns = x.shape[1]
    bits = np.empty(columns, np.uint32)
    wide = bits.view(np.float32)
    out[:] = 0
    for i in range(x.shape[0]):
        row = x[i]
        widen(row, bits)
        for j in range(columns):
            out[j] += wide[j]

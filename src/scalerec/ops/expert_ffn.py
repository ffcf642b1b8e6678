"""Two-layer networks of experts weighted by gates: all computed, or only those whose gate is open.

T tokens   B rows   D width   E experts of a token   F hidden width of one expert

out = sum_j gate_j (GELU(x up_j + up_bias_j) down_j + down_bias_j) (RankMixer eq. 10). With all gates at one the experts
of a token are a dense network of width E F.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional as F

from scalerec.ops._threads import in_threads, scratch
from scalerec.ops.per_token import per_token_linear

BREAK_EVEN = 1.0  # share of open gates of a token above which it is computed whole; none was measured to be quicker
SMALLEST = 20_000  # D F (B / 20 + 1) below which an expert takes less time than finding out who wants it: about 20 us


def masked_experts(
    x_TBD: Tensor, gates_TBE: Tensor, up_TEDF: Tensor, up_bias_TEF: Tensor, down_TEFD: Tensor, down_bias_TED: Tensor
) -> Tensor:
    """[T, B, D] -> [T, B, D], every expert computed for every row and multiplied with its gate."""
    # One product for all experts of a token: turning the weights round costs less than repeating the rows.
    up = up_TEDF.transpose(1, 2).flatten(2)
    h = F.gelu(per_token_linear(x_TBD, up, up_bias_TEF.flatten(1)))
    gated = h.unflatten(-1, (gates_TBE.shape[-1], -1)) * gates_TBE[..., None]
    return torch.baddbmm(torch.bmm(gates_TBE, down_bias_TED), gated.flatten(-2), down_TEFD.flatten(1, 2))


def masked_experts_reference(
    x_TBD: Tensor, gates_TBE: Tensor, up_TEDF: Tensor, up_bias_TEF: Tensor, down_TEFD: Tensor, down_bias_TED: Tensor
) -> Tensor:
    """The definition, expert by expert."""
    out = torch.zeros_like(x_TBD)
    for t in range(len(x_TBD)):
        for j, (up, up_bias, down) in enumerate(zip(up_TEDF[t], up_bias_TEF[t], down_TEFD[t])):
            expert = F.gelu(x_TBD[t] @ up + up_bias) @ down + down_bias_TED[t, j]
            out[t] += gates_TBE[t, :, j, None] * expert
    return out


@torch.no_grad()
def sparse_experts(
    x_TBD: Tensor, gates_TBE: Tensor, up_TEDF: Tensor, up_bias_TEF: Tensor, down_TEFD: Tensor, down_bias_TED: Tensor,
    break_even: float = BREAK_EVEN,
) -> Tensor:  # fmt: skip
    """The same without gradients: for each expert its open rows gathered, two products, added back by their gates.

    Tokens with more than `break_even` of their gates open are computed whole; so are all where experts are very small.
    Above 1 `break_even` rules out both.
    """
    x_TBD, gates_TBE = x_TBD.to(up_TEDF.dtype), gates_TBE.to(up_TEDF.dtype)
    parts = x_TBD, gates_TBE, up_TEDF, up_bias_TEF, down_TEFD, down_bias_TED
    if x_TBD.device.type != "cpu" or x_TBD.dtype not in (torch.float32, torch.float64):
        return masked_experts(*parts)  # on an accelerator many small products would wait for each other
    tokens, rows, dim = x_TBD.shape
    if break_even <= 1 and dim * up_TEDF.shape[3] * (rows / 20 + 1) < SMALLEST:
        return masked_experts(*parts)
    out_TBD = x_TBD.new_empty(rows, tokens, dim).transpose(0, 1)  # as the rest of a model holds its rows
    if not rows:
        return out_TBD
    x, gates, out = (part.numpy() for part in (x_TBD, gates_TBE.contiguous(), out_TBD))
    counts, order, weights = _plan(gates)
    most = break_even * gates.shape[2] * rows

    def token(t: int) -> None:
        total = int(counts[t].sum())
        if total > most:
            whole = masked_experts(*(part[t : t + 1] for part in parts))
            out[t] = whole[0].detach().numpy()  # by NumPy: this thread is not in the caller's inference mode
            return
        taken, given = (scratch(name, x_TBD.dtype, total, dim) for name in ("experts in", "experts out"))
        _gather(x[t], order[t], taken.numpy())
        sizes = counts[t].tolist()
        hidden = scratch("experts hidden", x_TBD.dtype, max(sizes), up_TEDF.shape[3])
        pieces = zip(sizes, taken.split(sizes), given.split(sizes), up_TEDF[t], up_bias_TEF[t], down_TEFD[t])
        for size, mine, found, up, bias, down in pieces:
            if size:
                inner = torch.addmm(bias, mine, up, out=hidden[:size])
                torch.mm(torch.ops.aten.gelu_(inner), down, out=found)
        _scatter(given.numpy(), order[t], weights[t], counts[t], down_bias_TED[t].numpy(), out[t])

    workers = min(torch.get_num_threads(), tokens)

    def part(first: int) -> None:
        with torch.no_grad():  # whether gradients are taken is each thread's own matter
            for t in range(first, tokens, workers):
                token(t)

    in_threads(part, workers)
    return out_TBD


@torch.library.custom_op("scalerec::sparse_experts", mutates_args=())
def sparse_experts_in_graphs(
    x_TBD: Tensor, gates_TBE: Tensor, up_TEDF: Tensor, up_bias_TEF: Tensor, down_TEFD: Tensor, down_bias_TED: Tensor,
    break_even: float,
) -> Tensor:  # fmt: skip
    """`sparse_experts` as one node of an exported or compiled graph, which cannot follow loops over open gates."""
    out_TBD = sparse_experts(x_TBD, gates_TBE, up_TEDF, up_bias_TEF, down_TEFD, down_bias_TED, break_even)
    # Compiled code takes the strides below for granted, which those of the masked form are not.
    return out_TBD.transpose(0, 1).contiguous().transpose(0, 1)


@sparse_experts_in_graphs.register_fake
def _(x_TBD: Tensor, *_: object) -> Tensor:
    return x_TBD.new_empty(x_TBD.shape[1], x_TBD.shape[0], x_TBD.shape[2]).transpose(0, 1)


def sparse_experts_reference(
    x_TBD: Tensor, gates_TBE: Tensor, up_TEDF: Tensor, up_bias_TEF: Tensor, down_TEFD: Tensor, down_bias_TED: Tensor
) -> Tensor:
    """The same in plain torch."""
    out = torch.bmm(gates_TBE, down_bias_TED)
    for t, j in (gates_TBE != 0).any(1).nonzero().tolist():
        gate = gates_TBE[t, :, j]
        rows = gate.nonzero()[:, 0]
        hidden = F.gelu(torch.addmm(up_bias_TEF[t, j], x_TBD[t, rows], up_TEDF[t, j]))
        out[t].index_add_(0, rows, (hidden @ down_TEFD[t, j]) * gate[rows, None])
    return out


@njit(nogil=True, cache=True)
def _plan(gates_TBE):  # pragma: no cover - compiled
    """Open gates by token and expert: counts [T, E]; rows and gates [T, B E], those of an expert together."""
    tokens, rows, experts = gates_TBE.shape
    counts = np.zeros((tokens, experts), np.int64)
    order = np.empty((tokens, rows * experts), np.int64)
    weights = np.empty((tokens, rows * experts), gates_TBE.dtype)
    place = np.empty(experts, np.int64)
    for t in range(tokens):
        for b in range(rows):
            for j in range(experts):
                counts[t, j] += gates_TBE[t, b, j] != 0
        place[0] = 0
        for j in range(1, experts):
            place[j] = place[j - 1] + counts[t, j - 1]
        for b in range(rows):
            for j in range(experts):
                if gates_TBE[t, b, j] != 0:
                    order[t, place[j]], weights[t, place[j]] = b, gates_TBE[t, b, j]
                    place[j] += 1
    return counts, order, weights


@njit(nogil=True, cache=True)
def _gather(x_BD, order, taken):  # pragma: no cover - compiled
    for p in range(len(taken)):
        row = order[p]
        for d in range(x_BD.shape[1]):
            taken[p, d] = x_BD[row, d]


@njit(nogil=True, cache=True, fastmath={"contract"})
def _scatter(given, order, weights, counts, bias_ED, out_BD):  # pragma: no cover - compiled
    """out = sum over the open gates of a row of gate * (given + bias)."""
    out_BD[:] = 0
    p = 0
    for j in range(len(counts)):
        for _ in range(counts[j]):
            row, weight = order[p], weights[p]
            for d in range(out_BD.shape[1]):
                out_BD[row, d] += weight * (given[p, d] + bias_ED[j, d])
            p += 1

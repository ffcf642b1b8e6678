"""Two-layer networks of experts weighted by gates: all computed, or only those whose gate is open.

T tokens   B rows   D width   E experts of a token   F hidden width of one expert

out = sum_j gate_j (GELU(x up_j + up_bias_j) down_j + down_bias_j) (RankMixer eq. 10). With all gates at one the experts
of a token are a dense network of width E F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numba import njit
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from scalerec.ops._threads import in_threads, piece, scratch
from scalerec.ops.per_token import per_token_linear

BREAK_EVEN = 1.0  # share of open gates of a token above which it is computed whole; none was measured to be quicker
SMALLEST = 20_000  # D F (B / 20 + 1) below which an expert takes less time than finding out who wants it: about 20 us

# Open gates by token and expert, [T, E]; their rows and gates [T, B E], those of an expert together.
_OpenGates: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]


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


def sparse_experts(
    x_TBD: Tensor, gates_TBE: Tensor, up_TEDF: Tensor, up_bias_TEF: Tensor, down_TEFD: Tensor, down_bias_TED: Tensor,
    *, break_even: float = BREAK_EVEN,
) -> Tensor:  # fmt: skip
    """The same: the open rows of each expert gathered, two products, added back by their gates.

    Closed gates have no gradient, as what closes them (ReLU, the K largest) gives them none. Without gradients tokens
    with more than `break_even` of their gates open are computed whole; so are all where experts are very small. Above
    1 `break_even` rules out both.
    """
    x_TBD, gates_TBE = x_TBD.to(up_TEDF.dtype), gates_TBE.to(up_TEDF.dtype)
    parts = x_TBD, gates_TBE, up_TEDF, up_bias_TEF, down_TEFD, down_bias_TED
    bf16 = torch.is_autocast_enabled("cpu") or x_TBD.dtype not in (torch.float32, torch.float64)
    if bf16 or x_TBD.device.type != "cpu":
        return masked_experts(*parts)  # on an accelerator many small products would wait for each other
    if break_even <= 1 and x_TBD.shape[2] * up_TEDF.shape[3] * (x_TBD.shape[1] / 20 + 1) < SMALLEST:
        return masked_experts(*parts)
    if not (torch.is_grad_enabled() and any(part.requires_grad for part in parts)):
        return _skipping(*parts, break_even)[0]
    if any(type(part) not in (Tensor, nn.Parameter) for part in parts):
        return masked_experts(*parts)
    return _SparseExperts.apply(*parts)


@torch.no_grad()
def _skipping(
    x_TBD: Tensor, gates_TBE: Tensor, up_TEDF: Tensor, up_bias_TEF: Tensor, down_TEFD: Tensor, down_bias_TED: Tensor,
    break_even: float = 2.0, keep: bool = False,
) -> tuple[Tensor, _OpenGates, list[Tensor]]:  # fmt: skip
    """What comes out, [T, B, D]; the open gates; for each token, if kept, its experts' z [open, F] before GELU."""
    parts = x_TBD, gates_TBE, up_TEDF, up_bias_TEF, down_TEFD, down_bias_TED
    tokens, rows, dim = x_TBD.shape
    out_TBD = x_TBD.new_empty(tokens, rows, dim)
    x, gates, out = (part.detach().numpy() for part in (x_TBD, gates_TBE.contiguous(), out_TBD))
    opens = counts, order, weights = _open_gates(gates)
    opened = counts.sum(1).tolist()
    kept: dict[int, Tensor] = {}
    most = break_even * gates.shape[2] * rows

    def token(t: int) -> None:
        if opened[t] > most:
            whole = masked_experts(*(part[t : t + 1] for part in parts))
            out[t] = whole[0].detach().numpy()  # by NumPy: this thread is not in the caller's inference mode
            return
        taken = scratch("experts in", x_TBD.dtype, opened[t], dim)
        _gather(x[t], order[t], taken.numpy())
        z = grouped(taken, up_TEDF[t], counts[t])
        _add_bias(z.numpy(), up_bias_TEF[t].detach().numpy(), counts[t])
        if keep:
            kept[t] = z
        h = torch.ops.aten.gelu.out(z, out=scratch("experts h", z.dtype, *z.shape)) if keep else torch.ops.aten.gelu_(z)
        given = grouped(h, down_TEFD[t], counts[t]).numpy()
        _scatter(given, order[t], weights[t], counts[t], down_bias_TED[t].detach().numpy(), out[t])

    _by_token(token, tokens)
    return out_TBD, opens, [kept[t] for t in range(tokens)] if keep else []


def _by_token(task: Callable[[int], None], tokens: int) -> None:
    """task(0) to task(tokens - 1), shared out among torch's threads."""
    workers = min(torch.get_num_threads(), tokens)

    def part(thread: int) -> None:
        with torch.no_grad():  # whether gradients are taken is each thread's own matter
            for t in range(*piece(tokens, thread, workers)):
                task(t)

    in_threads(part, workers)


def grouped(rows: Tensor, weights: Tensor, counts: np.ndarray) -> Tensor:
    """[N, I] whose first counts[0] rows meet weights[0] of [E, I, O], the next counts[1] weights[1]: [N, O].

    One call where torch has it (float32 on a CPU since 2.10, sizes of whole 16 bytes): threads that come back to Python
    for each of many small products wait for each other.
    """
    if _one_call(rows, weights.shape[1:]):
        return F.grouped_mm(rows, weights, offs=torch.from_numpy(np.cumsum(counts, dtype=np.int32)))
    return torch.cat([part @ weight for part, weight in zip(rows.split(counts.tolist()), weights)])


def grouped_outer(rows: Tensor, others: Tensor, counts: np.ndarray) -> Tensor:
    """Products of [N, I], transposed, and [N, O] over the rows of each group alone: [E, I, O]."""
    if _one_call(rows, (rows.shape[1], others.shape[1])):
        return F.grouped_mm(rows.t(), others, offs=torch.from_numpy(np.cumsum(counts, dtype=np.int32)))
    sizes = counts.tolist()
    return torch.stack([a.t() @ b for a, b in zip(rows.split(sizes), others.split(sizes))])


def _one_call(rows: Tensor, widths: Sequence[int]) -> bool:
    return rows.dtype == torch.float32 and hasattr(F, "grouped_mm") and not any(width % 4 for width in widths)


class _SparseExperts(torch.autograd.Function):
    """Every expert learns from the rows that it was open for; z is kept for those alone."""

    @staticmethod
    def forward(
        ctx: Any, x_TBD: Tensor, gates_TBE: Tensor, up_TEDF: Tensor, up_bias_TEF: Tensor, down_TEFD: Tensor,
        down_bias_TED: Tensor,
    ) -> Tensor:  # fmt: skip
        out_TBD, ctx.opens, kept = _skipping(
            x_TBD, gates_TBE, up_TEDF, up_bias_TEF, down_TEFD, down_bias_TED, keep=True
        )
        ctx.save_for_backward(x_TBD, gates_TBE, up_TEDF, up_bias_TEF, down_TEFD, down_bias_TED, *kept)
        return out_TBD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x_TBD, _, up_TEDF, _, down_TEFD, down_bias_TED, *kept = ctx.saved_tensors
        counts, order, weights = ctx.opens
        tokens, _, dim = x_TBD.shape
        found = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in ctx.saved_tensors[:6]]
        dx_TBD, dgates_TBE, dup_TEDF, dup_bias_TEF, ddown_TEFD, ddown_bias_TED = found
        x, upstream, down_bias = (part.detach().numpy() for part in (x_TBD, gradients[0], down_bias_TED))
        dx, dgates, dup_bias, ddown_bias = (part.numpy() for part in (dx_TBD, dgates_TBE, dup_bias_TEF, ddown_bias_TED))

        def token(t: int) -> None:
            z, own = kept[t], counts[t]
            taken, given = (scratch(f"experts {name}", z.dtype, len(z), dim) for name in ("in", "out"))
            _gather(x[t], order[t], taken.numpy())
            _gather(upstream[t], order[t], given.numpy())
            dh = grouped(given, down_TEFD[t].transpose(1, 2), own)
            h = torch.ops.aten.gelu.out(z, out=scratch("experts h", z.dtype, *z.shape))
            _through_gates(
                given.numpy(), h.numpy(), dh.numpy(), order[t], weights[t], own, down_bias[t], dgates[t], ddown_bias[t]
            )
            dz = torch.ops.aten.gelu_backward.grad_input(dh, z, grad_input=dh)
            _sum_by_expert(dz.numpy(), own, dup_bias[t])
            ddown_TEFD[t] = grouped_outer(h, given, own)
            dup_TEDF[t] = grouped_outer(taken, dz, own)
            dx[t] = 0
            _add_rows(grouped(dz, up_TEDF[t].transpose(1, 2), own).numpy(), order[t], dx[t])

        _by_token(token, tokens)
        return tuple(found)


@torch.library.custom_op("scalerec::sparse_experts", mutates_args=())
def sparse_experts_in_graphs(
    x_TBD: Tensor, gates_TBE: Tensor, up_TEDF: Tensor, up_bias_TEF: Tensor, down_TEFD: Tensor, down_bias_TED: Tensor,
    break_even: float,
) -> Tensor:  # fmt: skip
    """`sparse_experts` as one node of an exported or compiled graph, which cannot follow loops over open gates."""
    parts = x_TBD, gates_TBE, up_TEDF, up_bias_TEF, down_TEFD, down_bias_TED
    out_TBD = sparse_experts(*parts, break_even=break_even)
    # Code that was compiled, kept or packed with any version takes these strides for granted.
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
def _open_gates(gates_TBE):  # pragma: no cover - compiled
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


@njit(nogil=True, cache=True)
def _add_bias(z, bias_EF, counts):  # pragma: no cover - compiled
    p = 0
    for j in range(len(counts)):
        for _ in range(counts[j]):
            for f in range(z.shape[1]):
                z[p, f] += bias_EF[j, f]
            p += 1


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


@njit(nogil=True, cache=True, fastmath={"contract", "reassoc"})
def _through_gates(given, h, dh, order, weights, counts, bias_ED, dgates_BE, dbias_ED):  # pragma: no cover - compiled
    """From the gradients `given` of a row's sum and `dh` of h before the gates: those of gates and of output biases.

    Both h and dh are multiplied by their gates in place.
    """
    dgates_BE[:] = 0
    dbias_ED[:] = 0
    p = 0
    for j in range(len(counts)):
        for _ in range(counts[j]):
            weight = weights[p]
            total = weight - weight
            for d in range(given.shape[1]):
                total += given[p, d] * bias_ED[j, d]
                dbias_ED[j, d] += weight * given[p, d]
            for f in range(h.shape[1]):
                total += h[p, f] * dh[p, f]
                h[p, f] *= weight
                dh[p, f] *= weight
            dgates_BE[order[p], j] = total
            p += 1


@njit(nogil=True, cache=True)
def _sum_by_expert(dz, counts, out_EF):  # pragma: no cover - compiled
    out_EF[:] = 0
    p = 0
    for j in range(len(counts)):
        for _ in range(counts[j]):
            for f in range(dz.shape[1]):
                out_EF[j, f] += dz[p, f]
            p += 1


@njit(nogil=True, cache=True)
def _add_rows(given, order, out_BD):  # pragma: no cover - compiled
    for p in range(len(given)):
        row = order[p]
        for d in range(out_BD.shape[1]):
            out_BD[row, d] += given[p, d]

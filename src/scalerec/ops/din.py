"""A candidate's attention over a user's past, pair by pair (DIN, Zhou et al., 2018, arXiv 1706.06978).

torch writes each of a dozen arrays of all pairs to memory and reads it again, forwards and backwards; here a few
hundred pairs at a time go from the first product to the last and stay in the cache. The plain twin is `din_reference`.

U users   B rows   L events of the longest past   w width of an event   F, S widths of the first and the second layer
P pairs of a row and a real event of its user
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from scalerec.ops._bf16 import compiled
from scalerec.ops._threads import in_threads, scratch, worth

PAIRS = 1024  # at a time
ALONE = 4_000  # pairs that are not worth a second thread


class Layers(NamedTuple):
    """a_j = MLP([q, k_j, q - k_j, q * k_j]) whose first layer's parts of q and of k_j alone are computed beforehand."""

    of_both: Tensor  # [w, F], of q * k_j
    first_slope: Tensor  # [F], PReLU below zero
    second: Tensor  # [F, S]
    second_bias: Tensor  # [S]
    second_slope: Tensor  # [S]
    last: Tensor  # [S]
    last_bias: Tensor  # [1]


def din(
    query_BW: Tensor, of_query_BF: Tensor, keys_ULW: Tensor, of_keys_ULF: Tensor, mask_UL: Tensor, user_of_row: Tensor,
    layers: Layers,
) -> Tensor:  # fmt: skip
    """sum_j a_j k_j over the real events of a row's user, [B, w]; zero for an empty past."""
    given = (query_BW, of_query_BF, keys_ULW, of_keys_ULF, mask_UL, user_of_row, *layers)
    plain = all(type(part) in (Tensor, nn.Parameter) and part.device.type == "cpu" for part in given)
    if not plain or any(part.is_floating_point() and part.dtype != torch.float32 for part in given):
        return din_reference(query_BW, of_query_BF, keys_ULW, of_keys_ULF, mask_UL, user_of_row, layers)
    if torch.is_grad_enabled() and any(part.requires_grad for part in given):
        return _Din.apply(*given)
    return _attended(given, learns=False)[0]


def din_reference(
    query_BW: Tensor, of_query_BF: Tensor, keys_ULW: Tensor, of_keys_ULF: Tensor, mask_UL: Tensor, user_of_row: Tensor,
    layers: Layers,
) -> Tensor:  # fmt: skip
    """The same in plain torch, on any device."""
    row, event = mask_UL[user_of_row].nonzero(as_tuple=True)
    if not row.numel():
        return torch.zeros_like(query_BW)
    place = user_of_row[row] * mask_UL.shape[1] + event
    keys = keys_ULW.flatten(0, 1).index_select(0, place)
    both = (query_BW.index_select(0, row) * keys) @ layers.of_both
    hidden = of_keys_ULF.flatten(0, 1).index_select(0, place) + of_query_BF.index_select(0, row) + both
    hidden = nn.functional.prelu(hidden, layers.first_slope.to(hidden.dtype)) @ layers.second
    hidden = hidden + layers.second_bias.to(hidden.dtype)
    scores = nn.functional.prelu(hidden, layers.second_slope.to(hidden.dtype)) @ layers.last[:, None] + layers.last_bias
    return torch.zeros_like(query_BW).index_add(0, row, (scores * keys).to(query_BW.dtype))


class _Plan(NamedTuple):
    """Pairs in the order of their rows, rows in that of their users."""

    rows: np.ndarray  # [P] int64
    places: np.ndarray  # [P] int64, of the event among [U L]
    pieces: list[list[tuple[int, int]]]  # for each thread, the pairs it takes at a time


def _planned(mask_UL: Tensor, user_of_row: Tensor, apart: bool) -> _Plan:
    """With `apart` no two threads meet the same user, whose events' gradients both would write to."""
    users = user_of_row.numpy()
    rows, places, starts = _pairs(mask_UL.numpy(), users, np.argsort(users, kind="stable"))
    total = len(rows)
    threads = worth(total, ALONE)
    ends = [0]
    for thread in range(1, threads + 1):
        end = total * thread // threads
        if apart and end < total:
            end = int(starts[np.searchsorted(starts, end)])
        ends.append(end)
    pieces = [[(low, min(low + PAIRS, end)) for low in range(begin, end, PAIRS)] for begin, end in pairwise(ends)]
    return _Plan(rows, places, pieces)


def _attended(given: Sequence[Tensor], learns: bool) -> tuple[Tensor, _Plan, np.ndarray, Tensor, Tensor]:
    """What comes out, [B, w]; the pairs and their scores; if it learns, both layers before PReLU, [P, F] and [P, S]."""
    query, of_query, keys, of_keys, mask, user_of_row = given[:6]
    weights = Layers(*(part.detach() for part in given[6:]))
    plan = _planned(mask, user_of_row, learns)
    (width, first), second, total = weights.of_both.shape, len(weights.last), len(plan.rows)
    queries, of_queries = query.detach().numpy(), of_query.detach().numpy()
    past, of_past = keys.detach().flatten(0, 1).numpy(), of_keys.detach().flatten(0, 1).numpy()
    second_layer = weights.second_bias.numpy(), weights.second_slope.numpy(), weights.last.numpy()
    last_bias = np.float32(weights.last_bias.item())
    z1, z2 = (torch.empty(total if learns else 0, size) for size in (first, second))
    scores = np.empty(total, np.float32)
    outs = [torch.zeros(query.shape) for _ in plan.pieces]  # a row whose pairs two threads share is added up afterwards

    def task(thread: int) -> None:
        with torch.no_grad():
            for low, high in plan.pieces[thread]:
                pair = plan.rows[low:high], plan.places[low:high]
                both = scratch("din both", torch.float32, high - low, width)
                h = scratch("din h", torch.float32, high - low, first)
                to_1 = z1[low:high] if learns else scratch("din z1", torch.float32, high - low, first)
                to_2 = z2[low:high] if learns else scratch("din z2", torch.float32, high - low, second)
                _products(queries, past, *pair, both.numpy())
                torch.mm(both, weights.of_both, out=to_1)
                _first_layer(to_1.numpy(), of_past, of_queries, *pair, weights.first_slope.numpy(), h.numpy())
                torch.mm(h, weights.second, out=to_2)
                out = outs[thread].numpy()
                _score(to_2.numpy(), *second_layer, last_bias, past, *pair, scores[low:high], out)

    in_threads(task, len(plan.pieces))
    return sum(outs[1:], outs[0]), plan, scores, z1, z2


class _Din(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Tensor) -> Tensor:
        out, ctx.plan, ctx.scores, z1, z2 = _attended(given, learns=True)
        ctx.save_for_backward(*given[:4], *given[6:], z1, z2)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query, of_query, keys, of_keys, *layers, z1, z2 = ctx.saved_tensors
        plan, scores, weights = ctx.plan, ctx.scores, Layers(*layers)
        (width, first), second = weights.of_both.shape, len(weights.last)
        upstream = gradients[0].contiguous().numpy()
        found = [torch.zeros(part.shape) for part in (query, of_query, keys, of_keys)]
        dquery, dof_query, dkeys, dof_keys = (part.view(-1, part.shape[-1]).numpy() for part in found)
        queries, past = (part.detach().reshape(-1, width).numpy() for part in (query, keys))
        first_slope, second_slope, last = (
            part.detach().numpy() for part in (weights.first_slope, weights.second_slope, weights.last)
        )
        sums = [Layers(*(torch.zeros_like(part) for part in layers)) for _ in plan.pieces]

        def task(thread: int) -> None:
            mine = sums[thread]
            small = [part.numpy() for part in (mine.second_bias, mine.second_slope, mine.last, mine.last_bias)]
            with torch.no_grad():
                for low, high in plan.pieces[thread]:
                    pair = plan.rows[low:high], plan.places[low:high]
                    sizes = {"both": width, "dboth": width, "h": first, "dh": first, "z2": second}
                    both, dboth, h, dh, dz2 = (
                        scratch(f"din {name}", torch.float32, high - low, size) for name, size in sizes.items()
                    )
                    at, score = z2[low:high].numpy(), scores[low:high]
                    _score_back(upstream, at, second_slope, last, past, *pair, score, dz2.numpy(), dkeys, *small)
                    at = z1[low:high].numpy()
                    _prelu(at, first_slope, h.numpy())
                    mine.second.addmm_(h.t(), dz2)
                    torch.mm(dz2, weights.second.t(), out=dh)
                    _first_layer_back(at, dh.numpy(), first_slope, *pair, dof_query, dof_keys, mine.first_slope.numpy())
                    _products(queries, past, *pair, both.numpy())
                    mine.of_both.addmm_(both.t(), dh)
                    torch.mm(dh, weights.of_both.t(), out=dboth)
                    _products_back(dboth.numpy(), queries, past, *pair, dquery, dkeys)

        in_threads(task, len(plan.pieces))
        totals = [torch.stack(parts).sum(0) for parts in zip(*sums)]
        return *found, None, None, *totals


@compiled
def _pairs(mask_UL, users, order):  # pragma: no cover - compiled
    """Row and place of each pair, rows in `order`; where the pairs of each user begin, and where all end."""
    height, length = mask_UL.shape
    counts = np.zeros(height, np.int64)
    for u in range(height):
        for j in range(length):
            counts[u] += mask_UL[u, j]
    total = np.int64(0)
    for b in range(len(users)):
        if users[b] < 0 or users[b] >= height:
            raise IndexError("a row is of a user who is not there")
        total += counts[users[b]]
    rows, places = np.empty(total, np.int64), np.empty(total, np.int64)
    starts = np.empty(len(users) + 1, np.int64)
    p, groups, before = 0, 0, np.int64(-1)
    for i in range(len(order)):
        b = order[i]
        u = users[b]
        if u != before:
            starts[groups] = p
            groups, before = groups + 1, u
        for j in range(length):
            if mask_UL[u, j]:
                rows[p], places[p] = b, u * length + j
                p += 1
    starts[groups] = total
    return rows, places, starts[: groups + 1]


@compiled
def _products(query, keys, rows, places, out):  # pragma: no cover - compiled
    for p in range(len(rows)):
        q, k, to = query[rows[p]], keys[places[p]], out[p]
        for d in range(len(to)):
            to[d] = q[d] * k[d]


@compiled
def _products_back(dboth, query, keys, rows, places, dquery, dkeys):  # pragma: no cover - compiled
    for p in range(len(rows)):
        q, k, dq, dk, d_p = query[rows[p]], keys[places[p]], dquery[rows[p]], dkeys[places[p]], dboth[p]
        for d in range(len(q)):
            dq[d] += d_p[d] * k[d]
            dk[d] += d_p[d] * q[d]


@compiled
def _prelu(z, slope, out):  # pragma: no cover - compiled
    for p in range(len(z)):
        at, to = z[p], out[p]
        for f in range(len(slope)):
            to[f] = max(at[f], np.float32(0)) + slope[f] * min(at[f], np.float32(0))


@compiled
def _first_layer(z, of_keys, of_query, rows, places, slope, out):  # pragma: no cover - compiled
    for p in range(len(rows)):
        at, of_key, of_row, to = z[p], of_keys[places[p]], of_query[rows[p]], out[p]
        for f in range(len(slope)):
            at[f] += of_key[f] + of_row[f]
            to[f] = max(at[f], np.float32(0)) + slope[f] * min(at[f], np.float32(0))


@compiled
def _first_layer_back(z, dh, slope, rows, places, dof_query, dof_keys, dslope):  # pragma: no cover - compiled
    """dh becomes the gradient before PReLU."""
    for p in range(len(rows)):
        at, d_p, to_row, to_key = z[p], dh[p], dof_query[rows[p]], dof_keys[places[p]]
        for f in range(len(slope)):
            dslope[f] += d_p[f] * min(at[f], np.float32(0))
            d_p[f] *= np.float32(1) if at[f] > 0 else slope[f]
            to_row[f] += d_p[f]
            to_key[f] += d_p[f]


@compiled
def _score(z, bias, slope, last, last_bias, keys, rows, places, scores, out):  # pragma: no cover - compiled
    for p in range(len(rows)):
        at, k, to = z[p], keys[places[p]], out[rows[p]]
        total = last_bias
        for s in range(len(last)):
            at[s] += bias[s]
            total += last[s] * (max(at[s], np.float32(0)) + slope[s] * min(at[s], np.float32(0)))
        scores[p] = total
        for d in range(len(k)):
            to[d] += total * k[d]


@compiled
def _score_back(
    upstream, z, slope, last, keys, rows, places, scores, dz, dkeys, dbias, dslope, dlast, dlast_bias
):  # pragma: no cover - compiled
    for p in range(len(rows)):
        at, k, dk, d_row, d_p = z[p], keys[places[p]], dkeys[places[p]], upstream[rows[p]], dz[p]
        total = np.float32(0)
        for d in range(len(k)):
            total += d_row[d] * k[d]
            dk[d] += scores[p] * d_row[d]
        dlast_bias[0] += total
        for s in range(len(last)):
            below = min(at[s], np.float32(0))
            dlast[s] += total * (max(at[s], np.float32(0)) + slope[s] * below)
            dslope[s] += total * last[s] * below
            d_p[s] = total * last[s] * (np.float32(1) if at[s] > 0 else slope[s])
            dbias[s] += d_p[s]

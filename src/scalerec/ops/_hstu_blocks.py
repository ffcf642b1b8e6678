"""HSTU's attention tile by tile, forward and backward: nothing of size [n, n] outlives its tile.

x = alpha q k' + bias, A = sigmoid(x) x on and below the diagonal, out = scale A v, and with g the gradient of out
dA = scale g v',  dx = dA (sigmoid(x) + A (1 - sigmoid(x))),  dv = scale A' g,  dq = alpha dx k,  dk = alpha dx' q.

T tokens   H heads   K width of q and k   V width of v   a rows, b keys of a group
G sequences worked out at once   P = G H   R rows, C keys of a tile
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalerec.ops._hstu_plan import AttentionPlan, Group, Places, Tile, Times, tile_buckets

BLOCK = 1 << 18  # scores at once for every thread: few enough for the second cache, and worth the call
LANES = 4  # copies of the time table that gradients are added to in turns: the same entry twice in a row waits

_kept = threading.local()


def scratch(name: str, dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory of any content, the same one in every call: fresh pages cost more than what is written to them."""
    size = 1
    for n in shape:
        size *= n
    key = f"{name} {dtype}"
    kept = _kept.__dict__.get(key)
    if kept is None or len(kept) < size:
        kept = _kept.__dict__[key] = torch.empty(size, dtype=dtype)
    return kept[:size].view(shape)


class Bias:
    """The bias of a tile, and the sums of its gradient."""

    def __init__(
        self, position: Tensor | None, time: Tensor | None, times: Times | None, plan: AttentionPlan, q: Tensor
    ):
        self.times, self.heads = times, q.shape[1]
        self.sums = torch.promote_types(q.dtype, torch.float32)
        self.index = torch.empty(0, dtype=torch.int32)
        self.position, self.time = position, time
        tiles = [tile for group in plan.groups for tile in group.tiles]
        if position is not None:
            # a row is the table from the gap of its first key on; the next row begins one earlier
            rows = max((tile.end - tile.first for tile in tiles), default=0)
            self.keys = max((tile.right for tile in tiles), default=0)
            gaps = torch.arange(self.keys + rows) - torch.arange(rows)[:, None]
            self.gaps = (gaps + (position.numel() // 2 - self.keys)).clamp_(0, position.numel() - 1)
            self.places = position.detach().to(q.dtype)[self.gaps]  # [rows, keys + rows]
            self.d_places = torch.zeros(self.gaps.shape, dtype=self.sums)
        if time is not None:
            self.buckets = time.detach().to(q.dtype).contiguous()
            widest = max((tile.right - tile.left for tile in tiles), default=0)
            self.lane = torch.arange(widest, dtype=torch.int32) % LANES * time.numel()
            self.d_time = torch.zeros(time.numel(), dtype=torch.float64)

    def __bool__(self) -> bool:
        return self.position is not None or self.time is not None

    def write(self, out: Tensor, group: Group, number: int, begin: int) -> None:
        """Into out [G, R, C], of the group's tile `number` and the sequences from `begin`."""
        if self.time is not None:
            self.index = scratch("index", torch.int32, *out.shape)
            if group.buckets is not None:
                self.index.copy_(group.buckets[number][begin : begin + len(out)])
            else:
                assert self.times is not None
                self.index.copy_(tile_buckets(group, group.tiles[number], begin, begin + len(out), self.times))
            torch.index_select(self.buckets, 0, self.index.view(-1), out=out.view(-1))
        if self.position is not None:
            places = self.places[self._where(group, group.tiles[number])]
            out.copy_(places) if self.time is None else out.add_(places)

    def add_gradient(self, gradient: Tensor, group: Group, number: int) -> None:
        """The sum over heads [G, R, C] of the gradient of the same tile, after `write`."""
        if self.time is not None:
            self.index.add_(self.lane[: gradient.shape[2]])
            lanes = gradient.new_zeros(LANES * self.time.numel())
            lanes.index_add_(0, self.index.view(-1), gradient.view(-1))
            self.d_time += lanes.view(LANES, -1).sum(0)
        if self.position is not None:
            over = 0 if group.causal else (0, 1)
            self.d_places[self._where(group, group.tiles[number])] += gradient.sum(over)

    def gradients(self) -> tuple[Tensor | None, Tensor | None]:
        """Of position and time."""
        d_position = d_time = None
        if self.position is not None:
            d_position = torch.zeros(self.position.numel(), dtype=self.sums)
            d_position.index_add_(0, self.gaps.flatten(), self.d_places.flatten())
            d_position = d_position.to(self.position.dtype)
        if self.time is not None:
            d_time = self.d_time.to(self.time.dtype)
        return d_position, d_time

    def _where(self, group: Group, tile: Tile) -> tuple[slice, slice]:
        """Where in `places` a tile lies: rows of candidates all stand one behind the last key."""
        rows, row = (tile.end - tile.first, tile.first) if group.causal else (1, group.keys.read.shape[1])
        return slice(0, rows), slice(self.keys + tile.left - row, self.keys + tile.right - row)


class Step(NamedTuple):
    """What is worked out at once."""

    tile: int  # its number in the group
    p: slice  # sequences and heads
    rows: slice
    keys: slice
    is_first: bool  # of this tile
    is_last: bool


class Work:
    """Sequences [begin, end) of a group, packed by head, and its tiles one after the other."""

    def __init__(self, group: Group, begin: int, end: int, heads: int, bias: Bias):
        self.group, self.begin, self.end, self.heads, self.bias = group, begin, end, heads, bias

    def pack(self, name: str, x: Tensor, places: Places, clean: bool = False) -> Tensor:
        """[T, H, d] -> [P, n, d]; what is padded is zero if `clean`, of the same sequence if not."""
        index = places.read[self.begin : self.end]
        sequences, longest = index.shape
        heads, width = x.shape[1:]
        if places.start is not None:
            start = places.start + self.begin * longest
            rows = x[start : start + index.numel()].flatten(1)
        else:
            rows = scratch(name, x.dtype, sequences * longest, heads * width)
            torch.index_select(x.flatten(1), 0, index.view(-1), out=rows)
            if clean and places.real is not None:
                rows.mul_(places.real[self.begin : self.end].view(-1, 1).to(rows.dtype))
        if heads == 1 and rows.is_contiguous():
            return rows.view(sequences, longest, width)
        packed = scratch(f"{name} by head", x.dtype, sequences, heads, longest, width)
        packed.copy_(rows.unflatten(0, (sequences, longest)).unflatten(2, (heads, width)).transpose(1, 2))
        return packed.flatten(0, 1)

    def sums(self, name: str, *shape: int) -> Tensor:
        """Zeros to which tiles are added."""
        return scratch(name, self.bias.sums, *shape).zero_()

    def unpack(self, total: Tensor, rows: Tensor, places: Places, add: bool) -> None:
        """Write [P, n, d] to the tokens of [T + 1, H, d], or add it to them."""
        index = places.write[self.begin : self.end]
        rows = rows.unflatten(0, (-1, self.heads)).transpose(1, 2)  # [G, n, H, d]
        if places.start is not None:
            start = places.start + self.begin * index.shape[1]
            part = total[start : start + index.numel()].view(rows.shape)
            part.add_(rows) if add else part.copy_(rows)
        else:
            rows = rows.flatten(0, 1).to(total.dtype)
            total.index_add_(0, index.view(-1), rows) if add else total.index_copy_(0, index.view(-1), rows)

    def tiles(self) -> Iterator[Step]:
        """The steps of every tile: all heads at once, or in turns where one sequence is large enough."""
        block = BLOCK * torch.get_num_threads()
        for number, tile in enumerate(self.group.tiles):
            reach = min(tile.sequences, self.end) - self.begin
            if reach <= 0:
                continue
            rows, keys = slice(tile.first, tile.end), slice(tile.left, tile.right)
            count = reach * self.heads
            step = max(1, block // ((tile.end - tile.first) * (tile.right - tile.left))) if reach == 1 else count
            for first in range(0, count, step):
                last = min(first + step, count)
                yield Step(number, slice(first, last), rows, keys, first == 0, last == count)

    def scores(self, step: Step, q: Tensor, k: Tensor, alpha: float) -> Tensor:
        """q [P, R, K], k [P, C, K] -> alpha q k' + bias [P, R, C]."""
        x = scratch("x", q.dtype, len(q), q.shape[1], k.shape[1])
        if not self.bias:
            return torch.baddbmm(x, q, k.mT, beta=0, alpha=alpha, out=x)
        if self.heads == 1:
            self.bias.write(x, self.group, step.tile, self.begin)
        else:
            if step.is_first:
                self.shared = scratch("bias", q.dtype, max(1, len(q) // self.heads), *x.shape[1:])
                self.bias.write(self.shared, self.group, step.tile, self.begin)
            x.unflatten(0, (len(self.shared), -1)).copy_(self.shared[:, None])
        return x.baddbmm_(q, k.mT, alpha=alpha)

    def add_gradient(self, step: Step, dx: Tensor) -> None:
        """Pass the gradient of x [P, R, C] on to the bias."""
        if not self.bias:
            return
        if self.heads == 1:
            total = dx if dx.dtype == self.bias.sums else scratch("total", self.bias.sums, *dx.shape).copy_(dx)
        else:
            total = scratch("total", self.bias.sums, *self.shared.shape)
            by_head = dx.unflatten(0, (len(total), -1))
            if step.is_first:
                torch.sum(by_head, 1, dtype=total.dtype, out=total)
            else:
                total += by_head.sum(1, dtype=total.dtype)
        if step.is_last:
            self.bias.add_gradient(total, self.group, step.tile)

    def cut(self, step: Step, x: Tensor) -> None:
        """Zero above the diagonal."""
        tile = self.group.tiles[step.tile]
        if self.group.causal and tile.right > tile.first:
            x[:, :, max(tile.first - tile.left, 0) :].tril_(min(tile.first - tile.left, 0))


def work(plan: AttentionPlan, heads: int, bias: Bias) -> Iterator[Work]:
    """The groups of a plan in parts that fit the second cache."""
    for group in plan.groups:
        largest = max((tile.end - tile.first) * (tile.right - tile.left) for tile in group.tiles)
        sequences = len(group.queries.read)
        step = max(1, BLOCK * torch.get_num_threads() // (largest * heads))
        parts = -(-sequences // step)
        edges = [sequences * i // parts for i in range(parts + 1)]
        yield from (Work(group, begin, end, heads, bias) for begin, end in pairwise(edges))


class HSTUAttention(torch.autograd.Function):
    """Rows of histories and candidates towards histories; a candidate's view of itself is not in it."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor | None,
        time: Tensor | None,
        plan: AttentionPlan,
        times: Times | None,
        scale: float,
        alpha: float,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, position, time, *(times[:2] if times else (None, None)))
        ctx.plan, ctx.times, ctx.scale, ctx.alpha = plan, times and times[2:], scale, alpha
        bias = Bias(position, time, times, plan, q)
        out = _total(v)
        for part in work(plan, q.shape[1], bias):
            queries, keys = part.group.queries, part.group.keys
            qs = part.pack("q", q, queries)
            ks, vs = (part.pack(name, x, keys, clean=not part.group.causal) for name, x in (("k", k), ("v", v)))
            outs = part.sums("out", len(qs), qs.shape[1], v.shape[2])
            for step in part.tiles():
                _, p, i, j, *_ = step
                x = part.scores(step, qs[p, i], ks[p, j], alpha)
                torch.nn.functional.silu(x, inplace=True)
                part.cut(step, x)
                _add(outs[p, i], x, vs[p, j])
            part.unpack(out, outs.mul_(scale), queries, add=False)
        return out[:-1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, position, time, query_times, key_times = ctx.saved_tensors
        times = Times(query_times, key_times, *ctx.times) if ctx.times else None
        bias = Bias(position, time, times, ctx.plan, q)
        shared = ctx.plan.targets is not None  # histories are keys of two groups, candidates of none
        dq, dk, dv = _total(q), _total(k, zero=shared), _total(v, zero=shared)
        for part in work(ctx.plan, q.shape[1], bias):
            queries, keys = part.group.queries, part.group.keys
            qs = part.pack("q", q, queries)
            ks, vs = (part.pack(name, x, keys, clean=not part.group.causal) for name, x in (("k", k), ("v", v)))
            gs = part.pack("g", gradient, queries, clean=True)
            dqs, dks, dvs = (part.sums(*x) for x in (("dq", *qs.shape), ("dk", *ks.shape), ("dv", *vs.shape)))
            for step in part.tiles():
                _, p, i, j, *_ = step
                x = part.scores(step, qs[p, i], ks[p, j], ctx.alpha)
                dx = scratch("dx", x.dtype, *x.shape)
                torch.baddbmm(dx, gs[p, i], vs[p, j].mT, beta=0, alpha=ctx.scale, out=dx)
                torch.ops.aten.silu_backward.grad_input(dx, x, grad_input=dx)
                torch.nn.functional.silu(x, inplace=True)
                part.cut(step, x)
                part.cut(step, dx)
                _add(dvs[p, j], x.mT, gs[p, i])
                _add(dks[p, j], dx.mT, qs[p, i])
                _add(dqs[p, i], dx, ks[p, j])
                part.add_gradient(step, dx)
            part.unpack(dq, dqs.mul_(ctx.alpha), queries, add=False)
            part.unpack(dk, dks.mul_(ctx.alpha), keys, add=shared)
            part.unpack(dv, dvs.mul_(ctx.scale), keys, add=shared)
        return dq[:-1], dk[:-1], dv[:-1], *bias.gradients(), None, None, None, None


def _add(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the batched product a b [P, n, d]."""
    total += torch.bmm(a, b, out=scratch("product", a.dtype, *total.shape))


def _total(x: Tensor, zero: bool = False) -> Tensor:
    """Memory for [T + 1, H, d]; the last row takes what padded tokens hold."""
    return (x.new_zeros if zero else x.new_empty)(len(x) + 1, *x.shape[1:])

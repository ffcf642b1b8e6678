"""HSTU's attention tile by tile, forward and backward: nothing of size [n, n] outlives its tile.

x = alpha q k' + bias, A = sigmoid(x) x on and below the diagonal, out = scale A v, and with g the gradient of out
dA = scale g v',  dx = dA (sigmoid(x) + A (1 - sigmoid(x))),  dv = scale A' g,  dq = alpha dx k,  dk = alpha dx' q.

T tokens   H heads   K width of q and k   V width of v   a rows, b keys of a group
G sequences worked out at once   P = G H   R rows, C keys of a tile
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalerec.ops._bf16 import array
from scalerec.ops._hstu_pairs import slopes, weigh
from scalerec.ops._hstu_plan import AttentionPlan, Group, Places, Times, bucket_type, cut, tile_buckets
from scalerec.ops._hstu_rows import pack, unpack
from scalerec.ops._threads import in_threads, scratch

BLOCK = 1 << 20  # scores at once: a product takes some 40 us, in bf16 80, whatever its size
LARGE = 100  # rows of a product that may go where it belongs one by one; MKL writes batches to contiguous memory only
NOTHING = np.empty((0, 0, 0), np.uint8)


class Bias:
    """The tables of the biases, and the sums of their gradients."""

    def __init__(self, position: Tensor | None, time: Tensor | None, times: Times | None, dtype: torch.dtype):
        self.sums = torch.promote_types(dtype, torch.float32)
        self.times, self.given = times, (position, time)
        self.position, self.time = (
            torch.empty(0, dtype=self.sums).numpy() if x is None else x.detach().to(self.sums).contiguous().numpy()
            for x in (position, time)
        )
        self.d_position, self.d_time = np.zeros(len(self.position)), np.zeros(len(self.time))

    def of_thread(self) -> Bias:
        """The same tables with sums of its own."""
        own = copy.copy(self)
        own.d_position, own.d_time = (np.zeros(len(x)) for x in (self.position, self.time))
        return own

    def buckets(self, group: Group, number: int, begin: int, end: int) -> np.ndarray:
        """[end - begin, R, C] of the group's tile `number`, or nothing without a bias of time."""
        if not len(self.time):
            return NOTHING
        if group.buckets is not None:
            return group.buckets[number][begin:end].numpy()
        assert self.times is not None
        tile = group.tiles[number]
        shape = (end - begin, tile.end - tile.first, tile.right - tile.left)
        return tile_buckets(
            group, tile, begin, end, self.times, scratch("buckets", bucket_type(self.times.count), *shape)
        ).numpy()

    def gradients(self, of_threads: list[Bias]) -> list[Tensor | None]:
        """Of position and time."""
        sums = (sum(own.d_position for own in of_threads), sum(own.d_time for own in of_threads))
        return [
            None if table is None else torch.from_numpy(np.asarray(found)).to(table.dtype)
            for table, found in zip(self.given, sums)
        ]


class Pairs(NamedTuple):
    """What `_hstu_pairs` asks of the pairs of a step."""

    per: int
    real: np.ndarray
    first: int
    stride: int
    left: int
    position: np.ndarray
    time: np.ndarray
    buckets: np.ndarray


class Step(NamedTuple):
    """What is worked out at once."""

    tile: int  # its number in the group
    p: slice  # sequences and heads
    rows: slice
    keys: slice
    is_first: bool  # of this tile


class Work:
    """Sequences [begin, end) of a group with some of their heads, packed, and their tiles one after the other."""

    def __init__(self, group: Group, begin: int, end: int, head: slice, bias: Bias):
        self.group, self.begin, self.end, self.bias = group, begin, end, bias
        self.head, self.heads = head, head.stop - head.start
        self.cost = self.heads * group.pairs(begin, end)

    def pack(self, name: str, x: Tensor, places: Places) -> Tensor:
        """[T, H, d] -> [P, n, d], zero where padded."""
        x, count = x[:, self.head], self.end - self.begin
        span = places.span(self.begin, self.end)
        if span is not None:
            rows = x[span]
            if self.heads == 1 and rows.is_contiguous():
                return rows.view(count, places.longest, -1)
            if count == 1 and rows.dtype == torch.float32:  # MKL does not mind the strides, AMX does
                return rows.transpose(0, 1)
        return pack(name, x, places, self.begin, self.end).flatten(0, 1)

    def tiles(self) -> Iterator[Step]:
        """The steps of every tile: all heads at once, or in turns where one sequence is large enough."""
        block = BLOCK * torch.get_num_threads()
        for number, tile in enumerate(self.group.tiles):
            reach = min(tile.sequences, self.end) - self.begin
            if reach <= 0:
                continue
            rows, keys = slice(tile.first, tile.end), slice(tile.left, tile.right)
            count = reach * self.heads
            step = max(1, block // tile.pairs) if reach == 1 else count
            for first in range(0, count, step):
                last = min(first + step, count)
                yield Step(number, slice(first, last), rows, keys, first == 0)

    def scores(self, q: Tensor, k: Tensor, alpha: float) -> Tensor:
        """q [P, R, K], k [P, C, K] -> alpha q k' [P, R, C]."""
        x = scratch("x", q.dtype, len(q), q.shape[1], k.shape[1])
        return torch.baddbmm(x, q, k.mT, beta=0, alpha=alpha, out=x)

    def weigh(self, step: Step, x: Tensor) -> None:
        """x [P, R, C] -> weights, in place."""
        weigh(array(x), *self._pairs(step, len(x)))

    def slopes(self, step: Step, x: Tensor, dx: Tensor) -> None:
        """x [P, R, C] -> weights, and the gradient of these -> that of x, in place; the biases' is added up."""
        slopes(array(x), array(dx), *self._pairs(step, len(x)), self.bias.d_position, self.bias.d_time)

    def _pairs(self, step: Step, count: int) -> Pairs:
        """Of a step of so many sequences and heads."""
        tile = self.group.tiles[step.tile]
        end = min(tile.sequences, self.end)
        if step.is_first:
            self.buckets = self.bias.buckets(self.group, step.tile, self.begin, end)
        # Rows of candidates all stand one behind the last key.
        first, stride = (tile.first, 1) if self.group.causal else (self.group.keys.longest, 0)
        per = count if end - self.begin == 1 else self.heads
        real = (self.group.queries.length[self.begin : end] - tile.first).numpy()
        return Pairs(per, real, first, stride, tile.left, self.bias.position, self.bias.time, self.buckets)


class Totals:
    """What parts find for each token, brought to [T, H, d]; `places` have every token once, or leave zeros."""

    def __init__(self, name: str, like: Tensor, places: list[Places]):
        self.name = f"sums of {name}"
        whole = sum(int(x.length.sum()) for x in places) == len(like)
        self.rows = (torch.empty if whole else torch.zeros)(like.shape, dtype=like.dtype)

    def sums(self, part: Work, places: Places) -> Tensor:
        """Room for [P, n, d] in float32 or wider: the rows themselves where they are laid out like this."""
        count, span = part.end - part.begin, places.span(part.begin, part.end)
        _, heads, width = self.rows.shape
        if heads == 1 and part.group.causal and span is not None and self.rows.dtype == part.bias.sums:
            return self.rows[span].view(count, places.longest, width)
        return scratch(self.name, part.bias.sums, count * part.heads, places.longest, width)

    def put(self, found: Tensor, part: Work, places: Places, again: bool = False) -> None:
        """What the sums have become; added where the token has some `again`."""
        if found.untyped_storage().data_ptr() != self.rows.untyped_storage().data_ptr():
            rows = self.rows[:, part.head]
            unpack(found.unflatten(0, (-1, part.heads)), rows, places, part.begin, part.end, again)


def _parts(groups: list[Group], sequences: int, heads: int, bias: Bias) -> list[Work]:
    """Groups of a plan of so many sequences in parts of a BLOCK, and in smaller ones where these are too few."""
    threads, parts = torch.get_num_threads(), []
    pairs = heads * sum(group.pairs(0, len(group.queries.first)) for group in groups)
    block = BLOCK if threads == 1 else min(BLOCK, pairs // (2 * threads))
    turns = min(heads, max(1, threads // max(1, sequences)))
    by_head = [slice(a, b) for a, b in cut(0, heads, -(-heads // turns))]
    for group in groups:
        largest = max(tile.pairs for tile in group.tiles)
        edges = cut(0, len(group.queries.first), max(1, block // (largest * heads)))
        parts += [Work(group, begin, end, head, bias) for begin, end in edges for head in by_head]
    return parts


def run(plan: AttentionPlan, heads: int, bias: Bias, task: Callable[[Work], None]) -> list[Bias]:
    """Do all parts of a plan, on as many threads as torch has, and return the biases of the threads with their sums.

    A thread does whole parts by itself: threads that meet in every operation wait for each other on a busy machine.
    Which thread does which part is fixed, and so is every sum. Candidates come after the histories that they add to.
    """
    biases = [bias.of_thread() for _ in range(torch.get_num_threads())]
    inference = torch.is_inference_mode_enabled()  # of this thread, and the others must write to its memory
    for causal in (True, False):
        groups = [group for group in plan.groups if group.causal == causal]
        parts = sorted(_parts(groups, len(plan.offsets) - 1, heads, bias), key=lambda part: -part.cost)
        lists: list[list[Work]] = [[] for _ in range(min(len(biases), len(parts)))]
        loads = [0] * len(lists)
        for part in parts:
            least = loads.index(min(loads))
            lists[least].append(part)
            loads[least] += part.cost

        def do(thread: int, lists: list[list[Work]] = lists) -> None:
            with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
                for part in lists[thread]:
                    part.bias = biases[thread]
                    task(part)

        in_threads(do, len(lists))
    return biases


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
        bias = Bias(position, time, times, q.dtype)
        out = Totals("outs", v, [group.queries for group in plan.groups])

        def task(part: Work) -> None:
            queries, keys = part.group.queries, part.group.keys
            qs, ks, vs = part.pack("q", q, queries), part.pack("k", k, keys), part.pack("v", v, keys)
            outs = out.sums(part, queries)
            for step in part.tiles():
                _, p, i, j, *_ = step
                x = part.scores(qs[p, i], ks[p, j], alpha)
                part.weigh(step, x)
                _add(outs[p, i], x, vs[p, j], scale, is_first=j.start == 0)
            out.put(outs, part, queries)

        run(plan, q.shape[1], bias, task)
        return out.rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, position, time, query_times, key_times = ctx.saved_tensors
        times = Times(query_times, key_times, *ctx.times) if ctx.times else None
        bias = Bias(position, time, times, q.dtype)
        dq = Totals("dqs", q, [group.queries for group in ctx.plan.groups])
        causal = [group.keys for group in ctx.plan.groups if group.causal]
        dk, dv = Totals("dks", k, causal), Totals("dvs", v, causal)

        def task(part: Work) -> None:
            queries, keys, again = part.group.queries, part.group.keys, not part.group.causal
            qs, gs = part.pack("q", q, queries), part.pack("g", gradient, queries)
            ks, vs = part.pack("k", k, keys), part.pack("v", v, keys)
            dqs, dks, dvs = dq.sums(part, queries), dk.sums(part, keys).zero_(), dv.sums(part, keys).zero_()
            for step in part.tiles():
                _, p, i, j, *_ = step
                x = part.scores(qs[p, i], ks[p, j], ctx.alpha)
                dx = scratch("dx", x.dtype, *x.shape)
                torch.baddbmm(dx, gs[p, i], vs[p, j].mT, beta=0, alpha=ctx.scale, out=dx)
                part.slopes(step, x, dx)
                _add(dvs[p, j], x.mT, gs[p, i], ctx.scale)
                _add(dks[p, j], dx.mT, qs[p, i], ctx.alpha)
                _add(dqs[p, i], dx, ks[p, j], ctx.alpha, is_first=j.start == 0)
            dq.put(dqs, part, queries)
            dk.put(dks, part, keys, again)
            dv.put(dvs, part, keys, again)

        biases = run(ctx.plan, q.shape[1], bias, task)
        return dq.rows, dk.rows, dv.rows, *bias.gradients(biases), None, None, None, None


def _add(total: Tensor, a: Tensor, b: Tensor, factor: float, is_first: bool = False) -> None:
    """Add the batched product a b [P, n, d] times a factor to the total, which is nothing yet if it `is_first`."""
    if total.dtype == a.dtype and (total.is_contiguous() or total.shape[1] >= LARGE):
        total.baddbmm_(a, b, beta=0 if is_first else 1, alpha=factor)
        return
    product = torch.bmm(a, b, out=scratch("product", a.dtype, *total.shape))
    if is_first:
        total.copy_(product).mul_(factor)  # not in the format of the product
    else:
        total.add_(product, alpha=factor)

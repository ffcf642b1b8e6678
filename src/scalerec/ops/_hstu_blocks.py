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

    def __init__(self, group: Group, first: int, begin: int, end: int, head: slice, bias: Bias):
        self.group, self.begin, self.end, self.bias = group, begin, end, bias
        self.first = first + begin * group.queries.read.shape[1]  # row of the first query among those of all groups
        self.head, self.heads = head, head.stop - head.start
        self.cost = sum(
            max(0, min(tile.sequences, end) - begin) * (tile.end - tile.first) * (tile.right - tile.left) * self.heads
            for tile in group.tiles
        )

    def pack(self, name: str, x: Tensor, places: Places, clean: bool = False) -> Tensor:
        """[T, H, d] -> [P, n, d]; what is padded is zero if `clean`, of the same sequence if not."""
        x = x[:, self.head]
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
        if sequences == 1 and rows.dtype == torch.float32:  # MKL does not mind the strides, AMX does
            return rows.unflatten(1, (heads, width)).transpose(0, 1)
        packed = scratch(f"{name} by head", x.dtype, sequences, heads, longest, width)
        packed.copy_(rows.unflatten(0, (sequences, longest)).unflatten(2, (heads, width)).transpose(1, 2))
        return packed.flatten(0, 1)

    def pack_all(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Padded keys of candidates come before real ones and must not count; others come after all that see them."""
        keys, clean = self.group.keys, not self.group.causal
        return self.pack("q", q, self.group.queries), self.pack("k", k, keys, clean), self.pack("v", v, keys, clean)

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
        first, stride = (tile.first, 1) if self.group.causal else (self.group.keys.read.shape[1], 0)
        per = count if end - self.begin == 1 else self.heads
        return Pairs(per, first, stride, tile.left, self.bias.position, self.bias.time, self.buckets)


class Totals:
    """What groups find for each token, brought to [T, H, d]: written in place where tokens follow one another."""

    def __init__(self, name: str, like: Tensor, row_of: Tensor, groups: list[Places]):
        self.name, self.row_of = f"sums of {name}", row_of
        padded = sum(places.read.numel() for places in groups)
        self.in_place = padded == len(like) and all(places.start is not None for places in groups)
        if self.in_place:
            self.rows = torch.empty(like.shape, dtype=like.dtype)
            return
        self.rows = scratch(name, like.dtype, padded + 1, *like.shape[1:])
        self.rows[padded] = 0  # of tokens in no group
        self.more: list[tuple[int, slice, Tensor, Tensor]] = []

    def sums(self, part: Work, places: Places, again: bool = False) -> Tensor:
        """Zeros [P, n, d] to which tiles are added: the rows themselves where they are laid out like this."""
        sequences, longest = places.read[part.begin : part.end].shape
        _, heads, width = self.rows.shape
        if heads == 1 and not again and self.rows.dtype == part.bias.sums:
            return self._rows(part, places).view(sequences, longest, width).zero_()
        return scratch(self.name, part.bias.sums, sequences * part.heads, longest, width).zero_()

    def put(self, found: Tensor, part: Work, places: Places, again: bool = False) -> None:
        """What the sums have become; `again` where tokens have a row already."""
        by_token = found.unflatten(0, (-1, part.heads)).transpose(1, 2)  # [G, n, H, d]
        if again:
            real = places.real
            kept = by_token.clone() if real is None else by_token * real[part.begin : part.end, :, None, None]
            index = places.read[part.begin : part.end].flatten()
            self.more.append((part.first, part.head, index, kept.flatten(0, 1).to(self.rows.dtype)))
        elif found.data_ptr() != (rows := self._rows(part, places)).data_ptr():
            rows.unflatten(0, by_token.shape[:2]).copy_(by_token)

    def _rows(self, part: Work, places: Places) -> Tensor:
        longest = places.read.shape[1]
        first = (places.start or 0) + part.begin * longest if self.in_place else part.first
        return self.rows[first : first + (part.end - part.begin) * longest, part.head]

    def gather(self) -> Tensor:
        if self.in_place:
            return self.rows
        total = self.rows.flatten(1).index_select(0, self.row_of).view(-1, *self.rows.shape[1:])
        for _, head, index, rows in sorted(self.more, key=lambda more: (more[0], more[1].start)):  # threads mix them
            total[:, head].index_add_(0, index, rows)
        return total


def _parts(plan: AttentionPlan, heads: int, bias: Bias) -> list[Work]:
    """The groups of a plan in parts of a BLOCK, and in smaller ones where there are too few for all threads."""
    threads, parts, first = torch.get_num_threads(), [], 0
    block = BLOCK if threads == 1 else min(BLOCK, heads * sum(group.pairs for group in plan.groups) // (2 * threads))
    for group in plan.groups:
        largest = max((tile.end - tile.first) * (tile.right - tile.left) for tile in group.tiles)
        sequences = len(group.queries.read)
        edges = cut(0, sequences, max(1, block // (largest * heads)))
        turns = min(heads, max(1, threads // max(1, len(plan.offsets) - 1)))
        by_head = [slice(a, b) for a, b in cut(0, heads, -(-heads // turns))]
        parts += [Work(group, first, begin, end, head, bias) for begin, end in edges for head in by_head]
        first += group.queries.read.numel()
    return parts


def run(plan: AttentionPlan, heads: int, bias: Bias, task: Callable[[Work], None]) -> list[Bias]:
    """Do all parts of a plan, on as many threads as torch has, and return the biases of the threads with their sums.

    A thread does whole parts by itself: threads that meet in every operation wait for each other on a busy machine.
    Which thread does which part is fixed, and so is every sum.
    """
    parts = sorted(_parts(plan, heads, bias), key=lambda part: -part.cost)
    threads = max(1, min(torch.get_num_threads(), len(parts)))
    lists: list[list[Work]] = [[] for _ in range(threads)]
    loads = [0] * threads
    for part in parts:
        least = loads.index(min(loads))
        lists[least].append(part)
        loads[least] += part.cost
    biases = [bias.of_thread() for _ in range(threads)]
    inference = torch.is_inference_mode_enabled()  # of this thread, and the others must write to its memory

    def do(thread: int) -> None:
        with torch.inference_mode(inference), torch.no_grad(), torch.autocast("cpu", enabled=False):
            for part in lists[thread]:
                part.bias = biases[thread]
                task(part)

    in_threads(do, threads)
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
        out = Totals("outs", v, plan.row_of_query, [group.queries for group in plan.groups])

        def task(part: Work) -> None:
            qs, ks, vs = part.pack_all(q, k, v)
            outs = out.sums(part, part.group.queries)
            for step in part.tiles():
                _, p, i, j, *_ = step
                x = part.scores(qs[p, i], ks[p, j], alpha)
                part.weigh(step, x)
                _add(outs[p, i], x, vs[p, j], scale)
            out.put(outs, part, part.group.queries)

        run(plan, q.shape[1], bias, task)
        return out.gather()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, position, time, query_times, key_times = ctx.saved_tensors
        times = Times(query_times, key_times, *ctx.times) if ctx.times else None
        bias = Bias(position, time, times, q.dtype)
        dq = Totals("dqs", q, ctx.plan.row_of_query, [group.queries for group in ctx.plan.groups])
        causal = [group.keys for group in ctx.plan.groups if group.causal]
        dk, dv = (Totals(name, x, ctx.plan.row_of_key, causal) for name, x in (("dks", k), ("dvs", v)))

        def task(part: Work) -> None:
            queries, keys, again = part.group.queries, part.group.keys, not part.group.causal
            qs, ks, vs = part.pack_all(q, k, v)
            gs = part.pack("g", gradient, queries, clean=True)
            dqs, dks, dvs = dq.sums(part, queries), dk.sums(part, keys, again), dv.sums(part, keys, again)
            for step in part.tiles():
                _, p, i, j, *_ = step
                x = part.scores(qs[p, i], ks[p, j], ctx.alpha)
                dx = scratch("dx", x.dtype, *x.shape)
                torch.baddbmm(dx, gs[p, i], vs[p, j].mT, beta=0, alpha=ctx.scale, out=dx)
                part.slopes(step, x, dx)
                _add(dvs[p, j], x.mT, gs[p, i], ctx.scale)
                _add(dks[p, j], dx.mT, qs[p, i], ctx.alpha)
                _add(dqs[p, i], dx, ks[p, j], ctx.alpha)
            dq.put(dqs, part, queries)
            dk.put(dks, part, keys, again)
            dv.put(dvs, part, keys, again)

        biases = run(ctx.plan, q.shape[1], bias, task)
        return dq.gather(), dk.gather(), dv.gather(), *bias.gradients(biases), None, None, None, None


def _add(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add the batched product a b [P, n, d] times a factor."""
    if total.dtype == a.dtype and (total.is_contiguous() or total.shape[1] >= LARGE):
        total.baddbmm_(a, b, alpha=factor)
    else:
        total.add_(torch.bmm(a, b, out=scratch("product", a.dtype, *total.shape)), alpha=factor)

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

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from scalerec.ops._hstu_plan import AttentionPlan, Group, Places, Tile, Times, cut, tile_buckets
from scalerec.ops._threads import in_threads, scratch

BLOCK = 1 << 18  # scores at once: few enough for the second cache, and worth the call
NEVER = -1e30  # a score whose SiLU and its slope are zero
LANES = 4  # copies of the time table that gradients are added to in turns: the same entry twice in a row waits


class Bias:
    """The bias of a tile, and the sums of its gradient."""

    def __init__(
        self, position: Tensor | None, time: Tensor | None, times: Times | None, plan: AttentionPlan, q: Tensor
    ):
        self.times, self.heads = times, q.shape[1]
        self.sums = torch.promote_types(q.dtype, torch.float32)
        self.index = torch.empty(0, dtype=torch.int32)
        self.position, self.time = position, time
        self.by_gap = self.d_places = self.d_time = torch.empty(0)
        tiles = [tile for group in plan.groups for tile in group.tiles]
        if position is not None:
            # a row is the table from the gap of its first key on; the next row begins one earlier
            self.rows = max((tile.end - tile.first for tile in tiles), default=1)
            self.keys = max((tile.right for tile in tiles), default=1)
            gaps = torch.arange(1 - self.rows - self.keys, self.rows)
            self.entries = (gaps + position.numel() // 2).clamp_(0, position.numel() - 1)
            table = position.detach().to(q.dtype)[self.entries].masked_fill_(gaps > 0, NEVER)
            self.places = scratch("places", q.dtype, self.rows, self.rows + self.keys)
            from_last = torch.arange(self.rows).flip(0)
            torch.index_select(table.as_strided(self.places.shape, (1, 1)), 0, from_last, out=self.places)
        if time is not None:
            self.buckets = time.detach().to(q.dtype).contiguous()
            widest = max((tile.right - tile.left for tile in tiles), default=0)
            self.lane = torch.arange(widest, dtype=torch.int32) % LANES * time.numel()

    def of_thread(self, number: int) -> Bias:
        """The same tables with sums of its own."""
        own = copy.copy(self)
        if self.position is not None:
            # laid out askew, so that equal gaps lie below each other
            own.by_gap = scratch(f"gaps {number}", self.sums, self.rows, len(self.entries)).zero_()
            steps = (len(self.entries) - 1, 1)
            own.d_places = own.by_gap.as_strided(self.places.shape, steps, self.rows - 1)
        if self.time is not None:
            own.d_time = torch.zeros(self.time.numel(), dtype=torch.float64)
        return own

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
                tile_buckets(group, group.tiles[number], begin, begin + len(out), self.times, self.index)
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
            summed = gradient[0] if len(gradient) == 1 else gradient.sum(0)
            places = self.d_places[self._where(group, group.tiles[number])]
            places += summed if group.causal else summed.sum(0)

    def gradients(self, of_threads: list[Bias]) -> tuple[Tensor | None, Tensor | None]:
        """Of position and time."""
        d_position = d_time = None
        if self.position is not None:
            d_position = torch.zeros(self.position.numel(), dtype=self.sums)
            for own in of_threads:
                d_position.index_add_(0, self.entries, own.by_gap.sum(0))
            d_position = d_position.to(self.position.dtype)
        if self.time is not None:
            d_time = torch.stack([own.d_time for own in of_threads]).sum(0).to(self.time.dtype)
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
            heads = dx.unflatten(0, (len(total), -1)).unbind(1)
            for number, one in enumerate(heads):
                total.copy_(one) if step.is_first and not number else total.add_(one)
        if step.is_last:
            self.bias.add_gradient(total, self.group, step.tile)

    def cut(self, step: Step, x: Tensor) -> None:
        """Zero above the diagonal, where the bias of positions has not seen to it."""
        tile = self.group.tiles[step.tile]
        if self.group.causal and tile.right > tile.first and self.bias.position is None:
            x[:, :, max(tile.first - tile.left, 0) :].tril_(min(tile.first - tile.left, 0))


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
    """The groups of a plan in parts that fit the second cache, and in more where there are too few for all threads."""
    threads, parts, first = torch.get_num_threads(), [], 0
    for group in plan.groups:
        largest = max((tile.end - tile.first) * (tile.right - tile.left) for tile in group.tiles)
        sequences = len(group.queries.read)
        edges = cut(0, sequences, max(1, BLOCK // (largest * heads)))
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
    biases = [bias.of_thread(number) for number in range(threads)]
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
        bias = Bias(position, time, times, plan, q)
        out = Totals("outs", v, plan.row_of_query, [group.queries for group in plan.groups])

        def task(part: Work) -> None:
            qs, ks, vs = part.pack_all(q, k, v)
            outs = out.sums(part, part.group.queries)
            for step in part.tiles():
                _, p, i, j, *_ = step
                x = part.scores(step, qs[p, i], ks[p, j], alpha)
                torch.nn.functional.silu(x, inplace=True)
                part.cut(step, x)
                _add(outs[p, i], x, vs[p, j], scale)
            out.put(outs, part, part.group.queries)

        run(plan, q.shape[1], bias, task)
        return out.gather()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        q, k, v, position, time, query_times, key_times = ctx.saved_tensors
        times = Times(query_times, key_times, *ctx.times) if ctx.times else None
        bias = Bias(position, time, times, ctx.plan, q)
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
                x = part.scores(step, qs[p, i], ks[p, j], ctx.alpha)
                dx = scratch("dx", x.dtype, *x.shape)
                torch.baddbmm(dx, gs[p, i], vs[p, j].mT, beta=0, alpha=ctx.scale, out=dx)
                torch.ops.aten.silu_backward.grad_input(dx, x, grad_input=dx)
                torch.nn.functional.silu(x, inplace=True)
                part.cut(step, x)
                part.cut(step, dx)
                _add(dvs[p, j], x.mT, gs[p, i], ctx.scale)
                _add(dks[p, j], dx.mT, qs[p, i], ctx.alpha)
                _add(dqs[p, i], dx, ks[p, j], ctx.alpha)
                part.add_gradient(step, dx)
            dq.put(dqs, part, queries)
            dk.put(dks, part, keys, again)
            dv.put(dvs, part, keys, again)

        biases = run(ctx.plan, q.shape[1], bias, task)
        return dq.gather(), dk.gather(), dv.gather(), *bias.gradients(biases), None, None, None, None


def _add(total: Tensor, a: Tensor, b: Tensor, factor: float) -> None:
    """Add the batched product a b [P, n, d] times a factor."""
    if total.is_contiguous() and total.dtype == a.dtype:
        total.baddbmm_(a, b, alpha=factor)
    else:  # MKL writes batches to contiguous memory only
        total.add_(torch.bmm(a, b, out=scratch("product", a.dtype, *total.shape)), alpha=factor)

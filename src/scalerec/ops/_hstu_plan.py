"""Which blocks of a batch of jagged sequences are worked out together, and the time buckets of their pairs.

A group holds sequences of similar length, longest first, padded to the longest. It is worked through in tiles, of
which there are none above the diagonal; a tile holds only the sequences that reach it. Candidates are rows of groups
of their own, whose keys are histories that end together.

T tokens   S sequences   G sequences of a group   a rows, b keys of a group   R rows, C keys of a tile
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from scalerec.ops._threads import scratch

TIME_LOG_BASE = 0.301  # log10(2), but of natural logarithms: a quirk of the published code, kept for comparability
STRIPS = 4  # of a short sequence, at most
OVERHEAD = 50_000  # pairs that could be worked out in the time that another group costs


class Sizes(NamedTuple):
    """Of tiles: what half a square on the diagonal wastes against what small products lose."""

    coarse: int  # rows and keys of a tile
    fine: int  # rows of a strip on the diagonal, at most
    least: int  # rows of a strip, unless the sequence has fewer


SIZES, SIZES_OF_BF16 = Sizes(512, 128, 48), Sizes(1024, 512, 512)  # AMX has no use for small products


class Tile(NamedTuple):
    """Rows [first, end) and keys [left, right) of the first `sequences` sequences of a group."""

    first: int
    end: int
    left: int
    right: int
    sequences: int

    @property
    def pairs(self) -> int:
        """Of rows and keys, in one sequence."""
        return (self.end - self.first) * (self.right - self.left)


class Places(NamedTuple):
    """Where the tokens of G sequences lie, those of one behind each other, and where they are put: [G, n] rows."""

    first: Tensor  # [G] first token
    length: Tensor  # [G]
    before: Tensor  # [G] rows that are padded in front of them; behind them are the others
    longest: int  # n
    start: int | None  # first token, if all G n follow one another and none is padded

    def span(self, begin: int, end: int) -> slice | None:
        """The tokens of some sequences, if they lie as they are put."""
        return None if self.start is None else slice(*(self.start + g * self.longest for g in (begin, end)))

    def tokens(self, begin: int, end: int, rows: slice) -> Tensor:
        """[end - begin, R] of some sequences and rows; where padded, of another one of the same sequence."""
        place = torch.arange(rows.start, rows.stop) - self.before[begin:end, None]
        last = self.length[begin:end, None] - 1
        return self.first[begin:end, None] + torch.minimum(place.clamp(min=0), last)


@dataclass(frozen=True)
class Group:
    """Sequences worked out together; causal: row i sees keys 0..i, otherwise all keys, and stands one behind them."""

    queries: Places  # [G, a]
    keys: Places  # [G, b]
    causal: bool
    tiles: tuple[Tile, ...]
    buckets: tuple[Tensor, ...] | None = None  # of every tile [sequences, R, C], uint8 or int16

    def pairs(self, begin: int, end: int) -> int:
        """Of rows and keys, in all tiles of some sequences."""
        return sum(max(0, min(tile.sequences, end) - begin) * tile.pairs for tile in self.tiles)


@dataclass(frozen=True)
class AttentionPlan:
    """The groups of one batch, good for all layers of a model; made by `attention_plan`."""

    groups: tuple[Group, ...]
    offsets: Tensor  # [S + 1]
    targets: Tensor | None  # [S], None if there are none
    own_buckets: Tensor | None = None  # [T] bucket of a token towards itself
    bucket_count: int = 0


class Times(NamedTuple):
    """What buckets are made of, and the number of them and the base of their logarithm."""

    query: Tensor  # [T] seconds, float64
    key: Tensor
    count: int
    log_base: float


def bucket(delta: Tensor, count: int, log_base: float = TIME_LOG_BASE) -> Tensor:
    """Seconds between two events -> floor(ln(max(|delta|, 1)) / log_base) in [0, count), int64 of the same shape.

    In float32 like the published code, and on contiguous memory, so that the same gap is always in the same bucket.
    """
    place = delta.float().contiguous().abs_() if delta.dtype != torch.float32 else delta.abs().contiguous()
    return _to_places(place, count, log_base).long()


def _to_places(gap: Tensor, count: int, log_base: float) -> Tensor:
    """In place, to what lies between the number of the bucket and the next."""
    return gap.clamp_(min=1).log_().div_(log_base).clamp_(max=count - 1)


def tile_buckets(group: Group, tile: Tile, begin: int, end: int, times: Times, out: Tensor) -> Tensor:
    """Into out [end - begin, R, C], of the sequences [begin, end); of padded tokens anything."""
    query = times.query[group.queries.tokens(begin, end, slice(tile.first, tile.end))]
    key = times.key[group.keys.tokens(begin, end, slice(tile.left, tile.right))]
    gap = scratch("gap", torch.float32, *out.shape)
    torch.sub(query[:, :, None], key[:, None, :], out=gap)  # exact in float64, then rounded
    return out.copy_(_to_places(gap.abs_(), times.count, times.log_base))


def make_plan(offsets: Tensor, targets: Tensor | None, dtype: torch.dtype) -> AttentionPlan:
    """Offsets [S + 1], targets [S] and the format of q -> groups without buckets."""
    sizes = SIZES_OF_BF16 if dtype == torch.bfloat16 else SIZES
    edges = offsets.tolist()
    last = [0] * (len(edges) - 1) if targets is None else targets.tolist()
    spans = [(b - a - m, m, a) for (a, b), m in zip(pairwise(edges), last)]  # history, candidates, first token
    groups = [_causal(part, sizes) for part in _similar([(n, n, a) for n, _, a in spans if n])]
    groups += [_rectangle(part, sizes.coarse) for part in _similar([(n, m, a) for n, m, a in spans if n and m])]
    return AttentionPlan(tuple(groups), offsets, targets if any(last) else None)


def with_buckets(plan: AttentionPlan, times: Times) -> AttentionPlan:
    """The plan with the buckets of all its pairs, a byte each."""
    groups = []
    for group in plan.groups:
        buckets = tuple(_stored(group, tile, times) for tile in group.tiles)
        groups.append(replace(group, buckets=buckets))
    own = bucket(times.query - times.key, times.count, times.log_base)
    return replace(plan, groups=tuple(groups), own_buckets=own, bucket_count=times.count)


def _stored(group: Group, tile: Tile, times: Times) -> Tensor:
    shape = (tile.sequences, tile.end - tile.first, tile.right - tile.left)
    out = torch.empty(shape, dtype=bucket_type(times.count))
    return tile_buckets(group, tile, 0, tile.sequences, times, out)


def bucket_type(count: int) -> torch.dtype:
    """The smallest that holds numbers below `count`."""
    return torch.uint8 if count <= 256 else torch.int16


def _similar(spans: list[tuple[int, int, int]]) -> list[list[tuple[int, int, int]]]:
    """(keys, rows, first token) of sequences, cut where padding would cost more than another group."""
    groups: list[list[tuple[int, int, int]]] = []
    waste, keys, rows = 0, 0, 0
    for span in sorted(spans, key=lambda span: (-span[0], -span[1], span[2])):
        waste += keys * rows - span[0] * span[1]
        if not groups or waste > OVERHEAD or span[1] > rows:
            groups.append([])
            waste, keys, rows = 0, span[0], span[1]
        groups[-1].append(span)
    return groups


def cut(first: int, end: int, height: int) -> list[tuple[int, int]]:
    """[first, end) in parts of equal height, at most `height` each."""
    parts = max(1, -(-(end - first) // height))
    edges = [first + (end - first) * i // parts for i in range(parts + 1)]
    return list(pairwise(edges))


def _causal(spans: list[tuple[int, int, int]], sizes: Sizes) -> Group:
    lengths = [n for n, _, _ in spans]
    places = _places([a for _, _, a in spans], lengths)
    strips = max(1, min(STRIPS, lengths[0] // sizes.least))
    fine = min(sizes.fine, -(-lengths[0] // strips))
    tiles = []
    for first, end in cut(0, lengths[0], sizes.coarse):
        for left, right in cut(0, first, sizes.coarse) if first else []:
            tiles.append(Tile(first, end, left, right, sum(n > first for n in lengths)))
        for upper, lower in cut(first, end, fine):
            tiles.append(Tile(upper, lower, first, lower, sum(n > upper for n in lengths)))
    return Group(places, places, True, tuple(tiles))


def _rectangle(spans: list[tuple[int, int, int]], coarse: int) -> Group:
    rows, keys = max(m for _, m, _ in spans), spans[0][0]
    queries = _places([a + n for n, _, a in spans], [m for _, m, _ in spans])
    history = _places([a for _, _, a in spans], [n for n, _, _ in spans], at_end=True)
    tiles = [Tile(*i, *j, len(spans)) for i in cut(0, rows, coarse) for j in cut(0, keys, coarse)]
    return Group(queries, history, False, tuple(tiles))


def _places(first: list[int], lengths: list[int], at_end: bool = False) -> Places:
    """First tokens and lengths of G sequences, padded behind, or in front so that they end together."""
    longest, length = max(lengths), torch.tensor(lengths)
    follow = min(lengths) == longest and all(b - a == longest for a, b in pairwise(first))
    before = longest - length if at_end else torch.zeros_like(length)
    return Places(torch.tensor(first), length, before, longest, first[0] if follow else None)

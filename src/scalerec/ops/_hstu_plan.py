"""Which blocks of a batch of jagged sequences are worked out together, and the time buckets of their pairs.

A group holds sequences of similar length, longest first, padded to the longest. It is worked through in tiles, of
which there are none above the diagonal; a tile holds only the sequences that reach it. Candidates are rows of groups
of their own, whose keys are histories that end together.

T tokens   S sequences   G sequences of a group   a rows, b keys of a group   R rows, C keys of a tile
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

TIME_LOG_BASE = 0.301  # log10(2), but of natural logarithms: a quirk of the published code, kept for comparability
NEAR = 1e-4  # of a bucket: this close to an edge float32 may err
COARSE = 512  # rows and keys of a tile: few steps, and what one of them needs is about as large as the second cache
FINE = 128  # rows of a tile on the diagonal, half of whose last square is in vain
STRIPS = 4  # of a short sequence
OVERHEAD = 30_000  # pairs that could be worked out in the time that another group costs


class Tile(NamedTuple):
    """Rows [first, end) and keys [left, right) of the first `sequences` sequences of a group."""

    first: int
    end: int
    left: int
    right: int
    sequences: int


class Places(NamedTuple):
    """Where the tokens of a group lie, and where padding goes."""

    read: Tensor  # [G, n] number of a token; where padded, of another one of the same sequence
    write: Tensor  # [G, n] number of a token; T where padded
    real: Tensor | None  # [G, n] whether not padded; None without padding
    start: int | None  # first token, if all G n follow one another


@dataclass(frozen=True)
class Group:
    """Sequences worked out together; causal: row i sees keys 0..i, otherwise all keys, and stands one behind them."""

    queries: Places  # [G, a]
    keys: Places  # [G, b]
    causal: bool
    tiles: tuple[Tile, ...]
    buckets: tuple[Tensor, ...] | None = None  # of every tile [sequences, R, C], uint8 or int16


@dataclass(frozen=True)
class AttentionPlan:
    """The groups of one batch, good for all layers of a model; made by `attention_plan`."""

    groups: tuple[Group, ...]
    tokens: int
    sequences: int
    targets: Tensor | None
    own_buckets: Tensor | None = None  # [T] bucket of a token towards itself
    bucket_count: int = 0


class Times(NamedTuple):
    """What buckets are made of: times [T] in seconds, the number of buckets and the base of their logarithm."""

    query: Tensor
    key: Tensor
    count: int
    log_base: float

    @property
    def dtype(self) -> torch.dtype:
        return torch.uint8 if self.count <= 256 else torch.int16


def bucket(delta: Tensor, count: int, log_base: float = TIME_LOG_BASE) -> Tensor:
    """Seconds between two events -> floor(ln(max(|delta|, 1)) / log_base) in [0, count), int64 of the same shape."""
    seconds = delta.abs().clamp(min=1).double()
    return (seconds.log() / log_base).floor().clamp(0, count - 1).long()


def quick_bucket(delta: Tensor, times: Times) -> Tensor:
    """As `bucket`, in float32 except where that might fall on the other side of an edge."""
    place = delta.abs().float().clamp_(min=1).log_().mul_(1 / times.log_base)
    floor = place.floor()
    near = (place.sub_(floor).sub_(0.5).abs_() > 0.5 - NEAR) & (floor > 0)  # delta <= 1 is bucket 0 without doubt
    found = floor.clamp_(max=times.count - 1).to(times.dtype)
    where = near.nonzero(as_tuple=True)
    return found.index_put_(where, bucket(delta[where], times.count, times.log_base).to(times.dtype))


def tile_buckets(group: Group, tile: Tile, begin: int, end: int, times: Times) -> Tensor:
    """[end - begin, R, C] of the sequences [begin, end); of padded tokens anything."""
    query = times.query[group.queries.read[begin:end, tile.first : tile.end]]
    key = times.key[group.keys.read[begin:end, tile.left : tile.right]]
    return quick_bucket(query[:, :, None] - key[:, None, :], times)


def make_plan(offsets: Tensor, targets: Tensor | None) -> AttentionPlan:
    """Offsets [S + 1] and targets [S] -> groups without buckets."""
    edges = offsets.tolist()
    last = [0] * (len(edges) - 1) if targets is None else targets.tolist()
    spans = [(b - a - m, m, a) for (a, b), m in zip(pairwise(edges), last)]  # history, candidates, first token
    groups = [_causal(part, edges[-1]) for part in _similar([(n, n, a) for n, _, a in spans if n])]
    groups += [_rectangle(part, edges[-1]) for part in _similar([(n, m, a) for n, m, a in spans if n and m])]
    return AttentionPlan(tuple(groups), edges[-1], len(spans), targets if targets is not None and any(last) else None)


def with_buckets(plan: AttentionPlan, times: Times) -> AttentionPlan:
    """The plan with the buckets of all its pairs, a byte each."""
    groups = []
    for group in plan.groups:
        buckets = tuple(tile_buckets(group, tile, 0, tile.sequences, times) for tile in group.tiles)
        groups.append(Group(group.queries, group.keys, group.causal, group.tiles, buckets))
    own = bucket(times.query - times.key, times.count, times.log_base)
    return AttentionPlan(tuple(groups), plan.tokens, plan.sequences, plan.targets, own, times.count)


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


def _cut(first: int, end: int, height: int) -> list[tuple[int, int]]:
    """[first, end) in parts of equal height, at most `height` each."""
    parts = max(1, -(-(end - first) // height))
    edges = [first + (end - first) * i // parts for i in range(parts + 1)]
    return list(pairwise(edges))


def _causal(spans: list[tuple[int, int, int]], tokens: int) -> Group:
    lengths = [n for n, _, _ in spans]
    places = _places([a for _, _, a in spans], lengths, tokens)
    fine = FINE if lengths[0] > 2 * FINE else max(16, -(-lengths[0] // STRIPS))
    tiles = []
    for first, end in _cut(0, lengths[0], COARSE):
        for left, right in _cut(0, first, COARSE) if first else []:
            tiles.append(Tile(first, end, left, right, sum(n > first for n in lengths)))
        for upper, lower in _cut(first, end, fine):
            tiles.append(Tile(upper, lower, first, lower, sum(n > upper for n in lengths)))
    return Group(places, places, True, tuple(tiles))


def _rectangle(spans: list[tuple[int, int, int]], tokens: int) -> Group:
    rows, keys = max(m for _, m, _ in spans), spans[0][0]
    queries = _places([a + n for n, _, a in spans], [m for _, m, _ in spans], tokens)
    history = _places([a for _, _, a in spans], [n for n, _, _ in spans], tokens, at_end=True)
    tiles = [Tile(*i, *j, len(spans)) for i in _cut(0, rows, COARSE) for j in _cut(0, keys, COARSE)]
    return Group(queries, history, False, tuple(tiles))


def _places(first: list[int], lengths: list[int], tokens: int, at_end: bool = False) -> Places:
    """First tokens and lengths of G sequences, padded behind, or in front so that they end together."""
    longest = max(lengths)
    place = torch.arange(longest).expand(len(first), longest)
    length, start = torch.tensor(lengths)[:, None], torch.tensor(first)[:, None]
    if at_end:
        place = place - (longest - length)
    read = start + torch.minimum(place.clamp(min=0), length - 1)
    if min(lengths) == longest:
        follow = all(b - a == longest for a, b in pairwise(first))
        return Places(read, read, None, first[0] if follow else None)
    real = (place >= 0) & (place < length)
    return Places(read, read.masked_fill(~real, tokens), real, None)

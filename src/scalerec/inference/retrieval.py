"""The nearest items to a user's vector, or the popular ones, without those that a request filters out.

n queries   V items of the catalogue, most popular first   D width   k results
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from scalerec.batch import FIRST_ID
from scalerec.errors import InputError
from scalerec.inference.rows_of import POPULARITY, POPULARITY_BESIDE

if TYPE_CHECKING:
    from scalerec.inference.bundle import Bundle

PIECE = 2**21  # scores in memory at a time
TOGETHER = 64  # queries searched at a time
RECALL = 0.99  # which an approximate index is set to reach on a sample
SAMPLE, MEASURED = 256, 100  # queries of that sample, and the first so many of each
Ids = Collection[Any]


class Found(list[tuple[Any, float]]):
    """Items with what they are sorted by, best first.

    `removed` says how many items of the catalogue each filter took out ("seen", "deny", "allow": all not allowed),
    an item counted by the first that did; `unknown` how many ids of the filters are not in the catalogue.
    """

    def __init__(self, items: Sequence[tuple[Any, float]], removed: dict[str, int], unknown: int):
        super().__init__(items)
        self.removed, self.unknown = removed, unknown


@dataclass(frozen=True)
class Filters:
    """Which places a search of n queries may find."""

    common: np.ndarray  # [V] bool, left by the filters of all queries
    own: list[np.ndarray]  # n times places to leave out, ascending
    allowed: np.ndarray | None = None  # the places to look at, where only some are allowed

    def of(self, query: int) -> Filters:
        """Those of one query."""
        return Filters(self.common, self.own[query : query + 1], self.allowed)

    @staticmethod
    def none(total: int, queries: int) -> Filters:
        return Filters(np.ones(total, bool), [np.zeros(0, np.int64)] * queries)


class Popular:
    """The items by how often they were shown in training: what users get of whom nothing is known."""

    def __init__(self, items: pa.Table, key: str):
        """`items` is a bundle's item table, most popular first, with the ids in column `key` and counts."""
        self.ids: list[Any] = items[key].to_pylist()
        name = POPULARITY_BESIDE if POPULARITY_BESIDE in items.column_names else POPULARITY
        self.counts = items[name].to_numpy().astype(np.float64)
        self._place = {value: place for place, value in enumerate(self.ids)}

    def __len__(self) -> int:
        return len(self.ids)

    def search(self, count: int, *, exclude: Ids = (), allow: Ids | None = None, deny: Ids = ()) -> Found:
        """The `count` most popular items (id, rows of training) that no filter takes out, or as many as there are."""
        filters, (said,) = self.filters([exclude], allow, deny)
        left = filters.common.copy()
        left[filters.own[0]] = False
        best = np.flatnonzero(left)[: max(count, 0)]
        return Found([(self.ids[place], float(self.counts[place])) for place in best.tolist()], *said)

    def filters(
        self, exclude: Sequence[Ids], allow: Ids | None, deny: Ids
    ) -> tuple[Filters, list[tuple[dict[str, int], int]]]:
        """Filters by place, and for each query what they take out of the catalogue and how many ids are unknown."""
        own = [self._places(ids, "exclude") for ids in exclude]
        denied, unknown = self._places(deny, "deny")
        common, allowed = np.ones(len(self), bool), None
        if allow is not None:
            allowed, not_there = self._places(allow, "allow")
            unknown += not_there
            common[:] = False
            common[allowed] = True
        said = []
        for places, unknown_of_own in own:
            removed = {"seen": len(places), "deny": len(np.setdiff1d(denied, places, assume_unique=True))}
            if allow is not None:
                others = ~common
                others[places] = others[denied] = False
                removed["allow"] = int(others.sum())
            said.append((removed, unknown + unknown_of_own))
        common[denied] = False
        return Filters(common, [places for places, _ in own], allowed), said

    def _places(self, ids: Ids, where: str) -> tuple[np.ndarray, int]:
        """Places of ids, ascending and each once, and how many of the ids are unknown."""
        find = self._place.get
        try:
            found = np.fromiter((find(value, -1) for value in ids), np.int64, len(ids))
        except TypeError:
            raise InputError(f"{where}: holds a list or an object, item ids are numbers or text") from None
        return np.unique(found[found >= 0]), int((found < 0).sum())


class Index(Protocol):
    """Finds places by inner product."""

    def search(self, queries: Tensor, count: int, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
        """Places [n, k] and scores [n, k], best first; place -1 where there are no more."""
        ...


class Retriever:
    """The items nearest to users' vectors, by exact search or by faiss; may be used from several threads.

    The catalogue is the bundle's item table, without items that the model has no vector for.
    """

    def __init__(self, bundle: Bundle, index: Literal["exact", "faiss"] = "exact", *, popular: Popular | None = None):
        """`popular` of the same bundle spares a second dictionary of ids.

        Raises:
            InputError: the bundle does not retrieve, faiss is not installed, or vectors hold NaN.
        """
        if index not in ("exact", "faiss"):
            raise InputError(f"retrieval index {index!r}: choose exact or faiss")
        rows = _rows_of_items(bundle)
        assert bundle.vectors is not None and bundle.encoder.schema.item is not None
        self.catalogue = popular or Popular(bundle.items, bundle.encoder.schema.item)
        self.known = torch.from_numpy(rows >= FIRST_ID)  # [V]
        vectors = bundle.vectors.float()[torch.from_numpy(np.maximum(rows - FIRST_ID, 0))]
        if not vectors.isfinite().all():
            raise InputError(f"bundle {bundle.name!r}: item vectors hold NaN or infinity, the model diverged")
        self.exact = Exact(vectors, self.known)
        self.index: Index = Faiss(vectors, self.known, self.exact) if index == "faiss" else self.exact

    @property
    def dim(self) -> int:
        return self.exact.vectors.shape[1]

    def search(
        self, queries: Tensor, count: int, *, exclude: Sequence[Ids] = (), allow: Ids | None = None, deny: Ids = ()
    ) -> list[Found]:
        """For each query [n, D] the `count` nearest (item id, cosine), or as many as the filters leave.

        Args:
            exclude: ids for each query (what the user has seen); none at all leaves nothing out.
            allow: the only ids to find; None allows all.
            deny: ids never to find. Ids that are not in the catalogue are ignored, and counted.
        """
        queries = self._checked(queries)
        if exclude and len(exclude) != len(queries):
            raise InputError(f"{len(exclude)} lists of excluded items for {len(queries)} queries: one for each")
        filters, said = self.catalogue.filters(exclude or [()] * len(queries), allow, deny)
        places, scores = self.index.search(queries, min(max(count, 0), len(self.catalogue)), filters)
        ids = self.catalogue.ids
        return [
            Found([(ids[place], score) for place, score in zip(row[row >= 0].tolist(), its.tolist())], *of_row)
            for row, its, of_row in zip(places, scores, said)
        ]

    def recall(self, queries: Tensor, count: int = 100) -> float:
        """The share of the exact search's first `count` that the index finds, over all queries [n, D]."""
        queries = self._checked(queries)
        filters = Filters.none(len(self.catalogue), len(queries))
        count = min(count, len(self.catalogue))
        found, right = (index.search(queries, count, filters)[0] for index in (self.index, self.exact))
        return _share(found, right)

    def _checked(self, queries: Tensor) -> Tensor:
        if queries.dim() != 2 or queries.shape[1] != self.dim:
            raise InputError(f"queries {tuple(queries.shape)}: the items' vectors have width {self.dim}")
        queries = queries.detach().float()
        if not queries.isfinite().all():
            raise InputError("queries hold NaN or infinity: the model diverged")
        return F.normalize(queries, dim=-1, eps=1e-6)


class Exact:
    """Search by matrix products in blocks; items of equal score come in the order of the catalogue."""

    def __init__(self, vectors: Tensor, known: Tensor):
        self.vectors, self.known = vectors, known  # [V, D] and [V]

    @torch.inference_mode()
    def search(self, queries: Tensor, count: int, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
        parts = [
            self._search(queries[first : first + TOGETHER], count, filters, first)
            for first in range(0, len(queries), TOGETHER)
        ]
        parts = parts or [(np.zeros((0, count), np.int64), np.zeros((0, count), np.float32))]
        return np.concatenate([places for places, _ in parts]), np.concatenate([scores for _, scores in parts])

    def _search(self, queries: Tensor, count: int, filters: Filters, first: int) -> tuple[np.ndarray, np.ndarray]:
        n = len(queries)
        best = torch.full((n, count), _key(-torch.inf, -1), dtype=torch.int64)
        own = [torch.from_numpy(places) for places in filters.own[first : first + n]]
        for places, vectors, left in self._blocks(filters, max(PIECE // max(n, 1), 1)):
            scores = queries @ vectors.T + 0.0  # no -0
            scores.masked_fill_(~left, -torch.inf)
            for row, gone in enumerate(own):
                scores[row, _inside(places, gone)] = -torch.inf
            scores, at = scores.topk(_enough(scores, best), 1)
            best = torch.cat([best, _keys(scores, places[at])], 1).topk(count, 1).values
        scores, places = _from_keys(best)
        return places.masked_fill_(scores == -torch.inf, -1).numpy(), scores.numpy()

    def _blocks(self, filters: Filters, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Places [b] ascending, their vectors [b, D], and whether all queries' filters leave them [b]."""
        common = torch.from_numpy(filters.common) & self.known
        if filters.allowed is not None:
            for places in torch.from_numpy(filters.allowed).split(size):
                yield places, self.vectors[places], common[places]
            return
        for start in range(0, len(self.vectors), size):
            end = min(start + size, len(self.vectors))
            yield torch.arange(start, end), self.vectors[start:end], common[start:end]


# Score and place as one whole number: comparing keys is comparing scores, and of equal ones the smaller place is first.
_LOW = 2**32 - 1


def _keys(scores: Tensor, places: Tensor) -> Tensor:
    """[n, m] int64 of float32 scores and places [n, m]."""
    bits = scores.view(torch.int32)
    ordered = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)  # sorts as the float does
    return (ordered.long() << 32) | (_LOW - 1 - places)


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).int()
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return scores, _LOW - 1 - (keys & _LOW)


def _key(score: float, place: int) -> int:
    return int(_keys(torch.tensor([[score]], dtype=torch.float32), torch.tensor([[place]])))


def _enough(scores: Tensor, best: Tensor) -> int:
    """So many of the highest scores [n, b] of a block hold all that can be among the best [n, k], ties included."""
    count = best.shape[1]
    if not count:
        return 0
    floor = _from_keys(best[:, -1:])[0]
    if scores.shape[1] > count:
        floor = torch.maximum(floor, scores.topk(count, 1).values[:, -1:])
    floor = floor.clamp(min=torch.finfo(torch.float32).min)  # nothing that is filtered out
    return int(torch.ge(scores, floor, out=torch.empty_like(scores)).sum(1).max())


def _inside(places: Tensor, wanted: Tensor) -> Tensor:
    """Where in `places` the `wanted` ones are; both ascending, those that are elsewhere left out."""
    if not len(places) or not len(wanted):
        return wanted[:0]
    lo, hi = torch.searchsorted(wanted, places[[0, -1]] + torch.tensor([0, 1]))
    wanted = wanted[lo:hi]
    if places[-1] - places[0] == len(places) - 1:  # no gaps
        return wanted - places[0]
    at = torch.searchsorted(places, wanted)
    return at[places[at] == wanted]


class Faiss:
    """Approximate search: vectors in lists around centres, of which the nearest few are looked through.

    How many is measured when it is built: the fewest (a power of two) with a recall of RECALL on a sample of items.
    A search whose filters leave too few items in those lists is done exactly.
    """

    def __init__(self, vectors: Tensor, known: Tensor, exact: Exact):
        try:
            import faiss
        except ImportError:
            raise InputError("retrieval by faiss needs it: pip install -e '.[faiss]'") from None
        self.faiss, self.exact = faiss, exact
        faiss.omp_set_num_threads(torch.get_num_threads())
        places = known.nonzero()[:, 0].numpy()
        mine = vectors[torch.from_numpy(places)].contiguous().numpy()
        self.lists = max(min(int(4 * len(mine) ** 0.5), len(mine) // 39), 1)  # 39: faiss asks for so many a list
        quantizer = faiss.IndexFlatIP(vectors.shape[1])
        self.index = faiss.IndexIVFFlat(quantizer, vectors.shape[1], self.lists, faiss.METRIC_INNER_PRODUCT)
        self.index.train(mine)  # its k-means starts from a fixed seed
        self.index.add_with_ids(mine, places)
        self.probes = self._measured(vectors, known)

    def _measured(self, vectors: Tensor, known: Tensor) -> int:
        draw = torch.Generator().manual_seed(0)
        items = known.nonzero()[:, 0]
        sample = vectors[items[torch.randperm(len(items), generator=draw)[:SAMPLE]]]
        sample = F.normalize(sample + 0.5 * torch.randn(sample.shape, generator=draw) / sample.shape[1] ** 0.5, dim=-1)
        nothing = Filters.none(len(vectors), len(sample))
        right, _ = self.exact.search(sample, min(MEASURED, len(items)), nothing)
        probes = 1
        while probes < self.lists:
            found, _ = self._search(sample.numpy(), right.shape[1], nothing, right[0, :0], probes)
            if _share(found, right) >= RECALL:
                break
            probes = min(2 * probes, self.lists)
        return probes

    def search(self, queries: Tensor, count: int, filters: Filters) -> tuple[np.ndarray, np.ndarray]:
        if not count or not len(queries):
            return self.exact.search(queries, count, filters)
        asked = np.ascontiguousarray(queries.numpy())
        probes = min(max(self.probes, 2 * count * self.lists // self.index.ntotal), self.lists)
        if any(len(own) for own in filters.own):  # each with a filter of its own
            parts = [self._search(asked[i : i + 1], count, filters, own, probes) for i, own in enumerate(filters.own)]
            places, scores = (np.concatenate(part) for part in zip(*parts))
        else:
            places, scores = self._search(asked, count, filters, filters.own[0], probes)
        order = np.lexsort((places, -scores), axis=-1)
        places, scores = np.take_along_axis(places, order, 1), np.take_along_axis(scores, order, 1)
        for row in np.flatnonzero((places < 0).any(1)).tolist():
            found = self.exact.search(queries[row : row + 1], count, filters.of(row))
            places[row], scores[row] = found[0][0], found[1][0]
        return places, scores

    def _search(
        self, asked: np.ndarray, count: int, filters: Filters, own: np.ndarray, probes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        left, options = filters.common, {"nprobe": probes}
        if len(own) or not left.all():
            left = left.copy()
            left[own] = False
            options["sel"] = self.faiss.IDSelectorBitmap(np.packbits(left, bitorder="little"))
        scores, places = self.index.search(asked, count, params=self.faiss.SearchParametersIVF(**options))
        return places, scores


def _share(found: np.ndarray, right: np.ndarray) -> float:
    """The share of the places [n, k] that are found, those below 0 left out."""
    hits = sum(len(np.intersect1d(a, b[b >= 0])) for a, b in zip(found, right))
    return hits / max(int((right >= 0).sum()), 1)


def _rows_of_items(bundle: Bundle) -> np.ndarray:
    """[V] the id in the model's item table of each item."""
    model: Any = bundle.model
    if bundle.vectors is None or not model.retrieves:
        raise InputError(f"bundle {bundle.name!r} does not retrieve: it has no item vectors")
    items = bundle.items.combine_chunks().to_batches()
    rows = [bundle.encoder.encode_side(part, "item", [model.item_table.name], where="items") for part in items]
    return torch.cat([part.ids[:, 0] for part in rows]).numpy()

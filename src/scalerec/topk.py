"""How well a retriever finds the one right item among all: ranks, HR@K, NDCG@K, MRR, and how sure differences are.

n requests   V candidates   D width   S seeds (models that differ only in their seed, on the same requests)
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from scalerec.batch import Jagged
from scalerec.errors import InputError
from scalerec.intervals import Difference, owners

PIECE = 2**21  # scores in memory at a time
METRICS = (
    *(f"hr@{k}" for k in (1, 10, 50, 100, 200, 500)),
    *(f"ndcg@{k}" for k in (10, 50, 200)),
    "mrr",
)


def ranks(scores: Tensor, target: Tensor, excluded: Jagged) -> Tensor:
    """The target's place among the candidates, from 1 on: 1 + better ones + ties / 2, float64 [n].

    Args:
        scores: [n, V] of all candidates.
        target: [n] columns; one below 0 is no candidate, and its rank infinite.
        excluded: n lists of columns that are no candidates (what the user has had), in any order and number; the target
            stays in any case, and columns below 0 are ignored.
    """
    return _ranks(lambda rows: scores[rows], len(scores), scores.shape[1], target, excluded)


def product_ranks(queries: Tensor, catalogue: Tensor, target: Tensor, excluded: Jagged) -> Tensor:
    """`ranks` of the scores queries [n, D] @ catalogue [V, D], of which only a piece is in memory at a time."""
    return _ranks(lambda rows: queries[rows] @ catalogue.T, len(queries), len(catalogue), target, excluded)


@torch.no_grad()
def _ranks(score: Callable[[slice], Tensor], n: int, width: int, target: Tensor, excluded: Jagged) -> Tensor:
    if target.shape != (n,) or len(excluded) != n:
        raise InputError(
            f"{n} rows of scores, targets {tuple(target.shape)}, {len(excluded)} lists of excluded items: one of each "
            "per row is needed"
        )
    for name, columns in (("target", target), ("excluded", excluded.values)):
        if columns.numel() and int(columns.max()) >= width:
            raise InputError(f"{name} {int(columns.max())} is beyond the {width} candidates: number them from 0")
    found = torch.full((n,), float("inf"), dtype=torch.float64, device=target.device)
    size = max(PIECE // max(width, 1), 1)
    flags = torch.empty(min(size, n), width, device=target.device)
    for first in range(0, n, size):
        piece = torch.arange(first, min(first + size, n), device=target.device)
        scores, gone = score(slice(first, first + size)), excluded.take(piece)
        if scores.amax().isnan():  # the maximum is NaN if any score is
            raise InputError("scores hold NaN: the model diverged")
        known = target[piece] >= 0
        column = target[piece].clamp(min=0)[:, None]
        own = scores.gather(1, column)
        row = torch.repeat_interleave(torch.arange(len(piece), device=target.device), gone.lengths)
        drop = (gone.values >= 0) & (gone.values != column[row, 0])
        # NaN is neither above nor equal to anything, so it takes no part, even where the target has -inf.
        scores = scores.index_put((row[drop], gone.values[drop]), scores.new_tensor(float("nan")))
        # Counted in float32: ten times as fast as booleans, and exact below 2**24 candidates.
        better = torch.gt(scores, own, out=flags[: len(piece)]).sum(1)
        ties = torch.eq(scores, own, out=flags[: len(piece)]).sum(1) - 1
        found[piece[known]] = (1 + better.double() + ties.double() / 2)[known]
    return found


def table(places: ArrayLike | Tensor) -> dict[str, float]:
    """HR, NDCG and MRR of ranks [n], and their number `n`; NaN where there is none."""
    values = _places(places)
    found = {name: float(of_rank(values, name).mean()) if values.size else float("nan") for name in METRICS}
    return found | {"n": values.size}


def of_rank(places: ArrayLike | Tensor, metric: str) -> np.ndarray:
    """What each rank is worth: "hr@K" 1 up to K, "ndcg@K" 1 / log2(rank + 1) up to K, "mrr" 1 / rank."""
    values = _places(places)
    kind, _, cut = metric.partition("@")
    if kind == "mrr" and not cut:
        return 1 / values
    if kind not in ("hr", "ndcg") or not cut.isdecimal():
        raise InputError(f"no metric {metric!r} of ranks: choose hr@K, ndcg@K or mrr")
    return np.where(values <= int(cut), 1.0 if kind == "hr" else 1 / np.log2(values + 1), 0.0)


def paired_bootstrap(
    users: ArrayLike, places_a: ArrayLike, places_b: ArrayLike,
    metric: str = "hr@10", replicates: int = 500, seed: int = 0,
) -> Difference:  # fmt: skip
    """How b differs from a on the same redrawn users, seed by seed; ranks [S, n], or [n] for one seed; users [n]."""
    a, b = (np.atleast_2d(of_rank(places, metric)) for places in (places_a, places_b))
    if a.shape != b.shape:
        raise InputError(f"ranks of a are {a.shape} and of b {b.shape}: the same requests and seeds are needed")
    owner, count = owners(users, a.shape[1])
    rows = np.bincount(owner, minlength=count).astype(np.float64)
    changes = np.stack([np.bincount(owner, change, minlength=count) for change in b - a])  # [S, users]
    return Difference.of(lambda draws: (changes @ draws) / (rows @ draws), count, replicates, seed)


def _places(places: ArrayLike | Tensor) -> np.ndarray:
    values = np.asarray(places, np.float64)
    if not (values >= 1).all():
        raise InputError("ranks must be numbers from 1 on")
    return values

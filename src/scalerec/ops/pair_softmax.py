"""Softmax losses of predictions that each have candidates of their own, on a CPU.

What torch has for products of chosen pairs of rows either gathers them into [P, R, D] or passes over memory several
times; here a prediction's candidates are read from the cache, twice, and nothing of [P, R] is kept.

P predictions   C candidates of all   R negatives of a prediction   D width
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numba import njit
from torch import Tensor

from scalerec.ops._threads import in_threads, piece

KEPT = 2**26  # floats of the candidates' gradients, of which each thread has one


def pair_softmax(
    queries: Tensor, candidates: Tensor, target: Tensor, negatives: Tensor, weights: Tensor, scale: float,
    collision: float, log_q: Tensor | None = None, differentiate: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """sum_p -weights_p log softmax(scale query_p . [target_p, negatives_p] - log_q)_0 and its two gradients.

    Args:
        queries: [P, D] float32, as the candidates [C, D].
        target: [P] row of `candidates`, negatives: [P, R]; one that is the target has the logit `collision`.
        weights: [P], log_q: [C].

    Returns the sum [], and the gradients of queries and candidates, None unless `differentiate`.
    Raises IndexError where a row of `candidates` does not exist.
    """
    count = max(1, min(torch.get_num_threads(), len(queries), KEPT // max(candidates.numel(), 1)))
    bias = np.empty(0, np.float32) if log_q is None else _array(log_q.float())
    given = _array(queries), _array(candidates), _array(target), _array(negatives), _array(weights), bias
    of_queries = np.empty(queries.shape if differentiate else (0, 0), np.float32)
    of_candidates = np.zeros((count, *candidates.shape) if differentiate else (count, 0, 0), np.float32)
    sums = np.zeros(count)

    def part(number: int) -> None:
        first, end = piece(len(queries), number, count)
        sums[number] = _part(*given, first, end, scale, collision, of_queries, of_candidates[number])

    in_threads(part, count)
    total = torch.tensor(sums.sum(), dtype=torch.float32)
    if not differentiate:
        return total, None, None
    whole = of_candidates[0] if count == 1 else of_candidates.sum(0)
    return total, torch.from_numpy(of_queries), torch.from_numpy(whole)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().contiguous().numpy()


@njit(nogil=True, fastmath={"reassoc", "contract", "arcp", "nsz"}, error_model="numpy", cache=True)
def _part(  # pragma: no cover - compiled
    queries, candidates, target, negatives, weights, log_q, first, end, scale, collision, of_queries, of_candidates
):  # fmt: skip
    count, size, width = len(candidates), 1 + negatives.shape[1], queries.shape[1]
    factor, hit = np.float32(scale), np.float32(collision)
    logits = np.empty(size, np.float32)
    rows = np.empty(size, np.int64)
    total = 0.0
    for p in range(first, end):
        query = queries[p]
        most = np.float32(-np.inf)
        for r in range(size):
            row = target[p] if r == 0 else negatives[p, r - 1]
            if row < 0 or row >= count:
                raise IndexError("a target or negative is no row of the candidates")
            rows[r] = row
            candidate = candidates[row]
            logit = np.float32(0)
            for d in range(width):
                logit += query[d] * candidate[d]
            logit *= factor
            if len(log_q):
                logit -= log_q[row]
            if r > 0 and row == rows[0]:
                logit = hit
            logits[r] = logit
            if not logit <= most:  # so that a NaN is not lost
                most = logit
        own, sum_of = logits[0], np.float32(0)
        for r in range(size):
            logits[r] = np.exp(logits[r] - most)
            sum_of += logits[r]
        total += weights[p] * (math.log(sum_of) + most - own)
        if not of_queries.shape[0]:
            continue
        mine = of_queries[p]
        mine[:] = 0
        share = factor * weights[p]
        for r in range(size):
            slope = share * (logits[r] / sum_of - np.float32(r == 0))
            if slope == 0:
                continue
            candidate, theirs = candidates[rows[r]], of_candidates[rows[r]]
            for d in range(width):
                mine[d] += slope * candidate[d]
            for d in range(width):
                theirs[d] += slope * query[d]
    return total

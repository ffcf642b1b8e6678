"""Losses as terms: a sum and a weight each, so that a masked mean is the same on one process and on many.

P predictions   C candidates, the rows from which both targets and negatives come   R negatives   D width
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from scalerec.errors import InputError
from scalerec.ops.pair_softmax import pair_softmax

COLLISION = -5e4  # logit of a negative that is the target itself, as in Meta's public code of HSTU


class Term(NamedTuple):
    """One part of a loss; the training loop adds both over ranks before it divides one by the other."""

    sum: Tensor  # [] weighted sum of row losses
    weight: Tensor  # [] sum of row weights


def binary_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Term:
    """Cross entropy in nats, in float32, all arguments [n]; a row of weight 0 may hold anything, even NaN."""
    if not logits.shape == labels.shape == weights.shape:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (logits, labels, weights))
        raise InputError(f"logits, labels and weights have shapes {shapes}: they must be equal")
    counted = weights != 0
    # Chosen before the loss and not after it: a NaN multiplied by 0, also in the gradient, stays NaN.
    logits = torch.where(counted, logits.float(), 0.0)
    labels = torch.where(counted, labels.float(), 0.0)
    losses = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
    return Term((losses * weights.float()).sum(), weights.float().sum())


def total(terms: dict[str, Term]) -> Tensor:
    """Sum over terms of their weighted means; a term that no row counts for adds 0."""
    return torch.stack([term.sum / term.weight.clamp(min=1e-12) for term in terms.values()]).sum()


def sampled_softmax(
    queries: Tensor, candidates: Tensor, target: Tensor, negatives: Tensor, weights: Tensor, temperature: float,
    log_q: Tensor | None = None,
) -> Term:  # fmt: skip
    """Mean of -log softmax([target, negatives])_0 of the logits query . candidate / temperature, in nats.

    Args:
        queries: [P, D], normalised by the caller where cosines are wanted; so are the candidates.
        candidates: [C, D], all vectors that can be target or negative, each once: a whole table or what `distinct` left
            of it. Looking vectors up once, and not for every pair, is most of the speed.
        target: [P] row of `candidates`.
        negatives: row numbers of `candidates`, [R] shared by all predictions or [P, R]; one that is the target gets
            the logit -5e4.
        weights: [P]; where 0, the row may hold anything, even NaN.
        log_q: [C] log of the chance to be drawn, subtracted from the logits (Yi et al. 2019, section 3, eq. 3).
    """
    if negatives.ndim not in (1, 2) or (negatives.ndim == 2 and len(negatives) != len(queries)):
        raise InputError(
            f"negatives have shape {tuple(negatives.shape)}: [R], or one row for each of {len(queries)} queries"
        )
    return _softmax(queries, candidates, target, negatives, weights, temperature, log_q)


def full_softmax(queries: Tensor, candidates: Tensor, target: Tensor, weights: Tensor, temperature: float) -> Term:
    """Mean cross entropy of logits query . candidate / temperature over all candidates; shapes as above."""
    return _softmax(queries, candidates, target, None, weights, temperature, None)


def _softmax(
    queries: Tensor, candidates: Tensor, target: Tensor, negatives: Tensor | None, weights: Tensor, temperature: float,
    log_q: Tensor | None,
) -> Term:  # fmt: skip
    if not (queries.ndim == candidates.ndim == 2 and queries.shape[1] == candidates.shape[1]):
        raise InputError(
            f"queries {tuple(queries.shape)} and candidates {tuple(candidates.shape)}: [P, D] and [C, D] are needed"
        )
    if not target.shape == weights.shape == queries.shape[:1]:
        shapes = f"{tuple(target.shape)} and {tuple(weights.shape)}"
        raise InputError(f"target and weights have shapes {shapes}: one each per query ({len(queries)}) is needed")
    if temperature <= 0:
        raise InputError(f"temperature is {temperature}: it must be above 0")
    counted = weights != 0
    if not bool(counted.all()):  # dropped before the loss: a NaN multiplied by 0 stays NaN
        queries, target, weights = queries[counted], target[counted], weights[counted]
        negatives = negatives[counted] if negatives is not None and negatives.ndim == 2 else negatives
    weights = weights.float()
    with torch.autocast(queries.device.type, enabled=False):
        found = _SoftmaxSum.apply(
            queries.float(), candidates.float(), target, negatives, weights, 1 / temperature, log_q
        )
    return Term(found, weights.sum())


class _SoftmaxSum(torch.autograd.Function):
    """Weighted sum of softmax losses, worked off in pieces of predictions that stay in cache.

    The loss is a sum, so its gradients are known up to one factor as soon as the logits are; they are taken piece by
    piece on the way forward, and the [P, R] or [P, C] logits are never all in memory.
    """

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, candidates: Tensor, target: Tensor, negatives: Tensor | None, weights: Tensor,
        scale: float, log_q: Tensor | None,
    ) -> Tensor:  # fmt: skip
        differentiate = any(ctx.needs_input_grad)
        if negatives is not None and negatives.ndim == 2 and queries.device.type == "cpu":
            given = queries, candidates, target, negatives, weights
            total, *gradients = pair_softmax(*given, scale, COLLISION, log_q, differentiate)
            if differentiate:
                ctx.save_for_backward(*gradients)
            return total
        if negatives is not None and negatives.ndim == 2:
            pairs = _OwnPairs(candidates, target, negatives, log_q)
        else:
            pairs = _SharedPairs(candidates, target, negatives, log_q)
        of_queries = torch.empty_like(queries)
        total = queries.new_zeros(())
        for piece in _pieces(len(queries), pairs.cost, queries.device):
            part, weight = queries[piece], weights[piece]
            logits = pairs.logits(part, piece, scale)
            logs = torch.log_softmax(logits, 1)
            total -= logs[:, 0] @ weight
            if differentiate:
                gradient = logs.exp_()
                gradient[:, 0] -= 1
                of_queries[piece] = pairs.differentiate(gradient.mul_(scale * weight[:, None]), part, piece)
        if differentiate:
            ctx.save_for_backward(of_queries, pairs.gradient())
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        of_queries, of_candidates = ctx.saved_tensors
        return gradient * of_queries, gradient * of_candidates, None, None, None, None, None


class _SharedPairs:
    """Every prediction against the same candidates, or all: matrix products."""

    def __init__(self, candidates: Tensor, target: Tensor, negatives: Tensor | None, log_q: Tensor | None):
        self.candidates, self.target, self.negatives, self.log_q = candidates, target, negatives, log_q
        self.others = candidates if negatives is None else candidates[negatives]
        self.of_others = torch.zeros_like(self.others)
        self.of_targets = torch.zeros_like(candidates)
        self.cost = len(self.others)

    def logits(self, queries: Tensor, piece: slice, scale: float) -> Tensor:
        """[p, 1 + R], the target first."""
        target = self.target[piece]
        logits = queries.new_empty(len(queries), 1 + len(self.others))
        torch.sum(queries * self.candidates[target], 1, out=logits[:, 0])
        torch.mm(queries, self.others.T, out=logits[:, 1:])
        logits *= scale
        if self.negatives is None:
            return logits.scatter_(1, 1 + target[:, None], COLLISION)  # it stands first already
        if self.log_q is not None:
            logits[:, 0] -= self.log_q[target]
            logits[:, 1:] -= self.log_q[self.negatives]
        logits[:, 1:].masked_fill_(self.negatives == target[:, None], COLLISION)
        return logits

    def differentiate(self, gradient: Tensor, queries: Tensor, piece: slice) -> Tensor:
        """Gradient of the queries [p, D], keeping that of the candidates, from that of the logits."""
        target, first, rest = self.target[piece], gradient[:, :1], gradient[:, 1:]
        self.of_targets.index_add_(0, target, first * queries)
        self.of_others.addmm_(rest.T, queries)
        return torch.addcmul(rest @ self.others, first, self.candidates[target])

    def gradient(self) -> Tensor:
        """Of the candidates, [C, D]."""
        if self.negatives is None:
            return self.of_targets.add_(self.of_others)
        return self.of_targets.index_add_(0, self.negatives, self.of_others)


class _OwnPairs:
    """Every prediction against candidates of its own: their vectors are read in place, not gathered into [P, R, D].

    The plain twin of `ops.pair_softmax`, and what other devices than the CPU use.
    """

    def __init__(self, candidates: Tensor, target: Tensor, negatives: Tensor, log_q: Tensor | None):
        self.candidates, self.log_q = candidates, log_q
        self.rows = torch.cat([target[:, None], negatives], 1)
        self.of_candidates = torch.zeros_like(candidates)
        self.cost = self.rows.shape[1] * candidates.shape[1]

    def _weighted(self, rows: Tensor, weights: Tensor) -> Tensor:
        """Sum over r of weights[p, r] * candidates[rows[p, r]], [p, D]."""
        return F.embedding_bag(rows, self.candidates, mode="sum", per_sample_weights=weights)

    def logits(self, queries: Tensor, piece: slice, scale: float) -> Tensor:
        """[p, 1 + R], the target first."""
        rows = self.rows[piece]
        # The products of pairs are the gradient of a weighted bag by its weights; torch has no other kernel for them.
        weights = queries.new_zeros(rows.shape).requires_grad_()
        with torch.enable_grad():
            bags = self._weighted(rows, weights)
        logits = torch.autograd.grad(bags, weights, queries)[0] * scale
        if self.log_q is not None:
            logits -= self.log_q[rows]
        logits[:, 1:].masked_fill_(rows[:, 1:] == rows[:, :1], COLLISION)
        return logits

    def differentiate(self, gradient: Tensor, queries: Tensor, piece: slice) -> Tensor:
        """Gradient of the queries [p, D], keeping that of the candidates, from that of the logits."""
        rows = self.rows[piece]
        self.of_candidates.index_add_(0, rows.flatten(), (gradient[:, :, None] * queries[:, None]).flatten(0, 1))
        return self._weighted(rows, gradient)

    def gradient(self) -> Tensor:
        """Of the candidates, [C, D]."""
        return self.of_candidates


def _pieces(count: int, cost: int, device: torch.device) -> list[slice]:
    """Predictions in pieces of about 4 MB on a CPU, to stay in cache, and 512 MB elsewhere; one takes `cost` floats."""
    size = max((2**20 if device.type == "cpu" else 2**27) // max(cost, 1), 32)
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def distinct(rows: int, *ids: Tensor) -> tuple[Tensor, ...]:
    """The ids (int64) that occur [C], ascending, and each argument as row numbers of them; all lie in [0, `rows`).

    What makes a whole table's ids into the candidates of a softmax: `used, target, negatives = distinct(rows, ...)`.
    """
    present = torch.zeros(rows, dtype=torch.bool, device=ids[0].device)
    for some in ids:
        present.index_fill_(0, some.flatten(), True)
    place = present.cumsum(0) - 1
    return present.nonzero()[:, 0], *(place.index_select(0, some.flatten()).view(some.shape) for some in ids)


def log_frequency(ids: Tensor, rows: int) -> Tensor:
    """Log of each id's share of `ids`, [rows], for a log-Q correction; ids that do not occur count as seen once."""
    counts = torch.bincount(ids.flatten(), minlength=rows)
    return (counts.clamp(min=1) / max(ids.numel(), 1)).log()

"""Losses as terms: a sum and a weight each, so that a masked mean is the same on one process and on many."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scalerec.errors import InputError


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

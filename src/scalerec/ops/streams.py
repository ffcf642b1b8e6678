"""Several series of tokens of the same users -> one series a user, in the order of time (docs/generative.md).

U users   T tokens of all users and streams   D width
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor


class Stream(NamedTuple):
    """Tokens of one kind, of all users, each user's in order."""

    vectors: Tensor  # [n, D]
    user: Tensor  # [n]
    times: Tensor  # [n] float64
    rank: int  # at equal times, streams of lower rank come first
    place: Tensor  # [n] int64, the order among tokens of equal user, time and rank


class Merged(NamedTuple):
    """All streams in one, one user's tokens after the other's."""

    vectors: Tensor  # [T, D]
    user: Tensor  # [T]
    times: Tensor  # [T]
    offsets: Tensor  # [U + 1]
    at: Tensor  # [T] where each token went, stream after stream
    order: Tensor  # [T] the other way round: which token, counted stream after stream, came to each place


def merge(streams: Sequence[Stream], users: int) -> Merged:
    """Sort the tokens of `users` users by user, time, rank and place."""
    user, times, place = (torch.cat([getattr(s, name) for s in streams]) for name in ("user", "times", "place"))
    rank = torch.cat([torch.full_like(s.user, s.rank) for s in streams])
    keys = [key.cpu().numpy() for key in (place, rank, times, user)]  # the last one counts first
    order = torch.from_numpy(np.lexsort(keys)).to(user.device)
    at = torch.empty_like(order)
    at[order] = torch.arange(len(order), device=order.device)
    lengths = torch.bincount(user, minlength=users)
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    return Merged(torch.cat([s.vectors for s in streams])[order], user[order], times[order], offsets, at, order)

"""Changes of a training batch, drawn anew for each: shorter histories (stochastic length), items to tell apart.

U users   B rows   E past events of all users   n a user's events   R negatives
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from scalerec.batch import FIRST_ID, Batch, Jagged
from scalerec.config import Config
from scalerec.errors import InputError
from scalerec.features.layout import FeatureLayout, Layout


class StochasticLength(Config):
    """Most users' histories cut to N^(alpha / 2) events, the rest kept whole (HSTU section 3.2).

    N is the longest that the main sequence may be. A history of n > L = floor(N^(alpha/2)) events stays whole with the
    chance min(1, N^alpha / n^2).
    """

    alpha: float = Field(default=2.0, gt=1, le=2)  # 2: off
    selector: Literal["weighted", "greedy", "random"] = "weighted"

    def length(self, longest: int) -> int:
        """L, to which a history is cut, where none is longer than `longest`."""
        return int(longest ** (self.alpha / 2) * (1 + 1e-12))  # 32 ** 0.8 is 15.999999999999998

    def keep_whole(self, lengths: np.ndarray, longest: int) -> np.ndarray:
        """The chance of histories of these lengths to stay whole."""
        long = lengths > self.length(longest)
        return np.where(long, np.minimum(1, longest**self.alpha / np.maximum(lengths, 1.0) ** 2), 1.0)

    def sparsity(self, lengths: np.ndarray, longest: int) -> float:
        """Share of the events of histories of these lengths that is left out, as expected."""
        whole = self.keep_whole(lengths, longest)
        expected = whole * lengths + (1 - whole) * np.minimum(lengths, self.length(longest))
        return 1 - float(expected.sum() / lengths.sum())

    def __call__(self, batch: Batch, layout: Layout, rng: np.random.Generator) -> Batch:
        """The batch with its main sequence shorter: lists, times and actions alike, in order."""
        if self.alpha == 2:
            return batch
        series = layout.main_sequence()
        name, past = series.name, batch.user.lists[series.name]
        keep = self._kept(past, batch.user.times.get(name), series.max_len, rng)
        rows = batch.user
        user = replace(
            rows,
            lists=rows.lists | {name: _filtered(past, keep)},
            times={key: _filtered(times, keep) if key == name else times for key, times in rows.times.items()},
            actions={key: _filtered(labels, keep) if key == name else labels for key, labels in rows.actions.items()},
        )
        if batch.new_events is None:
            return replace(batch, user=user)
        before = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.cumsum(0)])  # events kept before each
        last = past.offsets[1:][batch.user_of_row]
        first_new = torch.maximum(last - batch.new_events, past.offsets[:-1][batch.user_of_row])
        return replace(batch, user=user, new_events=before[last] - before[first_new])

    def _kept(self, past: Jagged, times: Jagged | None, longest: int, rng: np.random.Generator) -> Tensor:
        """[E] bool, which events stay."""
        lengths = past.lengths.numpy()
        cut = rng.random(len(lengths)) >= self.keep_whole(lengths, longest)
        owner = np.repeat(np.arange(len(lengths)), lengths)
        keys = rng.standard_exponential(len(owner))  # drawn for all events: what is drawn depends on no outcome
        if self.selector == "greedy":
            keys = -np.arange(len(owner), dtype=np.float64)
        elif self.selector == "weighted":
            keys = keys / np.maximum(_weights(times, lengths, owner), 1e-300)
        # The L smallest keys E_i / w_i of a user are L draws without replacement with chances in proportion to w_i.
        order = np.lexsort((keys, owner))
        place = np.arange(len(owner)) - np.repeat(past.offsets[:-1].numpy(), lengths)  # of the sorted, in its list
        kept = np.empty(len(owner), bool)
        kept[order] = ~cut[owner] | (
            place < self.length(longest)
        )  # sorting by owner first leaves every list where it was
        return torch.from_numpy(kept)


def _weights(times: Jagged | None, lengths: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """w_i = 1 - f_i / sum_j f_j of each event's age f_i = t_n - t_i; equal where all are 0 (HSTU, appendix F.1)."""
    if times is None:
        raise InputError("stochastic length: the selector 'weighted' needs the events' times: use 'random' or 'greedy'")
    stamps = times.values.numpy()
    ends = np.cumsum(lengths)
    age = np.maximum(stamps[np.repeat(ends, lengths) - 1] - stamps, 0)
    total = np.bincount(owner, age, minlength=len(lengths))[owner]
    return 1 - np.divide(age, total, out=np.zeros_like(age), where=total > 0)


def _filtered(lists: Jagged, keep: Tensor) -> Jagged:
    owner = torch.repeat_interleave(torch.arange(len(lists)), lists.lengths)
    return Jagged.from_lengths(lists.values[keep], torch.bincount(owner[keep], minlength=len(lists)))


class Negatives(Config):
    """Items drawn uniformly with replacement, from which a retrieval model is to tell the target.

    per_position   R for each past event, [E, R]: the events of each row's user, row by row
    shared         R for the whole batch, [R], of the whole table
    in_batch       R for the whole batch, [R], of the items that occur in its histories and rows
    """

    count: NonNegativeInt = 128  # R; 0: off
    how: Literal["per_position", "shared", "in_batch"] = "per_position"
    distinct: bool = True  # in_batch: every item once; else as often as it is in the batch, which log_q corrects

    def __call__(self, batch: Batch, layout: Layout, rng: np.random.Generator) -> Batch:
        """The batch with `negatives`, ids of the item table."""
        if not self.count:
            return batch
        series = layout.main_sequence()
        rows = layout.table[series.tables[0]].rows
        if rows <= FIRST_ID:
            raise InputError(f"no negatives can be drawn: table {series.tables[0]!r} has no item yet")
        past = batch.user.lists[series.name]
        if self.how == "in_batch":
            pool = np.concatenate([past.values[:, 0].numpy(), _candidates(batch, layout, series)])
            pool = np.unique(pool[pool >= FIRST_ID]) if self.distinct else pool[pool >= FIRST_ID]
            if len(pool):
                drawn = pool[rng.integers(len(pool), size=self.count)]
                return replace(batch, negatives=torch.from_numpy(drawn))
        events = int(past.lengths[batch.user_of_row].sum())
        shape = (events, self.count) if self.how == "per_position" else (self.count,)
        return replace(batch, negatives=torch.from_numpy(rng.integers(FIRST_ID, rows, size=shape)))


def _candidates(batch: Batch, layout: Layout, series: FeatureLayout) -> np.ndarray:
    """The rows' items, which models of the series foresee."""
    names = [feature.name for feature in layout.sides["item"].ids]
    if series.query[0] not in names:
        return np.empty(0, np.int64)
    return batch.items.ids[:, names.index(series.query[0])].numpy()

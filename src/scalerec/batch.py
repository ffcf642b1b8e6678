"""What flows from the log to the model: jagged lists, the rows of one side, and batches of both sides.

U users   B rows   F ids a row   K numbers a row   n either of U and B
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

PADDING, UNKNOWN, MISSING, FIRST_ID = 0, 1, 2, 3  # row ids with the same meaning in every table


@dataclass(frozen=True)
class Jagged:
    """Lists of different lengths: list i is values[offsets[i]:offsets[i + 1]]; values may have trailing dimensions."""

    values: Tensor  # [total, ...]
    offsets: Tensor  # [n + 1] int64

    def __len__(self) -> int:
        return self.offsets.numel() - 1

    @property
    def lengths(self) -> Tensor:
        return self.offsets.diff()

    @staticmethod
    def from_lengths(values: Tensor, lengths: Tensor) -> Jagged:
        return Jagged(values, torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    def take(self, index: Tensor) -> Jagged:
        """The lists at `index` [m] (from 0 on), in that order."""
        if self._copyable():
            width = math.prod(self.values.shape[1:])
            found, offsets = _take_lists(bits(self.values), self.offsets.numpy(), index.numpy(), width)
            values = torch.from_numpy(found).view(self.values.dtype)
            return Jagged(values.view(int(offsets[-1]), *self.values.shape[1:]), torch.from_numpy(offsets))
        starts = self.offsets[:-1][index]
        lengths = self.offsets[1:][index] - starts
        offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        total = int(offsets[-1])
        shift = starts - offsets[:-1]
        position = torch.arange(total, device=index.device) + torch.repeat_interleave(shift, lengths, output_size=total)
        return Jagged(self.values[position], offsets)

    def _copyable(self) -> bool:
        """By compiled code, as it lies in memory."""
        plain = type(self.values) is Tensor and self.values.device.type == "cpu" and not self.values.requires_grad
        return plain and self.values.is_contiguous() and self.values.dtype != torch.bfloat16

    def padded(self, fill: float = 0) -> tuple[Tensor, Tensor]:
        """Values as [n, L, ...] filled at the end, and the mask [n, L] of real ones; L is the longest list (>= 1)."""
        lengths = self.lengths
        longest = max(int(lengths.max()) if len(self) else 0, 1)
        mask = torch.arange(longest, device=lengths.device) < lengths[:, None]
        out = self.values.new_full((mask.numel(), *self.values.shape[1:]), fill)
        out.index_copy_(0, mask.flatten().nonzero()[:, 0], self.values)
        return out.unflatten(0, mask.shape), mask

    @staticmethod
    def cat(parts: Sequence[Jagged]) -> Jagged:
        return Jagged.from_lengths(torch.cat([p.values for p in parts]), torch.cat([p.lengths for p in parts]))

    def map(self, change: Callable[[Tensor], Tensor]) -> Jagged:
        return Jagged(change(self.values), change(self.offsets))


@dataclass(frozen=True)
class Rows:
    """The encoded features of one side; the Layout names the columns of `ids` and `numbers`."""

    side: str  # "user" or "item"
    ids: Tensor  # [n, F] one id per feature, set by the encoder
    numbers: Tensor  # [n, K] float32 standardised, NaN where missing, for linear numeric features
    lists: dict[str, Jagged]  # multi-valued features: values [total]; sequences: values [total, fields]
    times: dict[str, Jagged]  # sequences that keep times: values [total] float64 seconds
    actions: dict[str, Jagged] = field(default_factory=dict)  # sequences that keep labels: [total, labels], NaN unknown
    now: Tensor | None = None  # [n] float64 seconds, when the rows were asked for; where a sequence keeps times

    def __len__(self) -> int:
        return self.ids.shape[0]

    def take(self, index: Tensor) -> Rows:
        return Rows(
            self.side,
            self.ids.index_select(0, index),  # which copies row by row; [index] goes from number to number
            self.numbers.index_select(0, index),
            {name: jagged.take(index) for name, jagged in self.lists.items()},
            {name: jagged.take(index) for name, jagged in self.times.items()},
            {name: jagged.take(index) for name, jagged in self.actions.items()},
            None if self.now is None else self.now[index],
        )

    @staticmethod
    def cat(parts: Sequence[Rows]) -> Rows:
        first = parts[0]
        return Rows(
            first.side,
            torch.cat([p.ids for p in parts]),
            torch.cat([p.numbers for p in parts]),
            {name: Jagged.cat([p.lists[name] for p in parts]) for name in first.lists},
            {name: Jagged.cat([p.times[name] for p in parts]) for name in first.times},
            {name: Jagged.cat([p.actions[name] for p in parts]) for name in first.actions},
            _cat([p.now for p in parts]),
        )

    def map(self, change: Callable[[Tensor], Tensor]) -> Rows:
        return Rows(
            self.side,
            change(self.ids),
            change(self.numbers),
            {name: jagged.map(change) for name, jagged in self.lists.items()},
            {name: jagged.map(change) for name, jagged in self.times.items()},
            {name: jagged.map(change) for name, jagged in self.actions.items()},
            None if self.now is None else change(self.now),
        )


@dataclass(frozen=True)
class Batch:
    """Each user's state once, its rows beside it: training batches, and requests (U = 1, B candidates)."""

    user: Rows  # U rows
    items: Rows  # B rows
    user_of_row: Tensor  # [B] int64, row of `user`
    labels: Tensor  # [B, tasks] float32, 0 or 1; set by the encoder, 0 in a request
    weights: Tensor  # [B, tasks] float32, 0 where masked or missing
    users: Tensor  # [B] int64, a stable code of the user column: what UAUC and the bootstrap group by
    index: Tensor  # [B] int64, the row's number in the files it came from
    new_events: Tensor | None = None  # [B] int64, how many of the row's last past events are training targets too
    negatives: Tensor | None = None  # item ids drawn by a transform: [R] shared, or [past events, R]

    def __len__(self) -> int:
        return self.user_of_row.numel()

    def take(self, index: Tensor) -> Batch:
        """The rows at `index` [m] in that order, with only the users they need, each once."""
        present, user_of_row = torch.unique(self.user_of_row.index_select(0, index), return_inverse=True)
        return Batch(
            self.user.take(present),
            self.items.take(index),
            user_of_row,
            *(getattr(self, name).index_select(0, index) for name in ("labels", "weights", "users", "index")),
            new_events=None if self.new_events is None else self.new_events[index],
        )

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        if len(parts) == 1:
            return parts[0]
        shifts = [0]
        for part in parts:
            shifts.append(shifts[-1] + len(part.user))
        return Batch(
            Rows.cat([p.user for p in parts]),
            Rows.cat([p.items for p in parts]),
            torch.cat([p.user_of_row + shift for p, shift in zip(parts, shifts)]),
            *(torch.cat([getattr(p, f) for p in parts]) for f in ("labels", "weights", "users", "index")),
            new_events=_cat([p.new_events for p in parts]),
        )

    def unshared(self) -> Batch:
        """The same rows with the user side repeated for each of them (U = B)."""
        return replace(
            self,
            user=self.user.take(self.user_of_row),
            user_of_row=torch.arange(len(self), device=self.user_of_row.device),
        )

    def to(self, device: torch.device | str) -> Batch:
        def move(value: Tensor) -> Tensor:
            return value.to(device, non_blocking=True)

        tensors = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, user=self.user.map(move), items=self.items.map(move), **tensors)


def bits(values: Tensor) -> np.ndarray:
    """Those of all numbers, one after the other, unsigned; the values' own memory where they lie in one piece."""
    array = values.contiguous().numpy().reshape(-1)
    return array.view(f"u{array.itemsize}")


@njit(nogil=True, cache=True)
def _take_lists(values, offsets, index, width):  # pragma: no cover - compiled
    """Lists of rows of `width` numbers, all flat: those at `index` [m], and the new offsets [m + 1] in rows."""
    taken = np.zeros(len(index) + 1, np.int64)
    for i in range(len(index)):
        if not 0 <= index[i] < len(offsets) - 1 or offsets[index[i] + 1] * width > len(values):
            raise IndexError("a list that is not there, or goes beyond the values that are")
        taken[i + 1] = taken[i] + offsets[index[i] + 1] - offsets[index[i]]
    found = np.empty(taken[-1] * width, values.dtype)
    for i in range(len(index)):
        first, begin = offsets[index[i]] * width, taken[i] * width
        for k in range((taken[i + 1] - taken[i]) * width):
            found[begin + k] = values[first + k]
    return found, taken


def _cat(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if present else None


class Outputs(NamedTuple):
    """What a ranking model says of each row."""

    logits: Tensor  # [B, tasks]

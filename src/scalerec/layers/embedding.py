"""The seam between ids and vectors: every lookup of a step in one call, one state-dict key per table.

n rows of a side   F ids   W flat width of the side   L longest list   w width of a sequence
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalerec.batch import MISSING, Jagged, Rows
from scalerec.features.layout import FeatureLayout, Layout
from scalerec.hardware import in_huge_pages


@dataclass(frozen=True)
class EmbeddedSequence:
    """A user's past as vectors, padded at the end."""

    values: Tensor  # [n, L, w], zero where masked
    mask: Tensor  # [n, L] bool
    times: Tensor | None = None  # [n, L] float64 seconds
    actions: Tensor | None = None  # [n, L, labels] 0, 1 or NaN


@dataclass(frozen=True)
class Embedded:
    """The features of one side as vectors; this, not ids, is what a model's dense part sees."""

    flat: Tensor  # [n, W] features side by side in the order of the layout, sequences left out
    sequences: dict[str, EmbeddedSequence]
    now: Tensor | None = None  # [n] float64 seconds, when the rows were asked for


@dataclass(frozen=True)
class Lookup:
    """Ids to be looked up: columns of features (or fields of a sequence) that are as wide and stand side by side."""

    tables: tuple[str, ...]  # of each column
    ids: Tensor  # [n, columns]; [k] of a multi-valued feature
    lengths: Tensor | None = None  # [n] of a multi-valued feature, k in all: one pooled vector for each list
    pooling: str = "mean"

    def apart(self) -> list[Lookup]:
        """The same, a lookup for each column."""
        if len(self.tables) == 1:
            return [self]
        return [Lookup((table,), self.ids[:, j]) for j, table in enumerate(self.tables)]

    def pooled(self, vectors: Tensor) -> Tensor:
        """Vectors of the ids in a row [n columns, dim] -> side by side [n, columns dim]; or the sum or mean [n, dim] of
        each list, zero for an empty one."""
        if self.lengths is None:
            return vectors.view(-1, len(self.tables) * vectors.shape[1])
        row = torch.repeat_interleave(torch.arange(self.lengths.numel(), device=vectors.device), self.lengths)
        sums = vectors.new_zeros(self.lengths.numel(), vectors.shape[1]).index_add(0, row, vectors)
        return sums / self.lengths.clamp(min=1)[:, None] if self.pooling == "mean" else sums


class EmbeddingCollection(nn.Module):
    """All tables of a layout; `forward(*sides)` embeds any number of sides with one lookup per table width.

    The tables of one width lie in one parameter, so that a lookup of many features is one gather and its gradient one
    sparse tensor; `state_dict` shows them one by one as `tables.<name>` whatever the arrangement.
    """

    def __init__(self, layout: Layout, std: float = 0.05):
        super().__init__()
        self.layout = layout
        self.std = std
        self.place: dict[str, tuple[int, int]] = {}  # table -> (width, first row)
        self.first_rows: dict[tuple[tuple[str, ...], torch.device], Tensor] = {}  # of tables looked up side by side
        rows: dict[int, int] = {}
        for table in layout.tables:
            self.place[table.name] = (table.dim, rows.get(table.dim, 0))
            rows[table.dim] = rows.get(table.dim, 0) + table.rows
        for dim, n in rows.items():
            self.register_parameter(f"width_{dim}", nn.Parameter(in_huge_pages(torch.empty(n, dim))))
        self.widths = tuple(rows)
        self.linear = nn.ModuleDict({side: _LinearNumbers(shape.numbers) for side, shape in layout.sides.items()})
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal vectors; padding, unknown and missing start neutral, at zero."""
        for _, weight in self.table_weights():
            nn.init.normal_(weight, std=self.std)
            with torch.no_grad():
                weight[: MISSING + 1] = 0

    def table_weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and [rows, dim] view of every table."""
        for table in self.layout.tables:
            dim, first = self.place[table.name]
            yield table.name, self.weight(dim).detach()[first : first + table.rows]

    def sparse_parameters(self) -> list[nn.Parameter]:
        """The parameters whose gradients are sparse; the rest of a model is dense."""
        return [self.weight(dim) for dim in self.widths]

    def weight(self, dim: int) -> nn.Parameter:
        """All tables of one width, [rows, dim]."""
        return self.get_parameter(f"width_{dim}")

    def forward(self, *sides: Rows) -> tuple[Embedded, ...]:
        return self.embed(sides, [])[0]

    def embed(self, sides: Sequence[Rows], more: list[Lookup]) -> tuple[tuple[Embedded, ...], list[Tensor]]:
        """Sides and the vectors of further lookups (negatives, a catalogue), all in one call."""
        lookups = [lookup for rows in sides for lookup in self.lookups(rows)]
        vectors = iter(self.look_up([*lookups, *more]))
        return tuple(self.assemble(rows, vectors) for rows in sides), list(vectors)

    def lookups(self, rows: Rows) -> list[Lookup]:
        """What one side needs, in the order in which `assemble` takes the vectors."""
        shape = self.layout.sides[rows.side]
        found, first = [], 0
        for run in shape.stretches:
            if run[0].kind == "id":
                found.append(Lookup(tuple(f.tables[0] for f in run), rows.ids[:, first : first + len(run)]))
                first += len(run)
            elif run[0].kind == "multi":
                jagged = rows.lists[run[0].name]
                found.append(Lookup(run[0].tables, jagged.values, jagged.lengths, run[0].pooling))
        for feature in shape.sequences:
            values, first = rows.lists[feature.name].values, 0
            for tables in self._fields(feature):
                found.append(Lookup(tables, values[:, first : first + len(tables)]))
                first += len(tables)
        return found

    def _fields(self, sequence: FeatureLayout) -> list[tuple[str, ...]]:
        """The tables of its fields, those of one width together."""
        return [tuple(run) for _, run in groupby(sequence.tables, lambda name: self.layout.table[name].dim)]

    def look_up(self, lookups: list[Lookup]) -> list[Tensor]:
        """The vectors of each lookup, [n, columns dim] or pooled [n, dim]; distributed training replaces this one."""
        vectors: list[Tensor | None] = [None] * len(lookups)
        for dim in self.widths:
            mine = [i for i, lookup in enumerate(lookups) if self.place[lookup.tables[0]][0] == dim]
            if not mine:
                continue
            ids = [self._rows_of(lookups[i]) for i in mine]
            found = F.embedding(torch.cat(ids) if len(ids) > 1 else ids[0], self.weight(dim), sparse=True)
            parts = found.split([part.numel() for part in ids]) if len(ids) > 1 else (found,)
            for i, part in zip(mine, parts):
                vectors[i] = lookups[i].pooled(part)
        return [vector for vector in vectors if vector is not None]

    def _rows_of(self, lookup: Lookup) -> Tensor:
        """Rows of the tables of one width, row after row of the lookup."""
        first = [self.place[table][1] for table in lookup.tables]
        if len(first) == 1:
            return (lookup.ids + first[0]).flatten()
        key = lookup.tables, lookup.ids.device  # kept: to an accelerator they are a copy that is waited for
        if key not in self.first_rows:
            self.first_rows[key] = torch.tensor(first, device=lookup.ids.device)
        return (lookup.ids + self.first_rows[key]).flatten()

    def assemble(self, rows: Rows, vectors: Iterator[Tensor]) -> Embedded:
        """Vectors of one side's lookups -> its Embedded: sequences padded, columns in the layout's order."""
        shape = self.layout.sides[rows.side]
        numbers = iter(self.linear[rows.side](rows.numbers) if shape.numbers else ())
        flat = [next(numbers if run[0].kind == "number" else vectors) for run in shape.stretches]
        sequences = {}
        for feature in shape.sequences:
            jagged = rows.lists[feature.name]
            joined = beside([next(vectors) for _ in self._fields(feature)])
            values, mask = Jagged(joined, jagged.offsets).padded()
            times, actions = (
                kept[feature.name].padded()[0] if feature.name in kept else None for kept in (rows.times, rows.actions)
            )
            sequences[feature.name] = EmbeddedSequence(values, mask, times, actions)
        return Embedded(
            beside(flat) if flat else rows.ids.new_zeros(len(rows), 0, dtype=torch.float), sequences, rows.now
        )

    # One key per table, whatever lies in memory: checkpoints move between this form and sharded ones.

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        for name, weight in self.table_weights():
            destination[f"{prefix}tables.{name}"] = weight

    def _load_from_state_dict(self, state_dict, prefix, _metadata, _strict, missing, unexpected, errors) -> None:
        for name, weight in self.table_weights():
            value = state_dict.pop(f"{prefix}tables.{name}", None)
            if value is None:
                missing.append(f"{prefix}tables.{name}")
            elif value.shape != weight.shape:
                errors.append(f"table {name!r}: {tuple(value.shape)} in the checkpoint, {tuple(weight.shape)} here")
            else:
                weight.copy_(value)
        unexpected += [key for key in state_dict if key.startswith(f"{prefix}tables.")]


def beside(parts: list[Tensor]) -> Tensor:
    """Columns next to each other; one part as it is, not copied."""
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


class _LinearNumbers(nn.Module):
    """A number as weight * z + bias, a missing one as a vector of its own."""

    def __init__(self, features: list[FeatureLayout]):
        super().__init__()
        self.weight, self.bias, self.missing = (
            nn.ParameterList(nn.Parameter(torch.zeros(f.width)) for f in features) for _ in range(3)
        )
        for parameter in self.weight:
            nn.init.normal_(parameter, std=0.05)

    def forward(self, numbers: Tensor) -> list[Tensor]:
        absent = numbers.isnan()
        z = numbers.nan_to_num(0.0)
        return [
            torch.where(absent[:, j : j + 1], self.missing[j], z[:, j : j + 1] * self.weight[j] + self.bias[j])
            for j in range(len(self.weight))
        ]

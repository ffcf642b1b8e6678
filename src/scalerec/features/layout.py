"""The fitted shape of the input: tables with their rows, groups in order, user side and item side apart, tasks."""

from __future__ import annotations

from functools import cached_property
from typing import Literal

from scalerec.errors import InputError
from scalerec.schema import Frozen, Side


class Table(Frozen):
    """One embedding table; rows 0, 1 and 2 are padding, unknown and missing."""

    name: str
    rows: int
    dim: int


class FeatureLayout(Frozen):
    """One feature as the model meets it."""

    name: str
    kind: Literal["id", "number", "multi", "sequence"]
    width: int  # columns it fills in the model's input
    tables: tuple[str, ...] = ()  # one per id; a sequence has one per field, the item id's first
    pooling: Literal["mean", "sum"] = "mean"  # multi
    query: tuple[str, ...] = ()  # sequence: the candidate's features that its fields correspond to
    max_len: int = 1
    time: bool = False
    actions: tuple[
        str, ...
    ] = ()  # sequence: the labels kept with its events, by the name of their task where they have one
    runs: bool = False  # sequence: slowly changing, only the first of equal consecutive ids is there


class GroupLayout(Frozen):
    name: str
    side: Side
    features: tuple[FeatureLayout, ...]

    @property
    def width(self) -> int:
        return sum(feature.width for feature in self.features)


class SideLayout:
    """What one side's Rows hold, in the order of their columns."""

    def __init__(self, features: list[FeatureLayout]):
        self.ids = [f for f in features if f.kind == "id"]
        self.numbers = [f for f in features if f.kind == "number"]
        self.multi = [f for f in features if f.kind == "multi"]
        self.sequences = [f for f in features if f.kind == "sequence"]
        self.flat = [f for f in features if f.kind != "sequence"]  # order of the concatenated input
        self.flat_width = sum(f.width for f in self.flat)
        self.stretches: list[list[FeatureLayout]] = []  # of `flat`: ids of one width side by side, others one by one
        for f in self.flat:
            before = self.stretches[-1][-1] if self.stretches else None
            if before and before.kind == f.kind == "id" and before.width == f.width:
                self.stretches[-1].append(f)
            else:
                self.stretches.append([f])


class Layout(Frozen):
    """Everything that `config.build(layout)` needs; frozen, kept in the checkpoint."""

    tables: tuple[Table, ...]
    groups: tuple[GroupLayout, ...]
    tasks: tuple[str, ...]

    @cached_property
    def sides(self) -> dict[str, SideLayout]:
        return {
            side: SideLayout([f for g in self.groups if g.side == side for f in g.features])
            for side in ("user", "item")
        }

    @cached_property
    def table(self) -> dict[str, Table]:
        return {table.name: table for table in self.tables}

    def main_sequence(self) -> FeatureLayout:
        """The user's first sequence that is not a slowly changing series."""
        found = next((s for s in self.sides["user"].sequences if not s.runs), None)
        if found is None:
            raise InputError("the schema has no sequence of events, from which this model learns: add one, first")
        return found

    @property
    def width(self) -> int:
        return sum(group.width for group in self.groups)

    @property
    def embedding_parameters(self) -> int:
        return sum(table.rows * table.dim for table in self.tables)

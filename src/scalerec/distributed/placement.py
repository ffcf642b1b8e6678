"""Which process holds what: tables over processes, and which of them are pooled before anything is sent."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal, Protocol

from scalerec.errors import InputError
from scalerec.features.layout import Layout, Table

Sharding = Literal["table_wise", "column_wise", "row_wise"]
COLUMNS = 4  # TorchRec takes widths that are multiples of it


class EmbeddingOptimizer(Protocol):
    """What fused updates have to know, as in `OptimizerConfig`."""

    @property
    def embedding(self) -> Literal["adagrad", "rowwise_adagrad"]: ...
    @property
    def embedding_lr(self) -> float: ...
    @property
    def embedding_eps(self) -> float: ...


def check(tables: Iterable[Table], optimizer: EmbeddingOptimizer, sharding: Sharding) -> None:
    """InputError when these tables cannot be split so, or would not train as on one process."""
    if sharding == "column_wise" and optimizer.embedding == "rowwise_adagrad":
        # One sum for each row of each shard, not for each row: no longer the optimiser of one process.
        raise InputError("row-wise Adagrad wants whole rows: shard them otherwise, or take adagrad")
    odd = next((table for table in tables if table.dim % COLUMNS), None)
    if odd is not None:
        raise InputError(f"table {odd.name!r} is {odd.dim} wide: sharded tables need a multiple of {COLUMNS}")


def place(tables: Iterable[Table], sharding: Sharding, ranks: int) -> dict[str, list[int]]:
    """The processes of each table's shards, in order: largest tables first, each to those that hold least.

    A table stays whole where it cannot be split: too narrow for columns, or too short to give every process rows.
    """
    held = [0] * ranks
    owners = {}
    for table in sorted(tables, key=lambda table: -table.rows * table.dim):
        pieces = 1
        if sharding == "column_wise":
            pieces = max(n for n in range(1, ranks + 1) if table.dim % (n * COLUMNS) == 0)
        elif sharding == "row_wise" and -(-table.rows // ranks) * (ranks - 1) < table.rows:
            pieces = ranks
        owners[table.name] = sorted(sorted(range(ranks), key=held.__getitem__)[:pieces])
        for owner in owners[table.name]:
            held[owner] += table.rows * table.dim // pieces
    return owners


def pooled_tables(layout: Layout) -> dict[str, str]:
    """The tables that only multi-valued features read, and how they pool."""
    readers: dict[str, set[str]] = {table.name: set() for table in layout.tables}
    for feature in (feature for group in layout.groups for feature in group.features):
        for table in feature.tables:
            readers[table].add(feature.pooling if feature.kind == "multi" else "")
    return {name: found.pop() for name, found in readers.items() if found in ({"mean"}, {"sum"})}

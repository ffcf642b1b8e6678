"""Sequences of items that keep coming new, drawn from a Dirichlet process (HSTU, section 4.1.1): for retrieval alone.

Items are spread over categories. At progress t of the stream (0 at its first sequence, 1 at its last) only the items
numbered below (0.4 + 0.6 t) I exist. Each sequence has up to five categories with weights H of its own and a
concentration a ~ U(1, 500): its event n (from 1) draws a category from H with probability a / (a + n - 1), otherwise it
repeats the category of one of its earlier events; its item is any of those that exist in the category.
The paper has I = 20,000 items, 100 categories and 1,000,000 sequences of length 128, of which the last tenth is tested.

S sequences   L length   C categories   K categories of one sequence
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from pydantic import NonNegativeInt, PositiveInt, model_validator

from scalerec.data.parts import ROW_GROUP, write_parts
from scalerec.data.source import Source
from scalerec.data.split import Split, TimeSplit
from scalerec.schema import Categorical, Group, Schema

AT_START = 0.4  # share of the items that exist from the beginning
MOST_CATEGORIES = 5  # K
CONCENTRATION = (1.0, 500.0)


class Dirichlet(Source):
    """A log without labels: sequence, item, its category, the second inside the sequence, the progress t."""

    kind: Literal["dirichlet"] = "dirichlet"
    split: Split = TimeSplit(column="progress", validation=0.85, test=0.9)
    items: PositiveInt = 2_000
    categories: PositiveInt = 20
    sequences: PositiveInt = 20_000
    length: PositiveInt = 64
    seed: NonNegativeInt = 0

    @model_validator(mode="after")
    def _every_category_has_items(self) -> Dirichlet:
        if self.categories > int(AT_START * self.items):
            raise ValueError(
                f"categories: {self.categories} are too many for the {AT_START * self.items:.0f} items at the start: "
                "lower them or raise `items`"
            )
        return self

    def schema(self) -> Schema:
        features = (Categorical(name="item"), Categorical(name="category", note="what drew the item; a model's helper"))
        return Schema(
            groups=(Group(name="item", side="item", features=features),), tasks=(), user="sequence", item="item",
            time="second",
        )  # fmt: skip

    def build(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        progress(f"drawing {self.sequences:,} sequences of {self.length} items")
        t, items = self.draw()
        log = pa.table(
            {
                "sequence": np.repeat(np.arange(self.sequences), self.length),
                "second": np.tile(np.arange(self.length), self.sequences),
                "item": items.reshape(-1),
                "category": items.reshape(-1) % self.categories,
                "progress": np.repeat(t, self.length),
            }
        )
        write_parts(folder, (log.slice(first, ROW_GROUP) for first in range(0, log.num_rows, ROW_GROUP)))
        return {"rows": log.num_rows, "items": len(np.unique(items)), "labels": "none: for retrieval alone"}

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """The progress of each sequence [S] and its items [S, L]; the item i is of category i mod C."""
        # Only `random()` is drawn: it is the same in every numpy version.
        random = np.random.Generator(np.random.PCG64([self.seed, *b"dirichlet"]))
        sequence = np.arange(self.sequences)
        t = sequence / max(self.sequences - 1, 1)
        exist = np.floor((AT_START + (1 - AT_START) * t) * self.items + 1e-9).astype(np.int64)

        most = min(MOST_CATEGORIES, self.categories)
        mine = np.argsort(random.random((self.sequences, self.categories)), axis=1, kind="stable")[:, :most]  # [S, K]
        how_many = 1 + (random.random(self.sequences) * most).astype(np.int64)
        weights = -np.log1p(-random.random((self.sequences, most)))  # exponential: normalised, a flat Dirichlet
        weights[np.arange(most) >= how_many[:, None]] = 0
        border = np.cumsum(weights, 1) / weights.sum(1, keepdims=True)
        low, high = CONCENTRATION
        concentration = low + (high - low) * random.random(self.sequences)

        category = np.empty((self.sequences, self.length), np.int64)
        items = np.empty_like(category)
        for n in range(self.length):
            new, of_prior, of_past, of_item = random.random((4, self.sequences))
            drawn = np.minimum((of_prior[:, None] >= border).sum(1), how_many - 1)
            fresh = new < concentration / (concentration + n)
            earlier = category[sequence, (of_past * n).astype(np.int64)]
            category[:, n] = np.where(fresh, mine[sequence, drawn], earlier)
            available = (exist - category[:, n] + self.categories - 1) // self.categories
            items[:, n] = category[:, n] + self.categories * (of_item * available).astype(np.int64)
        return t, items

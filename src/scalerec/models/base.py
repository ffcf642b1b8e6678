"""The contract of a model: user side once, candidates as rows, a loss of named terms, FLOPs in closed form.

U users   B rows   W width
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from scalerec.batch import Batch, Outputs
from scalerec.config import Component
from scalerec.errors import InputError
from scalerec.features.layout import FeatureLayout, Layout
from scalerec.layers.embedding import Embedded, EmbeddedSequence, EmbeddingCollection
from scalerec.layers.sequence import DIN, masked_mean
from scalerec.losses import Term, binary_cross_entropy


class ModelConfig(Component):
    """What a person chooses of a model; sizes that follow from the data are worked out in `build`."""

    @property
    def ranks(self) -> bool:
        """Whether the model's logits are of the tasks."""
        return True

    @property
    def retrieves(self) -> bool:
        """Whether the model also knows `queries` and a `catalogue`."""
        return False

    @abstractmethod
    def build(self, layout: Layout) -> Model:
        """The model for this layout; InputError when the two do not fit."""


class Model(nn.Module):
    """A ranking model: `forward(batch)` is one embedding lookup, then `encode_user`, then `score`.

    Both stages see embedded features and never ids: all lookups of a step are one call (a sharded table is updated
    once per step), and the dense part can be exported, compiled and cached on its own.
    """

    embeddings: EmbeddingCollection
    ranks: bool = True  # as its configuration says
    retrieves: bool = False
    exports: bool = True  # its dense part is one graph whatever the data

    def __init__(self, layout: Layout):
        super().__init__()
        if self.ranks and not layout.tasks:
            raise InputError(f"{type(self).__name__} ranks by tasks and the schema names none: give it `tasks`")
        self.layout = layout
        self.embeddings = EmbeddingCollection(layout)

    @abstractmethod
    def encode_user(self, user: Embedded) -> Any:
        """All that can be computed once per user: U rows in, a state of U rows out."""

    @abstractmethod
    def score(self, state: Any, items: Embedded, user_of_row: Tensor) -> Outputs:
        """Logits of B candidate rows, row b belonging to user `user_of_row[b]` of the state."""

    @abstractmethod
    def flops(self, batch: Batch) -> int:
        """Forward FLOPs of the matrix products for this batch (2 per multiply-accumulate), in closed form."""

    @abstractmethod
    def parts(self) -> dict[str, int]:
        """Dense parameters by part (stack, tokeniser, heads, ...); embeddings are not dense."""

    def dense(self, user: Embedded, items: Embedded, user_of_row: Tensor) -> Outputs:
        """The whole model behind the embeddings."""
        return self.score(self.encode_user(user), items, user_of_row)

    def forward(self, batch: Batch) -> Outputs:
        user, items = self.embeddings(batch.user, batch.items)
        return self.dense(user, items, batch.user_of_row)

    def loss(self, outputs: Outputs, batch: Batch) -> dict[str, Term]:
        """One cross-entropy term per task, as (sum, weight) pairs that can be added over ranks before dividing."""
        return {
            task: binary_cross_entropy(outputs.logits[:, j], batch.labels[:, j], batch.weights[:, j])
            for j, task in enumerate(self.layout.tasks)
        }

    def objective(self, batch: Batch) -> dict[str, Term]:
        """What a training step minimises; models that learn from more than the rows say so here."""
        return self.loss(self(batch), batch)

    def begin_bf16(self) -> None:
        """Called once before a training on a CPU whose matrix products are in bf16."""

    def after_step(self) -> None:
        """Called after each optimiser step, for models that move controllers of their own."""

    def diagnostics(self) -> dict[str, Any]:
        """What the log shows of the last training step beside the loss: numbers, or nested lists of them."""
        return {}

    def adopt(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights of a checkpoint as this model's, for a warm start; InputError says why they cannot be."""
        return weights

    def dense_parameters(self) -> list[nn.Parameter]:
        sparse = {id(parameter) for parameter in self.embeddings.sparse_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in sparse]


class Joined(NamedTuple):
    """The features of users and of rows before any interaction."""

    user: Tensor  # [U, W_user]
    pasts: dict[str, EmbeddedSequence]  # those that the rows will read


def module_key(name: str) -> str:
    """A feature's name as a key of a ModuleDict, which takes no dot and no name that it has itself."""
    key = name.replace("%", "%25").replace(".", "%2E")
    return f"{key}%" if hasattr(nn.ModuleDict(), key) else key


class FeatureJoin(nn.Module):
    """Concatenates a layout's features, and decides on which side each past lands.

    `din` reads a past with the candidate as query, so it is a row feature; `mean` keeps it with the user. A past whose
    query features are not on the item side falls back to the mean.
    """

    def __init__(self, layout: Layout, sequence: str):
        super().__init__()
        self.layout = layout
        items = {f.name: f for f in layout.sides["item"].flat}
        self.sequences = layout.sides["user"].sequences
        self.din = nn.ModuleDict()
        self.queries: dict[str, list[slice]] = {}
        for past in self.sequences:
            if sequence == "din" and all(name in items for name in past.query):
                self.din[module_key(past.name)] = DIN(past.width)
                self.queries[past.name] = [columns_of(layout.sides["item"].flat, name) for name in past.query]
        self.means = [past for past in self.sequences if past.name not in self.queries]
        self.user_width = layout.sides["user"].flat_width + sum(past.width for past in self.means)
        self.item_width = layout.sides["item"].flat_width + sum(
            p.width for p in self.sequences if p.name in self.queries
        )
        self.width = self.user_width + self.item_width

    def user_side(self, user: Embedded) -> Joined:
        means = [masked_mean(user.sequences[past.name]) for past in self.means]
        return Joined(torch.cat([user.flat, *means], 1), {name: user.sequences[name] for name in self.queries})

    def item_side(self, joined: Joined, items: Embedded, user_of_row: Tensor) -> Tensor:
        """[B, W_item]: the rows' own features, then one vector per past that is read by the candidate."""
        pasts = []
        for name, din in zip(self.queries, self.din.values()):
            query = torch.cat([items.flat[:, columns] for columns in self.queries[name]], 1)
            pasts.append(din(query, joined.pasts[name], user_of_row))
        return torch.cat([items.flat, *pasts], 1)

    def columns(self) -> list[tuple[str, str, FeatureLayout, int]]:
        """(side, group, feature, first column of that side) of every feature, in the order of the joined input."""
        group_of = {f.name: g.name for g in self.layout.groups for f in g.features}
        sides = {
            "user": self.layout.sides["user"].flat + self.means,
            "item": self.layout.sides["item"].flat + [p for p in self.sequences if p.name in self.queries],
        }
        found = []
        for side, features in sides.items():
            first = 0
            for feature in features:
                found.append((side, group_of[feature.name], feature, first))
                first += feature.width
        return found

    def macs(self, batch: Batch) -> int:
        total = 0
        for name, din in zip(self.queries, self.din.values()):
            assert isinstance(din, DIN)
            lengths = batch.user.lists[name].lengths
            pairs = int(lengths[batch.user_of_row].sum())
            if pairs:
                events = len(batch.user) * max(int(lengths.max()), 1)
                total += din.macs(len(batch), events, pairs)
        return total


def columns_of(features: list[FeatureLayout], name: str) -> slice:
    """Where a feature lies in the flat vector of these features."""
    first = 0
    for feature in features:
        if feature.name == name:
            return slice(first, first + feature.width)
        first += feature.width
    raise KeyError(name)


def count(*modules: nn.Module) -> int:
    """Parameters of modules."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())

"""What models on a user's life share: the main series, who predicts what from where, and retrieval over all items.

U users   B rows   E events of all users   D width   V items of the catalogue   R negatives
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from scalerec.batch import FIRST_ID, MISSING, Batch, Jagged, Outputs
from scalerec.errors import InputError
from scalerec.features.layout import FeatureLayout, Layout
from scalerec.layers.embedding import Embedded, EmbeddedSequence, EmbeddingCollection, Lookup
from scalerec.losses import Term, distinct, full_softmax, log_frequency, sampled_softmax
from scalerec.models.base import Model, ModelConfig, columns_of
from scalerec.topk import product_ranks


class SequentialConfig(ModelConfig):
    """The part that all models on sequences have."""

    dim: PositiveInt = 50
    dropout: float = Field(default=0.2, ge=0, lt=1)
    temperature: PositiveFloat = 0.05  # of the cosine between user and item
    positive: str = ""  # a task: only events with this label are to be retrieved; default: every event
    log_q: bool = False  # correct in-batch negatives for how often an item is in the batch (Yi et al., 2019)

    @property
    def ranks(self) -> bool:
        return False

    @property
    def retrieves(self) -> bool:
        return True


@dataclass(frozen=True)
class Events:
    """The main series of U users, one user's events after the other's."""

    vectors: Tensor  # [E, w]
    offsets: Tensor  # [U + 1]
    user: Tensor  # [E]
    times: Tensor | None  # [E] float64 seconds
    actions: Tensor | None  # [E, labels] 0, 1 or NaN

    @staticmethod
    def of(sequence: EmbeddedSequence) -> Events:
        mask = sequence.mask
        lengths, at = mask.sum(1), mask.flatten().nonzero()[:, 0]
        return Events(
            sequence.values.flatten(0, 1).index_select(0, at),
            torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]),
            torch.repeat_interleave(torch.arange(len(mask), device=mask.device), lengths),
            None if sequence.times is None else sequence.times[mask],
            None if sequence.actions is None else sequence.actions[mask],
        )


@dataclass(frozen=True)
class Encoded:
    """What a model made of the histories of U users."""

    at_event: Tensor  # [E, D] where the event after each one is predicted
    at_end: Tensor  # [U, D] after everything; zero for a user without history


@dataclass(frozen=True)
class Foreseen:
    """What retrieval is to foresee after which event, among what."""

    at: Tensor  # [P] events
    pool: Tensor  # [C] item ids: all that is target or negative, each once
    target: Tensor  # [P] place in the pool
    negatives: Tensor | None  # [R] or [P, R] places in the pool; None: all of it
    log_q: Tensor | None  # [C]


class SequentialModel(Model):
    """A model on the events of users; as a retriever it scores an item by the cosine with the user's vector.

    The item's vector is the row of its table, so that the whole catalogue is at hand without features.
    """

    exports: bool = False  # how many tokens there are depends on the data
    ranks_past: bool = False  # the labels of new events of the past are targets too

    def __init__(self, config: SequentialConfig, layout: Layout):
        self.ranks, self.retrieves = config.ranks, config.retrieves
        super().__init__(layout)
        self.config = config
        self.series = layout.main_sequence()
        self.item_table = layout.table[self.series.tables[0]]
        items = layout.sides["item"]
        names = [feature.name for feature in items.ids]
        absent = next((name for name in self.series.query if name not in names), None)
        if absent is not None:
            raise InputError(
                f"sequence {self.series.name!r} keeps {absent!r}, which no candidate has: move it to items"
            )
        self.item_column = names.index(self.series.query[0])
        self.query_columns = [columns_of(items.flat, name) for name in self.series.query]
        if self.retrieves and self.item_table.dim != config.dim:
            raise InputError(
                f"--model.dim {config.dim}: to retrieve, it must be the width of {self.item_table.name!r}, which is "
                f"{self.item_table.dim}: set --dim {config.dim}"
            )
        if self.retrieves and "next" in layout.tasks:
            raise InputError("a task is named 'next', as retrieval is: give it another name")
        if config.positive and config.positive not in layout.tasks:
            raise InputError(f"--model.positive {config.positive}: no such task; there are {', '.join(layout.tasks)}")

    @abstractmethod
    def encode_user(self, user: Embedded) -> Encoded: ...

    def slow_series(self) -> list[FeatureLayout]:
        """The user's slowly changing series; InputError where there is no time by which to merge them."""
        found = [series for series in self.layout.sides["user"].sequences if series.runs]
        timeless = next((series.name for series in [*found, self.series] if found and not series.time), None)
        if timeless is not None:
            raise InputError(
                f"sequence {timeless!r} keeps no times, by which {found[0].name!r} would be merged: set its `time`, or "
                "--model.auxiliary false"
            )
        return found

    def past(self, user: Embedded) -> EmbeddedSequence:
        """The main series of U users; InputError when one is longer than the model has places for."""
        found = user.sequences[self.series.name]
        if found.mask.shape[1] > self.series.max_len:
            raise InputError(
                f"a history of {found.mask.shape[1]} events where {self.series.name!r} has at most "
                f"{self.series.max_len}: keep the latest, as the encoder does"
            )
        return found

    def score(self, state: Encoded, items: Embedded, user_of_row: Tensor) -> Outputs:
        """The cosine with the user's vector over the temperature, for every task."""
        users = self.directions(state)[user_of_row]
        vectors = F.normalize(items.flat[:, self.query_columns[0]], dim=-1, eps=1e-6)
        logits = (users * vectors).sum(-1, keepdim=True) / self.config.temperature
        return Outputs(logits.float().expand(-1, len(self.layout.tasks)))

    # -- training: every past event that is new in this example, and the row itself, is a target

    def objective(self, batch: Batch) -> dict[str, Term]:
        """The loss terms of a training batch, all lookups in one call."""
        there = self.occurring(batch) if self.config.log_q else None
        batch = batch.unshared()
        goal = self.foreseen(batch, there) if self.retrieves else None
        lookups = [] if goal is None else [Lookup((self.item_table.name,), goal.pool)]
        (user, items), found = self.embeddings.embed((batch.user, batch.items), lookups)
        state = self.encode_user(user)
        terms = self.ranking_terms(state, items, batch) if self.ranks else {}
        if goal is not None:
            terms["next"] = self.next_item(state, goal, found[0])
        return terms

    def ranking_terms(self, state: Encoded, items: Embedded, batch: Batch) -> dict[str, Term]:
        """Loss terms of the tasks, for models that rank."""
        return self.loss(self.score(state, items, batch.user_of_row), batch)

    def occurring(self, batch: Batch) -> Tensor:
        """The items of histories and rows, each as often as it is there: what negatives in the batch are drawn from."""
        ids = torch.cat([batch.user.lists[self.series.name].values[:, 0], batch.items.ids[:, self.item_column]])
        return ids[ids >= FIRST_ID]

    def foreseen(self, batch: Batch, there: Tensor | None = None) -> Foreseen:
        """The events after which something is to be foreseen, and what: a new event of the past or the row.

        An event or row without the label `positive`, where one is asked for, is no target. Without negatives in the
        batch the softmax is over the whole catalogue. `there` is what negatives to be corrected were drawn from.
        """
        past = batch.user.lists[self.series.name]
        lengths, wanted = past.lengths, self.new_events(batch)
        rows = torch.ones(len(batch), dtype=torch.bool, device=lengths.device)
        if self.config.positive:
            j = self.layout.tasks.index(self.config.positive)
            rows = (batch.labels[:, j] > 0) & (batch.weights[:, j] > 0)
            if self.config.positive in self.series.actions:
                k = self.series.actions.index(self.config.positive)
                wanted = wanted & (batch.user.actions[self.series.name].values[:, k] > 0)
            elif bool(wanted.any()):
                raise InputError(
                    f"--model.positive {self.config.positive}: {self.series.name!r} does not keep what was done, so no "
                    "past event is known to be one: set --data.actions true"
                )
        ids, has_past = past.values[:, 0].roll(-1), lengths > 0
        last = past.offsets[1:][has_past] - 1
        ids[last] = batch.items.ids[has_past, self.item_column]
        wanted = wanted.roll(-1)
        wanted[last] = rows[has_past]
        at = (wanted & (ids >= FIRST_ID)).nonzero()[:, 0]
        if batch.negatives is None:
            return Foreseen(at, self.catalogue_ids(ids.device), ids[at] - FIRST_ID, None, None)
        negatives = batch.negatives[at] if batch.negatives.ndim == 2 else batch.negatives
        pool, target, negatives = distinct(self.item_table.rows, ids[at], negatives)
        log_q = None if there is None else log_frequency(there, self.item_table.rows)[pool]
        return Foreseen(at, pool, target, negatives, log_q)

    def new_events(self, batch: Batch) -> Tensor:
        """[E] bool, whether each past event is a target of this example; U = B, user by user."""
        past = batch.user.lists[self.series.name]
        if batch.new_events is None or not (self.retrieves or self.ranks_past):
            return torch.zeros(len(past.values), dtype=torch.bool, device=past.values.device)
        place = torch.arange(len(past.values), device=past.values.device)
        to_end = torch.repeat_interleave(past.offsets[1:], past.lengths) - place
        return to_end <= torch.repeat_interleave(batch.new_events, past.lengths)

    def next_item(self, state: Encoded, goal: Foreseen, pool: Tensor) -> Term:
        """Softmax over items at every event after which one is to be foreseen."""
        queries = F.normalize(state.at_event.index_select(0, goal.at).float(), dim=-1, eps=1e-6)
        pool = F.normalize(pool.float(), dim=-1, eps=1e-6)
        weights, temperature = torch.ones(len(queries), device=queries.device), self.config.temperature
        if goal.negatives is None:
            return full_softmax(queries, pool, goal.target, weights, temperature)
        return sampled_softmax(queries, pool, goal.target, goal.negatives, weights, temperature, goal.log_q)

    # -- retrieval

    def catalogue_ids(self, device: torch.device | str) -> Tensor:
        """[V] every real id of the item table."""
        return torch.arange(FIRST_ID, self.item_table.rows, device=device)

    def logits_and_places(self, batch: Batch, catalogue: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, tasks], [B, 0] of a model that does not rank, and `places` [B], histories encoded once."""
        if self.ranks:
            user, items = self.embeddings(batch.user, batch.items)
            state = self.encode_user(user)
            return self.score(state, items, batch.user_of_row).logits, self.places(state, batch, catalogue)
        (user,) = self.embeddings(batch.user)
        return batch.labels.new_zeros(len(batch), 0), self.places(self.encode_user(user), batch, catalogue)

    def queries(self, batch: Batch) -> Tensor:
        """[B, D] the unit vector of each row's user."""
        (user,) = self.embeddings(batch.user)
        return self.directions(self.encode_user(user))[batch.user_of_row]

    def directions(self, state: Encoded) -> Tensor:
        """[U, D] the unit vector of each user."""
        return F.normalize(state.at_end, dim=-1, eps=1e-6)

    def places(self, state: Encoded, batch: Batch, catalogue: Tensor) -> Tensor:
        """[B] float64, the place of each row's item among all that its user has not had (docs/generative.md).

        Infinite for an item that is not in the catalogue; NaN for a row without an item or without
        the label `positive`.
        """
        past = batch.user.lists[self.series.name].take(batch.user_of_row)
        excluded = Jagged(past.values[:, 0] - FIRST_ID, past.offsets)
        item = batch.items.ids[:, self.item_column]
        target = (item - FIRST_ID).clamp(min=-1)
        found = product_ranks(self.directions(state)[batch.user_of_row], catalogue, target, excluded)
        found[item == MISSING] = torch.nan
        if self.config.positive:
            j = self.layout.tasks.index(self.config.positive)
            found[(batch.labels[:, j] == 0) | (batch.weights[:, j] == 0)] = torch.nan
        return found

    def catalogue(self) -> Tensor:
        """[V, D] the unit vectors of all items, from the table's first real id on."""
        ids = self.catalogue_ids(next(self.parameters()).device)
        return F.normalize(self.embeddings.look_up([Lookup((self.item_table.name,), ids)])[0], dim=-1, eps=1e-6)


def start_items(embeddings: EmbeddingCollection, table: str) -> None:
    """Start a table's items as the published code does: normal with deviation 0.02, cut at two of them."""
    weight = dict(embeddings.table_weights())[table]
    with torch.no_grad():
        nn.init.trunc_normal_(weight[FIRST_ID:], std=0.02, a=-0.04, b=0.04)

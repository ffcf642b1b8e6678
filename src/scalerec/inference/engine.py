"""A request -> features -> scores, by the encoder, the history and the model that training used.

The user side is encoded once, candidates are rows beside it; requests that come together are scored by one forward
pass where the model allows it. Models that follow a history keep its state between requests (`history_cache`).

B candidates of a request   n requests
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.nn import functional as F

from scalerec.batch import Batch, Rows
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.features.hashing import hash_column
from scalerec.inference.ablation import ablated
from scalerec.inference.bundle import Bundle
from scalerec.inference.catalogue import Asked, Catalogue, column_of
from scalerec.inference.history_cache import HistoryCache
from scalerec.models.hstu import HSTU, State
from scalerec.models.sequential import SequentialModel


class Ask(NamedTuple):
    """One request with all that is known about it."""

    user: Any  # the id, as in the log
    columns: Mapping[str, Any]  # the user's row and the context of the moment, by column of the log
    history: history.State
    candidates: Sequence[Any]  # item ids, as in the log
    own: Sequence[Mapping[str, Any]] = ()  # columns that only this request knows of each candidate
    now: Any = None  # value of the schema's time column, in the log's unit


class Ranked(NamedTuple):
    """What a request gets: scores in the order in which candidates were asked."""

    scores: np.ndarray  # [B, tasks] float32 probabilities
    milliseconds: dict[str, float]  # features, user, candidates
    cached: str = ""  # outcome of the history cache


class Engine:
    """Scores requests with one bundle; may be used from several threads."""

    def __init__(self, bundle: Bundle, *, cache_bytes: int = 256 << 20, share: bool = True):
        """`cache_bytes` is the budget of users' states; without `share` every candidate brings its user along."""
        self.bundle, self.schema, self.share = bundle, bundle.encoder.schema, share
        self.tasks = tuple(bundle.layout.tasks)
        self.catalogue = Catalogue(bundle.encoder, bundle.items)
        self.cache = None
        if isinstance(bundle.model, HSTU) and cache_bytes:
            self.cache = HistoryCache(bundle.model, f"{bundle.version}-{bundle.precision}", cache_bytes)
        self._user_columns = _side_columns(self, "user")
        self._item_columns = _side_columns(self, "item")

    # -- features

    def given(self, ask: Ask) -> dict[str, Any]:
        """The columns of all candidates: defaults of the context, then the user's row and the request."""
        columns = {**self.bundle.context, **ask.columns, self.schema.user: ask.user}
        if self.schema.time is not None and ask.now is not None:
            columns[self.schema.time] = ask.now
        return columns

    def raw(self, asks: Sequence[Ask]) -> pa.RecordBatch:
        """The rows that a training log would hold of n requests, all input columns, one row a candidate."""
        user, asked = self._user_rows(asks), self._asked(asks)
        rest = [name for name in self.schema.input_columns() if name not in user.schema.names]
        items = self.catalogue.raw(rest, asked)
        repeated = user.take(pa.array(asked.request))
        return pa.RecordBatch.from_arrays([*repeated.columns, *items.columns], names=[*user.schema.names, *rest])

    def encode(self, asks: Sequence[Ask]) -> Batch:
        """n requests as a Batch, U = n, candidates one request after the other.

        Raises:
            InputError: a column does not fit; with many requests, of one of them.
        """
        encoder, asked = self.bundle.encoder, self._asked(asks)
        rows = self._user_rows(asks)
        user = encoder.encode_side(rows, "user")
        items = self.catalogue.encode(encoder, asked)
        count, tasks = len(asked.candidates), len(self.tasks)
        codes = hash_column(rows.column(self.schema.user), self.schema.user).view(np.int64)
        nothing = torch.zeros(count, tasks)
        batch = Batch(
            user, items, torch.from_numpy(asked.request), nothing, nothing,
            torch.from_numpy(codes[asked.request]), torch.arange(count),
        )  # fmt: skip
        return batch if self.share else batch.unshared()

    def _asked(self, asks: Sequence[Ask]) -> Asked:
        for ask in asks:
            if ask.own and len(ask.own) != len(ask.candidates):
                raise InputError(f"candidates: columns of {len(ask.own)} for {len(ask.candidates)} of them")
        candidates = [item for ask in asks for item in ask.candidates]
        request = np.repeat(np.arange(len(asks)), [len(ask.candidates) for ask in asks])
        own = None
        if any(ask.own for ask in asks):
            own = [row for ask in asks for row in (ask.own or [{}] * len(ask.candidates))]
        return Asked(candidates, request, [self.given(ask) for ask in asks], own)

    def _user_rows(self, asks: Sequence[Ask]) -> pa.RecordBatch:
        """The user side's columns, a row a request."""
        pasts = [history.as_columns(ask.history, self.schema) for ask in asks]
        known = [{**self.given(ask), **past} for ask, past in zip(asks, pasts)]
        arrays = [column_of(name, [columns.get(name) for columns in known]) for name in self._user_columns]
        return pa.RecordBatch.from_arrays(arrays, names=self._user_columns)

    # -- scores

    @torch.inference_mode()
    def rank(self, asks: Sequence[Ask]) -> list[Ranked]:
        """Probabilities of every task for every candidate of each request."""
        started = time.perf_counter()
        batch = self.encode(asks)
        encoded = time.perf_counter()
        ends = np.cumsum([len(ask.candidates) for ask in asks])
        features = 1e3 * (encoded - started) / max(len(asks), 1)
        if self.cache is not None and self.share:
            rows = [torch.arange(end - len(ask.candidates), end) for ask, end in zip(asks, ends)]
            return [self._follow(ask, i, batch, row, features) for i, (ask, row) in enumerate(zip(asks, rows))]
        model = self.bundle.model
        user, items = model.embeddings(batch.user, batch.items)
        state = model.encode_user(user)
        followed = time.perf_counter()
        scores = self._probabilities(model.score(state, items, batch.user_of_row).logits)
        done = time.perf_counter()
        times = {"features": features, "user": 1e3 * (followed - encoded), "candidates": 1e3 * (done - followed)}
        return [Ranked(part, times) for part in np.split(scores, ends[:-1])]

    def _follow(self, ask: Ask, number: int, batch: Batch, rows: Tensor, features: float) -> Ranked:
        """One request of a model that follows a history, whose state is kept."""
        started = time.perf_counter()
        state, outcome = self._state(ask, batch.user.take(torch.tensor([number])))
        followed = time.perf_counter()
        (items,) = self.bundle.model.embeddings(batch.items.take(rows))
        alone = torch.zeros(len(rows), dtype=torch.int64)
        scores = self._probabilities(self.bundle.model.score(state, items, alone).logits)
        done = time.perf_counter()
        times = {"features": features, "user": 1e3 * (followed - started), "candidates": 1e3 * (done - followed)}
        return Ranked(scores, times, outcome)

    def _state(self, ask: Ask, user: Rows) -> tuple[State, str]:
        assert self.cache is not None
        return self.cache.state_and_outcome((type(ask.user).__name__, ask.user), user)

    def _probabilities(self, logits: Tensor) -> np.ndarray:
        return torch.sigmoid(logits.float()).numpy()

    def fused(self, scores: np.ndarray) -> np.ndarray:
        """[B] the product over tasks of probability ** exponent (docs/architecture.md)."""
        exponents = np.array([self.bundle.fusion.get(task, 0.0) for task in self.tasks])
        return np.prod(np.maximum(scores, 1e-12).astype(np.float64) ** exponents, axis=1)

    @torch.inference_mode()
    def queries(self, asks: Sequence[Ask]) -> Tensor:
        """[n, D] unit vectors of the requests' users, by a model that retrieves."""
        model = self.bundle.model
        if not isinstance(model, SequentialModel) or not model.retrieves:
            raise InputError(f"bundle {self.bundle.name!r} does not retrieve: name one that does as the retriever")
        rows = self.bundle.encoder.encode_side(self._user_rows(asks), "user")
        if self.cache is not None:
            alone = (rows.take(torch.tensor([i])) for i in range(len(asks)))
            ends = torch.cat([self._state(ask, row)[0].at_end for ask, row in zip(asks, alone)])
        else:
            (user,) = model.embeddings(rows)
            ends = model.encode_user(user).at_end
        return F.normalize(ends.float(), dim=-1, eps=1e-6)

    @torch.inference_mode()
    def ablations(self, ask: Ask) -> dict[str, np.ndarray]:
        """What carried the scores: [B, tasks] without each token of the model, by its name, "" with all of them."""
        batch = self.encode([ask])
        return {
            name: self._probabilities(logits) for name, logits in ablated(self.bundle.model, batch, self.schema.groups)
        }


def _side_columns(engine: Engine, side: str) -> list[str]:
    """The input columns that one side reads, the user's id and the time with the user's."""
    schema = engine.schema
    alone = schema.model_copy(update={"groups": tuple(group for group in schema.groups if group.side == side)})
    names = alone.input_columns()
    return names if side == "user" else [name for name in names if name != schema.user]

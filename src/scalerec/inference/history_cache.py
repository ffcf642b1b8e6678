"""States of users between their requests, for models whose candidates follow a history (docs/generative.md).

A request pays for the tokens that came since the last one, and for the last token: it asks at the time of the request.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from scalerec.batch import Rows
from scalerec.errors import InputError
from scalerec.inference.forward_delta import Delta, Kept, forward_delta
from scalerec.models.hstu import HSTU, State


@dataclass(frozen=True)
class Counts:
    """What became of the requests, each counted once among the first seven, and what is kept now."""

    hits: int = 0  # nothing to compute but the candidates
    partial_hits: int = 0  # the kept history had grown: its settled tokens were taken over
    misses: int = 0  # nothing kept of the user
    recomputed_changed: int = 0  # from the first token that is not what it was
    recomputed_shifted: int = 0  # tokens went away in front and those behind moved up
    recomputed_model: int = 0  # kept by a model of another identity
    recomputed_production: int = 0  # the production variant, whose places and ages count from the end
    evictions: int = 0
    too_large: int = 0  # states larger than the budget: served, not kept
    tokens_reused: int = 0
    tokens_computed: int = 0
    entries: int = 0
    bytes: int = 0


COUNTED = {
    "settled": "hits", "grown": "partial_hits", "new": "misses", "changed": "recomputed_changed",
    "shifted": "recomputed_shifted", "production": "recomputed_production", "model": "recomputed_model",
}  # fmt: skip


class _Entry(NamedTuple):
    identity: str
    kept: Kept


class HistoryCache:
    """The states of the users seen last, as many as fit into a number of bytes; may be used from several threads.

    The lock is held for looking up and putting back, not while a state is computed: entries are never written to, so
    two threads that serve one user compute both and the later one's entry stays. What is kept has the dtype in which
    it was computed.
    """

    def __init__(self, model: HSTU, identity: str, budget_bytes: int):
        if budget_bytes < 0:
            raise InputError(f"budget_bytes {budget_bytes}: must be 0 (keep nothing) or more")
        self.budget_bytes = budget_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()  # least recently used first
        self._counts = Counts()
        self.use(model, identity)

    def use(self, model: HSTU, identity: str) -> None:
        """Serve with this model from now on; states of any other identity are recomputed when next asked for.

        `identity` stands for weights and configuration, see `model_identity`: equal only if every score is.
        """
        if not isinstance(model, HSTU):
            raise InputError(f"{type(model).__name__} keeps no keys and values of a history: only HSTU does")
        with self._lock:
            self._serving = (model, identity)

    def state(self, user_key: Hashable, user: Rows) -> State:
        """What `encode_user` gives for the user's row (U = 1), to 1e-5; read it, do not write to it."""
        return self.state_and_outcome(user_key, user)[0]

    def state_and_outcome(self, user_key: Hashable, user: Rows) -> tuple[State, str]:
        """The state, and the counter of `Counts` that this request raised."""
        with self._lock:
            model, identity = self._serving
            entry = self._entries.get(user_key)
        valid = entry is not None and entry.identity == identity
        delta = forward_delta(model, entry.kept if entry is not None and valid else None, user)
        outcome = "model" if entry is not None and not valid else delta.outcome
        with self._lock:
            self._put(user_key, _Entry(identity, delta.kept))
            self._count(COUNTED[outcome], delta)
        return delta.state, COUNTED[outcome]

    def forget(self, user_key: Hashable) -> None:
        """Keep nothing of a user."""
        with self._lock:
            self._drop(user_key)

    def counts(self) -> Counts:
        """The counters at this moment."""
        with self._lock:
            return self._counts

    def _put(self, user_key: Hashable, entry: _Entry) -> None:
        self._drop(user_key)
        size, counts = entry.kept.nbytes, self._counts
        if size > self.budget_bytes:
            self._counts = replace(counts, too_large=counts.too_large + 1)
            return
        self._entries[user_key] = entry
        self._counts = replace(counts, entries=counts.entries + 1, bytes=counts.bytes + size)
        while self._counts.bytes > self.budget_bytes:
            self._drop(next(iter(self._entries)))
            self._counts = replace(self._counts, evictions=self._counts.evictions + 1)

    def _drop(self, user_key: Hashable) -> None:
        entry, counts = self._entries.pop(user_key, None), self._counts
        if entry is not None:
            self._counts = replace(counts, entries=counts.entries - 1, bytes=counts.bytes - entry.kept.nbytes)

    def _count(self, name: str, delta: Delta) -> None:
        counts, computed = self._counts, len(delta.kept) - delta.reused
        self._counts = replace(
            counts, tokens_reused=counts.tokens_reused + delta.reused,
            tokens_computed=counts.tokens_computed + computed, **{name: getattr(counts, name) + 1},
        )  # fmt: skip


def model_identity(model: HSTU) -> str:
    """SHA-256 of configuration, layout and every weight: some seconds for a large model, once when it is loaded."""
    digest = hashlib.sha256(f"{model.config.model_dump_json()}\n{model.layout.model_dump_json()}".encode())
    for name, weight in sorted(model.state_dict().items()):
        digest.update(f"\n{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
        digest.update(weight.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()

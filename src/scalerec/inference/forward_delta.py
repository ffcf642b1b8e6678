"""The state of a history that has grown, from the one before: only new and unsettled tokens are computed.

A token's row, in any layer, depends on the tokens up to its own and nothing behind them: on what they are, on their
places and times, and on the time at which each one asks, which is that of the next token and for the last one the time
of the request. A row is settled when all of these are what they were. They are kept and compared one by one, not
hashed, so a row is never taken over by accident. They are compared token by token in the merged order, because an event
may enter before the end: its time can equal that of a slowly changing series.

The production variant counts places from the end and ages from the request: there a row is settled only if all are.

T tokens of one user   W numbers that tell a token   D width   H heads   K width of q and k   V width of v
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from scalerec.batch import Jagged, Rows
from scalerec.errors import InputError
from scalerec.layers.embedding import Embedded
from scalerec.layers.hstu import TIME_BUCKETS, HSTULayer
from scalerec.models.hstu import HSTU, State, Tokens
from scalerec.ops.appended_attention import appended_attention
from scalerec.ops.hstu_attention import bucket

ROWS = 256  # new tokens computed together: bounds the [ROWS, T] scores of a layer

# settled: nothing computed; grown: all that was kept is a prefix; changed: other tokens stand where kept ones did;
# shifted: kept tokens went away in front; production: places and ages count from the end; new: nothing was kept.
Outcome = Literal["settled", "grown", "changed", "shifted", "production", "new"]


@dataclass(frozen=True)
class Kept:
    """What is kept of one history: its rows in every layer, and all that they were computed from; never written to."""

    keys: list[Tensor]  # a layer: [T, H, K]
    values: list[Tensor]  # a layer: [T, H, V]
    hidden: Tensor  # [T, D] after the last layer
    told_by: Tensor  # [T, W] int64: kind, ids, actions and time of each token as the request has them
    times: Tensor  # [T] float64 seconds
    upcoming: Tensor  # [T] when each token asked
    features: Tensor  # [W_user] the user's own features as vectors, where they are prefix tokens

    def __len__(self) -> int:
        return len(self.hidden)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors; each fills its storage."""
        own = (self.hidden, self.told_by, self.times, self.upcoming, self.features)
        return sum(tensor.untyped_storage().nbytes() for tensor in (*self.keys, *self.values, *own))


class Delta(NamedTuple):
    """A state as `encode_user` gives it, what to keep of it, and how much of it was taken over."""

    state: State
    kept: Kept
    reused: int  # tokens
    outcome: Outcome


class _Asked(NamedTuple):
    """One request, as far as it is known without the layers."""

    user: Embedded
    tokens: Tokens
    told_by: Tensor  # [T, W]
    upcoming: Tensor  # [T]
    now: Tensor  # [1]
    features: Tensor  # [W_user]


@torch.no_grad()
def forward_delta(model: HSTU, kept: Kept | None, user: Rows) -> Delta:
    """The state of one user's history, equal to `model.encode_user` to 1e-5 whatever `kept` holds.

    `kept` must come from the same weights (`HistoryCache` sees to it) and any earlier history. Lists beyond the
    layout's `max_len` are cut at the front. The new state has tensors of its own: O(T) copied, little beside the
    attention that reads them, so that a state in use never changes under its reader.

    Raises:
        InputError: not one user, or the model is in training mode.
    """
    if len(user) != 1:
        raise InputError(f"a history is kept for one user at a time, not {len(user)}: take the rows one by one")
    if model.training:
        raise InputError("the model is in training mode, in which no state is worth keeping: call model.eval()")
    asked = _read(model, latest(model, user))
    reused, outcome = (0, "new") if kept is None else _settled(model, kept, asked)
    if kept is None or not reused:
        found = model.encode_user(asked.user)
        keys, values = ([_own(t) for t in layers] for layers in (found.keys, found.values))
        hidden = found.hidden
    else:
        keys, values, hidden = _extended(model, kept, asked, reused)
    tokens = asked.tokens
    at_end = hidden[-1:] if len(hidden) else hidden.new_zeros(1, hidden.shape[1])
    state = State(
        hidden[tokens.after], at_end, keys, values, tokens.offsets, tokens.times, asked.now, hidden,
        tokens.event, tokens.vectors[tokens.event],
    )  # fmt: skip
    keep = Kept(keys, values, hidden, asked.told_by, _own(tokens.times), asked.upcoming, asked.features)
    return Delta(state, keep, reused, outcome)


def latest(model: HSTU, user: Rows) -> Rows:
    """One user's row with the last `max_len` entries of every sequence, as the encoder would have cut it."""
    lists, times, actions = dict(user.lists), dict(user.times), dict(user.actions)
    for series in model.layout.sides["user"].sequences:
        if len(lists[series.name].values) > series.max_len:
            for kept in (lists, times, actions):
                if series.name in kept:
                    values = kept[series.name].values[-series.max_len :]
                    kept[series.name] = Jagged(values, torch.tensor([0, len(values)], device=values.device))
    return replace(user, lists=lists, times=times, actions=actions)


def _read(model: HSTU, user: Rows) -> _Asked:
    (embedded,) = model.embeddings(user)
    tokens = model.tokens(embedded)
    now = model.now(embedded, tokens)
    upcoming = torch.cat([tokens.times[1:], now])[: len(tokens.times)]
    features = embedded.flat[0].clone() if model.context else embedded.flat.new_empty(0)
    return _Asked(embedded, tokens, _told_by(model, user)[tokens.origin], upcoming, now, features)


def _told_by(model: HSTU, user: Rows) -> Tensor:
    """[T, W] what tells a token from any other, in the order of `Tokens.origin`; a prefix token only by its number."""
    main, acted = model.series.name, model.action is not None
    series = [main] * (2 if acted and main in user.actions and model.interleaved else 1)
    rows = []
    for kind, name in enumerate([*series, *(slow.name for slow in model.auxiliary)]):
        ids = user.lists[name].values
        parts = [torch.full_like(ids[:, :1], kind), ids]
        if name == main and acted:
            read = name in user.actions and kind == len(series) - 1  # interleaved, content is without its action
            unread = ids.new_full((len(ids), len(model.series.actions)), -1)
            parts.append(user.actions[name].values.nan_to_num(2).long() if read else unread)
        if name in user.times:
            parts.append(user.times[name].values.double().view(torch.int64)[:, None])
        rows.append(torch.cat(parts, 1))
    rows.append(-1 - torch.arange(len(model.context), device=user.ids.device)[:, None])
    width = max(part.shape[1] for part in rows)
    return torch.cat([F.pad(part, (0, width - part.shape[1])) for part in rows])


def _settled(model: HSTU, kept: Kept, asked: _Asked) -> tuple[int, Outcome]:
    """How many leading rows can be taken over, and how the history differs from the kept one."""
    before, now = len(kept), len(asked.told_by)
    shared = min(before, now)
    same = (kept.told_by[:shared] == asked.told_by[:shared]).all(1)
    alike = _leading(same) if torch.equal(kept.features, asked.features) else 0
    timed = model.timed or model.age is not None
    if timed:
        same &= kept.times[:shared] == asked.tokens.times[:shared]
        same &= kept.upcoming[:shared] == asked.upcoming[:shared]
    reused = min(_leading(same), alike)
    if reused == now and (before == now or model.config.variant == "research"):
        return reused, "settled"
    if model.config.variant == "production":
        return 0, "production"
    if alike == before:
        return reused, "grown"
    gone = alike < now and bool((kept.told_by[alike + 1 :] == asked.told_by[alike]).all(1).any())
    return reused, "shifted" if gone else "changed"


def _leading(same: Tensor) -> int:
    """How many of [n] bool are true before the first that is not."""
    return int(same.long().cumprod(0).sum())


def _extended(model: HSTU, kept: Kept, asked: _Asked, reused: int) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Keys, values and the last layer's rows: `reused` of them as they were, the rest computed."""
    tokens, n = asked.tokens, len(asked.told_by)
    keys, values = ([_grown(t, reused, n) for t in layers] for layers in (kept.keys, kept.values))
    hidden = _grown(kept.hidden, reused, n)
    places = model.positions(tokens)
    for first in range(reused, n, ROWS):
        end = min(first + ROWS, n)
        new = slice(first, end)
        x = model.enter(tokens.vectors[new], places[new], tokens.times[new], asked.now)
        index = torch.arange(end, device=x.device)
        gap = (index - index[first:, None]).clamp(max=0) + model.longest - 1  # [r, end]
        seen = None
        if model.timed:
            ago = asked.upcoming[new, None] - tokens.times[:end]
            seen = bucket(ago, TIME_BUCKETS, model.config.time_log_base)
        for layer, k_all, v_all in zip(model.layers, keys, values):
            assert isinstance(layer, HSTULayer)
            u, v_all[new], q, k_all[new] = layer.project(x)
            bias = None if layer.position is None else layer.position[gap]
            if layer.time is not None and seen is not None:
                bias = layer.time[seen] + (0 if bias is None else bias)
            attended = appended_attention(
                q, k_all[:end], v_all[:end], bias=bias, scale=1 / model.longest, alpha=model.alpha,
                normalise=model.config.attention,
            )  # fmt: skip
            x = layer.finish(x, u, attended)
        hidden[new] = x
    return keys, values, hidden


def _grown(before: Tensor, reused: int, n: int) -> Tensor:
    """[n, ...] whose first `reused` rows are those of `before`; itself if that is all."""
    if reused == n == len(before):
        return before
    grown = before.new_empty(n, *before.shape[1:])
    grown[:reused] = before[:reused]
    return grown


def _own(tensor: Tensor) -> Tensor:
    """A copy with memory of its own: what a layer returns is a view of the product that also holds q and u."""
    return tensor.clone(memory_format=torch.contiguous_format)

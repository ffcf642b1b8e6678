"""HSTU (Zhai et al., 2024, arXiv 2402.17152): a user's life as one sequence, for retrieval and for ranking.

U users   B rows   E events   T tokens of all users   D width   H heads   K width of q, k   V width of v
N the constant longest sequence
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from pydantic import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalerec.batch import Batch, Outputs
from scalerec.errors import InputError
from scalerec.features.layout import FeatureLayout, Layout
from scalerec.layers.dropout import Dropout
from scalerec.layers.embedding import Embedded
from scalerec.layers.heads import Heads, ProductHeads
from scalerec.layers.hstu import TIME_BUCKETS, HSTULayer
from scalerec.losses import Term, binary_cross_entropy
from scalerec.models.base import columns_of, count, module_key
from scalerec.models.sequential import Encoded, Events, SequentialConfig, SequentialModel, start_items
from scalerec.ops.candidate_attention import candidate_attention, candidate_pairs
from scalerec.ops.hstu_attention import AttentionPlan, attention_plan, bucket, hstu_attention
from scalerec.ops.streams import Stream, merge

Goal = Literal["retrieval", "ranking", "joint"]
POSITIONS, AGES = 8192, 2048  # rows of the production variant's tables


class HSTUConfig(SequentialConfig):
    """The research variant is the reference of all public scores; docs/generative.md says how production differs."""

    kind: str = "hstu"
    goal: Goal = "retrieval"
    variant: Literal["research", "production"] = "research"
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 1
    qk_dim: PositiveInt = 50  # of each head
    v_dim: PositiveInt = 50
    actions: Literal["interleaved", "additive", "none"] = "none"  # how past actions enter (docs/generative.md)
    auxiliary: bool = True  # merge the slowly changing series
    context: bool = True  # the user's own features as prefix tokens
    attention: Literal["silu", "softmax"] = "silu"  # softmax: the ablation, scaled by 1 / sqrt(K)
    position_bias: bool = True
    time_bias: bool = True
    time_log_base: PositiveFloat = 0.301  # the published code divides natural logarithms by log10(2)
    slack: PositiveInt = 11  # tokens that N has beyond the longest history
    head: Literal["auto", "linear", "mlp", "product"] = "auto"  # auto: as the variant, product in production, else mlp
    head_hidden: NonNegativeInt = 0  # 0: 512 of the product, else 128
    recompute: Literal["none", "linear", "layer"] = "none"  # in the backward pass: all but attention, or whole layers
    micro_batch: PositiveInt = 1024  # candidates scored together over one cached history

    @property
    def ranks(self) -> bool:
        return self.goal != "retrieval"

    @property
    def retrieves(self) -> bool:
        return self.goal != "ranking"

    def build(self, layout: Layout) -> HSTU:
        return HSTU(self, layout)

    def layer_macs(self) -> int:
        """Multiply-accumulates of a layer's two linear maps for one token."""
        inner = self.num_heads * self.v_dim
        into_out = 3 * inner if self.variant == "production" else inner
        return self.dim * (2 * inner + 2 * self.num_heads * self.qk_dim + into_out)


@dataclass(frozen=True)
class Tokens:
    """The merged series of U users, one user's tokens after the other's."""

    vectors: Tensor  # [T, D]
    offsets: Tensor  # [U + 1]
    user: Tensor  # [T]
    times: Tensor  # [T] float64 seconds; 0 where none are kept
    event: Tensor  # [E] the token of each event of the main series
    after: Tensor  # [E] the token at which the next content is foreseen: the last one before it
    origin: Tensor  # [T] each token's number before the merge: events, their actions, each slow series, the prefix


@dataclass(frozen=True)
class State(Encoded):
    """Histories as their candidates need them: keys and values of every layer, and what they are relative to."""

    keys: list[Tensor]  # a layer: [T, H, K]
    values: list[Tensor]  # a layer: [T, H, V]
    offsets: Tensor  # [U + 1]
    times: Tensor  # [T]
    now: Tensor  # [U] float64 seconds, the time of the request
    hidden: Tensor  # [T, D] after the last layer
    event: Tensor  # [E]
    content: Tensor  # [E, D] what each event entered as


class Across(NamedTuple):
    """What the layers share of one batch of histories."""

    offsets: Tensor
    plan: AttentionPlan | None
    upcoming: Tensor  # [T] the time of the token after each one
    times: Tensor


class HSTU(SequentialModel):
    """Tokens, L layers, heads: `encode_user` for histories, `score` for candidates over their keys and values."""

    config: HSTUConfig

    def __init__(self, config: HSTUConfig, layout: Layout):
        super().__init__(config, layout)
        user = layout.sides["user"]
        d, production = config.dim, config.variant == "production"
        widths = [layout.table[name].dim for name in self.series.tables]
        self.content = nn.Linear(sum(widths), d) if widths != [d] else nn.Identity()
        self.action = None
        if config.actions != "none":
            if not self.series.actions:
                raise InputError(
                    f"--model.actions {config.actions}: {self.series.name!r} does not keep what was done: set "
                    "--model.actions none or --data.actions true"
                )
            # Of each label three vectors: 0, 1 and unknown; of a candidate whose actions are to come, one.
            self.action = nn.Parameter(0.02 * torch.randn(len(self.series.actions), 3, d))
        self.to_come = None
        if self.ranks and self.action is not None and config.actions == "additive":
            self.to_come = nn.Parameter(0.02 * torch.randn(d))
        self.auxiliary = self.slow_series() if config.auxiliary else []
        self.of_auxiliary = nn.ModuleDict({module_key(s.name): nn.Linear(s.width, d) for s in self.auxiliary})
        self.context: list[FeatureLayout] = user.flat if config.context else []
        self.of_context = nn.ModuleDict({module_key(f.name): nn.Linear(f.width, d) for f in self.context})
        self.interleaved = self.action is not None and config.actions == "interleaved"
        # An additive token holds its own action: only rows can be asked. In production see `new_events`.
        self.ranks_past = self.ranks and self.interleaved and not production
        each = 2 if self.interleaved else 1
        slow = sum(series.max_len for series in self.auxiliary)
        self.longest = len(self.context) + each * self.series.max_len + slow + config.slack  # N
        self.place = nn.Parameter(torch.empty(POSITIONS if production else self.longest, d))
        nn.init.trunc_normal_(self.place, std=d**-0.5, a=-2 * d**-0.5, b=2 * d**-0.5)
        self.age = nn.Parameter(d**-0.5 * torch.randn(AGES, d)) if production and self.series.time else None
        self.dropout = Dropout(config.dropout)
        self.layers = nn.ModuleList(
            HSTULayer(
                d, config.num_heads, config.qk_dim, config.v_dim, longest=self.longest, dropout=config.dropout,
                production=production, position_bias=config.position_bias, time_bias=config.time_bias,
            ) for _ in range(config.num_layers)
        )  # fmt: skip
        self.heads = self._heads() if self.ranks else None
        self.timed = self.series.time and config.time_bias and not production
        softmax = config.attention == "softmax"
        self.alpha = config.qk_dim**-0.5 if softmax or production else 1.0
        start_items(self.embeddings, self.item_table.name)

    # -- histories

    def encode_user(self, user: Embedded) -> State:
        """Histories of U users through all layers; keys and values are kept for candidates."""
        tokens = self.tokens(user)
        now = self.now(user, tokens)
        x = self.enter(tokens.vectors, self.positions(tokens), tokens.times, now[tokens.user])
        has = (tokens.offsets.diff() > 0).nonzero()[:, 0]
        ends = tokens.offsets[1:][has] - 1
        upcoming = tokens.times.roll(-1)  # each token asks at the time of the next one, the last one now
        upcoming[ends] = now[has]
        asked = {"query_times": upcoming, "key_times": tokens.times} if self.timed else {}
        plan = None  # of the fast path alone
        if tokens.times.device.type == "cpu" and self.config.attention == "silu":
            plan = attention_plan(
                tokens.offsets, **asked, buckets=TIME_BUCKETS, time_log_base=self.config.time_log_base,
                dtype=torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype,
            )  # fmt: skip
        across = Across(tokens.offsets, plan, upcoming, tokens.times)
        keys, values = [], []
        for layer in self.layers:
            assert isinstance(layer, HSTULayer)
            if self.config.recompute == "layer" and self.training:
                x, k, v = checkpoint(self.through, layer, x, across, use_reentrant=False)  # type: ignore[misc]
            else:
                x, k, v = self.through(layer, x, across)
            keys.append(k)
            values.append(v)
        at_end = x.new_zeros(len(now), x.shape[1]).index_copy(0, has, x[ends])
        return State(
            x.index_select(0, tokens.after), at_end, keys, values, tokens.offsets, tokens.times, now, x, tokens.event,
            tokens.vectors.index_select(0, tokens.event),
        )  # fmt: skip

    def through(self, layer: HSTULayer, x: Tensor, across: Across) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, D] through one layer, with its keys and values."""
        again = self.config.recompute == "linear" and self.training
        u, v, q, k = checkpoint(layer.project, x, use_reentrant=False) if again else layer.project(x)  # type: ignore
        attended = hstu_attention(
            q, k, v, across.offsets, scale=1 / self.longest, alpha=self.alpha, position=layer.position,
            time=layer.time if self.timed else None, query_times=across.upcoming, key_times=across.times,
            time_log_base=self.config.time_log_base, plan=across.plan, normalise=self.config.attention,
        )  # fmt: skip
        if again:
            return checkpoint(layer.finish, x, u, attended, use_reentrant=False), k, v  # type: ignore[return-value]
        return layer.finish(x, u, attended), k, v

    def enter(self, vectors: Tensor, positions: Tensor, times: Tensor, now: Tensor) -> Tensor:
        """Token vectors [n, D] with their place (and age), scaled and dropped out."""
        x = vectors * self.config.dim**0.5 + self.place.index_select(0, positions)
        if self.age is not None:
            x = x + self.age.index_select(0, ((now - times).clamp(min=0) / 60).sqrt().long().clamp(max=AGES - 1))
        return self.dropout(x)

    def positions(self, tokens: Tokens) -> Tensor:
        """[T] the place of each token: from the start, or in the production variant from the candidate backwards."""
        place = torch.arange(len(tokens.user), device=tokens.user.device) - tokens.offsets[:-1][tokens.user]
        if self.config.variant == "production":
            return (tokens.offsets.diff()[tokens.user] - place).clamp(max=POSITIONS - 1)
        return place

    def now(self, user: Embedded, tokens: Tokens) -> Tensor:
        """[U] seconds; without a time of request, that of the last token."""
        if user.now is not None:
            return user.now
        last = tokens.offsets[1:] - 1
        padded = torch.cat([tokens.times, tokens.times.new_zeros(1)])
        return torch.where(tokens.offsets.diff() > 0, padded[last], 0.0)

    def tokens(self, user: Embedded) -> Tokens:
        """Prefix, main series and slowly changing ones merged by time (docs/generative.md).

        At equal times a slow series comes after the content: its change is known only once that event is in the past,
        so a training position sees what the same request would see.
        """
        events = Events.of(self.past(user))
        vectors = self.content(events.vectors)
        times = events.times if events.times is not None else vectors.new_zeros(len(vectors), dtype=torch.float64)
        acted = self._acted(events)
        if acted is not None and self.config.actions == "additive":
            vectors, acted = vectors + acted, None
        if not self.auxiliary and not self.context and acted is None:
            index = torch.arange(len(vectors), device=vectors.device)
            return Tokens(vectors, events.offsets, events.user, times, index, index, index)
        return self._merged(user, events, vectors, times, acted)

    def _merged(self, user: Embedded, events: Events, vectors: Tensor, times: Tensor, acted: Tensor | None) -> Tokens:
        users, prefix, device = len(events.offsets) - 1, len(self.context), vectors.device
        index = torch.arange(len(vectors), device=device)
        streams = [Stream(vectors, events.user, times, 1, 2 * index)]
        if acted is not None:
            streams.append(Stream(acted, events.user, times, 1, 2 * index + 1))
        for series, into in zip(self.auxiliary, self.of_auxiliary.values()):
            past = Events.of(user.sequences[series.name])
            assert past.times is not None  # chosen so
            place = torch.arange(len(past.user), device=device)
            streams.append(Stream(into(past.vectors), past.user, past.times, 2, place))
        everyone = torch.arange(users, device=device)
        before = torch.full((users,), -torch.inf, dtype=torch.float64, device=device)
        user_side = self.layout.sides["user"].flat
        for j, (feature, into) in enumerate(zip(self.context, self.of_context.values())):
            own = into(user.flat[:, columns_of(user_side, feature.name)])
            streams.append(Stream(own, everyone, before, 0, torch.full_like(everyone, j)))
        tokens = merge(streams, users)
        # The prefix happens at the first event, without one at the request.
        first = torch.cat([tokens.times, tokens.times.new_zeros(1)])[tokens.offsets[:-1] + prefix]
        now = torch.zeros_like(first) if user.now is None else user.now
        first = torch.where(tokens.offsets.diff() > prefix, first, now)
        times = torch.where(tokens.times.isinf(), first[tokens.user], tokens.times)
        event = tokens.at[: len(vectors)]
        after = event.roll(-1) - 1
        has = events.offsets.diff() > 0
        after[events.offsets[1:][has] - 1] = tokens.offsets[1:][has] - 1
        return Tokens(tokens.vectors, tokens.offsets, tokens.user, times, event, after, tokens.order)

    def _heads(self) -> Heads | ProductHeads:
        config, tasks = self.config, len(self.layout.tasks)
        kind = config.head if config.head != "auto" else "product" if config.variant == "production" else "mlp"
        if kind == "product":
            return ProductHeads(config.dim, tasks, config.head_hidden or 512)
        return Heads(config.dim, tasks, kind, config.head_hidden or 128)

    def new_events(self, batch: Batch) -> Tensor:
        """None in the production variant: places and ages there are relative to the one request."""
        found = super().new_events(batch)
        return torch.zeros_like(found) if self.config.variant == "production" else found

    def _acted(self, events: Events) -> Tensor | None:
        """[E, D] the sum over labels of the vector of their value; None where actions are not used."""
        if self.action is None or events.actions is None:
            return None
        known = events.actions.nan_to_num(2).long()
        return sum(self.action[k][known[:, k]] for k in range(known.shape[1]))  # type: ignore[return-value]

    # -- candidates

    def score(self, state: State, items: Embedded, user_of_row: Tensor) -> Outputs:
        """Logits of candidates that each follow their user's history alone (M-FALCON, section 3.4)."""
        if self.heads is None:
            return super().score(state, items, user_of_row)
        step = self.config.micro_batch if len(state.now) == 1 else max(len(user_of_row), 1)
        parts = []
        for first in range(0, max(len(user_of_row), 1), step):
            flat = items.flat[first : first + step]
            content = self.content(torch.cat([flat[:, columns] for columns in self.query_columns], 1))
            x = self.follow(state, content, user_of_row[first : first + step])
            parts.append(self.logits(x, content))
        return Outputs(torch.cat(parts))

    def logits(self, x: Tensor, content: Tensor) -> Tensor:
        """[n, tasks] of tokens [n, D] after the last layer and the content [n, D] that each of them is."""
        assert self.heads is not None
        return self.heads(x, content) if isinstance(self.heads, ProductHeads) else self.heads(x)

    def follow(self, state: State, content: Tensor, user_of_row: Tensor) -> Tensor:
        """Candidates [B, D] through all layers over the cached histories -> [B, D]."""
        x = content if self.to_come is None else content + self.to_come
        lengths = state.offsets.diff()
        now = state.now[user_of_row]
        place = torch.zeros_like(user_of_row) if self.config.variant == "production" else lengths[user_of_row]
        x = self.enter(x, place, now, now)
        user = torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)
        ago = torch.arange(len(user), device=user.device) - state.offsets[1:][user]  # j - n: -1 for the last token
        seen = None
        if self.timed:
            seen = bucket(state.now[user] - state.times, TIME_BUCKETS, self.config.time_log_base)
        for layer, keys, values in zip(self.layers, state.keys, state.values):
            assert isinstance(layer, HSTULayer)
            u, v, q, k = layer.project(x)
            bias, own = None, None
            if layer.position is not None:
                bias, own = layer.position[ago + self.longest - 1], layer.position[self.longest - 1]
            if layer.time is not None and seen is not None:
                bias = layer.time[seen] + (0 if bias is None else bias)
                own = layer.time[0] + (0 if own is None else own)
            attended = candidate_attention(
                q, k, v, keys, values, state.offsets, user_of_row, bias=bias, own_bias=own, scale=1 / self.longest,
                alpha=self.alpha, normalise=self.config.attention,
            )  # fmt: skip
            x = layer.finish(x, u, attended)
        return x

    def ranking_terms(self, state: State, items: Embedded, batch: Batch) -> dict[str, Term]:
        """Cross entropy of every task at the rows and, interleaved, at every new event of their past."""
        terms = self.loss(self.score(state, items, batch.user_of_row), batch)
        if not self.ranks_past:
            return terms
        at = self.new_events(batch).nonzero()[:, 0]
        logits = self.logits(state.hidden[state.event[at]], state.content[at])
        labels = batch.user.actions[self.series.name].values[at]
        for j, task in enumerate(self.layout.tasks):
            if task in self.series.actions:
                label = labels[:, self.series.actions.index(task)]
                term = binary_cross_entropy(logits[:, j], label, (~label.isnan()).float())
                terms[task] = Term(terms[task].sum + term.sum, terms[task].weight + term.weight)
        return terms

    def flops(self, batch: Batch) -> int:
        """A token and layer: two linear maps; a pair of tokens that see each other: H (K + V), as each candidate's.

        Heads work at every row and, in training, at every new event whose labels are a target.
        """
        config, user = self.config, batch.user
        lengths = user.lists[self.series.name].lengths
        events = int(lengths.sum())
        tokens = lengths * (2 if self.interleaved else 1)
        tokens = tokens + len(self.context)
        macs = len(lengths) * sum(feature.width for feature in self.context) * config.dim
        content = self.content.weight.numel() if isinstance(self.content, nn.Linear) else 0
        macs += events * content
        for series in self.auxiliary:
            past = user.lists[series.name].lengths
            tokens = tokens + past
            macs += int(past.sum()) * series.width * config.dim
        pair = config.num_heads * (config.qk_dim + config.v_dim)
        pairs = int((tokens * (tokens + 1) // 2).sum())
        if config.attention == "softmax":  # the ablation is computed padded
            pairs = len(tokens) * int(tokens.max()) ** 2 if len(tokens) else 0
        linear = config.layer_macs()
        macs += config.num_layers * (int(tokens.sum()) * linear + pairs * pair)
        if self.heads is not None:
            rows = len(batch)
            offsets = torch.cat([tokens.new_zeros(1), tokens.cumsum(0)])
            asked = rows + (int(self.new_events(batch.unshared()).sum()) if self.ranks_past else 0)
            macs += asked * self.heads.macs + rows * (content + config.num_layers * linear)
            macs += config.num_layers * pair * candidate_pairs(offsets, batch.user_of_row)
        return 2 * macs

    def parts(self) -> dict[str, int]:
        tokens = count(self.content, self.of_auxiliary, self.of_context)
        own = (self.place, self.age, self.action, self.to_come)
        return {
            "stack": count(self.layers),
            "tokens": tokens + sum(p.numel() for p in own if p is not None),
            "heads": 0 if self.heads is None else count(self.heads),
        }


def tiny() -> HSTUConfig:
    return HSTUConfig(goal="joint", dim=8, qk_dim=8, v_dim=8, actions="interleaved")

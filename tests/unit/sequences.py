"""Small layouts, random histories and awake models: what tests of models on sequences start from."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from scalerec.batch import Batch, Jagged, Rows
from scalerec.features.layout import FeatureLayout, GroupLayout, Layout, Table
from scalerec.models.hstu import HSTU, HSTUConfig, State
from scalerec.models.sequential import SequentialModel

ITEMS, TABS, CITIES = 30, 8, 9
NOW, DAY = 1.1e9, 86_400.0
RESEARCH: dict[str, Any] = {"dim": 8, "qk_dim": 6, "v_dim": 5, "num_heads": 2, "slack": 3}


def layout(context: bool = False, slow: bool = False, max_len: int = 12) -> Layout:
    events = FeatureLayout(
        name="events", kind="sequence", width=8, tables=("item",), query=("item",), max_len=max_len, time=True,
        actions=("like",),
    )  # fmt: skip
    tabs = FeatureLayout(
        name="tabs", kind="sequence", width=8, tables=("tab",), query=("tab",), max_len=5, time=True, runs=True
    )
    city = FeatureLayout(name="city", kind="id", width=8, tables=("city",))
    item = FeatureLayout(name="item", kind="id", width=8, tables=("item",))
    tab = FeatureLayout(name="tab", kind="id", width=8, tables=("tab",))
    groups = [GroupLayout(name="context", side="user", features=(city,))] if context else []
    groups.append(GroupLayout(name="past", side="user", features=(events, tabs) if slow else (events,)))
    groups.append(GroupLayout(name="item", side="item", features=(item, tab)))
    tables = (Table(name="item", rows=ITEMS, dim=8), Table(name="tab", rows=TABS, dim=8))
    return Layout(
        tables=(*tables, Table(name="city", rows=CITIES, dim=8)), groups=tuple(groups), tasks=("like",)
    )  # fmt: skip


def jagged(values: Tensor, lengths: list[int]) -> Jagged:
    return Jagged.from_lengths(values, torch.tensor(lengths))


def moments(lengths: list[int], generator: torch.Generator) -> Tensor:
    return torch.cat(
        [1e9 + 60 * torch.randint(0, 10**6, (n,), generator=generator).double().sort()[0] for n in lengths]
    )


def batch(
    lengths: list[int], rows_of: list[int] | None = None, context: bool = False, slow: list[int] | None = None,
    seed: int = 0, new: list[int] | None = None,
) -> Batch:  # fmt: skip
    """Random histories of these lengths and a row for each number in `rows_of` (default: one for each user)."""
    draw = torch.Generator().manual_seed(seed)
    users, total = len(lengths), sum(lengths)
    rows_of = list(range(users)) if rows_of is None else rows_of
    lists = {"events": jagged(torch.randint(3, ITEMS, (total, 1), generator=draw), lengths)}
    times = {"events": jagged(moments(lengths, draw), lengths)}
    actions = {"events": jagged(torch.randint(0, 2, (total, 1), generator=draw).float(), lengths)}
    if slow is not None:
        lists["tabs"] = jagged(torch.randint(3, TABS, (sum(slow), 1), generator=draw), slow)
        times["tabs"] = jagged(moments(slow, draw), slow)
    ids = torch.randint(3, CITIES, (users, 1 if context else 0), generator=draw)
    now = torch.full((users,), NOW, dtype=torch.float64)
    user = Rows("user", ids, torch.zeros(users, 0), lists, times, actions, now)
    n = len(rows_of)
    pairs = torch.stack([torch.randint(3, high, (n,), generator=draw) for high in (ITEMS, TABS)], 1)
    items = Rows("item", pairs, torch.zeros(n, 0), {}, {})
    ones = torch.ones(n, 1)
    labels = torch.randint(0, 2, (n, 1), generator=draw).float()
    new_events = torch.tensor(new if new is not None else [0] * n)
    return Batch(user, items, torch.tensor(rows_of), labels, ones, torch.arange(n), torch.arange(n), new_events)


def awake(config: Any, of: Layout) -> Any:
    """A model in evaluation mode whose weights are all far from zero."""
    torch.manual_seed(1)
    model = config.build(of)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def alone(model: SequentialModel, whole: Batch) -> Tensor:
    return torch.cat([model(whole.take(torch.tensor([b]))).logits for b in range(len(whole))])


def state_of(model: HSTU, of: Batch) -> State:
    return model.encode_user(model.embeddings(of.user)[0])


def changed_event(of: Batch, event: int, item: int | None = None, label: float | None = None) -> Batch:
    """The batch with the item or the label of one past event replaced."""
    lists, actions = of.user.lists["events"], of.user.actions["events"]
    if item is not None:
        lists = replace(lists, values=lists.values.clone().index_fill_(0, torch.tensor([event]), item))
    if label is not None:
        actions = replace(actions, values=actions.values.clone().index_fill_(0, torch.tensor([event]), label))
    user = replace(of.user, lists={**of.user.lists, "events": lists}, actions={"events": actions})
    return replace(of, user=user)


def model_of(context: bool = False, slow: bool = False, max_len: int = 12, **options: Any) -> HSTU:
    return awake(HSTUConfig(**{"goal": "ranking", **RESEARCH, **options}), layout(context, slow, max_len))


def life(events: int, slow: int | None = None, seed: int = 0, context: bool = False) -> Rows:
    """One user's events at few different times, so that many are equal; `slow` entries of the slow series."""
    user = batch([events], context=context, slow=None if slow is None else [slow], seed=seed).user
    coarse = {name: replace(past, values=past.values // (30 * DAY) * (30 * DAY)) for name, past in user.times.items()}
    return replace(user, times=coarse)


def first(user: Rows, events: int, slow: int | None = None, now: float = NOW) -> Rows:
    """The user after so many events and slow entries, asking at `now`."""
    many = {"events": events, "tabs": slow}

    def cut(kept: dict[str, Jagged]) -> dict[str, Jagged]:
        return {
            name: jagged(past.values[: many[name]], [len(past.values[: many[name]])]) for name, past in kept.items()
        }

    moment = torch.tensor([now], dtype=torch.float64)
    return replace(user, lists=cut(user.lists), times=cut(user.times), actions=cut(user.actions), now=moment)


def full(model: HSTU, user: Rows) -> State:
    with torch.no_grad():
        return model.encode_user(model.embeddings(user)[0])


def assert_same(found: State, expected: State) -> None:
    """To 1e-5 of the largest value: an entry near zero is what is left of such ones."""
    for field in fields(State):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        for a, b in zip(one, other, strict=True) if isinstance(one, list) else [(one, other)]:
            largest = float(b.abs().max()) if b.numel() else 0.0
            torch.testing.assert_close(a, b, atol=1e-5 * max(largest, 1.0), rtol=1e-5)

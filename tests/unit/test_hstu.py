"""HSTU against docs/generative.md: causality, masks, candidates that see their history and nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from scalerec.batch import Jagged
from scalerec.errors import InputError
from scalerec.features.layout import FeatureLayout, GroupLayout, Layout, Table
from scalerec.layers.heads import Heads, ProductHeads
from scalerec.models.base import module_key
from scalerec.models.hstu import HSTUConfig
from scalerec.models.sasrec import SASRecConfig
from scalerec.models.two_tower import TwoTowerConfig
from scalerec.ops.candidate_attention import candidate_attention, candidate_attention_reference, candidate_pairs
from tests.contract.contract import KernelsCounted
from tests.unit.sequences import RESEARCH, alone, awake, batch, changed_event, jagged, layout, state_of

VARIANTS = [
    {"variant": variant, "attention": attention, "actions": actions}
    for variant in ("research", "production")
    for attention in ("silu", "softmax")
    for actions in ("interleaved", "additive", "none")
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize(("context", "slow"), [(False, None), (True, [2, 1, 0, 3])], ids=["plain", "merged"])
def test_a_candidate_scores_alone_as_among_others(options: dict, context: bool, slow: list[int] | None):
    """M-FALCON's promise, for histories of 0, some and N events, and any micro-batch (HSTU section 3.4)."""
    of = layout(context, slow is not None)
    whole = batch([4, 0, 7, 12], [2, 0, 1, 2, 3, 2, 0], context, slow)
    model = awake(HSTUConfig(goal="ranking", **RESEARCH, **options), of)
    expected = alone(model, whole)
    torch.testing.assert_close(model(whole).logits, expected, atol=1e-5, rtol=1e-5)
    request = whole.take(torch.tensor([0, 3, 5]))
    assert len(request.user) == 1
    for micro in (1, 2, 3, 64):
        model.config = model.config.model_copy(update={"micro_batch": micro})
        torch.testing.assert_close(model(request).logits, expected[[0, 3, 5]], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("actions", ["interleaved", "none"])
@pytest.mark.parametrize("attention", ["silu", "softmax"])
@pytest.mark.parametrize(("context", "slow"), [(False, None), (True, [2, 1, 0, 3]), (True, None)])
def test_a_candidate_is_the_next_event_of_its_history(
    actions: str, attention: str, context: bool, slow: list[int] | None
):
    """Scored over cached keys and values, or put at the end of the sequence: the same."""
    options: dict[str, Any] = {"actions": actions, "attention": attention}
    of = layout(context, slow is not None, max_len=13)
    whole = batch([4, 0, 7, 12], None, context, slow)
    model = awake(HSTUConfig(goal="ranking", **RESEARCH, **options), of)
    user, rows = whole.user, torch.arange(4)

    def with_row(past: Jagged, last: Tensor) -> Jagged:
        return Jagged.cat([
            jagged(torch.cat([past.take(rows[u : u + 1]).values, last[u : u + 1]]), [int(past.lengths[u]) + 1])
            for u in range(4)
        ])  # fmt: skip

    assert user.now is not None
    lists = {**user.lists, "events": with_row(user.lists["events"], whole.items.ids[:, :1])}
    times = {**user.times, "events": with_row(user.times["events"], user.now)}
    acts = {"events": with_row(user.actions["events"], torch.full((4, 1), torch.nan))}
    longer = replace(whole, user=replace(user, lists=lists, times=times, actions=acts))
    state = state_of(model, longer)
    last = longer.user.lists["events"].offsets[1:] - 1
    assert model.heads is not None
    torch.testing.assert_close(model.heads(state.hidden[state.event[last]]), model(whole).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("config", [
    HSTUConfig(dim=8, qk_dim=6, v_dim=5, num_heads=2, actions="additive"), SASRecConfig(dim=8),
    TwoTowerConfig(dim=8, hidden=(16,)),
], ids=lambda config: config.kind)  # fmt: skip
def test_no_event_sees_a_later_one(config: Any):
    model = awake(config, layout())
    whole = batch([9, 5])
    before = model.encode_user(model.embeddings(whole.user)[0]).at_event
    after = model.encode_user(model.embeddings(changed_event(whole, 6, item=3, label=1.0).user)[0]).at_event
    assert torch.equal(before[:6], after[:6])
    torch.testing.assert_close(before[9:], after[9:])
    assert not torch.allclose(before[6:9], after[6:9])


def test_an_action_is_seen_from_the_next_event_on():
    """Flipping a_i changes nothing at content i and the prediction at content i + 1."""
    model = awake(HSTUConfig(goal="ranking", actions="interleaved", **RESEARCH), layout())
    whole = batch([9, 5])
    other = changed_event(whole, 4, label=1 - float(whole.user.actions["events"].values[4]))
    before, after = (state.hidden[state.event] for state in (state_of(model, whole), state_of(model, other)))
    assert torch.equal(before[:5], after[:5])
    assert not torch.allclose(before[5], after[5])


@pytest.mark.parametrize("actions", ["interleaved", "additive"])
def test_labels_of_rows_do_not_reach_their_scores(actions: Any, monkeypatch: pytest.MonkeyPatch):
    """In training, where they are at hand: flipped, they change what the scores are held against and no score."""
    model = awake(HSTUConfig(goal="ranking", actions=actions, **RESEARCH), layout())
    whole = batch([9, 5], new=[9, 5])
    logits, scored = model.logits, []

    def noted(*args: Any) -> Tensor:
        scored[-1].append(logits(*args))
        return scored[-1][-1]

    monkeypatch.setattr(model, "logits", noted)
    terms = []
    for labels in (whole.labels, 1 - whole.labels):
        scored.append([])
        terms.append(model.objective(replace(whole, labels=labels))["like"])
    before, after = (torch.cat(parts) for parts in scored)
    assert len(before) == terms[0].weight == (2 + 9 + 5 if actions == "interleaved" else 2)
    assert torch.equal(before, after)
    assert terms[0].sum != terms[1].sum


def test_events_without_history_or_label_count_as_they_should():
    """Interleaved, every new event with a label is a target beside the row; additive, the row alone."""
    whole = batch([9, 5, 0], new=[4, 9, 0])
    whole = changed_event(whole, 6, label=float("nan"))
    for actions, targets in (("interleaved", 3 + 3 + 5), ("additive", 3)):
        config = HSTUConfig(goal="ranking", actions=actions, **RESEARCH)  # type: ignore[arg-type]
        assert awake(config, layout()).objective(whole)["like"].weight == targets


def test_retrieval_foresees_new_events_and_the_row():
    """An event that is not new, not positive or not in the catalogue is no target."""
    whole = batch([5, 3, 0], new=[2, 3, 0])
    events = whole.user.lists["events"].values[:, 0]
    model = awake(HSTUConfig(dim=8, qk_dim=6, v_dim=5), layout())
    found = model.foreseen(whole)
    # User 0: events 3 and 4 are new, foreseen after 2 and 3, the row after 4. User 1: all but the first, and the row.
    assert found.at.tolist() == [2, 3, 4, 5, 6, 7]
    rows = whole.items.ids[:, 0]
    expected = [events[3], events[4], rows[0], events[6], events[7], rows[1]]
    assert found.pool[found.target].tolist() == [int(value) for value in expected]
    assert model.objective(whole)["next"].weight == 6

    unknown = changed_event(whole, 4, item=1)
    assert model.foreseen(unknown).at.tolist() == [2, 4, 5, 6, 7]
    liked = awake(HSTUConfig(dim=8, qk_dim=6, v_dim=5, positive="like"), layout())
    actions = torch.tensor([1, 1, 1, 0, 1, 1, 0, 1.0])[:, None]
    past = replace(whole.user, actions={"events": jagged(actions, [5, 3, 0])})
    wanted = replace(whole, user=past, labels=torch.tensor([[0.0], [1.0], [1.0]]))
    assert liked.foreseen(wanted).at.tolist() == [3, 6, 7]


def test_actions_that_are_not_kept_are_refused():
    silent = layout()
    past = silent.sides["user"].sequences[0].model_copy(update={"actions": ()})
    silent = silent.model_copy(
        update={"groups": (silent.groups[0].model_copy(update={"features": (past,)}), *silent.groups[1:])}
    )
    with pytest.raises(InputError, match=r"--model.actions additive: 'events' does not keep .* --data.actions true"):
        HSTUConfig(actions="additive", **RESEARCH).build(silent)
    liked = HSTUConfig(positive="like", **RESEARCH).build(silent)
    liked.objective(batch([5]))  # the row alone
    with pytest.raises(InputError, match=r"--model.positive like: 'events' does not keep .* --data.actions true"):
        liked.objective(batch([5], new=[2]))


def test_frequencies_are_of_what_negatives_are_drawn_from():
    """A user whose rows are many is in the batch once."""
    whole = batch([1, 8], rows_of=[0] * 8 + [1], new=[0] * 9)
    lists = {"events": jagged(torch.tensor([[5]] + [[6]] * 8), [1, 8])}
    items = replace(whole.items, ids=torch.full_like(whole.items.ids, 7))
    whole = replace(whole, user=replace(whole.user, lists=lists), items=items, negatives=torch.tensor([5, 6]))
    model = awake(HSTUConfig(dim=8, qk_dim=6, v_dim=5, log_q=True), layout())
    found = model.foreseen(whole.unshared(), model.occurring(whole))
    share = dict(zip(found.pool.tolist(), found.log_q.exp().tolist()))
    assert share == pytest.approx({5: 1 / 18, 6: 8 / 18, 7: 9 / 18})


def test_the_next_content_is_foreseen_from_the_token_before_it():
    """Behind a slow series too: a content followed by another token is asked there, as a request would."""
    whole = batch([3], slow=[1], new=[3])
    times = {
        "events": jagged(torch.tensor([1.0, 2.0, 4.0]).double(), [3]),
        "tabs": jagged(torch.tensor([3.0]).double(), [1]),
    }
    whole = replace(whole, user=replace(whole.user, times=times))
    model = awake(HSTUConfig(dim=8, qk_dim=6, v_dim=5), layout(slow=True))
    assert model.tokens(model.embeddings(whole.user)[0]).after.tolist() == [0, 2, 3]
    assert model.objective(whole)["next"].weight == 3
    times["tabs"] = jagged(torch.tensor([6.0]).double(), [1])
    ends = replace(whole, user=replace(whole.user, times=times))
    state = state_of(model, ends)
    assert torch.equal(state.at_event[-1:], state.at_end)  # the slow token, which is what scoring reads


@pytest.mark.parametrize(
    ("goal", "actions", "head"),
    [("ranking", "interleaved", "mlp"), ("ranking", "interleaved", "product"), ("retrieval", "none", "auto")],
)
def test_training_asks_what_scoring_answers(goal: Any, actions: Any, head: Any):
    """A past target gets what a request at its time would: the history before it, cut out and scored as a row."""
    of = layout(context=True, slow=True)
    whole = batch([9], slow=[3], context=True, new=[9])
    model = awake(HSTUConfig(goal=goal, actions=actions, head=head, **RESEARCH), of)
    state, user = state_of(model, whole), whole.user
    for event in range(1, 9):
        when = user.times["events"].values[event]
        before = {"events": torch.arange(9) < event, "tabs": user.times["tabs"].values < when}
        lists, times, actions = (
            {k: jagged(v.values[before[k]], [int(before[k].sum())]) for k, v in held.items()}
            for held in (user.lists, user.times, user.actions)
        )
        past = replace(user, lists=lists, times=times, actions=actions, now=when[None])
        ids = torch.cat([user.lists["events"].values[event], whole.items.ids[0, 1:]])[None]
        asked = replace(whole, user=past, items=replace(whole.items, ids=ids))
        if goal == "ranking":
            found = model.logits(state.hidden[state.event[event : event + 1]], state.content[event : event + 1])
            expected = model(asked).logits
        else:
            found, expected = state.at_event[event - 1 : event], state_of(model, asked).at_end
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_the_production_variant_learns_from_rows_alone():
    """Its places and ages are relative to one request: a past target would be asked from its future."""
    model = awake(HSTUConfig(goal="joint", actions="interleaved", variant="production", **RESEARCH), layout())
    terms = model.objective(batch([9, 5, 0], new=[9, 5, 0]))
    assert terms["like"].weight == 3 and terms["next"].weight == 2


def test_features_may_have_any_name():
    """A ModuleDict takes no dot, and no name of its own."""
    plain = layout(context=True, slow=True)
    names = {"city": "type", "tabs": "session.tabs", "events": "items"}
    groups = [
        group.model_copy(update={"features": tuple(
            feature.model_copy(update={"name": names.get(feature.name, feature.name)}) for feature in group.features
        )}) for group in plain.groups
    ]  # fmt: skip
    odd = HSTUConfig(**RESEARCH).build(plain.model_copy(update={"groups": tuple(groups)}))
    assert {*odd.of_context, *odd.of_auxiliary} == {"type%", "session%2Etabs"}
    assert {*HSTUConfig(**RESEARCH).build(plain).of_context} == {"city"}
    keys = [module_key(name) for name in ("a", "a.b", "a%2Eb", "items", "items%", "training", "of")]
    assert len(set(keys)) == len(keys)
    nn.ModuleDict({key: nn.Identity() for key in keys})


@pytest.mark.parametrize("timeless", [0, 1])
def test_a_slow_series_is_merged_or_refused_never_left_out(timeless):
    there = layout(slow=True)
    past = there.groups[0]
    series = list(past.features)
    series[timeless] = series[timeless].model_copy(update={"time": False})
    groups = (past.model_copy(update={"features": tuple(series)}), *there.groups[1:])
    there = there.model_copy(update={"groups": groups})
    words = rf"'{series[timeless].name}' keeps no times, by which 'tabs' would be merged.*--model.auxiliary false"
    with pytest.raises(InputError, match=words):
        HSTUConfig(**RESEARCH).build(there)
    assert not HSTUConfig(auxiliary=False, **RESEARCH).build(there).auxiliary


def test_a_history_longer_than_the_model_knows_is_refused():
    whole = batch([13])
    for config in (HSTUConfig(dim=8, qk_dim=6, v_dim=5), SASRecConfig(dim=8), TwoTowerConfig(dim=8, hidden=(16,))):
        with pytest.raises(InputError, match="a history of 13 events where 'events' has at most 12"):
            awake(config, layout())(whole)


def test_streams_are_merged_by_time():
    """Prefix first, content with its action behind it, a slow series after content of the same time."""
    whole = batch([2], slow=[2], context=True)
    times = {
        "events": jagged(torch.tensor([5.0, 7.0]).double(), [2]),
        "tabs": jagged(torch.tensor([5.0, 6.0]).double(), [2]),
    }
    whole = replace(whole, user=replace(whole.user, times=times))
    model = awake(HSTUConfig(goal="joint", actions="interleaved", **{**RESEARCH, "num_heads": 1}), layout(True, True))
    tokens = model.tokens(model.embeddings(whole.user)[0])
    # city, item 0, its action, tab 0, tab 1, item 1, its action
    assert tokens.times.tolist() == [5, 5, 5, 5, 6, 7, 7]
    assert tokens.event.tolist() == [1, 5]
    assert tokens.after.tolist() == [4, 6]


def test_layers_computed_again_in_the_backward_pass_give_the_same():
    whole = batch([9, 5, 0], new=[9, 5, 0])
    grown = []
    for recompute in ("none", "linear", "layer"):
        model = awake(
            HSTUConfig(goal="joint", actions="interleaved", recompute=recompute, dropout=0, **RESEARCH), layout()
        )
        model.train()
        sum(term.sum for term in model.objective(whole).values()).backward()
        grown.append([p.grad.to_dense() for p in model.parameters() if p.grad is not None])
    for one, *others in zip(*grown):
        for other in others:
            torch.testing.assert_close(one, other)


def test_parameters_are_the_published_ones():
    """Of the stack: 26.2 thousand in two layers of the small model, 104.8 in eight of the large one, 30.6 in SASRec."""
    events = FeatureLayout(
        name="events", kind="sequence", width=50, tables=("item",), query=("item",), max_len=200, time=True
    )
    item = FeatureLayout(name="item", kind="id", width=50, tables=("item",))
    groups = (
        GroupLayout(name="past", side="user", features=(events,)),
        GroupLayout(name="item", side="item", features=(item,)),
    )
    of = Layout(tables=(Table(name="item", rows=3953, dim=50),), groups=groups, tasks=("like",))
    small = HSTUConfig(dim=50).build(of)
    assert small.parts() == {"stack": 26_200 // 100 * 100 + small.parts()["stack"] % 100, "tokens": 10_550, "heads": 0}
    assert small.parts()["stack"] == 2 * (2 * 50 * 100 + 50 * 50 + 50 + 421 + 129) == 26_200
    large = HSTUConfig(dim=50, num_layers=8, num_heads=2, qk_dim=25, v_dim=25).build(of)
    assert large.parts()["stack"] == 104_800
    assert round(SASRecConfig(dim=50).build(of).parts()["stack"], -2) == 30_600


def test_a_table_of_another_width_cannot_retrieve():
    with pytest.raises(InputError, match="--dim 16"):
        HSTUConfig(dim=16).build(layout())


@pytest.mark.parametrize("normalise", ["silu", "softmax"])
@pytest.mark.parametrize(
    ("users", "rows_of"),
    [(1, [0] * 6), (3, [2, 0, 1, 0, 2, 2]), (3, [0, 2, 1, *[2] * 11]), (4, [2] * 5)],
    ids=["one user", "even", "one with most rows", "one with all rows"],
)
def test_candidate_attention_is_its_plain_twin(normalise: Any, users: int, rows_of: list[int]):
    torch.manual_seed(0)
    lengths = torch.tensor([4, 0, 7, 2][:users])
    offsets = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
    user_of_row = torch.tensor(rows_of, dtype=torch.long)
    total, rows = int(lengths.sum()), len(rows_of)
    shapes = [(rows, 2, 3), (rows, 2, 3), (rows, 2, 5), (total, 2, 3), (total, 2, 5), (total,), ()]
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    *tensors, bias, own = given
    options: dict[str, Any] = {"bias": bias, "own_bias": own, "scale": 0.1, "alpha": 0.7, "normalise": normalise}
    found = candidate_attention(*tensors, offsets, user_of_row, **options)
    expected = candidate_attention_reference(*tensors, offsets, user_of_row, **options)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for one, other in zip(
        torch.autograd.grad((found * weight).sum(), given), torch.autograd.grad((expected * weight).sum(), given)
    ):
        torch.testing.assert_close(one, other)


def test_one_user_with_most_rows_costs_no_more_than_its_rows():
    """Joined requests of one large and many small: what is allocated and multiplied is bounded by rows, not users."""
    users, rows, length = 128, 256, 30
    offsets = length * torch.arange(users + 1)
    keys, values = torch.randn(2, users * length, 2, 8)
    q, k, v = torch.randn(3, rows, 2, 8)
    found = {}
    for name, user_of_row in {
        "even": torch.arange(rows) % users, "heavy": (torch.arange(rows) - users).clamp(min=0),
    }.items():  # fmt: skip
        with LargestTensor() as watch, FlopCounterMode(display=False) as counter:
            candidate_attention(q, k, v, keys, values, offsets, user_of_row)
        assert counter.get_total_flops() == 2 * 2 * (8 + 8) * candidate_pairs(offsets, user_of_row)
        found[name] = watch.largest, counter.get_total_flops()
    assert all(heavy <= 3.5 * even for even, heavy in zip(found["even"], found["heavy"])), found


class LargestTensor(TorchDispatchMode):
    """Notes how many numbers the largest tensor has that any operation gave."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self.largest = max(self.largest, x.numel())
        return out


def test_the_production_variant_multiplies_user_and_item():
    """Its head unless another is asked for: Linear 512 -> x sigmoid(LN(x)) -> tasks of the product (Meta's code)."""
    of, whole = layout(), batch([4, 0, 7], [0, 1, 2, 2])
    default, production, plain = (
        HSTUConfig(goal="ranking", **RESEARCH, **options)
        for options in ({}, {"variant": "production"}, {"variant": "production", "head": "mlp"})
    )
    assert isinstance(awake(default, of).heads, Heads) and isinstance(awake(plain, of).heads, Heads)
    model = awake(production, of)
    heads = model.heads
    assert isinstance(heads, ProductHeads) and heads.inner.out_features == 512
    assert model.parts()["heads"] == 2 * 16 + 9 * 512 + 2 * 512 + 513
    assert heads.macs == 9 * 512
    state, (items,) = state_of(model, whole), model.embeddings(whole.items)
    content = items.flat[:, :8]
    h = heads.inner(heads.user(model.follow(state, content, whole.user_of_row)) * heads.item(content))
    expected = heads.out(h * torch.sigmoid(heads.norm(h)))
    torch.testing.assert_close(model(whole).logits, expected)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(whole).logits
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, atol=0.05 * (1 + expected.abs().max().item()), rtol=0)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(o.values()))
def test_flops_are_those_of_a_training_step(options: dict):
    """Heads at new events of the past too, where these are targets (forward, as torch counts)."""
    whole = batch([9, 5, 0, 7], context=True, slow=[2, 0, 1, 3], new=[4, 5, 0, 2])
    for head in ("mlp", "product"):
        model = awake(HSTUConfig(goal="ranking", head=head, **RESEARCH, **options), layout(True, True))
        kernel = KernelsCounted()
        with FlopCounterMode(display=False) as counter, kernel, torch.no_grad():
            terms = model.objective(whole)
        assert model.flops(whole) == counter.get_total_flops() + kernel.flops
        assert terms["like"].weight == (15 if model.ranks_past else 4)
        assert model.flops(whole) - model.flops(replace(whole, new_events=None)) == (
            2 * 11 * model.heads.macs if model.ranks_past else 0
        )

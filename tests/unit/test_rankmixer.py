"""RankMixer against its formulas: mixing, per-token layers, tokens, the block, DIN, and the published sizes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scalerec.errors import InputError
from scalerec.features.layout import FeatureLayout, GroupLayout, Layout, Table
from scalerec.layers.embedding import Embedded, EmbeddedSequence
from scalerec.layers.sequence import DIN, masked_mean
from scalerec.layers.tokenizer import Tokenizer, TokenizerKind, equal_chunks
from scalerec.models import rankmixer
from scalerec.models.rankmixer import PerTokenFFN, RankMixer, RankMixerBlock, RankMixerConfig
from scalerec.ops.per_token import per_token_linear, per_token_linear_reference
from scalerec.ops.token_mixing import revert_mixing, token_mixing, token_mixing_reference
from tests.contract import contract
from tests.contract.contract import Check, Maker
from tests.contract.world import World, make_world


def layout(user: list[int], item: list[int]) -> Layout:
    """Two user groups and two item groups, with id features of these widths dealt out in turn."""
    groups, tables = [], []
    for side, widths in (("user", user), ("item", item)):
        for number in range(2):
            features = []
            for width in widths[number::2]:
                name = f"{side}{len(tables)}"
                tables.append(Table(name=name, rows=5, dim=width))
                features.append(FeatureLayout(name=name, kind="id", width=width, tables=(name,)))
            groups.append(GroupLayout(name=f"{side}_{number}", side=side, features=tuple(features)))
    return Layout(tables=tuple(tables), groups=tuple(groups), tasks=("finish", "skip"))


WIDE = layout([16] * 11, [16] * 9)  # E_in = 320


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """All parameters drawn anew, in float64: no zero bias and no unit scale hides a mistake."""
    generator = torch.Generator().manual_seed(7)
    module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return module


# -- token mixing (eq. 3-5)

shapes = st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1, 6), st.integers(1, 4)).map(
    lambda s: (s[0], s[1], s[2], s[2] * s[3])  # B, T, H, D
)


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_mixing_moves_each_head_to_its_token(shape):
    batch, tokens, heads, dim = shape
    x = torch.arange(batch * tokens * dim, dtype=torch.float64).view(batch, tokens, dim)
    mixed = token_mixing(x, heads)
    width = dim // heads
    assert mixed.shape == (batch, heads, tokens * width)
    for h in range(heads):
        for t in range(tokens):
            assert torch.equal(mixed[:, h, t * width : (t + 1) * width], x[:, t, h * width : (h + 1) * width])
    assert torch.equal(mixed, token_mixing_reference(x, heads))


@given(shapes)
@settings(deadline=None, max_examples=60)
def test_mixing_is_a_permutation_that_is_reverted_in_value_and_gradient(shape):
    batch, tokens, heads, dim = shape
    x = torch.arange(batch * tokens * dim, dtype=torch.float64).view(batch, tokens, dim).requires_grad_()
    with FlopCounterMode(display=False) as counter:
        mixed = token_mixing(x, heads)
    assert counter.get_total_flops() == 0
    assert torch.equal(mixed.flatten(1).sort().values, x.flatten(1).sort().values)
    assert torch.equal(revert_mixing(mixed, tokens), x)
    upstream = torch.randn(mixed.shape, dtype=torch.float64)
    (gradient,) = torch.autograd.grad(mixed, x, upstream)
    assert torch.equal(gradient, revert_mixing(upstream, tokens))


@pytest.mark.parametrize(("tokens", "dim"), [(1, 3), (4, 8), (8, 64), (16, 48)])
def test_mixing_twice_is_nothing_when_there_are_as_many_heads_as_tokens(tokens, dim):
    x = torch.randn(3, tokens, dim)
    once = token_mixing(x, tokens)
    assert torch.equal(token_mixing(once, tokens), x)
    assert tokens == 1 or not torch.equal(once, x)
    torch.testing.assert_close(once.flatten(1).norm(dim=1), x.flatten(1).norm(dim=1))


# -- per-token layers


@pytest.mark.parametrize(("tokens", "rows", "inner", "outer"), [(1, 1, 1, 1), (4, 7, 5, 3), (3, 0, 2, 2)])
def test_per_token_linear_is_its_reference(tokens, rows, inner, outer):
    arguments = [
        torch.randn(shape, dtype=torch.float64, requires_grad=True)
        for shape in ((tokens, rows, inner), (tokens, inner, outer), (tokens, outer))
    ]
    found, expected = per_token_linear(*arguments), per_token_linear_reference(*arguments)
    torch.testing.assert_close(found, expected)
    upstream = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(y, arguments, upstream) for y in (found, expected))):
        torch.testing.assert_close(one, other)


def test_per_token_linear_in_single_precision_is_near_double():
    x, weight, bias = torch.randn(6, 9, 32), torch.randn(6, 32, 17), torch.randn(6, 17)
    exact = per_token_linear_reference(x.double(), weight.double(), bias.double())
    torch.testing.assert_close(per_token_linear(x, weight, bias).double(), exact, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("shared", [False, True])
def test_ffn_is_its_formula(shared):
    ffn = randomised(PerTokenFFN(tokens=3, dim=4, hidden=6, shared=shared))
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    expected = torch.stack([ffn_of_token(ffn, x[:, t], 0 if shared else t) for t in range(3)], 1)
    torch.testing.assert_close(ffn(x), expected)


def ffn_of_token(ffn: PerTokenFFN, x: Tensor, t: int) -> Tensor:
    """v = GELU(x W1 + b1) W2 + b2 (eq. 6-9), GELU with the error function."""
    hidden = x @ ffn.up[t] + ffn.up_bias[t]
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    return hidden @ ffn.down[t] + ffn.down_bias[t]


def test_slices_are_initialised_with_their_own_fans():
    torch.manual_seed(0)
    ffn = PerTokenFFN(tokens=8, dim=50, hidden=150)
    bound = math.sqrt(6 / (50 + 150))
    for weight in (ffn.up, ffn.down):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert abs(weight.std() - bound / math.sqrt(3)) < 0.02 * bound
    assert not ffn.up_bias.any() and not ffn.down_bias.any()


# -- the block (eq. 1)


def layer_norm(x: Tensor, norm: torch.nn.LayerNorm) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return norm.weight * centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + 1e-5) + norm.bias


def mix_by_hand(x: Tensor, heads: int) -> Tensor:
    batch, tokens, dim = x.shape
    width = dim // heads
    out = x.new_zeros(batch, heads, tokens * width)
    for h in range(heads):
        for t in range(tokens):
            out[:, h, t * width : (t + 1) * width] = x[:, t, h * width : (h + 1) * width]
    return out


@pytest.mark.parametrize("shared", [False, True])
def test_block_normalises_after_each_residual(shared):
    block = randomised(RankMixerBlock(RankMixerConfig(dim=8, num_tokens=4, ffn_dim=6, shared_ffn=shared)))
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    s = layer_norm(mix_by_hand(x, 4) + x, block.mixed_norm)
    v = torch.stack([ffn_of_token(block.ffn, s[:, t], 0 if shared else t) for t in range(4)], 1)
    torch.testing.assert_close(block(x), layer_norm(v + s, block.norm))


@pytest.mark.parametrize("heads", [1, 2, 8])
def test_block_with_other_heads_transforms_mixed_tokens_and_reverts(heads):
    block = randomised(RankMixerBlock(RankMixerConfig(dim=8, num_tokens=4, ffn_dim=6, num_heads=heads)))
    x = torch.randn(5, 4, 8, dtype=torch.float64)
    mixed = mix_by_hand(x, heads)
    mixed = torch.stack([ffn_of_token(block.mixed_ffn, mixed[:, h], h) for h in range(heads)], 1)
    s = layer_norm(mix_by_hand(mixed, 4) + x, block.mixed_norm)
    v = torch.stack([ffn_of_token(block.ffn, s[:, t], t) for t in range(4)], 1)
    torch.testing.assert_close(block(x), layer_norm(v + s, block.norm))


def test_dropout_acts_in_training_only():
    block = RankMixerBlock(RankMixerConfig(dim=8, num_tokens=4, ffn_dim=6, dropout=0.5))
    x = torch.randn(5, 4, 8)
    assert not torch.equal(block(x), block(x))
    block.eval()
    assert torch.equal(block(x), block(x))


def test_heads_see_the_mean_of_the_last_tokens():
    model = RankMixerConfig(dim=8, num_tokens=4, ffn_dim=6, head="linear").build(WIDE)
    seen = []
    model.blocks[-1].register_forward_hook(lambda _, __, x: seen.append(x))
    model.heads.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    model.dense(Embedded(torch.randn(2, 176), {}), Embedded(torch.randn(3, 144), {}), torch.tensor([0, 1, 1]))
    torch.testing.assert_close(seen[1], seen[0].sum(1) / 4)
    assert not torch.equal(seen[1][1], seen[1][2])


def test_every_layer_is_used_in_turn():
    model = RankMixerConfig(dim=8, num_tokens=4, ffn_dim=6, num_layers=3).build(WIDE)
    inputs = Embedded(torch.randn(2, 176), {}), Embedded(torch.randn(2, 144), {}), torch.arange(2)
    x = model.tokenizer(model.tokenizer.user_tokens(inputs[0].flat), inputs[0].flat, inputs[1].flat, inputs[2])
    for block in model.blocks:
        x = block(x)
    torch.testing.assert_close(model.dense(*inputs).logits, model.heads(x.mean(1)))


# -- tokens (eq. 2)


def tokenizer(of: Layout, tokens: int, kind: TokenizerKind = "equal", dim: int = 5) -> Tokenizer:
    columns, first = [], {"user": 0, "item": 0}
    for group in of.groups:
        for feature in group.features:
            columns.append((group.side, group.name, feature, first[group.side]))
            first[group.side] += feature.width
    torch.manual_seed(0)
    found = Tokenizer(columns, tokens, dim, kind)
    randomised(found)
    return found


def all_tokens(tokens: Tokenizer, user: Tensor, item: Tensor) -> Tensor:
    return tokens(tokens.user_tokens(user), user, item, torch.arange(len(user)))


widths = st.lists(st.integers(1, 9), min_size=2, max_size=6)


@given(widths, widths, st.integers(2, 12))
@settings(deadline=None, max_examples=60)
def test_equal_tokens_are_affine_maps_of_chunks(user, item, count):
    of = layout(user, item)
    maps = tokenizer(of, count)
    inputs = {side: torch.randn(3, sum(w), dtype=torch.float64) for side, w in (("user", user), ("item", item))}
    found = all_tokens(maps, inputs["user"], inputs["item"])
    assert found.shape == (3, count, 5)
    width = smallest_width(sum(user), sum(item), count)
    expected = []
    for side, x in inputs.items():
        layer = maps.sides[side]
        assert layer.weight.shape[1] == width
        padded = torch.cat([x, x.new_zeros(3, layer.count * width - x.shape[1])], 1)
        for t in range(layer.count):
            expected.append(padded[:, t * width : (t + 1) * width] @ layer.weight[t] + layer.bias[t])
    torch.testing.assert_close(found, torch.stack(expected, 1))
    assert maps.sides["user"].count == -(-sum(user) // width)


def smallest_width(user: int, item: int, tokens: int) -> int:
    return next(c for c in range(1, user + item + 1) if -(-user // c) + -(-item // c) <= tokens)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(2, 20))
def test_chunks_cover_each_side_once_at_the_smallest_width(user, item, count):
    chunks = equal_chunks({"user": user, "item": item}, count)
    width = smallest_width(user, item, count)
    assert len(chunks["user"]) + len(chunks["item"]) == count
    for side, total in (("user", user), ("item", item)):
        spans = [span for token in chunks[side] for span in token]
        assert spans == [(i * width, (i + 1) * width) for i in range(len(spans))]
        assert spans[-1][1] >= total
    assert len(chunks["user"]) == -(-user // width)


@pytest.mark.parametrize("kind", ["equal", "group", "group+global"])
def test_a_user_token_never_sees_a_row(kind):
    of = layout([3, 4, 2], [5, 1, 6])
    maps = tokenizer(of, {"equal": 6, "group": 4, "group+global": 5}[kind], kind)
    user = torch.randn(2, 9, dtype=torch.float64, requires_grad=True)
    item = torch.randn(2, 12, dtype=torch.float64, requires_grad=True)
    found = all_tokens(maps, user, item)
    sides = [side for side, _ in maps.describe()]
    assert len(sides) == found.shape[1] and sides == sorted(sides, reverse=True)
    for t, side in enumerate(sides):
        of_user, of_item = torch.autograd.grad(found[:, t].square().sum(), [user, item], retain_graph=True)
        everything = kind == "group+global" and t == len(sides) - 1
        assert of_user.any() == (side == "user" or everything)
        assert of_item.any() == (side == "item")


def test_the_padded_tail_has_no_influence_and_no_gradient():
    maps = tokenizer(layout([7], [9]), 5)  # chunks of 4: one column is padding on the user side, three on the item side
    user, item = torch.randn(3, 7, dtype=torch.float64), torch.randn(3, 9, dtype=torch.float64)
    before = all_tokens(maps, user, item)
    before.square().sum().backward()
    for side, real in (("user", 3), ("item", 1)):
        weight = maps.sides[side].weight
        assert weight.grad[-1, :real].all() and not weight.grad[-1, real:].any()
        with torch.no_grad():
            weight[-1, real:] = 1e6
    assert torch.equal(all_tokens(maps, user, item), before)


def test_group_tokens_see_their_group_and_the_global_token_everything():
    of = layout([3, 4, 2], [5, 1, 6])  # groups of widths 5, 4, 11, 1
    spans = [("user", 0, 5), ("user", 5, 9), ("item", 0, 11), ("item", 11, 12)]
    user, item = torch.randn(3, 9, dtype=torch.float64), torch.randn(3, 12, dtype=torch.float64)
    for kind, count in (("group", 4), ("group+global", 5)):
        maps = tokenizer(of, count, kind)
        found = all_tokens(maps, user, item)
        layers = [*maps.sides["user"].maps, *maps.sides["item"].maps]
        for t, ((side, a, b), layer) in enumerate(zip(spans, layers)):
            x = {"user": user, "item": item}[side][:, a:b]
            torch.testing.assert_close(found[:, t], x @ layer.weight.T + layer.bias)
        if kind == "group+global":
            layer = maps.everything
            torch.testing.assert_close(found[:, 4], torch.cat([user, item], 1) @ layer.weight.T + layer.bias)


@pytest.mark.parametrize(("kind", "count", "right"), [("group", 5, 4), ("group", 3, 4), ("group+global", 4, 5)])
def test_a_wrong_number_of_group_tokens_is_refused(kind, count, right):
    with pytest.raises(InputError, match=rf"--model.tokenizer {kind.replace('+', '.')} .*set it to {right}"):
        tokenizer(layout([3, 4], [5, 6]), count, kind)


def test_too_few_tokens_are_refused():
    with pytest.raises(InputError, match=r"--model\.num_tokens 1 is too few"):
        tokenizer(layout([3, 4], [5, 6]), 1)


def test_tokens_are_described_by_their_features():
    maps = tokenizer(layout([3, 3], [4, 6]), 4)  # chunks of 5
    assert maps.describe() == [
        ("user", ["user0", "user1[0:2]"]),
        ("user", ["user1[2:3]"]),
        ("item", ["item2", "item3[0:1]"]),
        ("item", ["item3[1:6]"]),
    ]


@pytest.mark.parametrize(
    ("config", "option"),
    [
        (RankMixerConfig(dim=65, num_tokens=8), "num_tokens 8"),
        (RankMixerConfig(dim=64, num_tokens=8, num_heads=7), "num_heads 7"),
    ],
)
def test_a_width_that_does_not_divide_is_refused(config, option):
    with pytest.raises(InputError, match=f"--model.dim {config.dim} .*--model.{option}") as error:
        config.build(WIDE)
    suggested = int(str(error.value).rsplit(" ", 1)[1])
    config.model_copy(update={"dim": suggested, "ffn_dim": 4}).build(WIDE)


# -- sizes (eq. 12)

PRESETS = {
    # name: D, T, L, F, million weights in the matrices of the stack, 2 L T D F
    "tiny": (64, 8, 2, 128, 0.26),
    "small": (128, 16, 2, 256, 2.1),
    "base": (256, 16, 2, 720, 11.8),
    "rankmixer_100m": (768, 16, 2, 2160, 106.2),
    "rankmixer_1b": (1536, 32, 2, 5592, 1099.5),
}


def on_meta(config: RankMixerConfig) -> RankMixer:
    with torch.device("meta"):
        return config.build(WIDE)


@pytest.mark.parametrize("name", PRESETS)
def test_parameters_of_the_presets(name):
    dim, tokens, layers, hidden, millions = PRESETS[name]
    config = getattr(rankmixer, name)()
    model = on_meta(config)
    assert all(parameter.is_meta for parameter in model.parameters())
    stack = layers * (tokens * (2 * dim * hidden + hidden + dim) + 4 * dim)
    chunk = smallest_width(176, 144, tokens)
    parts = {
        "stack": stack,
        "tokeniser": tokens * (chunk * dim + dim),
        "sequence": 0,
        "heads": 2 * (dim * 128 + 128 + 128 + 1),
    }
    assert model.parts() == parts
    assert config.stack_parameters() == stack
    assert config.stack_macs() / 1e6 == pytest.approx(millions, rel=0.01)
    assert 0 < stack / (1e6 * millions) - 1 < 0.03  # biases and norms


def test_macs_of_the_large_presets():
    # GFLOP of a forward pass over 512 rows, 4 L T D F FLOPs each (docs/models.md)
    assert round(512 * 2 * rankmixer.rankmixer_100m().stack_macs() / 1e9, 1) == 108.7
    assert round(512 * 2 * rankmixer.rankmixer_1b().stack_macs() / 1e9) == 1126


@pytest.mark.parametrize("name", PRESETS)
def test_a_shared_ffn_has_a_part_of_the_parameters_and_all_the_work(name):
    own = getattr(rankmixer, name)()
    shared = own.model_copy(update={"shared_ffn": True})
    both = [sum(p.numel() for p in on_meta(config).blocks[0].ffn.parameters()) for config in (own, shared)]
    assert both[0] == own.num_tokens * both[1]
    counted = []
    for config in (own, shared):
        block = on_meta(config).blocks[0]
        with FlopCounterMode(display=False) as counter:
            block(torch.empty(3, config.num_tokens, config.dim, device="meta"))
        counted.append(counter.get_total_flops())
    assert counted[0] == counted[1] == 3 * 2 * own.stack_macs() // own.num_layers


def test_self_attention_instead_of_mixing_would_cost_72_percent():
    config = rankmixer.rankmixer_100m()
    tokens, dim = config.num_tokens, config.dim
    x = torch.empty(1, tokens, dim, device="meta")
    with torch.device("meta"):
        query, key, value, out = (torch.nn.Linear(dim, dim) for _ in range(4))
    with FlopCounterMode(display=False) as counter:
        out(torch.softmax(query(x) @ key(x).transpose(1, 2), -1) @ value(x))
    more = counter.get_total_flops() / (2 * config.stack_macs() / config.num_layers)
    assert abs(100 * more - 71.8) < 0.1


def test_the_published_latency_follows_from_our_size():
    # latency = parameters * FLOPs per parameter / (MFU * peak); fp16 doubles the peak. 2106 G is for 1.1 B parameters.
    flops = 2106 * rankmixer.rankmixer_1b().stack_parameters() / 1.1e9
    ratio = (flops / 107) / (2 * 44.57 / 4.47)
    assert abs(ratio - 0.987) < 0.001
    assert abs(ratio - 14.3 / 14.5) < 0.002


# -- the whole model, in the variants that no preset has


@pytest.fixture(scope="module")
def world() -> World:
    return make_world()


VARIANTS = {
    "revert": RankMixerConfig(dim=32, num_tokens=8, ffn_dim=24, num_heads=4),
    "revert_more_heads": RankMixerConfig(dim=32, num_tokens=4, ffn_dim=24, num_heads=16),
    "group": RankMixerConfig(dim=30, num_tokens=5, ffn_dim=24, tokenizer="group"),
    "group_mean": RankMixerConfig(dim=32, num_tokens=4, ffn_dim=24, tokenizer="group", sequence="mean"),
    "global": RankMixerConfig(dim=30, num_tokens=6, ffn_dim=24, tokenizer="group+global"),
    "shared_position": RankMixerConfig(dim=32, num_tokens=8, ffn_dim=24, shared_ffn=True, position=True),
    "more_tokens_than_columns": RankMixerConfig(dim=128, num_tokens=128, ffn_dim=8),
}


@pytest.mark.parametrize(
    "check",
    [
        contract.check_row_alone,
        contract.check_users_shared,
        contract.check_state_ignores_items,
        contract.check_scored_in_pieces,
        contract.check_flops,
        contract.check_parts,
        contract.check_gradients,
    ],
)
@pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS)
def test_variants_keep_the_contract(check: Check, config: RankMixerConfig, world: World):
    check(Maker(config, world.encoder.layout), world)


# -- DIN (arXiv 1706.06978)


def din_by_hand(din: DIN, query: Tensor, keys: Tensor) -> Tensor:
    """One candidate [w] over its real events [n, w]: a_j = MLP([q, k_j, q - k_j, q * k_j]), out = sum_j a_j k_j."""
    out = torch.zeros_like(query)
    for k in keys:
        hidden = torch.cat([query, k, query - k, query * k]) @ din.weight.flatten(0, 1) + din.bias
        for prelu, layer in zip(din.prelu, (din.second, din.last)):
            hidden = torch.where(hidden > 0, hidden, prelu.weight * hidden)
            hidden = layer.weight @ hidden + layer.bias
        out = out + hidden * k
    return out


def pasts(lengths: list[int], width: int) -> EmbeddedSequence:
    """Random events for each user, zero after the last one."""
    mask = torch.arange(max(1, *lengths)) < torch.tensor(lengths)[:, None]
    values = torch.randn(len(lengths), mask.shape[1], width, dtype=torch.float64)
    return EmbeddedSequence(values * mask[:, :, None], mask)


def test_din_is_its_formula():
    din = randomised(DIN(width=3, hidden=(5, 4)))
    past = pasts([2, 0, 3], 3)
    user_of_row = torch.tensor([2, 0, 0, 1, 2])
    query = torch.randn(5, 3, dtype=torch.float64)
    expected = [din_by_hand(din, query[b], past.values[u][past.mask[u]]) for b, u in enumerate(user_of_row)]
    for found in (din(query, past, user_of_row), din.padded(query, past, user_of_row)):
        torch.testing.assert_close(found, torch.stack(expected))
        assert not found[3].any()


@given(st.lists(st.integers(0, 4), min_size=2, max_size=5), st.data())
@settings(deadline=None, max_examples=30)
def test_din_is_its_padded_twin_in_value_and_gradient(lengths, data):
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=6))
    din = randomised(DIN(width=3, hidden=(5, 4)))
    past, user_of_row = pasts(lengths, 3), torch.tensor(rows)
    query = torch.randn(len(rows), 3, dtype=torch.float64, requires_grad=True)
    past.values.requires_grad_()
    wanted = [query, past.values, *din.parameters()]
    found, expected = din(query, past, user_of_row), din.padded(query, past, user_of_row)
    torch.testing.assert_close(found, expected)
    if not past.mask[user_of_row].any():
        assert not found.any()
        return
    upstream = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad(y, wanted, upstream, allow_unused=True) for y in (found, expected))):
        torch.testing.assert_close(one, other)


def test_an_event_beyond_the_mask_does_not_count():
    din = randomised(DIN(width=3, hidden=(5, 4)))
    past = pasts([2, 0], 3)
    query, user_of_row = torch.randn(3, 3, dtype=torch.float64), torch.tensor([0, 1, 1])
    garbage = EmbeddedSequence(past.values.masked_fill(~past.mask[:, :, None], 1e3), past.mask)
    torch.testing.assert_close(din(query, garbage, user_of_row), din(query, past, user_of_row))
    torch.testing.assert_close(din.padded(query, garbage, user_of_row), din(query, past, user_of_row))


def test_mean_of_a_past():
    past = pasts([3, 0, 1], 2)
    expected = [past.values[0].sum(0) / 3, torch.zeros(2, dtype=torch.float64), past.values[2, 0]]
    torch.testing.assert_close(masked_mean(past), torch.stack(expected))

"""Fewer bits: each kind of weight against its definition, whole models against fp32, and what memory they take."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from scalerec.batch import FIRST_ID
from scalerec.features.layout import Layout
from scalerec.inference import precision
from scalerec.inference.precision import Experts, Rows8, TableCollection8, Weight8, Weight16, convert, nbytes
from scalerec.layers.experts import ExpertFFN, ExpertsConfig
from scalerec.models import dcnv2, dlrm_mlp, hstu, rankmixer, sasrec, two_tower
from tests.contract.world import make_world

CONFIGS = {
    "rankmixer": rankmixer.tiny(),
    "rankmixer-mixed": rankmixer.tiny().model_copy(update={"num_heads": 4, "shared_ffn": True}),
    "rankmixer-groups": rankmixer.tiny().model_copy(update={"tokenizer": "group+global", "num_tokens": 6, "dim": 60}),
    "rankmixer-experts": rankmixer.tiny().model_copy(update={"experts": ExpertsConfig(count=4, active=0.5)}),
    "dcnv2": dcnv2.tiny(),
    "dcnv2-low-rank": dcnv2.tiny().model_copy(update={"rank": 8, "structure": "stacked"}),
    "dlrm_mlp": dlrm_mlp.tiny(),
    "hstu-joint": hstu.tiny(),
    "hstu-retrieval": hstu.tiny().model_copy(update={"goal": "retrieval"}),
    "hstu-production": hstu.tiny().model_copy(update={"goal": "ranking", "variant": "production"}),
    "sasrec": sasrec.tiny(),
    "two_tower": two_tower.tiny(),
}


@pytest.fixture(scope="module")
def world():
    return make_world()


def built(name: str, layout: Layout):
    torch.manual_seed(0)
    model = CONFIGS[name].build(layout).eval()
    with torch.no_grad():  # as after training: tables and gates that matter
        for _, table in model.embeddings.table_weights():
            table[1:] = torch.randn_like(table[1:])
    return model


def relative(found, want) -> float:
    return float((found.double() - want.double()).norm() / want.double().norm())


@pytest.fixture(params=[True, False], ids=["multiplies-bf16", "fp32-only"])
def processor(request, monkeypatch):
    """Both kinds of processors, whichever this one is."""
    monkeypatch.setattr(precision, "multiplies_bf16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("by_columns", [True, False])
@pytest.mark.parametrize("tokens", [None, 3])
def test_int8_weight_is_rounded_by_output_channel(by_columns, tokens, processor):
    """Against numpy in double precision, weights of a channel thousands of times another's."""
    if tokens and not by_columns:
        pytest.skip("a stack of matrices is [T, I, O]")
    random = np.random.default_rng(0)
    shape = [*([tokens] if tokens else []), 40, 70]
    size = 10.0 ** random.uniform(-2, 2, [*shape[:-2], 1, 70])
    meant = random.normal(size=shape) * size  # [(T), I, O]
    weight = torch.tensor(meant if by_columns else meant.T, dtype=torch.float32)
    x = torch.tensor(random.normal(size=[*shape[:-2], 9, 40]), dtype=torch.float32)
    bias = torch.tensor(random.normal(size=[*shape[:-2], *([1] if tokens else []), 70]), dtype=torch.float32)
    kept = Weight8(weight, by_columns=by_columns)
    if tokens:
        found = torch.baddbmm(bias, x, kept)
    elif by_columns:
        found = x @ kept + bias
    else:
        found = F.linear(x, kept, bias)
    step = np.abs(meant).max(-2, keepdims=True) / 127
    rounded = np.rint(meant / step)
    assert np.abs(rounded).max() == 127
    want = x.double().numpy() @ (rounded * step) + bias.double().numpy()
    error = np.linalg.norm(found.double().numpy() - want, axis=-2) / np.linalg.norm(want, axis=-2)  # of each output
    assert error.max() < (8e-3 if processor else 1e-5), error.max()
    exact = x.double().numpy() @ meant + bias.double().numpy()
    error = np.linalg.norm(found.double().numpy() - exact, axis=-2) / np.linalg.norm(exact, axis=-2)
    assert 1e-3 < error.max() < 2e-2
    assert kept.get_buffer("values").dtype == torch.int8 and found.dtype == torch.float32


def test_int8_blocks_change_nothing(monkeypatch, processor):
    weight, x = torch.randn(33, 57), torch.randn(5, 33)
    kept = Weight8(weight, by_columns=True)
    whole = x @ kept
    monkeypatch.setattr(precision, "BLOCK", 100)
    torch.testing.assert_close(x @ kept, whole, rtol=0, atol=2e-2 if processor else 1e-5)
    assert relative(x @ kept, x @ kept.dequantised()) < 5e-3


def test_a_channel_of_zeros_stays_zero():
    weight = torch.randn(8, 4)
    weight[:, 2] = 0
    assert ((torch.randn(3, 8) @ Weight8(weight, by_columns=True))[:, 2] == 0).all()


def test_bf16_products_take_bf16_on_both_sides():
    weight, x = torch.randn(32, 16), torch.randn(7, 32)
    want = (x.bfloat16().double() @ weight.bfloat16().double()).bfloat16()
    found = x @ Weight16(weight, by_columns=True)
    assert found.dtype == torch.float32
    assert relative(found, want) < 2e-3  # one rounding of the sum, up to its order
    narrow = F.linear(x, Weight16(weight.T, by_columns=False, narrow=True), torch.zeros(16))
    assert narrow.dtype == torch.bfloat16
    torch.testing.assert_close(narrow.float(), found, rtol=2e-2, atol=1e-2)


def test_a_converted_weight_is_only_multiplied():
    weight = Weight16(torch.randn(4, 4), by_columns=True)
    with pytest.raises(TypeError):
        torch.add(torch.randn(4, 4), weight)  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        torch.matmul(weight, torch.randn(4, 4))  # type: ignore[arg-type]


def test_int8_rows_are_within_half_a_step():
    torch.manual_seed(0)
    rows = torch.randn(50, 16) * 10 ** torch.empty(50, 1).uniform_(-6, 3)
    rows[0], rows[1], rows[2] = 0, rows[1].abs(), -rows[2].abs()
    rows[3, 5] = 0
    table = Rows8(rows)
    found = F.embedding(torch.arange(50), table)
    width = torch.maximum(rows.amax(1), torch.zeros(50)) - torch.minimum(rows.amin(1), torch.zeros(50))
    assert ((found - rows).abs() <= width[:, None] / 255 * 0.51 * (1 + 2**-7) + 1e-12).all()
    assert (found[0] == 0).all() and found[3, 5] == 0  # padding stays what it is
    assert nbytes(table) == 50 * (16 + 3)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("kind", "limit"), [("bf16", 2e-2), ("int8", 5e-2)])
def test_models_score_alike_in_fewer_bits(world, name, kind, limit):
    """All that users see, logits, user vectors and catalogue, within the rounding that is reasoned in `golden`."""
    model = built(name, world.encoder.layout)
    fewer = convert(copy.deepcopy(model), kind)
    with torch.inference_mode():
        want, found = model(world.batch).logits, fewer(world.batch).logits
        assert found.dtype == torch.float32
        centred = want - want.mean(0)  # a bias common to all rows must not hide an error
        assert float((found - want).norm() / centred.norm()) < 3 * limit
        assert not torch.equal(found, want)
        if model.retrieves:
            assert relative(fewer.catalogue(), model.catalogue()) < limit
            users = [m.encode_user(m.embeddings(world.batch.user)[0]).at_end for m in (model, fewer)]
            assert relative(users[1], users[0]) < limit


def test_norms_gates_and_last_maps_stay_fp32(world):
    model = convert(built("rankmixer", world.encoder.layout), "bf16")
    small = {n: p.dtype for n, p in model.named_parameters()}
    assert set(small.values()) == {torch.float32}
    assert any("norm" in n for n in small) and any("din" in n for n in small)
    narrow = {n for n, b in model.named_buffers() if b.dtype == torch.bfloat16}
    assert {"blocks.0.ffn.up.values", "blocks.1.ffn.down.values", "tokenizer.sides.item.weight.values"} <= narrow
    linear = convert(built("dcnv2", world.encoder.layout), "int8")
    assert linear.heads.out.weight.get_buffer("values").dtype == torch.float32


def test_bf16_products_run_in_bf16(world, monkeypatch):
    """Every product of the stack gets bf16 on both sides; without that there is no AMX."""
    seen = []
    true = precision._product

    def spied(x, values, bias, by_columns):
        seen.append((x.dtype, values.dtype))
        return true(x, values, bias, by_columns)

    monkeypatch.setattr(precision, "_product", spied)
    model = convert(built("rankmixer", world.encoder.layout), "bf16")
    with torch.inference_mode():
        model(world.batch)
    assert len(seen) >= 2 * 2 + 2 + 1 and set(seen) == {(torch.bfloat16, torch.bfloat16)}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("kind", [Weight16, Weight8])
def test_experts_in_fewer_bits(kind, shared):
    torch.manual_seed(0)
    whole = ExpertFFN(4, 16, 3 * 24, ExpertsConfig(count=3, active=0.5), shared).eval()
    with torch.no_grad():
        for parameter in (whole.up_bias, whole.down_bias):
            parameter.normal_()
    x = torch.randn(11, 4, 16)
    with torch.no_grad():
        assert 0 < float((whole.gates(x.transpose(0, 1)) > 0).float().mean()) < 1
        assert relative(Experts(whole, kind)(x), whole(x)) < 2e-2


def test_int8_memory_of_a_large_stack_and_its_tables(world):
    """int8 takes at most 0.3 of fp32 where tables are as wide as usual (16) and the FFN is what is large."""
    config = rankmixer.RankMixerConfig(dim=128, num_tokens=16, ffn_dim=512)
    model = config.build(world.encoder.layout)
    whole = nbytes(model)
    assert whole == sum(p.numel() for p in model.parameters()) * 4
    assert nbytes(convert(copy.deepcopy(model), "int8")) <= 0.3 * whole
    assert nbytes(convert(copy.deepcopy(model), "bf16")) <= 0.52 * whole
    table = torch.nn.Embedding(1000, 16)
    assert nbytes(Rows8(table.weight.detach())) <= 0.3 * nbytes(table)


def test_tables_in_int8_know_every_row(world):
    model = built("dcnv2", world.encoder.layout)
    tables = TableCollection8(model.embeddings)
    for name, table in model.embeddings.table_weights():
        dim, first = tables.place[name]
        found = F.embedding(torch.arange(len(table)) + first, tables.weight(dim))
        assert relative(found[FIRST_ID:], table[FIRST_ID:]) < 1e-2
        assert (found[0] == 0).all()

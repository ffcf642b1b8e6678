"""The benchmarks of training: what they count, and what they say where something is not there."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks import hstu_attention, machine, scaling, stochastic_length, training_step, turns
from benchmarks.peers import __main__ as peers
from benchmarks.training_step import Case, Product, Watch, quickest
from scalerec.config import override
from scalerec.data.transforms import StochasticLength
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.recipes.sequences import hstu_dirichlet


def test_every_way_of_a_product_gives_it():
    for batch in (1, 3):
        product = Product(batch, 4, 5, 6, torch.float32)
        for way in training_step.ways(product):
            way()
            a, b = way.args[:2]
            out = way.keywords.get("out", way.args[-1])
            torch.testing.assert_close(out, a @ b)
        quickest(product, rounds=1)()
        assert product.flops == 2 * batch * 4 * 5 * 6


def test_products_are_counted_with_their_shapes():
    weight = torch.randn(3, 4, 5, requires_grad=True)
    with Watch() as watch:
        torch.baddbmm(torch.zeros(3, 1, 5), torch.randn(3, 2, 4), weight).sum().backward()
    assert watch.seen == {Product(3, 2, 4, 5, torch.float32): 1, Product(3, 4, 2, 5, torch.float32): 1}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_has_the_products_of_its_closed_form(tmp_path, monkeypatch, precision):
    """Three times the forward FLOPs, whatever the threads; the first layer needs no gradient of its input."""
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))
    config = RankMixerConfig(dim=64, num_tokens=16, ffn_dim=48, head="linear", sequence="mean")
    case = Case(config, 32, precision, tmp_path / "run")
    forward, both = (
        sum(product.flops * count for product, count in case.products(call).items())
        for call in (case.forward, case.train)
    )
    assert forward == case.model.flops(case.batch)
    assert both == pytest.approx(3 * forward, rel=0.02)


def test_one_core_has_one_set_of_figures(capsys):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert turns.endings() == {"": 1}
        torch.set_num_threads(2)
        assert turns.endings() == {"": 2, "_one_thread": 1}
    finally:
        torch.set_num_threads(before)
    assert "there are no figures of several" in capsys.readouterr().err


def test_without_bf16_units_it_is_left_out_and_said(monkeypatch, capsys):
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    assert not machine.has_bf16_units()
    assert "bf16 is left out" in capsys.readouterr().err


def test_without_the_peers_nothing_is_compared(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("sys.argv", ["peers", "--environment", str(tmp_path / "none")])
    peers.main()
    assert "skipped, nothing compared: no environment in" in capsys.readouterr().err


def test_the_peers_get_the_ids_that_ours_gets(monkeypatch, tmp_path):
    import numpy as np
    import pyarrow.parquet as pq

    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))
    peers.prepare("synthetic", tmp_path / "data", 3_000)
    sizes = json.loads((tmp_path / "data" / "sizes.json").read_text())
    for part in ("train", "validation", "test"):
        table = pq.read_table(tmp_path / "data" / f"{part}.parquet")
        with np.load(tmp_path / "data" / f"{part}.npz") as arrays:
            for i, rows in enumerate(sizes["rows"]):
                assert np.array_equal(table[f"f{i}"].to_numpy(), arrays[f"f{i}"]) and arrays[f"f{i}"].max() < rows
    peers.ours(tmp_path / "data", torch.get_num_threads(), "fp32", tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as found:
        assert len(found["scores"]) == table.num_rows and found["seconds"] > found["loading"] > 0


def test_both_ways_of_attention_are_given_the_same(monkeypatch):
    """A plan made beforehand on one side alone would save it the work on times that the other does in each call."""
    compared = {}
    monkeypatch.setattr(hstu_attention, "movielens_lengths", lambda: ([3, 5], "two"))
    monkeypatch.setattr(hstu_attention, "step", lambda attention, inputs: (attention, set(inputs)))

    def in_turns(name, first, second, repetitions):
        compared[name] = (first, second)
        return {name + end: 1.0 for end in ("", "_low", "_high")}

    monkeypatch.setattr(hstu_attention, "in_turns", in_turns)
    hstu_attention.jagged_share(1)
    assert set(compared) == {"jagged_over_padded", "speedup_movielens"}
    for (_, one), (_, other) in compared.values():
        assert one == other


def test_the_memory_of_a_step_is_read_before_its_flops_are_counted(monkeypatch):
    peak = [100.0]

    def takes(mib):
        peak[0] = max(peak[0], mib)
        return 5.0

    monkeypatch.setattr(scaling, "peak_mib", lambda: peak[0])
    monkeypatch.setattr(scaling, "model", lambda *_: (lambda: takes(300.0), 2, lambda: takes(900.0)))
    found = scaling.point({"dim": 1}, rounds=1)
    assert found["mib"] == 200 and found["flops_per_row"] == 2.5 and peak == [900]


def test_a_point_of_the_scaling_figure(tmp_path):
    found = scaling.point({"table_rows": 100}, rounds=1)
    assert found["seconds_per_row"] > 0 and found["flops_per_row"] == 0
    entries = [{"axis": axis, "value": value, "seconds_per_row": 1e-6, "flops_per_row": 5.0, "mib": 7.0}
               for axis, values in scaling.SWEEPS.items() for value in values]  # fmt: skip
    scaling.draw(entries, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_stochastic_length_leaves_out_what_its_chances_say(tmp_path, monkeypatch):
    """Of equally long histories, by the expectation of the transform."""
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))
    small = {"items": 100, "categories": 4, "sequences": 600, "length": 65}
    run = override(hstu_dirichlet(), {f"data.of.{name}": str(value) for name, value in small.items()})
    monkeypatch.setattr(stochastic_length, "find", lambda recipe: run)
    found = stochastic_length.measure(["1.2", "1.6"], 1)
    for alpha in ("1.2", "1.6"):
        expected = StochasticLength(alpha=float(alpha)).sparsity(np.full(1, 64), 64)
        assert found[f"sparsity_{alpha}"] == pytest.approx(expected, abs=0.03)
        assert found[f"speedup_{alpha}_low"] <= found[f"speedup_{alpha}"] <= found[f"speedup_{alpha}_high"]
    assert found["sparsity_1.2"] > found["sparsity_1.6"] > 0

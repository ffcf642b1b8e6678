"""Experts in real, small trainings: the target held, what is kept, the two studies, the benchmark."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import sparse_experts as benchmark
from scalerec import checkpoint, evaluate
from scalerec.config import override
from scalerec.data.sources.synthetic import Synthetic
from scalerec.distributed.ranks import join, leave, rank
from scalerec.errors import InputError
from scalerec.layers.experts import WEAKEST, ExpertsConfig, RouterStep, SparsityControl
from scalerec.models.rankmixer import RankMixer, RankMixerConfig
from scalerec.studies import experts, sparsity
from scalerec.studies.expert_commands import add_experts
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig
from scalerec.training.train import train

ROWS = 40_000


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SCALEREC_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def run_of(**options) -> Run:
    model = RankMixerConfig(
        dim=16, num_tokens=8, ffn_dim=8, head="linear", experts=ExpertsConfig(count=8, active=1 / 8, **options)
    )
    training = TrainingConfig(
        batch_size=64,
        log_every=50,
        optimizer=OptimizerConfig(dense="adamw", lr=2e-3, embedding_lr=0.1),
        tensorboard=True,
    )
    return Run(name="small", data=Synthetic(rows=ROWS), model=model, training=training)


@pytest.fixture(scope="module")
def trained(cache, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "dual"
    train(run_of(), folder, quiet=True)
    return folder


@pytest.mark.slow
def test_a_real_training_holds_the_target_within_a_tenth(trained: Path):
    found = experts.measure(trained)
    assert abs(found["open"] * 8 - 1) < 0.1, found["open"]
    last = [np.mean(step) for step in found["along"]["open"][-3:]]  # each of one batch of 64 rows
    assert abs(np.mean(last) * 8 - 1) < 0.1, last
    assert found["dead"] < 0.01
    assert found["active_expert_macs"] == pytest.approx(found["open"] * found["expert_macs"], abs=1)
    shape = (2, 8, 8)
    assert np.array(found["open_by_expert"]).shape == shape and len(found["tokens"]) == 16
    assert len(found["along"]["steps"]) == 28000 // 64 // 50


@pytest.mark.slow
def test_figure_4_and_the_command(trained: Path, capsys: pytest.CaptureFixture[str]):
    parser = argparse.ArgumentParser()
    add_experts(lambda name, run, *_, **__: parser.set_defaults(run=run) or parser)
    parser.add_argument("--json", action="store_true")
    for more in ([], ["--json"]):
        options = parser.parse_args([str(trained), *more])
        options.run(options)
    assert "open_by_expert" in json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (trained / "experts.png").stat().st_size > 10_000
    assert list((trained / "tensorboard").iterdir())


@pytest.mark.slow
def test_training_goes_on_where_it_stood(trained: Path, tmp_path: Path):
    cut = override(run_of(), {"training.save_every": "100"})
    full = train(cut, tmp_path / "full", quiet=True)

    class Cut(Exception):
        pass

    def after_step(self: RankMixer, real=RankMixer.after_step) -> None:
        real(self)
        self.steps = getattr(self, "steps", 0) + 1
        if self.steps == 250:
            raise Cut

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RankMixer, "after_step", after_step)
        with pytest.raises(Cut):
            train(cut, tmp_path / "cut", quiet=True)
    assert train(cut, tmp_path / "cut", resume=True, quiet=True)["test"] == full["test"]
    weights = [checkpoint.load(tmp_path / name).weights for name in ("full", "cut")]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    assert weights[0]["control.settled"] > WEAKEST


def test_figures_of_frequencies():
    often = np.array([[[0.5, 0.5, 0, 0], [0, 0, 0, 0]]])
    found = experts.figures(often)
    assert found == {"open": 0.125, "dead": 0.75, "load_cv": pytest.approx(1.0), "entropy": pytest.approx(0.5)}
    assert experts.figures(np.full((2, 3, 4), 0.2)) == pytest.approx(
        {"open": 0.2, "dead": 0, "load_cv": 0, "entropy": 1}
    )


def test_a_model_without_experts_is_refused(cache, tmp_path: Path):
    plain = override(run_of(), {"model.experts.count": "0", "data.rows": "2000"})
    train(plain, tmp_path / "run", quiet=True)
    with pytest.raises(InputError, match=r"rankmixer has no experts: train one with --model\.experts"):
        experts.measure(tmp_path / "run")
    folder = checkpoint.best(tmp_path / "run")
    config = json.loads((folder / "config.json").read_text())
    config["model"]["experts"]["count"] = 8
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"the weights are not of the model in config\.json: Missing key") as error:
        checkpoint.load(folder).model()
    assert "\n" not in str(error.value)


def test_the_runs_of_figure_3():
    base = override(run_of(), {"model.experts.count": "0"})
    found = sparsity.planned(base, 8, (1.0, 0.5, 0.125))
    assert len({run.name for run in found}) == len(found) == 12
    for run, (method, ratio) in found.items():
        assert isinstance(run.model, RankMixerConfig)
        run.model.experts.check(8, 8)
        assert run.model.experts.target == ratio and (run.model.experts.dtsi == "dual") == (method == "DTSI + ReLU")
    with pytest.raises(InputError, match="small: name a recipe of a dense RankMixer"):
        sparsity.planned(run_of(), 8, (1.0,))


@pytest.mark.slow
def test_figure_3(cache, tmp_path: Path):
    base = override(run_of(), {"model.experts.count": "0", "data.rows": "4000"})
    found = sparsity.sparsity(base, tmp_path, experts=4, ratios=(0.5,), seeds=1)
    assert {"report.md", "sparsity.json", "sparsity.png"} <= {path.name for path in tmp_path.iterdir()}
    for method, points in found["series"].items():
        assert [point["ratio"] for point in points] == [0.5]
        assert 0 < points[0]["open"] <= 1 and "difference" in points[0]["tasks"]["click"], method


@pytest.mark.slow
def test_skipping_experts_leaves_predictions_as_they_are(trained: Path):
    saved = checkpoint.load(trained)
    found = []
    for break_even in (0.0, 2.0):
        model = saved.model()
        for layer in experts.layers_of(model):
            layer.break_even = break_even
        rows = benchmark.ParquetRows.of(run_of().data, run_of().data.prepare())
        found.append(evaluate.predict(model, benchmark.Loader(rows, saved.encoder, "test", 512)).probabilities)
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)


@pytest.mark.parametrize(("masked", "by_expert"), [(5.0, 3.0), (3.0, 5.0)])
def test_a_layer_is_compared_with_the_quicker_way_of_all_experts(
    monkeypatch: pytest.MonkeyPatch, masked: float, by_expert: float
):
    taken = {"sparse": [1.0], "masked": [masked], "by expert": [by_expert], "dense": [0.5]}
    monkeypatch.setattr(benchmark, "in_turn", lambda calls, rounds: {name: taken[name] for name in calls})
    assert benchmark.one_layer(torch.randn(2, 4, 3), 8, 12, 0.5, 1) == {"speedup": 3, "share": 0.5}


@pytest.mark.slow
def test_the_benchmark_runs(cache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    figure = tmp_path / "curves.png"
    monkeypatch.setattr(sys, "argv", ["x", "--quick", "--even-if-busy", "--json", "--out", str(figure)])
    benchmark.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["max_error"] < 1e-5 and figure.stat().st_size > 0
    assert {"sparse_speedup", "share_of_dense", "break_even", "speedup_by_rows_16", "share_by_open_0.125"} <= set(found)
    assert all(not isinstance(value, (dict, list)) for value in found.values())


def reduce() -> None:
    """One of two processes: half of the gates open here, none there."""
    join()
    control = SparsityControl(0.2, 1.1, damped=False)
    for share in (0.5, 0.3):  # together .25, then .15
        control.update(RouterStep(opened=[torch.full((2, 4), 10.0 * share * (rank() == 0))], served=10))
        sys.stdout.write(f"{rank()} {float(control.strength / WEAKEST)}\n")  # whole lines: both write into one pipe
    leave()


@pytest.mark.distributed
@pytest.mark.slow
def test_processes_agree_on_lambda():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__]
    root = Path(__file__).parents[2]
    source = os.pathsep.join([str(root / "src"), str(root)])
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | {"PYTHONPATH": source})
    assert done.returncode == 0, done.stderr
    found: dict[str, list[float]] = {"0": [], "1": []}
    for line in done.stdout.splitlines():
        process, value = line.split()
        found[process].append(round(float(value), 4))
    assert found["0"] == found["1"] == [1.1, 1.0]


if __name__ == "__main__":
    reduce()

"""Training seconds of the trees and of the networks beside them: the same span."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalerec.data.sources.synthetic import Synthetic
from scalerec.features.encoder import Encoder
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.studies import reference
from scalerec.training import train as training
from scalerec.training.run import Run, TrainingConfig

RUN = Run(
    name="run", data=Synthetic(rows=2_000), model=DLRMMLPConfig(hidden=(8,)),
    training=TrainingConfig(tensorboard=False, threads=1, batch_size=500, epochs=2),
)  # fmt: skip


class Clock:
    """Stands where calls that take time put it."""

    def __init__(self) -> None:
        self.now = 0

    def monotonic(self) -> int:
        return self.now

    def taking(self, seconds: Callable[..., int], call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            self.now += seconds(*args)
            return call(*args, **options)

        return timed


@pytest.fixture
def clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Clock:
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))
    clock = Clock()
    monkeypatch.setattr(Encoder, "fit", clock.taking(lambda *_: 10_000, Encoder.fit))
    return clock


def test_trees(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding the rows to fit and fitting; neither the encoder's fit nor anything of the test rows."""
    lightgbm = pytest.importorskip("lightgbm")
    monkeypatch.setattr(reference, "MOST_TREES", 2)
    monkeypatch.setattr(reference, "time", clock)
    monkeypatch.setattr(reference, "_table", clock.taking(lambda *a: 100 if a[2] == "test" else 1, reference._table))
    monkeypatch.setattr(lightgbm, "train", clock.taking(lambda *_: 10, lightgbm.train))
    monkeypatch.setattr(lightgbm.Booster, "predict", clock.taking(lambda *_: 1_000, lightgbm.Booster.predict))
    found = reference.train(RUN, tmp_path / "trees", seed=0)
    assert found["seconds"] == 2 * 1 + 10 * len(RUN.data.schema().tasks)
    assert clock.now > 10_000 + 100 and found["trees"] > 0 and (tmp_path / "trees/test.parquet").exists()


def test_networks(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step and every validation, the last one too; neither the encoder's fit nor the test rows."""
    monkeypatch.setattr(training, "time", clock)
    monkeypatch.setattr(training.Training, "step", clock.taking(lambda *_: 1, training.Training.step))
    predict = clock.taking(lambda *args: 100 if args[1] == "test" else 10, training.Training.predict)
    monkeypatch.setattr(training.Training, "predict", predict)
    found = training.train(RUN, tmp_path / "network", quiet=True)
    assert found["seconds"] == found["steps"] + 10 * RUN.training.epochs

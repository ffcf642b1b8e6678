"""The benchmark of M-FALCON runs, and its theory is that of spec C.11."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import mfalcon
from scalerec.models.hstu import HSTUConfig


def test_it_runs_and_both_ways_score_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    figure = tmp_path / "curve.png"
    monkeypatch.setattr(sys, "argv", ["mfalcon", "--quick", "--even-if-busy", "--json", "--out", str(figure)])
    mfalcon.main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["falcon_max_error"] < 1e-5 and found["cached_max_error"] < 1e-5
    assert found["falcon_speedup"] > 0 and found["cached_speedup"] > 0
    assert {"us_by_candidates_16", "us_by_micro_batch_16", "cpu", "busy"} <= set(found)
    assert figure.stat().st_size > 0


@pytest.mark.parametrize(("tokens", "candidates", "dim", "ratio"), [
    (200, 1000, 64, 127), (1024, 1024, 512, 448), (2048, 16384, 512, 1305),
])  # fmt: skip
def test_multiply_adds_are_those_of_the_specification(tokens: int, candidates: int, dim: int, ratio: int):
    config = HSTUConfig(dim=dim, qk_dim=dim, v_dim=dim)
    assert round(mfalcon.multiply_adds(config, tokens, candidates)) == ratio

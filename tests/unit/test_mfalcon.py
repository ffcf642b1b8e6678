"""M-FALCON: lists of candidates one would not expect, the end of a history alone, and the benchmark."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import mfalcon
from scalerec.batch import Batch
from scalerec.inference.forward_delta import forward_delta
from scalerec.models import hstu
from scalerec.models.hstu import HSTU, HSTUConfig, State
from scalerec.ops.appended_attention import appended_attention
from scalerec.ops.hstu_attention import hstu_attention_reference, relative_bias
from tests.unit.sequences import batch, model_of


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


def candidates(model: HSTU, many: int) -> tuple[Batch, State]:
    request = batch([12], [0] * max(many, 1)).take(torch.arange(many))
    request = replace(request, user=batch([12]).user)
    return request, forward_delta(model, None, request.user).state


def test_no_candidates():
    for options in ({}, {"variant": "production"}, {"attention": "softmax"}):
        model = model_of(**options)
        request, state = candidates(model, 0)
        (items,) = model.embeddings(request.items)
        assert model.score(state, items, request.user_of_row).logits.shape == (0, 1)
        assert model(request).logits.shape == (0, 1)


def test_repeated_candidates_score_alike():
    model = model_of()
    model.config = model.config.model_copy(update={"micro_batch": 4})
    request, _ = candidates(model, 3)
    many = request.take(torch.tensor([0, 1, 0, 2, 0, 1, 0, 0]))
    with torch.no_grad():
        scores, once = model(many).logits[:, 0], model(request).logits[:, 0]
    torch.testing.assert_close(scores, once[[0, 1, 0, 2, 0, 1, 0, 0]], atol=1e-6, rtol=1e-6)


def test_a_hundred_thousand_candidates(monkeypatch: pytest.MonkeyPatch):
    """Micro-batches bound the memory: no more than one of them is ever scored at a time."""
    model = model_of(num_layers=1, num_heads=1, qk_dim=4, v_dim=4, micro_batch=4096)
    request, state = candidates(model, 100_000)
    sizes = []
    attend = hstu.candidate_attention

    def watched(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes.append(len(q))
        return attend(q, *args, **kwargs)

    monkeypatch.setattr(hstu, "candidate_attention", watched)
    (items,) = model.embeddings(request.items)
    with torch.no_grad():
        scores = model.score(state, items, request.user_of_row).logits
    assert max(sizes) == 4096 and sum(sizes) == 100_000
    chunk = torch.arange(70_000, 70_010)
    with torch.no_grad():
        torch.testing.assert_close(model(request.take(chunk)).logits, scores[chunk], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalise", ["silu", "softmax"])
@pytest.mark.parametrize("new", [1, 3, 8])
def test_appended_attention_is_the_end_of_the_whole(normalise: Any, new: int):
    torch.manual_seed(0)
    q, k = torch.randn(2, 8, 2, 3, dtype=torch.float64)
    v, position = torch.randn(8, 2, 5, dtype=torch.float64), torch.randn(17, dtype=torch.float64)
    expected = hstu_attention_reference(
        q, k, v, torch.tensor([0, 8]), scale=0.1, alpha=0.7, position=position, normalise=normalise
    )
    bias = relative_bias(8, torch.tensor([8]), position, None, None)
    assert bias is not None
    found = appended_attention(q[-new:], k, v, bias=bias[0, -new:], scale=0.1, alpha=0.7, normalise=normalise)
    torch.testing.assert_close(found, expected[-new:])

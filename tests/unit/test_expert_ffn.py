"""Experts as an operation: what compiled graphs and inference mode take for granted of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from scalerec.errors import InputError
from scalerec.inference.compiled import compiled
from scalerec.inference.precision import convert
from scalerec.layers.experts import ExpertsConfig
from scalerec.models import rankmixer
from scalerec.ops.expert_ffn import masked_experts, sparse_experts, sparse_experts_in_graphs
from tests.contract.world import make_world


def parts(tokens: int, rows: int, dim: int, experts: int, width: int) -> list[Tensor]:
    shapes = [(dim, width), (width,), (width, dim), (dim,)]
    own = [torch.randn(tokens, experts, *shape) for shape in shapes]
    return [torch.randn(tokens, rows, dim), torch.rand(tokens, rows, experts).sub(0.5).relu(), *own]


@pytest.mark.parametrize("break_even", [1.0, 2.0])  # small experts are computed whole, or never are
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_the_operation_has_the_strides_that_graphs_are_compiled_for(break_even, rows):
    given = (*parts(3, rows, 8, 4, 6), break_even)
    torch.library.opcheck(sparse_experts_in_graphs, given, test_utils=("test_schema", "test_faketensor"))
    torch.testing.assert_close(sparse_experts_in_graphs(*given), masked_experts(*given[:-1]))


def test_tokens_computed_whole_on_threads_of_inference_mode(monkeypatch):
    monkeypatch.setattr("scalerec.ops.expert_ffn.SMALLEST", 0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            given = parts(3, 5, 8, 4, 6)
            torch.testing.assert_close(sparse_experts(*given, break_even=0.1), masked_experts(*given))
    finally:
        torch.set_num_threads(before)


def test_parameters_on_threads_take_no_gradients(monkeypatch):
    monkeypatch.setattr("scalerec.ops.expert_ffn.SMALLEST", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    given = parts(3, 5, 8, 4, 6)
    own = [torch.nn.Parameter(part) for part in given[2:]]
    with torch.no_grad():
        torch.testing.assert_close(sparse_experts(*given[:2], *own), masked_experts(*given))


def test_experts_in_bf16_are_not_compiled(tmp_path):
    config = rankmixer.tiny().model_copy(update={"experts": ExpertsConfig(count=4, active=0.5)})
    model = convert(config.build(make_world().encoder.layout), "bf16")
    bundle = SimpleNamespace(folder="b", model=model, precision="bf16", version="v")
    with pytest.raises(InputError, match="sparse experts in bf16 are not one graph: compile fp32"):
        compiled(bundle, tmp_path)  # type: ignore[arg-type]

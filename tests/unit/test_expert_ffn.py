"""Experts as an operation: what compiled graphs and inference mode take for granted of it."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from scalerec.errors import InputError
from scalerec.inference.compiled import compiled
from scalerec.inference.precision import convert
from scalerec.layers.experts import ExpertFFN, ExpertsConfig, RouterStep
from scalerec.models import rankmixer
from scalerec.ops.expert_ffn import (
    masked_experts,
    masked_experts_reference,
    sparse_experts,
    sparse_experts_in_graphs,
)
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
            made = parts(3, 5, 8, 4, 6)
            torch.testing.assert_close(sparse_experts(*made, break_even=0.1), masked_experts(*made))
    finally:
        torch.set_num_threads(before)


def test_parameters_on_threads_take_no_gradients(monkeypatch):
    monkeypatch.setattr("scalerec.ops.expert_ffn.SMALLEST", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    given = parts(3, 5, 8, 4, 6)
    own = [torch.nn.Parameter(part) for part in given[2:]]
    with torch.no_grad():
        torch.testing.assert_close(sparse_experts(*given[:2], *own), masked_experts(*given))


@given(
    st.tuples(st.integers(1, 3), st.integers(0, 9), st.integers(1, 4), st.integers(2, 5), st.integers(1, 3)),
    st.floats(-3, 3),
    st.integers(1, 2),
)
@settings(deadline=None, max_examples=40)
def test_gradients_through_open_gates_are_those_of_the_definition(shape, shift, threads):
    made = [part.double() for part in parts(*shape)]
    made[0] = made[0].transpose(0, 1).contiguous().transpose(0, 1)  # as a model holds its rows
    made[1] = torch.randn_like(made[1]) + shift  # what a router says
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for experts in (masked_experts_reference, partial(sparse_experts, break_even=2.0)):
            own = [part.detach().clone().requires_grad_() for part in made]
            out = experts(own[0], own[1].relu(), *own[2:])
            (out * torch.arange(out.numel()).reshape(out.shape).sin()).sum().backward()
            found.append([out.detach(), *(torch.zeros_like(part) if part.grad is None else part.grad for part in own)])
    finally:
        torch.set_num_threads(before)
    for expected, part in zip(*found):
        torch.testing.assert_close(part, expected)


@pytest.mark.parametrize("width", [24, 23])  # grouped in one call, and not
def test_gradients_in_float32_are_those_in_float64(width):
    torch.manual_seed(0)
    made = parts(3, 50, 16, 4, width)
    made[1][0], made[1][1, :, 1:] = 0, 0  # no expert, one alone
    found = []
    for dtype, experts in (
        (torch.float64, masked_experts_reference),
        (torch.float32, partial(sparse_experts, break_even=2.0)),
    ):
        own = [part.to(dtype).requires_grad_() for part in made]
        out = experts(own[0], own[1].relu(), *own[2:])
        found.append([out, *torch.autograd.grad(out.sin().sum(), own)])
    for expected, part in zip(*found):
        torch.testing.assert_close(part.double(), expected.double(), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"dtsi": "dual"}, {"dtsi": "sample"}, {"dtsi": "mix"}, {"dtsi": "off"}, {"train_gate": "softmax"},
        {"routing": "top_k", "dtsi": "off", "active": 0.5, "balance": 0.1, "threshold": 0.2},
        {"routing": "top_k", "dtsi": "off", "active": 0.5, "renormalise": True},
        {"pools": ((0, 1), (1, 2, 3), (0, 3))},
    ],
    ids=str,
)  # fmt: skip
def test_a_layer_learns_the_same_whether_it_skips_or_masks(options, shared):
    found = []
    for break_even in (0, 2):
        torch.manual_seed(0)
        layer = ExpertFFN(3, 5, 24, ExpertsConfig(count=4, **options), shared).double()
        layer.break_even = break_even
        x = torch.randn(10, 3, 5, dtype=torch.float64, requires_grad=True)
        step = RouterStep.begin(layer.config.dtsi, 5 if layer.config.dtsi == "dual" else 10, x.device)
        cost, weight = (layer(x, step).square().sum(), step.penalty())
        (cost + weight[0] / weight[1]).backward()
        found.append([x.grad, *(parameter.grad for parameter in layer.parameters())])
    for expected, part in zip(*found):
        torch.testing.assert_close(part, expected)


def test_a_training_step_skips_closed_experts(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)  # products on other threads are not counted
    layer = ExpertFFN(2, 4, 24, ExpertsConfig(count=4, routing="top_k", dtsi="off", active=0.25))
    counted = []
    for layer.break_even in (2, 0):
        with FlopCounterMode(display=False) as counter:
            layer(torch.randn(10, 2, 4, requires_grad=True), RouterStep()).sum().backward()
        counted.append(counter.get_total_flops())
    experts = 3 * 2 * 10 * 2 * 4 * 2 * 24  # FLOPs of three passes of two products over ten rows of two tokens
    assert experts / 4 < counted[0] < experts / 2 < experts < counted[1]  # routers are what is more


def test_experts_in_bf16_are_not_compiled(tmp_path):
    config = rankmixer.tiny().model_copy(update={"experts": ExpertsConfig(count=4, active=0.5)})
    model = convert(config.build(make_world().encoder.layout), "bf16")
    bundle = SimpleNamespace(folder="b", model=model, precision="bf16", version="v")
    with pytest.raises(InputError, match="sparse experts in bf16 are not one graph: compile fp32"):
        compiled(bundle, tmp_path)  # type: ignore[arg-type]

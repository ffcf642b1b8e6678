"""Token by token in bf16 against batched products under autocast, both against float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalerec.models.rankmixer import PerTokenFFN
from scalerec.ops import halved
from scalerec.ops.per_token_ffn import _PerTokenFFN, _tables, per_token_ffn, per_token_ffn_reference


def tensors(rows, tokens, dim, hidden):
    torch.manual_seed(rows + dim)
    shapes = (rows, tokens, dim), (tokens, dim, hidden), (tokens, hidden), (tokens, hidden, dim), (tokens, dim)
    scales = 1, dim**-0.5, 1, hidden**-0.5, 1
    return [nn.Parameter(torch.randn(shape) * scale) for shape, scale in zip(shapes, scales)], torch.randn(shapes[0])


def run(call, values, slope):
    out = call(*values)
    return [out.detach(), *torch.autograd.grad(out, values, slope.to(out.dtype))]


def bf16(call):
    def under_autocast(*values):
        with torch.autocast("cpu", torch.bfloat16):
            return call(*values)

    return under_autocast


def distance(found, exact):
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("shape", [(1, 1, 8, 8), (5, 3, 16, 24), (130, 4, 40, 33), (64, 16, 48, 100)])
def test_no_further_from_float64_than_the_plain_twin(shape):
    values, slope = tensors(*shape)
    exact = run(per_token_ffn_reference, [value.detach().double().requires_grad_() for value in values], slope)
    fast, plain = (run(bf16(call), values, slope) for call in (per_token_ffn, per_token_ffn_reference))
    assert fast[0].dtype == plain[0].dtype == torch.bfloat16
    for mine, twins, true in zip(fast, plain, exact):
        assert mine.shape == twins.shape
        assert distance(mine, true) < 1.1 * distance(twins, true) + 1e-3 and distance(mine, true) < 0.02


def test_the_compiled_way_is_taken_under_bf16_alone(monkeypatch):
    values, _ = tensors(4, 2, 8, 8)
    taken = []
    apply = _PerTokenFFN.apply
    monkeypatch.setattr(_PerTokenFFN, "apply", lambda *given: taken.append(1) or apply(*given))
    per_token_ffn(*values)
    assert not taken
    bf16(per_token_ffn)(*values)
    assert taken


@pytest.mark.parametrize("like", [torch.float32, torch.bfloat16])
def test_gradients_of_weights_have_the_format_asked_for(like):
    values, slope = tensors(6, 2, 8, 8)
    expected = run(bf16(per_token_ffn), values, slope)
    for weight in (values[1], values[3]):
        weight.grad_dtype = like
    bf16(per_token_ffn)(*values).backward(slope.bfloat16())
    for value, gradient in zip(values[1:], expected[2:]):
        assert torch.equal(value.grad.float(), gradient)
    assert values[1].grad.dtype == values[3].grad.dtype == like


def test_threads_do_not_change_a_bit():
    values, slope = tensors(40, 5, 16, 24)
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            found.append(run(bf16(per_token_ffn), values, slope))
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_tables_of_gelu():
    """All bf16 numbers: values as torch rounds them, slopes by autograd in float64."""
    values, slopes = (torch.from_numpy(table) for table in _tables())
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = every.isfinite()
    x = every[finite].double().requires_grad_()
    y = nn.functional.gelu(x)
    assert torch.equal(values.view(torch.bfloat16)[finite], y.detach().bfloat16())
    torch.testing.assert_close(slopes[finite].double(), torch.autograd.grad(y.sum(), x)[0], rtol=1e-6, atol=1e-30)
    infinite = values.view(torch.bfloat16)[every.isinf()]
    assert infinite[0] == float("inf")
    assert values.view(torch.bfloat16)[every.isnan()].isnan().all() and slopes[every.isnan()].isnan().all()


def test_copies_follow_their_weights():
    weight = nn.Parameter(torch.randn(3, 4))
    first = halved.halved(weight)
    assert halved.halved(weight) is first and torch.equal(first, weight.bfloat16())
    with torch.no_grad():
        weight += 1
    assert torch.equal(halved.halved(weight), weight.bfloat16())
    weight.grad = torch.ones(3, 4)
    torch.optim.SGD([weight], 0.5).step()
    assert torch.equal(halved.halved(weight), weight.bfloat16())
    module = nn.ParameterDict({"weight": weight})
    module.load_state_dict({"weight": torch.zeros(3, 4)})
    assert not halved.halved(weight).any()
    with torch.inference_mode():
        assert torch.equal(halved.halved(torch.ones(2)), torch.ones(2).bfloat16())


@pytest.mark.parametrize("optimiser", ["rmsprop", "adamw"])
def test_copies_that_the_optimiser_writes_are_those_of_its_weights(optimiser):
    from scalerec.training.optim import OptimizerConfig

    torch.manual_seed(0)
    ffn = PerTokenFFN(3, 40, 60)
    step = OptimizerConfig(dense=optimiser, lr=0.1).build_dense(list(ffn.parameters()))
    for _ in range(3):
        step.zero_grad()
        bf16(ffn)(torch.randn(5, 3, 40)).float().square().sum().backward()
        before = halved.kept(ffn.up)
        step.step()
        assert halved.halved(ffn.up) is before and torch.equal(before, ffn.up.bfloat16())


def test_inference_mode_leaves_weights_fit_for_training():
    values, slope = tensors(4, 2, 8, 8)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with torch.inference_mode():
            scores = bf16(per_token_ffn)(*values)
        trained = run(bf16(per_token_ffn), values, slope)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(scores, trained[0])


def test_a_step_between_the_two_passes_is_an_error():
    """As torch has it: the weights that the gradient needs are gone."""
    from scalerec.training.optim import OptimizerConfig

    values, slope = tensors(4, 2, 8, 8)
    step = OptimizerConfig().build_dense(values[1:])
    first, second = (bf16(per_token_ffn)(*values) for _ in range(2))
    first.backward(slope.bfloat16())
    step.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.backward(slope.bfloat16())

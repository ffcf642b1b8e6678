"""One pass over a row against the definition in float64, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from scalerec.ops import mix_norm
from scalerec.ops.mix_norm import add_norm, add_norm_reference, mix_add_norm, mix_add_norm_reference

EPS = 1e-5


def tensors(rows, tokens, dim):
    torch.manual_seed(rows)
    x, y = (torch.randn(rows, tokens, dim) * 3 + 1 for _ in range(2))
    weight, bias, slope = torch.randn(dim), torch.randn(dim), torch.randn(rows, tokens, dim)
    return [y, x, weight, bias], slope


def run(call, values, slope):
    """Value and gradients of all inputs."""
    values = [value.detach().requires_grad_() for value in values]
    out = call(*values, EPS)
    return [out.detach(), *torch.autograd.grad(out, values, slope.to(out.dtype))]


@pytest.mark.parametrize("shape", [(1, 1, 3), (5, 4, 8), (33, 16, 48), (0, 4, 8), (700, 9, 108)])
def test_against_float64(shape):
    values, slope = tensors(*shape)
    mixed = (mix_add_norm, mix_add_norm_reference, values[1:])
    for call, twin, given in ((add_norm, add_norm_reference, values), mixed):
        if call is mix_add_norm and shape[2] % shape[1]:
            continue
        found = run(call, given, slope)
        expected = run(twin, [value.double() for value in given], slope)
        for mine, exact in zip(found, expected):
            torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-4 * max(1, shape[0]) ** 0.5)


def test_bf16_is_added_as_it_is_and_its_gradient_rounded():
    values, slope = tensors(12, 4, 8)
    half = [values[0].bfloat16(), *values[1:]]
    found, expected = run(add_norm, half, slope), run(add_norm, [half[0].float(), *values[1:]], slope)
    assert found[0].dtype == torch.float32 and found[1].dtype == torch.bfloat16
    expected[1] = expected[1].bfloat16()
    assert all(torch.equal(a, b) for a, b in zip(found, expected))


def test_bf16_in_and_out():
    """As in float32, rounded at the end; gradients come in rounded too."""
    values, slope = tensors(12, 4, 8)
    slope = slope.bfloat16()
    half = [*(value.bfloat16() for value in values[:2]), *values[2:]]
    wide = [*(value.float() for value in half[:2]), *values[2:]]
    for call, first in ((add_norm, 0), (mix_add_norm, 1)):
        found, expected = run(call, half[first:], slope), run(call, wide[first:], slope.float())
        for a, b in zip(found, expected):
            assert torch.equal(a, b.to(a.dtype))
        assert found[0].dtype == found[1].dtype == torch.bfloat16


def test_any_layout_of_the_inputs():
    values, slope = tensors(6, 4, 8)
    turned = [*(value.permute(2, 1, 0).contiguous().permute(2, 1, 0) for value in values[:2]), *values[2:]]
    for a, b in zip(run(add_norm, values, slope), run(add_norm, turned, slope)):
        assert torch.equal(a, b)
    for a, b in zip(run(mix_add_norm, values[1:], slope), run(mix_add_norm, turned[1:], slope)):
        assert torch.equal(a, b)


def test_rows_do_not_depend_on_threads_or_company(monkeypatch):
    values, slope = tensors(9, 4, 8)
    whole = run(mix_add_norm, values[1:], slope)
    monkeypatch.setattr(mix_norm, "ALONE", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        split = run(mix_add_norm, values[1:], slope)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(whole[0], split[0]) and torch.equal(whole[1], split[1])
    torch.testing.assert_close(whole[2:], split[2:], rtol=1e-5, atol=1e-5)
    alone = run(mix_add_norm, [values[1][3:4], *values[2:]], slope[3:4])
    assert torch.equal(alone[0], whole[0][3:4]) and torch.equal(alone[1], whole[1][3:4])


def test_shapes_that_do_not_fit_are_torchs_to_refuse():
    values, _ = tensors(2, 3, 8)
    with pytest.raises(RuntimeError):
        mix_add_norm(*values[1:], EPS)  # three tokens do not divide a width of eight
    with pytest.raises(RuntimeError):
        add_norm(*values[:2], torch.ones(7), torch.ones(7), EPS)
    wide = add_norm(values[0][:1], *values[1:], EPS)
    torch.testing.assert_close(wide, add_norm(values[0][:1].expand_as(values[1]), *values[1:], EPS))


def test_second_derivatives_are_refused_not_zero():
    values, slope = tensors(2, 4, 8)
    x = values[1].requires_grad_()
    out = mix_add_norm(x, *values[2:], EPS)
    (gradient,) = torch.autograd.grad((out * slope).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()

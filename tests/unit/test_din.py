"""The compiled attention over a past against its plain twin in float64, in value and in every gradient."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scalerec.layers.embedding import EmbeddedSequence
from scalerec.layers.sequence import DIN
from scalerec.ops import din as ops
from scalerec.ops.din import Layers, din, din_reference


def drawn(lengths: list[int], users: list[int], sizes: tuple[int, int, int], seed: int) -> tuple[list[Tensor], Layers]:
    """query, of_query, keys, of_keys, mask, user_of_row; layers."""
    draw = torch.Generator().manual_seed(seed)
    width, first, second = sizes
    rows, height, longest = len(users), len(lengths), max(1, *lengths)
    mask = torch.arange(longest) < torch.tensor(lengths)[:, None]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    given = [normal(rows, width), normal(rows, first), normal(height, longest, width), normal(height, longest, first)]
    shapes = ((width, first), (first,), (first, second), (second,), (second,), (second,), (1,))
    return [*given, mask, torch.tensor(users)], Layers(*(normal(*shape) for shape in shapes))


def both_ways(given: list[Tensor], layers: Layers) -> tuple[list[Tensor], list[Tensor]]:
    """What comes out and all gradients: compiled, and of the plain twin in float64."""
    found = []
    for attend, dtype in ((din, torch.float32), (din_reference, torch.float64)):
        own = [part.to(dtype).requires_grad_() for part in given[:4]]
        weights = Layers(*(part.to(dtype).requires_grad_() for part in layers))
        out = attend(*own, given[4], given[5], weights)  # type: ignore[arg-type]
        slope = torch.arange(out.numel(), dtype=dtype).reshape(out.shape).sin()
        inputs = [*own, *weights]
        gradients = torch.autograd.grad(out, inputs, slope, allow_unused=True) if out.requires_grad else [None] * 11
        found.append([out.detach(), *(torch.zeros_like(p) if g is None else g for g, p in zip(gradients, inputs))])
    return found[0], found[1]


@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), st.data(), st.integers(1, 3), st.integers(1, 5))
@settings(deadline=None, max_examples=40)
def test_values_and_gradients_are_those_of_the_definition(lengths, data, threads, pairs):
    users = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=12))
    given, layers = drawn(lengths, users, (3, 5, 4), seed=sum(users))
    before, kept = torch.get_num_threads(), (ops.PAIRS, ops.ALONE)
    torch.set_num_threads(threads)
    ops.PAIRS, ops.ALONE = pairs, 4
    try:
        for one, other in zip(*both_ways(given, layers)):
            torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)
        with torch.no_grad():  # threads may then share a user
            alone = din(*given, layers)  # type: ignore[arg-type]
        expected = din_reference(*given, layers)  # type: ignore[arg-type]
        torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-4)
    finally:
        torch.set_num_threads(before)
        ops.PAIRS, ops.ALONE = kept


def test_masks_with_holes_and_rows_in_any_order():
    given, layers = drawn([7, 7, 7], [2, 0, 1, 2, 0], (6, 8, 4), seed=0)
    given[4] = torch.rand(3, 7, generator=torch.Generator().manual_seed(1)) < 0.5
    for one, other in zip(*both_ways(given, layers)):
        torch.testing.assert_close(one.double(), other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("enabled", [False, True])
def test_the_layer_under_autocast(enabled):
    torch.manual_seed(0)
    layer = DIN(8, (16, 4))
    mask = torch.arange(5) < torch.tensor([3, 0, 5])[:, None]
    past, rows = EmbeddedSequence(torch.randn(3, 5, 8) * mask[..., None], mask), torch.tensor([0, 2, 1, 2])
    query = torch.randn(4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        found = layer(query, past, rows)
    assert found.dtype == torch.float32
    expected = layer.padded(query, past, rows)
    torch.testing.assert_close(found, expected, atol=0.05 if enabled else 1e-5, rtol=0.05 if enabled else 1e-5)
    found.sum().backward()
    assert query.grad is not None and query.grad[0].any() and not query.grad[2].any()


def test_the_layer_in_inference_mode_on_two_threads(monkeypatch):
    monkeypatch.setattr(ops, "ALONE", 4)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.manual_seed(0)
        layer, mask = DIN(8, (16, 4)), torch.ones(3, 5, dtype=torch.bool)
        with torch.inference_mode():
            past, query = EmbeddedSequence(torch.randn(3, 5, 8), mask), torch.randn(4, 8)
            rows = torch.tensor([0, 2, 1, 2])
            torch.testing.assert_close(layer(query, past, rows), layer.padded(query, past, rows))
    finally:
        torch.set_num_threads(before)


def test_a_row_of_nobody_is_refused():
    layer, past = DIN(8, (16, 4)), EmbeddedSequence(torch.randn(3, 5, 8), torch.ones(3, 5, dtype=torch.bool))
    with pytest.raises(IndexError, match="not there"):
        layer(torch.randn(1, 8), past, torch.tensor([60]))


def test_what_comes_out_may_be_changed_and_keys_may_lie_anyhow():
    given, layers = drawn([3, 3], [0, 1], (4, 6, 4), seed=0)
    keys = given[2].transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    out = din(given[0], given[1], keys, *given[3:], layers)  # type: ignore[arg-type]
    out += 1
    out.sum().backward()
    assert keys.grad is not None and keys.grad.shape == keys.shape

"""Jagged lists: those taken are copies of those that were there, of every kind of number."""

from __future__ import annotations

import pytest
import torch

from scalerec.batch import Jagged

KINDS = [torch.int64, torch.float32, torch.float64, torch.bool]


@pytest.mark.parametrize("width", [(), (3,), (0,), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_lists_taken_in_any_order(kind, width):
    torch.manual_seed(0)
    lengths = torch.tensor([3, 0, 2, 5, 1])
    values = (10 * torch.randn(11, *width)).to(kind)
    lists = Jagged.from_lengths(values, lengths)
    for index in (torch.tensor([3, 3, 1, 0, 4]), torch.tensor([1]), torch.empty(0, dtype=torch.int64)):
        found = lists.take(index)
        parts = [values[lists.offsets[i] : lists.offsets[i + 1]] for i in index]
        assert torch.equal(found.values, torch.cat([values[:0], *parts]))
        assert found.values.dtype == kind and torch.equal(found.lengths, lengths[index])


def test_lists_with_gradients_are_taken_by_torch():
    values = torch.randn(4, 2, requires_grad=True)
    lists = Jagged.from_lengths(values, torch.tensor([1, 3]))
    index = torch.tensor([1, 1, 0])
    found = lists.take(index)
    assert torch.equal(found.values, Jagged(values.detach(), lists.offsets).take(index).values)
    found.values.sum().backward()
    assert values.grad is not None and values.grad[:, 0].tolist() == [1, 2, 2, 2]


def test_lists_beyond_their_values_are_refused():
    with pytest.raises(IndexError, match="beyond the values"):
        Jagged(torch.arange(4), torch.tensor([0, 1, 40])).take(torch.tensor([1]))


def test_values_that_do_not_lie_in_one_piece():
    values = torch.randn(6, 4)[:, ::2]
    lists = Jagged.from_lengths(values, torch.tensor([2, 4]))
    assert torch.equal(lists.take(torch.tensor([1, 0])).values, torch.cat([values[2:], values[:2]]))
    assert (
        lists.map(lambda part: part.bfloat16() if part.is_floating_point() else part)
        .take(torch.tensor([1]))
        .values.dtype
        == torch.bfloat16
    )

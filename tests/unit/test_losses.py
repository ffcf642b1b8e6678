"""Losses: values against torch and by hand, masking, and means that survive a split over processes."""

import math

import pytest
import torch
from torch.nn import functional as F

from scalerec.errors import InputError
from scalerec.losses import Term, binary_cross_entropy, total


def test_value_by_hand():
    logits, labels, weights = torch.tensor([[0.0, math.log(3)], [1.0, 0.0], [1.0, 2.0]])
    term = binary_cross_entropy(logits, labels, weights)
    assert term.sum.item() == pytest.approx(math.log(2) + 2 * math.log(4), rel=1e-6)
    assert term.weight.item() == 3.0


def test_equal_to_torch_on_rows_that_count():
    torch.manual_seed(0)
    logits, labels = torch.randn(100), torch.randint(2, (100,)).float()
    weights = (torch.rand(100) < 0.7) * torch.rand(100)
    term = binary_cross_entropy(logits, labels, weights)
    expected = F.binary_cross_entropy_with_logits(logits, labels, weights, reduction="sum")
    torch.testing.assert_close(term.sum, expected)
    torch.testing.assert_close(term.weight, weights.sum())


def test_rows_without_weight_reach_neither_value_nor_gradient():
    logits = torch.tensor([0.3, float("nan"), -1.2, float("inf")], requires_grad=True)
    labels = torch.tensor([1.0, float("nan"), float("nan"), 0.0])
    term = binary_cross_entropy(logits, labels, torch.tensor([1.0, 0.0, 0.0, 0.0]))
    total({"finish": term}).backward()
    assert term.sum.item() == pytest.approx(math.log1p(math.exp(-0.3)), rel=1e-6)
    assert logits.grad is not None
    assert logits.grad[0].item() == pytest.approx(1 / (1 + math.exp(-0.3)) - 1, rel=1e-5)
    assert logits.grad[1:].tolist() == [0.0, 0.0, 0.0]


def test_nan_label_that_counts_is_not_hidden():
    term = binary_cross_entropy(torch.zeros(1), torch.tensor([float("nan")]), torch.ones(1))
    assert torch.isnan(term.sum)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_summed_in_float32(dtype):
    rows = 5000  # a bfloat16 running sum of log 2 would stop growing near 256
    zeros, ones = torch.zeros(rows, dtype=dtype), torch.ones(rows, dtype=dtype)
    term = binary_cross_entropy(zeros, ones, ones)
    assert term.sum.dtype == term.weight.dtype == torch.float32
    assert term.sum.item() == pytest.approx(rows * math.log(2), rel=1e-5)
    assert term.weight.item() == rows


def test_large_logits_stay_finite():
    term = binary_cross_entropy(torch.tensor([500.0, -500.0]), torch.tensor([0.0, 1.0]), torch.ones(2))
    assert term.sum.item() == pytest.approx(1000.0)


def test_terms_of_parts_add_up_to_the_whole():
    torch.manual_seed(1)
    logits, labels = torch.randn(64), torch.randint(2, (64,)).float()
    weights = (torch.rand(64) < 0.5).float()
    whole = total({"finish": binary_cross_entropy(logits, labels, weights)})
    parts = [binary_cross_entropy(logits[s], labels[s], weights[s]) for s in (slice(0, 10), slice(10, 64))]
    added = Term(parts[0].sum + parts[1].sum, parts[0].weight + parts[1].weight)
    torch.testing.assert_close(total({"finish": added}), whole)


def test_total_adds_means():
    finish, skip = Term(torch.tensor(6.0), torch.tensor(3.0)), Term(torch.tensor(1.0), torch.tensor(4.0))
    assert total({"finish": finish, "skip": skip}).item() == 2.25


def test_term_without_rows_adds_nothing_and_has_no_gradient():
    logits = torch.randn(3, requires_grad=True)
    nothing = binary_cross_entropy(logits, torch.full((3,), float("nan")), torch.zeros(3))
    loss = total({"skip": nothing, "finish": Term(torch.tensor(6.0), torch.tensor(3.0))})
    loss.backward()
    assert loss.item() == 2.0
    assert logits.grad is not None and logits.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("shape", [(4, 1), (3,), ()])
def test_shapes_are_not_broadcast(shape):
    for place in range(3):
        tensors = [torch.ones(4), torch.ones(4), torch.ones(4)]
        tensors[place] = torch.ones(shape)
        with pytest.raises(InputError, match="must be equal"):
            binary_cross_entropy(*tensors)

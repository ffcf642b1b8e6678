"""Losses: values against torch and by hand, masking, and means that survive a split over processes."""

import math

import pytest
import torch
from torch.nn import functional as F

from scalerec.errors import InputError
from scalerec.losses import (
    Term,
    _OwnPairs,
    binary_cross_entropy,
    distinct,
    full_softmax,
    log_frequency,
    sampled_softmax,
    total,
)
from scalerec.ops.pair_softmax import pair_softmax


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


# Softmax over candidates


def plain_softmax(queries, candidates, target, negatives, weights, temperature, log_q=None):
    """The sum by its definition, in float64 and with every vector gathered; `negatives` None: all candidates."""
    queries, candidates = queries.double(), candidates.double()
    bias = torch.zeros(len(candidates)).double() if log_q is None else log_q.double()
    if negatives is None:
        everyone = torch.arange(len(candidates)).expand(len(queries), -1)
        negatives = torch.stack([row[row != t] for row, t in zip(everyone, target)])
    negatives = negatives.expand(len(queries), -1)
    positive = (queries * candidates[target]).sum(1) / temperature - bias[target]
    logits = torch.einsum("pd,prd->pr", queries, candidates[negatives]) / temperature - bias[negatives]
    logits = torch.where(negatives == target[:, None], -5e4, logits)
    losses = torch.log1p((logits - positive[:, None]).exp().sum(1))
    return (losses * weights.double()).sum()


def softmax_case(how, seed=0, predictions=150, count=40, dim=6, draws=9):
    torch.manual_seed(seed)
    queries = torch.randn(predictions, dim, requires_grad=True)
    candidates = torch.randn(count, dim, requires_grad=True)
    target = torch.randint(count, (predictions,))
    weights = torch.rand(predictions)
    shape = {"shared": (draws,), "own": (predictions, draws), "full": None}[how]
    negatives = None if shape is None else torch.randint(count, shape)
    return queries, candidates, target, negatives, weights


def softmax_sum(queries, candidates, target, negatives, weights, temperature, log_q=None):
    if negatives is None:
        return full_softmax(queries, candidates, target, weights, temperature)
    return sampled_softmax(queries, candidates, target, negatives, weights, temperature, log_q)


def test_sampled_softmax_by_hand():
    candidates = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    queries = torch.tensor([[math.log(2.0), 0.0], [0.0, math.log(3.0)]])
    target, weights = torch.tensor([0, 0]), torch.tensor([1.0, 2.0])
    # query 0: logits 2 ln 2, of rows 1 and 2: 0, -2 ln 2; query 1: logit 0, of rows 1 and 2: 2 ln 3, 0
    first, second = -math.log(4 / (4 + 1 + 0.25)), -math.log(1 / (1 + 9 + 1))
    for negatives in (torch.tensor([1, 2]), torch.tensor([[1, 2], [2, 1]])):
        term = sampled_softmax(queries, candidates, target, negatives, weights, 0.5)
        assert term.sum.item() == pytest.approx(first + 2 * second, rel=1e-6)
        assert term.weight.item() == 3.0


@pytest.mark.parametrize("how", ["shared", "own", "full"])
@pytest.mark.parametrize("temperature", [1.0, 0.05])
def test_softmax_equals_its_definition(how, temperature):
    case = softmax_case(how)
    term = softmax_sum(*case, temperature)
    expected = plain_softmax(*case, temperature)
    torch.testing.assert_close(term.sum.double(), expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(term.weight, case[4].sum())
    found = torch.autograd.grad(3 * term.sum, case[:2])
    for gradient, wanted in zip(found, torch.autograd.grad(3 * expected, case[:2])):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("how", ["shared", "own"])
def test_log_q_is_subtracted(how):
    case, log_q = softmax_case(how, seed=1), torch.randn(40)
    term, expected = softmax_sum(*case, 0.2, log_q), plain_softmax(*case, 0.2, log_q)
    torch.testing.assert_close(term.sum.double(), expected, rtol=1e-5, atol=1e-4)
    for gradient, wanted in zip(torch.autograd.grad(term.sum, case[:2]), torch.autograd.grad(expected, case[:2])):
        torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4)


def test_every_candidate_as_negative_is_the_full_softmax():
    queries, candidates, target, _, weights = softmax_case("full", seed=2)
    logits = queries @ candidates.T / 0.1
    expected = (F.cross_entropy(logits, target, reduction="none") * weights).sum()
    torch.testing.assert_close(full_softmax(queries, candidates, target, weights, 0.1).sum, expected)
    sampled = sampled_softmax(queries, candidates, target, torch.arange(40), weights, 0.1)
    torch.testing.assert_close(sampled.sum, expected)


@pytest.mark.parametrize("how", ["shared", "own", "full"])
def test_many_pieces_equal_one(how, monkeypatch):
    case = softmax_case(how, seed=3)
    whole = softmax_sum(*case, 0.1)
    gradients = torch.autograd.grad(whole.sum, case[:2])
    monkeypatch.setattr("scalerec.losses._pieces", lambda count, *_: [slice(p, p + 7) for p in range(0, count, 7)])
    cut = softmax_sum(*case, 0.1)
    torch.testing.assert_close(cut.sum, whole.sum)
    for one, other in zip(torch.autograd.grad(cut.sum, case[:2]), gradients):
        torch.testing.assert_close(one, other)


def test_own_pairs_equal_their_plain_twin(monkeypatch):
    for log_q in (None, torch.randn(40)):
        *case, weights = softmax_case("own", seed=7)
        for threads in (1, 3):
            monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
            sum_of, *gradients = pair_softmax(*case, weights, 20.0, -5e4, log_q)
            expected, of_queries = 0.0, torch.empty_like(case[0])
            pairs = _OwnPairs(case[1].detach(), *case[2:], log_q)
            for piece in (slice(0, 70), slice(70, 150)):
                queries, factor = case[0].detach()[piece], weights[piece]
                logs = pairs.logits(queries, piece, 20.0).log_softmax(1)
                expected -= logs[:, 0] @ factor
                slopes = logs.exp() - F.one_hot(torch.zeros(len(queries), dtype=torch.long), logs.shape[1])
                of_queries[piece] = pairs.differentiate(20 * slopes * factor[:, None], queries, piece)
            torch.testing.assert_close(sum_of, expected)
            torch.testing.assert_close(gradients, [of_queries, pairs.gradient()], rtol=1e-4, atol=1e-4)
        assert pair_softmax(*case, weights, 20.0, -5e4, log_q, differentiate=False) == (sum_of, None, None)


@pytest.mark.parametrize("place", [-1, 40])
def test_a_pair_with_no_such_candidate_is_refused(place):
    case = softmax_case("own")
    case[3][100, 5] = place
    with pytest.raises(IndexError, match="no row"):
        softmax_sum(*case, 0.1)


@pytest.mark.parametrize("negatives", [torch.tensor([1, 1]), torch.tensor([[1, 1]])])
def test_a_prediction_that_only_meets_its_target_loses_nothing(negatives):
    queries, candidates = torch.randn(1, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    term = sampled_softmax(queries, candidates, torch.tensor([1]), negatives, torch.ones(1), 0.05)
    gradients = torch.autograd.grad(term.sum, [queries, candidates])
    assert term.sum.item() == 0 and not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("how", ["shared", "own", "full"])
def test_softmax_rows_without_weight_may_hold_anything(how):
    queries, candidates, target, negatives, weights = softmax_case(how, seed=4)
    keep = torch.arange(150) % 3 != 0
    few = negatives[keep] if how == "own" else negatives
    expected = softmax_sum(queries[keep], candidates, target[keep], few, weights[keep], 0.1)
    wanted = torch.autograd.grad(expected.sum, candidates)[0]
    with torch.no_grad():
        queries[~keep] = float("nan")
    target[~keep] = -1
    if how == "own":
        negatives[~keep] = 10**9
    term = softmax_sum(queries, candidates, target, negatives, weights * keep, 0.1)
    torch.testing.assert_close(term, expected)
    of_queries, of_candidates = torch.autograd.grad(term.sum, [queries, candidates])
    torch.testing.assert_close(of_candidates, wanted)
    assert not of_queries[~keep].any() and of_queries[keep].all()


@pytest.mark.parametrize("how", ["shared", "own", "full"])
def test_softmax_of_nothing_adds_nothing(how):
    queries, candidates, target, negatives, weights = softmax_case(how)
    term = softmax_sum(queries, candidates, target, negatives, 0 * weights, 0.1)
    total({"next": term}).backward()
    assert term == (0, 0) and candidates.grad is not None and not candidates.grad.any()


@pytest.mark.parametrize("how", ["shared", "own", "full"])
def test_softmax_is_float32_inside(how):
    queries, candidates, *rest = softmax_case(how, seed=5)
    half = queries.detach().bfloat16().requires_grad_(), candidates.detach().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        term = softmax_sum(*half, *rest, 0.05)
    expected = softmax_sum(half[0].float(), half[1].float(), *rest, 0.05)
    assert term.sum.dtype == torch.float32
    torch.testing.assert_close(term, expected)
    assert [gradient.dtype for gradient in torch.autograd.grad(term.sum, half)] == [torch.bfloat16] * 2


def test_softmax_without_gradients():
    case = [tensor.detach() for tensor in softmax_case("own")]
    assert not softmax_sum(*case, 0.1).sum.requires_grad


def test_distinct_candidates_leave_the_loss_as_it_was():
    queries, table, target, negatives, weights = softmax_case("own", seed=6, predictions=10, count=400)
    used, few_target, few_negatives = distinct(400, target, negatives)
    assert used.tolist() == sorted({*target.tolist(), *negatives.flatten().tolist()})
    torch.testing.assert_close(used[few_negatives], negatives)
    term = sampled_softmax(queries, table[used], few_target, few_negatives, weights, 0.1)
    torch.testing.assert_close(term, sampled_softmax(queries, table, target, negatives, weights, 0.1))


def test_log_frequency():
    found = log_frequency(torch.tensor([[4, 1], [1, 1]]), 5)
    torch.testing.assert_close(found.exp(), torch.tensor([0.25, 0.75, 0.25, 0.25, 0.25]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.randn(4, 3)}, "are needed"),
        ({"target": torch.zeros(3, dtype=torch.long)}, "one each per query"),
        ({"weights": torch.ones(4, 1)}, "one each per query"),
        ({"negatives": torch.zeros(3, 2, dtype=torch.long)}, "negatives have shape"),
        ({"negatives": torch.tensor(1)}, "negatives have shape"),
        ({"temperature": 0.0}, "temperature"),
    ],
)
def test_bad_softmax_arguments_are_named(change, message):
    arguments = {
        "queries": torch.randn(4, 2),
        "candidates": torch.randn(5, 2),
        "target": torch.zeros(4, dtype=torch.long),
        "negatives": torch.zeros(3, dtype=torch.long),
        "weights": torch.ones(4),
        "temperature": 0.1,
    }
    sampled_softmax(**arguments)
    with pytest.raises(InputError, match=message):
        sampled_softmax(**(arguments | change))

"""Ranks by hand and against a sort, HR and NDCG against scikit-learn, intervals against known truth."""

from math import inf, log2

import numpy as np
import pytest
import torch
from scipy import stats
from sklearn import metrics as sk

from scalerec import topk
from scalerec.batch import Jagged
from scalerec.errors import InputError


def lists(*rows):
    return Jagged.from_lengths(
        torch.tensor([v for row in rows for v in row], dtype=torch.long), torch.tensor([len(r) for r in rows])
    )


def none(n):
    return lists(*([] for _ in range(n)))


def slow_ranks(scores, target, excluded):
    """The place by sorting: the mean of the best and the worst one that ties allow."""
    found = []
    for row, goal, gone in zip(scores.tolist(), target.tolist(), excluded):
        others = sorted((value for j, value in enumerate(row) if j != goal and j not in gone), reverse=True)
        best = next((i for i, value in enumerate(others) if value <= row[goal]), len(others))
        worst = next((i for i, value in enumerate(others) if value < row[goal]), len(others))
        found.append(1 + (best + worst) / 2)
    return found


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.8, 0.7, 0.6]] * 5)
    excluded = lists([], [0], [0, 1, 0], [2, 3], [0, -3])
    # first; second; both better ones gone, one of them twice; the target itself stays; ids below 0 mean nothing
    found = topk.ranks(scores, torch.tensor([0, 2, 2, 2, 3]), excluded)
    assert found.tolist() == [1, 2, 1, 3, 3]
    assert found.dtype == torch.float64


def test_ties_count_half():
    scores = torch.tensor([[0.5, 0.5, 0.5, 0.9], [0.0, 0.0, 0.0, 0.0], [-inf, -inf, -inf, 1.0]])
    found = topk.ranks(scores, torch.tensor([1, 0, 0]), lists([2], [], [1]))
    assert found.tolist() == [1 + 1 + 0.5, 1 + 1.5, 1 + 1 + 0.5]


def test_target_that_is_no_candidate_is_never_found():
    found = topk.ranks(torch.eye(3), torch.tensor([-1, 1, -2]), none(3))
    assert found.tolist() == [inf, 1, inf]
    assert topk.table(found)["hr@500"] == topk.table(found)["mrr"] == pytest.approx(1 / 3)


@pytest.mark.parametrize("piece", [1, 50, 10**6])
def test_ranks_equal_a_sort(piece, monkeypatch):
    monkeypatch.setattr(topk, "PIECE", piece)
    random = np.random.default_rng(0)
    scores = torch.from_numpy(random.integers(0, 15, (40, 23)) / 4)  # many ties
    target = torch.from_numpy(random.integers(0, 23, 40))
    gone = [random.integers(0, 23, random.integers(0, 12)).tolist() for _ in range(40)]
    kept = scores.clone()
    found = topk.ranks(scores, target, lists(*gone))
    assert found.tolist() == slow_ranks(scores, target, gone)
    torch.testing.assert_close(scores, kept)  # not changed in place


def test_product_ranks_score_and_rank(monkeypatch):
    monkeypatch.setattr(topk, "PIECE", 100)
    torch.manual_seed(0)
    queries, catalogue = torch.randn(30, 4).double(), torch.randn(50, 4).double()
    target, gone = torch.randint(50, (30,)), [[i, i + 1] for i in range(30)]
    found = topk.product_ranks(queries, catalogue, target, lists(*gone))
    assert found.tolist() == slow_ranks(queries @ catalogue.T, target, gone)


def test_a_user_without_a_vector_gets_the_middle():
    found = topk.product_ranks(torch.zeros(1, 4), torch.randn(101, 4), torch.tensor([7]), none(1))
    assert found.tolist() == [51]


# Tables


def test_table_by_hand():
    found = topk.table([1, 3, 7, 20, 150, 1000])
    sixth = 1 / 6
    assert [found[f"hr@{k}"] for k in (1, 10, 50, 100, 200, 500)] == pytest.approx(
        [sixth, 3 * sixth, 4 * sixth, 4 * sixth, 5 * sixth, 5 * sixth]
    )
    to_10 = 1 + 1 / 2 + 1 / 3
    assert found["ndcg@10"] == pytest.approx(to_10 / 6)
    assert found["ndcg@50"] == pytest.approx((to_10 + 1 / log2(21)) / 6)
    assert found["ndcg@200"] == pytest.approx((to_10 + 1 / log2(21) + 1 / log2(151)) / 6)
    assert found["mrr"] == pytest.approx((1 + 1 / 3 + 1 / 7 + 1 / 20 + 1 / 150 + 1 / 1000) / 6)
    assert found["n"] == 6 and len(found) == 11


def test_table_equals_scikit_learn():
    torch.manual_seed(1)
    scores, target = torch.rand(60, 300).double(), torch.randint(300, (60,))
    found = topk.table(topk.ranks(scores, target, none(60)))
    truth = np.eye(300)[target]
    for k in (10, 50, 200):
        assert found[f"ndcg@{k}"] == pytest.approx(sk.ndcg_score(truth, scores.numpy(), k=k), abs=1e-12)
    for k in (1, 10, 50, 100, 200):
        expected = sk.top_k_accuracy_score(target, scores.numpy(), k=k, labels=np.arange(300))
        assert found[f"hr@{k}"] == pytest.approx(expected, abs=1e-12)
    assert found["mrr"] == pytest.approx(sk.label_ranking_average_precision_score(truth, scores.numpy()), abs=1e-12)


def test_table_of_nothing_is_not_a_number():
    found = topk.table([])
    assert found.pop("n") == 0 and all(np.isnan(value) for value in found.values())


# Intervals


def ndcg(places):
    return topk.table(places)["ndcg@10"]


def test_difference_is_that_of_the_tables_and_its_interval_welchs():
    """By a loop that really repeats the drawn users' requests, on the same draws."""
    random = np.random.default_rng(2)
    users = random.integers(0, 25, 120) * 10**9
    a, b = random.integers(1, 40, (2, 3, 120))
    found = topk.paired_bootstrap(users, a, b, "ndcg@10", replicates=15, seed=4)
    draws, everyone, values = np.random.default_rng(4), np.unique(users), []
    for _ in range(15):
        counts = np.bincount(draws.integers(len(everyone), size=len(everyone)), minlength=len(everyone))
        rows = np.repeat(np.arange(120), counts[np.searchsorted(everyone, users)])
        values.append(np.mean([ndcg(b[s, rows]) - ndcg(a[s, rows]) for s in range(3)]))
    of_seeds = np.array([ndcg(b[s]) - ndcg(a[s]) for s in range(3)])
    assert found.mean == pytest.approx(of_seeds.mean(), abs=1e-12) and found.replicates == 15
    parts = np.var(values, ddof=1), of_seeds.var(ddof=1) / 3
    freedom = sum(parts) ** 2 / (parts[0] ** 2 / (len(everyone) - 1) + parts[1] ** 2 / 2)
    expected = stats.t.interval(0.95, freedom, of_seeds.mean(), np.sqrt(sum(parts)))
    assert [found.low, found.high] == pytest.approx(expected, abs=1e-9)


def test_identical_ranks_differ_by_nothing():
    places = np.random.default_rng(3).integers(1, 100, (2, 50))
    found = topk.paired_bootstrap(np.arange(50), places, places.copy(), "mrr", replicates=20)
    assert (found.mean, found.low, found.high) == (0, 0, 0) and not found.resolved


def test_interval_covers_the_truth():
    """Model a hits with chance 0.3 and b with 0.4, all five requests of a user alike."""
    covered, widths, means = 0, [], []
    for run in range(150):
        random = np.random.default_rng(run)
        users, luck = np.repeat(np.arange(200), 5), np.repeat(random.random((2, 200)), 5, axis=1)
        a, b = np.where(luck[0] < 0.3, 1, 99), np.where(luck[1] < 0.4, 1, 99)
        found = topk.paired_bootstrap(users, a, b, replicates=150)
        covered += found.low <= 0.1 <= found.high
        widths.append(found.high - found.low)
        means.append(found.mean)
    assert covered / 150 >= 0.9
    assert 0.8 < np.mean(widths) / (2 * 1.96 * np.std(means, ddof=1)) < 1.25


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: topk.ranks(torch.tensor([[0.1, float("nan")]]), torch.tensor([0]), none(1)), "NaN"),
        (lambda: topk.ranks(torch.rand(2, 3), torch.tensor([0]), none(2)), "one of each"),
        (lambda: topk.ranks(torch.rand(2, 3), torch.tensor([0, 1]), none(1)), "one of each"),
        (lambda: topk.ranks(torch.rand(1, 3), torch.tensor([3]), none(1)), "target 3 is beyond"),
        (lambda: topk.ranks(torch.rand(1, 3), torch.tensor([0]), lists([5])), "excluded 5 is beyond"),
        (lambda: topk.table([0.5, 2]), "from 1 on"),
        (lambda: topk.table([float("nan")]), "from 1 on"),
        (lambda: topk.of_rank([1], "auc@3"), "auc@3"),
        (lambda: topk.of_rank([1], "hr@x"), "hr@x"),
        (lambda: topk.paired_bootstrap([1, 2], [1, 2], [1, 2, 3]), "the same requests"),
        (lambda: topk.paired_bootstrap([1, 1], [1, 2], [1, 2]), "two users"),
        (lambda: topk.paired_bootstrap([1], [1, 2], [1, 2]), "users have shape"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)

"""Metrics against scikit-learn, brute force and by hand; intervals against a slow twin and known truth."""

from math import log, sqrt
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sk

from scalerec import metrics
from scalerec.errors import InputError
from scalerec.metrics import Difference, bootstrap, paired_bootstrap

METRICS = ("auc", "uauc", "log_loss", "ne")

# Few values, so that they often tie, as -0.0 and 0.0 must. Those of DOUBLE do not fit float32.
SINGLE = st.sampled_from([-np.inf, -2.5, -1.0, -(2.0**-70), -0.0, 0.0, 0.5, 3.0, np.inf])
DOUBLE = st.sampled_from([-1e200, -1.0, -1e-50, -0.0, 0.0, 1e-50, 1.0, 1.0 + 1e-12])
USERS = st.sampled_from([0, 1, 2, -7, 2**31, -(2**63), 2**63 - 1])


@st.composite
def logs(draw):
    """Users, labels, scores and integer weights of up to 40 rows."""
    row = st.tuples(USERS, st.booleans(), draw(st.sampled_from([SINGLE, DOUBLE])), st.integers(0, 3))
    return [np.array(column) for column in zip(*draw(st.lists(row, min_size=1, max_size=40)), strict=True)]


def by_pairs(labels, scores):
    """AUC by its definition, from every pair of a positive and a negative row."""
    positive, negative = scores[labels == 1][:, None], scores[labels == 0]
    wins = (positive > negative) + 0.5 * (positive == negative)
    return wins.mean() if wins.size else float("nan")


def by_loop(users, labels, scores):
    """UAUC by a loop over users: weighted, plain, counted, skipped."""
    values, rows = [], []
    for user in np.unique(users):
        mine = users == user
        if 0 < labels[mine].sum() < mine.sum():
            values.append(sk.roc_auc_score(labels[mine], scores[mine]))
            rows.append(mine.sum())
    return np.average(values, weights=rows), np.mean(values), len(values), len(np.unique(users)) - len(values)


def random_log(seed, rows=3000, users=200):
    """Users as hash codes, labels, and probabilities that know something of them, with ties."""
    random = np.random.default_rng(seed)
    owner = random.zipf(1.3, rows) % users
    chance = random.beta(2, 3, rows)
    codes = random.integers(-(2**63), 2**63 - 1, users)
    return codes[owner], (random.random(rows) < chance).astype(int), np.round(0.05 + 0.9 * chance, 2)


def test_auc_by_hand():
    labels, scores = [1, 0, 1, 0], [0.9, 0.9, 0.5, 0.1]  # pairs: tie, win, loss, win
    assert metrics.auc(labels, scores) == 2.5 / 4
    assert metrics.auc(labels, scores, weights=[2, 1, 1, 3]) == (2 * 0.5 + 2 * 3 + 0 + 3) / (3 * 4)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int8, np.uint64])
def test_auc_equals_scikit_learn(dtype, weighted):
    random = np.random.default_rng(0)
    labels = random.random(5000) < 0.3
    scores = (random.normal(20, 5, 5000).clip(0) + 2 * labels).astype(dtype)
    weights = random.random(5000) if weighted else None
    expected = sk.roc_auc_score(labels, scores, sample_weight=weights)
    assert metrics.auc(labels, scores, weights) == pytest.approx(expected, abs=1e-12)


@given(logs())
def test_auc_is_its_definition(rows):
    _, labels, scores, _ = rows
    assert metrics.auc(labels, scores) == pytest.approx(by_pairs(labels, scores), abs=1e-12, nan_ok=True)


@given(logs())
def test_integer_weight_equals_repetition(rows):
    _, labels, scores, weights = rows
    repeated = metrics.auc(np.repeat(labels, weights), np.repeat(scores, weights))
    assert metrics.auc(labels, scores, weights) == pytest.approx(repeated, abs=1e-12, nan_ok=True)


def test_large_integers_are_not_rounded_into_ties():
    assert metrics.auc([0, 1], np.array([2**62, 2**62 + 1])) == 1
    assert metrics.auc([0, 1, 0], np.array([2**62, 2**62 + 1, 0])) == 1


@pytest.mark.parametrize("labels", [[], [1, 1], [0, 0]])
def test_one_class_has_no_auc(labels):
    scores = np.linspace(0.2, 0.8, len(labels))
    assert np.isnan(metrics.auc(labels, scores))
    assert np.isnan(metrics.auc(labels, scores, np.ones(len(labels))))
    found = metrics.uauc([3] * len(labels), labels, scores)
    assert np.isnan(found.weighted) and np.isnan(found.plain)
    assert (found.users, found.skipped) == (0, int(len(labels) > 0))


def test_class_without_weight_has_no_auc():
    assert np.isnan(metrics.auc([0, 1], [0.1, 0.2], weights=[1, 0]))


# UAUC


def test_uauc_by_hand():
    users = [7, 7, 7, 7, 2, 2, 5, 5]  # 7: 3 of 4 pairs; 2: a loss; 5: one class
    labels = [1, 1, 0, 0, 1, 0, 1, 1]
    scores = [9, 4, 1, 5, 1, 2, 0, 1]
    found = metrics.uauc(users, labels, scores)
    assert found == metrics.UAUC(weighted=(4 * 0.75 + 2 * 0) / 6, plain=0.375, users=2, skipped=1)
    by_user = metrics.auc_by_user(users, labels, scores)
    assert by_user.users.tolist() == [2, 5, 7] and by_user.rows.tolist() == [2, 2, 4]
    np.testing.assert_array_equal(by_user.auc, [0, np.nan, 0.75])


@pytest.mark.parametrize("spread", [1, 2**33])  # ids close together, and too far apart to be used as they are
@pytest.mark.parametrize("jitter", [0, 1e-9])  # scores that float32 can hold, and scores that it cannot
def test_uauc_equals_loop_over_users(spread, jitter):
    random = np.random.default_rng(1)
    users = random.integers(-100, 100, 4000) * spread
    labels = random.integers(0, 2, 4000)
    scores = random.integers(0, 8, 4000) / 4 + jitter * random.integers(0, 3, 4000)
    found = metrics.uauc(users, labels, scores)
    weighted, plain, counted, skipped = by_loop(users, labels, scores)
    assert found.weighted == pytest.approx(weighted, abs=1e-12)
    assert found.plain == pytest.approx(plain, abs=1e-12)
    assert (found.users, found.skipped) == (counted, skipped)


@given(logs())
def test_auc_of_each_user_is_its_auc_alone(rows):
    users, labels, scores, _ = rows
    found = metrics.auc_by_user(users, labels, scores)
    assert found.users.tolist() == sorted(set(users.tolist()))
    for user, value, count in zip(*found, strict=True):
        mine = users == user
        assert count == mine.sum()
        assert value == pytest.approx(by_pairs(labels[mine], scores[mine]), abs=1e-12, nan_ok=True)


# Probabilities


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("weighted", [False, True])
def test_log_loss_equals_scikit_learn(dtype, weighted):
    random = np.random.default_rng(4)
    labels = random.integers(0, 2, 1000)
    chances = random.random(1000).astype(dtype)
    chances[:4] = 0, 1, 0, 1  # two of them wrong whatever the labels: the loss must stay finite
    labels[:4] = 0, 1, 1, 0
    weights = random.random(1000) if weighted else None
    expected = sk.log_loss(labels, chances, sample_weight=weights)
    assert metrics.log_loss(labels, chances, weights) == pytest.approx(expected, rel=1e-6)


def test_normalised_entropy():
    labels = np.array([1, 0, 0, 0])
    assert metrics.normalised_entropy(labels, np.full(4, 0.25)) == pytest.approx(1, abs=1e-15)
    half = log(2) / (0.25 * log(4) + 0.75 * log(4 / 3))
    assert metrics.normalised_entropy(labels, np.full(4, 0.5)) == pytest.approx(half, abs=1e-15)
    chances, weights = np.array([0.6, 0.1, 0.3, 0.2]), [3, 1, 2, 0]
    repeated = metrics.normalised_entropy(np.repeat(labels, weights), np.repeat(chances, weights))
    assert metrics.normalised_entropy(labels, chances, weights) == pytest.approx(repeated)
    assert np.isnan(metrics.normalised_entropy([1, 1], [0.5, 0.9]))


def test_calibration():
    assert metrics.calibration([1, 0, 0, 0], [0.5, 0.5, 0.25, 0.25]) == 1.5
    assert np.isnan(metrics.calibration([0, 0], [0.5, 0.5]))
    chances = np.full(2**20, 0.1, np.float32)  # summed in float32 they would be off in the fourth digit
    labels = np.arange(2**20) % 8 == 0
    assert metrics.calibration(labels, chances) == pytest.approx(0.8, rel=1e-6)


def test_recalibration_undoes_sampling():
    chance, keep = np.linspace(0, 1, 11), 0.05
    sampled = chance / (chance + (1 - chance) * keep)  # Bayes: the chance once negatives were thinned out
    np.testing.assert_allclose(metrics.recalibrate(sampled, keep), chance, atol=1e-15)
    np.testing.assert_array_equal(metrics.recalibrate([[0.2], [0.7]], 1.0), [[0.2], [0.7]])


def test_table():
    users, labels, chances = random_log(5)
    weighted, plain, _, _ = by_loop(users, labels, chances)
    loss = sk.log_loss(labels, chances)
    expected = {
        "auc": sk.roc_auc_score(labels, chances),
        "uauc": weighted,
        "uauc_plain": plain,
        "log_loss": loss,
        "ne": loss / sk.log_loss(labels, np.full(len(labels), labels.mean())),
        "calibration": chances.mean() / labels.mean(),
        "rows": len(labels),
        "positives": labels.sum(),
        "users": len(set(users.tolist())),
    }
    assert metrics.table(users, labels, chances) == pytest.approx(expected, abs=1e-12)


def test_table_of_nothing_is_not_a_number():
    found = metrics.table([], [], [])
    sizes = [found.pop(name) for name in ("rows", "positives", "users")]
    assert sizes == [0, 0, 0] and len(found) == 6
    assert all(np.isnan(value) for value in found.values())


# Intervals


@pytest.mark.parametrize("metric", METRICS)
def test_bootstrap_equals_its_slow_twin(metric):
    """The same draws, with every drawn user's rows really repeated."""
    users, labels, chances = random_log(7, rows=400, users=30)
    models_a = np.stack([chances, np.round(chances**2, 2) + 0.01, np.clip(chances[::-1], 0.1, 0.8)])
    models_b = 0.5 * models_a + 0.4 * labels * np.array([[0.1], [0.3], [0.2]])

    def value(models, rows, drawn):
        of = {
            "auc": lambda scores: sk.roc_auc_score(labels[rows], scores[rows]),
            "uauc": lambda scores: by_loop(users[rows], labels[rows], scores[rows])[0],
            "log_loss": lambda scores: sk.log_loss(labels[rows], scores[rows]),
            "ne": lambda scores: metrics.normalised_entropy(labels[rows], scores[rows]),
        }[metric]
        return np.mean([of(models[s]) for s in drawn])

    random, everyone = np.random.default_rng(3), np.unique(users)
    values = []
    for _ in range(12):
        counts = np.bincount(random.integers(len(everyone), size=len(everyone)), minlength=len(everyone))
        rows = np.repeat(np.arange(400), counts[np.searchsorted(everyone, users)])
        values.append([[value(models, rows, [s]) for s in range(3)] for models in (models_a, models_b)])
    a, b = np.moveaxis(values, 1, 0)  # [draws, seeds] each
    of_a, of_b = (np.array([value(models, slice(None), [s]) for s in range(3)]) for models in (models_a, models_b))

    found = paired_bootstrap(users, labels, models_a, models_b, metric, replicates=12, seed=3)
    assert (found.mean, found.replicates) == (pytest.approx((of_b - of_a).mean(), abs=1e-12), 12)
    assert [found.low, found.high] == pytest.approx(interval(b - a, of_b - of_a, 30), abs=1e-9)
    single = bootstrap(users, labels, models_a, metric, replicates=12, seed=3)
    assert [single.low, single.high] == pytest.approx(interval(a, of_a, 30), abs=1e-9)


def interval(drawn, values, users):
    """Welch's interval: `drawn` [draws, S] for redrawn users, `values` [S] for all of them."""
    parts = [(np.mean(drawn, 1).var(ddof=1), users - 1), (values.var(ddof=1) / len(values), len(values) - 1)]
    variance = sum(part for part, _ in parts)
    freedom = variance**2 / sum(part**2 / degrees for part, degrees in parts)
    return stats.t.interval(0.95, freedom, values.mean(), np.sqrt(variance))


@pytest.mark.parametrize("metric", METRICS)
def test_identical_models_differ_by_exactly_nothing(metric):
    users, labels, chances = random_log(8)
    models = np.stack([chances, chances**2, chances[::-1]])  # very different seeds: only pairing cancels them
    found = paired_bootstrap(users, labels, models, models.copy(), metric, replicates=50)
    assert (found.mean, found.low, found.high) == (0, 0, 0) and not found.resolved


def coverage(draw, truth, metric, runs=150):
    """How often the interval holds the truth, and its width over what the estimates' spread asks for."""
    found = []
    for run in range(runs):
        users, labels, a, b = draw(np.random.default_rng(run))
        found.append(paired_bootstrap(users, labels, a, b, metric, replicates=150))
    covered = np.mean([difference.low <= truth <= difference.high for difference in found])
    width = np.mean([difference.high - difference.low for difference in found])
    return covered, width / (2 * 1.96 * np.std([difference.mean for difference in found], ddof=1))


def test_interval_of_log_loss_covers_the_truth():
    """Half of the users click at 10 %, half at 90 %; a says 50 %, b mistakes 3 users in 10."""

    def draw(random):
        users = np.repeat(np.arange(100), 10)
        chance = random.choice([0.1, 0.9], 100)
        guess = np.where(random.random(100) < 0.3, 1 - chance, chance)
        return users, random.random(1000) < chance[users], np.full(1000, 0.5), guess[users]

    loss_b = 0.7 * -(0.9 * log(0.9) + 0.1 * log(0.1)) + 0.3 * -(0.9 * log(0.1) + 0.1 * log(0.9))
    covered, width = coverage(draw, loss_b - log(2), "log_loss")
    assert covered >= 0.9 and 0.8 < width < 1.25


def test_interval_of_auc_covers_the_truth():
    """Normal scores with an offset per user: means d apart and variance v give the AUC Phi(d / sqrt(2 v))."""

    def draw(random):
        users = np.repeat(np.arange(200), 8)
        labels = random.random(1600) < random.choice([0.1, 0.7], 200)[users]
        offset, noise = random.normal(size=(2, 200))[:, users], random.normal(size=1600)
        return users, labels, offset[0] + noise + 0.5 * labels, 2 * offset[1] + noise + 1.5 * labels

    phi = NormalDist().cdf
    covered, width = coverage(draw, phi(1.5 / sqrt(2 * 5)) - phi(0.5 / sqrt(2 * 2)), "auc")
    assert covered >= 0.9 and 0.8 < width < 1.25


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("noise", [0.0, 0.3, 1.0])
def test_interval_covers_the_truth_however_much_seeds_differ(seeds, noise):
    """The log loss of two models that are equal but for what their seeds do to all their scores."""
    covered, runs = 0, 400
    for run in range(runs):
        random = np.random.default_rng(run)
        users, labels = np.arange(40), random.random(40) < 0.5
        logits = random.normal(size=(2, seeds, 40)) * 0.2 + random.normal(size=(2, seeds, 1)) * noise
        a, b = 1 / (1 + np.exp(-logits))
        found = paired_bootstrap(users, labels, a, b, "log_loss", replicates=100, seed=run)
        covered += found.low <= 0 <= found.high
    assert covered / runs >= 0.93


def test_pairing_resolves_what_single_intervals_cannot():
    users, labels, chances = random_log(9)
    better = chances + 0.01 * labels
    paired = paired_bootstrap(users, labels, chances, better, replicates=200)
    alone = bootstrap(users, labels, chances, replicates=200)
    assert paired.resolved and paired.low > 0
    assert alone.low < alone.mean < alone.high
    assert alone.high - alone.low > 5 * (paired.high - paired.low)


def test_seeds_that_disagree_widen_the_interval():
    users, labels, chances = random_log(10)
    weak = np.where(np.arange(len(labels)) % 2, chances, 0.5)
    agree = bootstrap(users, labels, np.stack([chances] * 4), replicates=200)
    disagree = bootstrap(users, labels, np.stack([chances, weak, chances, weak]), replicates=200)
    assert disagree.high - disagree.low > 1.5 * (agree.high - agree.low)


def test_draws_without_both_classes_are_left_out():
    found = bootstrap([1, 2], [1, 0], [0.9, 0.1], replicates=200)  # half of the draws hold one user twice
    assert (found.mean, found.low, found.high) == (1, 1, 1)
    assert 60 < found.replicates < 140
    users, labels = [1, 1, 2, 2, 3, 4, 5, 6], [0, 1, 0, 1, 1, 1, 1, 1]  # users 1 and 2 may both be left out
    with np.errstate(all="raise"):
        found = bootstrap(users, labels, labels, "uauc", replicates=200)
    assert (found.mean, found.low, found.high) == (1, 1, 1)
    assert 150 < found.replicates < 200


def test_resolved_means_zero_is_outside():
    assert Difference(2, 1, 3, 500).resolved and Difference(-2, -3, -1, 500).resolved
    assert not Difference(1, -1, 3, 500).resolved and not Difference(1, 0, 3, 500).resolved
    assert not Difference(1, float("nan"), float("nan"), 0).resolved


def test_seed_decides_the_draws():
    users, labels, chances = random_log(11, rows=300)
    first, same, other = [bootstrap(users, labels, chances, seed=seed, replicates=20) for seed in (1, 1, 2)]
    assert first == same and first != other


# Input that is refused


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc([0, 1], [0.1]), "scores have shape"),
        (lambda: metrics.auc([0, 1], [[0.1, 0.2]]), "scores have shape"),
        (lambda: metrics.auc([[0, 1]], [[0.1, 0.2]]), "labels have shape"),
        (lambda: metrics.auc([0, 2], [0.1, 0.2]), "0 or 1"),
        (lambda: metrics.auc([0, float("nan")], [0.1, 0.2]), "0 or 1"),
        (lambda: metrics.auc(["no", "yes"], [0.1, 0.2]), "0 or 1"),
        (lambda: metrics.auc([0, 1], [0.1, float("nan")]), "NaN"),
        (lambda: metrics.auc([0, 1], ["a", "b"]), "numbers"),
        (lambda: metrics.auc([0, 1], [0.1, 0.2], [1]), "weights have shape"),
        (lambda: metrics.auc([0, 1], [0.1, 0.2], [1, -1]), "not negative"),
        (lambda: metrics.auc([0, 1], [0.1, 0.2], [1, float("nan")]), "finite"),
        (lambda: metrics.auc([0, 1], [0.1, 0.2], [1, float("inf")]), "finite"),
        (lambda: metrics.uauc([1], [0, 1], [0.1, 0.2]), "users have shape"),
        (lambda: metrics.uauc([0.5, 1], [0, 1], [0.1, 0.2]), "integer"),
        (lambda: metrics.log_loss([0, 1], [0.1, 1.2]), "between 0 and 1"),
        (lambda: metrics.calibration([0, 1], [-0.1, 0.2]), "between 0 and 1"),
        (lambda: metrics.recalibrate([0.5, 2.0], 0.1), "between 0 and 1"),
        (lambda: metrics.recalibrate([0.5], 0.0), "keep_rate"),
        (lambda: metrics.recalibrate([0.5], 1.5), "keep_rate"),
        (lambda: metrics.table([1, 1], [0, 1], [0.1, float("nan")]), "NaN"),
        (lambda: bootstrap([1, 1], [0, 1], [0.1, 0.2]), "two users"),
        (lambda: bootstrap([1, 1, 2], [0, 1, 1], [0.1, 0.2, 0.3], "uauc"), "both classes"),
        (lambda: bootstrap([1, 2], [0, 1], [0.1, 0.2], "mse"), "mse"),  # type: ignore[arg-type]
        (lambda: bootstrap([1, 2], [0, 1], [[0.1], [0.2]]), "scores have shape"),
        (lambda: paired_bootstrap([1, 2], [0, 1], [[0.1, 0.2]] * 2, [[0.1, 0.2]] * 3), "same number"),
        (lambda: paired_bootstrap([1, 2], [0, 1], [0.1, 0.2], [0.1, float("nan")]), "NaN"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(InputError, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)

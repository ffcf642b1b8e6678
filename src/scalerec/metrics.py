"""How good scores are, of classes and of probabilities, and how sure that is, by bootstrap over users.

n rows   U users   S seeds (models that differ only in their seed, scored on the same rows)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from scalerec.errors import InputError
from scalerec.intervals import Difference, Estimate, Measure, dense_codes, one_per_row, owners, user_ids

Metric = Literal["auc", "uauc", "log_loss", "ne"]  # uauc: weighted by impressions
Array = np.ndarray
Weights = ArrayLike | None  # of each row [n]; None: all rows count the same
NAN = float("nan")


def auc(labels: ArrayLike, scores: ArrayLike, weights: Weights = None) -> float:
    """Chance that a positive row outranks a negative one, ties counting half; NaN when a class is missing."""
    clicked = _labels(labels)
    values = _scores(scores, len(clicked))
    if weights is not None:
        return _Ranking(clicked, values, np.arange(len(clicked))).auc(_weights(weights, len(clicked)))
    everyone = np.zeros(len(clicked), np.uint64)
    return float(_auc_by_group(everyone, clicked, values)[0][0]) if len(clicked) else NAN


@dataclass(frozen=True)
class UAUC:
    """The mean AUC of the users that have both classes; the others are skipped."""

    weighted: float  # by the user's rows (impressions)
    plain: float  # every user counts the same
    users: int
    skipped: int


def uauc(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> UAUC:
    """AUC within each user, averaged; NaN when no user has both classes."""
    found = auc_by_user(users, labels, scores)
    known = np.flatnonzero(~np.isnan(found.auc))
    values, rows = found.auc[known], found.rows[known]
    weighted, plain = _ratio(np.dot(values, rows), rows.sum()), _ratio(values.sum(), len(known))
    return UAUC(weighted, plain, len(known), len(found.auc) - len(known))


class ByUser(NamedTuple):
    users: Array  # [U] ascending
    auc: Array  # [U] NaN for a user without both classes
    rows: Array  # [U]


def auc_by_user(users: ArrayLike, labels: ArrayLike, scores: ArrayLike) -> ByUser:
    """The AUC of every user on its own rows."""
    clicked = _labels(labels)
    values = _scores(scores, len(clicked))
    ids = user_ids(users, len(clicked))
    if not len(ids):
        return ByUser(ids, np.empty(0), np.empty(0, np.int64))
    found, rows = _auc_by_group(_codes(ids), clicked, values)
    return ByUser(np.sort(ids)[np.cumsum(rows) - rows], found, rows)


def _auc_by_group(groups: Array, clicked: Array, scores: Array) -> tuple[Array, Array]:
    """AUC and rows of each group present, in order of its code (below 2**31); all in one sort.

    Group, score and label fit one 64-bit integer, and sorting plain integers is several times as fast as
    finding an order and applying it. Where scores tie, negatives come first, so the negatives before a
    positive in its group are those below it and those tied with it; of the latter, half are taken back.
    """
    keys = groups << np.uint64(33)
    keys |= _codes(scores) << np.uint64(1)
    keys |= clicked
    keys.sort()

    group = keys >> np.uint64(33)
    bounds = np.concatenate([[0], np.flatnonzero(group[1:] != group[:-1]) + 1, [len(keys)]])
    positive = np.flatnonzero((keys & np.uint64(1)).view(np.int64))
    before = np.searchsorted(positive, bounds)  # positives before each bound
    positives, rows = np.diff(before), np.diff(bounds)
    negatives = rows - positives

    # The k-th positive, at p[k], has p[k] - k negatives before it, those of earlier groups included.
    below = np.concatenate([[0], np.cumsum(positive - np.arange(len(positive)))])
    wins = (np.diff(below[before]) - positives * (bounds - before)[:-1]).astype(np.float64)

    # Keys that differ in the label alone: where the negatives of a tie end and its positives begin.
    seam = np.flatnonzero((keys[1:] ^ keys[:-1]) == 1)
    tied_negatives = seam + 1 - np.searchsorted(keys, keys[seam])
    tied_positives = np.searchsorted(keys, keys[seam + 1], side="right") - seam - 1
    owner = np.searchsorted(bounds, seam, side="right") - 1
    wins -= 0.5 * np.bincount(owner, tied_negatives * tied_positives.astype(np.float64), minlength=len(rows))

    with np.errstate(invalid="ignore"):
        return wins / (positives * negatives), rows


def _codes(values: Array) -> Array:
    """uint64 codes [n], below 2**31 (integers) or 2**32 (floats), that order and tie as the values do."""
    if values.dtype.kind in "iu":
        low = values.min()
        if int(values.max()) - int(low) < 2**31:
            return values.astype(np.uint64) - low.astype(np.uint64)  # negative values wrap, and wrap back
    else:
        with np.errstate(over="ignore"):
            single = values.astype(np.float32)
        if values.dtype == np.float32 or np.array_equal(single, values):
            bits = (single + np.float32(0)).view(np.uint32)  # + 0 turns -0.0 into 0.0: they must tie
            flip = np.where(bits >> 31, np.uint32(0xFFFFFFFF), np.uint32(0x80000000))
            return (bits ^ flip).astype(np.uint64)
    return dense_codes(values)[0].astype(np.uint64)


class _Ranking:
    """Scores sorted once, so that their AUC under ever new weights costs one pass over the rows."""

    def __init__(self, clicked: Array, scores: Array, owner: Array):
        positive, negative = np.flatnonzero(clicked), np.flatnonzero(~clicked)
        positive = positive[np.argsort(scores[positive])]
        negative = negative[np.argsort(scores[negative])]
        self.positive, self.negative = owner[positive], owner[negative]
        self.below = np.searchsorted(scores[negative], scores[positive], side="left")
        self.not_above = np.searchsorted(scores[negative], scores[positive], side="right")
        self.tied = not np.array_equal(self.below, self.not_above)

    def auc(self, weights: Array) -> float:
        """AUC when a row weighs what its owner does; NaN when a class has no weight."""
        positive = weights[self.positive]
        negative = np.zeros(len(self.negative) + 1)
        np.cumsum(weights[self.negative], out=negative[1:])
        pairs = positive.sum() * negative[-1]
        if not pairs > 0:
            return NAN
        wins = positive @ negative[self.below]
        if self.tied:
            wins = (wins + positive @ negative[self.not_above]) / 2
        return float(wins / pairs)


def log_loss(labels: ArrayLike, probabilities: ArrayLike, weights: Weights = None) -> float:
    """Mean binary cross entropy in nats; 0 and 1 are moved inwards by the epsilon of their own type."""
    return _mean(_losses(labels, probabilities)[1], weights)


def normalised_entropy(labels: ArrayLike, probabilities: ArrayLike, weights: Weights = None) -> float:
    """Log loss over that of always predicting the base rate of these rows; NaN when a class is missing."""
    clicked, losses = _losses(labels, probabilities)
    return _ratio(_mean(losses, weights), _entropy(_mean(clicked, weights)))


def calibration(labels: ArrayLike, probabilities: ArrayLike) -> float:
    """Mean prediction over mean label, 1 at best; NaN when no row is positive."""
    clicked = _labels(labels)
    values = _probabilities(probabilities, len(clicked))
    return _ratio(values.sum(dtype=np.float64), clicked.sum())


def recalibrate(probabilities: ArrayLike, keep_rate: float) -> Array:
    """Probabilities on all rows, from a model trained on every positive and `keep_rate` of the negatives."""
    if not 0 < keep_rate <= 1:
        raise InputError(f"keep_rate is {keep_rate}: it must be above 0 and at most 1")
    values = np.asarray(probabilities, np.float64)
    _probabilities(values.ravel(), values.size)
    return values / (values + (1 - values) / keep_rate)


def table(users: ArrayLike, labels: ArrayLike, probabilities: ArrayLike) -> dict[str, float]:
    """Every metric of one task's predictions; `users` counts all users, not only those with both classes."""
    clicked, losses = _losses(labels, probabilities)
    by_user = uauc(users, labels, probabilities)
    loss = _mean(losses, None)
    return {
        "auc": auc(labels, probabilities),
        "uauc": by_user.weighted,
        "uauc_plain": by_user.plain,
        "log_loss": loss,
        "ne": _ratio(loss, _entropy(_mean(clicked, None))),
        "calibration": calibration(labels, probabilities),
        "rows": len(clicked),
        "positives": int(clicked.sum()),
        "users": by_user.users + by_user.skipped,
    }


def _losses(labels: ArrayLike, probabilities: ArrayLike) -> tuple[Array, Array]:
    clicked = _labels(labels)
    values = _probabilities(probabilities, len(clicked))
    margin = np.finfo(values.dtype).eps
    values = np.clip(values.astype(np.float64), margin, 1 - margin)
    return clicked, -np.log(np.where(clicked, values, 1 - values))


def _mean(values: Array, weights: Weights) -> float:
    row_weights = np.ones(len(values)) if weights is None else _weights(weights, len(values))
    return _ratio(np.dot(values, row_weights), row_weights.sum())


def _ratio(value: float, base: float) -> float:
    return float(value / base) if base > 0 else NAN


def _entropy(rate: float) -> float:
    return float(-rate * np.log(rate) - (1 - rate) * np.log1p(-rate)) if 0 < rate < 1 else NAN


def bootstrap(
    users: ArrayLike, labels: ArrayLike, scores: ArrayLike,
    metric: Metric = "auc", replicates: int = 500, seed: int = 0,
) -> Estimate:  # fmt: skip
    """The metric averaged over seeds, and its interval (`intervals`); scores [S, n], or [n] for one seed."""
    sample = _Sample(users, labels)
    return Estimate.of(sample.measure(scores, metric), sample.users, replicates, seed)


def paired_bootstrap(
    users: ArrayLike, labels: ArrayLike, scores_a: ArrayLike, scores_b: ArrayLike,
    metric: Metric = "auc", replicates: int = 500, seed: int = 0,
) -> Difference:  # fmt: skip
    """How b differs from a on the same redrawn users, seed by seed; scores [S, n], or [n] for one seed."""
    sample = _Sample(users, labels)
    models_a, models_b = (np.atleast_2d(np.asarray(scores)) for scores in (scores_a, scores_b))
    a, b = sample.measure(models_a, metric), sample.measure(models_b, metric)
    if len(models_a) != len(models_b):
        raise InputError(
            f"a has {len(models_a)} seeds and b {len(models_b)}: a paired comparison needs the same number"
        )
    return Difference.of(lambda counts: b(counts) - a(counts), sample.users, replicates, seed)


class _Sample:
    """The rows that all compared models share, and the users they belong to."""

    def __init__(self, users: ArrayLike, labels: ArrayLike):
        self.clicked = _labels(labels)
        self.owner, self.users = owners(users, len(self.clicked))

    def per_user(self, values: Array | None = None) -> Array:
        return np.bincount(self.owner, values, minlength=self.users).astype(np.float64)

    def measure(self, scores: ArrayLike, metric: Metric) -> Measure:
        """All that does not depend on the draw, worked out once."""
        models = np.atleast_2d(np.asarray(scores))
        build = {"auc": self._auc, "uauc": self._uauc, "log_loss": self._loss, "ne": self._loss}
        if metric not in build:
            raise InputError(f"no metric {metric!r} to bootstrap: choose one of {', '.join(build)}")
        return build[metric](models, metric)

    def _auc(self, models: Array, metric: Metric):
        rankings = [_Ranking(self.clicked, _scores(model, len(self.clicked)), self.owner) for model in models]
        return lambda counts: np.array([ranking.auc(counts) for ranking in rankings])

    def _uauc(self, models: Array, metric: Metric):
        values = np.stack([auc_by_user(self.owner, self.clicked, model).auc for model in models])
        known = ~np.isnan(values[0])  # depends on the labels alone
        if known.sum() < 2:
            raise InputError("a bootstrap of UAUC needs at least two users with both classes")
        rows = self.per_user() * known
        wins = np.where(known, values, 0) * rows
        return lambda counts: (wins @ counts) / (rows @ counts or NAN)

    def _loss(self, models: Array, metric: Metric):
        losses = np.stack([self.per_user(_losses(self.clicked, model)[1]) for model in models])
        rows, positives = self.per_user(), self.per_user(self.clicked)

        def value(counts: Array) -> Array:
            mean = (losses @ counts) / (rows @ counts)
            rate = float(positives @ counts / (rows @ counts))
            return mean / _entropy(rate) if metric == "ne" else mean

        return value


def _probabilities(probabilities: ArrayLike, rows: int) -> Array:
    values = _scores(probabilities, rows)
    if rows and (values.min() < 0 or values.max() > 1):
        raise InputError("probabilities must lie between 0 and 1: pass the sigmoid of the logits")
    return values if values.dtype.kind == "f" else values.astype(np.float64)


def _labels(labels: ArrayLike) -> Array:
    values = np.asarray(labels)
    if values.ndim != 1:
        raise InputError(f"labels have shape {values.shape}: one dimension is needed")
    if values.dtype == bool:
        return values
    clicked = values == 1
    if not (clicked | (values == 0)).all():
        raise InputError("labels must be 0 or 1: map other values, and drop rows without a label, first")
    return clicked


def _scores(scores: ArrayLike, rows: int) -> Array:
    values = one_per_row(scores, rows, "scores")
    if values.dtype.kind not in "iuf":
        raise InputError(f"scores are {values.dtype}: numbers are needed")
    if rows and np.isnan(values.min()):  # the minimum is NaN if any score is
        raise InputError("scores hold NaN: the model diverged, or rows without a score were not dropped")
    return values


def _weights(weights: ArrayLike, rows: int) -> Array:
    values = one_per_row(weights, rows, "weights").astype(np.float64)
    if not (values >= 0).all() or np.isinf(values).any():
        raise InputError("weights must be finite and not negative")
    return values

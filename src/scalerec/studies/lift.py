"""How one arm of an experiment differs from another: rates, intervals, p-values, and were units dealt out as planned?

A unit (usually a user) was put into one arm; its outcome y and its base x (its exposures, or 1) are sums over all it
did. The rate of an arm is sum(y) / sum(x): with x = 1 the mean of the units, else a ratio whose variance comes from the
delta method (Deng, Knoblich and Lu, 2018). Units are independent of each other, the exposures of one are not.

n units of an arm   R replicates
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import chdtrc

Z = 1.959963984540054  # of 95 %
Z_POWER = 0.8416212335729143  # of 80 %
REPLICATES = 1_000


class Arm(NamedTuple):
    """The units of one arm."""

    outcome: np.ndarray  # [n] y
    base: np.ndarray  # [n] x, above 0


class Rate(NamedTuple):
    value: float
    variance: float  # of the value

    @property
    def interval(self) -> tuple[float, float]:
        half = Z * math.sqrt(self.variance)
        return self.value - half, self.value + half


class Lift(NamedTuple):
    """Arm b against arm a; intervals of 95 %."""

    difference: float
    low: float
    high: float
    lift: float  # difference / rate of a, NaN where that is 0
    lift_low: float | None  # None: the rate of a itself may be 0, so its multiple can be anything
    lift_high: float | None
    p: float  # two-sided, of no difference

    @property
    def resolved(self) -> bool:
        """Whether the interval of the difference excludes zero."""
        return self.low > 0 or self.high < 0


def rate(arm: Arm) -> Rate:
    """sum(y) / sum(x) and its variance by the delta method; exact for x = 1."""
    value = float(arm.outcome.sum() / arm.base.sum())
    residual = arm.outcome - value * arm.base
    n = len(residual)
    return Rate(value, float((residual**2).sum() / (n - 1) / n / arm.base.mean() ** 2))


def delta_lift(a: Arm, b: Arm) -> Lift:
    """By the normal approximation; the lift's interval is Fieller's: it holds 0 when that of the difference does."""
    first, second = rate(a), rate(b)
    difference, spread = second.value - first.value, math.sqrt(first.variance + second.variance)
    if spread:
        p = math.erfc(abs(difference) / spread / math.sqrt(2))
    else:
        p = 1.0 if difference == 0 else 0.0
    low, high = fieller(first, second)
    lift = difference / first.value if first.value else math.nan
    return Lift(difference, difference - Z * spread, difference + Z * spread, lift, low, high, p)


def fieller(a: Rate, b: Rate) -> tuple[float | None, float | None]:
    """The lifts l for which b - (1 + l) a is within 95 % of zero; None where a itself is."""
    square = a.value**2 - Z**2 * a.variance
    if square <= 0:
        return None, None
    middle = a.value * b.value
    root = math.sqrt(max(middle**2 - square * (b.value**2 - Z**2 * b.variance), 0.0))
    return (middle - root) / square - 1, (middle + root) / square - 1


def bootstrap_lift(a: Arm, b: Arm, replicates: int = REPLICATES, seed: int = 0) -> Lift:
    """By redrawing the units of each arm; p is twice the share of replicates on the other side of zero."""
    random = np.random.default_rng(seed)
    first, second = (_redrawn(arm, replicates, random) for arm in (a, b))
    differences = second - first
    value_a, value_b = rate(a).value, rate(b).value
    low, high = np.quantile(differences, (0.025, 0.975))
    lift_low = lift_high = None
    if (first > 0).all():
        lift_low, lift_high = map(float, np.quantile(second / first - 1, (0.025, 0.975)))
    beyond = min((differences <= 0).sum(), (differences >= 0).sum())
    p = min(2 * (int(beyond) + 1) / (replicates + 1), 1.0)
    difference = value_b - value_a
    lift = difference / value_a if value_a else math.nan
    return Lift(difference, float(low), float(high), lift, lift_low, lift_high, p)


def _redrawn(arm: Arm, replicates: int, random: np.random.Generator) -> np.ndarray:
    n, rates = len(arm.outcome), np.empty(replicates)
    for r in range(replicates):
        drawn = np.bincount(random.integers(n, size=n), minlength=n)
        rates[r] = (arm.outcome @ drawn) / (arm.base @ drawn)
    return rates


def minimum_detectable(a: Arm, b: Arm) -> float:
    """The lift that such arms would resolve in 80 % of experiments; NaN where the rate of a is 0."""
    first, second = rate(a), rate(b)
    return (Z + Z_POWER) * math.sqrt(first.variance + second.variance) / first.value if first.value else math.nan


def sample_ratio(counts: Sequence[int], weights: Sequence[float]) -> tuple[float | None, float]:
    """Chi-square of the arms' units against the weights, and its p-value; weights need not sum to 1.

    None where an arm has units that was to get none.
    """
    total, whole = sum(counts), sum(weights)
    if any(count and not weight for count, weight in zip(counts, weights)):
        return None, 0.0
    expected = [total * weight / whole for weight in weights if weight]
    found = [count for count, weight in zip(counts, weights) if weight]
    square = sum((count - e) ** 2 / e for count, e in zip(found, expected)) if total else 0.0
    return square, float(chdtrc(len(found) - 1, square)) if len(found) > 1 else 1.0


def holm(p: Sequence[float]) -> list[float]:
    """p-values of several comparisons, adjusted so that the chance of any false one stays what it says (Holm, 1979)."""
    adjusted, worst = [0.0] * len(p), 0.0
    for place, i in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min((len(p) - place) * p[i], 1.0))
        adjusted[i] = worst
    return adjusted

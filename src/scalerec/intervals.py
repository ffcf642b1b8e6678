"""How sure a number is: a 95 % interval from users that are drawn again and again, and from how seeds differ.

n rows   U users   S seeds (models that differ only in their seed, scored on the same rows)

The variance of a mean over seeds is that over drawn users, all seeds kept, plus s^2 / S of the S values on all users,
and the interval is mean -+ t sqrt(variance) with the degrees of freedom of Welch and Satterthwaite. Drawing five seeds
again and again, as users are, would give four fifths of their variance and the tails of a normal distribution. What
seeds do to each user by himself counts in both parts: the interval is a little too wide rather than too narrow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import ArrayLike

from scalerec.errors import InputError

if TYPE_CHECKING:
    from typing_extensions import Self

Array = np.ndarray


Measure = Callable[[Array], Array]  # draws of each user [U] -> a number for each seed [S], worked out anew


@dataclass(frozen=True)
class Estimate:
    """A metric on all rows and its 95 % interval."""

    mean: float
    low: float
    high: float
    replicates: int  # those in which the metric existed

    @classmethod
    def of(cls, measure: Measure, users: int, replicates: int, seed: int) -> Self:
        """The mean over seeds, for other users and other seeds; with one seed, for other users."""
        from scipy.special import stdtrit  # here, or every start of a command would wait for it

        values = measure(np.ones(users))
        random = np.random.default_rng(seed)
        means = np.empty(replicates)
        for r in range(replicates):
            counts = np.bincount(random.integers(users, size=users), minlength=users)
            means[r] = measure(counts.astype(np.float64)).mean()
        means = means[~np.isnan(means)]  # a draw without positives has no AUC
        seeds = len(values)
        of_users = means.var(ddof=1) if len(means) > 1 else float("nan")
        of_seeds = values.var(ddof=1) / seeds if seeds > 1 else 0.0
        mean, variance = float(values.mean()), of_users + of_seeds
        if not variance:  # equal models
            return cls(mean, mean, mean, len(means))
        freedom = variance**2 / (of_users**2 / (users - 1) + of_seeds**2 / max(seeds - 1, 1))
        half = float(stdtrit(freedom, 0.975) * np.sqrt(variance))
        return cls(mean, mean - half, mean + half, len(means))


@dataclass(frozen=True)
class Difference(Estimate):
    """Metric of b minus metric of a on all rows, and its 95 % interval."""

    @property
    def resolved(self) -> bool:
        """Whether the interval excludes zero."""
        return self.low > 0 or self.high < 0


def owners(users: ArrayLike, rows: int) -> tuple[Array, int]:
    """The user of each row as a code [n] from 0 on, and U; InputError unless there are two to draw from."""
    codes, count = dense_codes(user_ids(users, rows))
    if count < 2:
        raise InputError("a bootstrap over users needs at least two users")
    return codes, count


def user_ids(users: ArrayLike, rows: int) -> Array:
    """The users as integers [n]; InputError when they are not."""
    values = one_per_row(users, rows, "users")
    if values.dtype.kind not in "iu" and rows:
        raise InputError(f"users are {values.dtype}: integer ids are needed")
    return values


def one_per_row(values: ArrayLike, rows: int, name: str) -> Array:
    """The values as an array [n]; InputError when there are more or fewer than rows."""
    array = np.asarray(values)
    if array.shape != (rows,):
        raise InputError(f"{name} have shape {array.shape}, labels ({rows},): one of each per row is needed")
    return array


def dense_codes(values: Array) -> tuple[Array, int]:
    """Codes 0..count-1 that order and tie as the values do, and the count; half the time of np.unique."""
    order = np.argsort(values)
    ordered = values[order]
    step = np.zeros(len(values), np.int64)
    np.not_equal(ordered[1:], ordered[:-1], out=step[1:], casting="unsafe")
    codes = np.empty(len(values), np.int64)
    codes[order] = np.cumsum(step, out=step)
    return codes, int(step[-1]) + 1 if len(step) else 0

"""UAUC of a whole log: `scalerec.metrics` against scikit-learn called per user, and against a plain lexsort.

    python -m benchmarks.metrics [--rows 10000000] [--users 1000000] [--json]

All three run on one thread. The loop over users gets its rows already grouped; its time is taken on a random
sample of users and scaled to all that have both classes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from statistics import median
from typing import TypeVar

import numpy as np
import sklearn
from rich.console import Console
from rich.table import Table
from sklearn.metrics import roc_auc_score

from benchmarks.machine import describe_machine, options, refuse_if_busy
from scalerec import metrics

Result = TypeVar("Result")
TOLERANCE = 1e-9


def make_log(rows: int, users: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users with hashed ids in no order, labels, and float32 scores that know a little and sometimes tie."""
    random = np.random.default_rng(seed)
    ids = random.integers(-(2**63), 2**63 - 1, users)
    labels = (random.random(rows) < 0.3).astype(np.int64)
    scores = np.round(random.normal(size=rows) + 0.5 * labels, 2).astype(np.float32)
    return ids[random.integers(users, size=rows)], labels, scores


def by_loop(labels: list[np.ndarray], scores: list[np.ndarray]) -> list[float]:
    return [float(roc_auc_score(y, s)) for y, s in zip(labels, scores, strict=True)]


def by_lexsort(users: np.ndarray, labels: np.ndarray, scores: np.ndarray) -> tuple[float, float]:
    """Weighted and plain UAUC by mean ranks within each user, as one would write it first with numpy."""
    order = np.lexsort((scores, users))
    users, labels, scores = users[order], labels[order], scores[order]
    new_user = np.concatenate([[True], users[1:] != users[:-1]])
    starts = np.flatnonzero(new_user)
    ties = np.flatnonzero(new_user | np.concatenate([[True], scores[1:] != scores[:-1]]))
    sizes = np.diff(ties, append=len(users))
    ranks = np.repeat(ties + (sizes + 1) / 2, sizes)
    rows, positives = np.diff(starts, append=len(users)), np.add.reduceat(labels, starts)
    rank_sums = np.add.reduceat(ranks * labels, starts) - starts * positives
    both = (positives > 0) & (positives < rows)
    rows, positives, rank_sums = rows[both], positives[both], rank_sums[both]
    auc = (rank_sums - positives * (positives + 1) / 2) / (positives * (rows - positives))
    return float(np.average(auc, weights=rows)), float(auc.mean())


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def measure(rows: int, users: int, sample: int, repetitions: int) -> dict[str, float]:
    """Seconds of each, the ratios taken in turns, and the largest difference seen."""
    log = make_log(rows, users)
    order = np.argsort(log[0], kind="stable")
    by_user = metrics.auc_by_user(*log)
    ends = np.cumsum(by_user.rows)
    both = np.flatnonzero(~np.isnan(by_user.auc))
    random = np.random.default_rng(1)
    metrics.uauc(*(column[: rows // 10] for column in log))  # the first run of anything is slower

    times, errors = [], []
    for _ in range(repetitions):
        drawn = random.choice(both, min(sample, len(both)), replace=False)
        mine = [order[ends[u] - by_user.rows[u] : ends[u]] for u in drawn]
        labels, scores = [log[1][m] for m in mine], [log[2][m] for m in mine]
        ours, found = timed(lambda: metrics.uauc(*log))
        loop, expected = timed(lambda y=labels, s=scores: by_loop(y, s))
        lexsort, overall = timed(lambda: by_lexsort(*log))
        times.append((ours, loop * len(both) / len(drawn), lexsort))
        errors.append(np.abs(by_user.auc[drawn] - expected).max())
        errors.append(max(abs(found.weighted - overall[0]), abs(found.plain - overall[1])))

    speedups = [loop / ours for ours, loop, _ in times]
    return {
        "uauc_speedup": median(speedups),
        "uauc_speedup_low": min(speedups),
        "uauc_speedup_high": max(speedups),
        "uauc_speedup_over_lexsort": median(lexsort / ours for ours, _, lexsort in times),
        "uauc_max_error": float(max(errors)),
        "uauc_seconds": median(ours for ours, _, _ in times),
        "loop_seconds": median(loop for _, loop, _ in times),
        "lexsort_seconds": median(lexsort for _, _, lexsort in times),
        "rows": rows,
        "users": len(by_user.users),
        "users_with_both_classes": len(both),
        "users_sampled": min(sample, len(both)),
        "repetitions": repetitions,
    }


def show(figures: dict[str, float], machine: dict[str, str | int]) -> None:
    size = f"{figures['rows']:,} rows, {figures['users']:,} users"
    title = f"UAUC of {size}; medians of {figures['repetitions']} rounds"
    table = Table(title=title, caption=", ".join(f"{name} {value}" for name, value in machine.items()))
    for heading in ("", "seconds", "scalerec is faster by"):
        table.add_column(heading, justify="left" if not heading else "right")
    spread = f"{figures['uauc_speedup_low']:.0f} to {figures['uauc_speedup_high']:.0f}"
    loop = f"scikit-learn per user, scaled from {figures['users_sampled']:,}"
    table.add_row("scalerec.metrics.uauc", f"{figures['uauc_seconds']:.2f}", "")
    over_lexsort = f"{figures['uauc_speedup_over_lexsort']:.1f}"
    table.add_row("numpy, lexsort", f"{figures['lexsort_seconds']:.2f}", over_lexsort)
    table.add_row(loop, f"{figures['loop_seconds']:.0f}", f"{figures['uauc_speedup']:.0f} ({spread})")
    table.add_row("largest difference of an AUC", f"{figures['uauc_max_error']:.1e}", "")
    Console().print(table)


def main() -> None:
    parser = options("UAUC over a whole log, against a loop of scikit-learn over users")
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--users", type=int, default=1_000_000)
    parser.add_argument("--sample", type=int, default=2000, help="users whose loop is timed in a round")
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    busy = refuse_if_busy(arguments.even_if_busy)

    figures = measure(arguments.rows, arguments.users, arguments.sample, arguments.repetitions)
    machine = describe_machine() | {"numpy": np.__version__, "scikit_learn": sklearn.__version__}
    show(figures, machine)
    if arguments.json:
        print(json.dumps(figures | machine | {"busy": busy}))
    if not figures["uauc_max_error"] <= TOLERANCE:
        raise SystemExit(f"results differ by {figures['uauc_max_error']:.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()

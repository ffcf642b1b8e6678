"""Recipes x seeds -> one paired table: what differs, by how much, and whether that is resolved."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from scalerec import checkpoint, evaluate, metrics, topk
from scalerec.config import allowed, override
from scalerec.data.reader import ParquetRows
from scalerec.errors import InputError
from scalerec.evaluate import NEXT, Predictions
from scalerec.hardware import cores
from scalerec.models.sequential import SequentialConfig
from scalerec.results import from_json, to_json
from scalerec.studies import reference, report
from scalerec.training.run import Run
from scalerec.training.train import LOCK, alone, check_same, train

METRICS: tuple[metrics.Metric, ...] = ("auc", "uauc", "ne")
OF_PLACES = ("hr@10", "ndcg@10", "hr@50", "hr@200")  # of retrieval


def compare(
    runs: list[Run], out: Path, *, seeds: int = 5, with_reference: bool = False, workers: int = 1,
    replicates: int = 500, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Train what is missing of every run under seeds 0..S-1, then compare all with the first on the same test rows.

    Writes `report.md`, `report.json` and `report.png` into `out` and returns what the JSON holds.

    Raises:
        InputError: the runs are not evaluated on the same rows or are to retrieve different events, a folder holds
            another run, or a reference is asked for on a log without tasks.
    """
    first = runs[0]
    for run in runs[1:]:
        if run.data.paired_with() != first.data.paired_with() or run.dim != first.dim:
            raise InputError(f"{run.name} and {first.name} read different data: compare recipes of one data set")
    _same_positive(runs)
    names = [run.name for run in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise InputError(f"{twice} is named twice: compare different recipes")
    if with_reference and not first.data.schema().tasks:
        raise InputError(
            f"--reference: LightGBM ranks by tasks, and {first.name} reads a log without any: leave it out"
        )
    say = partial(Console(stderr=True).print, highlight=False, markup=False, soft_wrap=True)
    for run in runs:  # once, before any worker
        run.data.prepare(say)
    children = _Children()
    jobs = [
        partial(_train, run, seed, out / run.name / f"seed-{seed}", workers, say, children)
        for run in runs
        for seed in range(seeds)
    ]
    if with_reference:
        names.append("lightgbm")
        folders = [out / "lightgbm" / f"seed-{seed}" for seed in range(seeds)]
        jobs += [partial(_reference, first, folder, seed, say) for seed, folder in enumerate(folders)]
    _run_all(jobs, workers, children)
    tasks = [task.name for task in first.data.schema().tasks]
    results = {name: [_read(out / name / f"seed-{seed}") for seed in range(seeds)] for name in names}
    predictions: dict[str, list[Predictions]] = {}
    for name in names:
        found = [evaluate.read(out / name / f"seed-{seed}" / "test.parquet", tasks) for seed in range(seeds)]
        base = predictions[names[0]][0] if predictions else found[0]
        predictions[name] = [_aligned(p, base, name, names[0]) for p in found]
    measured: dict[str, tuple[str, ...]] = {
        task: METRICS for task in tasks if any(task in r[0]["test"] for r in results.values())
    }
    if any(NEXT in r[0]["test"] for r in results.values()):
        measured[NEXT] = OF_PLACES
    comparison = {
        "command": command, "seeds": seeds, "data": first.data.model_dump(mode="json"), "tasks": measured,
        "notes": first.data.prepare().notes, "machine": report.machine(), "reference": names[0],
        "test_rows": len(predictions[names[0]][0].users), "test_users": len(np.unique(predictions[names[0]][0].users)),
        "models": [_row(name, results[name], predictions, names[0], measured, replicates) for name in names],
        "best_reachable": _best_reachable(first, predictions[names[0]][0], tasks),
    }  # fmt: skip
    report.write(comparison, out)
    return comparison


def _same_positive(runs: list[Run]) -> None:
    """InputError unless all that retrieve are asked for the same events."""
    asked = [(run.name, run.model.positive) for run in runs if isinstance(run.model, SequentialConfig)
             if run.model.retrieves]  # fmt: skip
    for name, positive in asked:
        if positive != asked[0][1]:
            one, other = (f"those with {task!r}" if task else "all events" for task in (positive, asked[0][1]))
            raise InputError(
                f"{name} is to retrieve {one} and {asked[0][0]} {other}: give both the same --model.positive"
            )


class _Children:
    """The trainings in processes of their own, and no more of them once they have been stopped."""

    def __init__(self) -> None:
        self._running: list[subprocess.Popen[str]] = []
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, command: list[str], variables: dict[str, str]) -> tuple[int, str]:
        """Exit status and standard error of a command; InputError when all have been stopped."""
        with self._lock:
            if self._stopped:
                raise InputError("the comparison was stopped")
            child = subprocess.Popen(
                command, env={**os.environ, **variables}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
            )
            self._running.append(child)
        said = child.communicate()[1]
        return child.returncode, said

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            for child in self._running:
                child.terminate()


def _run_all(jobs: Sequence[Callable[[], None]], workers: int, children: _Children) -> None:
    """One after the other, or so many at a time; the first that fails, or a signal, stops the others."""
    if workers == 1:  # in this thread, which signals interrupt
        for job in jobs:
            job()
        return
    with ThreadPoolExecutor(workers) as pool:
        submitted = [pool.submit(job) for job in jobs]
        try:
            for job in submitted:
                job.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            raise


def _train(run: Run, seed: int, folder: Path, workers: int, say: Callable[[str], None], children: _Children) -> None:
    """Train one run unless it is finished; a cut one is resumed, another run in its place is an error."""
    run = override(run, {"training.seed": str(seed)})
    if (folder / "metrics.json").exists():
        check_same(checkpoint.load(folder), run, folder)
        return
    resume = bool(checkpoint.saved(folder))
    if not resume and folder.exists():
        _clear(folder)
    say(f"{'resuming' if resume else 'training'} {run.name}, seed {seed}")
    if workers == 1:
        train(run, folder, resume=resume)
        return
    # A process each: the models are small, so cores serve better one run apiece than all on one.
    threads = str(max(cores() // workers, 1))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(run.model_dump_json())
    command = [sys.executable, "-m", "scalerec", "train", str(folder / "run.json"), "--out", str(folder), "--quiet"]
    command += [f"--allow={package}" for package in allowed()]
    status, said = children.run(command + ["--resume"] * resume, {"OMP_NUM_THREADS": threads})
    if status:
        raise InputError(f"{run.name}, seed {seed}: {(said.strip().splitlines() or ['failed'])[-1]}")


def _clear(folder: Path) -> None:
    """Remove what a training left that never came to a checkpoint; InputError while another is at work there."""
    with alone(folder):
        for path in folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != LOCK:
                path.unlink()


def _reference(run: Run, folder: Path, seed: int, say: Callable[[str], None]) -> None:
    if not (folder / "metrics.json").exists():
        say(f"training lightgbm, seed {seed}")
        found = reference.train(run, folder, seed)
        checkpoint.write_atomically(folder / "metrics.json", to_json(found, indent=1))


def _read(folder: Path) -> dict[str, Any]:
    return from_json((folder / "metrics.json").read_text())


def _row(
    name: str, results: list[dict], predictions: dict[str, list[Predictions]], first: str,
    measured: Mapping[str, tuple[str, ...]], replicates: int,
) -> dict[str, Any]:  # fmt: skip
    """One model's line: sizes; per task and metric the mean, the spread over seeds, the difference to the first."""
    parameters = results[0].get("parameters", {})
    row: dict[str, Any] = {
        "name": name,
        "dense_parameters": sum(v for k, v in parameters.items() if k != "embedding") or None,
        "parameters": parameters,
        "flops_per_row": results[0].get("flops_per_row"),
        "seconds": float(np.mean([result["seconds"] for result in results])),
        "tasks": {},
    }
    for j, task in enumerate(measured):
        if task not in results[0]["test"]:
            continue  # what this model is not made for
        row["tasks"][task] = {}
        for metric in measured[task]:
            values = [result["test"][task][metric] for result in results]
            entry = {
                "values": values,
                "mean": float(np.mean(values)),
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            }
            if name != first:
                change = _difference(predictions[first], predictions[name], task, j, metric, replicates)
                if change is not None:
                    entry |= {"difference": change.mean, "low": change.low, "high": change.high}
                    entry["resolved"] = change.resolved
            row["tasks"][task][metric] = entry
    return row


def _difference(
    base: list[Predictions], mine: list[Predictions], task: str, j: int, metric: Any, replicates: int
) -> metrics.Difference | None:
    """What `mine` is better than `base`, over users and seeds; None where that cannot be said."""
    try:
        if task == NEXT:
            if not base[0].places.shape[1]:
                return None
            asked = ~np.isnan(mine[0].places[:, 0])
            of_base, of_mine = (np.stack([p.places[asked, 0] for p in some]) for some in (base, mine))
            return topk.paired_bootstrap(mine[0].users[asked], of_base, of_mine, metric, replicates)
        if not base[0].probabilities.shape[1]:
            return None
        users, labels, scores = _scores(mine, j)
        return metrics.paired_bootstrap(users, labels, _scores(base, j)[2], scores, metric, replicates)
    except InputError:  # too few users, or none with both classes: the metric stands without an interval
        return None


def _aligned(predictions: Predictions, base: Predictions, name: str, base_name: str) -> Predictions:
    """The predictions in the order of the rows of `base`; InputError unless both are of the same rows."""
    order = np.argsort(predictions.index, kind="stable")
    order = order[np.argsort(np.argsort(base.index, kind="stable"))] if len(order) == len(base.index) else order
    aligned = Predictions(*(values[order] for values in predictions))
    counted = aligned.weights > 0
    for what, agree in {
        "row numbers": np.array_equal(aligned.index, base.index),
        "users": np.array_equal(aligned.users, base.users),
        "rows that count": np.array_equal(aligned.weights, base.weights),
        "labels": np.array_equal(aligned.labels[counted], base.labels[base.weights > 0]),
    }.items():
        if not agree:
            raise InputError(f"{name} and {base_name} were not tested on the same rows: their {what} differ")
    return aligned


def _scores(predictions: list[Predictions], j: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Users [n], labels [n] and scores [S, n] of the rows that count for task j."""
    first = predictions[0]
    counted = first.weights[:, j] > 0
    scores = np.stack([p.probabilities[counted, j] for p in predictions])
    return first.users[counted], first.labels[counted, j], scores


def _best_reachable(run: Run, test: Predictions, tasks: list[str]) -> dict[str, dict[str, float]]:
    """Metrics of the teacher's own probabilities on the test rows, where the data has a teacher."""
    columns = run.data.best_scores()
    if not columns:
        return {}
    rows = ParquetRows.of(run.data, run.data.prepare())
    batches = list(rows.batches("test", list(columns.values())))
    scores = {t: np.concatenate([b.column(c).to_numpy() for b in batches]) for t, c in columns.items()}
    return {t: metrics.table(test.users, test.labels[:, j], scores[t]) for j, t in enumerate(tasks)}

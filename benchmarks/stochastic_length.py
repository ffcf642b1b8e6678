"""What stochastic length saves: an epoch of HSTU on MovieLens 1M with histories cut by several alphas.

    python -m benchmarks.stochastic_length [--alphas 1.4,1.6,1.8] [--rounds 3] [--threads N] [--json]

Epochs of training alone, without validation, in turn in one process: the time of one with whole histories over that
with cut ones, and the share of events that an epoch left out (`sparsity`). Quality against alpha is a matter of whole
trainings: `scalerec compare hstu_movielens_1m hstu_movielens_1m+training.stochastic_length.alpha=1.6`.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.machine import describe_machine, options, refuse_if_busy
from benchmarks.turns import in_turn, spread
from scalerec.config import override
from scalerec.data.loader import Position
from scalerec.recipes.catalogue import find
from scalerec.training.log import Log
from scalerec.training.train import Training

RECIPE, WHOLE = "hstu_movielens_1m", "2"


def made(alpha: str, folder: Path, recipe: str) -> Training:
    run = override(find(recipe), {"training.stochastic_length.alpha": alpha, "training.tensorboard": "false"})
    return Training(run, folder / alpha, log=Log(folder / alpha, quiet=True, tensorboard=False))


def epoch(training: Training, events: Counter[str], alpha: str) -> None:
    """One pass over the training part; the events of its histories are counted."""
    training.model.train()
    for batch, _ in training.loader.epoch(0, Position()):
        series = training.encoder.layout.main_sequence()
        events[alpha] += int(batch.user.lists[series.name].offsets[-1])
        training.step(batch)


def measure(alphas: list[str], rounds: int, recipe: str = RECIPE) -> dict[str, float]:
    events = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        trainings = {alpha: made(alpha, Path(folder), recipe) for alpha in [WHOLE, *alphas]}
        seconds = in_turn({alpha: partial(epoch, each, events, alpha) for alpha, each in trainings.items()}, rounds)
    found = {"seconds_whole": median(seconds[WHOLE])}
    for alpha in alphas:
        found |= spread(f"speedup_{alpha}", [a / b for a, b in zip(seconds[WHOLE], seconds[alpha])])
        found[f"sparsity_{alpha}"] = 1 - events[alpha] / events[WHOLE]
    return found


def main(arguments: list[str] | None = None) -> None:
    parser = options((__doc__ or "").splitlines()[0])
    parser.add_argument("--alphas", default="1.4,1.6,1.8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--recipe", default=RECIPE)
    chosen = parser.parse_args(arguments)
    busy = refuse_if_busy(chosen.even_if_busy)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    alphas = chosen.alphas.split(",")
    found = measure(alphas, chosen.rounds, chosen.recipe)
    table = Table("alpha", "events left out", "epochs in the time of one")
    for alpha in alphas:
        low, high = found[f"speedup_{alpha}_low"], found[f"speedup_{alpha}_high"]
        table.add_row(
            alpha, f"{found[f'sparsity_{alpha}']:.1%}", f"{found[f'speedup_{alpha}']:.2f} ({low:.2f} to {high:.2f})"
        )
    Console(stderr=True).print(table)
    if chosen.json:
        print(json.dumps({**found, "machine": describe_machine(), "busy": busy}))


if __name__ == "__main__":
    main()

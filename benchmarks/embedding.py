"""A training step of embedding tables: lookup, gradient, element-wise Adagrad.

    python -m benchmarks.embedding [--tables 50] [--rows 200000] [--width 16] [--batch 2048] [--rounds 15] [--json]

`embedding_speedup`: the better of `nn.Embedding(sparse=True)` with `torch.optim.Adagrad` table by table and of one
merged table of the same, over scalerec's `EmbeddingCollection` with its own Adagrad. Each looks up one id of every
table for every row, puts the vectors side by side, takes the same gradient back, and steps; ids are uniform, or drawn
by Zipf's law with exponent 1.05. In turn, with new ids in every round; ratios within a round, then their median and
spread. The speedup without ending is the smaller of the two kinds of ids; keys that end in `_one_thread` are of one
thread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Grid
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.machine import describe_machine, options, refuse_if_busy
from benchmarks.turns import by_threads, endings, spread
from scalerec.batch import Rows
from scalerec.features.layout import FeatureLayout, GroupLayout, Layout, Table
from scalerec.layers.embedding import EmbeddingCollection
from scalerec.training.optim import OptimizerConfig

RATE, EPS = 0.01, 1e-8
EXPONENT = 1.05
TOLERANCE = 1e-5
Step = Callable[[Tensor, Tensor], Any]


class Apart(nn.Module):
    """A module for each table."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding.from_pretrained(t.clone(), freeze=False, sparse=True) for t in start)

    def forward(self, ids: Tensor) -> Tensor:
        return torch.cat([table(ids[:, i]) for i, table in enumerate(self.tables)], 1)

    def weights(self) -> Tensor:
        return torch.stack([table.weight.detach() for table in self.tables])  # type: ignore[misc]


class Merged(nn.Module):
    """All tables in one, each id moved to where its table begins."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.shape = start.shape
        self.weight = nn.Parameter(start.flatten(0, 1).clone())
        self.first = torch.arange(len(start)) * start.shape[1]

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids + self.first, self.weight, sparse=True).flatten(1)

    def weights(self) -> Tensor:
        return self.weight.detach().view(self.shape)


class Ours(nn.Module):
    """What a model of scalerec has."""

    def __init__(self, start: Tensor):
        super().__init__()
        count, rows, width = start.shape
        names = [f"f{i}" for i in range(count)]
        features = tuple(FeatureLayout(name=name, kind="id", width=width, tables=(name,)) for name in names)
        layout = Layout(
            tables=tuple(Table(name=name, rows=rows, dim=width) for name in names),
            groups=(GroupLayout(name="all", side="user", features=features),), tasks=("click",),
        )  # fmt: skip
        self.collection = EmbeddingCollection(layout)
        for (_, weight), values in zip(self.collection.table_weights(), start):
            weight.copy_(values)

    def forward(self, ids: Tensor) -> Tensor:
        (found,) = self.collection(Rows("user", ids, torch.empty(len(ids), 0), {}, {}))
        return found.flat

    def weights(self) -> Tensor:
        return torch.stack([weight for _, weight in self.collection.table_weights()])


def stepping(model: nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    def step(ids: Tensor, slope: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        model(ids).backward(slope)
        optimizer.step()

    return step


def draw(random: np.random.Generator, given: argparse.Namespace, zipf: bool) -> Tensor:
    """[batch, tables] ids; by Zipf's law the first ids are the frequent ones, scattered as a real vocabulary's are."""
    shape = given.batch, given.tables
    if not zipf:
        return torch.from_numpy(random.integers(0, given.rows, shape))
    share = 1 / np.arange(1, given.rows + 1) ** EXPONENT
    ranks = np.searchsorted(share.cumsum() / share.sum(), random.random(shape)).clip(max=given.rows - 1)
    return torch.from_numpy(np.random.default_rng(0).permutation(given.rows)[ranks])


def measure(given: argparse.Namespace) -> dict[str, float]:
    torch.manual_seed(0)
    start = 0.05 * torch.randn(given.tables, given.rows, given.width)
    models = {"apart": Apart(start), "merged": Merged(start), "ours": Ours(start)}
    steps: dict[str, Step] = {}
    for name, model in models.items():
        if isinstance(model, Ours):
            config = OptimizerConfig(embedding="adagrad", embedding_lr=RATE, embedding_eps=EPS)
            optimizer = config.build_embedding(model.collection.sparse_parameters())
        else:
            optimizer = torch.optim.Adagrad(model.parameters(), RATE, eps=EPS)
        steps[name] = stepping(model, optimizer)
    random, found = np.random.default_rng(1), {}
    for ending, zipf in (("_uniform", False), ("_zipf", True)):
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(given.rounds + 1):
            ids, slope = draw(random, given, zipf), torch.randn(given.batch, given.tables * given.width)
            for name, step in steps.items():
                began = time.perf_counter()
                step(ids, slope)
                if turn:  # the first is slower, of anything
                    seconds[name].append(time.perf_counter() - began)
        better = min("apart", "merged", key=lambda name: median(seconds[name]))
        ratios = [a / b for a, b in zip(seconds[better], seconds["ours"])]
        found |= spread(f"embedding_speedup{ending}", ratios)
        found |= {f"{name}_ms{ending}": 1e3 * median(its) for name, its in seconds.items()}
    found["embedding_speedup"] = min(found["embedding_speedup_uniform"], found["embedding_speedup_zipf"])
    ours = models["ours"].weights()
    found["max_error"] = max(float((models[name].weights() - ours).abs().max()) for name in ("apart", "merged"))
    return found


def show(found: dict[str, Any], machine: dict[str, Any], threads: dict[str, int]) -> None:
    grid = Grid("ids", "threads", "apart, ms", "merged, ms", "ours, ms", "better over ours", "spread",
                caption=", ".join(f"{name} {value}" for name, value in machine.items()))  # fmt: skip
    for kind in ("uniform", "zipf"):
        for ending, count in threads.items():
            times = [f"{found[f'{name}_ms_{kind}{ending}']:.1f}" for name in ("apart", "merged", "ours")]
            speedup, low, high = (found[f"embedding_speedup_{kind}{part}{ending}"] for part in ("", "_low", "_high"))
            grid.add_row(kind, str(count), *times, f"{speedup:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(grid)


def main() -> None:
    parser = options("a training step of embedding tables against torch's own")
    for name, default in {"tables": 50, "rows": 200_000, "width": 16, "batch": 2048, "rounds": 15}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    given = parser.parse_args()
    busy = refuse_if_busy(given.even_if_busy)
    machine = describe_machine()
    threads = endings()
    found = by_threads(lambda: measure(given), threads)
    show(found, machine, threads)
    if given.json:
        print(json.dumps(found | machine | {"rounds": given.rounds, "busy": busy}))
    if not (error := max(value for key, value in found.items() if key.startswith("max_error"))) <= TOLERANCE:
        raise SystemExit(f"weights differ by {error:.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()

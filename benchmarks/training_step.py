"""How much of a training step is matrix products, and how much of the machine's best matrix product a step reaches.

    python -m benchmarks.training_step [--rows 512] [--rounds 7] [--shares-only] [--json]

`gemm_share_{fp32,bf16}_{forward,train,step}`: `rankmixer_100m` on 512 rows of the synthetic log: seconds of its matrix
products alone, each shape by the quickest of the ways that torch has for it, over the seconds of the forward pass, of
forward and backward pass, and of these with clipping and the optimisers (embedding tables included in all). The
products are those that torch is seen to run in a step whose per-token FFNs are the plain twin.

`mfu_{model}_{fp32,bf16}_{rows}`: FLOPs of forward and backward pass over its seconds, over FLOPs a second of the best
of a sweep of square and tall products in the same format: RankMixer in its sizes, and RankMixer, DCNv2 and DLRM-MLP of
some 16 M dense parameters.

In turn in one process, of all threads and, in keys that end in `_one_thread`, of one; medians with the lowest and the
highest. Without bf16 units the keys of bf16 are left out.
"""

from __future__ import annotations

import json
import math
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table as Grid
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.machine import describe_machine, has_bf16_units, options, refuse_if_busy
from benchmarks.turns import by_threads, endings, in_turn, spread
from scalerec.batch import Batch
from scalerec.data.sources.synthetic import Synthetic
from scalerec.layers import sequence
from scalerec.losses import total
from scalerec.models import rankmixer
from scalerec.models.base import ModelConfig
from scalerec.models.dcnv2 import DCNv2Config
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.ops.din import din_reference
from scalerec.ops.per_token_ffn import per_token_ffn_reference
from scalerec.training.log import Log
from scalerec.training.run import Run, TrainingConfig
from scalerec.training.train import Training

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SIZES: dict[str, ModelConfig] = {
    "small": rankmixer.small(), "base": rankmixer.base(), "100m": rankmixer.rankmixer_100m(),
    "rankmixer_16m": RankMixerConfig(dim=384, num_tokens=16, ffn_dim=640),
    "dcnv2_16m": DCNv2Config(crosses=3, rank=512, hidden=(4096, 2560)),
    "dlrm_mlp_16m": DLRMMLPConfig(hidden=(4096, 3072, 256)),
}  # fmt: skip
BATCHES = (1, 64, 512, 4096)
PEAKS = ((1024, 1024, 1024), (2048, 2048, 2048), (4096, 1024, 4096), (512, 768, 2160), (8192, 512, 512))


class Product(NamedTuple):
    """`batch` times [m, k] x [k, n]."""

    batch: int
    m: int
    k: int
    n: int
    dtype: torch.dtype

    @property
    def flops(self) -> int:
        return 2 * self.batch * self.m * self.k * self.n


class Watch(TorchDispatchMode):
    """Counts the matrix products that torch runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[Product] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        operands = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}.get(func.overloadpacket.__name__)
        if operands is not None:
            a, b = args[operands : operands + 2]
            batch = a.shape[0] if a.dim() == 3 else 1
            self.seen[Product(batch, a.shape[-2], a.shape[-1], b.shape[-1], a.dtype)] += 1
        return func(*args, **(kwargs or {}))


def ways(product: Product) -> Iterator[Callable[[], Any]]:
    """Every layout of both operands, as one batched product and one after the other, into memory that is there."""
    batch, m, k, n, dtype = product
    out = torch.empty(batch, m, n, dtype=dtype)
    for a in (torch.randn(batch, m, k).to(dtype), torch.randn(batch, k, m).to(dtype).transpose(1, 2)):
        for b in (torch.randn(batch, k, n).to(dtype), torch.randn(batch, n, k).to(dtype).transpose(1, 2)):
            yield partial(torch.bmm, a, b, out=out)
            yield partial(each, a, b, out)


def each(a: Tensor, b: Tensor, out: Tensor) -> None:
    for x, y, z in zip(a, b, out):
        torch.mm(x, y, out=z)


def quickest(product: Product, rounds: int = 3) -> Callable[[], Any]:
    calls = {str(number): way for number, way in enumerate(ways(product))}
    seconds = in_turn(calls, rounds)
    return calls[min(calls, key=lambda name: median(seconds[name]))]


class Case:
    """A model, its optimisers and one batch."""

    def __init__(self, model: ModelConfig, rows: int, precision: Any, folder: Path):
        data = Synthetic(rows=max(20_000, 3 * rows))
        threads = torch.get_num_threads()
        config = TrainingConfig(batch_size=rows, precision=precision, threads=threads, tensorboard=False)
        run = Run(name="training_step", data=data, model=model, training=config)
        self.training = Training(run, folder, log=Log(folder, quiet=True, tensorboard=False))
        self.model = self.training.model.train()
        self.batch: Batch = next(iter(self.training.loader.epoch(0)))[0]
        self.dtype = DTYPES[precision]

    def forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return total(self.model.objective(self.batch))

    def train(self) -> None:
        self.model.zero_grad(set_to_none=True)
        self.forward().backward()

    def step(self) -> None:
        self.training.step(self.batch)

    def products(self, call: Callable[[], Any]) -> Counter[Product]:
        # The plain twins: our own ways run their products on threads that are not watched, and on what is in the cache.
        plain = mock.patch.object(rankmixer, "per_token_ffn", per_token_ffn_reference)
        with plain, mock.patch.object(sequence, "din", din_reference), Watch() as watch:
            call()
        return watch.seen


def run_all(kernels: dict[Product, Callable[[], Any]], wanted: Counter[Product]) -> None:
    for product, count in wanted.items():
        for _ in range(count):
            kernels[product]()


def shares(case: Case, name: str, rounds: int) -> dict[str, float]:
    """`gemm_share_*` of forward pass, both passes, and the whole step."""
    parts = {"forward": case.forward, "train": case.train, "step": case.step}
    wanted = {part: case.products(call) for part, call in parts.items()}
    kernels = {product: quickest(product) for product in set().union(*wanted.values())}
    calls: dict[str, Callable[[], Any]] = {}
    for part, call in parts.items():
        calls |= {f"gemm {part}": partial(run_all, kernels, wanted[part]), part: call}
    seconds = in_turn(calls, rounds)
    found: dict[str, float] = {}
    for part in parts:
        key, alone = f"gemm_share_{name}_{part}", seconds[f"gemm {part}"]
        found |= spread(key, [a / b for a, b in zip(alone, seconds[part])])
        found |= {f"{key}_ms": 1e3 * median(seconds[part]), f"{key}_gemm_ms": 1e3 * median(alone)}
    return found


def best_gemm(dtype: torch.dtype) -> tuple[Product, Callable[[], Any]]:
    """The product of the sweep with most FLOPs a second, in its quickest way."""
    kernels = {Product(1, *shape, dtype): quickest(Product(1, *shape, dtype)) for shape in PEAKS}
    seconds = in_turn({str(i): kernel for i, kernel in enumerate(kernels.values())}, 3)
    rates = [product.flops / median(seconds[str(i)]) for i, product in enumerate(kernels)]
    return list(kernels.items())[rates.index(max(rates))]


def utilisation(case: Case, key: str, peak: tuple[Product, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """`mfu_*`: of the best product run before and after."""
    flops = sum(product.flops * count for product, count in case.products(case.train).items())
    repeats = max(1, math.ceil(0.02 / timed(case.train)))  # small batches take less than a clock is good for

    def several() -> None:
        for _ in range(repeats):
            case.train()

    seconds = in_turn({"peak": peak[1], "train": several}, rounds)
    rates = [repeats * flops / b / (peak[0].flops / a) for a, b in zip(seconds["peak"], seconds["train"])]
    return spread(key, rates) | {f"{key}_ms": 1e3 * median(seconds["train"]) / repeats}


def timed(call: Callable[[], Any]) -> float:
    call()
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(precisions: list[str], rows: int, rounds: int, shares_only: bool) -> dict[str, float]:
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for precision in precisions:
            note(f"matrix products in {precision}, {torch.get_num_threads()} threads")
            case = Case(rankmixer.rankmixer_100m(), rows, precision, Path(scratch) / f"share-{precision}")
            found |= shares(case, precision, rounds)
            if shares_only:
                continue
            peak = best_gemm(DTYPES[precision])
            found[f"peak_gflops_{precision}"] = peak[0].flops / timed(peak[1]) / 1e9
            for model, config in SIZES.items():
                for count in BATCHES if model in ("small", "base", "100m") else (rows,):
                    note(f"{model}, {count} rows")
                    case = Case(config, count, precision, Path(scratch) / f"{model}-{precision}-{count}")
                    found |= utilisation(case, f"mfu_{model}_{precision}_{count}", peak, min(rounds, 3))
    return found


def note(what: str) -> None:
    Console(stderr=True).print(what, highlight=False)


def show(found: dict[str, Any], machine: dict[str, Any], threads: dict[str, int]) -> None:
    caption = ", ".join(f"{name} {value}" for name, value in machine.items())
    grid = Grid("", "threads", "ms", "share or MFU", "spread", caption=caption)
    keys = [key.removesuffix("_low") for key in found if key.endswith("_low")]
    for key in keys:
        for ending, count in threads.items():
            low, high, ms = (found[f"{key}_{part}{ending}"] for part in ("low", "high", "ms"))
            share = found[key + ending]
            grid.add_row(key, str(count), f"{ms:,.1f}", f"{share:.3f}", f"{low:.3f} to {high:.3f}")
    Console().print(grid)


def main() -> None:
    parser = options("the share of matrix products in a training step, and model FLOPs utilisation")
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--shares-only", action="store_true", help="leave model FLOPs utilisation out")
    given = parser.parse_args()
    busy = refuse_if_busy(given.even_if_busy)
    machine = describe_machine()
    threads = endings()
    precisions = given.precision
    if "bf16" in precisions and not has_bf16_units():
        precisions = [precision for precision in precisions if precision != "bf16"]
    found = by_threads(lambda: measure(precisions, given.rows, given.rounds, given.shares_only), threads)
    show(found, machine, threads)
    if given.json:
        print(json.dumps(found | machine | {"rows": given.rows, "rounds": given.rounds, "busy": busy}))


if __name__ == "__main__":
    main()

"""What skipping closed experts saves: RankMixer with experts against computing all of them, and against a dense one.

    python -m benchmarks.sparse_experts [--rows 512] [--dim 256] [--width 720] [--out FIGURE.png] [--json]

`sparse_speedup`: the model behind its embeddings, closed experts skipped, against all of them computed, which is tried
as large products and masks (`speedup_over_masks`) and expert by expert; the quicker way is the one compared with.
`share_of_dense`: its throughput over that of a dense RankMixer with the multiply-adds of the open experts.
The router is trained on the grouped teacher (kept in the cache), with narrow experts; before the timing each gets more
hidden units that say nothing, so that gates and scores stay the trained ones and only the work grows. All in turn;
ratios within a round, then their median and spread. The curves over the share of open experts move the biases of the
trained routers; those at another width take the trained gates on random rows.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Grid
from torch import Tensor

from benchmarks.machine import describe_machine, options, refuse_if_busy
from benchmarks.turns import in_turn, spread
from scalerec import checkpoint
from scalerec.batch import Batch
from scalerec.data.loader import Loader
from scalerec.data.reader import ParquetRows
from scalerec.data.source import cache_root
from scalerec.data.sources.synthetic import Synthetic
from scalerec.layers.experts import ExpertFFN, ExpertsConfig
from scalerec.models.rankmixer import RankMixer, RankMixerBlock, RankMixerConfig
from scalerec.ops.expert_ffn import BREAK_EVEN, masked_experts, sparse_experts
from scalerec.ops.per_token import per_token_linear
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig
from scalerec.training.train import train

TOLERANCE = 1e-5
NARROW = 32  # hidden width of an expert while the router is trained
LITTLE = 1e-30  # a gate that is not closed and says nothing
PIECE = 512  # rows at once where all experts are computed: more than that leaves the cache
RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4, 1.0)

Call = Callable[[], Tensor]


def trained(given: argparse.Namespace) -> tuple[RankMixer, Batch]:
    """A RankMixer with experts trained on the teacher, and test rows; from the cache when it was trained before."""
    model = RankMixerConfig(
        dim=given.dim, num_tokens=given.tokens, ffn_dim=NARROW, head="linear",
        experts=ExpertsConfig(count=given.experts, active=1 / given.experts),
    )  # fmt: skip
    optimizer = OptimizerConfig(dense="adamw", lr=1e-3, embedding_lr=0.1)
    training = TrainingConfig(epochs=1, batch_size=512, optimizer=optimizer, tensorboard=False, select="last")
    run = Run(name="sparse_experts", data=Synthetic(rows=given.log_rows), model=model, training=training)
    name = f"t{given.tokens}-d{given.dim}-e{given.experts}-{given.log_rows}"
    folder = given.run_folder or cache_root() / "benchmarks" / "sparse_experts" / name
    if not (folder / "metrics.json").exists():
        train(run, folder, resume=bool(checkpoint.saved(folder)))
    saved = checkpoint.load(folder)
    found = saved.model()
    assert isinstance(found, RankMixer)
    rows = ParquetRows.of(run.data, run.data.prepare())
    return found, Batch.cat(list(islice(Loader(rows, saved.encoder, "test", 1024), 1 + given.most // 1024)))


@torch.no_grad()
def widened(model: RankMixer, width: int) -> RankMixer:
    """The same function with experts of `width` hidden units: those beyond the trained ones have no way out."""
    config = model.config.model_copy(update={"ffn_dim": width})
    found = config.build(model.layout).eval()
    state = found.state_dict()
    for name, value in model.state_dict().items():
        new = state[name]
        if name.endswith("ffn.down"):
            new.zero_()[:, :, : value.shape[2]] = value
        elif name.endswith("ffn.up"):
            new[..., : value.shape[3]] = value
        elif name.endswith("ffn.up_bias"):
            new.zero_()[..., : value.shape[2]] = value
        else:
            new.copy_(value)
    found.load_state_dict(state)
    return found


def layers_of(model: RankMixer) -> list[ExpertFFN]:
    return [
        block.ffn for block in model.blocks if isinstance(block, RankMixerBlock) and isinstance(block.ffn, ExpertFFN)
    ]


def scored(
    model: RankMixer, batch: Batch, break_even: float | None = None, piece: int = 0, every: bool = False
) -> Call:
    """The dense part on a batch whose vectors are looked up; `break_even` 0 masks, `every` opens all gates a little."""
    parts = [batch] if not piece else [batch.take(rows) for rows in torch.arange(len(batch)).split(piece)]
    with torch.no_grad():
        inputs = [(model.embeddings(part.user, part.items), part.user_of_row) for part in parts]

    @torch.no_grad()
    def call() -> Tensor:
        for layer in layers_of(model):
            layer.break_even = BREAK_EVEN if break_even is None else break_even
            if every:
                layer.gates = lambda x, of=layer: ExpertFFN.gates(of, x).clamp(min=LITTLE)  # type: ignore
        found = torch.cat([model.dense(user, items, of_row).logits for (user, items), of_row in inputs])
        for layer in layers_of(model):
            layer.__dict__.pop("gates", None)
        return found

    return call


def whole_model(model: RankMixer, batch: Batch, break_even: float, rounds: int) -> dict[str, float]:
    """Both ratios at one batch, the share of open experts, and the largest difference of a logit."""
    share = open_share(model, batch)
    dense = model.config.model_copy(
        update={"ffn_dim": max(round(share * model.config.hidden), 1), "experts": ExpertsConfig()}
    )
    same_work = dense.build(model.layout).eval()
    calls = {
        "sparse": scored(model, batch, break_even),
        "masked": scored(model, batch, 0.0, PIECE if len(batch) > PIECE else 0),
        "by expert": scored(model, batch, 2.0, every=True),
        "dense": scored(same_work, batch),
    }
    difference = float((calls["sparse"]() - calls["masked"]()).abs().max())
    seconds = in_turn(calls, rounds)
    return {
        **spread("sparse_speedup", [a / b for a, b in zip(all_computed(seconds), seconds["sparse"])]),
        "speedup_over_masks": median(a / b for a, b in zip(seconds["masked"], seconds["sparse"])),
        **spread("share_of_dense", [a / b for a, b in zip(seconds["dense"], seconds["sparse"])]),
        "open": share,
        "max_error": difference,
        "dense_ffn_dim": dense.ffn_dim,
        "us_per_row": 1e6 * median(seconds["sparse"]) / len(batch),
    }


def all_computed(seconds: dict[str, list[float]]) -> list[float]:
    """Those of computing all experts, in the way that is the quicker one."""
    return min(seconds["masked"], seconds["by expert"], key=median)


@torch.no_grad()
def open_share(model: RankMixer, batch: Batch) -> float:
    """Share of gates that are open, over all layers."""
    found: list[Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda of, x: found.append(of.gates(x[0].transpose(0, 1)) != 0))  # type: ignore
        for layer in layers_of(model)
    ]
    model(batch)
    for hook in hooks:
        hook.remove()
    return float(torch.stack(found).float().mean())


@torch.no_grad()
def logits_of(model: RankMixer, batch: Batch) -> Tensor:
    """What the router of the last layer says of each row, [T, B, E]."""
    found: list[Tensor] = []
    hook = layers_of(model)[-1].router.register_forward_hook(lambda *given: found.append(given[2]))
    model(batch)
    hook.remove()
    return found[0]


@torch.no_grad()
def one_layer(logits: Tensor, dim: int, width: int, ratio: float, rounds: int) -> dict[str, float]:
    """Medians of the same two ratios for the experts alone, the gates moved so that `ratio` of them is open."""
    tokens, rows, experts = logits.shape
    torch.manual_seed(0)
    x = torch.randn(rows, tokens, dim).transpose(0, 1)
    shift = logits.flatten().kthvalue(max(round((1 - ratio) * logits.numel()), 1)).values
    gates = torch.relu(logits - shift) if ratio < 1 else logits - logits.min() + 0.1
    own = [torch.randn(tokens, experts, *shape) / dim**0.5 for shape in ((dim, width), (width,), (width, dim), (dim,))]
    inner = max(round(ratio * experts * width), 1)
    up, down = torch.randn(tokens, dim, inner), torch.randn(tokens, inner, dim)
    bias, out_bias = torch.zeros(tokens, inner), torch.zeros(tokens, dim)
    seconds = in_turn(
        {
            "sparse": lambda: sparse_experts(x, gates, *own, break_even=2),
            "masked": lambda: masked_experts(x, gates, *own),
            "by expert": lambda: sparse_experts(x, gates.clamp(min=LITTLE), *own, break_even=2),
            "dense": lambda: per_token_linear(torch.nn.functional.gelu(per_token_linear(x, up, bias)), down, out_bias),
        },
        rounds,
    )
    return {
        "speedup": median(a / b for a, b in zip(all_computed(seconds), seconds["sparse"])),
        "share": median(a / b for a, b in zip(seconds["dense"], seconds["sparse"])),
    }


def curves(model: RankMixer, rows: Batch, given: argparse.Namespace) -> dict[str, float]:
    """Both ratios by batch (whole model) and by share of open experts (one layer), the latter also at `wide`."""
    found: dict[str, float] = {}
    rounds = min(given.rounds, 3)
    for size in (4**i for i in range(7) if 4**i <= given.most):
        at = whole_model(model, rows.take(torch.arange(size) % len(rows)), given.break_even, rounds)
        found |= {f"speedup_by_rows_{size}": at["sparse_speedup"], f"share_by_rows_{size}": at["share_of_dense"]}
    logits = logits_of(model, rows.take(torch.arange(given.rows) % len(rows)))
    for ratio in RATIOS:
        at = one_layer(logits, given.dim, given.width, ratio, rounds)
        found |= {f"speedup_by_open_{ratio:g}": at["speedup"], f"share_by_open_{ratio:g}": at["share"]}
    quicker = [ratio for ratio in RATIOS if found[f"speedup_by_open_{ratio:g}"] > 1]
    found["break_even"] = max(quicker, default=0.0)
    at = one_layer(logits, given.wide, round(given.width * given.wide / given.dim), 1 / given.experts, rounds)
    return found | {f"speedup_at_width_{given.wide}": at["speedup"], f"share_at_width_{given.wide}": at["share"]}


def show(found: dict[str, Any], about: str) -> None:
    console, grid = Console(), Grid("", "median", "spread of the rounds", title=about)
    for name, meaning in {
        "sparse_speedup": "all experts computed / closed ones skipped",
        "share_of_dense": "dense model of the same work / closed ones skipped",
    }.items():
        grid.add_row(meaning, f"{found[name]:.3g}", f"{found[f'{name}_low']:.3g} to {found[f'{name}_high']:.3g}")
    grid.add_row("share of experts open", f"{found['open']:.4f}", "")
    console.print(grid)
    for by, what in {"rows": "rows", "open": "share open, experts alone"}.items():
        curve = Grid(what, "speedup", "share of dense")
        for name in (name for name in found if name.startswith(f"speedup_by_{by}_")):
            at = name.rpartition("_")[2]
            curve.add_row(at, f"{found[name]:.3g}", f"{found[f'share_by_{by}_{at}']:.3g}")
        console.print(curve)


def draw(found: dict[str, Any], about: str, file: str) -> None:
    """Both ratios over rows and over the share of open experts."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 4), layout="constrained")
    for axes, by, label in zip(picture.subplots(1, 2), ("rows", "open"), ("rows", "share of experts open, one layer")):
        sizes = sorted(float(name.rpartition("_")[2]) for name in found if name.startswith(f"speedup_by_{by}_"))
        axes.plot(sizes, [found[f"speedup_by_{by}_{s:g}"] for s in sizes], "o-", label="speedup over all experts")
        axes.plot(
            sizes, [found[f"share_by_{by}_{s:g}"] for s in sizes], "s--", label="share of the dense model's speed"
        )
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(xscale="log", xlabel=label)
        axes.legend(fontsize=7)
    picture.suptitle(about, fontsize=9)
    picture.savefig(file, dpi=130)


def arguments() -> argparse.Namespace:
    parser = options((__doc__ or "").splitlines()[0])
    for name, default in {
        "rows": 512, "tokens": 16, "dim": 256, "experts": 8, "width": 720, "wide": 768, "rounds": 7, "most": 4096,
        "log-rows": 300_000,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument(
        "--break-even", type=float, default=BREAK_EVEN, help="share open above which a token is computed whole"
    )
    parser.add_argument("--run", dest="run_folder", type=Path, help="another trained run of these sizes")
    parser.add_argument("--out", help="file of the figure of the curves")
    parser.add_argument("--quick", action="store_true", help="very small, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        small = {"rows": 32, "tokens": 8, "dim": 16, "experts": 4, "width": 40, "wide": 24, "rounds": 2, "most": 16,
                 "log_rows": 3000}  # fmt: skip
        given = argparse.Namespace(**{**vars(given), **small})
    return given


def main() -> None:
    given = arguments()
    busy = refuse_if_busy(given.even_if_busy)
    narrow, rows = trained(given)
    model = widened(narrow, given.width)
    found: dict[str, Any] = whole_model(
        model, rows.take(torch.arange(given.rows) % len(rows)), given.break_even, given.rounds
    )
    print(
        f"sparse_speedup {found['sparse_speedup']:.3g}, share_of_dense {found['share_of_dense']:.3g}", file=sys.stderr
    )
    found |= curves(model, rows, given)
    sizes = {name: getattr(given, name) for name in ("rows", "tokens", "dim", "experts", "width", "rounds")}
    about = f"{given.rows} rows, {given.tokens} tokens of {given.dim}, {given.experts} experts of {given.width}"
    show(found, about)
    if given.out:
        draw(found, about, given.out)
    if given.json:
        print(json.dumps(found | sizes | describe_machine() | {"busy": busy}))
    if not found["max_error"] <= TOLERANCE:
        raise SystemExit(f"scores differ by {found['max_error']:.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()

"""What a candidate costs over a cached history (M-FALCON), against a pass of its own for each candidate.

    python -m benchmarks.mfalcon [--tokens 1024] [--candidates 1024] [--dim 64] [--out FIGURE.png] [--json]

`falcon_speedup`: one request as served (lookups, history, all candidates in micro-batches) against every candidate as
the last of n + 1 tokens, timed on a sample of candidates and scaled. Such passes are run one sequence at a time and
eight together, and the quicker way is the one compared with. `cached_speedup`: the same request cold against warm, with
the history kept from a request one event ago. All in turn; ratios within a round, then their median and spread.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import TypeVar

import torch
from rich.console import Console
from rich.table import Table as Grid
from torch import Tensor

from benchmarks.machine import describe_machine, options, refuse_if_busy
from benchmarks.turns import spread
from scalerec.batch import FIRST_ID, Batch, Jagged, Rows
from scalerec.features.layout import FeatureLayout, GroupLayout, Layout, Table
from scalerec.inference.forward_delta import Kept, forward_delta
from scalerec.models.hstu import HSTU, HSTUConfig

Result = TypeVar("Result")
TOLERANCE = 1e-5
ITEMS = 100_000
TOGETHER = 8  # sequences of the other way to run passes one by one
NOW = 1.7e9


def make_model(tokens: int, dim: int, layers: int, heads: int) -> HSTU:
    """A ranking model on histories of up to one more than `tokens` items, without actions: a token is an event."""
    events = FeatureLayout(
        name="events", kind="sequence", width=dim, tables=("item",), query=("item",), max_len=tokens + 1, time=True
    )
    item = FeatureLayout(name="item", kind="id", width=dim, tables=("item",))
    groups = (
        GroupLayout(name="past", side="user", features=(events,)),
        GroupLayout(name="item", side="item", features=(item,)),
    )
    layout = Layout(tables=(Table(name="item", rows=ITEMS, dim=dim),), groups=groups, tasks=("click",))
    each = dim // heads
    config = HSTUConfig(goal="ranking", dim=dim, num_layers=layers, num_heads=heads, qk_dim=each, v_dim=each)
    torch.manual_seed(0)
    model = config.build(layout).eval()
    with torch.no_grad():  # far from its start, where histories hardly matter
        for layer in model.layers:
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_request(tokens: int, candidates: int) -> Batch:
    """One user with a year of events, and candidates."""
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(FIRST_ID, ITEMS, (tokens, 1), generator=draw)
    times = NOW - 3.15e7 * torch.rand(tokens, generator=draw, dtype=torch.float64).sort(descending=True)[0]
    user = history(ids, times)
    items = torch.randint(FIRST_ID, ITEMS, (candidates, 1), generator=draw)
    ones, index = torch.ones(candidates, 1), torch.arange(candidates)
    return Batch(
        user, Rows("item", items, torch.zeros(candidates, 0), {}, {}), torch.zeros_like(index), ones, ones, index, index
    )


def history(ids: Tensor, times: Tensor, users: int = 1) -> Rows:
    """Users of equally many events, ids [E, 1] and times [E] in all."""
    offsets = torch.arange(users + 1) * (len(ids) // users)
    now = torch.full((users,), NOW, dtype=torch.float64)
    past, when = Jagged(ids, offsets), Jagged(times, offsets)
    none = torch.zeros(users, 0)
    return Rows("user", none.long(), none, {"events": past}, {"events": when}, {}, now)


@torch.no_grad()
def falcon(model: HSTU, request: Batch) -> Tensor:
    """Logits [m] of the candidates as they are served."""
    return model(request).logits[:, 0]


@torch.no_grad()
def one_by_one(model: HSTU, request: Batch, sample: Tensor, together: int) -> Tensor:
    """Logits of the candidates `sample`, each as the last token of a sequence of its own."""
    past, when = request.user.lists["events"].values, request.user.times["events"].values
    assert request.user.now is not None
    found = []
    for part in sample.split(together):
        ids = torch.cat([past.expand(len(part), -1, -1), request.items.ids[part, None]], 1).flatten(0, 1)
        times = torch.cat([when, request.user.now]).repeat(len(part))
        state = model.encode_user(model.embeddings(history(ids, times, len(part)))[0])
        last = state.offsets[1:] - 1
        found.append(model.logits(state.hidden[last], state.content[last])[:, 0])
    return torch.cat(found)


def timed(call: Callable[[], Result]) -> tuple[float, Result]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def against_one_by_one(model: HSTU, request: Batch, sample_size: int, rounds: int) -> dict[str, float]:
    """Seconds per candidate of both ways, their ratios in turn, and the largest difference of a logit."""
    draw = torch.Generator().manual_seed(2)
    ways = (1, min(TOGETHER, sample_size))
    sample = torch.randperm(len(request), generator=draw)[:sample_size]
    falcon(model, request)
    warm_up = {
        way: min(timed(lambda way=way: one_by_one(model, request, sample, way))[0] for _ in "12") for way in ways
    }
    way = min(ways, key=lambda way: warm_up[way])
    ours, theirs, differences = [], [], []
    for _ in range(rounds):
        sample = torch.randperm(len(request), generator=draw)[:sample_size]
        seconds, found = timed(lambda: falcon(model, request))
        ours.append(seconds / len(request))
        seconds, expected = timed(lambda of=sample: one_by_one(model, request, of, way))
        theirs.append(seconds / len(sample))
        differences.append(float((found[sample] - expected).abs().max()))
    ratios = [b / a for a, b in zip(ours, theirs)]
    return {
        **spread("falcon_speedup", ratios),
        "falcon_max_error": max(differences),
        "us_per_candidate": 1e6 * median(ours),
        "us_per_candidate_one_by_one": 1e6 * median(theirs),
        "one_by_one_together": way,
    }


def against_cold(model: HSTU, request: Batch, rounds: int) -> dict[str, float]:
    """A request whose history was kept one event ago, against the same without; the history alone, and all of it."""
    past, when = request.user.lists["events"].values, request.user.times["events"].values
    before = replace(history(past[:-1], when[:-1]), now=torch.tensor([NOW - 60], dtype=torch.float64))
    kept = forward_delta(model, None, before).kept
    histories, requests, differences = [], [], []

    @torch.no_grad()
    def served(of: Kept | None) -> tuple[float, float, Tensor]:
        """Seconds of the history, seconds of all, logits."""
        history, state = timed(lambda: forward_delta(model, of, request.user).state)
        rest, logits = timed(lambda: model.score(state, model.embeddings(request.items)[0], request.user_of_row).logits)
        return history, history + rest, logits

    for turn in range(rounds + 1):
        cold, warm = served(None), served(kept)
        if turn:  # the first is a warm-up
            histories.append(cold[0] / warm[0])
            requests.append(cold[1] / warm[1])
            differences.append(float((cold[2] - warm[2]).abs().max()))
    return {
        **spread("cached_speedup", requests),
        **spread("cached_history_speedup", histories),
        "cached_max_error": max(differences),
        "cached_bytes": kept.nbytes,
    }


def curves(model: HSTU, tokens: int, most: int, rounds: int) -> dict[str, float]:
    """Microseconds per candidate over the number of candidates, and over the micro-batch at the largest number."""
    figures = {}
    sizes = [4**i for i in range(12) if 4**i <= most]
    usual = model.config
    for name, many, micro in [
        *(("candidates", m, usual.micro_batch) for m in sizes),
        *(("micro_batch", most, m) for m in sizes),
    ]:
        model.config = usual.model_copy(update={"micro_batch": micro})
        request = make_request(tokens, many)
        seconds = [timed(lambda: falcon(model, request))[0]]  # noqa: B023 - called at once
        while len(seconds) <= rounds and sum(seconds) < 10:
            seconds.append(timed(lambda: falcon(model, request))[0])  # noqa: B023
        figures[f"us_by_{name}_{many if name == 'candidates' else micro}"] = 1e6 * median(seconds) / many
    model.config = usual
    return figures


def multiply_adds(config: HSTUConfig, tokens: int, candidates: int) -> float:
    """Multiply-adds of a pass of its own over those of a candidate in a request, per layer."""
    linear, pair = config.layer_macs(), config.num_heads * (config.qk_dim + config.v_dim)
    alone = (tokens + 1) * linear + (tokens + 1) ** 2 / 2 * pair
    once = tokens * linear + tokens**2 / 2 * pair
    return alone / (once / candidates + linear + (tokens + 1) * pair)


def show(figures: dict[str, float], about: str) -> None:
    console = Console()
    grid = Grid("", "median", "spread of the rounds", title=about)
    for name, meaning in {
        "falcon_speedup": "a candidate: one by one / M-FALCON",
        "cached_speedup": "a request: cold / warm",
        "cached_history_speedup": "its history alone: cold / warm",
    }.items():
        low, high = figures[f"{name}_low"], figures[f"{name}_high"]
        grid.add_row(meaning, f"{figures[name]:.4g}", f"{low:.4g} to {high:.4g}")
    grid.add_row("multiply-adds, one by one / M-FALCON", f"{figures['falcon_multiply_adds']:.4g}", "")
    grid.add_row("µs a candidate, M-FALCON", f"{figures['us_per_candidate']:.4g}", "")
    grid.add_row("µs a candidate, one by one", f"{figures['us_per_candidate_one_by_one']:.4g}", "")
    console.print(grid)
    curve = Grid("size", "µs a candidate, so many in all", "the most in all, so many in a micro-batch")
    for size in _sizes(figures):
        curve.add_row(
            f"{size:,}", *(f"{figures[f'us_by_{name}_{size}']:.4g}" for name in ("candidates", "micro_batch"))
        )
    console.print(curve)


def draw(figures: dict[str, float], about: str, file: str) -> None:
    """Both curves on logarithmic axes, with the cost of a candidate on its own."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    sizes = _sizes(figures)
    axes.plot(sizes, [figures[f"us_by_candidates_{s}"] for s in sizes], "o-", label="candidates of a request")
    label = f"micro-batch, {max(sizes):,} candidates"
    axes.plot(sizes, [figures[f"us_by_micro_batch_{s}"] for s in sizes], "s--", label=label)
    axes.axhline(figures["us_per_candidate_one_by_one"], color="grey", linewidth=1, label="one by one")
    axes.set(xscale="log", yscale="log", ylabel="µs a candidate", title=about)
    axes.set_xlabel("candidates of a request, or of a micro-batch")
    axes.legend()
    figure.savefig(file, dpi=150)


def _sizes(figures: dict[str, float]) -> list[int]:
    return sorted(int(name.rpartition("_")[2]) for name in figures if name.startswith("us_by_candidates_"))


def arguments() -> argparse.Namespace:
    parser = options((__doc__ or "").splitlines()[0])
    for name, default in {
        "tokens": 1024, "candidates": 1024, "dim": 64, "layers": 4, "heads": 2, "rounds": 7, "sample": 16, "most": 4096,
    }.items():  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", help="file of the figure of both curves")
    parser.add_argument("--quick", action="store_true", help="very small, to see that it runs")
    given = parser.parse_args()
    if given.quick:
        small = {"tokens": 24, "candidates": 16, "dim": 8, "layers": 1, "rounds": 2, "sample": 2, "most": 16}
        given = argparse.Namespace(**{**vars(given), **small})
    return given


def main() -> None:
    given = arguments()
    busy = refuse_if_busy(given.even_if_busy)
    sizes = {name: getattr(given, name) for name in ("tokens", "candidates", "dim", "layers", "heads", "rounds")}
    model = make_model(given.tokens, given.dim, given.layers, given.heads)
    request = make_request(given.tokens, given.candidates)
    figures = against_one_by_one(model, request, given.sample, given.rounds)
    figures |= against_cold(model, request, given.rounds)
    figures["falcon_multiply_adds"] = multiply_adds(model.config, given.tokens, given.candidates)
    figures |= curves(model, given.tokens, given.most, given.rounds)
    about = f"{given.tokens} tokens, {given.candidates} candidates, width {given.dim}, {given.layers} layers"
    show(figures, about)
    if given.out:
        draw(figures, about, given.out)
    if given.json:
        print(json.dumps(figures | sizes | describe_machine() | {"busy": busy}))
    worst = max(figures["falcon_max_error"], figures["cached_max_error"])
    if not worst <= TOLERANCE:
        raise SystemExit(f"scores differ by {worst:.1e}, more than {TOLERANCE}")


if __name__ == "__main__":
    main()

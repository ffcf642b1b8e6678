"""HSTU's attention, forward and backward: against the padded definition, against SDPA, and jagged against padded.

    python -m benchmarks.hstu_attention [--tokens 8192] [--longest 8192] [--repetitions 5] [--json]

`speedup_2048`: `hstu_attention_reference` over `hstu_attention`, time over time, with position and time bias, fp32,
two heads of 64, `--tokens` in sequences of 2048; the table has other lengths too, `speedup_movielens` those of the
users below. Both are given the times and work the buckets out anew; in a model the plan does this once for all layers.

`against_sdpa_fp32`, `against_sdpa_bf16`: `scaled_dot_product_attention(is_causal=True)` over `hstu_attention` without
biases, both 2 sequences of 2048, 4 heads of 64. SDPA is given [B, H, N, d] as it likes it, we [B N, H, d] as a model
has it.

`jagged_share`: how much of the possible speed-up over padding is reached. A batch of 128 users with lengths of
MovieLens 1M (cut to 200; from $SCALEREC_DATA, else log-normal) is run once as it is and once with every user filled up
to 200, by the same code and with both biases; time over time, divided by multiply-adds over multiply-adds of the pairs
on and below the diagonal. One means that every multiply-add not done is time saved. One head of 50; plans are made
beforehand.

All ratios are of runs in turns in one process: medians, with the lowest and the highest. Keys that end in
`_one_thread` are of one thread, the others of all.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

from benchmarks.machine import describe_machine, options, refuse_if_busy
from benchmarks.turns import by_threads, endings, in_turn, paired
from scalerec.ops.hstu_attention import attention_plan, hstu_attention, hstu_attention_reference

LENGTHS = (200, 512, 1024, 2048, 4096, 8192)
HEADS, WIDTH, BUCKETS = 2, 64, 129
MOVIELENS, SLOTS = 200, 211  # longest history, and N of the public configuration
TOLERANCE = 1e-4
Inputs = dict[str, Any]


def make_inputs(lengths: list[int], heads: int, width: int, dtype: torch.dtype, biases: bool, n: int = 0) -> Inputs:
    """Arguments of `hstu_attention`, with gradients asked for, as after an optimiser's first steps: small biases."""
    draw = torch.Generator().manual_seed(0)
    total, longest = sum(lengths), n or max(lengths)

    def leaf(*shape: int, std: float = 1.0) -> Tensor:
        return (std * torch.randn(*shape, generator=draw)).to(dtype).requires_grad_()

    found: Inputs = {name: leaf(total, heads, width) for name in ("q", "k", "v")}
    found |= {"offsets": torch.tensor([0, *lengths]).cumsum(0), "scale": 1 / longest, "alpha": width**-0.5}
    if biases:
        times = 970_000_000 + (12 * torch.rand(total + 1, generator=draw)).exp().long().cumsum(0)
        found |= {"position": leaf(2 * longest - 1, std=0.02), "time": leaf(BUCKETS, std=0.02)}
        found |= {"query_times": times[1:], "key_times": times[:-1]}
    return found


def planned(inputs: Inputs) -> Inputs:
    """The same with a plan in place of the times."""
    times = {name: inputs[name] for name in ("query_times", "key_times")}
    plan = attention_plan(inputs["offsets"], **times, buckets=BUCKETS, dtype=inputs["q"].dtype)
    return {name: value for name, value in inputs.items() if name not in times} | {"plan": plan}


def step(attention: Callable[..., Tensor], inputs: Inputs) -> Callable[[], list[Tensor]]:
    """A function that runs forward and backward once and returns all gradients."""
    leaves = [x for x in inputs.values() if isinstance(x, Tensor) and x.requires_grad]
    shape = (*inputs["q"].shape[:-1], inputs["v"].shape[-1])
    slope = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs["q"].dtype)
    return lambda: list(torch.autograd.grad(attention(**inputs), leaves, slope))


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def in_turns(name: str, first: Callable[[], Any], second: Callable[[], Any], repetitions: int) -> dict[str, float]:
    """Time of the first over that of the second, and milliseconds of both."""
    seconds = in_turn({"first": first, "second": second}, repetitions)
    return paired(name, seconds["first"], seconds["second"])


def against_reference(length: int, tokens: int, repetitions: int) -> dict[str, float]:
    inputs = make_inputs([length] * max(1, tokens // length), HEADS, WIDTH, torch.float32, biases=True)
    ours, theirs = step(hstu_attention, inputs), step(hstu_attention_reference, inputs)
    errors = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(ours(), theirs())]
    return in_turns(f"speedup_{length}", theirs, ours, repetitions) | {f"max_error_{length}": max(errors)}


def against_sdpa(dtype: torch.dtype, name: str, repetitions: int) -> dict[str, float]:
    batch, length, heads = 2, 2048, 4
    inputs = make_inputs([length] * batch, heads, WIDTH, dtype, biases=False)
    theirs = {
        name: inputs[name].detach().view(batch, length, heads, WIDTH).transpose(1, 2).contiguous().requires_grad_()
        for name in ("q", "k", "v")
    }
    return in_turns(name, step(sdpa, theirs), step(hstu_attention, inputs), repetitions)


def movielens_lengths(users: int = 128) -> tuple[list[int], str]:
    """Lengths of the histories of users drawn with a fixed seed, and where they are from."""
    random = np.random.default_rng(0)
    file = Path(os.environ.get("SCALEREC_DATA") or "/nowhere") / "ml-1m" / "ratings.parquet"
    if file.exists():
        import pyarrow.parquet as pq

        counts = np.bincount(pq.read_table(file, columns=["user_id"])["user_id"].to_numpy())
        counts, source = counts[counts > 0] - 1, "MovieLens 1M"  # the last rating is the target
    else:
        counts, source = np.exp(random.normal(4.6, 0.95, 6040)).astype(np.int64).clip(19), "log-normal"
    return random.choice(counts, users, replace=False).clip(max=MOVIELENS).tolist(), source


def jagged_share(repetitions: int) -> dict[str, float | str]:
    lengths, source = movielens_lengths()
    full = [MOVIELENS] * len(lengths)
    ours, padded = (planned(make_inputs(n, 1, 50, torch.float32, biases=True, n=SLOTS)) for n in (lengths, full))
    found = in_turns("jagged_over_padded", step(hstu_attention, padded), step(hstu_attention, ours), 3 * repetitions)
    macs = sum(n * (n + 1) for n in full) / sum(n * (n + 1) for n in lengths)
    share = {f"jagged_share{end}": found[f"jagged_over_padded{end}"] / macs for end in ("", "_low", "_high")}
    times = make_inputs(lengths, 1, 50, torch.float32, biases=True, n=SLOTS)
    plan_ms = 1000 * median(seconds(lambda: planned(times)) for _ in range(repetitions))
    reference = in_turns(
        "speedup_movielens", step(hstu_attention_reference, times), step(hstu_attention, times), repetitions
    )
    mean = sum(lengths) / len(lengths)
    described = {"movielens_source": source, "movielens_mean_length": mean, "movielens_plan_ms": plan_ms}
    return found | share | reference | {"macs_padded_over_jagged": macs} | described


def measure(tokens: int, longest: int, repetitions: int) -> dict[str, float | str]:
    found: dict[str, float | str] = {}
    for length in LENGTHS:
        if length <= longest:
            found |= against_reference(length, tokens, max(2, repetitions // 2) if length > 2048 else repetitions)
    found |= against_sdpa(torch.float32, "against_sdpa_fp32", repetitions)
    found |= against_sdpa(torch.bfloat16, "against_sdpa_bf16", repetitions)
    return found | jagged_share(repetitions)


def show(figures: dict[str, Any], machine: dict[str, str | int], endings: list[str]) -> None:
    table = Table(
        title="HSTU attention, forward and backward; time of the other over ours",
        caption=", ".join(f"{name} {value}" for name, value in machine.items()),
    )
    for heading in ("", "threads", "other, ms", "ours, ms", "ratio", "spread"):
        table.add_column(heading, justify="left" if not heading else "right")
    rows = [(f"speedup_{n}", f"padded definition, length {n}, both biases") for n in LENGTHS]
    rows += [("against_sdpa_fp32", "SDPA fp32, 2048, no bias"), ("against_sdpa_bf16", "SDPA bf16, 2048, no bias")]
    rows += [("speedup_movielens", "padded definition, MovieLens lengths")]
    rows += [("jagged_over_padded", "MovieLens lengths filled up to 200")]
    for name, label in rows:
        for ending in endings:
            if name + ending not in figures:
                continue
            value = {part: figures[f"{name}{part}{ending}"] for part in ("", "_low", "_high", "_ms_theirs", "_ms_ours")}
            threads = "1" if ending else str(machine["threads"])
            times = (f"{value['_ms_theirs']:.0f}", f"{value['_ms_ours']:.1f}")
            table.add_row(label, threads, *times, f"{value['']:.2f}", f"{value['_low']:.2f} to {value['_high']:.2f}")
    for ending in endings:
        share, low, high = (figures[f"jagged_share{part}{ending}"] for part in ("", "_low", "_high"))
        label = f"  of what {figures[f'macs_padded_over_jagged{ending}']:.2f} times the multiply-adds make possible"
        table.add_row(
            label, "1" if ending else str(machine["threads"]), "", "", f"{share:.2f}", f"{low:.2f} to {high:.2f}"
        )
    Console().print(table)


def main() -> None:
    parser = options("HSTU's attention against its padded definition and SDPA")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a batch of one length")
    parser.add_argument(
        "--longest", type=int, default=8192, help="leave out longer sequences: the definition needs memory"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    arguments = parser.parse_args()
    busy = refuse_if_busy(arguments.even_if_busy)

    machine = describe_machine()
    threads = endings()
    figures = by_threads(lambda: measure(arguments.tokens, arguments.longest, arguments.repetitions), threads)
    show(figures, machine, list(threads))
    if arguments.json:
        print(json.dumps(figures | machine | {"repetitions": arguments.repetitions, "busy": busy}))
    error = max(value for name, value in figures.items() if name.startswith("max_error"))
    if not error <= TOLERANCE:
        raise SystemExit(f"gradients differ by {error:.1e} of their largest entry, more than {TOLERANCE}")


if __name__ == "__main__":
    main()

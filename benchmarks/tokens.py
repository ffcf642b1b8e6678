"""What RankMixer puts in the place of attention and of a shared FFN: token mixing, and a FFN of its own for each token.

    python -m benchmarks.tokens [--dim 1024] [--tokens 4096] [--rounds 7] [--json]

`mixing_speedup_T`: multi-head attention (`nn.MultiheadAttention`, 16 heads, no weights returned) over token mixing,
time over time, both on the same [rows, T, dim] with rows T = `--tokens`, forward and backward. `layer_speedup_T`:
the same for a whole layer (mixed or attended, added, normalised, a FFN of width dim that all tokens share, added,
normalised), which is what a claim of 3.2 times above 1,000 tokens would have to mean (docs/performance.md).

`ffn_speedup_fp32`, `ffn_speedup_bf16`: the better of a Python loop over tokens and `bmm` with the bias added
afterwards, over the per-token FFN as the models have it; a layer of `rankmixer_100m` (16 tokens, 768, 2160) on 512
rows, forward and backward.

All in turn, of all threads and, in keys that end in `_one_thread`, of one; medians with the lowest and the highest.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Sequence
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Grid
from torch import Tensor, nn

from benchmarks.machine import describe_machine, has_bf16_units, options, refuse_if_busy
from benchmarks.turns import by_threads, endings, in_turn, paired
from scalerec.models.rankmixer import PerTokenFFN
from scalerec.ops.per_token import per_token_linear_reference
from scalerec.ops.token_mixing import token_mixing

COUNTS = (16, 64, 256, 1024)  # tokens of a row
HEADS = 16
TOLERANCE = 1e-4


class Mixing(nn.Module):
    """Eq. 3-5, as many heads as tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return token_mixing(x, x.shape[1])


class Attention(nn.Module):
    """Self-attention over the tokens of a row."""

    def __init__(self, dim: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class Layer(nn.Module):
    """Post-norm, as RankMixer's, around either; one FFN for all tokens."""

    def __init__(self, between: nn.Module, dim: int):
        super().__init__()
        self.between, self.ffn = between, PerTokenFFN(1, dim, dim, shared=True)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        s = self.norms[0](self.between(x) + x)
        return self.norms[1](self.ffn(s) + s)


def loop(ffn: PerTokenFFN, x: Tensor) -> Tensor:
    """Token by token."""
    hidden = nn.functional.gelu(per_token_linear_reference(x.transpose(0, 1), ffn.up, ffn.up_bias))
    return per_token_linear_reference(hidden, ffn.down, ffn.down_bias).transpose(0, 1)


def batched(ffn: PerTokenFFN, x: Tensor) -> Tensor:
    """Batched products, biases added to what comes out."""
    hidden = nn.functional.gelu(torch.bmm(x.transpose(0, 1), ffn.up) + ffn.up_bias[:, None])
    return (torch.bmm(hidden, ffn.down) + ffn.down_bias[:, None]).transpose(0, 1)


def training(call: Callable[[Tensor], Tensor], x: Tensor, parameters: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Forward and backward, gradients of `x` and the parameters."""
    slope = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    return lambda: list(torch.autograd.grad(call(x), [x, *parameters], slope))


def mixing(dim: int, tokens: int, rounds: int) -> dict[str, float]:
    """Both speedups at every number of tokens."""
    found: dict[str, float] = {}
    for count in COUNTS:
        x = torch.randn(max(1, tokens // count), count, dim, requires_grad=True)
        parts: dict[str, nn.Module] = {"mixing": Mixing(), "attention": Attention(dim)}
        for what, models in {"mixing": parts, "layer": {n: Layer(part, dim) for n, part in parts.items()}}.items():
            calls = {name: training(model, x, list(model.parameters())) for name, model in models.items()}
            seconds = in_turn(calls, rounds)
            found |= paired(f"{what}_speedup_{count}", seconds["attention"], seconds["mixing"])
    return found


def per_token(dtype: torch.dtype, name: str, rows: int, rounds: int) -> dict[str, float]:
    """The speedup of the FFN, and how far its gradients are from those of the loop."""
    torch.manual_seed(0)
    ffn = PerTokenFFN(16, 768, 2160)
    twin = copy.deepcopy(ffn).to(dtype)  # the others have their weights in the format from the start
    if dtype == torch.bfloat16:
        ffn.up.grad_dtype = ffn.down.grad_dtype = dtype  # as in a training
    x = torch.randn(rows, 16, 768).to(dtype).requires_grad_()

    def ours(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            return ffn(x)

    calls = {
        "ours": training(ours, x, list(ffn.parameters())),
        "loop": training(lambda x: loop(twin, x), x, list(twin.parameters())),
        "batched": training(lambda x: batched(twin, x), x, list(twin.parameters())),
    }
    pairs = zip(calls["ours"](), calls["loop"]())
    errors = [float((a.float() - b.float()).abs().max() / b.float().abs().max()) for a, b in pairs]
    seconds = in_turn(calls, rounds)
    better = min("loop", "batched", key=lambda way: median(seconds[way]))
    return paired(name, seconds[better], seconds["ours"]) | {f"{name}_error": max(errors)}


def measure(dim: int, tokens: int, rows: int, rounds: int, formats: dict[str, torch.dtype]) -> dict[str, float]:
    found = mixing(dim, tokens, rounds)
    for name, dtype in formats.items():
        found |= per_token(dtype, f"ffn_speedup_{name}", rows, rounds)
    return found


def show(found: dict[str, Any], machine: dict[str, Any], threads: dict[str, int], formats: Iterable[str]) -> None:
    grid = Grid("", "threads", "other, ms", "ours, ms", "ratio", "spread",
                caption=", ".join(f"{name} {value}" for name, value in machine.items()))  # fmt: skip
    rows = {f"mixing_speedup_{n}": f"attention over mixing, {n} tokens" for n in COUNTS}
    rows |= {f"layer_speedup_{n}": f"the same, whole layer, {n} tokens" for n in COUNTS}
    rows |= {f"ffn_speedup_{name}": f"loop or bmm over the per-token FFN, {name}" for name in formats}
    for name, label in rows.items():
        for ending, count in threads.items():
            theirs, ours, ratio, low, high = (
                found[f"{name}{part}{ending}"] for part in ("_ms_theirs", "_ms_ours", "", "_low", "_high")
            )
            grid.add_row(label, str(count), f"{theirs:.1f}", f"{ours:.1f}", f"{ratio:.2f}", f"{low:.2f} to {high:.2f}")
    Console().print(grid)


def main() -> None:
    parser = options("token mixing against attention, the per-token FFN against a loop and bmm")
    parser.add_argument("--dim", type=int, default=1024, help="a multiple of 1024")
    parser.add_argument("--tokens", type=int, default=4096, help="of all rows")
    parser.add_argument("--rows", type=int, default=512, help="of the per-token FFN")
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    busy = refuse_if_busy(given.even_if_busy)
    machine = describe_machine()
    threads = endings()
    formats = {"fp32": torch.float32} | ({"bf16": torch.bfloat16} if has_bf16_units() else {})
    found = by_threads(lambda: measure(given.dim, given.tokens, given.rows, given.rounds, formats), threads)
    show(found, machine, threads, formats)
    if given.json:
        print(json.dumps(found | machine | {"rounds": given.rounds, "busy": busy}))
    error = max(value for key, value in found.items() if key.startswith("ffn_speedup_fp32_error"))
    if not error <= TOLERANCE:
        raise SystemExit(f"gradients differ by {error:.1e} of their largest entry, more than {TOLERANCE}")


if __name__ == "__main__":
    main()

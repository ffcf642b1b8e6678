"""Memory of a training step of HSTU's layers against those of a Transformer of the same width (HSTU, section 3.3).

    python -m benchmarks.hstu_memory [--tokens 4096] [--layers 8] [--dim 256] [--json]

One sequence of `--tokens` through `--layers` layers, forward and backward, fp32. What a step takes is the peak of the
process's resident memory less what it held after a step of 64 tokens, each model in a process of its own. The
Transformer is torch's: pre-norm, four times as wide inside, dropout, causal `scaled_dot_product_attention`, which
keeps no n x n matrix either.

`memory_ratio`: HSTU with `recompute=linear` (all but attention again in the backward pass) over the Transformer, which
keeps all; `memory_ratio_kept` with nothing computed again. `kept_*`: numbers that autograd keeps per token and layer,
in widths (the paper, in bytes of bf16: 14 and 33).
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.machine import describe_machine, options
from scalerec.layers.hstu import HSTULayer
from scalerec.models.hstu import HSTU, Across, HSTUConfig
from scalerec.ops.hstu_attention import attention_plan

HEADS, DROPOUT = 4, 0.2
WARM = 64  # tokens of a step before the one that is measured, for which libraries and compiled code are loaded
FREED = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # glibc gives back what is free, so that only what is used is counted
MODELS = ("transformer", "none", "linear")


class Layers(nn.Module):
    """HSTU's layers without what surrounds them."""

    def __init__(self, config: HSTUConfig, tokens: int, layers: int):
        super().__init__()
        self.config, self.longest, self.alpha, self.timed = config, tokens, 1.0, True
        width = config.qk_dim
        self.layers = nn.ModuleList(
            HSTULayer(config.dim, HEADS, width, width, longest=tokens, dropout=DROPOUT) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        times, offsets = torch.arange(len(x) + 1).double() * 3600, torch.tensor([0, len(x)])
        plan = attention_plan(offsets, query_times=times[1:], key_times=times[:-1])
        across = Across(offsets, plan, times[1:], times[:-1])
        for layer in self.layers:
            x = HSTU.through(self, layer, x, across)[0]  # type: ignore[arg-type]
        return x


def build(kind: str, tokens: int, layers: int, dim: int) -> nn.Module:
    if kind != "transformer":
        width = dim // HEADS
        config = HSTUConfig(
            dim=dim,
            num_heads=HEADS,
            qk_dim=width,
            v_dim=width,
            dropout=DROPOUT,
            recompute=kind,  # type: ignore[arg-type]
        )
        return Layers(config, tokens, layers)
    layer = nn.TransformerEncoderLayer(dim, HEADS, 4 * dim, DROPOUT, "gelu", batch_first=True, norm_first=True)
    for module in layer.modules():
        if isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0  # SDPA keeps no matrix only without it; HSTU has none there either
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def measure(kind: str, tokens: int, layers: int, dim: int) -> dict[str, float]:
    """Bytes that a step takes, and numbers kept for the backward pass per token and layer, in widths."""
    torch.manual_seed(0)
    model = build(kind, tokens, layers, dim).train()
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.numel() >= tokens:  # not the weights, which are there anyway
            storage = x.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    forward(model, kind, torch.randn(1, WARM, dim)).sum().backward()
    x = torch.randn(1, tokens, dim, requires_grad=True)
    before = _resident()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = forward(model, kind, x)
    out.sum().backward()
    held = sum(size for place, size in kept.items() if place not in weights)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"bytes": peak - before, "kept": held / 4 / tokens / layers / dim}


def forward(model: nn.Module, kind: str, x: Tensor) -> Tensor:
    """[1, n, D] through the layers."""
    return causal(model, x) if kind == "transformer" else model(x[0])


def causal(model: nn.Module, x: Tensor) -> Tensor:
    """torch's encoder layers with a causal attention that is told so, and not given a matrix of n x n."""
    for layer in model.layers:  # type: ignore[union-attr]
        attention = layer.self_attn
        normed = layer.norm1(x)
        q, k, v = nn.functional.linear(normed, attention.in_proj_weight, attention.in_proj_bias).chunk(3, -1)
        heads = [y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in (q, k, v)]
        a = nn.functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + layer.dropout1(attention.out_proj(a.transpose(1, 2).flatten(2)))
        x = x + layer._ff_block(layer.norm2(x))
    return x


def _resident() -> int:
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = options("Memory of a training step: HSTU against a Transformer")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--model", choices=MODELS, help="measure this one alone, in this process")
    chosen = parser.parse_args()
    sizes = {"tokens": chosen.tokens, "layers": chosen.layers, "dim": chosen.dim}
    if chosen.model:
        print(json.dumps(measure(chosen.model, **sizes)))
        return
    found: dict[str, Any] = {}
    for kind in MODELS:
        words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, "-m", "benchmarks.hstu_memory", "--model", kind, *words]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, **FREED})
        found[kind] = json.loads(done.stdout)
    table = Table("model", "a step, MiB", "over the Transformer", "kept a token and layer, widths")
    for kind, figures in found.items():
        name = kind if kind == "transformer" else f"HSTU, again: {kind}"
        ratio = figures["bytes"] / found["transformer"]["bytes"]
        table.add_row(name, f"{figures['bytes'] / 2**20:,.0f}", f"{ratio:.2f}", f"{figures['kept']:.1f}")
    Console().print(table)
    ratios = {kind: found[kind]["bytes"] / found["transformer"]["bytes"] for kind in MODELS}
    flat = {
        "memory_ratio": ratios["linear"], "memory_ratio_kept": ratios["none"],
        **{f"kept_{kind}": found[kind]["kept"] for kind in MODELS},
        **{f"mib_{kind}": found[kind]["bytes"] / 2**20 for kind in MODELS}, **sizes,
    }  # fmt: skip
    print(json.dumps({**flat, **describe_machine()}) if chosen.json else f"memory_ratio {flat['memory_ratio']:.3f}")


if __name__ == "__main__":
    main()

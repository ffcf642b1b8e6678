"""Task heads: one logit per task from a shared representation (RankMixer leaves them open)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

HeadKind = Literal["linear", "mlp"]


class Heads(nn.Module):
    """[B, width] -> logits [B, tasks]: a linear map, or per task Linear(hidden) -> GELU -> Linear(1)."""

    def __init__(self, width: int, tasks: int, kind: HeadKind = "mlp", hidden: int = 128):
        super().__init__()
        self.kind, self.width, self.tasks, self.hidden = kind, width, tasks, hidden
        if kind == "linear":
            self.out = nn.Linear(width, tasks)
        else:
            # The first layers of all tasks are one product; the second ones stay apart.
            self.inner = nn.Linear(width, tasks * hidden)
            self.weight = nn.Parameter(torch.empty(tasks, hidden))
            self.bias = nn.Parameter(torch.zeros(tasks))
            nn.init.uniform_(self.weight, -(hidden**-0.5), hidden**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "linear":
            return self.out(x).float()
        h = nn.functional.gelu(self.inner(x)).unflatten(-1, (self.tasks, self.hidden))
        return (h * self.weight).sum(-1).float() + self.bias

    @property
    def macs(self) -> int:
        """Multiply-accumulates of matrix products per row."""
        return self.width * self.tasks * (1 if self.kind == "linear" else self.hidden)


class ProductHeads(nn.Module):
    """User and item [B, width] -> [B, tasks]: LN(user) * LN(item) -> Linear(hidden) -> x sigmoid(LN(x)) -> Linear.

    The head of Meta's production code of HSTU (meta-recsys/generative-recommenders); all tasks share the hidden layer.
    """

    def __init__(self, width: int, tasks: int, hidden: int = 512):
        super().__init__()
        self.user, self.item, self.norm = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(hidden)
        self.inner, self.out = nn.Linear(width, hidden), nn.Linear(hidden, tasks)
        for layer in (self.inner, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, user: Tensor, item: Tensor) -> Tensor:
        h = self.inner(self.user(user) * self.item(item))
        return self.out(h * torch.sigmoid(self.norm(h))).float()

    @property
    def macs(self) -> int:
        """Multiply-accumulates of matrix products per row."""
        return self.inner.weight.numel() + self.out.weight.numel()

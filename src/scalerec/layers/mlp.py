"""Plain multi-layer perceptron."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers [..., in] -> [..., hidden[-1]], each followed by ReLU and dropout."""

    def __init__(self, width: int, hidden: Sequence[int], dropout: float = 0.0):
        super().__init__()
        self.width, self.hidden = width, tuple(hidden)
        layers: list[nn.Module] = []
        for size in hidden:
            layers += [nn.Linear(width, size), nn.ReLU()]
            layers += [nn.Dropout(dropout)] if dropout else []
            width = size
        self.layers = nn.Sequential(*layers)
        self.out = width

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)

    @property
    def macs(self) -> int:
        """Multiply-accumulates per row."""
        sizes = (self.width, *self.hidden)
        return sum(a * b for a, b in pairwise(sizes))

"""Optimisers: torch's own for the dense part, Adagrad over touched rows for the tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from scalerec.config import Config

DenseKind = Literal["rmsprop", "adamw"]
SparseKind = Literal["adagrad", "rowwise_adagrad"]


class OptimizerConfig(Config):
    """Defaults of spec A.11; the paper uses RMSProp at 0.01 for the dense part and Adagrad for the tables."""

    dense: DenseKind = "rmsprop"
    lr: float = 1e-3
    smoothing: float = 0.99  # rmsprop
    weight_decay: float = 0.0  # decoupled
    eps: float = 1e-8
    embedding: SparseKind = "adagrad"
    embedding_lr: float = 0.05
    embedding_eps: float = 1e-8
    clip: float = 1.0  # global norm of the dense gradients; 0: off

    def build_dense(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        if self.dense == "adamw":
            return torch.optim.AdamW(parameters, self.lr, eps=self.eps, weight_decay=self.weight_decay)
        return torch.optim.RMSprop(
            parameters, self.lr, alpha=self.smoothing, eps=self.eps, weight_decay=self.weight_decay
        )

    def build_embedding(self, parameters: list[nn.Parameter]) -> RowAdagrad:
        return RowAdagrad(parameters, self.embedding_lr, self.embedding_eps, self.embedding == "rowwise_adagrad")


class RowAdagrad(torch.optim.Optimizer):
    """Adagrad for sparse gradients, touching only the rows of the step; the accumulator starts at zero.

    Row-wise, a row has one accumulator, fed with the mean of its squared gradient: state 1 / dim as large.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, eps: float, rowwise: bool):
        super().__init__(parameters, {"lr": lr, "eps": eps})
        self.rowwise = rowwise
        for group in self.param_groups:
            for parameter in group["params"]:
                shape = (parameter.shape[0], 1) if rowwise else parameter.shape
                self.state[parameter] = {"sum": torch.zeros(shape, device=parameter.device)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    row_adagrad(
                        parameter, self.state[parameter]["sum"], parameter.grad, group["lr"], group["eps"], self.rowwise
                    )


def row_adagrad(weight: Tensor, accumulator: Tensor, gradient: Tensor, lr: float, eps: float, rowwise: bool) -> None:
    """One step in place on touched rows: a += g^2 (the row's mean if `rowwise`), w -= lr g / (sqrt(a) + eps)."""
    gradient = gradient.coalesce()
    rows, values = gradient.indices()[0], gradient.values()
    squares = values.square()
    total = accumulator[rows] + (squares.mean(1, keepdim=True) if rowwise else squares)
    accumulator[rows] = total
    weight.index_add_(0, rows, values / (total.sqrt() + eps), alpha=-lr)


def state_tensors(optimizers: dict[str, torch.optim.Optimizer]) -> dict[str, Tensor]:
    """The whole state of some optimisers as flat tensors "name/parameter/key"."""
    return {
        f"{name}/{index}/{key}": value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.float64)
        for name, optimizer in optimizers.items()
        for index, state in optimizer.state_dict()["state"].items()
        for key, value in state.items()
    }


def load_state_tensors(optimizers: dict[str, torch.optim.Optimizer], tensors: dict[str, Tensor]) -> None:
    """The reverse of `state_tensors`."""
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for path, value in tensors.items():
            owner, _, rest = path.partition("/")
            if owner == name:
                index, _, key = rest.partition("/")
                state.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

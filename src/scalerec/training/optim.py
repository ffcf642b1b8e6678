"""Optimisers: torch's own for the dense part; for the tables Adagrad or AdamW over touched rows, or the dense one.

k touched rows   d width of a table
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, NonNegativeFloat, model_validator
from torch import Tensor, nn

from scalerec.config import Config
from scalerec.hardware import in_huge_pages
from scalerec.models.base import Model
from scalerec.ops.row_step import row_adagrad, row_adamw
from scalerec.training.dense_optim import AdamW, RMSprop

DenseKind = Literal["rmsprop", "adamw"]
SparseKind = Literal["adagrad", "rowwise_adagrad", "adamw", "rowwise_adamw", "dense"]

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """Defaults for small data; RankMixer's paper has RMSProp at 0.01 for the dense part, Adagrad for the tables."""

    dense: DenseKind = "rmsprop"
    lr: NonNegativeFloat = 1e-3
    smoothing: float = 0.99  # rmsprop
    betas: tuple[Beta, Beta] = (0.9, 0.999)  # adamw, of the dense part and of the tables
    weight_decay: NonNegativeFloat = 0.0  # adamw: decoupled; rmsprop: added to the gradient
    eps: NonNegativeFloat = 1e-8
    embedding: SparseKind = "adagrad"  # dense: the tables are parameters like all others, with their optimiser and rate
    embedding_lr: NonNegativeFloat = 0.05
    embedding_eps: NonNegativeFloat = 1e-8
    embedding_weight_decay: float = Field(default=0.0, ge=0)  # adamw: decoupled, of touched rows
    embedding_state: Literal["weights", "host"] = "weights"  # lies where the tables do, or in host memory
    clip: float = 1.0  # global norm of the dense gradients; 0: off
    decay: float = Field(default=0.0, ge=0, le=1)  # share of all rates that is gone at the last step, linearly

    @model_validator(mode="after")
    def _fits_together(self) -> OptimizerConfig:
        if self.embedding == "dense" and self.embedding_state == "host":
            raise ValueError(
                "--training.optimizer.embedding_state host: the state of `embedding` dense lies with the weights; "
                "choose rowwise_adamw or another one of touched rows"
            )
        return self

    def factor(self, progress: float) -> float:
        """Of all rates, when this share of the planned steps is done; what stops early never sees the end."""
        return 1 - self.decay * min(progress, 1.0)

    def build(self, model: Model) -> dict[str, torch.optim.Optimizer]:
        """The optimisers of a model by name; a step of all is a step of the model, whatever its gradients are."""
        tables = model.embeddings.sparse_parameters()
        if self.embedding == "dense":
            return {"dense": self.build_dense([*model.dense_parameters(), *tables])}
        return {"dense": self.build_dense(model.dense_parameters()), "embedding": self.build_embedding(tables)}

    def build_dense(self, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        """Over parameters whose gradients may be sparse: `step` makes them dense, and clips all together."""
        if self.dense == "adamw":
            return AdamW(
                parameters, self.lr, betas=self.betas, eps=self.eps, weight_decay=self.weight_decay, clip=self.clip
            )
        return RMSprop(
            parameters, self.lr, alpha=self.smoothing, eps=self.eps, weight_decay=self.weight_decay, clip=self.clip
        )

    def build_embedding(self, parameters: list[nn.Parameter]) -> RowAdagrad | RowAdamW:
        """Over parameters with sparse gradients."""
        rowwise, host = self.embedding.startswith("rowwise_"), self.embedding_state == "host"
        if self.embedding.endswith("adagrad"):
            return RowAdagrad(parameters, self.embedding_lr, self.embedding_eps, rowwise, host)
        if self.embedding.endswith("adamw"):
            decay = self.embedding_weight_decay
            return RowAdamW(parameters, self.embedding_lr, self.betas, self.embedding_eps, decay, rowwise, host)
        raise ValueError(f"embedding {self.embedding!r} has no optimiser of its own: use `build`")


def set_rates(optimizers: Iterable[torch.optim.Optimizer], factor: float) -> None:
    """Every learning rate as this factor of the one that its optimiser began with."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = factor * group.setdefault("initial_lr", group["lr"])


class _RowOptimizer(torch.optim.Optimizer, ABC):
    """Optimisers that touch only the rows of the step, with all their state from the beginning."""

    def __init__(self, parameters: Iterable[nn.Parameter], options: dict[str, Any], rowwise: bool, host: bool):
        super().__init__(parameters, options)
        self.rowwise = rowwise
        for parameter in self._parameters():
            device = torch.device("cpu") if host else parameter.device
            self.state[parameter] = self.new_state(parameter, device)

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    @abstractmethod
    def new_state(self, parameter: Tensor, device: torch.device) -> dict[str, Tensor]:
        """The state of one table, all zeros."""

    def per_row(self, parameter: Tensor, device: torch.device) -> Tensor:
        """Zeros for squares of gradients: as wide as the table, or one for each row."""
        return _zeros((parameter.shape[0], 1 if self.rowwise else parameter.shape[1]), device)

    @abstractmethod
    def update(self, parameter: nn.Parameter, state: dict[str, Tensor], options: dict[str, Any]) -> None:
        """One step of one table and its state, in place."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.update(parameter, self.state[parameter], group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copied into the state that is there; torch would turn counts into floats and move all to the weights."""
        state = dict(self.state)
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        self.state.update(state)
        for index, parameter in enumerate(self._parameters()):
            for key, value in state[parameter].items():
                value.copy_(state_dict["state"][index][key])


def _zeros(shape: Sequence[int], device: torch.device) -> Tensor:
    return in_huge_pages(torch.empty(*shape, device=device)).zero_()


class RowAdagrad(_RowOptimizer):
    """Adagrad for sparse gradients, touching only the rows of the step; the accumulator starts at zero.

    Row-wise, a row has one accumulator, fed with the mean of its squared gradient: state 1 / dim as large.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, eps: float, rowwise: bool = False, host: bool = False
    ):
        super().__init__(parameters, {"lr": lr, "eps": eps}, rowwise, host)

    def new_state(self, parameter: Tensor, device: torch.device) -> dict[str, Tensor]:
        return {"sum": self.per_row(parameter, device)}

    def update(self, parameter: nn.Parameter, state: dict[str, Tensor], options: dict[str, Any]) -> None:
        gradient, total, rates = parameter.grad, state["sum"], (options["lr"], options["eps"])
        assert gradient is not None
        if _compilable(parameter, gradient):
            row_adagrad(parameter, total, gradient._indices()[0], gradient._values(), *rates)
        else:
            row_adagrad_reference(parameter, total, gradient, *rates, self.rowwise)


class RowAdamW(_RowOptimizer):
    """AdamW for sparse gradients, touching only the rows of the step; each row counts its own steps.

    Row-wise, a row has one second moment, fed with the mean of its squared gradient: state of 4 d + 4 bytes a row
    instead of 8 d, and of 4 more for the count in both cases.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float,
        weight_decay: float = 0.0, rowwise: bool = False, host: bool = False,
    ):  # fmt: skip
        options = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(parameters, options, rowwise, host)

    def new_state(self, parameter: Tensor, device: torch.device) -> dict[str, Tensor]:
        return {
            "first": _zeros(parameter.shape, device),
            "second": self.per_row(parameter, device),
            "steps": torch.zeros(parameter.shape[0], 1, dtype=torch.int32, device=device),
        }

    def update(self, parameter: nn.Parameter, state: dict[str, Tensor], options: dict[str, Any]) -> None:
        gradient, rates = parameter.grad, (options[name] for name in ("lr", "betas", "eps", "weight_decay"))
        assert gradient is not None
        if _compilable(parameter, gradient):
            moments = state["first"], state["second"], state["steps"]
            row_adamw(parameter, *moments, gradient._indices()[0], gradient._values(), *rates)
        else:
            row_adamw_reference(parameter, state, gradient, *rates)


def _compilable(parameter: Tensor, gradient: Tensor) -> bool:
    return parameter.device.type == "cpu" and parameter.dtype == gradient.dtype == torch.float32


def row_adagrad_reference(
    weight: Tensor, accumulator: Tensor, gradient: Tensor, lr: float, eps: float, rowwise: bool
) -> None:
    """One step in place on touched rows: a += g^2 (the row's mean if `rowwise`), w -= lr g / (sqrt(a) + eps)."""
    gradient = gradient.coalesce()
    rows, values = gradient.indices()[0], gradient.values()
    total = _read(accumulator, rows) + _squares(values, rowwise)
    _write(accumulator, rows, total)
    weight.index_add_(0, rows, values / (total.sqrt() + eps), alpha=-lr)


def row_adamw_reference(
    weight: Tensor, state: dict[str, Tensor], gradient: Tensor, lr: float, betas: tuple[float, float], eps: float,
    decay: float,
) -> None:  # fmt: skip
    """One step in place on touched rows, t being the row's own steps (Loshchilov & Hutter 2019, algorithm 2).

    m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2 (the row's mean where `second` has one column);
    w -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + decay w).
    """
    gradient = gradient.coalesce()
    rows, values = gradient.indices()[0], gradient.values()
    steps = _read(state["steps"], rows) + 1
    first = _read(state["first"], rows).lerp_(values, 1 - betas[0])
    second = _read(state["second"], rows).lerp_(_squares(values, state["second"].shape[1] == 1), 1 - betas[1])
    for key, value in (("steps", steps), ("first", first), ("second", second)):
        _write(state[key], rows, value)
    # In float64: 1 - 0.999^t loses four digits in float32 at the first steps.
    unbiased, unbiased_square = ((1 - beta ** steps.double()).float() for beta in betas)
    change = first / unbiased / ((second / unbiased_square).sqrt_() + eps)
    if decay:
        change += decay * weight[rows]
    weight.index_add_(0, rows, change, alpha=-lr)


def _squares(values: Tensor, rowwise: bool) -> Tensor:
    return values.square().mean(1, keepdim=True) if rowwise else values.square()


# The state of touched rows alone travels between a host and an accelerator; on one device nothing is copied.


def _read(state: Tensor, rows: Tensor) -> Tensor:
    return state[rows.to(state.device)].to(rows.device)


def _write(state: Tensor, rows: Tensor, values: Tensor) -> None:
    state[rows.to(state.device)] = values.to(state.device)


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

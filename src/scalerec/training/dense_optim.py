"""Optimisers of the dense part: torch's, with a bound on the norm of their gradients, in one pass on a CPU."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from scalerec.ops.dense_step import adamw, gradient_norm, rmsprop

LEAST = 1e-6  # added to a norm before it divides, as in torch


def densify(parameters: Iterable[nn.Parameter]) -> None:
    """Sparse gradients as dense ones, in place."""
    for parameter in parameters:
        if parameter.grad is not None and parameter.grad.is_sparse:
            parameter.grad = parameter.grad.to_dense()


class _OnePass(torch.optim.Optimizer):
    """Before one of torch's optimisers: parameters and state as there, `step` compiled where it can be.

    `clip` bounds the norm of all gradients together; 0 does not.
    """

    moments: tuple[str, ...]  # torch's names of the state beside `step`

    def __init__(self, parameters: Sequence[nn.Parameter], *args: Any, clip: float = 0.0, **options: Any):
        super().__init__(parameters, *args, **options)
        self.clip = clip

    @abstractmethod
    def update(self, parameters: list[Tensor], moments: list[list[Tensor]], gradients: list[Tensor],
               scale: float, steps: int) -> None:  # fmt: skip
        """The step of parameters that are all at step `steps`, in place, with gradients times `scale`."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        (group,) = self.param_groups
        touched = [parameter for parameter in group["params"] if parameter.grad is not None]
        densify(touched)
        if not all(p.device.type == "cpu" and p.dtype == torch.float32 and p.is_contiguous() for p in touched):
            if self.clip:
                nn.utils.clip_grad_norm_(touched, self.clip)
            super().step()
            return
        gradients = {parameter: parameter.grad.contiguous() for parameter in touched}
        scale = self.clip / (gradient_norm(list(gradients.values())) + LEAST) if self.clip else 1.0
        scale = 1.0 if scale > 1 else scale  # NaN stays, as in torch
        at: dict[int, list[Tensor]] = {}  # a parameter that had no gradient once is a step behind
        for parameter in touched:
            state = self.state[parameter]
            if not state:  # as torch begins
                state["step"] = torch.zeros(())
                state |= {moment: torch.zeros_like(parameter) for moment in self.moments}
            state["step"] += 1
            at.setdefault(int(state["step"]), []).append(parameter)
        for steps, mine in at.items():
            moments = [[self.state[parameter][moment] for parameter in mine] for moment in self.moments]
            self.update(mine, moments, [gradients[parameter] for parameter in mine], scale, steps)


class RMSprop(_OnePass, torch.optim.RMSprop):
    """Without momentum."""

    moments = ("square_avg",)

    def update(self, parameters, moments, gradients, scale, steps):
        (group,) = self.param_groups
        rmsprop(
            parameters, moments[0], gradients, lr=group["lr"], smoothing=group["alpha"], eps=group["eps"],
            decay=group["weight_decay"], scale=scale,
        )  # fmt: skip


class AdamW(_OnePass, torch.optim.AdamW):
    """Decoupled decay."""

    moments = ("exp_avg", "exp_avg_sq")

    def update(self, parameters, moments, gradients, scale, steps):
        (group,) = self.param_groups
        adamw(
            parameters, moments[0], moments[1], gradients, lr=group["lr"], betas=group["betas"], eps=group["eps"],
            decay=group["weight_decay"], scale=scale, steps=steps,
        )  # fmt: skip

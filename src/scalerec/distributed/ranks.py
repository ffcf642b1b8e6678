"""Several processes that train one model: joining them, adding their losses, averaging their gradients.

Everything that crosses processes in a backward pass is averaged: dense gradients here, table gradients in TorchRec. The
loss is a sum over processes, not a mean, so `add_over_ranks` hands back gradients multiplied by their number. Alone in
the world a process passes through all of this unchanged.
"""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from scalerec.losses import Term


def join() -> torch.device:
    """This process's device, after joining the others that torchrun started (none: nothing to join)."""
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if cuda else "gloo")
    return device


def leave() -> None:
    """Part from the processes that `join` met; the last thing a process does.

    Threads of gloo hold tensors for a moment after an exchange; one that lets go of them while Python ends aborts the
    process. Waiting for the others gives it that moment.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def world() -> int:
    """The number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def add_over_ranks(terms: dict[str, Term]) -> dict[str, Term]:
    """Sums and weights of all processes, so that dividing them gives every process the same loss."""
    if world() == 1:
        return terms
    added = _Add.apply(torch.stack([value for term in terms.values() for value in term]))
    return {name: Term(*pair) for name, pair in zip(terms, added.view(-1, 2).unbind())}


def average_gradients(parameters: list[nn.Parameter]) -> None:
    """Replace gradients by their means over processes, in one message; one that no process has stays None."""
    if world() == 1:
        return
    present = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32)
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.flatten() for g in gradients), present.to(gradients[0].device)])
    dist.all_reduce(flat)
    flat /= world()
    *means, present = flat.split([*(p.numel() for p in parameters), len(parameters)])
    for parameter, mean, some in zip(parameters, means, present.tolist()):
        parameter.grad = mean.view_as(parameter) if some else None


class _Add(torch.autograd.Function):
    """Sum over processes; what comes back is the sum of their equal gradients."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        values = values.clone()
        dist.all_reduce(values)
        return values

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient * world()

"""The dense part of a model as one graph, exported and compiled ahead of time; ids and tables stay outside.

U users   B rows   L events, of each past its own   W width of a side   w width of an event

Everything called a size here is dynamic: one program serves any U, B and L from 1 up.
"""

from __future__ import annotations

import copy
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from scalerec.errors import InputError
from scalerec.layers.embedding import Embedded, EmbeddedSequence
from scalerec.models.base import Model

Pasts = dict[str, tuple[Tensor, Tensor]]  # name -> values [U, L, w], mask [U, L]


class Dense(nn.Module):
    """A model behind its embeddings, of plain tensors: `dense(*dense_inputs(user, items, user_of_row))`."""

    def __init__(self, model: Model):
        super().__init__()
        self.model = copy.copy(model)
        # A graph carries all that its module owns, and the tables are not to travel with it.
        self.model._modules = {name: part for name, part in model._modules.items() if name != "embeddings"}

    def forward(self, user: Tensor, pasts: Pasts, items: Tensor, user_of_row: Tensor) -> Tensor:
        """User features [U, W_user], pasts, row features [B, W_item], user of each row [B] -> logits [B, tasks]."""
        sequences = {name: EmbeddedSequence(values, mask) for name, (values, mask) in pasts.items()}
        return self.model.dense(Embedded(user, sequences), Embedded(items, {}), user_of_row).logits


def dense_inputs(user: Embedded, items: Embedded, user_of_row: Tensor) -> tuple[Tensor, Pasts, Tensor, Tensor]:
    """What a dense module, exported or compiled, is called with."""
    pasts = {name: (past.values, past.mask) for name, past in user.sequences.items()}
    return user.flat, pasts, items.flat, user_of_row


def export_dense(model: Model) -> ExportedProgram:
    """The dense part as a graph, in evaluation mode, for any number of users, rows and events."""
    training = model.training
    try:
        return torch.export.export(Dense(model).eval(), _example(model), dynamic_shapes=_sizes(model))
    finally:
        model.train(training)


def compile_dense(program: ExportedProgram, path: Path) -> Path:
    """Compile an exported dense part into the package `path`, which must end in .pt2; takes about a minute.

    Raises:
        InputError: there is no C++ compiler.
    """
    if compiler() is None:
        raise InputError(f"{path}: no C++ compiler found; install g++ or set CXX, or serve without compiling")
    return Path(torch._inductor.aoti_compile_and_package(program, package_path=str(path)))


def load_dense(path: Path) -> Callable[..., Tensor]:
    """A compiled package, to be called like the dense module."""
    return torch._inductor.aoti_load_package(str(path))


def compiler() -> str | None:
    """The C++ compiler that `compile_dense` takes."""
    return shutil.which(os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++"))


def _example(model: Model) -> tuple[Tensor, Pasts, Tensor, Tensor]:
    """Inputs of the right widths; no size is 1, which a graph would take for a constant."""
    device = next(model.parameters()).device
    user, items = model.layout.sides["user"], model.layout.sides["item"]
    users, rows, events = 2, 3, 4
    return (
        torch.zeros(users, user.flat_width, device=device),
        {
            past.name: (
                torch.zeros(users, events, past.width, device=device),
                torch.ones(users, events, dtype=torch.bool, device=device),
            )
            for past in user.sequences
        },
        torch.zeros(rows, items.flat_width, device=device),
        torch.zeros(rows, dtype=torch.int64, device=device),
    )


def _sizes(model: Model) -> tuple:
    """The dynamic sizes of `_example`."""
    users, rows = Dim("users"), Dim("rows")
    pasts = {}
    for i, past in enumerate(model.layout.sides["user"].sequences):
        events = Dim(f"events_{i}")
        pasts[past.name] = ({0: users, 1: events}, {0: users, 1: events})
    return {0: users}, pasts, {0: rows}, {0: rows}

"""Yesterday's checkpoint, today's ids: weights move over, new rows begin as what they meant until yesterday."""

from __future__ import annotations

import torch

from scalerec.checkpoint import Checkpoint
from scalerec.errors import InputError
from scalerec.models.base import Model


def transfer(old: Checkpoint, model: Model) -> str:
    """Copy the old weights into the fresh `model`, whose tables may have grown at their ends; says what was new.

    Raises:
        InputError: the dense part has other shapes than in the checkpoint, or is of another kind.
    """
    try:
        weights = model.adopt(old.weights)
    except InputError as error:
        raise InputError(f"--warm-start {old.folder}: {error}") from None
    state = model.state_dict()
    new_rows = 0
    for name, value in state.items():
        before = weights.get(name)
        if before is None or (before.shape != value.shape and not name.startswith("embeddings.tables.")):
            raise InputError(f"--warm-start {old.folder}: {name} has another shape there; use the same --model options")
        with torch.no_grad():
            value[: len(before)] = before
            # The unknown row is what these ids meant until yesterday, unless nothing was unknown and it never learned:
            # at zero a vector that is normalised has gradients beyond all bounds.
            if len(value) > len(before) and before[1].any():
                value[len(before) :] = before[1]
        new_rows += len(value) - len(before)
    model.load_state_dict(state)
    return f"warm start from {old.folder}: {new_rows:,} new ids"

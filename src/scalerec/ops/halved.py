"""bf16 copies of float32 weights that are made anew only after a weight has changed."""

from __future__ import annotations

import torch
from torch import Tensor

NAME = "_scalerec_halved"  # on the weight: (its version when the copy was made, the copy)


def halved(weight: Tensor) -> Tensor:
    """The weight in bf16, the same tensor until an operation in place has changed the weight.

    What goes by `weight.data` is not seen.
    """
    if weight.is_inference():  # has no versions
        return weight.bfloat16()
    version, copy = getattr(weight, NAME, (None, None))
    if copy is None or version != weight._version:
        with torch.inference_mode(False):  # or no training could use it
            copy = weight.detach().bfloat16() if copy is None else copy.copy_(weight.detach())
        setattr(weight, NAME, (weight._version, copy))
    return copy


def kept(weight: Tensor) -> Tensor | None:
    """The copy that was made last, whatever became of the weight, for who changes both at once."""
    return getattr(weight, NAME, (None, None))[1]


def renewed(weight: Tensor) -> None:
    """Say that the copy was written and is that of the weight as it is now."""
    copy = kept(weight)
    if copy is not None:
        torch.autograd.graph.increment_version(copy)  # a graph that holds it must not go back through it
        setattr(weight, NAME, (weight._version, copy))

"""bf16 copies of float32 weights that are made anew only after a weight has changed."""

from __future__ import annotations

from torch import Tensor

NAME = "_scalerec_halved"  # on the weight: (its version when the copy was made, the copy)


def halved(weight: Tensor) -> Tensor:
    """The weight in bf16, the same tensor until an operation in place has changed the weight."""
    if weight.is_inference():  # has no versions
        return weight.bfloat16()
    version, copy = getattr(weight, NAME, (None, None))
    if copy is None or version != weight._version:
        copy = weight.detach().bfloat16() if copy is None else copy.copy_(weight.detach())
        setattr(weight, NAME, (weight._version, copy))
    return copy


def kept(weight: Tensor) -> Tensor | None:
    """The copy that was made last, whatever became of the weight, for who changes both at once."""
    return getattr(weight, NAME, (None, None))[1]


def renewed(weight: Tensor) -> None:
    """Say that the copy is that of the weight as it is now."""
    copy = kept(weight)
    if copy is not None:
        setattr(weight, NAME, (weight._version, copy))

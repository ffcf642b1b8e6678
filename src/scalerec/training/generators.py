"""The states of torch's random generators, which a resumed run draws on from."""

from __future__ import annotations

import torch
from torch import Tensor

CPU, CUDA = "random", "random_cuda"  # tensors of a checkpoint


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """The CPU's state and, where training runs on CUDA, that device's."""
    states = {CPU: torch.get_rng_state()}
    if device.type == "cuda":
        states[CUDA] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(tensors: dict[str, Tensor], device: torch.device) -> None:
    """Take the states out of `tensors` and go on from them; a run that moved to CUDA has none for it."""
    torch.set_rng_state(tensors.pop(CPU))
    of_cuda = tensors.pop(CUDA, None)
    if of_cuda is not None and device.type == "cuda":
        torch.cuda.set_rng_state(of_cuda, device)

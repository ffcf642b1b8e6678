"""What a resumed run draws is what the run would have drawn, on the CPU and on CUDA."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from scalerec.training.generators import generator_states, restore_generators


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> torch.Generator:
    """A generator in the place of the device's."""
    found = torch.Generator().manual_seed(5)

    def give(device: torch.device) -> Tensor:
        assert device.type == "cuda"
        return found.get_state()

    def take(state: Tensor, device: torch.device) -> None:
        assert device.type == "cuda"
        found.set_state(state)

    monkeypatch.setattr(torch.cuda, "get_rng_state", give)
    monkeypatch.setattr(torch.cuda, "set_rng_state", take)
    return found


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_both_generators_go_on(kind: str, cuda: torch.Generator):
    device = torch.device(kind)
    states = {**generator_states(device), "optimiser": torch.ones(1)}
    assert set(states) == {"random", "optimiser"} | ({"random_cuda"} if kind == "cuda" else set())
    first, first_of_cuda = torch.rand(3), torch.rand(3, generator=cuda)
    restore_generators(states, device)
    assert set(states) == {"optimiser"}, "what is left belongs to the optimisers"
    assert torch.equal(torch.rand(3), first)
    assert torch.equal(torch.rand(3, generator=cuda), first_of_cuda) == (kind == "cuda")


@pytest.mark.parametrize(("before", "after"), [("cpu", "cuda"), ("cuda", "cpu")])
def test_a_run_may_change_its_device(before: str, after: str, cuda: torch.Generator):
    states = generator_states(torch.device(before))
    first, untouched = torch.rand(3), cuda.get_state()
    restore_generators(states, torch.device(after))
    assert not states and torch.equal(torch.rand(3), first)
    assert torch.equal(cuda.get_state(), untouched)

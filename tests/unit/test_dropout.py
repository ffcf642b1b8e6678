"""The fast dropout: its twin, chances, seeds, gradients, and where torch's own takes its place."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from scalerec.layers import dropout as layer
from scalerec.layers.dropout import Dropout
from scalerec.models.sasrec import SASRecBlock, SASRecConfig
from scalerec.ops.dropout import dropout, dropped, dropped_reference


@pytest.mark.parametrize("p", [0.01, 0.2, 0.5, 0.999])
@pytest.mark.parametrize("shape", [(0, 3), (1,), (7, 5), (300, 70, 20)])
def test_it_is_its_plain_twin(p: float, shape: tuple[int, ...]):
    x = torch.randn(shape)
    for seed in (0, 7, 2**63 - 1, 2**64 - 1):
        assert torch.equal(dropped(x, p, seed), dropped_reference(x, p, seed))
    turned = torch.randn(9, 4).T
    assert torch.equal(dropped(turned, p, 3), dropped_reference(turned.contiguous(), p, 3))


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_do_not_matter(threads: int):
    before = torch.get_num_threads()
    x = torch.randn(400_003)
    try:
        torch.set_num_threads(threads)
        found = dropped(x, 0.3, 5)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found, dropped_reference(x, 0.3, 5))


@pytest.mark.parametrize("p", [0.05, 0.2, 0.5])
def test_chances_are_exact_and_nothing_depends_on_a_neighbour_or_another_call(p: float):
    n, first, second = 1_000_000, *((dropped(torch.ones(1_000_000), p, seed) > 0).numpy() for seed in (11, 12))
    spread = (p * (1 - p) / n) ** 0.5
    assert abs(first.mean() - (1 - p)) < 4 * spread
    for other in (second, *(np.roll(first, lag) for lag in (1, 2, 3, 50, 64, 200, 1024))):
        assert abs((first & other).mean() - (1 - p) ** 2) < 4 * (p * (1 - p)) ** 0.5 * n**-0.5
    columns = first.reshape(-1, 50)
    for axis in (0, 1):  # as spread as independent draws would be, along rows and down columns
        sums = columns.sum(axis)
        assert sums.var() / (columns.shape[axis] * p * (1 - p)) == pytest.approx(1, abs=6 * (2 / len(sums)) ** 0.5)


def test_the_mean_stays():
    torch.manual_seed(0)
    assert float(dropout(torch.ones(1_000_000), 0.2).mean()) == pytest.approx(1, abs=0.002)


def test_the_gradient_meets_the_same_mask():
    torch.manual_seed(0)
    x = torch.randn(40, 6, requires_grad=True)
    y = dropout(x, 0.4)
    weight = torch.randn(40, 6)
    (found,) = torch.autograd.grad((y * weight).sum(), x)
    assert torch.equal(found, torch.where(y != 0, weight * (1 / 0.6), 0.0))
    z = dropout(x, 0.4)
    assert not torch.equal(y, z)


def test_the_generator_decides():
    """A state that was kept gives the same draws again, also for layers computed again in the backward pass."""
    x, drop = torch.randn(50, 8), Dropout(0.3)
    state = torch.get_rng_state()
    first, second = drop(x), drop(x)
    torch.set_rng_state(state)
    assert torch.equal(drop(x), first) and torch.equal(drop(x), second)

    def gradient(again: bool) -> Tensor:
        torch.manual_seed(3)
        at = x.clone().requires_grad_()
        net = nn.Sequential(drop, nn.Tanh(), drop)
        out = checkpoint(net, at, use_reentrant=False) if again else net(at)
        assert isinstance(out, Tensor)
        return torch.autograd.grad(out.sum(), at)[0]

    assert torch.equal(gradient(again=True), gradient(again=False))


def test_torch_takes_its_place(monkeypatch: pytest.MonkeyPatch):
    """Without training, at p = 0 and 1, in other types, and in compiled and exported graphs."""
    x = torch.randn(20, 4)
    assert Dropout(0.5).eval()(x) is x
    assert torch.equal(Dropout(0.0)(x), x) and not Dropout(1.0)(x).any()

    def never(*_: object) -> Tensor:
        raise AssertionError("the fast path was taken")

    torch.manual_seed(0)
    with torch.autocast("cpu", torch.bfloat16):
        assert Dropout(0.5)(nn.Linear(4, 8)(x)).dtype == torch.bfloat16
        assert Dropout(0.5)(x).dtype == torch.float32
    monkeypatch.setattr(layer, "dropout", never)
    with pytest.raises(AssertionError, match="fast path"):
        Dropout(0.5)(x)
    half = Dropout(0.5)(x.bfloat16())
    assert half.dtype == torch.bfloat16 and torch.equal(half, torch.where(half != 0, 2 * x.bfloat16(), 0.0))
    assert Dropout(0.5)(x.double()).dtype == torch.float64
    torch._dynamo.reset()
    compiled = torch.compile(Dropout(0.5), backend="aot_eager", fullgraph=True)(x)
    assert torch.equal(compiled, torch.where(compiled != 0, 2 * x, 0.0)) and not compiled.all()
    torch._dynamo.reset()
    for strict in (True, False):
        exported = torch.export.export(nn.Sequential(Dropout(0.5)), (x,), strict=strict).module()(x)
        assert torch.equal(exported, torch.where(exported != 0, 2 * x, 0.0))


def test_sasrec_attends_as_torch_does(monkeypatch: pytest.MonkeyPatch):
    """In training the steps of attention are written out, for their dropout: with none of it they are torch's."""
    block = SASRecBlock(SASRecConfig(dim=8, num_heads=2, dropout=0.3))
    q, k, v = (torch.randn(3, 2, 7, 4, requires_grad=True) for _ in range(3))
    expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert torch.equal(block.eval().attend(q, k, v), expected)
    block.train()
    torch.manual_seed(0)
    means = torch.stack([block.attend(q, k, v).detach() for _ in range(4000)]).mean(0)
    torch.testing.assert_close(means, expected, atol=0.08, rtol=0)
    monkeypatch.setattr(Dropout, "forward", lambda self, x: x)
    found = block.attend(q, k, v)
    torch.testing.assert_close(found, expected)
    weight = torch.randn_like(expected)
    for one, other in zip(*(torch.autograd.grad((y * weight).sum(), (q, k, v)) for y in (found, expected))):
        torch.testing.assert_close(one, other)

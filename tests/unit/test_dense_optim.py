"""The dense optimisers against torch's own, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from scalerec.ops.dense_step import ALONE, gradient_norm
from scalerec.training.dense_optim import AdamW, RMSprop, densify

SHAPES = ((3,), (40, 50), (2049,), (5, 7, 11))
KINDS = {
    "rmsprop": (RMSprop, torch.optim.RMSprop, {"alpha": 0.9}),
    "adamw": (AdamW, torch.optim.AdamW, {"betas": (0.8, 0.95)}),
}


def parameters(shapes=SHAPES, dtype=torch.float32):
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]


def give(mine, step, like=torch.float32):
    """Gradients of a step, as they come and rounded to `like`, larger and larger."""
    generator = torch.Generator().manual_seed(step)
    for parameter in mine:
        value = torch.randn(parameter.shape, generator=generator) * (step + 1)
        parameter.grad = value.to(like).to(parameter.dtype)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("clip", [0.0, 30.0])
@pytest.mark.parametrize("kind", KINDS)
def test_as_torch_does_in_float64(kind, clip, decay):
    ours, torchs, options = KINDS[kind]
    mine, theirs = parameters(), parameters(dtype=torch.float64)
    one = ours(mine, 0.01, weight_decay=decay, clip=clip, **options)
    other = torchs(theirs, 0.01, weight_decay=decay, **options)
    for step in range(6):
        give(mine, step)
        give(theirs, step)
        for some in (mine, theirs):
            some[1].grad = some[1].grad.t().contiguous().t()  # rows and columns the other way in memory
            if step == 2:
                some[0].grad = None  # one that is a step behind from here on
        if clip:
            nn.utils.clip_grad_norm_(theirs, clip)
        versions = [parameter._version for parameter in mine]
        one.step()
        other.step()
        changed = [parameter._version > version for parameter, version in zip(mine, versions)]
        assert changed == [step != 2, True, True, True]
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_float64_takes_torchs_way_and_is_clipped_too(kind):
    ours, torchs, options = KINDS[kind]
    mine, theirs = parameters(dtype=torch.float64), parameters(dtype=torch.float64)
    one, other = ours(mine, 0.01, clip=1.0, **options), torchs(theirs, 0.01, **options)
    for step in range(3):
        give(mine, step)
        give(theirs, step)
        nn.utils.clip_grad_norm_(theirs, 1.0)
        one.step()
        other.step()
    for a, b in zip(mine, theirs):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_in_bf16(kind):
    """The step of gradients that were rounded before it, to the last bit."""
    ours, _, options = KINDS[kind]
    mine, twin = parameters(), parameters()
    for parameter in mine:
        parameter.grad_dtype = torch.bfloat16
    one, other = ours(mine, 0.01, clip=1.0, **options), ours(twin, 0.01, clip=1.0, **options)
    for step in range(3):
        give(twin, step, torch.bfloat16)
        for a, b in zip(mine, twin):
            a.grad = b.grad.bfloat16()
        one.step()
        other.step()
    for a, b in zip(mine, twin):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_threads_gives_the_same_bits(kind):
    ours, _, options = KINDS[kind]
    shapes = ((3 * ALONE + 1,), (7,))
    found, before = [], torch.get_num_threads()
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            mine = parameters(shapes)
            one = ours(mine, 0.01, **options)
            for step in range(2):
                give(mine, step)
                one.step()
            found.append(torch.cat([parameter.detach() for parameter in mine]))
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*found)


def test_norm():
    values = [parameter.detach() for parameter in parameters()]
    expected = torch.cat([value.double().flatten() for value in values]).norm()
    assert gradient_norm(values) == pytest.approx(float(expected), rel=1e-6)
    halves = [value.bfloat16() for value in values]
    expected = torch.cat([value.double().flatten() for value in halves]).norm()
    assert gradient_norm(halves) == pytest.approx(float(expected), rel=1e-6)
    assert gradient_norm([]) == 0


def test_without_gradients_nothing_moves():
    mine = parameters()
    AdamW(mine, 0.01, clip=1.0).step()
    assert all(torch.equal(a, b) for a, b in zip(mine, parameters()))


def test_densify():
    weight, plain, unused = parameters([(5, 2)] * 3)
    ids, values = torch.tensor([1, 3, 1]), torch.randn(3, 2)
    weight.grad = torch.sparse_coo_tensor(ids[None], values, (5, 2))
    plain.grad = torch.ones(5, 2)
    densify([weight, plain, unused])
    torch.testing.assert_close(weight.grad, torch.zeros(5, 2).index_add(0, ids, values))
    assert plain.grad is not None and plain.grad.all() and unused.grad is None


def test_a_norm_that_is_not_a_number_spoils_all_as_in_torch():
    mine = parameters()
    give(mine, 0)
    mine[0].grad[0] = float("nan")
    AdamW(mine, 0.01, clip=1.0).step()
    assert all(parameter.isnan().all() for parameter in mine)

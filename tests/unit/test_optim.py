"""Optimisers of tables against torch's, a float64 loop and by hand; their state through a checkpoint, bit by bit."""

import pytest
import torch
from torch import nn

from scalerec.config import override, parse
from scalerec.errors import InputError
from scalerec.ops import row_step as ops
from scalerec.training.optim import (
    OptimizerConfig,
    RowAdamW,
    load_state_tensors,
    row_adagrad_reference,
    row_adamw_reference,
    set_rates,
    state_tensors,
)

ROWS, WIDTH = 11, 4
KINDS = ["adagrad", "rowwise_adagrad", "adamw", "rowwise_adamw"]
BETAS = (0.8, 0.97)


def table(width=WIDTH, seed=0):
    torch.manual_seed(seed)
    return nn.Parameter(torch.randn(ROWS, width))


def lookups(steps, width=WIDTH, seed=0, rows=ROWS):
    """For each step ids, some of them twice, and a gradient for each id."""
    random = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        ids = torch.randint(rows, (6,), generator=random)
        yield ids, torch.randn(6, width, generator=random)


def sparse(ids, gradients, rows=ROWS):
    """Not coalesced, as a lookup's gradient is."""
    return torch.sparse_coo_tensor(ids[None], gradients, (rows, gradients.shape[1]), check_invariants=True)


def train(optimizer, weight, steps):
    for ids, gradients in steps:
        weight.grad = sparse(ids, gradients)
        optimizer.step()


def slow_adamw(weight, steps, lr, betas, eps, decay, rowwise):
    """Row by row and number by number in float64; the weights and how often each row was touched."""
    weight = weight.detach().double().clone()
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    count = [0] * len(weight)
    for ids, gradients in steps:
        for row in set(ids.tolist()):
            gradient = gradients[ids == row].double().sum(0)
            square = gradient**2
            if rowwise:
                square = square.mean().expand_as(square)
            count[row] += 1
            first[row] = betas[0] * first[row] + (1 - betas[0]) * gradient
            second[row] = betas[1] * second[row] + (1 - betas[1]) * square
            m, v = first[row] / (1 - betas[0] ** count[row]), second[row] / (1 - betas[1] ** count[row])
            weight[row] -= lr * (m / (v.sqrt() + eps) + decay * weight[row])
    return weight, count


@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_row_adamw_equals_a_loop_in_float64(rowwise, decay):
    weight, steps = table(), list(lookups(40))
    expected, count = slow_adamw(weight, steps, 0.05, BETAS, 1e-6, decay, rowwise)
    optimizer = RowAdamW([weight], 0.05, BETAS, 1e-6, decay, rowwise)
    train(optimizer, weight, steps)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)
    assert optimizer.state[weight]["steps"][:, 0].tolist() == count


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rowwise", [False, True])
def test_row_adagrad_equals_its_plain_twin_and_a_loop_in_float64(rowwise, threads, monkeypatch):
    monkeypatch.setattr(ops, "ALONE", 10)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows, width, steps = 301, 5, []
        for seed in range(6):  # many rows once, one of them often
            random = torch.Generator().manual_seed(seed)
            ids = torch.cat([torch.randint(rows, (400,), generator=random), torch.full((50,), 7)])
            steps.append((ids, torch.randn(450, width, generator=random)))
        weight = torch.randn(rows, width)
        plain, exact = weight.clone(), weight.double()
        sums, plain_sums = (torch.zeros(rows, 1 if rowwise else width) for _ in range(2))
        exact_sums = sums.double()
        for ids, values in steps:
            ops.row_adagrad(weight, sums, ids, values, 0.1, 1e-8)
            row_adagrad_reference(plain, plain_sums, sparse(ids, values, rows), 0.1, 1e-8, rowwise)
            for row in set(ids.tolist()):
                gradient = values[ids == row].double().sum(0)
                square = gradient**2
                exact_sums[row] += square.mean() if rowwise else square
                exact[row] -= 0.1 * gradient / (exact_sums[row].sqrt() + 1e-8)
        for found in (weight, plain):
            torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
        for found in (sums, plain_sums):
            torch.testing.assert_close(found.double(), exact_sums, rtol=1e-5, atol=1e-5)
        with pytest.raises(IndexError, match="does not have"):
            ops.row_adagrad(weight, sums, torch.tensor([rows]), torch.ones(1, width), 0.1, 1e-8)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("rowwise", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_compiled_row_adamw_equals_its_plain_twin_and_a_loop_in_float64(decay, rowwise, threads, monkeypatch):
    monkeypatch.setattr(ops, "ALONE", 10)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        rows, width, steps = 101, 5, []
        for seed in range(12):  # many rows once, one of them often
            random = torch.Generator().manual_seed(seed)
            ids = torch.cat([torch.randint(rows, (90,), generator=random), torch.full((30,), 7)])
            steps.append((ids, torch.randn(120, width, generator=random)))
        weight = torch.randn(rows, width)
        expected, count = slow_adamw(weight, steps, 0.05, BETAS, 1e-6, decay, rowwise)
        both = []
        for compiled in (True, False):
            table, second = weight.clone(), torch.zeros(rows, 1 if rowwise else width)
            state = {"first": torch.zeros(rows, width), "second": second}
            state["steps"] = torch.zeros(rows, 1, dtype=torch.int32)
            for ids, values in steps:
                if compiled:
                    ops.row_adamw(table, *state.values(), ids, values, 0.05, BETAS, 1e-6, decay)
                else:
                    row_adamw_reference(table, state, sparse(ids, values, rows), 0.05, BETAS, 1e-6, decay)
            torch.testing.assert_close(table.double(), expected, rtol=1e-4, atol=1e-5)
            both.append([table, *state.values()])
            assert state["steps"][:, 0].tolist() == count
        for found, plain in zip(*both):
            torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-5)
        with pytest.raises(IndexError, match="does not have"):
            ops.row_adamw(*both[0], torch.tensor([rows]), torch.ones(1, width), 0.05, BETAS, 1e-6, decay)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("width", "rowwise"), [(1, True), (1, False), (WIDTH, False)])
def test_equals_torch_when_every_row_is_touched(width, rowwise):
    """Row-wise moments are AdamW's own when a row is one number, the others always."""
    weight, twin, everyone = table(width), table(width), torch.arange(ROWS).repeat(2)
    optimizer = RowAdamW([weight], 0.02, BETAS, 1e-8, 0.1, rowwise)
    expected = torch.optim.AdamW([twin], 0.02, betas=BETAS, eps=1e-8, weight_decay=0.1)
    for _ in range(30):
        gradients = torch.randn(2 * ROWS, width)
        weight.grad = sparse(everyone, gradients)
        twin.grad = gradients[:ROWS] + gradients[ROWS:]
        optimizer.step()
        expected.step()
    torch.testing.assert_close(weight, twin, rtol=1e-5, atol=1e-6)


def test_first_step_by_hand():
    """The first step is the sign of the gradient, row-wise its share of the row's root mean square."""
    for rowwise, change in ((False, [1, -1]), (True, [3 / 12.5**0.5, -4 / 12.5**0.5])):
        weight = nn.Parameter(torch.ones(3, 2))
        optimizer = RowAdamW([weight], 0.1, (0.9, 0.999), 0.0, 0.5, rowwise)
        weight.grad = sparse(torch.tensor([1, 1]), torch.tensor([[1.0, -5.0], [2.0, 1.0]]), 3)
        optimizer.step()
        expected = [1 - 0.1 * (c + 0.5) for c in change]
        assert weight.tolist() == [[1, 1], pytest.approx(expected, rel=1e-6), [1, 1]]


@pytest.mark.parametrize("kind", KINDS)
def test_untouched_rows_stay_as_they_are(kind):
    config = OptimizerConfig(embedding=kind, embedding_weight_decay=0.1)
    weight = table()
    optimizer = config.build_embedding([weight])
    before = weight.detach().clone()
    train(optimizer, weight, lookups(10, rows=5))
    torch.testing.assert_close(weight[5:], before[5:], rtol=0, atol=0)
    assert not (weight[:5] == before[:5]).any()
    for value in optimizer.state[weight].values():
        assert value[:5].any() and not value[5:].any()


@pytest.mark.parametrize("kind", KINDS)
def test_ids_that_occur_twice_count_as_their_sum(kind):
    found = []
    for merged in (False, True):
        weight = table()
        optimizer = OptimizerConfig(embedding=kind).build_embedding([weight])
        for ids, gradients in lookups(5):
            weight.grad = sparse(ids, gradients)
            if merged:
                weight.grad = weight.grad.to_dense().to_sparse(1)
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("kind", "bytes_per_row"),
    [("adagrad", 4 * 64), ("rowwise_adagrad", 4), ("adamw", 8 * 64 + 4), ("rowwise_adamw", 4 * 64 + 4 + 4)],
)
def test_state_bytes_per_row(kind, bytes_per_row):
    weight = nn.Parameter(torch.zeros(10, 64))
    state = OptimizerConfig(embedding=kind).build_embedding([weight]).state[weight]
    assert sum(value.numel() * value.element_size() for value in state.values()) == 10 * bytes_per_row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("state", ["weights", "host"])
def test_going_on_from_saved_state_is_bit_exact(kind, state):
    config = OptimizerConfig(embedding=kind, embedding_weight_decay=0.01, embedding_state=state)
    weight, steps = table(), list(lookups(12))
    optimizer = config.build_embedding([weight])
    train(optimizer, weight, steps[:7])
    tensors = {name: value.clone() for name, value in state_tensors({"embedding": optimizer}).items()}
    again = nn.Parameter(weight.detach().clone())
    resumed = config.build_embedding([again])
    load_state_tensors({"embedding": resumed}, tensors)
    for new, old in zip(resumed.state[again].values(), optimizer.state[weight].values()):
        assert new.dtype == old.dtype and torch.equal(new, old)
    train(optimizer, weight, steps[7:])
    train(resumed, again, steps[7:])
    assert torch.equal(weight, again)


@pytest.mark.parametrize("kind", KINDS)
def test_where_the_state_lies_changes_nothing(kind):
    found = []
    for state in ("weights", "host"):
        weight = table()
        optimizer = OptimizerConfig(embedding=kind, embedding_state=state).build_embedding([weight])
        train(optimizer, weight, lookups(8))
        assert all(value.device.type == "cpu" for value in optimizer.state[weight].values())
        found.append(weight)
    assert torch.equal(*found)


def test_state_stays_on_the_host():
    """Of a table on another device; "meta" is one that every machine has."""
    weight = nn.Parameter(torch.empty(5, 3, device="meta"))
    for state, device in (("host", "cpu"), ("weights", "meta")):
        optimizer = OptimizerConfig(embedding="rowwise_adamw", embedding_state=state).build_embedding([weight])
        assert {value.device.type for value in optimizer.state[weight].values()} == {device}


# Tables under the dense optimiser


class Small(nn.Module):
    """A table with sparse gradients and a dense layer, in the form of a model."""

    def __init__(self, sparse_gradients=True):
        super().__init__()
        torch.manual_seed(1)
        self.table = nn.Embedding(ROWS, WIDTH, sparse=sparse_gradients)
        self.layer = nn.Linear(WIDTH, 1)

    @property
    def embeddings(self):
        return self

    def sparse_parameters(self):
        return [self.table.weight]

    def dense_parameters(self):
        return list(self.layer.parameters())

    def forward(self, ids):
        return self.layer(self.table(ids)).square().mean()


@pytest.mark.parametrize("dense", ["adamw", "rmsprop"])
def test_tables_as_parameters_like_all_others(dense):
    """As torch trains a model without sparse gradients; rows go on moving after the step that touched them."""
    config = OptimizerConfig(dense=dense, lr=0.01, betas=(0.9, 0.98), embedding="dense", clip=0)
    model, twin = Small(), Small(sparse_gradients=False)
    optimizers = config.build(model)  # type: ignore[arg-type]
    if dense == "adamw":
        expected = torch.optim.AdamW(twin.parameters(), 0.01, betas=(0.9, 0.98), weight_decay=0.0)
    else:
        expected = torch.optim.RMSprop(twin.parameters(), 0.01)
    assert list(optimizers) == ["dense"]
    for ids, _ in lookups(15):
        for net, steppers in ((model, optimizers.values()), (twin, [expected])):
            for stepper in steppers:
                stepper.zero_grad(set_to_none=True)
            net(ids).backward()
            for stepper in steppers:
                stepper.step()
    for one, other in zip(model.parameters(), twin.parameters()):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_state_of_tables_under_the_dense_optimiser_goes_through_a_checkpoint():
    config = OptimizerConfig(dense="adamw", lr=0.01, embedding="dense")
    models = Small(), Small()
    first, second = (config.build(model) for model in models)  # type: ignore[arg-type]
    steps = [ids for ids, _ in lookups(8)]

    def run(model, optimizers, ids):
        optimizers["dense"].zero_grad(set_to_none=True)
        model(ids).backward()
        optimizers["dense"].step()

    for ids in steps[:4]:
        run(models[0], first, ids)
    models[1].load_state_dict(models[0].state_dict())
    load_state_tensors(second, {name: value.clone() for name, value in state_tensors(first).items()})
    for ids in steps[4:]:
        run(models[0], first, ids)
        run(models[1], second, ids)
    assert all(torch.equal(one, other) for one, other in zip(models[0].parameters(), models[1].parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_build_gives_tables_their_own_optimiser(kind):
    model = Small()
    optimizers = OptimizerConfig(embedding=kind).build(model)  # type: ignore[arg-type]
    held = {name: [p for group in o.param_groups for p in group["params"]] for name, o in optimizers.items()}
    assert list(held) == ["dense", "embedding"]
    assert held["embedding"][0] is model.table.weight and len(held["dense"]) == 2


def test_options():
    config = override(OptimizerConfig(), {"betas": "[0.9, 0.98]", "embedding": "rowwise_adamw"})
    assert (config.betas, config.embedding) == ((0.9, 0.98), "rowwise_adamw")
    for bad in ({"embedding": "sgd"}, {"betas": [0.9]}, {"betas": [0.9, 1.0]}, {"embedding_weight_decay": -1}):
        with pytest.raises(InputError, match=next(iter(bad))):
            parse(OptimizerConfig, bad, "training.optimizer")


def test_rates_fall_linearly_from_where_they_began():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizers = [torch.optim.SGD([weight], 0.4), torch.optim.SGD([weight], 0.1)]
    config = OptimizerConfig(decay=0.75)
    for progress, expected in ((0.0, (0.4, 0.1)), (0.5, (0.25, 0.0625)), (1.0, (0.1, 0.025)), (1.2, (0.1, 0.025))):
        set_rates(optimizers, config.factor(progress))
        found = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
        assert found == pytest.approx(expected)
    set_rates(optimizers, OptimizerConfig().factor(0.5))
    assert optimizers[0].param_groups[0]["lr"] == 0.4

"""What every ranking model promises, one function per promise; each raises AssertionError when it is broken.

`test_models.py` holds every model of `scalerec.models` to it, `test_broken.py` shows that each check can fail.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import pkgutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pydantic
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from scalerec import checkpoint, models
from scalerec.batch import PADDING, Batch, Outputs
from scalerec.config import component
from scalerec.errors import InputError
from scalerec.features.layout import Layout
from scalerec.inference.export import dense_inputs, export_dense
from scalerec.layers import sequence
from scalerec.layers.embedding import Embedded
from scalerec.losses import total
from scalerec.models import hstu
from scalerec.models.base import Model, ModelConfig
from scalerec.models.sequential import SequentialModel
from scalerec.ops.din import din, din_reference
from scalerec.ops.hstu_attention import hstu_attention
from scalerec.training.optim import OptimizerConfig
from tests.contract.world import World, other_items, without_pasts

TOLERANCE = 1e-5

# torch knows the FLOPs of its attention on every device but the CPU.
UNCOUNTED = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}


@dataclass(frozen=True)
class Maker:
    """Builds the model that is being checked; `change` is where test_broken.py damages it."""

    config: ModelConfig
    layout: Layout
    change: Callable[[Model], Model] = lambda model: model

    def __call__(self, seed: int = 0, config: ModelConfig | None = None) -> Model:
        torch.manual_seed(seed)
        return self.change((config or self.config).build(self.layout)).eval()

    def awake(self) -> Model:
        """The model with all its weights moved away from their neutral beginnings, so that nothing hides in a zero."""
        model = self()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in model.dense_parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
            for _, weight in model.embeddings.table_weights():
                weight[PADDING + 1 :] = 0.5 * torch.randn(weight[PADDING + 1 :].shape, generator=generator)
        return model


class KernelsCounted:
    """Counts the point-wise attention of HSTU by the pairs that see each other, not by its blocks; DIN in plain torch,
    which is seen to do all its products."""

    def __init__(self) -> None:
        self.flops = 0

    def __enter__(self) -> None:
        def counted(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, **options: Any) -> Tensor:
            if options["normalise"] == "softmax":
                return hstu_attention(q, k, v, offsets, **options)  # plain torch, which counts itself
            lengths = offsets.diff()
            self.flops += 2 * q.shape[1] * (q.shape[2] + v.shape[2]) * int((lengths * (lengths + 1) // 2).sum())
            with _disable_current_modes():
                return hstu_attention(q, k, v, offsets, **options)

        hstu.hstu_attention = counted  # type: ignore[assignment]
        sequence.din = din_reference

    def __exit__(self, *_: object) -> None:
        hstu.hstu_attention = hstu_attention
        sequence.din = din


Check = Callable[[Maker, World], None]


def model_configs() -> dict[str, ModelConfig]:
    """The `tiny()` of every module of `scalerec.models` that has one."""
    found = {}
    for info in pkgutil.iter_modules(models.__path__):
        module = importlib.import_module(f"{models.__name__}.{info.name}")
        if hasattr(module, "tiny"):
            found[info.name] = module.tiny()
    return found


# -- what comes out


def check_outputs(make: Maker, world: World) -> None:
    """One finite float32 logit for each row and task, and not the same one for all rows."""
    logits = make.awake()(world.batch).logits
    expected = (len(world.batch), len(make.layout.tasks))
    assert logits.shape == expected, f"logits have shape {tuple(logits.shape)}, not {expected}"
    assert logits.dtype == torch.float32, f"logits are {logits.dtype}"
    assert logits.isfinite().all(), "logits are not finite"
    assert logits.std(0).min() > 1e-3, "logits do not depend on the row"


def check_no_rows(make: Maker, world: World) -> None:
    """A batch without rows, as a process may get it at the end of an epoch: no logits, loss 0, a backward pass."""
    model = make.awake()
    batch = world.batch.take(torch.arange(0))
    outputs = model(batch)
    assert outputs.logits.shape == (0, len(make.layout.tasks)), "logits for rows that are not there"
    loss = total(model.loss(outputs, batch))
    assert loss.item() == 0, f"no rows have loss {loss.item()}"
    loss.backward()
    assert all(g.isfinite().all() for g in gradients(model).values()), "no rows give gradients that are not finite"


def check_bfloat16(make: Maker, world: World) -> None:
    """Under autocast the logits are float32 still, near those of full precision, and gradients are finite."""
    model = make.awake()
    with torch.autocast("cpu", torch.bfloat16):
        outputs = model(world.batch)
    assert outputs.logits.dtype == torch.float32, f"logits are {outputs.logits.dtype} under autocast"
    exact = model(world.batch).logits
    same(outputs.logits, exact, "under autocast logits", 0.05 * float(exact.detach().abs().max() + 1))
    total(model.loss(outputs, world.batch)).backward()
    assert all(g.isfinite().all() for g in gradients(model).values()), "gradients under autocast are not finite"


# -- rows and users do not know of each other


def check_row_alone(make: Maker, world: World) -> None:
    """A row's logits are the same alone and among others."""
    model, batch = make.awake(), world.batch
    together = model(batch).logits
    for row in range(0, len(batch), 7):
        alone = model(batch.take(torch.tensor([row]))).logits
        same(alone[0], together[row], f"row {row} alone")


def check_row_order(make: Maker, world: World) -> None:
    """Rows in another order have the same logits in that order."""
    model, batch = make.awake(), world.batch
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(0))
    same(model(batch.take(order)).logits, model(batch).logits[order], "in another order logits")


def check_users_shared(make: Maker, world: World) -> None:
    """A user's side held once for all their rows gives what repeating it for each of them gives."""
    model, batch = make.awake(), world.batch
    assert len(batch.user) < len(batch)
    same(model(batch.unshared()).logits, model(batch).logits, "with users repeated logits")


def check_state_ignores_items(make: Maker, world: World) -> None:
    """What `forward` works out once per user is the same whatever the candidates are.

    It has a row for each user, in models on sequences also for each event.
    """
    model, states = make.awake(), []
    score = model.score

    def listening(state: Any, items: Embedded, user_of_row: Tensor) -> Outputs:
        states.append(list(tensors(state)))
        return score(state, items, user_of_row)

    model.score = listening  # type: ignore[method-assign]
    changed = other_items(world.batch)
    first, second = model(world.batch).logits, model(changed).logits
    assert not torch.equal(first, second), "logits do not depend on the candidate"
    assert len(states) == 2, f"forward called score {len(states)} times for two batches"
    for one, other in zip(*states):
        rows = f"the state holds {len(one)} rows of {len(world.batch.user)} users"
        assert len(one) == len(world.batch.user) or isinstance(model, SequentialModel), rows
        assert torch.equal(one, other), "the state of the users changed with the candidates"


def check_scored_in_pieces(make: Maker, world: World) -> None:
    """The state of the users, computed once, serves any number of calls of `score`."""
    model, batch = make.awake(), world.batch
    user, items = model.embeddings(batch.user, batch.items)
    state = model.encode_user(user)
    parts = []
    for rows in torch.arange(len(batch)).split(17):
        part = Embedded(items.flat[rows], items.sequences)
        parts.append(model.score(state, part, batch.user_of_row[rows]).logits)
    same(torch.cat(parts), model(batch).logits, "scored in pieces logits")


def check_empty_pasts(make: Maker, world: World) -> None:
    """Users without a past, among others or all of them, have finite logits and give finite gradients."""
    empty = without_pasts(world.batch)
    assert any((past.lengths == 0).any() for past in world.batch.user.lists.values())
    for batch in (world.batch, empty):
        model = make.awake()
        outputs = model(batch)
        assert outputs.logits.isfinite().all(), "logits are not finite where the past is empty"
        total(model.loss(outputs, batch)).backward()
        found = gradients(model)
        assert all(g.isfinite().all() for g in found.values()), "gradients are not finite where the past is empty"


# -- learning


def check_gradients(make: Maker, world: World) -> None:
    """Every dense parameter has a gradient (several processes wait for it), every table's is sparse."""
    model = make.awake().train()
    total(model.objective(world.batch)).backward()
    sparse = {id(parameter) for parameter in model.embeddings.sparse_parameters()}
    for name, parameter in model.named_parameters():
        if isinstance(model, SequentialModel) and name.startswith("embeddings."):
            continue  # sequences leave numbers and other features out
        assert parameter.grad is not None, f"no gradient for {name}"
        assert parameter.grad.is_sparse == (id(parameter) in sparse), f"the gradient of {name} has the wrong layout"


def check_loss_falls(make: Maker, world: World) -> None:
    """A few dozen steps learn labels that depend on the item alone, and on the user alone."""
    model = make()
    losses = list(train(model, world.batch, 40))
    assert losses[-1] < 0.5 * losses[0], f"the loss fell from {losses[0]:.3f} to {losses[-1]:.3f} only"


def check_padding_stays_zero(make: Maker, world: World) -> None:
    """Row 0 of every table is a vector of zeros, before training and after it."""
    model = make()
    for steps in (0, 3):
        for _ in train(model, world.batch, steps):
            pass
        for name, weight in model.embeddings.table_weights():
            assert not weight[PADDING].any(), f"the padding row of table {name} is not zero after {steps} steps"


def check_masked_rows(make: Maker, world: World) -> None:
    """A row of weight 0 has no say in its task, whatever is written in its label."""
    model = make.awake()
    weights = world.batch.weights.clone()
    weights[::3, 0] = 0
    masked = weights == 0
    assert 0 < masked[:, 1].sum() < len(masked)
    found = []
    for garbage in (0.0, 7.0, float("nan")):
        batch = replace(world.batch, weights=weights, labels=world.batch.labels.masked_fill(masked, garbage))
        outputs = model(batch)
        outputs.logits.retain_grad()
        loss = total(model.loss(outputs, batch))
        loss.backward()
        assert outputs.logits.grad is not None
        assert not outputs.logits.grad[masked].any(), "masked rows have a gradient"
        assert outputs.logits.grad[~masked].all(), "rows that count have no gradient"
        found.append(loss.item())
    assert found[0] == found[1] == found[2], f"labels of masked rows change the loss: {found}"


def check_loss_adds_up(make: Maker, world: World) -> None:
    """Each task has a term, and the terms of two halves of a batch add up to those of the whole."""
    model, batch = make.awake(), world.batch
    halves = [batch.take(rows) for rows in torch.arange(len(batch)).split([23, len(batch) - 23])]
    whole, *parts = (model.loss(model(part), part) for part in (batch, *halves))
    for task in make.layout.tasks:
        assert task in whole, f"no term for task {task}"
        for field in ("sum", "weight"):
            added = torch.stack([getattr(terms[task], field) for terms in parts]).sum()
            same(added, getattr(whole[task], field), f"the {field} of {task} in two halves", 1e-3)


def check_weights(make: Maker, world: World) -> None:
    """A row of weight 2 counts like the row twice."""
    model, batch = make.awake(), world.batch
    rows = torch.arange(0, len(batch), 4)
    weights = batch.weights.clone()
    weights[rows] *= 2
    heavy, long = replace(batch, weights=weights), batch.take(torch.cat([torch.arange(len(batch)), rows]))
    once, twice = (model.loss(model(some), some) for some in (heavy, long))
    for task in make.layout.tasks:
        for field in ("sum", "weight"):
            found, expected = (getattr(terms[task], field) for terms in (once, twice))
            same(found, expected, f"the {field} of {task} with double weights", 1e-3)


# -- what is kept


def check_checkpoint(make: Maker, world: World) -> None:
    """A model that was saved and read back has the same bits, and so have its encoder's ids and its logits."""
    model = make.awake()
    run = {"model": make.config.model_dump(mode="json")}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "kept"
        checkpoint.save(folder, run, world.encoder, make.layout, model.state_dict(), {}, {})
        kept = checkpoint.load(folder)
        rebuilt = kept.model()
    again = make(seed=1)
    again.load_state_dict(kept.weights)
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == kept.weights.keys(), "the checkpoint holds other keys than the model"
    assert all(torch.equal(value, after[name]) for name, value in before.items()), "weights changed on the way"
    assert kept.layout == make.layout and kept.encoder.same_as(world.encoder), "layout or encoder changed on the way"
    batch = kept.encoder.encode(world.rows)
    assert torch.equal(again(batch).logits, model(world.batch).logits), "logits changed on the way"
    assert type(rebuilt) is type(make.config.build(make.layout)), "the checkpoint builds another model"
    assert all(torch.equal(value, kept.weights[name]) for name, value in rebuilt.state_dict().items()), (
        "the checkpoint builds a model with other weights"
    )


def check_state_dict(make: Maker, world: World) -> None:
    """The state dict shows each table as `embeddings.tables.<name>`, however they lie in memory."""
    state = make().state_dict()
    shown = {name.removeprefix("embeddings.tables."): value for name, value in state.items() if "embeddings." in name}
    shown = {name: value.shape for name, value in shown.items() if not name.startswith("embeddings.linear.")}
    expected = {table.name: (table.rows, table.dim) for table in make.layout.tables}
    assert shown == expected, f"tables in the state dict: {sorted(shown)}, in the layout: {sorted(expected)}"


def check_same_seed(make: Maker, world: World) -> None:
    """Two models built after the same `torch.manual_seed` have the same bits; after another, others."""
    first, second, third = (make(seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(value, second[name]) for name, value in first.items()), "the same seed built another model"
    assert any(not torch.equal(value, third[name]) for name, value in first.items()), "the seed does not matter"


# -- what is said


def check_flops(make: Maker, world: World) -> None:
    """`flops` is what torch counts, for shared users and repeated ones, with and without pasts, in all variations."""
    some = [world.batch, world.batch.unshared(), without_pasts(world.batch), world.batch.take(torch.tensor([1, 5, 6]))]
    for config in (make.config, *variations(make)):
        model = make(config=config)
        for batch in some if config is make.config else some[:1]:
            kernel = KernelsCounted()
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter, kernel, torch.no_grad():
                model(batch)
            counted, said = counter.get_total_flops() + kernel.flops, model.flops(batch)
            assert said == counted, f"flops() says {said}, torch counts {counted}: {config!r}"


def check_parts(make: Maker, world: World) -> None:
    """`parts` counts each parameter behind the embeddings once, in all variations."""
    for config in (make.config, *variations(make)):
        model = make(config=config)
        behind = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embeddings."))
        said = model.parts()
        assert min(said.values()) >= 0 and sum(said.values()) == behind, f"{said} of {behind} parameters: {config!r}"


def check_variations(make: Maker, world: World) -> None:
    """Every option that the model can be built with gives a model that scores and has gradients."""
    for config in variations(make):
        model = make(config=config).train()
        outputs = model(world.batch)
        assert outputs.logits.shape == (len(world.batch), len(make.layout.tasks)), f"shape of logits: {config!r}"
        loss = total(model.loss(outputs, world.batch))
        assert loss.isfinite(), f"loss {loss.item()}: {config!r}"
        loss.backward()


def check_config_json(make: Maker, world: World) -> None:
    """A configuration comes back from JSON with its class and values."""
    for config in (make.config, *variations(make)):
        tree = json.loads(config.model_dump_json())
        try:
            back = component(tree)
        except ValueError as error:
            raise AssertionError(f"not read back from JSON: {error}") from None
        assert type(back) is type(config), f"read back from JSON as {type(back).__name__}"
        assert back == config, f"{config!r} read back from JSON as {back!r}"


# -- other ways to run it (slow)


def check_compiled(make: Maker, world: World) -> None:
    """`torch.compile` gives the plain logits, for another number of rows without compiling anew, and gradients."""
    model, plain = make.awake(), make.awake()
    if not model.exports:
        return

    def step(owner: Model, dense: Callable[..., Outputs], batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        user, items = owner.embeddings(batch.user, batch.items)
        outputs = dense(user, items, batch.user_of_row)
        if torch.is_grad_enabled():
            total(owner.loss(outputs, batch)).backward()
        return outputs.logits, gradients(owner)

    torch._dynamo.reset()
    compiled = torch.compile(model.dense, backend="aot_eager")  # how the two passes are cut, without machine code
    _, found = step(model, compiled, world.batch)
    _, expected = step(plain, plain.dense, world.batch)
    assert found.keys() == expected.keys(), f"compiled, no gradient for {expected.keys() - found.keys()}"
    for name in expected:
        same(found[name], expected[name], f"compiled gradient of {name}", 1e-4)
    torch._dynamo.reset()
    compiled = torch.compile(model.dense, dynamic=True)
    with torch.no_grad():
        for batch in (world.batch, world.batch.take(torch.arange(20))):
            same(step(model, compiled, batch)[0], step(plain, plain.dense, batch)[0], "compiled logits", 1e-4)
    torch._dynamo.reset()


def check_exported(make: Maker, world: World) -> None:
    """The dense part, exported as one graph, gives the plain logits for any number of users, rows and events."""
    model = make.awake()
    if not model.exports:
        return
    try:
        dense = export_dense(model).module()
    except Exception as error:
        raise AssertionError(f"not exported: {error}") from error
    one = world.batch.take(torch.tensor([4]))
    with torch.no_grad():
        for batch in (world.batch, world.batch.unshared(), without_pasts(world.batch), one):
            user, items = model.embeddings(batch.user, batch.items)
            found = dense(*dense_inputs(user, items, batch.user_of_row))
            same(found, model(batch).logits, "exported logits", 1e-4)


SLOW: tuple[Check, ...] = (check_compiled, check_exported)
CHECKS: tuple[Check, ...] = tuple(
    value for name, value in list(globals().items()) if name.startswith("check_") and value not in SLOW
)


# -- how the checks look at a model


def same(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    """Equal up to `tolerance`, absolute and relative."""
    torch.testing.assert_close(
        found, expected, atol=tolerance, rtol=tolerance, msg=lambda text: f"{what} differ: {text}"
    )


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a state, in order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value):
            yield from tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))


def gradients(model: Model) -> dict[str, Tensor]:
    """The gradients that there are, by parameter, as dense tensors."""
    found = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {name: gradient.to_dense() for name, gradient in found.items()}


def train(model: Model, batch: Batch, steps: int) -> Iterator[float]:
    """Train on one batch over and over with the default optimisers; the loss before each step."""
    config = OptimizerConfig(lr=3e-3)
    optimizers = [
        config.build_dense(model.dense_parameters()),
        config.build_embedding(model.embeddings.sparse_parameters()),
    ]
    model.train()
    for _ in range(steps):
        loss = total(model.loss(model(batch), batch))
        model.zero_grad(set_to_none=True)
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
        model.after_step()
        yield loss.item()


def variations(make: Maker) -> Iterator[ModelConfig]:
    """The configuration with one field after the other changed, as far as a model can be built with it."""
    config = make.config
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if name == "kind":
            continue
        others: list[Any] = []
        if isinstance(value, bool):
            others = [not value]
        elif get_origin(field.annotation) is Literal:
            others = [other for other in get_args(field.annotation) if other != value]
        elif isinstance(value, int):
            others = [value + 1, 2 * value or 4]
        elif isinstance(value, tuple) and value and all(isinstance(part, int) for part in value):
            others = [value[:-1], (*value, value[-1])]
        for other in others:
            try:
                changed = type(config).model_validate({**dict(config), name: other})
                changed.build(make.layout)
            except (InputError, pydantic.ValidationError):
                continue  # an option that does not fit this layout
            yield changed

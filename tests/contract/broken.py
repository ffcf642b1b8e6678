"""Models that break the contract, each in one way: what the checks of contract.py have to find."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from scalerec.batch import Batch, Outputs
from scalerec.features.layout import Layout
from scalerec.layers.embedding import Embedded
from scalerec.losses import Term
from scalerec.models import dlrm_mlp
from scalerec.models.base import Model, ModelConfig
from scalerec.models.dlrm_mlp import DLRMMLP, DLRMMLPConfig
from tests.contract import contract
from tests.contract.contract import Check

Change = Callable[[Model], Model]


class Broken(NamedTuple):
    """A check, the words with which it must fail, and how the model is damaged (by hand, or by its configuration)."""

    check: Check
    words: str
    change: Change = lambda model: model
    config: ModelConfig = dlrm_mlp.tiny()


def logits(new: Callable[..., Tensor]) -> Change:
    """Replaces the logits by `new(logits, state, items, user_of_row)`."""

    def change(model: Model) -> Model:
        score = model.score

        def broken(state: Any, items: Embedded, user_of_row: Tensor) -> Outputs:
            return Outputs(new(score(state, items, user_of_row).logits, state, items, user_of_row))

        model.score = broken  # type: ignore[method-assign]
        return model

    return change


def dense(new: Callable[[Model, Embedded, Embedded, Tensor], Outputs]) -> Change:
    """Replaces everything behind the embeddings."""

    def change(model: Model) -> Model:
        model.dense = lambda *arguments: new(model, *arguments)  # type: ignore[method-assign]
        return model

    return change


def loss(new: Callable[[Tensor, Batch, dict[str, Term]], dict[str, Term]]) -> Change:
    """Replaces the terms of the loss by `new(logits, batch, terms)`."""

    def change(model: Model) -> Model:
        right = model.loss
        model.loss = lambda outputs, batch: new(outputs.logits, batch, right(outputs, batch))  # type: ignore
        return model

    return change


def said(method: str, new: Callable[..., Any]) -> Change:
    """Replaces what `flops` or `parts` say by `new(what they said, model, ...)`."""

    def change(model: Model) -> Model:
        right = getattr(model, method)
        setattr(model, method, lambda *arguments: new(right(*arguments), model, *arguments))
        return model

    return change


def unweighted(logits: Tensor, batch: Batch, terms: dict[str, Term]) -> dict[str, Term]:
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels.nan_to_num(), reduction="none")
    return {name: Term(losses[:, j].sum(), batch.weights[:, j].sum()) for j, name in enumerate(terms)}


def weighted_afterwards(logits: Tensor, batch: Batch, terms: dict[str, Term]) -> dict[str, Term]:
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none") * batch.weights
    return {name: Term(losses[:, j].sum(), batch.weights[:, j].sum()) for j, name in enumerate(terms)}


def plus(value: Callable[[Tensor, Batch], Tensor]) -> Change:
    """Adds a value to the sum of every term."""
    return loss(lambda x, batch, terms: {name: Term(t.sum + value(x, batch), t.weight) for name, t in terms.items()})


def hidden_state(model: Model) -> Model:
    """A weight that is not in the state dict."""
    model.register_buffer("shift", torch.rand(()), persistent=False)
    return logits(lambda x, *_: x + model.get_buffer("shift"))(model)


def deaf(model: Model) -> Model:
    """Tables that take no notice of a checkpoint."""
    model.embeddings._load_from_state_dict = lambda *_: None  # type: ignore[method-assign]
    return model


def one_block_of_tables(model: Model) -> Model:
    """Tables in the state dict as they lie in memory."""
    tables = model.embeddings
    tables._save_to_state_dict = lambda *a: nn.Module._save_to_state_dict(tables, *a)  # type: ignore[method-assign]
    return model


def dense_gradients(model: Model) -> Model:
    """Tables whose gradients are as large as they are."""
    return logits(lambda x, *_: x + 0 * model.embeddings.sparse_parameters()[0].sum())(model)


def padding_is_looked_up(model: Model) -> Model:
    """Vectors of a list's padding, instead of zeros."""
    tables = model.embeddings
    name, dim = tables.layout.tables[0].name, tables.layout.tables[0].dim
    first = tables.place[name][1]
    look_up = tables.look_up

    def broken(lookups: list) -> list[Tensor]:
        padding = F.embedding(torch.tensor(first), tables.weight(dim), sparse=True)
        return [found + padding.mean() for found in look_up(lookups)]

    tables.look_up = broken  # type: ignore[method-assign]
    return model


def padding_at_random(model: Model) -> Model:
    with torch.no_grad():
        for parameter in model.embeddings.sparse_parameters():
            parameter[0] = 0.1
    return model


def never_learns(model: Model) -> Model:
    first = {name: value.clone() for name, value in model.state_dict().items()}
    model.after_step = lambda: model.load_state_dict(first) and None  # type: ignore[method-assign]
    return model


def unused_parameter(model: Model) -> Model:
    model.spare = nn.Parameter(torch.zeros(3))
    return model


def own_dice(model: Model) -> Model:
    """Drawn from a generator of its own."""
    generator = torch.Generator()
    generator.seed()
    with torch.no_grad():
        model.dense_parameters()[-1].add_(torch.rand((), generator=generator))
    return model


def all_alike(model: Model) -> Model:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def another_forward(model: Model) -> Model:
    """What is trained is not what is served."""
    model.forward = lambda batch: Outputs(Model.forward(model, batch).logits + 1)  # type: ignore[method-assign]
    return model


def state_is_used_up(x: Tensor, state: Any, *_: Any) -> Tensor:
    with torch.no_grad():
        state.user.add_(1)
    return x


def no_state(model: Model, user: Embedded, items: Embedded, user_of_row: Tensor) -> Outputs:
    repeated = Embedded(user.flat[user_of_row], {k: type(v)(v.values[user_of_row], v.mask[user_of_row])
                                                 for k, v in user.sequences.items()})  # fmt: skip
    return model.score(model.encode_user(repeated), items, torch.arange(len(user_of_row)))


def user_sees_items(model: Model, user: Embedded, items: Embedded, user_of_row: Tensor) -> Outputs:
    leak = torch.zeros(len(user.flat)).index_add(0, user_of_row, items.flat.sum(1))
    return model.score(model.encode_user(Embedded(user.flat + leak[:, None], user.sequences)), items, user_of_row)


def divided_by_events(x: Tensor, state: Any, _: Any, user_of_row: Tensor) -> Tensor:
    past = state.pasts["seen"]
    return x + (past.values.sum((1, 2)) / past.mask.sum(1))[user_of_row, None]


def root_of_events(model: Model) -> Model:
    """Finite for an empty past, its derivative is not."""
    weight = model.dense_parameters()[-1]

    def new(x: Tensor, state: Any, _: Any, user_of_row: Tensor) -> Tensor:
        events = state.pasts["seen"].mask.sum(1)
        return x + (events * weight.square().sum()).sqrt()[user_of_row, None]

    return logits(new)(model)


def root_of_rows(model: Model) -> Model:
    """The same for a batch without rows."""
    weight = model.dense_parameters()[-1]
    return plus(lambda x, _: (len(x) * weight.square().sum()).sqrt())(model)


def rounded(x: Tensor, *_: Any) -> Tensor:
    """A product under autocast in which a large number drowns a small one."""
    return 4 * ((torch.eye(2) @ (x.T / 4 + 640)).T.float() - 640)


def compiled_otherwise(x: Tensor, *_: Any) -> Tensor:
    return x + 0.01 if torch.compiler.is_compiling() and not torch.is_grad_enabled() else x


def exported_otherwise(x: Tensor, *_: Any) -> Tensor:
    return x + 0.01 if torch.compiler.is_exporting() else x


def gradient_otherwise(x: Tensor, *_: Any) -> Tensor:
    return 2 * x - x.detach() if torch.compiler.is_compiling() else x


def as_long_as_the_example(x: Tensor, *_: Any) -> Tensor:
    return x.view(len(x), -1)


class Impostor(DLRMMLPConfig):
    """A configuration under the name of another one."""

    def build(self, layout: Layout) -> DLRMMLP:
        return type("Other", (DLRMMLP,), {})(self, layout)


class Unreadable(DLRMMLPConfig):
    """The name of another one, and a field that that one does not have."""

    extra: int = 1


class Forgetful(DLRMMLPConfig):
    """A field that does not get into the JSON."""

    kind: str = "tests.contract.broken:Forgetful"
    hidden: tuple[int, ...] = Field((64, 32), exclude=True)


def nan_with_an_option(model: Model) -> Model:
    assert isinstance(model, DLRMMLP)
    return logits(lambda x, *_: x * float("nan"))(model) if model.heads.kind == "mlp" else model


def one_logit_with_an_option(model: Model) -> Model:
    assert isinstance(model, DLRMMLP)
    return logits(lambda x, *_: x[:, :1])(model) if not model.join.din else model


def flops_of_a_linear_head(found: int, model: Any, batch: Batch) -> int:
    return found if model.heads.kind == "linear" else found - 2 * len(batch)


def flops_of_repeated_users(found: int, model: Any, batch: Batch) -> int:
    return found + (len(batch.user) == len(batch))


def mask_only(logits: Tensor, batch: Batch, terms: dict[str, Term]) -> dict[str, Term]:
    losses = F.binary_cross_entropy_with_logits(logits, batch.labels, reduction="none") * (batch.weights > 0)
    return {name: Term(losses[:, j].sum(), batch.weights[:, j].sum()) for j, name in enumerate(terms)}


def nothing(logits: Tensor, batch: Batch, terms: dict[str, Term]) -> dict[str, Term]:
    return {name: Term((0 * logits).sum(), term.weight) for name, term in terms.items()}


def mean(logits: Tensor, batch: Batch, terms: dict[str, Term]) -> dict[str, Term]:
    return {name: Term(term.sum / term.weight, term.weight) for name, term in terms.items()}


def of_weight_one(logits: Tensor, batch: Batch, terms: dict[str, Term]) -> dict[str, Term]:
    return {name: Term(term.sum, torch.ones(())) for name, term in terms.items()}


def parts_with_tables(parts: dict[str, int], model: Model) -> dict[str, int]:
    return {**parts, "tables": sum(parameter.numel() for parameter in model.embeddings.sparse_parameters())}


c = contract
BROKEN = [
    Broken(c.check_outputs, "shape", logits(lambda x, *_: x[:, :1])),
    Broken(c.check_outputs, "not finite", logits(lambda x, *_: x / (torch.arange(len(x)) - 3)[:, None])),
    Broken(c.check_outputs, "bfloat16", logits(lambda x, *_: x.bfloat16())),
    Broken(c.check_outputs, "do not depend on the row", logits(lambda x, *_: 0 * x + 0.3)),
    Broken(c.check_no_rows, "loss nan", plus(lambda x, _: x.mean())),
    Broken(c.check_no_rows, "gradients", root_of_rows),
    Broken(c.check_no_rows, "not there", logits(lambda x, *_: F.pad(x, (0, 0, 0, 1)))),
    Broken(c.check_bfloat16, "bfloat16", logits(lambda x, *_: x.bfloat16() if torch.is_autocast_enabled("cpu") else x)),
    Broken(c.check_bfloat16, "under autocast logits", logits(rounded)),
    Broken(c.check_bfloat16, "gradients", plus(lambda x, _: (x - x).abs().sum().sqrt())),
    Broken(c.check_row_alone, "row 0 alone", logits(lambda x, *_: x - x.mean(0))),
    Broken(c.check_row_order, "in another order", logits(lambda x, *_: x + torch.arange(len(x))[:, None])),
    Broken(c.check_users_shared, "users repeated", logits(lambda x, _, __, user: x + 0.001 * user[:, None])),
    Broken(c.check_state_ignores_items, "changed with the candidates", dense(user_sees_items)),
    Broken(c.check_state_ignores_items, "60 rows of 12 users", dense(no_state)),
    Broken(c.check_state_ignores_items, "0 times", dense(lambda _, user, items, rows: Outputs(items.flat[:, :2]))),
    Broken(c.check_state_ignores_items, "depend on the candidate", logits(lambda x, s, _, rows: s.user[rows, :2])),
    Broken(c.check_scored_in_pieces, "scored in pieces", another_forward),
    Broken(c.check_scored_in_pieces, "scored in pieces", logits(state_is_used_up)),
    Broken(c.check_empty_pasts, "logits", logits(divided_by_events)),
    Broken(c.check_empty_pasts, "gradients", root_of_events),
    Broken(c.check_gradients, "no gradient for spare", unused_parameter),
    Broken(c.check_gradients, "no gradient for", logits(lambda x, s, _, rows: s.user[rows, :2])),
    Broken(c.check_gradients, "wrong layout", dense_gradients),
    Broken(c.check_loss_falls, "only", never_learns),
    Broken(c.check_loss_falls, "only", logits(lambda x, *_: x.detach() + 0 * x)),
    Broken(c.check_padding_stays_zero, "after 0 steps", padding_at_random),
    Broken(c.check_padding_stays_zero, "after 3 steps", padding_is_looked_up),
    Broken(c.check_masked_rows, "masked rows have a gradient", loss(unweighted)),
    Broken(c.check_masked_rows, "masked rows have a gradient", loss(weighted_afterwards)),
    Broken(c.check_masked_rows, "rows that count", loss(nothing)),
    Broken(c.check_masked_rows, "change the loss", plus(lambda _, batch: batch.labels.sum())),
    Broken(c.check_loss_adds_up, "the sum of click", loss(mean)),
    Broken(c.check_loss_adds_up, "the weight of click", loss(of_weight_one)),
    Broken(c.check_loss_adds_up, "no term for task buy", loss(lambda x, _, terms: {"click": terms["click"]})),
    Broken(c.check_weights, "the sum of click with double weights", loss(mask_only)),
    Broken(c.check_checkpoint, "logits changed", hidden_state),
    Broken(c.check_checkpoint, "weights changed", deaf),
    Broken(c.check_checkpoint, "builds another model", config=Impostor()),
    Broken(c.check_state_dict, "tables in the state dict", one_block_of_tables),
    Broken(c.check_same_seed, "the same seed", own_dice),
    Broken(c.check_same_seed, "does not matter", all_alike),
    Broken(c.check_flops, "flops.. says 0", said("flops", lambda *_: 0)),
    Broken(c.check_flops, "flops", said("flops", flops_of_repeated_users)),
    Broken(c.check_flops, "head='mlp'", said("flops", flops_of_a_linear_head)),
    Broken(c.check_parts, "stack", said("parts", lambda parts, _: {"stack": parts["stack"]})),
    Broken(c.check_parts, "tables", said("parts", parts_with_tables)),
    Broken(c.check_variations, "loss nan.*head='mlp'", nan_with_an_option),
    Broken(c.check_variations, "shape of logits.*sequence='mean'", one_logit_with_an_option),
    Broken(c.check_config_json, "as DLRMMLPConfig", config=Impostor()),
    Broken(c.check_config_json, "not read back", config=Unreadable()),
    Broken(c.check_config_json, r"hidden=\(3,\).*read back.*hidden=\(64, 32\)", config=Forgetful(hidden=(3,))),
    Broken(c.check_compiled, "compiled logits", logits(compiled_otherwise)),
    Broken(c.check_compiled, "compiled gradient", logits(gradient_otherwise)),
    Broken(c.check_exported, "exported logits", logits(exported_otherwise)),
    Broken(c.check_exported, "not exported", logits(as_long_as_the_example)),
]

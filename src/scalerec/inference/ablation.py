"""What carried a score: the logits again, with one token of the model at a time at zero.

A model without tokens of its own loses one semantic group of features at a time; one that follows a history also each
of its latest events.

U users   B rows   T tokens   D width
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from scalerec.batch import Batch
from scalerec.layers.embedding import Embedded, EmbeddedSequence
from scalerec.layers.tokenizer import Tokenizer
from scalerec.models.base import Model
from scalerec.models.sequential import SequentialModel
from scalerec.schema import Group

LATEST = 12  # events that are left out one by one


def ablated(model: Model, batch: Batch, groups: Sequence[Group]) -> Iterator[tuple[str, Tensor]]:
    """Name and logits [B, tasks], first "" and those of the whole model; the model itself is left as it is."""
    user, items = model.embeddings(batch.user, batch.items)
    yield "", model.dense(user, items, batch.user_of_row).logits
    tokenizer = getattr(model, "tokenizer", None)
    if isinstance(tokenizer, Tokenizer):
        for token, (_, features) in enumerate(tokenizer.describe()):
            if features != ["(padding)"]:
                without = _with_part(model, "tokenizer", _Without(tokenizer, token))
                yield ", ".join(features), without.dense(user, items, batch.user_of_row).logits
        return
    for group in groups:
        names = {feature.name for feature in group.features}
        sides = [_without_group(model, side, kind, names) for side, kind in ((user, "user"), (items, "item"))]
        yield group.name, model.dense(sides[0], sides[1], batch.user_of_row).logits
    if isinstance(model, SequentialModel):
        yield from _without_events(model, user, items, batch)


class _Without(nn.Module):
    """A tokeniser whose token number `token` is zero."""

    def __init__(self, tokenizer: Tokenizer, token: int):
        super().__init__()
        self.tokenizer, self.token = tokenizer, token

    def user_tokens(self, user: Tensor) -> Tensor:
        return self.tokenizer.user_tokens(user)

    def forward(self, user_tokens: Tensor, user: Tensor, items: Tensor, user_of_row: Tensor) -> Tensor:
        tokens = self.tokenizer(user_tokens, user, items, user_of_row)
        return tokens.index_fill(1, torch.tensor([self.token], device=tokens.device), 0)


def _with_part(model: Model, name: str, part: nn.Module) -> Model:
    """The model with another part, sharing all others: requests on other threads see the model as it was."""
    changed = copy.copy(model)
    changed._modules = {**model._modules, name: part}
    return changed


def _without_group(model: Model, side: Embedded, kind: str, names: Iterable[str]) -> Embedded:
    """One side with the features `names` at zero, and sequences among them empty."""
    flat, first = side.flat.clone(), 0
    for feature in model.layout.sides[kind].flat:
        if feature.name in names:
            flat[:, first : first + feature.width] = 0
        first += feature.width
    return replace(side, flat=flat, sequences={n: _emptied(s) if n in names else s for n, s in side.sequences.items()})


def _emptied(sequence: EmbeddedSequence) -> EmbeddedSequence:
    return replace(sequence, values=torch.zeros_like(sequence.values), mask=torch.zeros_like(sequence.mask))


def _without_events(
    model: SequentialModel, user: Embedded, items: Embedded, batch: Batch
) -> Iterator[tuple[str, Tensor]]:
    """One of the latest events at a time left out of the main series."""
    name = model.series.name
    past = user.sequences[name]
    length = int(past.mask[0].sum()) if len(past.mask) == 1 else 0
    for back in range(1, min(length, LATEST) + 1):
        keep = [i for i in range(past.mask.shape[1]) if i != length - back]
        less = EmbeddedSequence(
            past.values[:, keep], past.mask[:, keep],
            None if past.times is None else past.times[:, keep],
            None if past.actions is None else past.actions[:, keep],
        )  # fmt: skip
        without = replace(user, sequences={**user.sequences, name: less})
        yield f"{name}[-{back}]", model.dense(without, items, batch.user_of_row).logits

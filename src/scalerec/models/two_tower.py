"""Two towers: the mean of a user's events through an MLP against the items of the table (the usual retriever).

U users   E events of all users   D width
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalerec.batch import Batch
from scalerec.features.layout import Layout
from scalerec.layers.embedding import Embedded
from scalerec.layers.mlp import MLP
from scalerec.models.base import count
from scalerec.models.sequential import Encoded, SequentialConfig, SequentialModel, start_items


class TwoTowerConfig(SequentialConfig):
    kind: str = "two_tower"
    hidden: tuple[int, ...] = (128,)

    def build(self, layout: Layout) -> TwoTower:
        return TwoTower(self, layout)


class TwoTower(SequentialModel):
    """After each event the user is MLP([mean of the events so far, the user's features])."""

    config: TwoTowerConfig

    def __init__(self, config: TwoTowerConfig, layout: Layout):
        super().__init__(config, layout)
        width = self.series.width + layout.sides["user"].flat_width
        self.inner = MLP(width, config.hidden, config.dropout)
        self.out = nn.Linear(self.inner.out, config.dim)
        start_items(self.embeddings, self.item_table.name)

    def encode_user(self, user: Embedded) -> Encoded:
        """The user after each event; of a user without history, features alone (no training target asks for that)."""
        sequence = self.past(user)
        lengths = sequence.mask.sum(1)
        place = torch.arange(1, sequence.mask.shape[1] + 1, device=lengths.device)
        means = sequence.values.cumsum(1) / place[:, None]  # [U, L, w]
        who = torch.arange(len(lengths), device=lengths.device)
        ends = torch.where(lengths[:, None] > 0, means[who, (lengths - 1).clamp(min=0)], 0.0)
        at_event = self.tower(means[sequence.mask], user.flat.repeat_interleave(lengths, 0))
        return Encoded(at_event, self.tower(ends, user.flat))

    def tower(self, means: Tensor, features: Tensor) -> Tensor:
        """[n, w] and [n, W_user] -> [n, D]."""
        return self.out(self.inner(torch.cat([means, features], 1)))

    def flops(self, batch: Batch) -> int:
        """The MLP at every event and at the end of every history."""
        past = batch.user.lists[self.series.name]
        return 2 * (len(past.values) + len(past)) * (self.inner.macs + self.out.weight.numel())

    def parts(self) -> dict[str, int]:
        return {"user tower": count(self.inner, self.out)}


def tiny() -> TwoTowerConfig:
    return TwoTowerConfig(dim=8, hidden=(16,))

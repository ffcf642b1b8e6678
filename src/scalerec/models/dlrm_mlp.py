"""DLRM-MLP: all features side by side into one MLP (the base of RankMixer's Table 1)."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from scalerec.batch import Batch, Outputs
from scalerec.features.layout import Layout
from scalerec.layers.embedding import Embedded
from scalerec.layers.heads import HeadKind, Heads
from scalerec.layers.mlp import MLP
from scalerec.models.base import FeatureJoin, Joined, Model, ModelConfig, count


class DLRMMLPConfig(ModelConfig):
    kind: str = "dlrm_mlp"
    hidden: tuple[int, ...] = (1024, 512, 256)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    head: HeadKind = "linear"
    head_hidden: int = 128
    sequence: Literal["din", "mean"] = "din"

    def build(self, layout: Layout) -> DLRMMLP:
        return DLRMMLP(self, layout)


class DLRMMLP(Model):
    """x_0 -> MLP -> heads."""

    def __init__(self, config: DLRMMLPConfig, layout: Layout):
        super().__init__(layout)
        self.join = FeatureJoin(layout, config.sequence)
        self.mlp = MLP(self.join.width, config.hidden, config.dropout)
        self.heads = Heads(self.mlp.out, len(layout.tasks), config.head, config.head_hidden)

    def encode_user(self, user: Embedded) -> Joined:
        return self.join.user_side(user)

    def score(self, state: Joined, items: Embedded, user_of_row: Tensor) -> Outputs:
        x = torch.cat([state.user[user_of_row], self.join.item_side(state, items, user_of_row)], 1)
        return Outputs(self.heads(self.mlp(x)))

    def flops(self, batch: Batch) -> int:
        return 2 * (self.join.macs(batch) + len(batch) * (self.mlp.macs + self.heads.macs))

    def parts(self) -> dict[str, int]:
        return {"stack": count(self.mlp), "sequence": count(self.join), "heads": count(self.heads)}


def tiny() -> DLRMMLPConfig:
    return DLRMMLPConfig(hidden=(64, 32))

"""DCNv2 (Wang et al., 2021, eq. 1-3): explicit crosses beside a deep network.   W input width   r rank"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from scalerec.batch import Batch, Outputs
from scalerec.features.layout import Layout
from scalerec.layers.embedding import Embedded
from scalerec.layers.heads import HeadKind, Heads
from scalerec.layers.mlp import MLP
from scalerec.models.base import FeatureJoin, Joined, Model, ModelConfig, count


class DCNv2Config(ModelConfig):
    kind: str = "dcnv2"
    crosses: int = 3
    rank: int = 0  # 0: full W x W matrices
    hidden: tuple[int, ...] = (512, 256)
    structure: Literal["parallel", "stacked"] = "parallel"
    dropout: float = Field(default=0.0, ge=0, lt=1)
    head: HeadKind = "linear"
    head_hidden: int = 128
    sequence: Literal["din", "mean"] = "din"

    def build(self, layout: Layout) -> DCNv2:
        return DCNv2(self, layout)


class Cross(nn.Module):
    """x_{l+1} = x_0 * (W x_l + b) + x_l, with W = U V^T when a rank is given."""

    def __init__(self, width: int, rank: int):
        super().__init__()
        self.map = nn.Linear(width, width) if not rank else nn.Sequential(
            nn.Linear(width, rank, bias=False), nn.Linear(rank, width)
        )  # fmt: skip
        self.macs = width * width if not rank else 2 * width * rank

    def forward(self, x0: Tensor, x: Tensor) -> Tensor:
        return torch.addcmul(x, x0, self.map(x).to(x.dtype))


class DCNv2(Model):
    """Cross layers and an MLP, side by side or one after the other, then heads."""

    def __init__(self, config: DCNv2Config, layout: Layout):
        super().__init__(layout)
        self.join = FeatureJoin(layout, config.sequence)
        width = self.join.width
        self.crosses = nn.ModuleList(Cross(width, config.rank) for _ in range(config.crosses))
        self.mlp = MLP(width, config.hidden, config.dropout)
        self.parallel = config.structure == "parallel"
        out = self.mlp.out + (width if self.parallel else 0)
        self.heads = Heads(out, len(layout.tasks), config.head, config.head_hidden)

    def encode_user(self, user: Embedded) -> Joined:
        return self.join.user_side(user)

    def score(self, state: Joined, items: Embedded, user_of_row: Tensor) -> Outputs:
        x0 = torch.cat([state.user[user_of_row], self.join.item_side(state, items, user_of_row)], 1)
        x = x0
        for cross in self.crosses:
            x = cross(x0, x)
        deep = self.mlp(x0) if self.parallel else self.mlp(x)
        return Outputs(self.heads(torch.cat([x, deep.to(x.dtype)], 1) if self.parallel else deep))

    def flops(self, batch: Batch) -> int:
        # Each cross is one W x W product (or two W x r); everything else in it is element-wise.
        macs = sum(cross.macs for cross in self.crosses) + self.mlp.macs + self.heads.macs  # type: ignore[misc]
        return 2 * (self.join.macs(batch) + len(batch) * macs)

    def parts(self) -> dict[str, int]:
        stack = count(self.crosses, self.mlp)
        return {"stack": stack, "sequence": count(self.join), "heads": count(self.heads)}


def tiny() -> DCNv2Config:
    return DCNv2Config(crosses=2, hidden=(64, 32))

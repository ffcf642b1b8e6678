"""SASRec (Kang and McAuley, 2018) exactly as HSTU was compared with it (spec C.8): same input, output, loss.

U users   L longest history   D width   H heads
"""

from __future__ import annotations

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from scalerec.batch import Batch
from scalerec.errors import InputError
from scalerec.features.layout import Layout
from scalerec.layers.embedding import Embedded
from scalerec.models.base import count
from scalerec.models.sequential import Encoded, SequentialConfig, SequentialModel, start_items


class SASRecConfig(SequentialConfig):
    kind: str = "sasrec"
    num_layers: PositiveInt = 2
    num_heads: PositiveInt = 1
    ffn_dim: NonNegativeInt = 0  # 0: dim
    slack: NonNegativeInt = 11  # places beyond the longest history, as HSTU has them

    def build(self, layout: Layout) -> SASRec:
        if self.dim % self.num_heads:
            raise InputError(f"--model.dim {self.dim} is not divisible by --model.num_heads {self.num_heads}")
        return SASRec(self, layout)


class SASRecBlock(nn.Module):
    """z = LN(Qn + MHA(Qn, x, x)) with Qn = LN(x), x' = z + FFN(z); no affine norms, [U, L, D] -> [U, L, D]."""

    def __init__(self, config: SASRecConfig):
        super().__init__()
        d, hidden = config.dim, config.ffn_dim or config.dim
        self.heads, self.rate = config.num_heads, config.dropout
        self.norm = nn.LayerNorm(d, eps=1e-8, elementwise_affine=False)
        self.query, self.key_value, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.dropout = nn.Dropout(config.dropout)
        for layer in (self.query, self.key_value, self.out, self.up, self.down):
            nn.init.zeros_(layer.bias)
            for weight in layer.weight.chunk(layer.out_features // d or 1):  # keys and values each have their own fans
                nn.init.xavier_normal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm(x)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(norm), *self.key_value(x).chunk(2, -1))
        )
        # Histories are padded at the end, so a causal mask alone keeps padding out of sight.
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=self.rate if self.training else 0.0)
        z = self.norm(norm + self.out(a.transpose(1, 2).flatten(2)))
        return z + self.dropout(self.down(self.dropout(F.relu(self.up(z)))))


class SASRec(SequentialModel):
    """A causal Transformer over the items of a user; retrieves, and does not rank."""

    config: SASRecConfig

    def __init__(self, config: SASRecConfig, layout: Layout):
        super().__init__(config, layout)
        self.place = nn.Parameter(torch.empty(self.series.max_len + config.slack, config.dim))
        std = config.dim**-0.5
        nn.init.trunc_normal_(self.place, std=std, a=-2 * std, b=2 * std)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in range(config.num_layers))
        start_items(self.embeddings, self.item_table.name)

    def encode_user(self, user: Embedded) -> Encoded:
        """Histories of U users, the item alone of each event."""
        sequence = user.sequences[self.series.name]
        values, mask = sequence.values[..., : self.config.dim], sequence.mask
        x = self.dropout(values * self.config.dim**0.5 + self.place[: values.shape[1]]) * mask[..., None]
        for block in self.blocks:
            x = block(x) * mask[..., None]
        lengths = mask.sum(1)
        at_end = x[torch.arange(len(x), device=x.device), (lengths - 1).clamp(min=0)]
        return Encoded(x[mask], at_end, torch.ones_like(lengths, dtype=torch.bool).repeat_interleave(lengths))

    def flops(self, batch: Batch) -> int:
        """Per padded event and block 6 D^2 (with F = D) and, of the attention, 2 D a pair of the whole square."""
        past = batch.user.lists[self.series.name]
        longest = max(int(past.lengths.max()) if len(past) else 0, 1)
        d, hidden = self.config.dim, self.config.ffn_dim or self.config.dim
        each = 4 * d * d + 2 * d * hidden + 2 * longest * d
        return 2 * len(past) * longest * self.config.num_layers * each

    def parts(self) -> dict[str, int]:
        return {"stack": count(self.blocks), "positions": self.place.numel()}


def tiny() -> SASRecConfig:
    return SASRecConfig(dim=8)

"""SASRec (Kang and McAuley, 2018) exactly as HSTU was compared with it (docs/generative.md): same input, output, loss.

U users   L longest history   D width   H heads
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from scalerec.batch import Batch
from scalerec.errors import InputError
from scalerec.features.layout import Layout
from scalerec.layers.dropout import Dropout
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
        self.heads = config.num_heads
        self.norm = nn.LayerNorm(d, eps=1e-8, elementwise_affine=False)
        self.query, self.key_value, self.out = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.up, self.down = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.dropout = Dropout(config.dropout)
        for layer in (self.query, self.key_value, self.out, self.up, self.down):
            nn.init.zeros_(layer.bias)
            for weight in layer.weight.chunk(2 if layer is self.key_value else 1):  # keys and values have fans each
                nn.init.xavier_normal_(weight)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.norm(x)
        q, k, v = (
            y.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(norm), *self.key_value(x).chunk(2, -1))
        )
        a = self.attend(q, k, v)
        z = self.norm(norm + self.out(a.transpose(1, 2).flatten(2)))
        return z + self.dropout(self.down(self.dropout(F.relu(self.up(z)))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """[U, H, L, D / H], as each argument; padding is at the end, so a causal mask alone keeps it out of sight."""
        rate = self.dropout.p if self.training else 0.0
        if not rate or q.device.type != "cpu":
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=rate)
        # With dropout torch has no kernel of its own on a CPU: these are its steps, with a faster dropout.
        later = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu_(1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
        return self.dropout(scores.masked_fill_(later, -torch.inf).softmax(-1)) @ v


class SASRec(SequentialModel):
    """A causal Transformer over the items of a user; retrieves, and does not rank."""

    config: SASRecConfig

    def __init__(self, config: SASRecConfig, layout: Layout):
        super().__init__(config, layout)
        self.place = nn.Parameter(torch.empty(self.series.max_len + config.slack, config.dim))
        std = config.dim**-0.5
        nn.init.trunc_normal_(self.place, std=std, a=-2 * std, b=2 * std)
        self.dropout = Dropout(config.dropout)
        self.blocks = nn.ModuleList(SASRecBlock(config) for _ in range(config.num_layers))
        start_items(self.embeddings, self.item_table.name)

    def encode_user(self, user: Embedded) -> Encoded:
        """Histories of U users, the item alone of each event."""
        sequence = self.past(user)
        vectors = sequence.values[..., : self.config.dim] * self.config.dim**0.5
        lengths = sequence.mask.sum(1)
        outputs = torch.zeros_like(vectors)
        for users, longest in _alike(lengths):
            x = vectors[users, :longest] + self.place[:longest]
            mask = sequence.mask[users, :longest, None]
            x = self.dropout(x) * mask
            for block in self.blocks:
                x = block(x) * mask
            outputs[users, :longest] = x
        at_end = outputs[torch.arange(len(lengths), device=lengths.device), (lengths - 1).clamp(min=0)]
        return Encoded(outputs[sequence.mask], at_end)

    def flops(self, batch: Batch) -> int:
        """Per padded event and block 4 D^2 + 2 D F and, of the attention, 2 D for each pair of the whole square."""
        d, hidden = self.config.dim, self.config.ffn_dim or self.config.dim
        macs = 0
        for users, longest in _alike(batch.user.lists[self.series.name].lengths):
            macs += len(users) * longest * (4 * d * d + 2 * d * hidden + 2 * longest * d)
        return 2 * macs * self.config.num_layers

    def parts(self) -> dict[str, int]:
        return {"stack": count(self.blocks), "positions": self.place.numel()}


def _alike(lengths: Tensor, count: int = 16) -> Iterator[tuple[Tensor, int]]:
    """Users of similar length [count] and the longest among them, so that little padding is computed."""
    for users in lengths.argsort(stable=True).split(count):
        longest = int(lengths[users].max()) if len(users) else 0
        if longest:
            yield users, longest


def tiny() -> SASRecConfig:
    return SASRecConfig(dim=8)

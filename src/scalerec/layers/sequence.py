"""Sequence modules: a user's past -> one vector per row.

U users   B rows   L events   w width of an event
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalerec.layers.embedding import EmbeddedSequence


def masked_mean(sequence: EmbeddedSequence) -> Tensor:
    """[U, w], zero for an empty past."""
    count = sequence.mask.sum(1, keepdim=True).clamp(min=1)
    return sequence.values.sum(1) / count


class DIN(nn.Module):
    """Attention of the candidate over the past, not normalised (Zhou et al., 2018; spec B.9).

    a_j = MLP([q, k_j, q - k_j, q * k_j]), out = sum_j a_j k_j. The first layer is linear in its four inputs, so the
    parts of q and k_j are computed once per row and once per user event; only q * k_j needs every pair.
    """

    def __init__(self, width: int, hidden: tuple[int, int] = (80, 40)):
        super().__init__()
        first, second = hidden
        self.width, self.hidden = width, hidden
        self.weight = nn.Parameter(torch.empty(4, width, first))  # of q, k, q - k, q * k
        self.bias = nn.Parameter(torch.zeros(first))
        self.prelu = nn.ModuleList([nn.PReLU(first), nn.PReLU(second)])
        self.second = nn.Linear(first, second)
        self.last = nn.Linear(second, 1)
        nn.init.xavier_uniform_(self.weight.view(4 * width, first))

    def forward(self, query: Tensor, sequence: EmbeddedSequence, user_of_row: Tensor) -> Tensor:
        """Query [B, w] and pasts of U users -> [B, w]; zero for an empty past."""
        w_q, w_k, w_d, w_p = self.weight
        of_query = query @ (w_q + w_d) + self.bias  # [B, first]
        of_key = (sequence.values @ (w_k - w_d))[user_of_row]  # [B, L, first]
        keys = sequence.values[user_of_row]  # [B, L, w]
        h = self.prelu[0]((of_key + of_query[:, None] + (query[:, None] * keys) @ w_p).flatten(0, 1))
        scores = self.last(self.prelu[1](self.second(h))).view(keys.shape[:2])
        scores = scores.masked_fill(~sequence.mask[user_of_row], 0.0)
        return torch.einsum("bl,blw->bw", scores.to(keys.dtype), keys)

    def macs(self, rows: int, users: int, length: int) -> int:
        """Multiply-accumulates for `rows` candidates over `users` pasts of `length` padded events."""
        w, (first, second) = self.width, self.hidden
        pair = w * first + first * second + second + w
        return rows * w * first + users * length * w * first + rows * length * pair

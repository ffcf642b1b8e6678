"""Sequence modules: a user's past -> one vector per row.

U users   B rows   L events   w width of an event
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalerec.layers.embedding import EmbeddedSequence
from scalerec.ops.din import Layers, din


def masked_mean(sequence: EmbeddedSequence) -> Tensor:
    """[U, w], zero for an empty past."""
    count = sequence.mask.sum(1, keepdim=True).clamp(min=1)
    return sequence.values.sum(1) / count


class DIN(nn.Module):
    """Attention of the candidate over the past, not normalised (Zhou et al., 2018, arXiv 1706.06978).

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
        if torch.compiler.is_compiling():  # the number of pairs depends on the data, and a graph wants fixed ranks
            return self.padded(query, sequence, user_of_row)
        if not sequence.mask.any():
            return torch.zeros_like(query)
        w_q, w_k, w_d, w_p = self.weight
        of_keys = (sequence.values @ (w_k - w_d)).to(query.dtype)  # [U, L, first]; bf16 under autocast
        of_query = (query @ (w_q + w_d)).to(query.dtype) + self.bias
        layers = Layers(
            w_p, self.prelu[0].get_parameter("weight"), self.second.weight.t(), self.second.bias,
            self.prelu[1].get_parameter("weight"),
            self.last.weight[0], self.last.bias,
        )  # fmt: skip
        return din(query, of_query, sequence.values, of_keys, sequence.mask, user_of_row, layers)

    def padded(self, query: Tensor, sequence: EmbeddedSequence, user_of_row: Tensor) -> Tensor:
        """The same over all padded events, with the mask afterwards: what graphs compute."""
        w_q, w_k, w_d, w_p = self.weight
        keys = sequence.values[user_of_row]  # [B, L, w]
        of_key = (sequence.values @ (w_k - w_d))[user_of_row]
        of_query = query @ (w_q + w_d) + self.bias
        hidden = of_key + of_query[:, None] + (query[:, None] * keys) @ w_p
        scores = self._scores(hidden.flatten(0, 1)).view(keys.shape[:2])
        scores = scores.masked_fill(~sequence.mask[user_of_row], 0.0)
        return (scores[:, :, None] * keys).sum(1).to(query.dtype)

    def _scores(self, hidden: Tensor) -> Tensor:
        """First layer's output before its activation [P, first] -> [P, 1]."""
        return self.last(self.prelu[1](self.second(self.prelu[0](hidden))))

    def macs(self, rows: int, events: int, pairs: int) -> int:
        """Multiply-accumulates of matrix products: `rows` candidates, `events` padded events of all users, `pairs`."""
        w, (first, second) = self.width, self.hidden
        return (rows + events) * w * first + pairs * (w * first + first * second + second)

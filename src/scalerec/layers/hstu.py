"""The layer of HSTU but for its attention (Zhai et al., 2024, arXiv 2402.17152, eq. 1 and 3).

n tokens   D width   H heads   K width of q, k   V width of v   N the constant longest sequence
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from scalerec.layers.dropout import Dropout

TIME_BUCKETS = 129


class HSTULayer(nn.Module):
    """One layer (eq. 1-3): U, V, Q, K from one product, point-wise attention, gate, output product, residual."""

    def __init__(
        self, d: int, h: int, qk: int, v: int, *, longest: int, dropout: float, production: bool = False,
        position_bias: bool = True, time_bias: bool = True,
    ):  # fmt: skip
        super().__init__()
        self.heads, self.sizes = h, [h * v, h * v, h * qk, h * qk]
        self.weight = nn.Parameter(torch.empty(d, sum(self.sizes)))
        self.bias = nn.Parameter(torch.zeros(sum(self.sizes))) if production else None
        self.norm = nn.LayerNorm(d, eps=1e-6, elementwise_affine=production)
        self.out_norm = nn.LayerNorm(h * v, eps=1e-6, elementwise_affine=production)
        self.out = nn.Linear(h * v * (3 if production else 1), d)
        self.dropout = Dropout(dropout)
        if production:
            nn.init.xavier_uniform_(self.weight)
        else:
            nn.init.normal_(self.weight, std=0.02)
        nn.init.xavier_uniform_(self.out.weight)
        nn.init.zeros_(self.out.bias)
        self.position = nn.Parameter(0.02 * torch.randn(2 * longest - 1)) if position_bias and not production else None
        self.time = nn.Parameter(0.02 * torch.randn(TIME_BUCKETS)) if time_bias and not production else None

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x [n, D] -> u [n, H V], v [n, H, V], q [n, H, K], k [n, H, K]."""
        p = self.norm(x) @ self.weight
        if self.bias is None:
            u, v, q, k = F.silu(p).split(self.sizes, -1)
        else:
            u, v, q, k = (p + self.bias).split(self.sizes, -1)
            u = F.silu(u)
        v, q, k = (y.unflatten(-1, (self.heads, -1)) for y in (v, q, k))
        return u, v, q, k

    def finish(self, x: Tensor, u: Tensor, attended: Tensor) -> Tensor:
        """x [n, D], u [n, H V], attended [n, H, V] -> x + f2(norm(attended) * u) [n, D]."""
        o = attended.flatten(1)
        gated = u * self.out_norm(o)
        if self.bias is not None:
            gated = torch.cat([u, o.to(u.dtype), gated], -1)
        return x + self.out(self.dropout(gated))

"""The last tokens of a sequence, over keys and values of all of it: what a history that has grown costs.

r new tokens   n tokens of the sequence, the new ones at the end   H heads   K width of q and k   V width of v
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from scalerec.ops.hstu_attention import Normalise


def appended_attention(
    q: Tensor, keys: Tensor, values: Tensor, *, bias: Tensor | None = None, scale: float = 1.0, alpha: float = 1.0,
    normalise: Normalise = "silu",
) -> Tensor:  # fmt: skip
    """What `hstu_attention` gives the last r of the n tokens of one sequence.

    q [r, H, K], keys [n, H, K], values [n, H, V], bias [r, n] -> [r, H, V]; each token sees those up to itself.
    """
    r, n = len(q), len(keys)
    scores = alpha * torch.einsum("rhd,nhd->hrn", q, keys)
    if bias is not None:
        scores = scores + bias
    place = torch.arange(n, device=q.device)
    later = place > place[n - r :, None]
    if normalise == "softmax":
        weights = scores.masked_fill(later, float("-inf")).softmax(-1)
    else:
        weights = (F.silu(scores) * scale).masked_fill(later, 0.0)
    return torch.einsum("hrn,nhd->rhd", weights.to(values.dtype), values)

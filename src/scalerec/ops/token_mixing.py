"""Parameter-free token mixing (RankMixer eq. 3-5) and its inverse.

B rows   T tokens   D width   H heads
"""

from __future__ import annotations

import torch
from torch import Tensor


def token_mixing(x_BTD: Tensor, heads: int) -> Tensor:
    """Head h of all tokens becomes output token h: [B, T, D] -> [B, H, T * D / H]; H must divide D."""
    batch, tokens, dim = x_BTD.shape
    return x_BTD.view(batch, tokens, heads, dim // heads).transpose(1, 2).reshape(batch, heads, tokens * dim // heads)


def revert_mixing(x_BHE: Tensor, tokens: int) -> Tensor:
    """The inverse of `token_mixing`: [B, H, T * D / H] -> [B, T, D]."""
    return token_mixing(x_BHE, tokens)


def token_mixing_reference(x_BTD: Tensor, heads: int) -> Tensor:
    """The definition, head by head."""
    parts = x_BTD.chunk(heads, dim=2)
    return torch.stack([torch.cat(list(part.unbind(1)), dim=1) for part in parts], dim=1)

"""A linear map of its own for every token, as one batched product.

B rows   T tokens   I input width   O output width
"""

from __future__ import annotations

import torch
from torch import Tensor


def per_token_linear(x_TBI: Tensor, weight_TIO: Tensor, bias_TO: Tensor) -> Tensor:
    """[T, B, I] -> [T, B, O]; token t meets weight t only."""
    return torch.baddbmm(bias_TO[:, None], x_TBI, weight_TIO)


def per_token_linear_reference(x_TBI: Tensor, weight_TIO: Tensor, bias_TO: Tensor) -> Tensor:
    """The definition, token by token."""
    return torch.stack([x @ weight + bias for x, weight, bias in zip(x_TBI, weight_TIO, bias_TO)])

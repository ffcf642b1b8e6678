"""Dropout for layers whose share of it is felt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalerec.ops.dropout import dropout


class Dropout(nn.Dropout):
    """As torch's, three times as fast in float32 on a CPU; in compiled and exported graphs it is torch's."""

    def forward(self, input: Tensor) -> Tensor:
        plain = input.device.type != "cpu" or input.dtype != torch.float32 or torch.compiler.is_compiling()
        if plain or not self.training or not 0 < self.p < 1:
            return super().forward(input)
        return dropout(input, self.p)

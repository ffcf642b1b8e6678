"""DCNv2 against its equations."""

from __future__ import annotations

import pytest
import torch

from scalerec.models.dcnv2 import Cross


@pytest.mark.parametrize("rank", [0, 3])
def test_a_cross_is_x0_times_the_map_plus_x(rank):
    """x_{l+1} = x_0 * (W x_l + b) + x_l, number by number in float64; W = U V^T with a rank."""
    torch.manual_seed(0)
    width, rows = 5, 4
    cross = Cross(width, rank).double()
    x0, x = torch.randn(2, rows, width, dtype=torch.float64)
    if rank:
        weight = cross.map[1].weight @ cross.map[0].weight
        bias = cross.map[1].bias
    else:
        weight, bias = cross.map.weight, cross.map.bias
    found = cross(x0, x)
    for b in range(rows):
        for i in range(width):
            mapped = sum(float(weight[i, j] * x[b, j]) for j in range(width)) + float(bias[i])
            assert float(found[b, i]) == pytest.approx(float(x0[b, i]) * mapped + float(x[b, i]), abs=1e-12)

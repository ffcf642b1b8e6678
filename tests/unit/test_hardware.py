"""Memory of tables: as any other memory, only in larger pages."""

from __future__ import annotations

import mmap

import pytest
import torch

from scalerec import hardware
from scalerec.hardware import in_huge_pages


def test_large_tables_are_tensors_as_any_other(monkeypatch):
    monkeypatch.setattr(hardware, "LARGE", 1 << 12)
    made = in_huge_pages(given := torch.empty(100, 16))
    assert made is not given or not hasattr(mmap, "MADV_HUGEPAGE")
    weight = torch.nn.Parameter(made)
    assert weight.shape == (100, 16) and weight.dtype == torch.float32 and weight.is_contiguous()
    with torch.no_grad():
        weight.zero_()
    torch.nn.functional.embedding(torch.tensor([3, 3]), weight, sparse=True).sum().backward()
    assert weight.grad is not None and weight.grad.to_dense()[3].tolist() == [2.0] * 16
    again = torch.empty(100, 16)
    again.copy_(weight.detach())
    assert not again.any()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux has huge pages")
def test_they_are_marked_for_huge_pages(monkeypatch):
    monkeypatch.setattr(hardware, "LARGE", 1 << 12)
    size = 8 << 20
    made = in_huge_pages(torch.empty(size // 4)).fill_(1.0)
    here = False
    with open("/proc/self/smaps") as regions:
        for line in regions:
            first = line.split()[0]
            if "-" in first:
                low, high = (int(number, 16) for number in first.split("-"))
                here = low <= made.data_ptr() + size // 2 < high
            elif here and line.startswith("VmFlags"):
                assert " hg" in line
                return
    pytest.fail("the memory is not in /proc/self/smaps")


def test_small_and_other_tensors_are_left_as_they_are(monkeypatch):
    small = torch.empty(3)
    assert in_huge_pages(small) is small
    elsewhere = torch.empty(1 << 26, device="meta")
    assert in_huge_pages(elsewhere) is elsewhere
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    large = torch.empty(hardware.LARGE)
    assert in_huge_pages(large) is large

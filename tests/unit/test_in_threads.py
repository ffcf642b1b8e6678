"""Threads of our own: torch stays on one of them, whatever it does there."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import torch
from scalerec.ops._threads import in_threads

torch.set_num_threads(2)
found = []


def task(number):
    torch.ones(100_000).sum()  # large enough to be shared out
    found.append(torch.get_num_threads())


in_threads(task, 2)
print(found, torch.get_num_threads())
"""


def test_torch_stays_on_each_of_our_threads():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[1, 1] 2"

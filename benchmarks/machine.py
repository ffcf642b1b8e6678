"""What every benchmark shares: its options, a look at the load beforehand, a description of the machine."""

from __future__ import annotations

import argparse
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import psutil  # part of the [dev] extra
except ImportError:  # /proc says the same on Linux
    psutil = None

BUSY = 3  # exit status of a benchmark that measured nothing


def options(description: str) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object on the last line")
    parser.add_argument("--even-if-busy", action="store_true", help="measure beside other processes too")
    return parser


def refuse_if_busy(even_if_busy: bool = False, limit: float = 0.35, seconds: float = 1.0) -> bool:
    """Exit with 3 when others use more than `limit` cores; with `even_if_busy` only warn and return True."""
    before = {pid: used for pid, _, used in _processes()}
    start = time.perf_counter()
    time.sleep(seconds)
    after = list(_processes())
    elapsed = time.perf_counter() - start
    others = [process for process in after if process[0] != os.getpid()]
    load = [((used - before.get(pid, 0.0)) / elapsed, name, pid) for pid, name, used in others]
    total = sum(cores for cores, _, _ in load)
    if total <= limit:
        return False
    cores, name, pid = max(load)
    found = f"other processes use {total:.2f} cores, {name} (pid {pid}) alone {cores:.2f}"
    if even_if_busy:
        print(f"warning: {found}; the figures below are not to be trusted", file=sys.stderr)
        return True
    print(f"busy, nothing measured: {found}; wait, or add --even-if-busy", file=sys.stderr)
    raise SystemExit(BUSY)


def describe_machine() -> dict[str, str | int]:
    """The processor, the cores this process may use, torch and its threads: every figure depends on them."""
    import torch  # takes seconds, and benchmarks that are refused need none of it

    from scalerec.hardware import cores

    return {"cpu": _cpu(), "cores": cores(), "torch": torch.__version__, "threads": torch.get_num_threads()}


def peak_mib() -> float:
    """Of this process; what `getrusage` says may still be the peak of its parent."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def has_bf16_units() -> bool:
    """Whether the processor computes bf16 products itself, by AMX or AVX512-BF16; says so where it does not."""
    import torch

    found = bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    if not found:
        print("no bf16 units in this processor: bf16 is left out", file=sys.stderr)
    return found


def _cpu() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _processes() -> Iterator[tuple[int, str, float]]:
    """Every process that can be seen: pid, name, seconds of processor time so far."""
    if psutil is None:
        yield from _proc()
        return
    for process in psutil.process_iter(["pid", "name", "cpu_times"]):
        times = process.info["cpu_times"]
        if times is not None:
            yield process.info["pid"], process.info["name"] or "?", times.user + times.system


def _proc() -> Iterator[tuple[int, str, float]]:
    tick = os.sysconf("SC_CLK_TCK")
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            head, _, tail = file.read_text().rpartition(")")  # the name may hold spaces and brackets
        except OSError:  # it has ended
            continue
        pid, _, name = head.partition(" (")
        user, system = tail.split()[11:13]
        yield int(pid), name, (int(user) + int(system)) / tick

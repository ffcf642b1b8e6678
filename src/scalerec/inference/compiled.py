"""The dense part of a bundle's model, compiled for this machine: a cache that is checked before use and made again.

A package fits one bundle, one precision, one version of torch and one processor; all of them are in its name. Nothing
but the weights in the bundle is ever trusted: a package that is broken, or does not score the golden sample as training
code did, is thrown away and compiled anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from scalerec.errors import InputError
from scalerec.inference import golden
from scalerec.inference.bundle import Bundle
from scalerec.inference.export import compile_dense, dense_inputs, export_dense, load_dense
from scalerec.inference.golden import Tolerance
from scalerec.inference.precision import Experts

Dense = Callable[..., Tensor]


def compiled(bundle: Bundle, cache_dir: Path) -> Dense:
    """The dense part as a compiled package, to be called with `dense_inputs`; compiling it takes about a minute.

    Raises:
        InputError: the model's dense part is not one graph, the precision is int8, there is no C++ compiler, or what
            was just compiled departs from the golden sample.
    """
    if not bundle.model.exports:
        kind = bundle.run["model"]["kind"]
        raise InputError(f"{bundle.folder}: the dense part of {kind} is not one graph: serve it without compiling")
    if bundle.precision == "int8":
        raise InputError(
            f"{bundle.folder}: weights in int8 are multiplied block by block: serve them without compiling"
        )
    if any(isinstance(module, Experts) for module in bundle.model.modules()):
        raise InputError(f"{bundle.folder}: sparse experts in {bundle.precision} are not one graph: compile fp32")
    path = package(bundle, Path(cache_dir))
    if path.exists():
        try:
            return _checked(bundle, load_dense(path))
        except (InputError, RuntimeError, OSError):
            path.unlink(missing_ok=True)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside the others under a name of its own: two services that start at once must not write one file.
        with tempfile.TemporaryDirectory(prefix=".compiling-", dir=path.parent) as folder:
            made = compile_dense(export_dense(bundle.model), Path(folder) / "dense.pt2")
            dense = _checked(bundle, load_dense(made))
            os.replace(made, path)
    except OSError as error:
        raise InputError(f"{path}: not compiled ({error}); free some space or serve without compiling") from None
    return dense


def package(bundle: Bundle, cache_dir: Path) -> Path:
    """Where the package of this bundle lies on this machine."""
    machine = json.dumps([torch.__version__, platform.machine(), torch.backends.cpu.get_cpu_capability(), _processor()])
    fits = hashlib.sha256(machine.encode()).hexdigest()[:12]
    return cache_dir / f"{bundle.version}-{bundle.precision}-{fits}.pt2"


def _processor() -> str:
    """What the processor calls itself and its instructions, where the system says so."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = ("model name", "flags", "Features")
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


@torch.no_grad()
def _checked(bundle: Bundle, dense: Dense) -> Dense:
    """`dense`, if it scores the golden sample: all requests as one batch, and a single one."""
    sample = json.loads((bundle.folder / "golden.json").read_text())
    allowed = Tolerance(*bundle.manifest.tolerance[bundle.precision])
    batch = golden.batch_of(sample, bundle.encoder)
    logits = torch.tensor(sample["logits"])
    last = (batch.user_of_row == len(batch.user) - 1).nonzero()[:, 0]
    for rows in (torch.arange(len(batch)), last):
        part = batch.take(rows)
        user, items = bundle.model.embeddings(part.user, part.items)
        found = dense(*dense_inputs(user, items, part.user_of_row))
        of_rows = {**sample, "logits": logits[rows].tolist()}
        try:
            golden.check_scores(of_rows, bundle.model, found.float(), bundle.precision, allowed)
        except InputError as error:
            raise InputError(f"{bundle.folder}: compiled, {error}; serve without compiling") from None
    return dense

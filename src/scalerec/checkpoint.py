"""What training and serving share: weights, model configuration, Layout and encoder, in one folder written at once.

config.json           the run: data, model, training
encoder.json          schema and fitted numbers; vocabulary/*.parquet the dictionaries
layout.json           tables, groups, tasks
weights.safetensors   one key per parameter, one per embedding table
state.safetensors     optimisers and random generators, to go on training
state.json            step, position in the data, early stopping
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from scalerec import config
from scalerec.config import component
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.features.layout import Layout
from scalerec.models.base import Model, ModelConfig


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint read back, except its training state."""

    folder: Path
    run: dict[str, Any]  # the run's configuration as JSON
    encoder: Encoder
    layout: Layout
    weights: dict[str, Tensor]

    def model(self) -> Model:
        """The trained model, in evaluation mode."""
        try:
            model_config = component(self.run["model"])
        except ValueError as error:
            raise InputError(f"{self.folder}: {str(error).splitlines()[0]}") from None
        assert isinstance(model_config, ModelConfig)
        model = model_config.build(self.layout)
        try:
            model.load_state_dict(self.weights)
        except RuntimeError as error:
            named = str(error).splitlines()[1].strip() if "\n" in str(error) else str(error)
            raise InputError(f"{self.folder}: the weights are not of the model in config.json: {named[:200]}") from None
        return model.eval()

    def state(self) -> dict[str, Any]:
        """Where the training stood."""
        return json.loads((self.folder / "state.json").read_text())

    def state_tensors(self) -> dict[str, Tensor]:
        """The state of optimisers and random generators, as large as the weights or larger."""
        return load_file(self.folder / "state.safetensors")


def save(
    folder: Path, run: dict[str, Any], encoder: Encoder, layout: Layout, weights: dict[str, Tensor],
    tensors: dict[str, Tensor], state: dict[str, Any],
) -> None:  # fmt: skip
    """Write a checkpoint so that `folder`, which must be new, is either complete or not there.

    Raises:
        InputError: the disk is full; nothing half-written stays behind.
    """
    building = folder.with_name(f".building-{folder.name}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        (building / "config.json").write_text(json.dumps(run, indent=1))
        encoder.save(building)
        (building / "layout.json").write_text(layout.model_dump_json())
        for name, values in (("weights", weights), ("state", tensors)):
            # By numpy, which takes tables that are views of one tensor as they are.
            save_file({key: _array(value) for key, value in values.items()}, building / f"{name}.safetensors")
        (building / "state.json").write_text(json.dumps(state))
        to_disk(*building.rglob("*"), building)
        building.rename(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        why = "the disk is full" if full else str(error)
        raise InputError(f"{folder}: not saved, {why}; free some space and go on with --resume") from None


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint, or the best one of a run's folder; InputError when there is none or it is broken."""
    folder = best(Path(path))
    try:
        run = json.loads((folder / "config.json").read_text())
        layout = config.read(Layout, folder / "layout.json")
        weights = load_file(folder / "weights.safetensors")
    except (OSError, json.JSONDecodeError, SafetensorError) as error:
        raise InputError(f"{folder}: not a readable checkpoint ({error})") from None
    return Checkpoint(folder, run, Encoder.load(folder), layout, weights)


def best(path: Path) -> Path:
    """The folder of the checkpoint that `path` means: itself, or a run's best (else latest) one."""
    if (path / "weights.safetensors").exists():
        return path
    if (path / "best.json").exists():
        return path / "checkpoints" / json.loads((path / "best.json").read_text())["checkpoint"]
    found = saved(path)
    if not found:
        raise InputError(f"{path}: no checkpoint there; train one with `scalerec train RECIPE --out {path}`")
    if json.loads((found[-1] / "state.json").read_text()).get("step") == 0:
        raise InputError(f"{path}: nothing is trained yet; go on with `scalerec train ... --out {path} --resume`")
    return found[-1]


def saved(run_folder: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(p for p in (run_folder / "checkpoints").glob("step-*") if (p / "state.json").exists())


def write_atomically(path: Path, text: str) -> None:
    """Replace a small file at once."""
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    os.replace(temporary, path)


def _array(tensor: Tensor) -> np.ndarray:
    return np.ascontiguousarray(tensor.detach().cpu().numpy())


def to_disk(*paths: Path) -> None:
    """See files and folders on the disk, so that they survive a loss of power."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

"""What a service is given: a model with all it needs to score requests, in one folder that proves itself when read.

manifest.json         format, name, what the model does, and size and SHA-256 of every other file
config.json           the run; encoder.json, vocabulary/*.parquet, layout.json, weights.safetensors as in a checkpoint
items.parquet         the items of the training log, most popular first (`item_rows`)
vectors.safetensors   [V, D] `model.catalogue()` of models that retrieve; row r is id FIRST_ID + r of the item table
golden.json           synthetic requests and what training code made of them (`golden`)
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from pydantic import PositiveFloat
from safetensors import SafetensorError
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import Tensor

from scalerec import __version__, checkpoint, config
from scalerec.config import Config
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.features.layout import Layout
from scalerec.inference import golden
from scalerec.inference.golden import TOLERANCES, Tolerance
from scalerec.inference.precision import PRECISIONS, Precision, convert
from scalerec.inference.rows_of import item_rows
from scalerec.models.base import Model
from scalerec.models.sequential import SequentialModel

FORMAT = 1
T = TypeVar("T")


class File(Config):
    size: int
    sha256: str


class Manifest(Config):
    """What a bundle says of itself."""

    format: int
    name: str
    created: str
    scalerec: str  # the version that exported it
    ranks: bool
    retrieves: bool
    tasks: tuple[str, ...]
    fusion: dict[str, float]  # task -> exponent of its probability in the fused score
    context: dict[str, Any]  # column of the moment -> what is taken where a request does not say it
    types: dict[str, str]  # column that features read -> its type in the log
    tolerance: dict[str, tuple[PositiveFloat, PositiveFloat]]  # precision -> of layers, of scores
    files: dict[str, File]


@dataclass(frozen=True)
class Bundle:
    """A bundle read back, its model in the precision asked for."""

    folder: Path
    name: str
    version: str  # first 12 hex digits of the manifest's SHA-256
    precision: Precision
    run: dict[str, Any]  # the run's configuration as JSON
    encoder: Encoder
    layout: Layout
    model: Model  # in evaluation mode
    items: pa.Table
    context: dict[str, Any]
    fusion: dict[str, float]
    vectors: Tensor | None
    manifest: Manifest


def export(run: Path, out: Path, *, name: str | None = None, fusion: dict[str, float] | None = None) -> Bundle:
    """Write the bundle of a run's best checkpoint to `out`, which must be new and is complete or not there; read it.

    `fusion` gives exponents by task; without it the first task is the score.

    Raises:
        InputError: no checkpoint, its data are not on this machine, an unknown task in `fusion`, something at `out`, a
            full disk.
    """
    out = Path(out)
    check_new(out)
    saved = checkpoint.load(run)
    model = saved.model()
    found = item_rows(saved)
    vectors = None
    with torch.no_grad():
        if isinstance(model, SequentialModel) and model.retrieves:
            vectors = model.catalogue()
    manifest = {
        "format": FORMAT,
        "name": name or saved.run["name"],
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "scalerec": __version__,
        "ranks": model.ranks,
        "retrieves": model.retrieves,
        "tasks": saved.layout.tasks,
        "fusion": _exponents(saved.layout.tasks, fusion),
        "context": found.context,
        "types": found.types,
        "tolerance": TOLERANCES,
    }
    sample = golden.record(model, saved.encoder, found.types)

    def write(folder: Path) -> None:
        (folder / "config.json").write_text(json.dumps(saved.run, indent=1))
        saved.encoder.save(folder)
        (folder / "layout.json").write_text(saved.layout.model_dump_json())
        save_file({k: v.contiguous().numpy() for k, v in saved.weights.items()}, folder / "weights.safetensors")
        pq.write_table(found.items, folder / "items.parquet", compression="zstd")
        if vectors is not None:
            save_file({"vectors": vectors.contiguous().numpy()}, folder / "vectors.safetensors")
        (folder / "golden.json").write_text(json.dumps(sample, allow_nan=False))
        sign(folder, manifest)

    _atomically(out, write)
    return load(out)


def check_new(out: Path) -> None:
    """InputError where something lies in a new bundle's place."""
    if out.exists():
        raise InputError(f"{out}: already there; a bundle is never written over: choose another folder")


def load(folder: Path, precision: Precision = "fp32", *, verify: bool = True) -> Bundle:
    """Read a bundle; unless told not to `verify`, every file is hashed and the golden sample is scored again.

    The sample is checked in fp32, where a single changed weight shows, then in the precision asked for, with its
    tolerance.

    Raises:
        InputError: no bundle, another format, a file that is missing, cut off or changed, parts that do not belong
            together, or the first feature, weight or layer whose golden values differ.
    """
    folder = Path(folder)
    if precision not in PRECISIONS:
        raise InputError(f"precision {precision!r}: must be one of {', '.join(PRECISIONS)}")
    manifest, version = _manifest(folder)
    for name, file in manifest.files.items():
        _check_file(folder, name, file, hashed=verify)
    encoder = _read(folder, "encoder.json", lambda path: Encoder.load(folder))
    layout = config.read(Layout, folder / "layout.json")
    if encoder.layout != layout:
        raise InputError(f"{folder}: layout.json is of another schema than encoder.json: export the run again")
    run = _read(folder, "config.json", lambda path: json.loads(path.read_text()))
    model = _model(folder, run, encoder, layout)
    if (model.ranks, model.retrieves, layout.tasks) != (manifest.ranks, manifest.retrieves, manifest.tasks):
        raise InputError(f"{folder}: manifest.json is of another model than config.json: export the run again")
    items = _read(folder, "items.parquet", lambda path: pq.read_table(path))
    vectors = None
    if manifest.retrieves:
        vectors = _read(folder, "vectors.safetensors", lambda path: load_file(path)["vectors"])
    if verify:
        _prove(folder, manifest, model, encoder, vectors, "fp32")
    if precision != "fp32":
        model = convert(model, precision)
        if verify:
            _prove(folder, manifest, model, encoder, None, precision)
    return Bundle(
        folder, manifest.name, version, precision, run, encoder, layout, model, items, manifest.context,
        manifest.fusion, vectors, manifest,
    )  # fmt: skip


def sign(folder: Path, manifest: dict[str, Any]) -> None:
    """Write manifest.json over all files that lie in `folder`."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "manifest.json":
            files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "files": files}, indent=1))


# -- writing


def _exponents(tasks: tuple[str, ...], fusion: dict[str, float] | None) -> dict[str, float]:
    unknown = [task for task in fusion or {} if task not in tasks]
    if unknown:
        raise InputError(f"fusion: no task {unknown[0]!r}; there are {', '.join(tasks) or 'none'}")
    default = {task: float(fusion is None and place == 0) for place, task in enumerate(tasks)}
    return {**default, **{task: float(exponent) for task, exponent in (fusion or {}).items()}}


def _atomically(out: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder beside `out`, see it on the disk, and give it its name."""
    building = out.with_name(f".building-{out.name}-{os.getpid()}")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        write(building)
        checkpoint.to_disk(*building.rglob("*"), building)
        building.rename(out)
        checkpoint.to_disk(out.parent)
    except (OSError, SafetensorError, pa.ArrowException) as error:
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        why = "the disk is full; free some space" if full else f"{error}; mend that"
        raise InputError(f"{out}: not exported, {why} and export again") from None
    finally:
        shutil.rmtree(building, ignore_errors=True)


# -- reading


def _manifest(folder: Path) -> tuple[Manifest, str]:
    path = folder / "manifest.json"
    if not path.exists():
        raise InputError(f"{folder}: no bundle there; make one with `scalerec export RUN --out {folder}`")
    try:
        content = path.read_bytes()
        found = json.loads(content)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: not readable ({error}); export the run again") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        made = found.get("format") if isinstance(found, dict) else None
        raise InputError(f"{path}: format {made}, this scalerec reads {FORMAT}: export the run again with this version")
    manifest = config.parse(Manifest, found, str(path))
    for name in manifest.files:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise InputError(f"{path}: {name!r} lies outside the bundle")
    needed = ["config.json", "encoder.json", "layout.json", "weights.safetensors", "items.parquet", "golden.json"]
    absent = [name for name in needed if name not in manifest.files]
    if absent:
        raise InputError(f"{path}: does not list {absent[0]}; export the run again")
    stray = [p.name for p in (folder / "vocabulary").glob("*.parquet") if f"vocabulary/{p.name}" not in manifest.files]
    if stray:  # the encoder would read it
        raise InputError(f"{folder / 'vocabulary' / stray[0]}: manifest.json does not list it; remove it")
    return manifest, hashlib.sha256(content).hexdigest()[:12]


def _check_file(folder: Path, name: str, file: File, *, hashed: bool) -> None:
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path}: missing, though manifest.json lists it; export the run again")
    size = path.stat().st_size
    if size != file.size:
        raise InputError(f"{path}: {size:,} bytes where manifest.json says {file.size:,}; copy or export it again")
    if hashed and _read(folder, name, _sha256) != file.sha256:
        raise InputError(f"{path}: not what was exported (its SHA-256 differs); copy or export it again")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while piece := file.read(2**20):
            digest.update(piece)
    return digest.hexdigest()


def _read(folder: Path, name: str, read: Callable[[Path], T]) -> T:
    """What `read` makes of a file; InputError names it where it cannot be read."""
    try:
        return read(folder / name)
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError, pa.ArrowException) as error:
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{folder / name}: not readable ({line}); copy or export it again") from None


def _model(folder: Path, run: dict[str, Any], encoder: Encoder, layout: Layout) -> Model:
    weights = _read(folder, "weights.safetensors", load_file)
    try:
        return checkpoint.Checkpoint(folder, run, encoder, layout, weights).model()
    except (KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{folder}: weights, config.json and layout.json do not fit together ({reason})") from None


def _prove(
    folder: Path, manifest: Manifest, model: Model, encoder: Encoder, vectors: Tensor | None, precision: Precision
) -> None:  # fmt: skip
    """InputError unless the model scores the golden sample as training code did, and the vectors are its catalogue."""
    sample = _read(folder, "golden.json", lambda path: json.loads(path.read_text()))
    try:
        allowed = Tolerance(*manifest.tolerance[precision])
        golden.check(sample, model, encoder, precision, allowed)
        if vectors is not None:
            assert isinstance(model, SequentialModel)
            with torch.no_grad():
                want = model.catalogue()
            if vectors.shape != want.shape or not torch.allclose(vectors, want, rtol=0, atol=1e-5):
                raise InputError("vectors.safetensors is not the catalogue of the model")
    except InputError as error:
        made = f" (exported by scalerec {manifest.scalerec}, this is {__version__})"
        raise InputError(
            f"{folder}: refused, it does not score as training code did: {error}"
            f"{made if manifest.scalerec != __version__ else ''}; export the run again"
        ) from None
    except (KeyError, TypeError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{folder / 'golden.json'}: not a golden sample ({error!r}); export the run again") from None

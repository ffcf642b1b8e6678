"""Runs and bundles of the smallest world, and how to say that one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from scalerec import checkpoint
from scalerec.data.sources.parquet import Parquet
from scalerec.data.split import NoSplit
from scalerec.errors import InputError
from scalerec.features.encoder import Encoder
from scalerec.inference import bundle, precision
from scalerec.models import dcnv2, hstu, rankmixer, sasrec, two_tower
from scalerec.schema import Schema
from tests.contract.world import SCHEMA, make_world

CONFIGS = {
    "rankmixer": rankmixer.tiny(),
    "dcnv2": dcnv2.tiny(),
    "hstu_ranking": hstu.tiny().model_copy(update={"goal": "ranking"}),
    "hstu_retrieval": hstu.tiny().model_copy(update={"goal": "retrieval"}),
    "hstu_joint": hstu.tiny(),
    "sasrec": sasrec.tiny(),
    "two_tower": two_tower.tiny(),
}


def saved_run(folder: Path, config, rows: pa.RecordBatch | pa.Table, schema: Schema = SCHEMA) -> Path:
    """A checkpoint as training would leave it, of a model whose every weight matters."""
    folder.mkdir(parents=True)
    pq.write_table(pa.table(rows), folder / "log.parquet")
    (folder / "schema.json").write_text(schema.model_dump_json())
    source = Parquet(path=str(folder / "log.parquet"), schema_file=str(folder / "schema.json"), split=NoSplit())
    encoder = Encoder.fit(schema, pa.table(rows).to_batches())
    torch.manual_seed(0)
    model = config.build(encoder.layout)
    weights = {name: w + 0.05 * torch.randn_like(w) for name, w in model.state_dict().items()}
    run = {"name": "tiny", "data": source.model_dump(mode="json"), "model": config.model_dump(mode="json")}
    checkpoint.save(folder / "checkpoints" / "step-1", run, encoder, encoder.layout, weights, {"x": torch.zeros(1)}, {})
    return folder


def signed_again(folder: Path) -> Path:
    """As if it had been exported so: what is wrong with it now only the golden sample can tell."""
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"]
    bundle.sign(folder, manifest)
    return folder


def refused(folder: Path, *words: str, kind: precision.Precision = "fp32") -> None:
    with pytest.raises(InputError) as caught:
        bundle.load(folder, kind)
    message = str(caught.value)
    assert "\n" not in message and str(folder) in message
    for word in words:
        assert word in message, message


def runs_and_bundles(folder: Path) -> dict[str, tuple[Path, Path]]:
    """For each kind of model its run and its bundle."""
    rows = make_world().rows
    found = {}
    for name, config in CONFIGS.items():
        run = saved_run(folder / name, config, rows)
        found[name] = (run, bundle.export(run, folder / f"{name}.bundle").folder)
    return found

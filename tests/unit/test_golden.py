"""What departs from training code is named: a feature and its value, a weight, a layer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file, save_file

from scalerec import checkpoint
from scalerec.batch import MISSING, UNKNOWN
from scalerec.features import encoder as encoder_module
from scalerec.features.encoder import Encoder
from scalerec.inference import bundle, golden, precision
from scalerec.inference.golden_requests import CANDIDATES, USERS, from_json, golden_requests, to_json
from scalerec.models import rankmixer
from scalerec.ops import mix_norm
from scalerec.schema import Categorical, Cross, Group, Numeric, Schema
from tests.contract.world import SCHEMA, make_world
from tests.unit.bundles import CONFIGS, refused, runs_and_bundles, saved_run, signed_again


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return runs_and_bundles(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copy_of(made, tmp_path):
    """A bundle that a test may spoil."""

    def copied(name: str = "rankmixer") -> Path:
        return Path(shutil.copytree(made[name][1], tmp_path / name))

    return copied


def test_golden_requests_are_nobodys(made):
    """Special cases are all there, the rows are the same each time, and none of them is a row of the log."""
    world = make_world()
    types = {name: str(world.rows.schema.field(name).type) for name in SCHEMA.input_columns()}
    rows = golden_requests(world.encoder, types)
    assert rows.num_rows == USERS * CANDIDATES and rows.equals(golden_requests(world.encoder, types))
    assert from_json(json.loads(json.dumps(to_json(rows)))).equals(rows)
    real = {tuple(map(repr, r.values())) for r in world.rows.select(["city", "age", "income"]).to_pylist()}
    assert not real & {tuple(map(repr, r.values())) for r in rows.select(["city", "age", "income"]).to_pylist()}
    texts = set(rows.column("city").to_pylist()) - {None}
    assert all(text.startswith("golden") for text in texts)  # of a hash nothing is known, so all are made up
    batch = world.encoder.encode(rows, labels=False)
    assert len(batch.user) == USERS
    for side in (batch.user, batch.items):
        for j, feature in enumerate(world.encoder.layout.sides[side.side].ids):
            ids = set(side.ids[:, j].tolist())
            assert len(ids) > 3
            if world.encoder.schema.feature(feature.name).kind != "cross":
                assert MISSING in ids or feature.name == "user", feature.name
            if feature.name in world.encoder.vocabularies:
                assert UNKNOWN in ids, feature.name
    lengths = batch.user.lists["seen"].lengths
    assert lengths.min() == 0 and lengths.max() == 4
    assert bool(batch.user.numbers.isnan().any() and batch.items.numbers.isnan().any())


def test_golden_requests_have_the_kinds_of_columns_of_the_log():
    """Moments, dictionaries, wide texts and truth values: what the log brings can be made up too, and kept as JSON."""
    rows = make_world().rows.to_pylist()
    moments = pa.timestamp("ms")
    columns: dict[str, pa.Array] = {name: pa.array([r[name] for r in rows]) for name in rows[0]}
    columns["time"] = pa.array([int(r["time"] * 1000) for r in rows], pa.int64()).cast(moments)
    seen = [[int(t * 1000) for t in r["seen_time"]] for r in rows]
    columns["seen_time"] = pa.array(seen, pa.list_(pa.int64())).cast(pa.list_(moments))
    columns["city"] = columns["city"].dictionary_encode()
    columns["author"] = columns["author"].cast(pa.large_string())
    columns["age"] = pa.array([bool(r["age"]) for r in rows])
    log = pa.record_batch(columns)
    encoder = Encoder.fit(SCHEMA, [log])
    encoder.encode(log)
    made = golden_requests(encoder, {name: str(log.schema.field(name).type) for name in log.schema.names})
    assert pa.types.is_timestamp(made.schema.field("time").type)
    assert from_json(json.loads(json.dumps(to_json(made)))).equals(made)
    batch = encoder.encode(made, labels=False)
    assert len(batch.user) == USERS and float(batch.user.now.min()) > 1e9


# -- a skewed encoder


def test_a_cross_that_stands_first_leaves_its_columns_their_values():
    """The dictionary of a column is reached by the sample wherever in the schema a cross reads it too."""
    rows = pa.table({"user": ["u", "v"], "item": [1, 2], "kind": ["x", "y"], "city": ["a", "b"]})
    plain = (Categorical(name="item"), Categorical(name="kind"))
    item = Group(name="item", side="item", features=(Cross(name="both", of=("kind", "city"), buckets=9), *plain))
    user = Group(name="user", side="user", features=(Categorical(name="user"),))
    encoder = Encoder.fit(Schema(groups=(user, item), tasks=(), user="user", item="item", dim=8), rows.to_batches())
    made = golden_requests(encoder, {"user": "string", "item": "int64", "kind": "string", "city": "string"})
    assert {"x", "y"} <= set(made.column("kind").to_pylist())


@pytest.mark.parametrize(("name", "feature"), [("rankmixer", "item"), ("sasrec", "item"), ("dcnv2", "interests")])
@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_two_swapped_values_are_named(copy_of, name, feature, kind):
    folder = copy_of(name)
    for path in (folder / "vocabulary").iterdir():
        table = pq.read_table(path)
        if table.schema.metadata[b"feature"] == feature.encode():
            values = table.column(0).to_pylist()
            values[1], values[2] = values[2], values[1]
            pq.write_table(pa.table({"value": pa.array(values, table.schema.field(0).type)},
                                    metadata=table.schema.metadata), path)  # fmt: skip
    refused(signed_again(folder), f"feature '{feature}' departs first", "dictionary", kind=kind)


@pytest.mark.parametrize(
    ("feature", "field"), [("age", "edges"), ("views", "edges"), ("income", "mean"), ("price", "std")]
)
def test_shifted_numbers_are_named(copy_of, feature, field):
    folder = copy_of()
    fitted = json.loads((folder / "encoder.json").read_text())
    fit = fitted["numerics"][feature]
    if field == "edges":
        fit["edges"][1] = float(np.nextafter(np.float32(fit["edges"][1]), np.float32(np.inf)))  # by one step
    else:
        fit[field] *= 1.001
    (folder / "encoder.json").write_text(json.dumps(fitted))
    refused(signed_again(folder), f"feature '{feature}' departs first", "borders")


def test_other_encoding_code_is_named_with_the_value(made, monkeypatch):
    """A library that hashes otherwise, or puts a value on a border into the next bucket: the files are as they were."""
    folder = made["rankmixer"][1]
    hashed = encoder_module.HashVocabulary.ids

    def shifted(self, column, name):
        ids = hashed(self, column, name)
        return np.where(ids == 3, 4, ids)

    with monkeypatch.context() as patch:
        patch.setattr(encoder_module.HashVocabulary, "ids", shifted)
        refused(folder, "departs first", "='golden ", "' becomes 4, in training 3")
    with monkeypatch.context() as patch:
        true = encoder_module.last  # lists cut one shorter
        patch.setattr(encoder_module, "last", lambda flat, lengths, most: true(flat, lengths, most - (most == 32)))
        refused(folder, "feature 'interests' departs first")
    with monkeypatch.context() as patch:
        patch.setattr(golden, "bucket", lambda values, fit: np.searchsorted(fit.edges, values, side="right") + 3)
        refused(folder, "feature 'age' departs first", "borders")


def test_a_bundle_of_another_schema_is_refused(copy_of, tmp_path):
    rows = make_world().rows
    figures = Group(name="figures", side="item", features=(Numeric(name="price", encoding="linear", log=False, dim=3),))
    other = SCHEMA.model_copy(update={"groups": (*SCHEMA.groups[:3], figures)})
    run = saved_run(tmp_path / "other", rankmixer.tiny(), rows, other)
    theirs = bundle.export(run, tmp_path / "other.bundle").folder
    folder = copy_of()
    shutil.copy(theirs / "encoder.json", folder)
    refused(signed_again(folder), "another schema")
    shutil.copy(theirs / "layout.json", folder)
    refused(signed_again(folder), "embeddings.tables.views")
    shutil.copy(theirs / "weights.safetensors", folder)
    refused(signed_again(folder), "refused")  # all fits, and the golden sample is of the other one


# -- changed weights and code


@pytest.mark.parametrize("name", CONFIGS)
def test_a_changed_weight_is_named(copy_of, name):
    """Any weight, by one step of its last bit, even of a row that no request reads."""
    folder = copy_of(name)
    weights = load_file(folder / "weights.safetensors")
    key = sorted(key for key, value in weights.items() if value.size)[-1 if name != "dcnv2" else 0]
    flat = weights[key].reshape(-1)
    flat[-1] = np.nextafter(flat[-1], np.float32(9))
    save_file(weights, folder / "weights.safetensors")
    refused(signed_again(folder), f"weight '{key}' departs first")


def test_layers_whose_code_changed_are_named(made, monkeypatch):
    """GELU by its approximation is an error of 1e-4: far below what one would see in AUC."""
    gelu = torch.nn.functional.gelu
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.functional, "gelu", lambda x: gelu(x, approximate="tanh"))
        refused(made["rankmixer"][1], "layer 'blocks.0.ffn' departs first")
        refused(made["hstu_joint"][1], "layer 'heads' departs first")
    with monkeypatch.context() as patch:
        patch.setattr(rankmixer, "mix_add_norm", lambda x, *norm: mix_norm.mix_add_norm(x.flip(1), *norm))
        refused(made["rankmixer"][1], "layer 'blocks.0.mixed_norm' departs first")
    with monkeypatch.context() as patch:
        true = torch.nn.functional.normalize
        patch.setattr(torch.nn.functional, "normalize", lambda x, **options: true(x, **options) * 1.001)
        refused(made["hstu_retrieval"][1], "layer 'catalogue' departs first")


def test_embeddings_of_a_feature_are_named(made, monkeypatch):
    collection = type(checkpoint.load(made["dcnv2"][0]).model().embeddings)
    true = collection.assemble

    def swapped(self, rows, vectors):
        found = true(self, rows, vectors)
        if rows.side == "item":
            found.flat[:, :2] = found.flat[:, :2].flip(1)
        return found

    monkeypatch.setattr(collection, "assemble", swapped)
    refused(made["dcnv2"][1], "layer 'embedding of item' departs first")


@pytest.mark.parametrize("name", ["rankmixer", "hstu_joint"])
def test_a_wrong_conversion_is_named(made, monkeypatch, name):
    """Scales of the neighbouring channel, and a table that is off by a row: seen in int8, fp32 being right."""
    folder = made[name][1]
    with monkeypatch.context() as patch:
        true = precision.Weight8._blocks
        patch.setattr(precision.Weight8, "_blocks", lambda self, x, q, scale: true(self, x, q, scale.roll(1) * 1.2))
        refused(folder, "layer '", "int8", kind="int8")
        bundle.load(folder)
    with monkeypatch.context() as patch:
        looked_up = precision.Rows8.forward
        patch.setattr(precision.Rows8, "forward", lambda self, ids: looked_up(self, (ids - 1).clamp(min=0)))
        refused(folder, "layer 'embedding of ", kind="int8")


def test_vectors_of_another_model_are_refused(copy_of):
    folder = copy_of("sasrec")
    vectors = load_file(folder / "vectors.safetensors")["vectors"]
    save_file({"vectors": np.ascontiguousarray(vectors[::-1])}, folder / "vectors.safetensors")
    refused(signed_again(folder), "vectors.safetensors is not the catalogue")


def test_sketches_measure_distances():
    torch.manual_seed(0)
    x, e = torch.randn(64, 30), torch.randn(64, 30)
    want = golden.sketch(x)
    for size in (1e-6, 1e-3, 0.1):
        true = size * float(e.double().norm() / x.double().norm())
        assert golden.departure(golden.sketch(x.double() + size * e.double()), want) == pytest.approx(true, rel=0.6)
    assert golden.departure(golden.sketch(x[torch.randperm(64)]), want) > 0.5
    assert golden.departure(golden.sketch(x * float("nan")), want) == float("inf")

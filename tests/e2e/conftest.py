"""A small log of a shop that nobody has seen before, and a cache of its own for every test session."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalerec.cli import main

ROWS = 3_000


def shop(seed: int = 0, rows: int = ROWS, first_item: int = 0) -> pa.Table:
    """Users, items with a price that matters, text, lists, a click."""
    random = np.random.default_rng(seed)
    user = random.integers(0, 200, rows)
    item = random.integers(first_item, first_item + 100, rows)
    price = (item * 37 % 100) / 10 + random.random(rows)
    taste = (user % 5 == item % 5) * 1.5 - 0.2 * price
    return pa.table(
        {
            "user_id": user,
            "city": [("Ulm", "Bonn", "Jena")[u % 3] for u in user],
            "item_id": item,
            "price": price,
            "colours": [["red", "green", "blue"][: i % 4] for i in item],
            "shown_at": 1_700_000_000 + np.arange(rows) * 60,
            "is_click": (random.random(rows) < 1 / (1 + np.exp(-taste))).astype(np.int8),
        }
    )


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "shop.parquet"
    pq.write_table(shop(), path, row_group_size=500)
    return path


@pytest.fixture
def schema_file(log, tmp_path):
    path = tmp_path / "schema.json"
    assert main(["schema", "infer", str(log), "--out", str(path)]) == 0
    return path


@pytest.fixture
def train(log, schema_file, tmp_path):
    """Train a tiny model on the shop with more options; returns the exit code."""

    def run(*more: str, out: str = "run", data=log, schema=schema_file, recipe: str = "dlrm_mlp_parquet") -> int:
        options = ["--data.path", str(data), "--data.schema_file", str(schema), "--training.tensorboard", "false"]
        sizes = [] if recipe != "dlrm_mlp_parquet" else ["--model.hidden", "[16]"]
        return main(["train", recipe, "--out", str(tmp_path / out), "--quiet", *options, *sizes, *more])

    return run


@pytest.fixture
def edit(schema_file, tmp_path):
    """Change the inferred schema as a person would, and give the new file."""

    def change(how) -> str:
        schema = json.loads(schema_file.read_text())
        how(schema)
        path = tmp_path / "edited.json"
        path.write_text(json.dumps(schema))
        return str(path)

    return change

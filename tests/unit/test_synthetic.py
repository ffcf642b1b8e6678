"""The synthetic teachers: their difficulty is known, and they never change."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalerec.data.source import Source
from scalerec.data.sources import synthetic
from scalerec.data.sources.synthetic import Synthetic


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SCALEREC_DATA", str(tmp_path / "data"))


def prepared(source: Source) -> pa.Table:
    table = pa.concat_tables(pq.read_table(file) for file in source.prepare().files)
    schema = source.schema()
    assert schema.time is not None
    assert set(schema.input_columns() + schema.label_columns() + [schema.time]) <= set(table.column_names)
    return table


GOLDEN = {  # sha256 of the labels (int8, click and like) of the first 1,000 rows of 20,000, seed 0
    "grouped": "ed82635c71c4c0e443cedb95fe199ec66ed68c6b2cf9a5ae84019b90a4dde1c9",
    "flat": "a610b12eaf8cf94522ab07c85b793997e577f5340e16ee86b65cd46be6cf2312",
}


@pytest.mark.parametrize("teacher", ["grouped", "flat"])
def test_synthetic_has_the_promised_difficulty_and_never_changes(teacher: Any) -> None:
    source = Synthetic(rows=20_000, teacher=teacher)
    table, notes = prepared(source), source.prepare().notes
    for task in synthetic.TASKS:
        assert 0.80 <= notes["bayes_auc"][task] <= 0.85
        assert 0.27 <= notes["base_rate"][task] <= 0.33
        probability, label = table[f"p_{task}"].to_numpy(), table[task].to_numpy()
        assert abs(probability.mean() - label.mean()) < 0.01
        assert f"p_{task}" not in source.schema().input_columns()
    labels = np.stack([table[task].to_numpy()[:1_000] for task in synthetic.TASKS], 1)
    assert hashlib.sha256(np.ascontiguousarray(labels).tobytes()).hexdigest() == GOLDEN[teacher]
    share = notes["rows_whose_value_occurs_20_times"]
    assert sum(value > 0.7 for value in share.values()) >= 24, share


@pytest.mark.parametrize("teacher", ["grouped", "flat"])
def test_synthetic_histories_are_those_the_teacher_used(teacher: Any) -> None:
    source = Synthetic(rows=4_000, teacher=teacher, seed=5)
    rows = prepared(source).to_pylist()
    world = synthetic.World.draw(4_000, 5)
    truth = synthetic.Teacher.draw(teacher, world, 5)
    fixed = truth.fixed(world.values(slice(None)))
    past: dict[int, list[int]] = {}
    item = synthetic.FIELDS[synthetic.ITEM]
    for i, row in enumerate(rows):
        mine = past.setdefault(row["user"], [])
        assert row[f"clicked_{item}"] == mine[-synthetic.HISTORY :]
        told = sum(truth.items[j] for j in row[f"clicked_{item}"]) / (len(row[f"clicked_{item}"]) + synthetic.DOUBT)
        logit = fixed[i] + (truth.taste[:, row["user"]] * told).sum(1)
        assert [row["p_click"], row["p_like"]] == pytest.approx(1 / (1 + np.exp(-logit)))
        if row["click"]:
            mine.append(row[item])
    assert any(len(items) > synthetic.HISTORY for items in past.values())


def test_synthetic_entities_keep_their_fields() -> None:
    table = prepared(Synthetic(rows=2_000))
    of_user = {
        (row["user"], *(row[name] for name in synthetic.FIELDS[: synthetic.USER_FIELDS])) for row in table.to_pylist()
    }
    of_item = {tuple(row[name] for name in synthetic.FIELDS[synthetic.ITEM_FIELDS]) for row in table.to_pylist()}
    assert len(of_user) == len({user for user, *_ in of_user})
    assert len(of_item) == len({item for item, *_ in of_item})


def test_synthetic_seeds_and_teachers_differ() -> None:
    first, again, flat = (
        prepared(s)
        for s in (Synthetic(rows=2_000), Synthetic(rows=2_000, seed=1), Synthetic(rows=2_000, teacher="flat"))
    )
    assert first["user_a_0"] != again["user_a_0"]
    assert first["user_a_0"] == flat["user_a_0"]
    assert first["click"] != flat["click"]

"""The stream of new items: what exists when, how many categories a sequence has, and that it never changes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from scalerec.config import component
from scalerec.data.reader import ParquetRows, check_parts, count_parts
from scalerec.data.sources.dirichlet import Dirichlet
from scalerec.data.sources.sequences import Sequences

SMALL = Dirichlet(items=500, categories=10, sequences=2_000, length=32)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))


def test_only_items_that_exist_are_drawn() -> None:
    t, items = SMALL.draw()
    assert t[0] == 0 and t[-1] == 1 and np.allclose(np.diff(t), t[1])
    assert (items.max(1) < (0.4 + 0.6 * t) * SMALL.items).all()
    assert items[:100].max() < 0.4 * SMALL.items + 15
    assert len(np.unique(items[-200:])) > 0.95 * SMALL.items, "at the end nearly all are drawn"
    assert len(np.unique(items[:200])) > 0.95 * 0.4 * SMALL.items


def test_a_sequence_has_up_to_five_categories() -> None:
    categories = [len(np.unique(row)) for row in SMALL.draw()[1] % SMALL.categories]
    assert set(categories) == {1, 2, 3, 4, 5}
    # as many are possible with probability 1/5 each; with 32 events most of them come
    assert 300 < categories.count(1) < 600
    few = Dirichlet(items=500, categories=2, sequences=50, length=32).draw()[1] % 2
    assert {len(np.unique(row)) for row in few} == {1, 2}


def test_items_of_a_category_are_drawn_alike() -> None:
    _, items = Dirichlet(items=100, categories=4, sequences=4_000, length=8).draw()
    early = np.bincount(items[:200].reshape(-1), minlength=100)
    assert early[:40].min() > 0 and early[70:].sum() == 0
    late = np.bincount(items[-500:].reshape(-1), minlength=100)
    assert late[:90].min() > 15 and late.max() < 80  # 40 on average


def test_categories_repeat_as_often_as_in_a_dirichlet_process() -> None:
    source = Dirichlet(items=1_000, categories=10, sequences=20_000, length=64)
    categories = source.draw()[1] % source.categories
    same = (categories[:, 1:] == categories[:, :-1]).mean(0)
    # P(two equal) under the prior alone: E[sum H_c^2] = E[2 / (k + 1)] for a flat Dirichlet of k in 1..5 categories
    prior = np.mean([2 / (k + 1) for k in range(1, 6)])
    # Events are exchangeable (Blackwell and MacQueen): any two are one draw with E[1 / (1 + a)], a ~ U(1, 500).
    tie = np.log(501 / 2) / 499
    assert same.mean() == pytest.approx(prior + (1 - prior) * tie, abs=0.006)
    assert same[:8].mean() == pytest.approx(same[-8:].mean(), abs=0.006)


def test_draws_are_frozen_by_the_seed() -> None:
    items = SMALL.draw()[1]
    assert np.array_equal(items, SMALL.draw()[1])
    assert not np.array_equal(items, SMALL.model_copy(update={"seed": 1}).draw()[1])
    digest = hashlib.sha256(np.ascontiguousarray(items.astype("<i8")).tobytes()).hexdigest()
    assert digest[:16] == "ccccf4baae53f27e"


def test_the_log_serves_sequences_without_tasks() -> None:
    source = Dirichlet(items=100, categories=4, sequences=200, length=16)
    prepared = source.prepare()
    log = pa.concat_tables(pq.read_table(file) for file in prepared.files)
    assert np.array_equal(log["item"].to_numpy().reshape(200, 16), source.draw()[1])
    assert log["second"].to_pylist()[:17] == [*range(16), 0]
    schema = source.schema()
    check_parts(count_parts(ParquetRows.of(source, prepared), schema), schema)
    for protocol, rows in (("public", (200, 200, 200)), ("validated", (200, 200, 200)), ("time", (170, 160, 320))):
        sequences = Sequences(of=source, protocol=protocol)
        parts = count_parts(ParquetRows.of(sequences, sequences.prepare()), sequences.schema())
        check_parts(parts, sequences.schema())
        assert tuple(counts.rows for counts in parts.values()) == rows
        assert sequences.schema().sequences[0].actions == ()
    found = {row["sequence"]: row for row in pq.read_table(sequences.prepare().files[0]).to_pylist()}
    assert found[0]["new_events"] == 15
    assert [*found[0]["events_item"], found[0]["item"]] == source.draw()[1][0].tolist()


def test_it_survives_json() -> None:
    assert component(json.loads(SMALL.model_dump_json())) == SMALL


def test_too_many_categories_are_refused() -> None:
    with pytest.raises(ValidationError, match="41 are too many for the 40 items at the start"):
        Dirichlet(items=100, categories=41)

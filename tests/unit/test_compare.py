"""Runs are compared on the same rows, whether they read a log row by row or as sequences."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from scalerec.data.source import Source
from scalerec.data.sources.sequences import Sequences
from scalerec.data.sources.synthetic import Synthetic
from scalerec.errors import InputError
from scalerec.evaluate import NEXT, Predictions
from scalerec.features.layout import Layout
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.models.hstu import HSTUConfig
from scalerec.models.sasrec import SASRecConfig
from scalerec.studies.commands import Folding
from scalerec.studies.compare import _difference, compare
from scalerec.training.log import Log
from scalerec.training.run import Run, TrainingConfig

LOG = Synthetic(rows=2_000)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def run(name: str, data: Source) -> Run:
    training = TrainingConfig(tensorboard=False, threads=1)
    return Run(name=name, data=data, model=DLRMMLPConfig(hidden=(8,)), training=training)


def test_a_log_and_its_sequences_are_compared_row_by_row(tmp_path: Path) -> None:
    ranking, sequences = run("ranking", LOG), run("sequences", Sequences(of=LOG, max_len=20))
    shorter = run("shorter", Sequences(of=LOG, max_len=5, fields=("item_a_1",)))
    found = compare([ranking, sequences, shorter], tmp_path, seeds=1, replicates=20)
    assert found["test_rows"] == 400
    written_report = (tmp_path / "report.md").read_text()
    assert ", 1 seed. Differences" in written_report and "intervals over users alone;" in written_report
    assert "±" not in written_report, "one seed has no spread"
    test = LOG.prepare().files
    labels = pa.concat_tables(pq.read_table(file, columns=["click"]) for file in test)["click"].to_pylist()[1_600:]
    assert found["best_reachable"]["click"]["auc"] > 0.7
    for entry in (model["tasks"]["click"]["auc"] for model in found["models"][1:]):
        assert entry["low"] <= entry["difference"] <= entry["high"]
    written = {name: pq.read_table(tmp_path / name / "seed-0/test.parquet") for name in ("ranking", "sequences")}
    for table in written.values():
        table = table.sort_by("row")
        assert table["row"].to_pylist() == list(range(1_600, 2_000))
        assert table["click_label"].to_pylist() == labels
    # The order of the rows decides nothing.
    turned = compare([sequences, ranking], tmp_path, seeds=1, replicates=20)
    one, other = (c["models"][1]["tasks"]["click"]["auc"]["difference"] for c in (turned, found))
    assert one == pytest.approx(-other, abs=0.02)
    assert turned["best_reachable"]["click"]["auc"] == pytest.approx(found["best_reachable"]["click"]["auc"])

    table = written["sequences"]
    for column, words in (("user", "users"), ("click_label", "labels"), ("row", "row numbers")):
        changed = pa.array([value + 1 if column != "click_label" else 1 - value for value in table[column].to_pylist()])
        broken = table.set_column(table.column_names.index(column), column, changed.cast(table[column].type))
        pq.write_table(broken, tmp_path / "sequences/seed-0/test.parquet")
        with pytest.raises(InputError, match=f"sequences and ranking were not tested on the same rows: their {words}"):
            compare([ranking, sequences], tmp_path, seeds=1, replicates=20)


def test_names_in_printed_tables_are_whole() -> None:
    names = [f"recipe_of_a_long_name+model.layers={number}" for number in (1, 2)]
    table = "| model | AUC | difference | NE | difference |\n|---|---:|---|---:|---|\n"
    table += "".join(f"| {name} | 0.7123 ± 0.0012 | +0.12 [-0.34, +0.58] | 0.91 | +0.1 |\n" for name in names)
    console = Console(width=60, record=True, file=io.StringIO())
    console.print(Folding(table))
    rows = [line[1:60].split("  ")[0].strip() for line in console.export_text().splitlines()]
    assert all(name in "".join(rows) for name in names)


def test_long_lines_of_progress_are_not_wrapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    option = "no --data.split: taking '" + json.dumps({"kind": "time", "validation": 1_700_162_000.0} | {"x": "y" * 99})
    said = io.StringIO()
    log = Log(tmp_path)
    log.console = Console(width=40, file=said)
    log.say(option)
    assert said.getvalue() == option + "\n"
    source = Synthetic(rows=2_000)

    def prepare(self: Source, progress: Any = print) -> Any:
        progress(option)
        raise InputError("enough")

    monkeypatch.setattr(Synthetic, "prepare", prepare)
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(InputError, match="enough"), contextlib.redirect_stderr(said):
        compare([run("ranking", source)], tmp_path)
    assert said.getvalue() == (option + "\n") * 2


def test_runs_that_are_not_tested_on_the_same_rows_are_refused(tmp_path: Path) -> None:
    other = LOG.model_copy(update={"seed": 1})
    split = LOG.split.model_copy(update={"test": 900_000_000})
    data = [
        LOG, other, LOG.model_copy(update={"split": split}), Sequences(of=LOG, protocol="public"),
        Sequences(of=LOG, protocol="validated"), Sequences(of=other),
    ]  # fmt: skip
    for one, another in itertools.combinations(data[:5], 2):
        with pytest.raises(InputError, match="read different data"):
            compare([run("one", one), run("another", another)], tmp_path)
    with pytest.raises(InputError, match="read different data"):
        compare([run("one", LOG), run("another", data[5])], tmp_path)
    assert Sequences(of=LOG, protocol="public", max_len=3).paired_with() == data[3].paired_with()


def test_retrievers_are_compared_by_where_they_put_the_item(tmp_path: Path) -> None:
    data = Sequences(of=LOG, max_len=20, protocol="public")
    training = TrainingConfig(tensorboard=False, threads=1, select="last")
    runs = [
        Run(name=config.kind, data=data, model=config, training=training, dim=8)
        for config in (HSTUConfig(dim=8, qk_dim=8, v_dim=8), SASRecConfig(dim=8))
    ]
    found = compare(runs, tmp_path, seeds=2, replicates=20)
    assert list(found["tasks"]) == ["next"]
    entry = found["models"][1]["tasks"]["next"]["hr@50"]
    places = {run.name: [pq.read_table(tmp_path / run.name / f"seed-{s}/test.parquet") for s in (0, 1)] for run in runs}
    hits = {
        name: [pc.mean(pc.less_equal(t["next_place"], 50)).as_py() for t in tables] for name, tables in places.items()
    }
    assert entry["values"] == pytest.approx(hits["sasrec"])
    assert entry["low"] <= entry["difference"] <= entry["high"]
    assert sum(hits["sasrec"]) / 2 - sum(hits["hstu"]) / 2 == pytest.approx(entry["difference"], abs=0.02)
    told = (tmp_path / "report.md").read_text()
    assert "| model | HR@10 |" in told and ", 2 seeds. Differences" in told and " ± " in told
    assert (tmp_path / "report.png").exists()


@pytest.mark.parametrize("task", ["click", NEXT])
def test_one_user_has_no_interval(task: str) -> None:
    """The report comes after all trainings: it must not fail for want of users to draw from."""
    ones = np.ones((4, 1))
    only = [Predictions(ones / 2, np.array([[0.0], [1], [0], [1]]), ones, np.zeros(4, int), np.arange(4), ones)]
    assert _difference(only, only, task, 0, "hr@10" if task == NEXT else "auc", 10) is None


def test_retrievers_of_different_events_are_refused(tmp_path: Path) -> None:
    data = Sequences(of=LOG, max_len=20, protocol="public")
    training = TrainingConfig(tensorboard=False, threads=1, select="last")
    size: dict[str, int] = {"dim": 8, "qk_dim": 8, "v_dim": 8}
    clicked, everything = HSTUConfig(positive="click", **size), SASRecConfig(dim=8)
    ranker = HSTUConfig(goal="ranking", positive="click", **size)
    named = {"clicked": clicked, "everything": everything, "ranker": ranker}
    runs = {name: Run(name=name, data=data, model=config, training=training, dim=8) for name, config in named.items()}
    expected = "everything is to retrieve all events and clicked those with 'click': give both the same"
    with pytest.raises(InputError, match=expected) as raised:
        compare([runs["ranker"], runs["clicked"], runs["everything"]], tmp_path)
    assert "\n" not in str(raised.value) and not list(tmp_path.iterdir()), "refused before anything is trained"
    found = compare([runs["ranker"], runs["everything"]], tmp_path, seeds=1, replicates=5)
    assert [set(model["tasks"]) for model in found["models"]] == [{"click", "like"}, {"next"}]


def test_a_ranker_without_tasks_is_refused() -> None:
    with pytest.raises(InputError, match="ranks by tasks"):
        DLRMMLPConfig().build(Layout(tables=(), groups=(), tasks=()))

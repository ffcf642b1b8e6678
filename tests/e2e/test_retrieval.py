"""What retrieves, what does both, and a log without tasks, through every command; and killed trainings go on."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from benchmarks.resume import killed, losses, outcome
from scalerec import checkpoint
from scalerec.cli import main
from scalerec.data.source import Source
from scalerec.data.sources.dirichlet import Dirichlet
from scalerec.data.sources.parquet import Parquet
from scalerec.data.sources.sequences import Sequences
from scalerec.models.hstu import HSTUConfig
from scalerec.models.sasrec import SASRecConfig
from scalerec.training.run import Run
from scalerec.training.warm_start import transfer
from tests.e2e.conftest import shop

HSTU: dict[str, Any] = {"dim": 8, "qk_dim": 8, "v_dim": 8}
RETRIEVER, SASREC = HSTUConfig(**HSTU), SASRecConfig(dim=8)
JOINT = HSTUConfig(**HSTU, goal="joint", actions="interleaved")
LISTENING = Dirichlet(items=50, categories=5, sequences=100, length=8)
STREAM = Sequences(of=LISTENING, protocol="validated", max_len=8, fields=("category",))
TABLE = "embeddings.tables.item_id"


@pytest.fixture
def lives(log: Path, schema_file: Path) -> Sequences:
    """The shop's log as one life for each user."""
    of = Parquet(path=str(log), schema_file=str(schema_file))
    return Sequences(of=of, protocol="validated", max_len=20, context=("user_id", "city"), auxiliary=("city",))


@pytest.fixture
def file_of(tmp_path: Path) -> Callable[..., str]:
    """The file of a tiny run."""

    def write(name: str, data: Source, model: Any, **training: Any) -> str:
        select = "auc" if model is JOINT else "ndcg@10"
        options = {"tensorboard": False, "threads": 1, "batch_size": 32, "select": select, **training}
        path = tmp_path / f"{name}.json"
        run = Run.model_validate({"name": name, "data": data, "model": model, "training": options, "dim": 8})
        path.write_text(run.model_dump_json())
        return str(path)

    return write


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., Any]:
    """What a command prints, by --json as it is."""

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        assert main(list(arguments)) == 0
        printed = capsys.readouterr().out
        return json.loads(printed.splitlines()[-1]) if "--json" in arguments else printed

    return run


@pytest.fixture
def complaint(capsys: pytest.CaptureFixture[str]) -> Callable[..., None]:
    def check(arguments: list[str], *words: str) -> None:
        assert main(arguments) == 2
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert line.startswith("scalerec: ") and all(word in line for word in words), line

    return check


def check_evaluation(said: Callable[..., Any], folder: Path, tables: set[str], by: str) -> None:
    """The test rows as training measured them, intervals around, and slices that add up."""
    (found,) = said("evaluate", str(folder), "--json").values()
    assert set(found) == tables
    of_next, measured = found["next"], json.loads((folder / "metrics.json").read_text())["test"]
    for task, metrics in measured.items():
        assert {name: found[task][name] for name in metrics} == pytest.approx(metrics, nan_ok=True)
    for metric in ("hr@10", "ndcg@10"):
        assert of_next[f"{metric}_low"] < of_next[metric] < of_next[f"{metric}_high"]
    assert "hr@10_low" in said("evaluate", str(folder))
    slices = said("evaluate", str(folder), "--by", by, "--json")
    assert len(slices) > 1 and all(set(of_value) == tables for of_value in slices.values())
    assert sum(of_value["next"]["n"] for of_value in slices.values()) == of_next["n"]
    weighted = sum(of_value["next"]["hr@10"] * of_value["next"]["n"] for of_value in slices.values())
    assert weighted == pytest.approx(of_next["hr@10"] * of_next["n"])
    assert f"{by} = {next(iter(slices))}" in said("evaluate", str(folder), "--by", by)
    for value, of_value in said("evaluate", str(folder), "--by", "cold_item", "--json").items():
        assert value in ("known", "new")
        assert value == "known" or of_value["next"]["hr@500"] == 0, "what is not in the catalogue cannot be found"


def test_a_model_that_retrieves(lives, file_of, said, complaint, tmp_path):
    run, folder = file_of("retriever", lives, RETRIEVER), tmp_path / "run"
    assert "ndcg@10" in said("train", run, "--out", str(folder), "--quiet")
    check_evaluation(said, folder, {"next"}, by="city")
    assert set(said("evaluate", str(folder), "--by", "cold_user", "--json")) == {"known"}
    complaint(["evaluate", str(folder), "--keep-rate", "0.5"], "--keep-rate 0.5", "only retrieves")
    rows = lives.prepare().files[0]
    out = tmp_path / "new" / "scored.parquet"
    complaint(["predict", str(folder), str(rows), "--out", str(out)], "only retrieves", "evaluate", "joint")
    assert not out.parent.exists()
    assert said("describe", run, "--json")["sequences"]["saving"] > 1
    assert "times as many" in said("describe", run)


def test_a_model_that_does_both(lives, file_of, said, tmp_path):
    run, folder = file_of("joint", lives, JOINT), tmp_path / "run"
    printed = said("train", run, "--out", str(folder), "--quiet")
    assert "uauc" in printed and "ndcg@10" in printed
    check_evaluation(said, folder, {"click", "next"}, by="city")
    (corrected,) = said("evaluate", str(folder), "--keep-rate", "0.5", "--json").values()
    assert corrected["click"]["calibration"] < said("evaluate", str(folder), "--json")["test"]["click"]["calibration"]
    rows, out = lives.prepare().files[0], tmp_path / "scored.parquet"
    assert "rows with scores" in said("predict", str(folder), str(rows), "--out", str(out))
    scored, test = pq.read_table(out), pq.read_table(folder / "test.parquet")
    assert [name for name in scored.column_names if name.startswith("score_")] == ["score_click"]
    scores = dict(zip(scored["row"].to_pylist(), scored["score_click"].to_pylist()))
    expected = [scores[row] for row in test["row"].to_pylist()]
    np.testing.assert_allclose(test["click_score"].to_numpy(), expected, atol=1e-5)
    assert said("describe", run, "--json")["sequences"]["saving"] > 1


def test_a_log_without_tasks(file_of, said, complaint, tmp_path):
    run, folder = file_of("stream", STREAM, SASREC), tmp_path / "run"
    assert "ndcg@10" in said("train", run, "--out", str(folder), "--quiet")
    check_evaluation(said, folder, {"next"}, by="category")
    complaint(["evaluate", str(folder), "--by", "cold_user"], "--by cold_user", "'sequence'")
    complaint(["evaluate", str(folder), "--keep-rate", "0.5"], "only retrieves")
    rows, out = STREAM.prepare().files[0], tmp_path / "scored.parquet"
    complaint(["predict", str(folder), str(rows), "--out", str(out)], "only retrieves")
    assert not out.exists()
    assert said("describe", run, "--json")["sequences"]["targets"] == 100 * 5, "8 events, 2 held out, the first asked"
    other = file_of("other", STREAM, RETRIEVER)
    compare = ["compare", run, other, "--seeds", "1", "--out", str(tmp_path / "compare")]
    complaint([*compare, "--reference"], "--reference", "without any")
    assert not (tmp_path / "compare").exists()
    found = said(*compare, "--json")
    assert list(found["tasks"]) == ["next"] and found["models"][1]["tasks"]["next"]["hr@10"]["low"] <= 1
    assert "## next" in (tmp_path / "compare/report.md").read_text()


def test_both_kinds_are_compared(lives, file_of, said, tmp_path):
    files = [file_of("joint", lives, JOINT), file_of("retriever", lives, RETRIEVER)]
    found = said("compare", *files, "--seeds", "1", "--reference", "--out", str(tmp_path / "c"), "--json")
    kinds = {model["name"]: set(model["tasks"]) for model in found["models"]}
    assert kinds == {"joint": {"click", "next"}, "retriever": {"next"}, "lightgbm": {"click"}}
    entries = [found["models"][1]["tasks"]["next"]["ndcg@10"], found["models"][2]["tasks"]["click"]["auc"]]
    assert all(entry["low"] <= entry["difference"] <= entry["high"] for entry in entries)


def test_new_items_of_a_retriever_do_not_start_at_zero(lives, file_of, tmp_path):
    """Every item of its log is known, so the unknown one never learned; as zeros, new ones would have no direction."""
    pq.write_table(pa.concat_tables([shop(2, 1_500), shop(3, 1_500, first_item=50)]), tmp_path / "later.parquet")
    of = Parquet(path=str(tmp_path / "later.parquet"), schema_file=lives.of.schema_file)
    later = lives.model_copy(update={"of": of})
    assert main(["train", file_of("old", lives, RETRIEVER), "--out", str(tmp_path / "old"), "--quiet"]) == 0
    still = ["--training.optimizer.lr", "0", "--training.optimizer.embedding_lr", "0", "--quiet"]
    warm = ["--warm-start", str(tmp_path / "old"), *still]
    assert main(["train", file_of("new", later, RETRIEVER), "--out", str(tmp_path / "new"), *warm]) == 0
    old, new = checkpoint.load(tmp_path / "old"), checkpoint.load(tmp_path / "new")
    before, after = old.weights[TABLE], new.weights[TABLE]
    assert not before[1].any() and after[: len(before)].equal(before)
    fresh = after[len(before) :]
    assert len(fresh) > 40 and 0.01 < fresh.std() < 0.03 and fresh.norm(dim=1).min() > 0.01

    known = before.clone()
    known[1] = 0.5
    model = new.model()
    transfer(replace(old, weights={**old.weights, TABLE: known}), model)
    assert (model.state_dict()[TABLE][len(before) :] == 0.5).all(), "what was learned of the unknown comes first"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["hstu", "sasrec"])
def test_kill_and_resume_is_bit_identical(kind, lives, file_of, tmp_path):
    training: dict[str, Any] = {
        "epochs": 4, "batch_size": 16, "log_every": 1, "save_every": 10, "window_rows": 64, "evaluate_every": 20,
        "select": "ndcg@10", "stochastic_length": {"alpha": 1.5}, "negatives": {"count": 4},
        "optimizer": {"dense": "adamw", "embedding": "rowwise_adamw"},
    }  # fmt: skip
    model = JOINT if kind == "hstu" else SASREC
    file = file_of(kind, lives, model.model_copy(update={"dropout": 0.2}), **training)

    def command(folder: Path, *more: str) -> list[str]:
        return [sys.executable, "-m", "scalerec", "train", file, "--out", str(folder), *more]

    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(["train", file, "--out", str(whole), "--quiet"]) == 0
    seen, resumed = killed(cut, 22, environment, command)
    assert 0 < resumed <= seen < losses(whole)[-1]["step"]
    assert outcome(cut) == outcome(whole)

"""Every mistake gets one line that says what, where and what to do, exit code 2, and nothing half-written."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from scalerec import checkpoint
from scalerec.cli import main
from scalerec.errors import InputError
from tests.e2e.conftest import shop


@pytest.fixture
def complaint(capsys):
    def check(code: int, *words: str) -> None:
        line = capsys.readouterr().err.strip().splitlines()[-1]
        assert code == 2, line
        assert line.startswith("scalerec: ")
        for word in words:
            assert word in line, line

    return check


def changed(log, **columns):
    table = pq.read_table(log)
    for name, values in columns.items():
        values = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
        table = table.set_column(table.column_names.index(name), name, values)
    pq.write_table(table, log, row_group_size=500)


def test_missing_column(train, log, complaint, tmp_path):
    pq.write_table(pq.read_table(log).drop_columns(["price"]), log)
    complaint(train(), "shop.parquet", "no column 'price'")
    assert not (tmp_path / "run/checkpoints").exists()


def test_wrong_type(train, log, complaint):
    changed(log, price=[f"{i} euro" for i in range(3_000)])
    complaint(train(), "'price'", "not a number")


def test_label_outside_zero_and_one(train, log, complaint):
    labels = pq.read_table(log)["is_click"].to_numpy().copy()
    labels[1_234] = 3
    changed(log, is_click=labels)
    complaint(train(), "shop.parquet", "row 1234", "'is_click' is 3", "0 or 1")


def test_one_class_in_validation(train, log, complaint, tmp_path):
    split = {
        "kind": "time",
        "column": "shown_at",
        "validation": 1_700_000_000 + 60 * 2_400,
        "test": 1_700_000_000 + 60 * 2_700,
    }
    labels = pq.read_table(log)["is_click"].to_numpy().copy()
    labels[2_400:2_700] = 0
    changed(log, is_click=labels)
    complaint(train("--data.split", json.dumps(split)), "'click'", "validation", "one class", "--data.split")
    assert not (tmp_path / "run/checkpoints").exists()


def change(schema, of, **fields):
    """Other fields for the one feature or task of this name."""
    features = [feature for group in schema["groups"] for feature in group["features"]]
    entry = next(entry for entry in (*features, *schema["tasks"]) if entry["name"] == of)
    if fields.get("kind") == "numeric":
        entry.clear()  # of the fields that other kinds have
    entry.update({"name": of, **fields})


WRONG = {
    "feature": (lambda schema: change(schema, "price", column="prise"), ["no column 'prise'", "schema", "price"]),
    "item": (lambda schema: schema.update(item="itemid"), ["no column 'itemid'", "schema", "item_id"]),
    "time": (lambda schema: schema.update(time="seen_at"), ["'seen_at'"]),
    "weight": (lambda schema: change(schema, "click", weight="w"), ["no column 'w'", "schema"]),
    "label": (lambda schema: change(schema, "click", label="price"), ["row 0: label 'price' is", "must be 0 or 1"]),
    "kind": (lambda schema: change(schema, "city", kind="numeric"), ["'city' is string, not a number"]),
}


@pytest.mark.parametrize("mistake", WRONG)
def test_data_finds_what_training_would(log, train, edit, complaint, mistake):
    how, words = WRONG[mistake]
    schema = edit(how)
    data = ["--data.path", str(log), "--data.schema_file", schema]
    complaint(main(["data", "dlrm_mlp_parquet", *data]), *words)
    complaint(train(schema=schema), *words)


def test_parts_that_cannot_be_used_are_still_shown(log, schema_file, capsys):
    data = ["--data.path", str(log), "--data.schema_file", str(schema_file)]
    cut = 1_700_000_000 + 60 * 2_700
    split = {"kind": "time", "column": "shown_at", "validation": cut - 1, "test": cut - 0.5}
    command = ["data", "dlrm_mlp_parquet", *data, "--data.split", json.dumps(split)]
    for more, shown in ([], "2,700"), (["--json"], '"validation": {"rows": 0'):
        assert main([*command, *more]) == 2
        said = capsys.readouterr()
        assert shown in said.out
        assert said.err.strip().splitlines()[-1].startswith("scalerec: the validation part holds no rows")


def test_nan_and_infinity_are_counted_and_read_as_missing(train, log, capsys, schema_file, tmp_path):
    price = pq.read_table(log)["price"].to_numpy().copy()
    price[:40], price[40:50] = np.nan, np.inf
    changed(log, price=price)
    options = ["--data.path", str(log), "--data.schema_file", str(schema_file), "--training.tensorboard", "false"]
    assert main(["train", "dlrm_mlp_parquet", "--out", str(tmp_path / "r"), "--model.hidden", "[8]", *options]) == 0
    assert "price: NaN or infinite, read as missing" in capsys.readouterr().err


def test_empty_file(train, log, complaint):
    pq.write_table(pq.read_table(log).slice(0, 0), log)
    complaint(train(), "shop.parquet", "no rows")


@pytest.mark.parametrize("damage", ["truncated", "corrupt"])
def test_bad_shard_is_named_and_can_be_skipped(train, log, complaint, tmp_path, damage, capsys):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number in range(3):
        pq.write_table(shop(number), folder / f"part-{number}.parquet", compression="none")
    bad = folder / "part-1.parquet"
    content = bytearray(bad.read_bytes())
    if damage == "truncated":
        content = content[: len(content) // 2]
    else:
        content[100 : len(content) // 2] = bytes(len(content) // 2 - 100)
    bad.write_bytes(content)
    complaint(train(data=folder), "part-1.parquet", "--skip-bad-shards")
    assert train("--skip-bad-shards", data=folder, out="again") == 0


def test_a_time_column_that_is_not_one(train, log, complaint):
    split = {"kind": "time", "column": "city", "validation": 1, "test": 2}
    complaint(train("--data.split", json.dumps(split)), "shop.parquet", "'city'", "not a time")


def test_width_that_the_tokens_do_not_divide(train, complaint):
    complaint(
        train("--model.dim", "100", "--model.num_tokens", "8", recipe="rankmixer_parquet"), "--model.dim 100", "104"
    )


def test_unknown_override_names_the_nearest(train, complaint):
    complaint(train("--model.hiddenn", "[8]"), "--model.hiddenn", "did you mean --model.hidden?")


def test_overrides_may_stand_anywhere(capsys, complaint):
    told = []
    for words in (["--model.rank", "3", "dcnv2_movielens_100k"], ["dcnv2_movielens_100k", "--model.rank=3"]):
        assert main(["describe", *words, "--json"]) == 0
        told.append(capsys.readouterr().out)
    assert told[0] == told[1]
    split = '--data.split={"kind": "random"}'
    assert main(["describe", split, "dcnv2_movielens_100k", "--model.rank", "3", "--json"]) == 0
    assert main(["describe", "dcnv2_movielens_100k", split, "--model.rank", "3", "--json"]) == 0
    for words in (["--model.rank", "--json"], ["--model.rank", "--training.epochs", "2"], ["--model.rank"]):
        complaint(main(["describe", "dcnv2_movielens_100k", *words]), "--model.rank: needs a value")


def test_value_of_the_wrong_type(train, complaint):
    complaint(train("--training.epochs", "many"), "training.epochs", "integer")


def test_unknown_recipe_names_the_nearest(train, complaint):
    complaint(train(recipe="rankmixer_parket"), "did you mean rankmixer_parquet?")


def test_checkpoint_of_another_schema(train, log, edit, complaint, tmp_path):
    assert train() == 0
    other = edit(lambda schema: schema["groups"][0]["features"].pop())
    complaint(train("--warm-start", str(tmp_path / "run"), schema=other, out="other"), "another schema")
    pq.write_table(pq.read_table(log).drop_columns(["price"]), tmp_path / "other.parquet")
    complaint(main(["evaluate", str(tmp_path / "run"), "--data", str(tmp_path / "other.parquet")]), "no column 'price'")


def test_resume_without_a_checkpoint_or_with_another_config(train, log, complaint, tmp_path):
    complaint(train("--resume"), "--resume", "no checkpoint")
    assert train() == 0
    complaint(train(), "already holds a run", "--resume")
    complaint(train("--resume", "--training.batch_size", "77"), "--training.batch_size 1024, now it is 77")
    (tmp_path / "run/metrics.json").unlink()
    complaint(train("--resume", "--training.batch_size", "77"), "--training.batch_size 1024, now it is 77")
    pq.write_table(shop(rows=3_100), log)
    complaint(train("--resume"), "--data.split.validation", "--warm-start")
    split = '{"kind": "random"}'
    assert train("--data.split", split, out="other") == 0
    (tmp_path / "other/metrics.json").unlink()
    pq.write_table(shop(rows=3_200), log)
    complaint(train("--resume", "--data.split", split, out="other"), "3,100 rows", "3,200", "--warm-start")


def test_full_disk_keeps_the_last_good_checkpoint(train, complaint, tmp_path, monkeypatch):
    assert train("--training.epochs", "1") == 0
    good = checkpoint.load(tmp_path / "run")
    (tmp_path / "run/metrics.json").unlink()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    complaint(train(out="fresh"), "disk is full", "--resume")
    assert not list((tmp_path / "fresh/checkpoints").glob("*"))
    with pytest.raises(Exception, match="disk is full"):
        checkpoint.save(tmp_path / "run/checkpoints/step-x", {}, good.encoder, good.layout, good.weights, {}, {})
    monkeypatch.undo()
    assert checkpoint.load(tmp_path / "run").weights.keys() == good.weights.keys()


def test_no_such_file_or_schema(train, tmp_path, complaint):
    complaint(train(data=tmp_path / "nothing.parquet"), "nothing.parquet")
    complaint(train(schema=tmp_path / "nothing.json"), "nothing.json: no such file")
    complaint(main(["evaluate", str(tmp_path / "nowhere")]), "nowhere", "no checkpoint")
    complaint(main(["schema", "infer", str(tmp_path / "nothing.parquet")]), "nothing.parquet")


def test_broken_schema_is_explained(train, edit, complaint):
    def twice(schema):
        schema["groups"][0]["features"].append(schema["groups"][0]["features"][0])

    complaint(train(schema=edit(twice)), "edited.json", "two features are named 'user_id'")


def test_only_a_folder_is_filled_by_export(train, complaint, tmp_path):
    assert train() == 0
    command = ["export", str(tmp_path / "run"), "--out", str(tmp_path / "bundle")]
    for state in ("redis://localhost:6379/0", "lmdb:state"):
        complaint(main([*command, "--state", state]), f"--state {state}: name a folder", "docs/state.md")
    assert not (tmp_path / "bundle").exists()


def test_what_is_there_is_not_written_over(train, log, schema_file, complaint, tmp_path):
    before = schema_file.read_text() + " "
    schema_file.write_text(before)
    complaint(main(["schema", "infer", str(log), "--out", str(schema_file)]), "schema.json: already there")
    assert schema_file.read_text() == before
    assert train() == 0
    complaint(main(["predict", str(tmp_path / "run"), str(log), "--out", str(log)]), "one of the files to score")


def test_places_that_cannot_be_written(train, log, complaint, tmp_path):
    assert train() == 0
    (tmp_path / "folder").mkdir()
    complaint(main(["predict", str(tmp_path / "run"), str(log), "--out", str(tmp_path / "folder")]), "folder")
    complaint(main(["schema", "infer", str(log), "--out", str(tmp_path / "no/s.json")]), "no/s.json: No such file")


def test_a_training_that_has_not_begun_is_not_evaluated(train, tmp_path, complaint, capsys):
    assert train() == 0
    run = tmp_path / "run"
    for name in ("metrics.json", "best.json"):
        (run / name).unlink()
    capsys.readouterr()
    assert main(["evaluate", str(run)]) == 0
    assert "this training is not finished" in capsys.readouterr().err
    for folder in (run / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        (folder / "state.json").write_text(json.dumps(state | {"step": 0}))
    complaint(main(["evaluate", str(run)]), "nothing is trained yet", "--resume")


def test_an_export_that_failed_is_repeated(train, complaint, tmp_path, monkeypatch):
    assert train() == 0
    bundle, state = tmp_path / "bundle", tmp_path / "state"
    command = ["export", str(tmp_path / "run"), "--out", str(bundle), "--state", str(state)]

    def broken(*of, **more):
        raise InputError("the log broke")

    with monkeypatch.context() as patched:
        patched.setattr("scalerec.serving.seed.seed", broken)
        complaint(main(command), "the log broke")
    assert not bundle.exists() and not list(state.rglob("*"))
    with monkeypatch.context() as patched:
        patched.setattr("scalerec.inference.bundle.golden.record", broken)
        complaint(main(command), "the log broke")
    assert not bundle.exists() and list(state.glob("*/users.parquet"))
    assert main(command) == 0 and (bundle / "manifest.json").exists()
    shutil.rmtree(state)
    complaint(main(command), "bundle: already there")
    assert not state.exists()


def test_prediction_over_existing_scores(train, log, tmp_path, complaint):
    assert train() == 0
    scored = tmp_path / "scored.parquet"
    assert main(["predict", str(tmp_path / "run"), str(log), "--out", str(scored)]) == 0
    again = ["predict", str(tmp_path / "run"), str(scored), "--out", str(tmp_path / "again.parquet")]
    complaint(main(again), "score_click")
    assert not (tmp_path / "again.parquet").exists()
    (tmp_path / "both").mkdir()
    rows = pq.read_table(log)
    pq.write_table(rows, tmp_path / "both/a.parquet")
    at = rows.column_names.index("item_id")
    pq.write_table(rows.set_column(at, "item_id", rows["item_id"].cast(pa.int32())), tmp_path / "both/b.parquet")
    complaint(
        main([*again[:2], str(tmp_path / "both"), *again[3:]]),
        "both: files of different columns",
        "not all have item_id: int",
    )
    pq.write_table(rows.append_column("note", pa.nulls(rows.num_rows, pa.string())), tmp_path / "both/b.parquet")
    complaint(main([*again[:2], str(tmp_path / "both"), *again[3:]]), "not all have note: string")
    assert sorted(path.name for path in tmp_path.glob("*.parquet")) == sorted({log.name, "scored.parquet"})


def test_two_columns_of_one_name(train, log, tmp_path, complaint):
    rows = pq.read_table(log)
    pq.write_table(rows.append_column("price", rows["price"]), tmp_path / "twice.parquet")
    words = ("twice.parquet: two columns are named 'price'",)
    complaint(train(data=tmp_path / "twice.parquet"), *words)
    complaint(main(["schema", "infer", str(tmp_path / "twice.parquet")]), *words)
    pq.write_table(rows.append_column("note", rows["price"]).append_column("note", rows["price"]), log)
    assert train() == 0  # nobody reads it

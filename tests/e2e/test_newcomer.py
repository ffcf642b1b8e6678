"""From an unseen Parquet file to scores, with commands only."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from sklearn.metrics import roc_auc_score

from scalerec.cli import main
from scalerec.data.source import cache_root
from tests.e2e.conftest import ROWS, shop


def test_infer_guesses_what_a_person_would(schema_file):
    schema = json.loads(schema_file.read_text())
    sides = {g["side"]: {f["name"]: f["kind"] for f in g["features"]} for g in schema["groups"]}
    assert sides["user"] == {"user_id": "categorical", "city": "categorical"}
    assert sides["item"] == {"item_id": "categorical", "price": "numeric", "colours": "multi_categorical"}
    assert schema["tasks"] == [{"name": "click", "label": "is_click", "weight": None, "mask": None}]
    assert (schema["user"], schema["item"], schema["time"]) == ("user_id", "item_id", "shown_at")


def test_infer_reads_categories_as_their_text(log, schema_file, tmp_path, capsys):
    """What pandas keeps as a categorical comes back from Parquet as a dictionary."""
    table = pq.read_table(log)
    for i, field in enumerate(table.schema):
        if pa.types.is_string(field.type):
            table = table.set_column(i, field.name, table.column(i).dictionary_encode())
    assert any(pa.types.is_dictionary(kind) for kind in table.schema.types)
    pq.write_table(table, tmp_path / "coded.parquet")
    assert main(["schema", "infer", str(tmp_path / "coded.parquet")]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(schema_file.read_text())


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-6, 1e-9])
def test_infer_tells_the_unit_of_times(tmp_path, unit, capsys):
    table = shop(0, 500)
    times = pa.array((table["shown_at"].to_numpy() / unit).astype(np.int64))
    pq.write_table(table.set_column(table.column_names.index("shown_at"), "shown_at", times), tmp_path / "log.parquet")
    assert main(["schema", "infer", str(tmp_path / "log.parquet")]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["time_unit"] == unit
    assert f"shown_at: read as numbers of {unit:g} s each" in said.err


def inferred(table, folder, capsys):
    """The schema of a table, and the remarks by the column that they begin with."""
    pq.write_table(table, folder / "log.parquet")
    assert main(["schema", "infer", str(folder / "log.parquet")]) == 0
    said = capsys.readouterr()
    remarks = dict(line.split(": ", 1) for line in said.err.splitlines())
    return json.loads(said.out), remarks


def features(schema, side):
    return {feature["name"] for group in schema["groups"] if group["side"] == side for feature in group["features"]}


def test_infer_takes_what_is_constant_within_users_for_a_feature(tmp_path, capsys):
    table = shop(0, 1_000)
    member = pa.array((table["user_id"].to_numpy() % 3 == 0).tolist())
    liked = pa.array(np.arange(1_000) % 7 == 0)
    schema, remarks = inferred(table.add_column(0, "is_member", member).append_column("liked", liked), tmp_path, capsys)
    assert [task["name"] for task in schema["tasks"]] == ["click", "liked"]
    assert "is_member" in features(schema, "user")
    assert "the same in all rows of each user" in remarks["is_member"]
    assert remarks["tasks"].startswith("click, liked; a service ranks by the first one")
    table = table.drop_columns(["is_click"]).append_column("is_member", member)
    pq.write_table(table, tmp_path / "log.parquet")
    assert main(["schema", "infer", str(tmp_path / "log.parquet")]) == 2
    assert "is_member: the same in all rows of each user" in capsys.readouterr().err


def test_infer_says_what_it_could_not_read(tmp_path, capsys):
    table = shop(0, 1_000)
    bought = pa.array(["yes" if n % 3 else "no" for n in range(1_000)])
    moments = pa.array([f"16.03.2024 10:{n // 60:02}:{n % 60:02}" for n in range(1_000)])
    table = table.set_column(table.column_names.index("shown_at"), "shown_at", moments)
    table = table.append_column("is_bought", bought)
    schema, remarks = inferred(table.append_column("request_id", pa.array(np.arange(1_000))), tmp_path, capsys)
    assert "is_bought" not in features(schema, "user") | features(schema, "item")
    assert remarks["is_bought"].startswith("left out: named like a label, but text")
    assert remarks["request_id"].startswith("another value in nearly every row")
    assert "item_id" not in remarks and schema["time"] is None
    assert "split at random" in remarks["time"] and "named like a time, but text" in remarks["shown_at"]


def test_infer_leaves_out_what_no_feature_is_made_of(tmp_path, capsys):
    table = shop(0, 1_000)
    odd = {
        "nothing": pa.nulls(1_000), "parts": pa.array([{"a": n} for n in range(1_000)]),
        "vector": pa.array([[1.0, 2.0]] * 1_000, pa.list_(pa.float32(), 2)),
    }  # fmt: skip
    for name, column in odd.items():
        table = table.append_column(name, column)
    schema, remarks = inferred(table, tmp_path, capsys)
    assert all(remarks[name].startswith("left out") for name in odd)
    assert not odd.keys() & (features(schema, "user") | features(schema, "item"))


def test_infer_takes_a_label_with_gaps_for_a_label(tmp_path, capsys):
    """NaN is no value, as everywhere; a third value makes a column no label, and a remark."""
    table = shop(0, 1_000)
    gaps = np.where(np.arange(1_000) % 5, np.arange(1_000) % 2, np.nan)
    table = table.append_column("is_bought", pa.array(gaps)).append_column("likes", pa.array(np.arange(1_000) % 3))
    schema, remarks = inferred(table, tmp_path, capsys)
    assert [task["name"] for task in schema["tasks"]] == ["click", "bought"]
    assert remarks["likes"].startswith("known only after the row was shown?")


def test_files_that_differ_a_little(tmp_path, log, train, capsys):
    """Columns in another order, whole numbers that are decimals the next day, moments of two time zones."""
    table, days = pq.read_table(log), tmp_path / "days"
    days.mkdir()
    at = table.column_names.index("shown_at")
    for day, zone in enumerate(("UTC", "Europe/Berlin")):
        moments = pc.multiply(table["shown_at"], 1_000_000).cast(pa.timestamp("us", "UTC"))
        part = table.set_column(at, "shown_at", moments.cast(pa.timestamp("us", zone)))
        part = part[2_850:] if day else part[:2_850]  # the test part has rows of both
        if day:
            user = part.column_names.index("user_id")
            part = part.set_column(user, "user_id", part["user_id"].cast(pa.float64()))
            part = part.select(part.column_names[::-1])
        pq.write_table(part, days / f"{day}.parquet")
    schema = tmp_path / "days.json"
    assert main(["schema", "infer", str(days), "--out", str(schema)]) == 0
    assert train(data=days, schema=schema) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--by", "user_id", "--json"]) == 0
    slices = json.loads(capsys.readouterr().out.splitlines()[-1])
    users = len(set(table["user_id"].to_pylist()[2_700:]))
    assert [name for name in slices if not name.endswith(".0")] == [f"{users - 50} other values together"]
    sequences = ["--data.of.path", str(days), "--data.of.schema_file", str(schema), "--training.tensorboard", "false"]
    short = ["--training.epochs", "1", "--data.max_len", "8"]
    assert main(["train", "sasrec_parquet", "--out", str(tmp_path / "next"), "--quiet", *sequences, *short]) == 0


def test_infer_is_quiet_about_a_plain_log(tmp_path, capsys):
    assert set(inferred(shop(0, 1_000), tmp_path, capsys)[1]) == {"shown_at", "groups", "tasks"}


@pytest.mark.parametrize("recipe", ["rankmixer_parquet", "dcnv2_parquet", "dlrm_mlp_parquet"])
def test_train_evaluate_predict(train, log, tmp_path, capsys, recipe):
    assert train(recipe=recipe) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    table = json.loads(capsys.readouterr().out.splitlines()[-1])["test"]["click"]
    assert table["auc_low"] < table["auc"] < table["auc_high"]
    measured = json.loads((tmp_path / "run/metrics.json").read_text())["test"]["click"]
    assert {metric: table[metric] for metric in measured} == pytest.approx(measured)

    assert main(["predict", str(tmp_path / "run"), str(log), "--out", str(tmp_path / "scored.parquet")]) == 0
    scored = pq.read_table(tmp_path / "scored.parquet")
    assert scored.drop_columns(["score_click"]).equals(pq.read_table(log))
    # The test rows among them have the scores that training measured.
    test = pq.read_table(tmp_path / "run/test.parquet")
    scores = scored["score_click"].to_numpy()[test["row"].to_numpy()]
    np.testing.assert_allclose(scores, test["click_score"].to_numpy(), atol=1e-6)
    assert roc_auc_score(test["click_label"], test["click_score"]) == pytest.approx(table["auc"])


@pytest.mark.parametrize("recipe", ["hstu_parquet", "sasrec_parquet", "hstu_ranking_parquet"])
def test_sequences_of_ones_own_log(log, schema_file, tmp_path, capsys, recipe):
    data = ["--data.of.path", str(log), "--data.of.schema_file", str(schema_file)]
    small = ["--training.epochs", "1", "--training.tensorboard", "false", "--quiet"]
    assert main(["train", recipe, "--out", str(tmp_path / "run"), *data, *small]) == 0
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["test"]
    told = found["click"]["auc"] if "ranking" in recipe else found["next"]["hr@200"]
    assert 0.0 < told <= 1.0
    assert set(found) == ({"click"} if "ranking" in recipe else {"next"})


def test_rows_without_their_past_are_scored_with_one_that_is_replayed(log, schema_file, tmp_path, capsys):
    """As those of training had theirs made; what is written are the columns that were given, and scores."""
    schema = json.loads(schema_file.read_text())
    seen = {"kind": "sequence", "name": "seen", "fields": [{"of": "item_id"}], "max_len": 5}
    schema["groups"][0]["features"].append(seen)
    (tmp_path / "past.json").write_text(json.dumps(schema))
    data = ["--data.path", str(log), "--data.schema_file", str(tmp_path / "past.json")]
    small = ["--model.hidden", "[8]", "--training.epochs", "1", "--training.tensorboard", "false", "--quiet"]
    run, out = str(tmp_path / "run"), tmp_path / "scored.parquet"
    assert main(["train", "dlrm_mlp_parquet", "--out", run, *data, *small]) == 0
    assert main(["predict", run, str(log), "--out", str(out)]) == 0
    scored, test = pq.read_table(out), pq.read_table(tmp_path / "run/test.parquet")
    assert scored.drop_columns(["score_click"]).equals(pq.read_table(log))
    np.testing.assert_allclose(
        scored["score_click"].to_numpy()[test["row"].to_numpy()], test["click_score"].to_numpy(), atol=1e-6
    )
    capsys.readouterr()
    assert main(["evaluate", run, "--data", str(log), "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["shop.parquet"]["click"]
    assert found["auc"] == pytest.approx(roc_auc_score(pq.read_table(log)["is_click"], scored["score_click"]))


def test_a_run_keeps_the_cuts_of_its_split(train, log, tmp_path, capsys, monkeypatch):
    """Rows that are added later do not make test rows of what was trained on, wherever the run is evaluated."""
    (tmp_path / "logs").mkdir()
    pq.write_table(pq.read_table(log), tmp_path / "logs/a.parquet")
    monkeypatch.chdir(tmp_path)
    assert train(data="logs") == 0
    rows = pq.read_table(tmp_path / "run/test.parquet").num_rows
    later = shop(5, 300)
    at = later.column_names.index("shown_at")
    moved = later["shown_at"].to_numpy() + 10**7
    pq.write_table(later.set_column(at, "shown_at", pa.array(moved)), tmp_path / "logs/b.parquet")
    monkeypatch.chdir("/")
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["test"]["click"]["rows"] == rows + 300


def test_prediction_needs_no_label_and_counts_new_ids(train, tmp_path, capsys):
    assert train() == 0
    pq.write_table(shop(1, 500, first_item=50).drop_columns(["is_click"]), tmp_path / "new.parquet")
    found = ["predict", str(tmp_path / "run"), str(tmp_path / "new.parquet"), "--out", str(tmp_path / "o.parquet")]
    assert main([*found, "--json"]) == 0
    counts = json.loads(capsys.readouterr().out.splitlines()[-1])["counts"]
    assert counts["item_id: not in the vocabulary, read as unknown"] > 0


def test_time_split_keeps_the_future_out(train, log, tmp_path):
    cut = [1_700_000_000 + ROWS * 60 * share // 10 for share in (8, 9)]
    split = {"kind": "time", "column": "shown_at", "validation": cut[0], "test": cut[1]}
    assert train("--data.split", json.dumps(split)) == 0
    rows = pq.read_table(tmp_path / "run/test.parquet")["row"].to_numpy()
    assert (pq.read_table(log)["shown_at"].to_numpy()[rows] >= cut[1]).all() and len(rows) == ROWS // 10


def test_histories_are_made_where_the_log_has_none(train, edit, tmp_path, monkeypatch):
    """A sequence in the schema is enough; a row sees the clicks of its user before it."""
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))

    def add_past(schema):
        past = {"kind": "sequence", "name": "clicked", "fields": [{"of": "item_id"}], "where": "is_click", "max_len": 5}
        schema["groups"].insert(0, {"name": "past", "side": "user", "features": [past]})

    assert train(schema=edit(add_past)) == 0
    (prepared,) = (cache_root() / "histories").rglob("part-*.parquet")
    rows = pq.read_table(prepared).to_pylist()
    clicks: dict[int, list[int]] = {}
    for row in rows:
        assert row["clicked_item_id"] == clicks.get(row["user_id"], [])[-5:]
        if row["is_click"]:
            clicks.setdefault(row["user_id"], []).append(row["item_id"])
    assert max(len(row["clicked_item_id"]) for row in rows) == 5


def test_slices_add_up(train, tmp_path, capsys):
    assert train() == 0
    assert main(["evaluate", str(tmp_path / "run"), "--by", "city", "--json"]) == 0
    by_city = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(by_city) == {"Ulm", "Bonn", "Jena"}
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    whole = json.loads(capsys.readouterr().out.splitlines()[-1])["test"]["click"]
    assert sum(t["click"]["rows"] for t in by_city.values()) == whole["rows"]
    assert main(["evaluate", str(tmp_path / "run"), "--by", "cold_item", "--json"]) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) <= {"known", "new"}


def test_slices_by_many_values_are_those_with_the_most_rows(train, tmp_path, capsys):
    assert train() == 0
    assert main(["evaluate", str(tmp_path / "run"), "--by", "item_id", "--json"]) == 0
    by_item = json.loads(capsys.readouterr().out.splitlines()[-1])
    rows = {item: tables["click"]["rows"] for item, tables in by_item.items()}
    test = pq.read_table(tmp_path / "run/test.parquet")
    assert len(rows) == 51 and sum(rows.values()) == test.num_rows
    others = next(name for name in rows if name.endswith(" other values together"))
    assert rows.pop(others) <= test.num_rows - 50 * min(rows.values())
    items = pq.read_table(tmp_path / "shop.parquet")["item_id"].to_numpy()[test["row"].to_numpy()]
    counts = np.unique(items, return_counts=True)[1]
    assert others == f"{len(counts) - 50} other values together"
    assert sorted(rows.values()) == sorted(counts)[-50:]
    assert main(["evaluate", str(tmp_path / "run"), "--by", "item_id"]) == 0
    assert f"item_id = {others}" in " ".join(capsys.readouterr().out.split()), "titles go on in the next line"


def test_warm_start_keeps_ids_and_weights(train, tmp_path, capsys):
    """Yesterday's items keep their rows, today's are appended, and nothing is learned anew."""
    assert train(out="old") == 0
    new = tmp_path / "new.parquet"
    pq.write_table(pa.concat_tables([shop(2, 1_500), shop(3, 1_500, first_item=50)]), new)
    still = ["--training.optimizer.lr", "0.0", "--training.optimizer.embedding_lr", "0.0", "--training.epochs", "1"]
    assert train("--warm-start", str(tmp_path / "old"), *still, out="new", data=new) == 0
    from scalerec import checkpoint

    old, grown = checkpoint.load(tmp_path / "old"), checkpoint.load(tmp_path / "new")
    before, after = old.encoder.vocabularies["item_id"].values, grown.encoder.vocabularies["item_id"].values
    assert after[: len(before)].equals(before) and len(after) > len(before)
    table = "embeddings.tables.item_id"
    assert grown.weights[table][: len(old.weights[table])].equal(old.weights[table])
    assert grown.weights["mlp.layers.0.weight"].equal(old.weights["mlp.layers.0.weight"])


def test_a_model_of_ones_own(log, schema_file, tmp_path, capsys, monkeypatch):
    """The example works as its header says, here on the shop's log; its checkpoint needs the package to be allowed."""
    monkeypatch.setattr("scalerec.config._allowed", set())
    data = json.dumps({"kind": "parquet", "path": str(log), "schema_file": str(schema_file)})
    recipe = "examples.own_model:factorisation_machine_movielens"
    options = ["--out", str(tmp_path / "fm"), "--quiet", "--training.tensorboard", "false", "--data", data]
    assert main(["train", recipe, *options]) == 0
    monkeypatch.setattr("scalerec.config._allowed", set())
    assert main(["evaluate", str(tmp_path / "fm")]) == 2
    assert "--allow examples" in capsys.readouterr().err
    scored = ["predict", str(tmp_path / "fm"), str(log), "--out", str(tmp_path / "scored.parquet")]
    assert main(scored) == 2
    assert "--allow examples" in capsys.readouterr().err
    assert main(["evaluate", str(tmp_path / "fm"), "--allow", "examples", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["test"]["click"]["auc"] > 0.55
    assert main(["export", str(tmp_path / "fm"), "--out", str(tmp_path / "bundle")]) == 0
    assert capsys.readouterr().out == f"scalerec serve {tmp_path / 'bundle'} --allow examples\n"
    compared = ["compare", recipe, f"{recipe}+model.rank=4", "--seeds", "1", "--workers", "2"]
    options = ["--out", str(tmp_path / "c"), "--training.tensorboard", "false", "--data", data]
    assert main([*compared, *options]) == 0, "processes of their own are allowed the package too"


def test_files_with_times_of_two_zones_are_exported(train, log, tmp_path):
    rows = pq.read_table(log)
    (tmp_path / "log").mkdir()
    for part, zone in enumerate(("Europe/Berlin", "UTC")):
        half = rows.slice(part * len(rows) // 2, len(rows) // 2)
        moments = half["shown_at"].cast(pa.timestamp("s")).cast(pa.timestamp("us", zone))
        at = rows.column_names.index("shown_at")
        pq.write_table(half.set_column(at, "shown_at", moments), tmp_path / "log" / f"{part}.parquet")
    assert train(data=tmp_path / "log") == 0
    out, state = tmp_path / "bundle", tmp_path / "state"
    assert main(["export", str(tmp_path / "run"), "--out", str(out), "--state", str(state)]) == 0
    users = pq.read_table(next(state.glob("*/users.parquet")))
    assert sorted(users["user_id"].to_pylist()) == sorted(set(rows["user_id"].to_pylist()))


def test_a_test_part_of_one_class_has_no_auc_and_says_so(train, log, schema_file, tmp_path, capsys):
    """In JSON that is JSON, in tables without nan, and where a finished run is read again."""
    table = shop()
    clicks = table["is_click"].to_numpy().copy()
    clicks[-450:] = 0  # and the latest tenth tests
    pq.write_table(table.set_column(table.column_names.index("is_click"), "is_click", pa.array(clicks)), log)
    split = {"kind": "time", "column": "shown_at", "validation": 1_700_000_000 + 60 * 2_000}
    split = ["--data.split", json.dumps(split | {"test": 1_700_000_000 + 60 * 2_600})]

    def read(text: str) -> dict:
        return json.loads(text.splitlines()[-1], parse_constant=pytest.fail)

    capsys.readouterr()
    assert train("--json", *split) == 0
    found = read(capsys.readouterr().out)
    assert found["test"]["click"]["auc"] is None and found["test"]["click"]["log_loss"] > 0
    assert json.loads((tmp_path / "run/metrics.json").read_text(), parse_constant=pytest.fail) == found
    assert train("--json", "--resume", *split) == 0 and read(capsys.readouterr().out) == found
    assert train("--resume", *split) == 0
    said = capsys.readouterr().out
    assert re.search(r"auc\s+│\s+-\s", said) and "nan" not in said
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    assert read(capsys.readouterr().out)["test"]["click"]["ne"] is None

    data = ["--data.path", str(log), "--data.schema_file", str(schema_file), "--training.tensorboard", "false", *split]
    command = ["compare", "rankmixer_parquet", "dlrm_mlp_parquet", "--seeds", "2", "--out", str(tmp_path / "c"), *data]
    for _ in range(2):  # trained, and read
        assert main([*command, "--json"]) == 0
        found = read(capsys.readouterr().out)
        assert json.loads((tmp_path / "c/report.json").read_text(), parse_constant=pytest.fail) == found
        entry = found["models"][1]["tasks"]["click"]["auc"]
        assert entry["values"] == [None, None] and entry["mean"] is None and not entry["resolved"]
        text = (tmp_path / "c/report.md").read_text()
        assert "| rankmixer_parquet | - |  | - |  | - |  |" in text and "nan" not in text


def test_compare_reports_paired_intervals(train, log, schema_file, tmp_path, capsys):
    from scalerec import checkpoint

    data = ["--data.path", str(log), "--data.schema_file", str(schema_file), "--training.tensorboard", "false"]
    names = ["rankmixer_parquet", "dlrm_mlp_parquet"]
    command = ["compare", *names, "--seeds", "2", "--out", str(tmp_path / "c"), *data, "--json"]
    assert main([*command, "--reference"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [model["name"] for model in found["models"]] == [*names, "lightgbm"]
    entry = found["models"][1]["tasks"]["click"]["auc"]
    assert entry["low"] <= entry["difference"] <= entry["high"]
    means = [np.mean(model["tasks"]["click"]["auc"]["values"]) for model in found["models"]]
    assert entry["difference"] == pytest.approx(means[1] - means[0])
    assert found["seeds"] == 2 and len(entry["values"]) == 2
    assert "small" in (tmp_path / "c/report.md").read_text() and (tmp_path / "c/report.png").stat().st_size > 5_000
    stamp = (tmp_path / "c/rankmixer_parquet/seed-0/metrics.json").stat().st_mtime_ns
    variant = "rankmixer_parquet+model.num_layers=1+training.optimizer.lr=1e-4"
    command[2:3] = [variant, "--workers", "2"]
    assert main(command) == 0, "what is finished is not trained again"
    assert (tmp_path / "c/rankmixer_parquet/seed-0/metrics.json").stat().st_mtime_ns == stamp
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [model["name"] for model in found["models"]] == ["rankmixer_parquet", variant]
    trained = checkpoint.load(tmp_path / "c" / variant / "seed-0").run
    assert trained["model"]["num_layers"] == 1 and trained["training"]["optimizer"]["lr"] == 1e-4
    assert main(["describe", "rankmixer_parquet+model.layers=1", *data]) == 2
    assert "no such option; did you mean --model.num_layers" in capsys.readouterr().err
    assert main(["describe", "rankmixer_parquet+data.path=/x", *data]) == 2
    assert "cannot hold '/'" in capsys.readouterr().err

"""What is served otherwise than it was trained is found and named: values, histories, units, encoders, scores."""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from scalerec import checkpoint
from scalerec.data.sources.parquet import Parquet
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.features.encoded import encoded_columns
from scalerec.features.encoder import Encoder
from scalerec.features.vocabulary import Vocabulary
from scalerec.inference.bundle import export
from scalerec.inference.engine import Ask, Engine
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.schema import Categorical, Cross, Group, MultiCategorical, Numeric, Schema, Sequence, SequenceField, Task
from scalerec.serving.exposure import Shown, rows_of, write_file
from scalerec.studies import commands
from scalerec.studies.columns import Comparison
from scalerec.studies.join import SCALES, Keys, last_before, match, nearest
from scalerec.studies.score_skew import rank_correlations
from scalerec.studies.skew import skew
from scalerec.studies.skew_report import write
from scalerec.training.run import Run

USERS, ROUNDS, ITEMS = 30, 12, 40
START = 1_700_000_000
SCHEMA = Schema(
    groups=(
        Group(
            name="user",
            side="user",
            features=(
                Categorical(name="user"),
                Categorical(name="city"),
                Numeric(name="visits", buckets=8),
                Sequence(
                    name="seen",
                    fields=(SequenceField(of="item"), SequenceField(of="maker")),
                    time=True,
                    actions=("click",),
                    max_len=5,
                ),
            ),
        ),
        Group(
            name="item",
            side="item",
            features=(
                Categorical(name="item"),
                Categorical(name="maker", vocabulary="hash", buckets=20),
                MultiCategorical(name="words", separator="|"),
                Numeric(name="price", encoding="linear"),
                Numeric(name="released", buckets=6),
                Cross(name="city_maker", of=("city", "maker"), buckets=50),
            ),
        ),
    ),
    tasks=(Task(name="click"), Task(name="buy")),
    user="user",
    item="item",
    time="time",
    dim=4,
)
Change = Callable[[dict[str, Any], int], None]


def log() -> pa.Table:
    """360 impressions in the order of time; what a user has done so far is in `visits`, so it never recurs."""
    random = np.random.default_rng(0)
    rows = []
    for number in range(ROUNDS):
        for user in range(USERS):
            item = int(random.integers(ITEMS))
            rows.append({
                "user": f"u{user}", "city": ("Ulm", "Bonn", None)[user % 3], "visits": float(user + 40 * number),
                "item": item, "maker": f"m{item % 7}", "words": "|".join(f"w{w}" for w in range(item % 4)),
                "price": None if item % 5 == 4 else item + 0.25, "released": START - 86_400 * (item + 1),
                "time": START + 3600 * number + user, "click": int(random.integers(2)), "buy": int(random.integers(2)),
            })  # fmt: skip
    return history.replay(SCHEMA, pa.Table.from_pylist(rows))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pa.Table]:
    """A run that nobody trained, with its log in two files of several row groups."""
    folder = tmp_path_factory.mktemp("skew")
    table = log()
    (folder / "log").mkdir()
    shuffled = table.take(pa.array(np.random.default_rng(1).permutation(len(table))))
    for number, first in enumerate((0, 200)):
        pq.write_table(shuffled.slice(first, 200), folder / f"log/{number}.parquet", row_group_size=70)
    (folder / "schema.json").write_text(SCHEMA.model_dump_json())
    data = Parquet(path=str(folder / "log"), schema_file=str(folder / "schema.json"))
    run = Run(name="ours", data=data, model=DLRMMLPConfig(hidden=(16,)))
    encoder = Encoder.fit(SCHEMA, table.to_batches())
    torch.manual_seed(0)
    model = run.model.build(encoder.layout)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    weights = dict(model.state_dict())
    checkpoint.save(folder / "run", run.model_dump(mode="json"), encoder, encoder.layout, weights, {}, {})
    return folder / "run", table


def serve(
    run: Path, table: pa.Table, out: Path, change: Change | None = None, encoder: Encoder | None = None,
    **more: list[Any],
) -> Path:  # fmt: skip
    """The rows as a service with this encoder would have logged them, every value through `change` before that."""
    saved = checkpoint.load(run)
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        if change:
            change(row, number)
    kinds = pa.schema([field for field in table.schema if field.name in SCHEMA.input_columns()])
    kinds = kinds.set(kinds.get_field_index("visits"), pa.field("visits", pa.float64()))
    try:
        raw = pa.RecordBatch.from_pylist(rows, kinds)
    except pa.ArrowException:
        raw = pa.RecordBatch.from_pylist([{name: row[name] for name in kinds.names} for row in rows])
    batch = (encoder or saved.encoder).encode(raw, labels=False)
    with torch.inference_mode():
        scores = torch.sigmoid(saved.model()(batch).logits).numpy()
    columns: dict[str, Any] = {
        "request_id": [f"r{number // 4}" for number in range(len(rows))], "model": ["ours"] * len(rows),
        "version": ["v1"] * len(rows), "bucket": ["a"] * len(rows), "place": [n % 4 for n in range(len(rows))],
        **{name: [row[name] for row in rows] for name in ("user", "item", "time")},
        **{f"score.{task}": np.ascontiguousarray(scores[:, j]) for j, task in enumerate(saved.layout.tasks)},
        **{f"raw.{name}": column for name, column in zip(raw.schema.names, raw.columns)},
        **{f"encoded.{name}": column for name, column in encoded_columns(batch, saved.layout).items()},
    }  # fmt: skip
    out.mkdir()
    whole = pa.table(columns | more)
    for number, first in enumerate(range(0, len(rows), 150)):
        pq.write_table(whole.slice(first, 150), out / f"exposures-{number}.parquet", row_group_size=60)
    return out


def entry(found: dict[str, Any], column: str, what: str = "raw") -> dict[str, Any]:
    return next(entry for entry in found[what] if entry["column"] == column)


def differing(found: dict[str, Any], what: str = "raw") -> set[str]:
    return {entry["column"] for entry in found[what] if entry["differ"]}


# -- what must not be reported


def test_a_log_served_as_trained_shows_nothing(world, tmp_path: Path) -> None:
    run, table = world
    found = skew(str(serve(run, table, tmp_path / "shown")), run)
    assert found["verdict"] == [] and not found["differs"]
    assert not differing(found) and not differing(found, "encoded")
    assert [e["rows"] for e in found["raw"]] == [len(table)] * len(SCHEMA.input_columns())
    assert {e["column"] for e in found["encoded"]} == {feature.name for feature in SCHEMA.features}
    assert all(e["largest_difference"] <= 1e-6 for e in found["scores"]) and len(found["scores"]) == 2
    assert found["scores"][0]["rank_correlation"] == pytest.approx(1, abs=1e-6)
    assert found["join"]["joined"] == len(table) == found["join"]["training_rows_of_that_time"]
    assert found["join"]["training_rows_without_exposure"] == 0


def test_types_that_mean_the_same_are_the_same(world, tmp_path: Path) -> None:
    run, table = world

    def change(row: dict[str, Any], number: int) -> None:
        row["price"] = float("nan") if row["price"] is None else float(np.float32(row["price"]))
        row["seen_item"] = row["seen_item"] or None
        row["seen_maker"], row["seen_time"], row["seen_click"] = (
            row[name] or None for name in ("seen_maker", "seen_time", "seen_click")
        )

    assert skew(str(serve(run, table, tmp_path / "shown", change)), run)["verdict"] == []


# -- what must be named


def test_a_skewed_encoder_is_named_by_its_features(world, tmp_path: Path) -> None:
    run, table = world
    encoder = copy.copy(checkpoint.load(run).encoder)
    values = encoder.vocabularies["item"].values
    turned = values.take(pa.array(np.roll(np.arange(len(values)), 1)))
    encoder.vocabularies = encoder.vocabularies | {"item": Vocabulary(turned)}
    fit = encoder.numerics["visits"]
    moved = fit.model_copy(update={"edges": tuple(edge * 1.1 for edge in fit.edges)})
    encoder.numerics = encoder.numerics | {"visits": moved}
    found = skew(str(serve(run, table, tmp_path / "shown", encoder=encoder)), run)
    assert found["differs"] and not differing(found)
    assert differing(found, "encoded") == {"item", "seen", "visits"}
    assert entry(found, "item", "encoded")["share"] == 1.0
    assert 0 < entry(found, "visits", "encoded")["share"] < 1
    assert found["verdict"][0].startswith("encoding of item: 100.00% of 360 rows differ")
    assert any(line.startswith("score of click: up to") for line in found["verdict"])
    assert found["scores"][0]["rank_correlation"] < 0.999


def test_a_history_without_its_last_event_is_named(world, tmp_path: Path) -> None:
    run, table = world

    def change(row: dict[str, Any], number: int) -> None:
        for name in SCHEMA.sequences[0].list_columns():
            row[name] = row[name][:-1]

    found = skew(str(serve(run, table, tmp_path / "shown", change)), run)
    assert differing(found) == set(SCHEMA.sequences[0].list_columns())
    item = entry(found, "seen_item")
    assert item["share"] == pytest.approx((ROUNDS - 1) / ROUNDS) and item["other_length"] == item["share"]
    assert "misses the last 1" in item["looks_like"] or "is empty" in item["looks_like"]
    assert "misses the last 1" in entry(found, "seen_time")["looks_like"]
    assert item["effect"] > 0
    assert any(line.startswith("column seen_item:") and "misses the last" in line for line in found["verdict"])
    # The encoder and the model did what they should with what they were given.
    assert not differing(found, "encoded") and all(e["largest_difference"] <= 1e-6 for e in found["scores"])


def test_a_late_history_of_full_length_is_named(world, tmp_path: Path) -> None:
    run, table = world
    late = table.sort_by([("user", "ascending"), ("time", "ascending")]).to_pylist()
    before = {(row["user"], row["time"]): past for past, row in zip([None, *late[:-1]], late)}

    def change(row: dict[str, Any], number: int) -> None:
        past = before[row["user"], row["time"]]
        if past and past["user"] == row["user"]:
            row |= {name: past[name] for name in SCHEMA.sequences[0].list_columns()}

    found = skew(str(serve(run, table, tmp_path / "shown", change)), run)
    assert "misses the last 1" in entry(found, "seen_time")["looks_like"]
    assert entry(found, "seen_time")["other_length"] < entry(found, "seen_time")["share"]


def test_a_stale_user_feature_is_named(world, tmp_path: Path) -> None:
    run, table = world
    found = skew(str(serve(run, table, tmp_path / "shown", stale)), run)
    assert differing(found) == {"visits"}
    visits = entry(found, "visits")
    assert visits["looks_like"].startswith("stale: 100% of a sample had the served value before, for the same user")
    assert "median 7200 earlier" in visits["looks_like"]
    assert visits["median_difference"] == 80 and visits["largest_difference"] == 80
    assert found["verdict"][0].startswith("column visits: ")


def stale(row: dict[str, Any], number: int) -> None:
    """Two rounds late, except in every third row."""
    if number >= 2 * USERS and number % 3:
        row["visits"] -= 80


@pytest.mark.parametrize("column", ["released", "time", "seen_time"])
def test_milliseconds_for_seconds_are_named(world, tmp_path: Path, column: str) -> None:
    run, table = world

    def change(row: dict[str, Any], number: int) -> None:
        value = row[column]
        row[column] = (
            [1000 * moment for moment in value] if isinstance(value, list) else 1000 * value + 7 * (number % 9)
        )
        if column == "seen_time":
            row["time"] *= 1000  # or the encoder would refuse to serve a history from the future

    found = skew(str(serve(run, table, tmp_path / "shown", change)), run)
    assert found["join"]["joined"] == len(table)
    assert "served is 1000 times the trained (milliseconds for seconds?)" in entry(found, column)["looks_like"]
    if column != "released":
        assert found["join"]["time_scale"] == 1000
        assert found["verdict"][0].startswith("time: served as 1000 times what the log has (milliseconds")


def test_a_time_zone_is_named(world, tmp_path: Path) -> None:
    run, table = world

    def change(row: dict[str, Any], number: int) -> None:
        row["time"] += 7201

    found = skew(str(serve(run, table, tmp_path / "shown", change)), run)
    assert found["join"]["time_shift"] == 7201 and found["join"]["joined"] == len(table)
    assert found["verdict"][0].startswith("time: served +7201 from what the log has (a time zone?)")
    assert differing(found) == {"time"}
    assert entry(found, "time")["looks_like"] == "served is the trained plus 7201"


def test_rows_that_the_encoder_refuses_are_reported_not_hidden(world, tmp_path: Path) -> None:
    run, table = world
    shown = serve(run, table, tmp_path / "shown")
    file = shown / "exposures-0.parquet"
    rows = pq.read_table(file)
    turned = pa.array([list(reversed(times)) for times in rows["raw.seen_time"].to_pylist()])
    pq.write_table(rows.set_column(rows.column_names.index("raw.seen_time"), "raw.seen_time", turned), file)
    found = skew(str(shown), run)
    assert found["refused"] > 0 and "goes back in time" in found["refusal"]
    assert any(line.startswith("the run's encoder refuses") for line in found["verdict"])
    assert entry(found, "seen_time")["looks_like"].startswith("the order is reversed")


def test_wrong_scores_alone_are_named(world, tmp_path: Path) -> None:
    run, table = world
    shown = serve(run, table, tmp_path / "shown", **{"score.buy": np.full(len(table), 0.5)})
    found = skew(str(shown), run)
    assert len(found["verdict"]) == 1 and found["verdict"][0].startswith("score of buy: up to")
    buy = found["scores"][1]
    assert buy["rank_correlation"] is None and buy["mean_served"] == 0.5
    assert skew(str(shown), run, score_tolerance=1.0)["verdict"] == []


def test_scores_that_are_no_numbers_are_named(world, tmp_path: Path) -> None:
    run, table = world
    broken = [0.5 if number % 2 else float("nan") for number in range(len(table))]
    found = skew(str(serve(run, table, tmp_path / "shown", **{"score.buy": broken})), run)
    assert found["verdict"][0] == "score of buy: 180 were served that are not a number"
    whole = serve(run, table, tmp_path / "whole", **{"score.buy": [float("nan")] * len(table)})
    assert skew(str(whole), run)["verdict"] == ["score of buy: 360 were served that are not a number"]
    unasked = serve(run, table, tmp_path / "unasked", **{"score.buy": pa.nulls(len(table), pa.float32())})
    assert skew(str(unasked), run)["verdict"] == []


def test_a_checkpoint_whose_scores_are_no_numbers_is_named(world, tmp_path: Path) -> None:
    run, table = world
    saved = checkpoint.load(run)
    weights = {name: torch.full_like(tensor, float("nan")) for name, tensor in saved.weights.items()}
    checkpoint.save(tmp_path / "broken", saved.run, saved.encoder, saved.layout, weights, {}, {})
    found = skew(str(serve(run, table, tmp_path / "shown")), tmp_path / "broken")
    assert len(found["verdict"]) == 2 and all("nan from the checkpoint's" in line for line in found["verdict"])
    write(found, tmp_path / "report")
    kept = json.loads((tmp_path / "report/skew.json").read_text(), parse_constant=pytest.fail)
    assert kept["scores"][0]["largest_difference"] is None and kept["scores"][0]["mean_rescored"] is None
    assert "| click | 360 | - | - | 0." in (tmp_path / "report/skew.md").read_text()


def test_a_column_that_nobody_filled_in_is_named(world, tmp_path: Path) -> None:
    run, table = world

    def change(row: dict[str, Any], number: int) -> None:
        row["city"] = row["visits"] = row["price"] = None

    shown = serve(run, table, tmp_path / "shown", change)
    for file in shown.glob("*.parquet"):
        rows = pq.read_table(file)
        for name in ("raw.city", "raw.visits"):  # as a service writes what it knows nothing of
            rows = rows.set_column(rows.column_names.index(name), name, pa.nulls(len(rows)))
        pq.write_table(rows, file)
    found = skew(str(shown), run)
    assert differing(found) == {"city", "visits", "price"}
    assert entry(found, "city")["looks_like"] == "served is missing (100% of the differing rows)"
    assert entry(found, "visits")["share"] == 1 and not differing(found, "encoded")


def test_what_costs_most_comes_first(world, tmp_path: Path) -> None:
    run, table = world

    def change(row: dict[str, Any], number: int) -> None:
        row["city"] = {"Ulm": "ulm ", "Bonn": "bonn "}.get(row["city"])
        if row["price"] is not None:
            row["price"] = row["price"] * (1 + 1e-5)
        if number % 2:
            row["maker"] = "somebody"

    found = skew(str(serve(run, table, tmp_path / "shown", change)), run)
    effects = [e["effect"] for e in found["raw"] if e["differ"]]
    assert effects == sorted(effects, reverse=True) and differing(found) == {"city", "price", "maker"}
    assert found["raw"][2]["column"] == "price"  # in most rows, and yet it hardly matters
    city = entry(found, "city")
    assert city["looks_like"].startswith("only case or spaces differ")
    assert {tuple(pair[:2]) for pair in city["pairs"]} == {("ulm ", "Ulm"), ("bonn ", "Bonn")}
    # Below the tolerance nothing is said, but counted.
    assert not any("maker" in line for line in skew(found["exposures"], run, tolerance=0.5)["verdict"])


def test_who_it_was_is_never_printed(world, tmp_path: Path) -> None:
    run, table = world
    encoder = copy.copy(checkpoint.load(run).encoder)
    users = encoder.vocabularies["user"].values
    encoder.vocabularies = encoder.vocabularies | {
        "user": Vocabulary(users.take(pa.array(np.arange(len(users))[::-1])))
    }
    found = skew(str(serve(run, table, tmp_path / "shown", stale, encoder)), run)
    assert entry(found, "user", "encoded")["share"] == 1 and "pairs" not in entry(found, "user", "encoded")
    assert '"u1"' not in json.dumps(found)


def test_the_log_of_the_service_itself(world, tmp_path: Path) -> None:
    run, table = world
    bundle = export(run, tmp_path / "bundle")

    def log(engine: Engine, folder: Path) -> str:
        requests = []
        for number, row in enumerate(table.to_pylist()[-80:]):
            past = {s.name: tuple(zip(*(row[name] for name in s.list_columns()))) for s in SCHEMA.sequences}
            columns = {name: row[name] for name in ("city", "visits")}
            own = {name: row[name] for name in ("maker", "words", "price", "released")}
            ask = Ask(row["user"], columns, past, [row["item"]], [own], row["time"])
            scores = engine.rank([ask])[0].scores
            requests.append(Shown(f"r{number}", 1e9, engine, 7, ask, engine.fused(scores), scores))
        folder.mkdir()
        together = rows_of(requests)
        assert together.equals(pa.concat_tables([rows_of([one]) for one in requests], promote_options="permissive"))
        write_file(folder / "shown.parquet", [together])
        return str(folder)

    found = skew(log(Engine(bundle), tmp_path / "right"), tmp_path / "bundle")
    assert found["verdict"] == [] and found["join"]["joined"] == 80
    assert list(found["versions"]) == [bundle.version] and len(found["encoded"]) == len(SCHEMA.features)
    encoder = bundle.encoder
    encoder.vocabularies["user"] = Vocabulary(encoder.vocabularies["user"].values[::-1])
    found = skew(log(Engine(bundle), tmp_path / "wrong"), run)
    assert found["verdict"][0].startswith("encoding of user: 100.00% of 80 rows differ")


# -- who is joined


def test_what_has_no_partner_is_counted(world, tmp_path: Path) -> None:
    run, table = world

    def change(row: dict[str, Any], number: int) -> None:
        if number < 10:
            row["item"] = 10_000 + number  # never logged
        elif number < 30:
            row["time"] += 2

    twice = pa.concat_tables([table.slice(0, 200), table.slice(190, 10)])
    found = skew(str(serve(run, twice, tmp_path / "shown", change)), run)
    join = found["join"]
    assert join["exposures"] == 210 and join["joined"] == 180 and join["without_training_row"] == 30
    assert join["of_a_known_pair"] == 20 and join["repeated_exposures"] == 10
    assert join["training_rows_of_that_time"] == 170 and join["training_rows_without_exposure"] == 0
    near = skew(str(tmp_path / "shown"), run, within=2)
    assert near["join"]["joined"] == 200 and differing(near) == {"time"}


@pytest.mark.parametrize("column", ["user", "item"])
def test_rows_of_nobody_are_not_joined(world, tmp_path: Path, column: str) -> None:
    """Though the log has such rows as well, at the same time."""
    run, table = world
    twice = pa.concat_tables([table.slice(0, 150), table.slice(0, 10)])
    shown = serve(run, twice, tmp_path / "shown")  # a file of 150, and the first ten again

    def without(rows: pa.Table) -> pa.Table:
        """Of the first 20 rows nobody knows whose they were."""
        place = rows.column_names.index(column)
        values = [None if number < 20 else value for number, value in enumerate(rows[column].to_pylist())]
        return rows.set_column(place, column, pa.array(values, rows[column].type))

    for file in shown.glob("*.parquet"):
        pq.write_table(without(pq.read_table(file)), file)
    pq.write_table(without(table), tmp_path / "log.parquet")
    join = skew(str(shown), run, data=str(tmp_path / "log.parquet"))["join"]
    assert join["without_user_or_item"] == 30 and join["joined"] == 130 and join["without_training_row"] == 30
    assert join["of_a_known_pair"] == 0 and join["repeated_exposures"] == 0
    assert join["training_rows_of_that_time"] == 130


@pytest.mark.parametrize(("first", "count", "there", "without"), [(29, 1, 0, 0), (0, 1, 1, 1), (0, 30, 28, 0)])
def test_training_rows_of_another_time_are_not_counted(
    world, tmp_path: Path, first: int, count: int, there: int, without: int
) -> None:
    """Of the first 30 rows, a second apart, some were served two seconds late; the next come an hour later."""
    run, table = world

    def change(row: dict[str, Any], number: int) -> None:
        row["time"] += 2

    shown = serve(run, table.slice(first, count), tmp_path / "shown", change)
    join = skew(str(shown), run, within=2)["join"]
    assert join["joined"] == count and join["time_shift"] == 0
    assert join["training_rows_of_that_time"] == there and join["training_rows_without_exposure"] == without


def test_an_empty_join_is_a_finding(world, tmp_path: Path) -> None:
    run, table = world
    random = np.random.default_rng(3)

    def change(row: dict[str, Any], number: int) -> None:
        row["time"] += int(random.integers(1000, 100_000))

    found = skew(str(serve(run, table, tmp_path / "shown", change)), run)
    assert found["differs"] and found["join"]["joined"] == 0
    assert found["verdict"][0].startswith("none of 360 exposures has a training row: the nearest rows")
    assert skew(str(tmp_path / "shown"), run, log=False)["verdict"] == []


def test_models_are_told_apart(world, tmp_path: Path) -> None:
    run, table = world
    names = ["ours" if number % 2 else "theirs" for number in range(len(table))]
    shown = serve(run, table, tmp_path / "shown", model=names, version=[f"v{n % 4}" for n in range(len(table))])
    found = skew(str(shown), run)
    assert found["model"] == "ours" and found["rows"] == len(table) // 2 and set(found["versions"]) == {"v1", "v3"}
    assert skew(str(shown), run, version="v3")["rows"] == len(table) // 4
    assert 0 < skew(str(shown), run, model="theirs", sample=0.3)["rows"] < len(table) // 3
    with pytest.raises(InputError, match="no exposures of model nobody"):
        skew(str(shown), run, model="nobody")
    other = serve(run, table, tmp_path / "other", model=["a" if n % 2 else "b" for n in range(len(table))])
    with pytest.raises(InputError, match="exposures of a, b: name one of them with --model"):
        skew(str(other), run)


def test_exposures_of_another_schema_are_refused(world, tmp_path: Path) -> None:
    run, table = world
    shown = serve(run, table, tmp_path / "shown")
    for file in shown.glob("*.parquet"):
        pq.write_table(pq.read_table(file).drop_columns(["raw.price"]), file)
    with pytest.raises(InputError, match=r"no column 'raw\.price': these are exposures of another schema"):
        skew(str(shown), run)
    pq.write_table(table.drop_columns(["price"]), tmp_path / "log.parquet")
    with pytest.raises(InputError, match="training log: no column 'price'"):
        skew(str(serve(run, table, tmp_path / "again")), run, data=str(tmp_path / "log.parquet"))


def test_the_report_says_the_verdict_first(world, tmp_path: Path) -> None:
    run, table = world
    found = skew(str(serve(run, table, tmp_path / "shown", stale)), run, command="scalerec skew")
    write(found, tmp_path / "report")
    text = (tmp_path / "report/skew.md").read_text()
    assert text.index("**column visits:") < text.index("## Join") < text.index("## Raw columns")
    assert json.loads((tmp_path / "report/skew.json").read_text())["differs"] is True
    assert (tmp_path / "report/skew.png").stat().st_size > 10_000


# -- the pieces


def test_the_nearest_and_the_last_by_hand() -> None:
    pairs, times = np.array([1, 1, 1, 4], np.uint64), np.array([10.0, 20.0, 30.0, 5.0])
    asked = Keys(np.array([1, 1, 1, 1, 4, 9, 0], np.uint64), np.array([9, 10, 26, 99, 5.5, 5, 5.0]))
    assert last_before(Keys(pairs, times), asked).tolist() == [-1, 0, 1, 2, 3, -1, -1]
    index, gap = nearest(Keys(pairs, times), asked)
    assert index.tolist() == [0, 0, 2, 2, 3, -1, -1] and gap[:5].tolist() == [-1, 0, -4, 69, 0.5]
    assert match(Keys(pairs, times), asked, 1).index.tolist() == [0, 0, -1, -1, 3, -1, -1]
    empty = Keys(np.empty(0, np.uint64), np.empty(0))
    assert last_before(empty, asked).tolist() == [-1] * 7 and nearest(empty, asked)[0].tolist() == [-1] * 7


@pytest.mark.parametrize(("log_end", "asked_end"), [(1, 1), (500, 1), (1, 500), (500, 500)])
def test_a_unit_is_not_guessed_from_small_times(log_end: float, asked_end: float) -> None:
    """Relative times that have nothing to do with each other are in no unit of each other."""
    random = np.random.default_rng(0)
    pairs = np.arange(400, dtype=np.uint64)
    found = match(Keys(pairs, random.random(400) * log_end), Keys(pairs, random.random(400) * asked_end), 0)
    assert (found.index == -1).all() and found.scale == 1 and found.shift == 0 and found.distance > 0


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("start", [0, START])
@pytest.mark.parametrize("within", [0, 60])
def test_a_unit_is_guessed_though_the_finer_part_is_lost(scale: float, start: int, within: float) -> None:
    """A minute of times, in seconds or finer; what is finer than whole numbers is cut off in the coarser log."""
    random = np.random.default_rng(0)
    fine = np.sort(random.integers(1, 60 * 10**6, 400)) + start * 10**6  # microseconds
    seconds = np.maximum(fine // 10**6, 1).astype(float)
    finer = fine // (10**6 / max(scale, 1 / scale)) + 0.0
    log, asked = (seconds, finer) if scale > 1 else (finer, seconds)
    pairs = np.arange(400, dtype=np.uint64)
    found = match(Keys(pairs, log), Keys(pairs, asked), within)
    assert found.scale == scale and (found.index == np.arange(400)).all()


@pytest.mark.parametrize(
    ("served", "trained", "pattern"),
    [
        ([1, 2], [1, 2, 3], "misses the last 1"),
        ([1, 2, 3, 4, 5], [3, 4, 5, 6, 7], "misses the last 2"),
        ([1, 2, 3, 4], [1, 2], "has more at the end: 2"),
        ([3, 2, 1], [1, 2, 3], "the order is reversed"),
        ([2, 3], [1, 2, 3], "misses the oldest"),
        ([0, 1, 2], [1, 2], "has more of the oldest"),
        ([1, 3, 2], [1, 2, 3], "the same values in another order"),
        ([], [1], "is empty"),
        ([7, 8, 9], [1, 2, 3], ""),
    ],
)
def test_how_lists_differ(served: list[int], trained: list[int], pattern: str) -> None:
    comparison = Comparison("past")
    kind = pa.list_(pa.int64())
    assert comparison.add(pa.array([served, trained], kind), pa.array([trained, trained], kind)).tolist() == [
        True,
        False,
    ]
    found = comparison.found()
    assert pattern in found["looks_like"] and bool(pattern) == bool(found["looks_like"])
    place = next((i for i, (s, t) in enumerate(zip(served, trained)) if s != t), min(len(served), len(trained)))
    assert found["first_place"] == place + 1
    assert found["other_length"] == (0.5 if len(served) != len(trained) else 0)


def test_values_that_differ() -> None:
    def differs(a: pa.Array, b: pa.Array) -> list[bool]:
        return Comparison("x", kind="quantity").add(a, b).tolist()

    large = 2**60
    assert differs(pa.array([large, None, 1]), pa.array([large + 1, None, None])) == [True, False, True]
    assert differs(pa.array([0.1, 1e9], pa.float32()), pa.array([0.1, 1e9 + 1e5])) == [False, True]
    assert differs(pa.array(["1", "a", None]), pa.array([1, 2, None])) == [True, True, False]
    assert differs(pa.array(["a", "b"]).dictionary_encode(), pa.array(["a", "c"], pa.large_string())) == [False, True]
    assert differs(pa.nulls(2), pa.array([[1], []])) == [True, False]
    assert differs(pa.array([[1.0, None], [2.0]]), pa.array([[1, None], [3]])) == [False, True]
    moments = pa.array([1_700_000_000_000, 5], pa.timestamp("ms"))
    assert differs(moments, moments.cast(pa.timestamp("us"))) == [False, False]
    assert differs(pa.array([True, False]), pa.array([1, 1])) == [False, True]


SHIFT = [0, 1e-6, 60, 1_600]  # of these seconds only the first is none


@pytest.mark.parametrize("as_list", [False, True])
@pytest.mark.parametrize(
    ("served", "trained"),
    [
        (pa.timestamp("us"), pa.timestamp("us")),
        (pa.timestamp("us", "UTC"), pa.float64()),
        (pa.float64(), pa.timestamp("us")),
        (pa.float64(), pa.float64()),
        (pa.float64(), pa.int64()),
        (pa.int64(), pa.float64()),
    ],
)
def test_shifted_times_differ(served: pa.DataType, trained: pa.DataType, as_list: bool) -> None:
    def times(shifts: list[float], kind: pa.DataType) -> pa.Array:
        if pa.types.is_timestamp(kind):
            moments = pa.array([START * 10**6 + round(shift * 1e6) for shift in shifts]).cast(kind)
        else:
            moments = pa.array([START + shift for shift in shifts]).cast(kind)
        return pa.LargeListArray.from_arrays(pa.array(range(len(shifts) + 1)), moments) if as_list else moments

    shifts = [shift for shift in SHIFT if shift == int(shift) or not pa.types.is_integer(served)]
    found = Comparison("time", kind="time")
    assert found.add(times(shifts, served), times([0] * len(shifts), trained)).tolist() == [s > 0 for s in shifts]
    assert found.found()["largest_difference"] == 1_600


def test_ids_are_equal_as_the_encoder_takes_them() -> None:
    def differs(a: pa.Array, b: pa.Array) -> list[bool]:
        return Comparison("x").add(a, b).tolist()

    ids = pa.array([123_456_789.0, 7.0, None])
    assert differs(ids, pa.array([123_456_790.0, 7.0, None])) == [True, False, False]
    assert differs(ids, pa.array([123_456_790, 7, 1])) == [True, False, True]
    assert differs(pa.array([2.0**60]), pa.array([2**60 + 1])) == [True]  # one float64, two ids
    assert differs(pa.array([[123_456_789.0, 7.0], []]), pa.array([[123_456_790, 7], None])) == [True, False]


@pytest.mark.parametrize("kind", [pa.float64(), pa.timestamp("us")])
def test_times_that_are_a_little_late_are_named(world, tmp_path: Path, kind: pa.DataType) -> None:
    run, table = world
    shown = serve(run, table, tmp_path / "shown")
    unit = 10**6 if pa.types.is_timestamp(kind) else 1

    def moved(column: pa.ChunkedArray, shift: int) -> pa.Array:
        if not pa.types.is_list(column.type):
            return pa.array([unit * (time + shift) for time in column.to_pylist()]).cast(kind)
        times = [[unit * (time + shift) for time in some or ()] for some in column.to_pylist()]
        return pa.array(times, pa.list_(pa.int64())).cast(pa.list_(kind))

    for file in shown.glob("*.parquet"):
        rows = pq.read_table(file)
        for name, shift in (("raw.time", 90), ("raw.seen_time", -90)):
            rows = rows.set_column(rows.column_names.index(name), name, moved(rows[name], shift))
        pq.write_table(rows, file)
    found = skew(str(shown), run, within=90)
    assert differing(found) == {"time", "seen_time"}
    assert entry(found, "time")["share"] == 1 and entry(found, "time")["median_difference"] == 90
    assert entry(found, "time")["looks_like"] == "served is the trained plus 90"
    assert entry(found, "seen_time")["looks_like"] == "served is the trained minus 90"
    assert "pairs" not in entry(found, "time") and "pairs" not in entry(found, "seen_time")


def test_rank_correlations_are_spearmans() -> None:
    from scipy.stats import spearmanr

    random = np.random.default_rng(0)
    groups = random.integers(0, 5, 200)
    a, b = random.integers(0, 10, 200).astype(np.float32), random.random(200).astype(np.float32)
    found = rank_correlations(groups, a, a + 4 * b)
    expected = [spearmanr(a[groups == g], (a + 4 * b)[groups == g]).statistic for g in range(5)]
    assert found == pytest.approx(expected)
    assert np.isnan(rank_correlations(np.zeros(3, int), np.ones(3), np.arange(3.0)))[0]


def test_the_command(world, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, table = world

    def command(*more: str) -> int:
        parser = argparse.ArgumentParser()
        commands.add_skew(lambda name, run, help: parser)
        parser.add_argument("--json", action="store_true")
        parser.set_defaults(changes={})
        return commands.skew(parser.parse_args(["--run", str(run), *more]))

    clean, wrong = serve(run, table, tmp_path / "clean"), serve(run, table, tmp_path / "wrong", stale)
    assert command(str(clean)) == 0
    assert "Nothing differs beyond its tolerance" in capsys.readouterr().out
    assert command(str(wrong), "--out", str(tmp_path / "out")) == 1
    said = capsys.readouterr()
    assert "column visits:" in said.out and "skew.json, skew.md, skew.png" in said.err
    assert command(str(wrong), "--no-data", "--json") == 0
    assert json.loads(capsys.readouterr().out)["join"] is None
    assert command(str(wrong), "--tolerance", "0.9", "--data", str(run.parent / "log")) == 0

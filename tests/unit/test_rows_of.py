"""Items and users of a log, against counts in plain Python."""

from __future__ import annotations

from collections import Counter
from datetime import date, datetime

import numpy as np
import pyarrow as pa
import pytest

from scalerec.batch import UNKNOWN
from scalerec.errors import InputError
from scalerec.inference import bundle
from scalerec.inference.catalogue import Catalogue
from scalerec.inference.retrieval import Popular
from scalerec.inference.rows_of import explained_share, item_rows, user_rows, usual_share
from scalerec.models import dcnv2, sasrec
from scalerec.schema import Categorical, Group, Numeric, Schema, Sequence, SequenceField, Task
from tests.contract.world import row
from tests.unit.bundles import saved_run


def test_items_and_users_against_a_count_by_hand(tmp_path):
    """Popularity, the latest value of each column, and defaults of what belongs to the moment, by plain Python."""
    log = [{**row(user, number), "time": 1e9 + 3000 - 10 * number + user} for number in range(9) for user in range(12)]
    for entry in log:  # a price that rose once, at a time of its own for each item
        entry["price"] = entry["item"] + (1.0 if entry["time"] > 1e9 + 2950 + entry["item"] else 0.0)
        entry["city"] = "moved" if entry["time"] > 1e9 + 3000 and entry["user"] == "u7" else entry["city"]
    run = saved_run(tmp_path / "run", dcnv2.tiny(), pa.RecordBatch.from_pylist(log))
    found = item_rows(run)
    by_time = sorted(log, key=lambda entry: entry["time"])
    latest = {entry["item"]: entry for entry in by_time}
    counts = Counter(entry["item"] for entry in log)
    table = found.items.to_pylist()
    assert found.items.column_names == ["item", "author", "price", "popularity"]
    assert {entry["item"] for entry in table} == set(latest)
    for entry in table:
        assert entry == {**{name: latest[entry["item"]][name] for name in entry if name != "popularity"},
                         "popularity": counts[entry["item"]]}  # fmt: skip
    assert [entry["popularity"] for entry in table] == sorted(counts.values(), reverse=True)
    views = sorted(entry["views"] for entry in log if entry["views"] is not None)
    (usual, often), (_, less) = Counter(entry["words"] for entry in log).most_common(2)
    assert found.context == {"words": usual, "views": views[(len(views) - 1) // 2]} and often > less
    users = {entry["user"]: entry for entry in user_rows(run).to_pylist()}
    last = {entry["user"]: entry for entry in by_time}
    assert set(users) == set(last)
    for name, entry in users.items():
        assert entry == {key: last[name][key] for key in ("user", "city", "age", "income", "interests")}
    assert users["u7"]["city"] == "moved"


def test_rows_that_stand_for_many_events_count_each_new_one(tmp_path):
    """One row a user: the items of its new events count, of its older past what it says is known."""
    schema = Schema(
        groups=(
            Group(name="past", side="user", features=(
                Sequence(name="seen", fields=(SequenceField(of="item"), SequenceField(of="kind")), time=True),)),
            Group(name="item", side="item", features=(Categorical(name="item"), Categorical(name="kind"))),
        ), tasks=(), user="user", item="item", time="time", new_events="new",
    )  # fmt: skip
    rows = [
        {"user": "a", "time": 9.0, "item": 1, "kind": "x", "seen_item": [2, 3, 1], "seen_kind": ["v", "z", "x"],
         "seen_time": [1.0, 2.0, 3.0], "new": 2},
        {"user": "b", "time": 5.0, "item": 2, "kind": "v", "seen_item": [4], "seen_kind": ["x"], "seen_time": [4.0],
         "new": 0},
    ]  # fmt: skip
    config = sasrec.tiny().model_copy(update={"dim": 16})
    run = saved_run(tmp_path / "run", config, pa.Table.from_pylist(rows), schema)
    found = item_rows(run)
    table = {entry["item"]: (entry["kind"], entry["popularity"]) for entry in found.items.to_pylist()}
    assert table == {1: ("x", 2), 3: ("z", 1), 2: ("v", 1), 4: ("x", 0)}
    bundle.export(run, tmp_path / "bundle")  # a schema without tasks and without a user's own features
    assert bundle.load(tmp_path / "bundle", "int8").vectors.shape == (4, 16)


def test_a_log_may_have_a_popularity_of_its_own(tmp_path):
    """A feature called like the count of rows keeps its own values; a moment's is not read from the items."""
    for values, owned in ((lambda n: n % 3, True), (lambda n: n * 7 % 11, False)):
        rows = [{"user": f"u{n % 4}", "item": n % 3, "popularity": float(values(n)), "click": n % 2} for n in range(33)]
        schema = Schema(
            groups=(Group(name="user", side="user", features=(Categorical(name="user"),)),
                    Group(name="item", side="item", features=(Categorical(name="item"), Numeric(name="popularity")))),
            tasks=(Task(name="click"),), user="user", item="item", dim=8,
        )  # fmt: skip
        run = saved_run(tmp_path / f"run-{owned}", dcnv2.tiny(), pa.Table.from_pylist(rows), schema)
        found = bundle.export(run, tmp_path / f"bundle-{owned}")
        assert found.items.column_names == ["item", *["popularity"] * owned, "#popularity"]
        assert Popular(found.items, "item").counts.tolist() == [11, 11, 11]
        served = Catalogue(found.encoder, found.items).columns
        assert ("popularity" in served) == owned == ("popularity" not in found.context)


@pytest.mark.parametrize("vocabulary", ["hash", "dictionary"])
def test_a_day_may_be_a_category_of_the_moment(tmp_path, vocabulary):
    """Its default is the text that it is encoded by; of a moment there is no such text, which is said in one line."""
    rows = [
        {"user": f"u{n % 4}", "item": n % 3, "day": date(2020, 1, 1 + n * 7 % 11), "click": n % 2} for n in range(33)
    ]
    item = (Categorical(name="item"), Categorical(name="day", vocabulary=vocabulary, buckets=50))
    schema = Schema(
        groups=(Group(name="user", side="user", features=(Categorical(name="user"),)),
                Group(name="item", side="item", features=item)),
        tasks=(Task(name="click"),), user="user", item="item", dim=8,
    )  # fmt: skip
    found = bundle.export(saved_run(tmp_path / "run", dcnv2.tiny(), pa.Table.from_pylist(rows), schema), tmp_path / "b")
    day = pa.array([date.fromisoformat(found.context["day"])])
    ids = [found.encoder.encode_side(pa.record_batch({"day": values}), "item", ["day"]).ids.tolist()
           for values in (day, pa.array([found.context["day"]]))]  # fmt: skip
    assert ids[0] == ids[1] != [[UNKNOWN]]
    moments = pa.Table.from_pylist([{**row, "day": datetime(2020, 1, row["day"].day)} for row in rows])
    run = saved_run(tmp_path / "moments", dcnv2.tiny(), moments, schema)
    with pytest.raises(InputError, match="'day' holds datetime values"):
        bundle.export(run, tmp_path / "c")


def few(**columns: pa.Array) -> tuple[pa.Table, Schema]:
    """A log in which no feature reads the time."""
    log = {"user": [1, 2, 3, 4], "item": [1, 2, 1, 2], "click": [0, 1, 0, 1], "at": [datetime(2024, 1, 2)] * 4}
    item = (Categorical(name="item"), *(Categorical(name=name) for name in columns))
    schema = Schema(
        groups=(Group(name="user", side="user", features=(Categorical(name="user"),)),
                Group(name="item", side="item", features=item)),
        tasks=(Task(name="click"),), user="user", item="item", time="at", dim=8,
    )  # fmt: skip
    return pa.table(log | columns), schema


def test_the_type_of_the_time_is_known_though_no_feature_reads_it(tmp_path):
    log, schema = few()
    assert item_rows(saved_run(tmp_path / "run", dcnv2.tiny(), log, schema)).types["at"] == "timestamp[us]"


@pytest.mark.parametrize("largest", [2**63 - 1, 2**63])
def test_whole_numbers_that_no_request_could_bring_are_refused(tmp_path, largest):
    log, schema = few(code=pa.array([1, 2, None, largest], pa.uint64()))
    run = saved_run(tmp_path / "run", dcnv2.tiny(), log, schema)
    if largest < 2**63:
        bundle.export(run, tmp_path / "b")
        return
    with pytest.raises(InputError, match=f"'code' holds {largest}: a service takes whole numbers below"):
        bundle.export(run, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_what_belongs_to_an_item_is_measured():
    random = np.random.default_rng(0)
    item = random.integers(0, 200, 5000)
    assert (
        usual_share(item, item % 7) == 1 and usual_share(item, np.where(random.random(5000) < 0.05, 9, item % 7)) > 0.9
    )
    assert usual_share(item, random.integers(0, 3, 5000)) < 0.6
    few = random.integers(0, 2500, 5000)  # two rows an item: unadjusted, half of any noise would be explained
    assert explained_share(few, random.normal(size=5000)) < 0.1
    assert explained_share(few, few + random.normal(size=5000)) > 0.9
    assert explained_share(np.arange(50), random.normal(size=50)) == 1  # one row an item: nothing speaks against it

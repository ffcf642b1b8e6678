"""An experiment is analysed by its users: intervals cover, what is not there is not found, bad dealing is seen."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import stats

from scalerec.errors import InputError
from scalerec.studies import commands
from scalerec.studies.ab import Names, ab
from scalerec.studies.ab_report import markdown, write
from scalerec.studies.lift import (
    Arm,
    bootstrap_lift,
    delta_lift,
    fieller,
    holm,
    minimum_detectable,
    rate,
    sample_ratio,
)

SIMULATIONS = 600


def users(random: np.random.Generator, n: int, lift: float = 0.0) -> Arm:
    """Users of different activity and taste: their impressions are far from independent."""
    shown = random.geometric(0.1, n).astype(np.float64)
    taste = random.beta(2, 18, n) * (1 + lift)
    return Arm(random.binomial(shown.astype(int), np.minimum(taste, 1)).astype(np.float64), shown)


def per_user(arm: Arm) -> Arm:
    return Arm(arm.outcome, np.ones(len(arm.outcome)))


# -- statistics


@pytest.mark.parametrize("metric", ["ratio", "mean"])
def test_without_a_difference_one_in_twenty_is_found(metric: str) -> None:
    random = np.random.default_rng(0)
    found = []
    for _ in range(SIMULATIONS):
        a, b = users(random, 400), users(random, 400)
        found.append(delta_lift(a, b) if metric == "ratio" else delta_lift(per_user(a), per_user(b)))
    false = np.mean([lift.p < 0.05 for lift in found])
    assert 0.032 < false < 0.071  # 0.05 +- 2.4 standard errors, and the interval says what p does
    assert [lift.resolved for lift in found] == [lift.p < 0.05 for lift in found]
    # Had each impression been one observation, far more would be.
    naive = []
    for _ in range(200):
        a, b = users(random, 400), users(random, 400)
        r, s = a.outcome.sum() / a.base.sum(), b.outcome.sum() / b.base.sum()
        naive.append(abs(s - r) / math.sqrt(r * (1 - r) / a.base.sum() + s * (1 - s) / b.base.sum()) > 1.96)
    assert np.mean(naive) > 0.1


def test_a_known_lift_is_covered() -> None:
    random, inside, power = np.random.default_rng(1), [], []
    true = 0.12
    for _ in range(SIMULATIONS):
        a, b = users(random, 500), users(random, 600, lift=true)
        found = delta_lift(a, b)
        assert found.lift_low is not None and found.lift_high is not None
        inside.append(found.lift_low <= true <= found.lift_high)
        power.append((found.resolved, minimum_detectable(a, b)))
    assert 0.93 < np.mean(inside) < 0.97
    # What is called detectable in 80 % of experiments is: power at the true lift by the normal distribution.
    expected = stats.norm.cdf(true / np.mean([m for _, m in power]) * (1.959964 + 0.841621) - 1.959964)
    assert np.mean([resolved for resolved, _ in power]) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("metric", ["ratio", "mean"])
def test_delta_method_and_bootstrap_agree(metric: str) -> None:
    random = np.random.default_rng(2)
    a, b = users(random, 3_000), users(random, 2_000, lift=0.1)
    if metric == "mean":
        a, b = per_user(a), per_user(b)
    delta, redrawn = delta_lift(a, b), bootstrap_lift(a, b, replicates=2_000)
    width = delta.high - delta.low
    assert redrawn.difference == delta.difference and redrawn.lift == delta.lift
    assert redrawn.low == pytest.approx(delta.low, abs=0.06 * width)
    assert redrawn.high == pytest.approx(delta.high, abs=0.06 * width)
    assert delta.lift_low is not None and redrawn.lift_low is not None
    assert redrawn.lift_low == pytest.approx(delta.lift_low, abs=0.06 * width / rate(a).value)
    assert redrawn.resolved == delta.resolved
    if delta.p > 0.01:
        assert redrawn.p == pytest.approx(delta.p, abs=0.03)


def test_means_are_welchs_test() -> None:
    random = np.random.default_rng(3)
    a, b = random.normal(3, 2, 4_000), random.normal(3.1, 3, 3_000)
    found = delta_lift(Arm(a, np.ones(len(a))), Arm(b, np.ones(len(b))))
    assert found.p == pytest.approx(stats.ttest_ind(b, a, equal_var=False).pvalue, rel=2e-3)
    assert rate(Arm(a, np.ones(len(a)))).variance == pytest.approx(a.var(ddof=1) / len(a))


def test_intervals_of_lift_and_difference_decide_alike() -> None:
    random = np.random.default_rng(4)
    for _ in range(300):
        a, b = users(random, 30), users(random, 30, lift=0.5)
        found = delta_lift(a, b)
        if found.lift_low is not None and found.lift_high is not None:
            assert found.resolved == (found.lift_low > 0 or found.lift_high < 0)
    nothing = Arm(np.zeros(50), np.ones(50))
    found = delta_lift(nothing, nothing)
    assert found.p == 1 and not found.resolved and math.isnan(found.lift) and found.lift_low is None
    assert fieller(rate(nothing), rate(Arm(np.arange(50.0), np.ones(50)))) == (None, None)


def test_sample_ratios() -> None:
    square, p = sample_ratio([5_100, 4_900], [1, 1])
    expected = stats.chisquare([5_100, 4_900])
    assert square == pytest.approx(expected.statistic) and p == pytest.approx(expected.pvalue)
    square, p = sample_ratio([900, 60, 40], [90, 5, 5])
    expected = stats.chisquare([900, 60, 40], [900, 50, 50])
    assert square == pytest.approx(expected.statistic) and p == pytest.approx(expected.pvalue)
    assert sample_ratio([10, 1], [1, 0]) == (None, 0.0) and sample_ratio([10, 0], [1, 0]) == (0.0, 1.0)
    # Units dealt as planned look wrong as seldom as the threshold says.
    random = np.random.default_rng(5)
    wrong = [sample_ratio(random.multinomial(2_000, [0.7, 0.2, 0.1]), [7, 2, 1])[1] < 0.05 for _ in range(1_000)]
    assert np.mean(wrong) == pytest.approx(0.05, abs=0.02)


def test_several_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


# -- files


def experiment(
    folder: Path, *, count: int = 3_000, lift: float = 0.0, shares: tuple[float, ...] = (0.5, 0.5), seed: int = 0,
) -> tuple[Path, Path]:  # fmt: skip
    """Exposures and events of `count` users, of whom those of the last arm click more often."""
    random = np.random.default_rng(seed)
    names = [f"model_{'abc'[i]}" for i in range(len(shares))]
    arm = random.choice(len(shares), count, p=shares)
    shown, clicks = [], []
    for user in range(count):
        taste = random.beta(2, 8) * (1 + lift * (arm[user] == len(shares) - 1))
        for number in range(random.geometric(0.2)):
            time = 1_000_000 + 10_000 * number + user
            shown.append({
                "request_id": f"{user}-{number}", "time": time, "model": names[arm[user]], "bucket": user,
                "user": f"u{user}", "item": number % 5,
            })  # fmt: skip
            clicks.append({
                "user": f"u{user}", "item": number % 5, "time": time + int(random.integers(0, 600)),
                "click": int(random.random() < taste), "spent": float(random.integers(5)),
            })  # fmt: skip
    for name, rows in (("shown", shown), ("events", clicks)):
        (folder / name).mkdir(parents=True)
        table = pa.Table.from_pylist([rows[i] for i in random.permutation(len(rows))])
        pq.write_table(table.slice(0, len(rows) // 2), folder / name / "0.parquet", row_group_size=700)
        pq.write_table(table.slice(len(rows) // 2), folder / name / "1.parquet")
    return folder / "shown", folder / "events"


def rewrite(folder: Path, change: Any) -> None:
    for file in folder.glob("*.parquet"):
        pq.write_table(change(pq.read_table(file)), file)


def run(paths: tuple[Path, Path], **options: Any) -> dict[str, Any]:
    return ab(str(paths[0]), str(paths[1]), **{"label": "click"} | options)


def test_a_lift_is_found_in_files(tmp_path: Path) -> None:
    paths = experiment(tmp_path, lift=0.3)
    found = run(paths)
    events, shown = (pa.concat_tables(map(pq.read_table, p.glob("*"))).to_pylist() for p in reversed(paths))
    arm = {row["user"]: row["model"] for row in shown}
    for entry in found["arms"]:
        mine = [row for row in events if arm[row["user"]] == entry["arm"]]
        assert entry["base"] == len(mine) and entry["outcome"] == sum(row["click"] for row in mine)
        assert entry["units"] == list(arm.values()).count(entry["arm"])
        assert entry["value"] == pytest.approx(entry["outcome"] / entry["base"])
    a, b = found["arms"]
    assert a["arm"] == "model_a" and "p" not in a and b["resolved"] and b["lift_low"] < 0.3 < b["lift_high"]
    assert found["trusted"] and found["events"]["attributed"] == found["events"]["with_label"]
    assert found["verdict"][0].startswith("model_b: click an exposure +")
    mean = run(paths, metric="mean", control="model_b", interval="bootstrap")
    assert [e["arm"] for e in mean["arms"]] == ["model_b", "model_a"] and mean["arms"][0]["base"] == b["units"]
    assert mean["arms"][1]["lift"] < 0
    assert run(paths, label="spent")["arms"][0]["value"] == pytest.approx(2, abs=0.1)


def test_nothing_is_not_resolved(tmp_path: Path) -> None:
    found = run(experiment(tmp_path))
    assert not found["arms"][1]["resolved"] and found["verdict"][0].endswith("not resolved")
    assert "*not resolved*" in markdown(found) and "minimum detectable lift" in markdown(found)


def test_users_that_got_lost_are_noticed(tmp_path: Path) -> None:
    paths = experiment(tmp_path, shares=(0.8, 0.2))
    assert not run(paths)["trusted"]  # against equal shares
    assert run(paths)["verdict"][0].startswith("sample ratio mismatch (p = ")
    weights = {"model_b": 0.2, "model_a": 0.8}
    found = run(paths, weights=weights)
    assert found["trusted"] and found["arms"][0]["arm"] == "model_b" and len(found["verdict"]) == 1
    # A tenth of the users of one arm never reached the log.
    lost = [f"u{number}" for number in range(0, 3_000, 4)]
    rewrite(paths[0], lambda rows: rows.filter(pa.array([
        not (row["model"] == "model_a" and row["user"] in lost) for row in rows.to_pylist()
    ])))  # fmt: skip
    assert not run(paths, weights=weights)["trusted"]


def test_users_of_several_arms_and_asked_models_are_left_out(tmp_path: Path) -> None:
    paths = experiment(tmp_path)
    base = run(paths)

    def change(rows: pa.Table) -> pa.Table:
        kept = rows.to_pylist()
        more = [row | {"model": "model_a" if row["model"] == "model_b" else "model_b", "request_id": "x"}
                for row in kept if row["user"] in ("u1", "u2", "u3")]  # fmt: skip
        asked = [row | {"model": "model_b", "bucket": None, "request_id": "y"} for row in kept if row["user"] == "u9"]
        return pa.Table.from_pylist(kept + more + asked)

    rewrite(paths[0], change)
    found = run(paths)
    assert found["units_in_several_arms"] == 3 and found["units"] == base["units"] - 3
    assert 0 < found["exposures_of_no_arm"] <= base["exposures_read"]
    assert sum(e["base"] for e in found["arms"]) < sum(e["base"] for e in base["arms"])


@pytest.mark.parametrize("kind", [pa.string(), pa.float64()])
def test_rows_of_nobody_are_nobodys(tmp_path: Path, kind: pa.DataType) -> None:
    """Neither one more unit nor, where there are events without a user as well, one that clicked at everything."""
    shown = [{"user": u, "time": 10, "model": "ab"[u % 2]} for u in range(400)]
    shown += [{"user": math.nan, "time": 20 + i, "model": "a"} for i in range(600)]
    events = [{"user": u, "time": 11, "click": int(u % 4 < 2)} for u in range(400)]
    events += [{"user": math.nan, "time": 20 + i, "click": 1} for i in range(600)]
    for name, rows in (("s", shown), ("e", events)):
        table = pa.Table.from_pylist([row | {"item": 1, "session": i} for i, row in enumerate(rows)])
        users = pa.array([row["user"] for row in rows], pa.float64(), from_pandas=kind == pa.string())
        pq.write_table(table.set_column(0, "user", users.cast(kind)), tmp_path / f"{name}.parquet")
    paths = tmp_path / "s.parquet", tmp_path / "e.parquet"
    found = run(paths)
    assert [e["units"] for e in found["arms"]] == [200, 200] and [e["outcome"] for e in found["arms"]] == [100, 100]
    assert found["arms"][1]["lift"] == 0 and found["trusted"] and found["exposures_of_no_unit"] == 600
    assert found["events"]["with_label"] == 800 and found["events"]["without_user_or_item"] == 600
    text = markdown(found)
    assert "600 exposures without a `user`" in text and "600 of these because their user or item is missing" in text
    sessions = run(paths, by="session")  # that these are known makes the users no better known
    assert [e["units"] for e in sessions["arms"]] == [800, 200] and sessions["exposures_of_no_unit"] == 0
    assert [e["outcome"] for e in sessions["arms"]] == [100, 100]
    rewrite(tmp_path, lambda t: t.set_column(0, "user", pa.nulls(len(t))) if "model" in t.column_names else t)
    with pytest.raises(InputError, match="column 'user' is empty in all exposures of an arm: name another with --by"):
        run(paths)


def test_events_belong_to_the_last_exposure_in_the_window(tmp_path: Path) -> None:
    kinds = pa.schema([("user", pa.string()), ("item", pa.int64()), ("time", pa.int64()), ("click", pa.int8())])
    events = [("a", 1, 105, 1), ("a", 1, 250, 1), ("a", 2, 120, 1), ("b", 1, 99, 1), ("b", 1, 100, 1), ("b", 1, 150, 0)]
    events += [("c", 1, 100, 1), ("d", 1, 100, 1), ("d", 1, 101, None)]
    shown = [("a", 1, 100), ("a", 1, 200), ("b", 1, 100), ("c", 1, 100), ("d", 1, 100)]
    pq.write_table(pa.Table.from_pylist([dict(zip(kinds.names, e)) for e in events], kinds), tmp_path / "e.parquet")
    rows = [{"user": u, "item": i, "time": t, "model": "x" if u in "ab" else "y"} for u, i, t in shown]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    paths = tmp_path / "s.parquet", tmp_path / "e.parquet"
    found = run(paths)
    counts = {"rows": 9, "with_label": 7, "without_user_or_item": 0, "attributed": 5}
    assert found["events"] == {"files": str(paths[1]), **counts}
    assert [e["outcome"] for e in found["arms"]] == [3, 2] and [e["base"] for e in found["arms"]] == [3, 2]
    assert run(paths, window=10)["arms"][0]["outcome"] == 2
    assert run(paths, names=Names(item=None))["arms"][0]["outcome"] == 4  # of whatever item
    moments = pa.array([1000 * 60 * row["time"] for row in rows], pa.timestamp("ms"))
    rewrite(tmp_path, lambda t: t.set_column(2, "time", moments) if "model" in t.column_names else t)
    assert run(paths, names=Names(time_unit=60.0))["events"]["attributed"] == 5


def test_three_arms(tmp_path: Path) -> None:
    found = run(
        experiment(tmp_path, shares=(0.4, 0.3, 0.3), lift=0.4), weights={"model_a": 4, "model_b": 3, "model_c": 3}
    )
    assert [e["resolved"] for e in found["arms"][1:]] == [False, True] and len(found["verdict"]) == 2
    assert all(e["p_holm"] >= e["p"] for e in found["arms"][1:]) and "(Holm)" in markdown(found)


def test_the_report(tmp_path: Path) -> None:
    found = run(experiment(tmp_path / "x", count=60))
    write(found, tmp_path / "out")
    assert json.loads((tmp_path / "out/ab.json").read_text())["units"] == 60
    text = (tmp_path / "out/ab.md").read_text()
    assert text.startswith("# click per exposure") and "fewer than 100 units" in text


@pytest.mark.parametrize(("more", "form"), [(0, ",.0f"), (0.25, ",.2f")])
def test_large_outcomes_are_shown_whole(tmp_path: Path, more: float, form: str) -> None:
    paths = experiment(tmp_path, count=60)
    rewrite(paths[1], lambda t: t.set_column(4, "spent", pa.array(t["spent"].to_numpy() * 12_345 + more)))
    found = run(paths, label="spent")
    assert all(entry["outcome"] > 1e6 for entry in found["arms"])
    rows = [line.split(" | ") for line in markdown(found).splitlines() if line.startswith("| model_")]
    assert [row[2] for row in rows] == [format(entry["outcome"], form) for entry in found["arms"]]


@pytest.mark.parametrize("interval", ["delta", "bootstrap"])
def test_a_control_without_any_outcome(tmp_path: Path, interval: str) -> None:
    paths = experiment(tmp_path / "x", count=60)
    arm = {row["user"]: row["model"] for file in paths[0].glob("*") for row in pq.read_table(file).to_pylist()}

    def change(rows: pa.Table) -> pa.Table:
        return pa.Table.from_pylist([row | {"click": int(arm[row["user"]] == "model_b")} for row in rows.to_pylist()])

    rewrite(paths[1], change)
    found = run(paths, interval=interval)
    write(found, tmp_path / "out")
    kept = json.loads((tmp_path / "out/ab.json").read_text(), parse_constant=pytest.fail)
    assert kept["arms"][1]["lift"] is None and kept["arms"][1]["minimum_detectable"] is None
    text = (tmp_path / "out/ab.md").read_text()
    assert "nan" not in text and "| +1 [+1, +1] |" in text and text.count("| - |") == 1


def test_what_cannot_be_analysed_is_said(tmp_path: Path) -> None:
    paths = experiment(tmp_path, count=50)
    rewrite(paths[1], lambda t: t.set_column(2, "time", pa.array(np.zeros(len(t)))))
    with pytest.raises(InputError, match=r"none of .* events with 'click' belongs to an exposure"):
        run(paths)
    with pytest.raises(InputError, match="no column 'bought'"):
        run(paths, label="bought")
    with pytest.raises(InputError, match="no column 'nothing': it has request_id, time, model"):
        run(paths, arms="nothing")
    with pytest.raises(InputError, match="no weight for arm 'model_b'"):
        run(paths, weights={"model_a": 1.0})
    with pytest.raises(InputError, match="--control nobody: the exposures have the arms model_a, model_b"):
        run(paths, control="nobody")
    rewrite(paths[0], lambda t: t.filter(pa.compute.equal(t["model"], "model_a")))
    with pytest.raises(InputError, match="needs two arms; column 'model' has only 'model_a'"):
        run(paths)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def command(*more: str) -> int:
        parser = argparse.ArgumentParser()
        commands.add_ab(lambda name, run, help, overridable: parser)
        parser.add_argument("--json", action="store_true")
        return commands.ab(parser.parse_args([str(paths[0]), "--events", str(paths[1]), "--label", "click", *more]))

    paths = experiment(tmp_path, shares=(0.8, 0.2), lift=0.4)
    assert command("--weights", "model_a=0.8,model_b=0.2", "--out", str(tmp_path / "out")) == 0
    said = capsys.readouterr()
    assert "model_b: click an exposure +" in said.out and "kept in" in said.err and "ab.json, ab.md" in said.err
    assert command("--json", "--metric", "mean") == 1  # not what equal shares would have dealt
    assert json.loads(capsys.readouterr().out)["trusted"] is False
    with pytest.raises(InputError, match="--columns user: three names"):
        command("--columns", "user")
    with pytest.raises(SystemExit):
        command("--weights", "half")

"""The comparison with RecTools' HSTU, as far as it goes without RecTools."""

import json
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from benchmarks import peers_hstu
from benchmarks.peers_hstu import Bench, Data, epoch_seconds, interactions, places, speeds, time_to


def test_without_the_environment_it_says_what_is_skipped_and_how_to_make_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["peers_hstu", "--environment", str(tmp_path / "none"), "--json"])
    peers_hstu.main()
    said = capsys.readouterr()
    assert list(json.loads(said.out)) == ["skipped"]
    assert "no environment" in said.err and "--install" in said.err


def test_a_broken_environment_is_skipped_too(tmp_path):
    python = peers_hstu.python_of(tmp_path)
    python.parent.mkdir()
    python.write_text("#!/bin/sh\necho no module >&2\nexit 1\n")
    python.chmod(0o755)
    assert "no module" in peers_hstu.missing(tmp_path)


@pytest.mark.parametrize("option", ["--epochs", "--timing-epochs", "--rounds"])
def test_nothing_to_measure_is_an_error(monkeypatch, option):
    monkeypatch.setattr(sys, "argv", ["peers_hstu", option, "0"])
    with pytest.raises(SystemExit, match="2"):
        peers_hstu.main()


def test_places_in_lists_of_the_best():
    assert places([[5, 3], [5, 3], [5, 3]], np.array([5, 3, 4])).tolist() == [1, 2, np.inf]


def test_seconds_of_epochs_are_between_their_last_steps():
    ends = [(0, 1.0), (0, 3.0), (1, 4.0), (1, 5.5)]
    assert epoch_seconds([{"epoch": epoch, "seconds": seconds} for epoch, seconds in ends]) == [3.0, 2.5]


def test_speeds_leave_the_first_epoch_out_and_pair_within_a_round():
    found = speeds([([90, 40, 40], [9, 4, 4]), ([90, 60, 60], [9, 5, 5])])
    assert (found["peer_speedup_low"], found["peer_speedup"], found["peer_speedup_high"]) == (10, 11, 12)
    assert (found["seconds_per_epoch_peer"], found["seconds_per_epoch_ours"], found["first_epoch_ours"]) == (50, 4.5, 9)
    assert speeds([([90], [9])])["peer_speedup"] == 10


def test_time_to_the_peers_hit_rate():
    found = {"first_epoch_peer": 20, "seconds_per_epoch_peer": 10, "first_epoch_ours": 3, "seconds_per_epoch_ours": 2}
    times = time_to(found, 0.2, [0.1, 0.19, 0.2, 0.1], epochs=5)
    assert times == {
        "seconds_of_peer": 60, "epochs_to_peer_hr10": 3, "seconds_to_peer_hr10": 7, "time_speedup": 60 / 7,
    }  # fmt: skip
    assert time_to(found, 0.3, [0.1, 0.2], epochs=5) == {"seconds_of_peer": 60}


def test_the_peer_gets_the_same_events_in_the_same_order():
    rows = pa.table({
        "user_id": [7, 4], "item_id": [30, 60], "time": [3, 9],
        "events_item_id": [[10, 20], [50]], "events_time": [[1, 1], [8]],
    })  # fmt: skip
    whole = interactions(rows, with_row=True)
    assert whole["user_id"].to_pylist() == [7, 7, 7, 4, 4]
    assert whole["item_id"].to_pylist() == [10, 20, 30, 50, 60]
    assert (whole["datetime"].cast(pa.int64()).to_numpy() // 10**9).tolist() == [1, 1, 3, 8, 9]
    assert interactions(rows, with_row=False)["item_id"].to_pylist() == [10, 20, 50]


def test_a_kept_result_of_the_peer_is_not_trained_again(tmp_path):
    data = Data("", tmp_path, np.zeros(0), np.zeros(0))
    (tmp_path / "peer-quality-2-1-2.json").write_text(json.dumps({"seconds": [1.0, 2.0], "busy": False}))
    bench = Bench(data, Path("nowhere"), tmp_path, threads=1, seed=0, even_if_busy=False)
    assert bench.peer("quality", 2, [1, 2])["seconds"] == [1.0, 2.0]
    assert bench.reused == ["quality"] and not bench.busy

"""A killed training goes on as if nothing had happened, to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest
from filelock import FileLock

from benchmarks.resume import OPTIONS, command, killed, losses, outcome
from scalerec.cli import main


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    return {**os.environ, "OMP_NUM_THREADS": "2", "SCALEREC_CACHE": str(tmp_path_factory.mktemp("cache"))}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, environment):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    subprocess.run(command(folder), env=environment, check=True, capture_output=True)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 60])
def test_kill_and_resume_is_bit_identical(whole, environment, tmp_path, step):
    seen, resumed = killed(tmp_path / "run", step, environment)
    assert resumed <= seen
    assert seen < losses(whole)[-1]["step"], "the run ended before it was killed"
    assert outcome(tmp_path / "run") == outcome(whole)


@pytest.mark.slow
def test_another_seed_is_not_identical(whole, environment, tmp_path):
    """The comparison can fail."""
    again = command(tmp_path / "run", "--seed", "1")
    subprocess.run(again, env=environment, check=True, capture_output=True)
    assert outcome(tmp_path / "run")["weights"] != outcome(whole)["weights"]


@pytest.mark.slow
def test_resuming_with_other_options_or_threads_is_refused(whole, capsys, monkeypatch, environment):
    monkeypatch.setenv("SCALEREC_CACHE", environment["SCALEREC_CACHE"])
    changes = [word for path, value in OPTIONS.items() for word in (f"--{path}", str(value))]
    (whole / "metrics.json").rename(whole / "metrics.aside")
    try:
        other = ["train", "rankmixer_synthetic", "--out", str(whole), "--resume", *changes]
        assert main([*other, "--training.threads", "2"]) == 2
        assert "--training.threads 0, now it is 2" in capsys.readouterr().err
        assert main([*other, "--model.ffn_dim", "24"]) == 2
        assert "--model.ffn_dim 108, now it is 24" in capsys.readouterr().err
        assert main([*other]) == 2
        assert "was trained with 2 threads" in capsys.readouterr().err
    finally:
        (whole / "metrics.aside").rename(whole / "metrics.json")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_a_stopped_comparison_takes_its_trainings_with_it(environment, tmp_path, workers):
    """Those left behind would go on writing where the next comparison resumes."""
    changes = [word for path, value in OPTIONS.items() for word in (f"--{path}", str(value))]
    recipes = ["rankmixer_synthetic", "dcnv2_synthetic"]
    whole = [sys.executable, "-m", "scalerec", "compare", *recipes, "--workers", str(workers), "--out", str(tmp_path)]
    long = ["--seeds", "1", *changes, "--training.epochs", "500"]
    with subprocess.Popen([*whole, *long], env=environment, stderr=subprocess.PIPE, text=True) as running:
        folders = [tmp_path / recipe / "seed-0" for recipe in recipes[:workers]]
        while not all((folder / "log.jsonl").exists() and losses(folder) for folder in folders):
            assert running.poll() is None
            time.sleep(0.05)
        running.terminate()
        assert running.wait(60) == 130
        assert "interrupted" in running.stderr.read()
    for folder in folders:
        with FileLock(folder / ".lock", timeout=30):  # nobody is at work there any more
            pass


def test_two_trainings_in_one_folder_are_refused(environment, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("SCALEREC_CACHE", environment["SCALEREC_CACHE"])
    with FileLock(tmp_path / ".lock"):
        assert main(command(tmp_path)[3:]) == 2
    assert f"another process trains into {tmp_path}" in capsys.readouterr().err

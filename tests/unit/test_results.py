"""What is not a number is null where programs read it, and a dash where people do."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from scalerec.results import from_json, shown, to_json
from scalerec.training.log import Log


def test_json_has_no_nan_and_is_read_back_with_it() -> None:
    found = {"auc": math.nan, "rows": 3, "all": [1.5, np.float64("nan"), (math.inf,)], "in": {"name": "NaN"}}
    text = to_json(found, indent=1)
    plain = {"auc": None, "rows": 3, "all": [1.5, None, [None]], "in": {"name": "NaN"}}
    assert json.loads(text, parse_constant=pytest.fail) == plain and text.startswith('{\n "auc": null')
    back = from_json(text)
    assert math.isnan(back["auc"]) and math.isnan(back["all"][1]) and back["all"][0] == 1.5
    assert back["in"] == found["in"] and back["rows"] == 3


def test_a_figure_that_there_is_not_is_a_dash() -> None:
    assert shown(0.5, ".4f") == "0.5000" and shown(-0.5, "+.1%") == "-50.0%" and shown(math.nan, ".4f") == "-"


def test_the_log_of_a_training_is_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Log(tmp_path, tensorboard=False) as log:
        log.write("validation", 1, {"tasks": {"like": {"auc": math.nan, "log_loss": 0.25}}}, 2.0)
    (line,) = (tmp_path / "log.jsonl").read_text().splitlines()
    assert json.loads(line, parse_constant=pytest.fail)["tasks"]["like"] == {"auc": None, "log_loss": 0.25}
    assert "auc -  log_loss 0.2500" in capsys.readouterr().err

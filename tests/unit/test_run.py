"""Options of a run that do not go together are refused with what to set instead."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from scalerec.config import override
from scalerec.errors import InputError
from scalerec.recipes.sequences import hstu_movielens_1m
from scalerec.training.train import Training

IN_BATCH = {"model.log_q": "true", "training.negatives.how": "in_batch", "training.negatives.distinct": "false"}


def test_log_q_corrects_negatives_in_the_batch() -> None:
    assert override(hstu_movielens_1m(), IN_BATCH).model.log_q  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model.log_q": "true"}, "--training.negatives.how in_batch"),
        (IN_BATCH | {"training.negatives.distinct": "true"}, "--training.negatives.distinct false"),
        (IN_BATCH | {"training.negatives.count": "0"}, "a --training.negatives.count"),
        ({"training.select": "auc"}, "hstu is not measured by it: ndcg@10, hr@10, mrr or last"),
    ],
)
def test_what_does_not_go_together(changes: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        override(hstu_movielens_1m(), changes)


def test_a_task_that_cannot_be_measured_does_not_decide_when_to_stop() -> None:
    run: Any = SimpleNamespace(config=SimpleNamespace(select="log_loss"))
    nan = float("nan")
    assert Training._value(run, {"a": {"log_loss": nan}, "b": {"log_loss": 0.4}}) == -0.4
    with pytest.raises(InputError, match=r"--training.select log_loss: no task can be measured"):
        Training._value(run, {"a": {"log_loss": nan}})

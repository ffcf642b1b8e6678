"""Options of a run that do not go together are refused with what to set instead."""

from __future__ import annotations

import pytest

from scalerec.config import override
from scalerec.errors import InputError
from scalerec.recipes.sequences import hstu_movielens_1m

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

"""Options of a run that do not go together are refused with what to set instead; a resumed run logs no line twice."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from scalerec.config import override
from scalerec.data.sources.synthetic import Synthetic
from scalerec.errors import InputError
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.recipes.sequences import hstu_movielens_1m
from scalerec.schema import Categorical, Group, Schema, Sequence, SequenceField, Task
from scalerec.training.log import Log
from scalerec.training.run import Run, TrainingConfig
from scalerec.training.train import Training, train

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
        (
            {"training.optimizer.embedding_state": "host"},
            "`embedding` dense lies with the weights",
        ),
    ],
)
def test_what_does_not_go_together(changes: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words):
        override(hstu_movielens_1m(), changes)


def test_buckets_of_a_hash_are_no_catalogue() -> None:
    def run(vocabulary: str, goal: str) -> Run:
        features = (Categorical(name="item", vocabulary=vocabulary),)  # type: ignore[arg-type]
        past = Sequence(name="seen", fields=(SequenceField(of="item"),))
        groups = (Group(name="past", side="user", features=(past,)), Group(name="item", side="item", features=features))
        schema = Schema(groups=groups, tasks=(Task(name="click"),), user="user", item="item")
        found = override(hstu_movielens_1m(), {"model.goal": goal})
        data = found.data.model_copy()
        object.__setattr__(data, "schema", lambda: schema)
        return found.model_copy(update={"data": data})

    with pytest.raises(InputError, match="'item' is hashed: hstu would rank buckets that no item is in"):
        run("hash", "retrieval").schema()
    assert run("hash", "ranking").schema() and run("dictionary", "retrieval").schema()


def test_a_task_that_cannot_be_measured_does_not_decide_when_to_stop() -> None:
    run: Any = SimpleNamespace(config=SimpleNamespace(select="log_loss"))
    nan = float("nan")
    assert Training._value(run, {"a": {"log_loss": nan}, "b": {"log_loss": 0.4}}) == -0.4
    with pytest.raises(InputError, match=r"--training.select log_loss: no task can be measured"):
        Training._value(run, {"a": {"log_loss": nan}})


class Killed(BaseException):
    pass


@pytest.mark.parametrize("kept_before", [True, False])
def test_an_evaluation_cut_short_is_in_the_log_once(
    kept_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed once it was noted, with or without a checkpoint of the same step to begin from again."""
    monkeypatch.setenv("SCALEREC_CACHE", str(tmp_path / "cache"))
    settings = TrainingConfig(
        tensorboard=False, threads=1, batch_size=500, epochs=2, save_every=3 if kept_before else 2, log_every=1
    )
    run = Run(name="run", data=Synthetic(rows=2_000), model=DLRMMLPConfig(hidden=(8,)), training=settings)
    write = Log.write

    def dies(log: Log, kind: str, step: int, *args: Any) -> None:
        write(log, kind, step, *args)
        if kind == "validation" and step == 3:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Log, "write", dies)
        with pytest.raises(Killed):
            train(run, tmp_path / "run", quiet=True)
    train(run, tmp_path / "run", resume=True, quiet=True)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    found = [(line["step"], line["kind"]) for line in lines]
    assert found == [(step, kind) for step in range(1, 7) for kind in ("train", "validation")[: 1 + (step % 3 == 0)]]

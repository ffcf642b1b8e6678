"""Retrieval: on MovieLens HSTU and SASRec in the sizes of Meta's public code, all ratings as positives.

Protocol `public` is that of the published scores, which looks at the test while it trains: the last epoch is kept.
`--data.protocol validated --training.select ndcg@10` holds out the second-last event instead and stops by it.

On the generator of section 4.1.1 point-wise attention against its softmax twin, both without biases: trained on the
first 85 % of the stream, stopped by the next 5 %, tested on every event of the last tenth. New items keep coming.
"""

from __future__ import annotations

from typing import Any

from scalerec.data.source import Source
from scalerec.data.sources.dirichlet import Dirichlet
from scalerec.data.sources.movielens_1m import MovieLens1M
from scalerec.data.sources.movielens_100k import MovieLens100K
from scalerec.data.sources.sequences import Sequences
from scalerec.data.transforms import Negatives
from scalerec.models.base import ModelConfig
from scalerec.models.hstu import HSTUConfig
from scalerec.models.sasrec import SASRecConfig
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig

EPOCHS = 101
WIDTH = 50


def _run(name: str, source: Source, model: ModelConfig, epochs: int = EPOCHS) -> Run:
    data = Sequences(of=source, protocol="public", max_len=200, actions=False)
    training = _training(epochs=epochs, select="last", evaluate_every=480, save_every=240)
    return Run(name=name, data=data, model=model, training=training, dim=WIDTH)


def _training(**options: Any) -> TrainingConfig:
    """Batches, negatives and optimiser of the published runs."""
    optimizer = OptimizerConfig(dense="adamw", lr=1e-3, betas=(0.9, 0.98), embedding="dense", clip=0)
    return TrainingConfig(
        batch_size=128, window_rows=8192, optimizer=optimizer, negatives=Negatives(count=128), **options
    )


def retrieval_in_time(name: str, source: Source, model: ModelConfig, *, epochs: int, max_len: int) -> Run:
    """Cut in time by the source's split, and stopped by its validation rows."""
    data = Sequences(of=source, protocol="time", max_len=max_len, actions=False)
    training = _training(epochs=epochs, select="ndcg@10", patience=2)
    return Run(name=name, data=data, model=model, training=training, dim=WIDTH)


def ranking_model(**options: Any) -> HSTUConfig:
    """HSTU as a ranker of some 0.1 M dense parameters."""
    return HSTUConfig(
        goal="ranking", dim=64, num_layers=3, num_heads=2, qk_dim=32, v_dim=32, actions="interleaved", dropout=0.1,
        **options,
    )  # fmt: skip


def hstu_movielens_1m() -> Run:
    return _run("hstu_movielens_1m", MovieLens1M(), HSTUConfig(dim=WIDTH, qk_dim=50, v_dim=50))


def hstu_large_movielens_1m() -> Run:
    model = HSTUConfig(dim=WIDTH, num_layers=8, num_heads=2, qk_dim=25, v_dim=25)
    return _run("hstu_large_movielens_1m", MovieLens1M(), model)


def sasrec_movielens_1m() -> Run:
    return _run("sasrec_movielens_1m", MovieLens1M(), SASRecConfig(dim=WIDTH))


def hstu_movielens_100k() -> Run:
    return _run("hstu_movielens_100k", MovieLens100K(), HSTUConfig(dim=WIDTH, qk_dim=50, v_dim=50), epochs=30)


def sasrec_movielens_100k() -> Run:
    return _run("sasrec_movielens_100k", MovieLens100K(), SASRecConfig(dim=WIDTH), epochs=30)


def hstu_dirichlet() -> Run:
    model = HSTUConfig(dim=WIDTH, position_bias=False, time_bias=False)
    return _dirichlet("hstu_dirichlet", model)


def hstu_softmax_dirichlet() -> Run:
    model = HSTUConfig(dim=WIDTH, position_bias=False, time_bias=False, attention="softmax")
    return _dirichlet("hstu_softmax_dirichlet", model)


def sasrec_dirichlet() -> Run:
    return _dirichlet("sasrec_dirichlet", SASRecConfig(dim=WIDTH))


def _dirichlet(name: str, model: ModelConfig) -> Run:
    return retrieval_in_time(name, Dirichlet(), model, epochs=10, max_len=64)

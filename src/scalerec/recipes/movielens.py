"""MovieLens ratings as ranking: like (rating >= 4) and dislike (rating <= 2), cut in time. 100K is a demonstration.

The feature-crossing models have 0.28 M dense parameters each; HSTU, which sees no numbers, has 0.10 M.
"""

from __future__ import annotations

from typing import Any

from scalerec.data.source import Source
from scalerec.data.sources.movielens_1m import MovieLens1M
from scalerec.data.sources.movielens_100k import MovieLens100K
from scalerec.data.sources.sequences import Sequences
from scalerec.models.base import ModelConfig
from scalerec.models.dcnv2 import DCNv2Config
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.recipes.sequences import ranking_model
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig


def _run(name: str, data: Source, model: ModelConfig, **training: Any) -> Run:
    optimizer = OptimizerConfig(dense="adamw", lr=1e-3, embedding_lr=0.02)
    options: dict[str, Any] = {"epochs": 2, "batch_size": 512, "patience": 1} | training
    return Run(name=name, data=data, model=model, training=TrainingConfig(optimizer=optimizer, **options))


def _rankmixer() -> ModelConfig:
    return RankMixerConfig(dim=64, num_tokens=8, ffn_dim=96, head="linear")


def _dcnv2() -> ModelConfig:
    return DCNv2Config(crosses=2, rank=48, hidden=(208, 128))


def rankmixer_movielens_100k() -> Run:
    return _run("rankmixer_movielens_100k", MovieLens100K(), _rankmixer())


def dcnv2_movielens_100k() -> Run:
    return _run("dcnv2_movielens_100k", MovieLens100K(), _dcnv2())


def dlrm_mlp_movielens_100k() -> Run:
    return _run("dlrm_mlp_movielens_100k", MovieLens100K(), DLRMMLPConfig(hidden=(288, 192, 128)))


def rankmixer_movielens_1m() -> Run:
    return _run("rankmixer_movielens_1m", MovieLens1M(), _rankmixer())


def dcnv2_movielens_1m() -> Run:
    return _run("dcnv2_movielens_1m", MovieLens1M(), _dcnv2())


def hstu_ranking_movielens_100k() -> Run:
    return _hstu("hstu_ranking_movielens_100k", MovieLens100K())


def hstu_ranking_movielens_1m() -> Run:
    return _hstu("hstu_ranking_movielens_1m", MovieLens1M())


def _hstu(name: str, log: Source) -> Run:
    fields, context = ("year", "genre_set"), ("age", "gender", "occupation")
    data = Sequences(of=log, max_len=100, session_events=100, fields=fields, context=context)
    return _run(name, data, ranking_model(), batch_size=64, window_rows=16_384)

"""MovieLens ratings as ranking: like (rating >= 4) and dislike (rating <= 2), cut in time. Small; a demonstration.

All models have 0.28 M dense parameters.
"""

from __future__ import annotations

from scalerec.data.sources.movielens_100k import MovieLens100K
from scalerec.models.base import ModelConfig
from scalerec.models.dcnv2 import DCNv2Config
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig


def _run(name: str, model: ModelConfig) -> Run:
    optimizer = OptimizerConfig(dense="adamw", lr=1e-3, embedding_lr=0.02)
    training = TrainingConfig(epochs=2, batch_size=512, patience=1, optimizer=optimizer)
    return Run(name=f"{name}_movielens_100k", data=MovieLens100K(), model=model, training=training)


def rankmixer_movielens_100k() -> Run:
    return _run("rankmixer", RankMixerConfig(dim=64, num_tokens=8, ffn_dim=96, head="linear"))


def dcnv2_movielens_100k() -> Run:
    return _run("dcnv2", DCNv2Config(crosses=2, rank=48, hidden=(208, 128)))


def dlrm_mlp_movielens_100k() -> Run:
    return _run("dlrm_mlp", DLRMMLPConfig(hidden=(288, 192, 128)))

"""Your own Parquet files: `--data.path LOG --data.schema_file SCHEMA`, for sequences `--data.of.path`, and so on.

Of an item sequences keep its id alone, unless `--data.fields` names more of its features.
"""

from __future__ import annotations

from scalerec.data.source import Source
from scalerec.data.sources.parquet import Parquet
from scalerec.data.sources.sequences import Sequences
from scalerec.models.base import ModelConfig
from scalerec.models.dcnv2 import DCNv2Config
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.models.hstu import HSTUConfig
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.models.sasrec import SASRecConfig
from scalerec.recipes.sequences import WIDTH, ranking_model, retrieval_in_time
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig


def _ranking(name: str, data: Source, model: ModelConfig, batch_size: int = 1024) -> Run:
    optimizer = OptimizerConfig(dense="adamw", embedding_lr=0.02)
    training = TrainingConfig(epochs=2, batch_size=batch_size, patience=1, optimizer=optimizer)
    return Run(name=name, data=data, model=model, training=training)


def _retrieval(name: str, model: ModelConfig) -> Run:
    return retrieval_in_time(name, Parquet(), model, epochs=30, max_len=200)


def rankmixer_parquet() -> Run:
    return _ranking("rankmixer_parquet", Parquet(), RankMixerConfig(dim=64, num_tokens=8, ffn_dim=128))


def dcnv2_parquet() -> Run:
    return _ranking("dcnv2_parquet", Parquet(), DCNv2Config(crosses=2, rank=64, hidden=(256, 128)))


def dlrm_mlp_parquet() -> Run:
    return _ranking("dlrm_mlp_parquet", Parquet(), DLRMMLPConfig(hidden=(256, 128)))


def hstu_ranking_parquet() -> Run:
    data = Sequences(of=Parquet(), max_len=100, session_events=100)
    return _ranking("hstu_ranking_parquet", data, ranking_model(), batch_size=64)


def hstu_parquet() -> Run:
    return _retrieval("hstu_parquet", HSTUConfig(dim=WIDTH, qk_dim=50, v_dim=50))


def sasrec_parquet() -> Run:
    return _retrieval("sasrec_parquet", SASRecConfig(dim=WIDTH))

"""Your own Parquet files: `--data.path LOG --data.schema_file SCHEMA`."""

from __future__ import annotations

from scalerec.data.sources.parquet import Parquet
from scalerec.models.base import ModelConfig
from scalerec.models.dcnv2 import DCNv2Config
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig


def _run(name: str, model: ModelConfig) -> Run:
    training = TrainingConfig(
        epochs=2, batch_size=1024, patience=1, optimizer=OptimizerConfig(dense="adamw", embedding_lr=0.02)
    )
    return Run(name=f"{name}_parquet", data=Parquet(), model=model, training=training)


def rankmixer_parquet() -> Run:
    return _run("rankmixer", RankMixerConfig(dim=64, num_tokens=8, ffn_dim=128))


def dcnv2_parquet() -> Run:
    return _run("dcnv2", DCNv2Config(crosses=2, rank=64, hidden=(256, 128)))


def dlrm_mlp_parquet() -> Run:
    return _run("dlrm_mlp", DLRMMLPConfig(hidden=(256, 128)))

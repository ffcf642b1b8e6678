"""A log with a known best score: the teacher with groups; `--data.teacher flat` is the one without.

Eight groups and a history, 64 columns each: nine equal chunks are the groups. All models have 0.51 M dense parameters.
"""

from __future__ import annotations

from scalerec.data.sources.synthetic import Synthetic
from scalerec.models.base import ModelConfig
from scalerec.models.dcnv2 import DCNv2Config
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig


def _run(name: str, model: ModelConfig, embedding_lr: float) -> Run:
    # Learning rates as found on the validation rows of the grouped teacher (docs/log.md).
    optimizer = OptimizerConfig(dense="adamw", lr=1e-3, embedding_lr=embedding_lr)
    training = TrainingConfig(epochs=1, batch_size=1024, optimizer=optimizer)
    return Run(name=f"{name}_synthetic", data=Synthetic(), model=model, training=training)


def rankmixer_synthetic() -> Run:
    return _run("rankmixer", RankMixerConfig(dim=108, num_tokens=9, ffn_dim=108, head="linear"), embedding_lr=0.1)


def dcnv2_synthetic() -> Run:
    return _run("dcnv2", DCNv2Config(crosses=3, rank=64, hidden=(344, 192)), embedding_lr=0.15)


def dlrm_mlp_synthetic() -> Run:
    return _run("dlrm_mlp", DLRMMLPConfig(hidden=(512, 300, 128)), embedding_lr=0.05)

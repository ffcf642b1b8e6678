"""KuaiRand-Pure: five tasks on short-video impressions, one pass over the log."""

from __future__ import annotations

from scalerec.data.sources.kuairand import KuaiRand
from scalerec.models.base import ModelConfig
from scalerec.models.dcnv2 import DCNv2Config
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig


def _run(name: str, model: ModelConfig) -> Run:
    training = TrainingConfig(epochs=1, batch_size=512, optimizer=OptimizerConfig(lr=1e-3, embedding_lr=0.02))
    return Run(name=f"{name}_kuairand", data=KuaiRand(), model=model, training=training)


def rankmixer_kuairand() -> Run:
    return _run("rankmixer", RankMixerConfig(dim=128, num_tokens=16, ffn_dim=128))


def dcnv2_kuairand() -> Run:
    return _run("dcnv2", DCNv2Config(crosses=2, rank=128, hidden=(256, 128)))


def dlrm_mlp_kuairand() -> Run:
    return _run("dlrm_mlp", DLRMMLPConfig(hidden=(512, 256, 128)))

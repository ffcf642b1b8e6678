"""A log with a known best score: the teacher with groups; `--data.teacher flat` is the one without.

Eight groups and a history, 64 columns each: nine equal chunks are the groups. All models have 0.51 M dense parameters.
"""

from __future__ import annotations

from typing import Any

from scalerec.data.sources.synthetic import Synthetic
from scalerec.layers.experts import ExpertsConfig
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


RANKMIXER = RankMixerConfig(dim=108, num_tokens=9, ffn_dim=108, head="linear")


def rankmixer_synthetic() -> Run:
    return _run("rankmixer", RANKMIXER, embedding_lr=0.1)


def rankmixer_wide_synthetic() -> Run:
    """As wide as all experts of `rankmixer_moe_synthetic`, none of them skipped."""
    return _run("rankmixer_wide", RANKMIXER.model_copy(update={"ffn_dim": 8 * RANKMIXER.ffn_dim}), embedding_lr=0.1)


def _experts(name: str, **options: Any) -> Run:
    """Eight experts for each FFN, one of them active: the work of `rankmixer_synthetic` and routers."""
    model = RANKMIXER.model_copy(update={"experts": ExpertsConfig(count=8, active=1 / 8, **options)})
    return _run(name, model, embedding_lr=0.1)


def rankmixer_moe_synthetic() -> Run:
    return _experts("rankmixer_moe")


def rankmixer_moe_relu_synthetic() -> Run:
    """ReLU gates without a train-router."""
    return _experts("rankmixer_moe_relu", dtsi="off")


def rankmixer_moe_top_k_synthetic() -> Run:
    return _experts("rankmixer_moe_top_k", routing="top_k", dtsi="off")


def rankmixer_moe_balanced_synthetic() -> Run:
    """The largest of a softmax with the load-balance loss."""
    return _experts("rankmixer_moe_balanced", routing="top_k", dtsi="off", balance=0.01)


def dcnv2_synthetic() -> Run:
    return _run("dcnv2", DCNv2Config(crosses=3, rank=64, hidden=(344, 192)), embedding_lr=0.15)


def dlrm_mlp_synthetic() -> Run:
    return _run("dlrm_mlp", DLRMMLPConfig(hidden=(512, 300, 128)), embedding_lr=0.05)

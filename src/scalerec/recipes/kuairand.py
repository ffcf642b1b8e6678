"""KuaiRand-Pure: five tasks on short-video impressions, one pass over the log; with and without video statistics.

Each family has equal dense parameters: 0.77 M without, 0.86 M with the statistics, which widen the input.
"""

from __future__ import annotations

from typing import Any

from scalerec.data.sources.kuairand import KuaiRand
from scalerec.data.sources.sequences import Sequences
from scalerec.layers.experts import ExpertsConfig
from scalerec.models.base import ModelConfig
from scalerec.models.dcnv2 import DCNv2Config
from scalerec.models.dlrm_mlp import DLRMMLPConfig
from scalerec.models.rankmixer import RankMixerConfig
from scalerec.recipes.sequences import ranking_model
from scalerec.training.optim import OptimizerConfig
from scalerec.training.run import Run, TrainingConfig

RANKMIXER = RankMixerConfig(dim=96, num_tokens=16, ffn_dim=96, head="linear")


def _run(name: str, model: ModelConfig, statistics: bool = False) -> Run:
    # Learning rates as found on the validation rows (docs/log.md).
    optimizer = OptimizerConfig(dense="adamw", lr=1e-3, embedding_lr=0.02)
    training = TrainingConfig(epochs=1, batch_size=512, optimizer=optimizer)
    return Run(name=name, data=KuaiRand(video_statistics=statistics), model=model, training=training)


def rankmixer_kuairand() -> Run:
    return _run("rankmixer_kuairand", RANKMIXER)


def rankmixer_wide_kuairand() -> Run:
    """As wide as all experts of `rankmixer_moe_kuairand`, none of them skipped."""
    return _run("rankmixer_wide_kuairand", RANKMIXER.model_copy(update={"ffn_dim": 8 * RANKMIXER.ffn_dim}))


def _experts(name: str, **options: Any) -> Run:
    """Eight experts for each FFN, one of them active: the work of `rankmixer_kuairand` and routers."""
    return _run(name, RANKMIXER.model_copy(update={"experts": ExpertsConfig(count=8, active=1 / 8, **options)}))


def rankmixer_moe_kuairand() -> Run:
    return _experts("rankmixer_moe_kuairand")


def rankmixer_moe_top_k_kuairand() -> Run:
    return _experts("rankmixer_moe_top_k_kuairand", routing="top_k", dtsi="off")


def rankmixer_moe_balanced_kuairand() -> Run:
    """The largest of a softmax with the load-balance loss."""
    return _experts("rankmixer_moe_balanced_kuairand", routing="top_k", dtsi="off", balance=0.01)


def dcnv2_kuairand() -> Run:
    return _run("dcnv2_kuairand", DCNv2Config(crosses=3, rank=48, hidden=(256, 128)))


def dlrm_mlp_kuairand() -> Run:
    return _run("dlrm_mlp_kuairand", DLRMMLPConfig(hidden=(456, 256, 128)))


def rankmixer_kuairand_statistics() -> Run:
    return _run("rankmixer_kuairand_statistics", RANKMIXER, statistics=True)


def dcnv2_kuairand_statistics() -> Run:
    return _run("dcnv2_kuairand_statistics", DCNv2Config(crosses=3, rank=32, hidden=(184, 128)), statistics=True)


def dlrm_mlp_kuairand_statistics() -> Run:
    return _run("dlrm_mlp_kuairand_statistics", DLRMMLPConfig(hidden=(344, 192, 128)), statistics=True)


def hstu_kuairand() -> Run:
    """The generative ranker on the same rows: numbers and crosses left out, the log as sequences."""
    fields = ("author_id", "main_tag", "music_id", "tab")
    data = Sequences(of=KuaiRand(), max_len=100, fields=fields, auxiliary=("tab",))
    model = ranking_model(context=False)
    optimizer = OptimizerConfig(dense="adamw", lr=1e-3, embedding_lr=0.02)
    training = TrainingConfig(epochs=1, batch_size=64, window_rows=16_384, optimizer=optimizer)
    return Run(name="hstu_kuairand", data=data, model=model, training=training)

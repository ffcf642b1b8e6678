"""A model and a recipe of your own, in one file.

scalerec train examples.own_model:factorisation_machine_movielens --out runs/fm
scalerec evaluate runs/fm --allow examples
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scalerec.batch import Batch, Outputs
from scalerec.data.sources.movielens_100k import MovieLens100K
from scalerec.features.layout import Layout
from scalerec.layers.embedding import Embedded
from scalerec.models.base import FeatureJoin, Joined, Model, ModelConfig
from scalerec.training.run import Run, TrainingConfig


class FactorisationMachineConfig(ModelConfig):
    kind: str = "examples.own_model:FactorisationMachineConfig"
    rank: int = 32

    def build(self, layout: Layout) -> FactorisationMachine:
        return FactorisationMachine(self, layout)


class FactorisationMachine(Model):
    """Rendle (2010), eq. 5, on the joined features: w x + 1/2 sum_f ((V_f x)^2 - V_f^2 x^2), one head per task."""

    def __init__(self, config: FactorisationMachineConfig, layout: Layout):
        super().__init__(layout)
        self.join = FeatureJoin(layout, "mean")
        self.linear = nn.Linear(self.join.width, len(layout.tasks))
        self.factors = nn.Parameter(torch.randn(len(layout.tasks), self.join.width, config.rank) * 0.01)

    def encode_user(self, user: Embedded) -> Joined:
        return self.join.user_side(user)

    def score(self, state: Joined, items: Embedded, user_of_row: Tensor) -> Outputs:
        x = torch.cat([state.user[user_of_row], self.join.item_side(state, items, user_of_row)], 1)
        squared_sum = (x @ self.factors).square().sum(2).T  # [B, tasks]
        sum_of_squares = x.square() @ self.factors.square().sum(2).T
        return Outputs(self.linear(x) + (squared_sum - sum_of_squares) / 2)

    def flops(self, batch: Batch) -> int:
        tasks, width, rank = self.factors.shape
        return 2 * len(batch) * tasks * width * (rank + 2)

    def parts(self) -> dict[str, int]:
        return {"stack": sum(p.numel() for p in (self.factors, *self.linear.parameters()))}


def factorisation_machine_movielens() -> Run:
    training = TrainingConfig(epochs=1, batch_size=512)
    return Run(name="fm_movielens_100k", data=MovieLens100K(), model=FactorisationMachineConfig(), training=training)

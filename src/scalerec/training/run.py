"""A run: everything that decides a training, as one configuration."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt, SerializeAsAny, model_validator

from scalerec.config import Config, component
from scalerec.data.source import Source
from scalerec.data.transforms import Negatives, StochasticLength
from scalerec.errors import InputError
from scalerec.models.base import ModelConfig
from scalerec.schema import Categorical, Schema
from scalerec.training.optim import OptimizerConfig


class TrainingConfig(Config):
    epochs: PositiveInt = 1
    batch_size: PositiveInt = 1024
    window_rows: PositiveInt = 131_072  # rows shuffled together, held in memory
    optimizer: OptimizerConfig = OptimizerConfig()
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: matrix products under autocast
    seed: NonNegativeInt = 0
    threads: NonNegativeInt = 0  # 0: all cores; part of the bits, so a resumed run must use as many
    negatives: Negatives = Negatives(count=0)  # none: retrieval learns on the whole catalogue
    stochastic_length: StochasticLength = StochasticLength()
    # On the validation rows: a mean over tasks, or a metric of the next item; last: nothing, the end is kept.
    select: Literal["auc", "log_loss", "ndcg@10", "hr@10", "mrr", "last"] = "auc"
    patience: NonNegativeInt = 0  # evaluations without a better value before stopping; 0: never stop early
    evaluate_every: NonNegativeInt = 0  # steps; 0: at the end of every epoch
    log_every: PositiveInt = 20  # steps
    save_every: PositiveInt = 1000  # steps
    tensorboard: bool = True


class Run(Config):
    """One complete run; a recipe is a function that returns one."""

    name: str
    data: Annotated[SerializeAsAny[Source], BeforeValidator(component)]
    model: Annotated[SerializeAsAny[ModelConfig], BeforeValidator(component)]
    training: TrainingConfig = TrainingConfig()
    skip_bad_shards: bool = False
    dim: Annotated[int, Field(ge=0)] = 0  # width of embeddings; 0: as the schema says

    @model_validator(mode="after")
    def _fits_together(self) -> Run:
        drawn, model, select = self.training.negatives, self.model, self.training.select
        if getattr(model, "log_q", False) and (drawn.how != "in_batch" or drawn.distinct or not drawn.count):
            raise ValueError(
                "--model.log_q corrects negatives drawn as often as they occur: set --training.negatives.how in_batch, "
                "--training.negatives.distinct false and a --training.negatives.count"
            )
        measured = model.ranks if select in ("auc", "log_loss") else model.retrieves
        if select != "last" and not measured:
            instead = "auc, log_loss" if model.ranks else "ndcg@10, hr@10, mrr"
            raise ValueError(f"--training.select {select}: {model.kind} is not measured by it: {instead} or last")
        return self

    def schema(self) -> Schema:
        """The data's schema with this run's width of embeddings; InputError where its model cannot learn from it."""
        schema = self.data.schema()
        events = next((sequence for sequence in schema.sequences if not sequence.runs), None)
        if self.model.retrieves and events is not None:
            item = schema.feature(events.fields[0].of)
            if isinstance(item, Categorical) and item.vocabulary == "hash":
                raise InputError(
                    f"feature {item.name!r} is hashed: {self.model.kind} would rank buckets that no item is in; set "
                    'its "vocabulary" to "dictionary", with a `min_count` where there are many items'
                )
        return schema.model_copy(update={"dim": self.dim}) if self.dim else schema

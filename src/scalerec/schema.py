"""What a column means: features in semantic groups, tasks, and the columns that say who, what and when.

A schema is what a person writes (or edits after `scalerec schema infer`). It holds no fitted number: how many rows a
table has and where buckets lie is known only after `Encoder.fit` and lives in the Layout.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Annotated, Any, Literal, Union

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from typing_extensions import Self

Side = Literal["user", "item"]


class Frozen(BaseModel):
    """An immutable record that refuses unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values; what was worked out from the old ones and cached stays behind."""
        copied = super().model_copy(update=update, deep=deep)
        for name in set(copied.__dict__) - set(type(self).model_fields):
            vars(copied).pop(name)
        return copied


class Categorical(Frozen):
    """One id a row, through a dictionary fitted on the training rows or a hash."""

    kind: Literal["categorical"] = "categorical"
    name: str
    column: str = ""  # default: the name
    vocabulary: Literal["dictionary", "hash"] = "dictionary"
    min_count: PositiveInt = 1  # dictionary: rarer values are unknown
    buckets: PositiveInt = 2**16  # hash: how many ids
    dim: PositiveInt | None = None
    note: str = ""


class MultiCategorical(Frozen):
    """Several ids a row (a list column, or text cut at a separator), averaged or summed."""

    kind: Literal["multi_categorical"] = "multi_categorical"
    name: str
    column: str = ""
    separator: str | None = None
    vocabulary: Literal["dictionary", "hash"] = "dictionary"
    min_count: PositiveInt = 1
    buckets: PositiveInt = 2**16
    max_len: PositiveInt = 32
    pooling: Literal["mean", "sum"] = "mean"
    dim: PositiveInt | None = None
    note: str = ""


class Numeric(Frozen):
    """A number: a quantile bucket with an embedding, or signed log, standardised, and a linear map."""

    kind: Literal["numeric"] = "numeric"
    name: str
    column: str = ""
    encoding: Literal["buckets", "linear"] = "buckets"
    buckets: Annotated[int, Field(ge=2)] = 32
    log: bool = True  # linear: sign(x) log(1 + |x|) before standardising
    dim: PositiveInt | None = None
    note: str = ""


class Cross(Frozen):
    """The combination of several columns as one hashed id."""

    kind: Literal["cross"] = "cross"
    name: str
    of: Annotated[tuple[str, ...], Field(min_length=2)]  # columns
    buckets: PositiveInt = 2**16
    dim: PositiveInt | None = None
    note: str = ""


class SequenceField(Frozen):
    """One id of each past event: a list column, read through the vocabulary and the table of a categorical feature."""

    of: str  # a Categorical of the schema
    column: str = ""  # list column of the rows; default: "<sequence>_<of>"
    event: str = ""  # column of the log that `history.append` reads; default: the column of `of`


class Sequence(Frozen):
    """A user's past events, oldest first: the item id and its side ids, optionally with their times."""

    kind: Literal["sequence"] = "sequence"
    name: str
    fields: Annotated[tuple[SequenceField, ...], Field(min_length=1)]
    time: bool = False  # keep the events' times, in the list column "<sequence>_time"
    actions: tuple[str, ...] = ()  # labels kept with each event, in the list columns "<sequence>_<label>": null where
    # their task's mask or weight is 0 or missing; of any other weight nothing is kept
    where: str = ""  # column of the log: only events in which it is not zero are kept
    runs: bool = False  # a slowly changing series: of events in a row with one id only the first is kept
    max_len: PositiveInt = 50
    note: str = ""

    def column(self, field: SequenceField) -> str:
        return field.column or f"{self.name}_{field.of}"

    def list_columns(self) -> list[str]:
        """The columns of the rows that hold it: one per field, then the times and the actions where they are kept."""
        times = [self.time_column] if self.time_column else []
        return [*(self.column(field) for field in self.fields), *times, *self.action_columns]

    @property
    def time_column(self) -> str | None:
        return f"{self.name}_time" if self.time else None

    @property
    def action_columns(self) -> list[str]:
        return [f"{self.name}_{label}" for label in self.actions]


Feature = Annotated[
    Union[Categorical, MultiCategorical, Numeric, Cross, Sequence],
    Field(discriminator="kind"),
]


def reads(feature: Feature) -> tuple[str, ...]:
    """The columns of a row that a feature is made of."""
    if isinstance(feature, Cross):
        return feature.of
    return tuple(feature.list_columns()) if isinstance(feature, Sequence) else (feature.column or feature.name,)


class Group(Frozen):
    """Features with one coherent meaning; they stand side by side in the model's input, in this order."""

    name: str
    side: Side
    features: Annotated[tuple[Feature, ...], Field(min_length=1)]


class Task(Frozen):
    """One binary target; rows whose mask is 0 or whose label is missing do not count."""

    name: str
    label: str = ""  # default: the name
    weight: str | None = None
    mask: str | None = None

    @property
    def column(self) -> str:
        return self.label or self.name


class Schema(Frozen):
    """All that scalerec needs to know of a log; user-side groups come first."""

    groups: Annotated[tuple[Group, ...], Field(min_length=1)]
    tasks: tuple[Task, ...]  # none: a log from which only retrieval can learn
    user: str
    item: str | None = None
    time: str | None = None
    time_unit: PositiveFloat = 1.0  # seconds in one unit of a numeric time column
    new_events: str | None = None  # column: how many of a row's last past events are training targets too
    dim: PositiveInt = 16  # width of every embedding that names none

    @cached_property
    def features(self) -> tuple[Feature, ...]:
        return tuple(feature for group in self.groups for feature in group.features)

    @cached_property
    def sequences(self) -> tuple[Sequence, ...]:
        return tuple(feature for feature in self.features if isinstance(feature, Sequence))

    @cached_property
    def _by_name(self) -> dict[str, Feature]:
        return {feature.name: feature for feature in self.features}

    def feature(self, name: str) -> Feature:
        return self._by_name[name]

    def input_columns(self) -> list[str]:
        """Columns that features read, each once, in order; these are all that a request has to bring."""
        columns = [column for feature in self.features for column in reads(feature)]
        now = [self.time] if self.time and any(sequence.time for sequence in self.sequences) else []
        return list(dict.fromkeys([self.user, *columns, *now]))

    def label_columns(self) -> list[str]:
        """Columns that only training and evaluation read."""
        columns = [c for task in self.tasks for c in (task.column, task.weight, task.mask) if c]
        return list(dict.fromkeys([*columns, *([self.new_events] if self.new_events else [])]))

    def counting_columns(self, label: str) -> list[str]:
        """The mask and the weight of the label's task: where one of them is 0 or missing, the label does not count."""
        return [c for task in self.tasks if task.column == label for c in (task.mask, task.weight) if c]

    def shared_label(self, labels: Iterable[str]) -> str | None:
        """The first of these labels that two tasks have."""
        columns = [task.column for task in self.tasks]
        return next((label for label in labels if columns.count(label) > 1), None)

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        names = [feature.name for feature in self.features]
        for what, values in (
            ("feature", names),
            ("group", [group.name for group in self.groups]),
            ("task", [task.name for task in self.tasks]),
        ):
            twice = next((value for value in values if values.count(value) > 1), None)
            if twice is not None:
                raise ValueError(f"two {what}s are named {twice!r}: give each its own name")
        sides = [group.side for group in self.groups]
        if sides != sorted(sides, reverse=True):
            raise ValueError("user-side groups must come before item-side groups: reorder `groups`")
        for group in self.groups:
            for feature in group.features:
                if not isinstance(feature, Sequence):
                    continue
                if group.side != "user":
                    raise ValueError(f"sequence {feature.name!r} is a user's past: move it to a user-side group")
                for field in feature.fields:
                    if field.of not in names or not isinstance(self.feature(field.of), Categorical):
                        raise ValueError(
                            f"sequence {feature.name!r}: {field.of!r} is not a categorical feature of this schema"
                        )
                shared = self.shared_label(feature.actions)
                if shared is not None:
                    raise ValueError(
                        f"sequence {feature.name!r}: an event keeps one action a label, but two tasks have the label "
                        f"{shared!r}: give each a column of its own"
                    )
        return self

"""Which columns a request may carry, and of what kind: so that a wrong one is named, and never reaches a history.

A history that held a text among numbers would fail every later request of its user; it is refused at the door.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import pyarrow as pa

from scalerec.features import history
from scalerec.features.encoder import Encoder
from scalerec.schema import Categorical, Cross, Feature, MultiCategorical, Schema, Sequence
from scalerec.serving.requests import Refused

Kind = Callable[[Any], str]  # what is wrong with a value that is not null; "" when nothing is


class Columns:
    """The columns of one schema by what may be said of them: inputs of a request, and what an event keeps."""

    def __init__(self, encoder: Encoder, items: pa.Table, types: Mapping[str, str]):
        """`types` are those of the columns in the log, as Arrow writes them."""
        self.schema = schema = encoder.schema
        told = {**{name: str(items[name].type) for name in items.column_names}, **types}
        self._stored = {name: kind for name, text in told.items() if (kind := _kind(text))}
        self.timestamps = None if schema.time not in told else told[schema.time].startswith(("timestamp", "date"))
        self._of_items = set(items.column_names)
        of_users = (f for group in schema.groups if group.side == "user" for f in group.features)
        self._of_users = {name for feature in of_users for name, _ in self._read(feature, encoder)}
        self.inputs: dict[str, list[Kind]] = {}
        for feature in schema.features:
            for name, kind in self._read(feature, encoder):
                self.inputs.setdefault(name, []).append(kind)
        of_event: dict[str, list[Kind]] = {}
        for name in _of_events(schema):
            of_event[name] = list(self.inputs.get(name, []))
        for name in [*schema.label_columns(), *(sequence.where for sequence in schema.sequences if sequence.where)]:
            of_event.setdefault(name, []).append(_flag)
        for task in schema.tasks:
            of_event.setdefault(task.column, []).append(_label)
        self.needed = tuple(name for name in of_event if name in _needed(schema))  # of an event, for a history
        self.events = {**self.inputs, **of_event}
        self.users = self._id(schema.user, encoder)
        self.items = self._id(schema.item, encoder) if schema.item else [_scalar]

    @property
    def of_context(self) -> list[str]:
        """The columns that a request's context may set."""
        own = {self.schema.user, self.schema.item, self.schema.time}
        return sorted(self.inputs.keys() - own - self._of_items)

    def context(self, given: Mapping[str, Any], where: str = "context") -> None:
        """Refused where a column is unknown, not a request's to say, or of another kind."""
        own = (self.schema.user, self.schema.item, self.schema.time)
        for name, value in given.items():
            kinds = self.inputs.get(name)
            if kinds is None or name in own:
                known = ", ".join(self.of_context[:20])
                raise Refused(
                    422, f"not a column that a request sets; the model reads {known}", f"{where}.{name[:128]}"
                )
            if where == "context" and name in self._of_items:  # the engine would take the item's own
                raise Refused(422, "belongs to the item: give it with a candidate", f"context.{name}")
            if where != "context" and name in self._of_users:  # read once for all candidates
                raise Refused(422, "belongs to the user: give it in context", f"{where}.{name}")
            check(kinds, value, f"{where}.{name}")

    def own(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What of another model's context this one reads too."""
        mine = set(self.of_context)
        return {name: value for name, value in given.items() if name in mine}

    def user(self, value: Any, where: str = "user") -> None:
        check(self.users, value, where)

    def candidates(self, values: Collection[Any], where: str = "candidates") -> None:
        """Refused at the first id that is not of the items' kind."""
        if _whole in self.items and set(map(type, values)) <= {int}:  # at once, as nearly always
            return
        for place, value in enumerate(values):
            check(self.items, value, f"{where}[{place}]")

    def parsed(self, text: str, kinds: list[Kind]) -> Any:
        """An id that came as part of a path: a whole number where ids are numbers."""
        number = int(text) if text.lstrip("-").isdecimal() and len(text) < 19 and text.isascii() else None
        if number is not None and not any(kind(number) for kind in kinds):
            return number
        return text

    def as_rows(self, state: history.State) -> dict[str, list[dict[str, Any]]]:
        """The entries of every sequence by the columns of the log."""
        found = {}
        for sequence in self.schema.sequences:
            names = history.entry_columns(sequence, self.schema)
            found[sequence.name] = [dict(zip(names, entry)) for entry in state.get(sequence.name, ())]
        return found

    def _read(self, feature: Feature, encoder: Encoder) -> Iterable[tuple[str, Kind]]:
        """The plain columns that a feature reads; lists of past events come from the store alone."""
        if isinstance(feature, Sequence):
            return []
        if isinstance(feature, Cross):
            return [(name, self._stored.get(name, _scalar)) for name in feature.of]
        name = feature.column or feature.name
        if isinstance(feature, Categorical):
            return [(name, self._stored.get(name) or _vocabulary_kind(feature, encoder))]
        if isinstance(feature, MultiCategorical):
            return [(name, _several(_vocabulary_kind(feature, encoder), feature.separator))]
        return [(name, _boolean if self._stored.get(name) is _boolean else _number)]

    def _id(self, name: str, encoder: Encoder) -> list[Kind]:
        if name in self._stored:
            return [self._stored[name]]
        return self.inputs.get(name) or [_scalar]


def check(kinds: Iterable[Kind], value: Any, where: str) -> None:
    """Refused with the name of the field unless the value is null or right for all that read it."""
    if value is None:
        return
    for kind in kinds:
        if wrong := kind(value):
            raise Refused(422, wrong, where)


def _of_events(schema: Schema) -> list[str]:
    """The columns that entries of histories are made of, and the item's."""
    names = [schema.item] if schema.item else []
    for sequence in schema.sequences:
        for field in sequence.fields:
            of = schema.feature(field.of)
            assert isinstance(of, Categorical)  # the schema saw to it
            names.append(field.event or of.column or of.name)
    return list(dict.fromkeys(names))


def _needed(schema: Schema) -> set[str]:
    """What `history.append` reads of an event, apart from ids and the time."""
    names = {sequence.where for sequence in schema.sequences if sequence.where}
    for sequence in schema.sequences:
        for label in sequence.actions:
            names |= {label, *schema.counting_columns(label)}
    return names


def _number(value: Any) -> str:
    fits = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "" if fits else "must be a number or null"


def _boolean(value: Any) -> str:
    return "" if isinstance(value, bool) else "must be true, false or null"


def _flag(value: Any) -> str:
    return "" if isinstance(value, (int, float)) else "must be a number, true, false or null"


def _whole(value: Any) -> str:
    return "" if isinstance(value, int) and not isinstance(value, bool) else "must be a whole number or null"


def _text(value: Any) -> str:
    return "" if isinstance(value, str) else "must be a text or null"


def _scalar(value: Any) -> str:
    return "must be one value, not a list" if isinstance(value, list) else ""


def _label(value: Any) -> str:
    return "" if isinstance(value, (int, float)) and value in (0, 1) else "must be 0, 1 or null"


def _several(kind: Kind, separator: str | None) -> Kind:
    def wrong(value: Any) -> str:
        if isinstance(value, str) and separator:
            return ""
        if not isinstance(value, list):
            return "must be a list" + (f", or a text cut at {separator!r}" if separator else "")
        return next((f"its entries {found}" for entry in value if entry is not None and (found := kind(entry))), "")

    return wrong


def _vocabulary_kind(feature: Categorical | MultiCategorical, encoder: Encoder) -> Kind:
    if feature.vocabulary == "hash":
        return _scalar
    return _whole if encoder.vocabularies[feature.name].integer else _text


def _kind(arrow: str) -> Kind | None:
    """Of a column's type in the log; None for lists and moments, of which the features say more."""
    arrow = arrow.removeprefix("dictionary<values=")
    if arrow.startswith(("int", "uint")):
        return _whole
    if arrow.startswith(("float", "double", "halffloat", "decimal")):
        return _number
    if arrow.startswith("bool"):
        return _boolean
    return _text if arrow.startswith(("string", "large_string")) else None

"""The log of another source as sequences to learn from, one example for many events (HSTU, sections 2.1 to 2.3).

Ranking models replay a user's past for every single row. Here a training row stands for all new events of its user:
its lists hold the past with times and actions, and `new_events` says how many of their last events are targets beside
the row itself. Numbers are left out: the past, in full length, says what they would.

protocol "time"       the split of the source decides; every validation and test row is kept and sees, as in ranking,
                      only strictly earlier events, so that results pair row by row with models on the source itself
protocol "public"     the last event of each user is tested, all before it train; as in the published code and scores,
                      validation is the test
protocol "validated"  the last event is tested, the one before it validates, the rest trains

Training rows (and all rows of the last two protocols) take events of equal times in the order of the files.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import pyarrow as pa
from pydantic import BeforeValidator, PositiveFloat, PositiveInt, SerializeAsAny, model_validator

from scalerec.config import component
from scalerec.data.parts import ROW_GROUP, earlier, together, write_parts
from scalerec.data.reader import ParquetRows
from scalerec.data.source import Source
from scalerec.data.split import PARTS, ColumnSplit, NoSplit, Part, Split, columns_of
from scalerec.errors import InputError
from scalerec.features import history
from scalerec.features.hashing import hash_column, mix
from scalerec.features.lists import whole
from scalerec.features.numeric import unix_seconds
from scalerec.schema import Categorical, Group, Schema, Sequence, SequenceField, Side

EVENTS = "events"  # the main sequence
ROW, PART, NEW = "row", "part", "new_events"  # columns that are added
USUAL_LENGTH = 50  # of histories: row groups of longer ones have fewer rows


class Sequences(Source):
    """One training example for each user, or for each session with a `session_gap`, of the source `of`."""

    version: ClassVar[int] = 2
    row_column: ClassVar[str] = ROW
    partition_rows: ClassVar[int] = 1_000_000  # held in memory at a time

    kind: Literal["sequences"] = "sequences"
    of: Annotated[SerializeAsAny[Source], BeforeValidator(component)]
    split: Split = ColumnSplit(column=PART)
    protocol: Literal["time", "public", "validated"] = "time"
    max_len: PositiveInt = 200
    fields: tuple[str, ...] = ()  # item-side categorical features kept with each event; the item always is
    auxiliary: tuple[str, ...] = ()  # categorical features that change slowly: a sequence of their changes each
    context: tuple[str, ...] = ()  # user-side categorical features that never change: earlier targets see them as well
    actions: bool = True  # keep the tasks' labels with each event
    session_gap: PositiveFloat | None = None  # seconds without an event that end a session; None: one session a user
    session_events: PositiveInt | None = None  # events after which a session ends in any case

    @model_validator(mode="after")
    def _consistent(self) -> Sequences:
        if isinstance(self.of, Sequences):
            raise ValueError("sequences of sequences: name the log itself in `of`")
        if self.split != ColumnSplit(column=PART):
            raise ValueError("split: that of the log decides: give `of` one (--data.of.split)")
        for option in ("session_gap", "session_events"):
            if self.protocol != "time" and getattr(self, option) is not None:
                raise ValueError(f"{option}: protocol {self.protocol!r} has one training example a user: leave it out")
        return self

    def schema(self) -> Schema:
        inner = self.of.schema()
        if inner.time is None or inner.item is None:
            raise InputError(f"sequences of {self.of.kind}: its schema must name the `time` and the `item` column")
        sides: dict[str, Side] = {feature.name: group.side for group in inner.groups for feature in group.features}
        known = {feature.name: feature for feature in inner.features if isinstance(feature, Categorical)}
        items = [name for name, f in known.items() if sides[name] == "item" and (f.column or f.name) == inner.item]
        if not items:
            raise InputError(f"sequences of {self.of.kind}: no item-side categorical feature reads {inner.item!r}")
        for option, names, side in (
            ("fields", self.fields, "item"), ("auxiliary", self.auxiliary, ""), ("context", self.context, "user"),
        ):  # fmt: skip
            allowed = [name for name in known if side in ("", sides[name])]
            for name in names:
                if name not in allowed:
                    near = difflib.get_close_matches(name, allowed, n=1, cutoff=0.0)
                    what = f"{side}-side categorical feature" if side else "categorical feature"
                    hint = f"; did you mean {near[0]!r}?" if near else ", and there is none"
                    raise InputError(f"--data.{option}: {name!r} is no {what} of {self.of.kind}{hint}")

        fields = list(dict.fromkeys([items[0], *self.fields]))
        labels = tuple(task.column for task in inner.tasks) if self.actions else ()
        shared = inner.shared_label(labels)
        if shared is not None:
            raise InputError(
                f"sequences of {self.of.kind}: an event keeps one action a label, but two tasks have the label "
                f"{shared!r}: give each a column of its own or pass --data.actions false"
            )
        events = Sequence(
            name=EVENTS, fields=tuple(SequenceField(of=name) for name in fields), time=True, actions=labels,
            max_len=self.max_len,
        )  # fmt: skip
        slow = [
            Sequence(
                name=f"{name}_changes", fields=(SequenceField(of=name),), time=True, runs=True, max_len=self.max_len
            )
            for name in dict.fromkeys(self.auxiliary)
        ]
        context = list(dict.fromkeys(self.context))
        of_rows = [name for name in dict.fromkeys([*fields, *self.auxiliary]) if name not in context]
        contents: list[tuple[str, Side, list[Any]]] = [
            ("context", "user", [known[name] for name in context]),
            (EVENTS, "user", [events]),
            ("auxiliary", "user", slow),
            ("item", "item", [known[name] for name in of_rows]),
        ]
        groups = [Group(name=name, side=side, features=tuple(held)) for name, side, held in contents if held]
        added = {ROW, PART, NEW, *(column for s in (events, *slow) for column in s.list_columns())}
        _no_clash(added, _plain_columns(self.of, inner), self.of)
        _no_clash({EVENTS, *(s.name for s in slow)}, list(known), self.of)
        return Schema(
            groups=tuple(groups), tasks=inner.tasks, user=inner.user, item=inner.item, time=inner.time,
            time_unit=inner.time_unit, new_events=NEW, dim=inner.dim,
        )  # fmt: skip

    def best_scores(self) -> dict[str, str]:
        return self.of.best_scores()

    def paired_with(self) -> Any:
        return self.of if self.protocol == "time" else (self.of, self.protocol)

    def settled(self, progress: Callable[[str], None] = lambda message: None, option: str = "--data") -> Sequences:
        return self.model_copy(update={"of": self.of.settled(progress, f"{option}.of")})

    def identity(self) -> dict[str, Any]:
        split = self.of.model_dump(mode="json", include={"split"})["split"]
        return {**super().identity(), "of": self.of.identity(), "of_split": split}

    def build(self, folder: Path, progress: Callable[[str], None]) -> dict[str, Any]:
        if self.protocol == "time" and isinstance(self.of.split, NoSplit):
            raise InputError("sequences: protocol 'time' needs a split: give --data.of.split one")
        prepared = self.of.prepare(progress)
        schema = self.schema()
        rows = ParquetRows(prepared.files, NoSplit())
        split = self.of.parts() if self.protocol == "time" else NoSplit()
        counts: Counter[str] = Counter()
        partitions = max(-(-rows.num_rows // self.partition_rows), 1)
        size = min(max(ROW_GROUP * USUAL_LENGTH // self.max_len, 1024), ROW_GROUP)

        def pieces() -> Iterator[pa.Table]:
            for number in range(partitions):
                progress(f"sequences of {self.of.kind}: partition {number + 1} of {partitions} (by user)")
                log, parts = self._read(rows, split, schema, number, partitions)
                if not log.num_rows:
                    continue
                by_time = self.protocol == "time"
                examples = _by_time(log, schema, parts, self) if by_time else _by_place(log, schema, self)
                counts.update(examples.counts)
                log = log.append_column(NEW, pa.array(examples.new_events))
                for part, chosen in examples.rows.items():
                    if not len(chosen):
                        continue
                    ties = "hidden" if by_time and part != "train" else "ordered"
                    counts[f"{part} rows"] += len(chosen)
                    for piece in history.replay_pieces(schema, log, size=size, only=np.sort(chosen), ties=ties):
                        yield piece.append_column(PART, pa.repeat(part, piece.num_rows))

        if not write_parts(folder, pieces()):
            raise InputError(f"sequences of {self.of.kind}: no user has enough events for protocol {self.protocol!r}")
        notes: dict[str, Any] = {"protocol": self.protocol, **counts}
        if self.protocol == "public":
            notes["validation"] = "is the test itself: this protocol looks at the test during training"
        begin = "begin with the log" if earlier(prepared.files) is None else "begin before the log"
        return notes | {"histories": begin, "of": prepared.notes}

    def _earlier(
        self, rows: ParquetRows, schema: Schema, columns: list[str], number: int, partitions: int
    ) -> tuple[list[pa.Table], list[np.ndarray]]:
        """Of one partition, the events from before the log, with no part of it and no row number."""
        file = earlier([group.file for group in rows.row_groups])
        if file is None:
            return [], []
        events = file.read([name for name in file.schema_arrow.names if name in columns])
        user = events.column(schema.user).combine_chunks()
        mine = mix(hash_column(user, schema.user)) % np.uint64(partitions) == number
        events = events.filter(pa.array(mine)).append_column(ROW, pa.array(np.full(int(mine.sum()), -1)))
        return [events], [np.full(events.num_rows, -1, np.int8)]

    def _read(
        self, rows: ParquetRows, split: Split, schema: Schema, number: int, partitions: int
    ) -> tuple[pa.Table, np.ndarray]:
        """The log's rows of one partition of its users, without lists, and the part [n] of each."""
        columns = _plain_columns(self.of, schema)
        tables, parts = self._earlier(rows, schema, columns, number, partitions)
        for piece in rows.pieces("train", list(dict.fromkeys([*columns, *columns_of(split)]))):
            part = split.part_of(piece.rows, int(piece.index[0]))
            user = piece.rows.column(schema.user)
            code = hash_column(user, schema.user)
            # Rows without a user have nothing in common: they are spread over all partitions.
            code = np.where(user.is_null().to_numpy(zero_copy_only=False), piece.index.astype(np.uint64), code)
            mine = mix(code) % np.uint64(partitions) == number
            held = {name: whole(piece.rows.column(name)) for name in columns}
            tables.append(pa.table(held | {ROW: piece.index}).filter(pa.array(mine)))
            parts.append(part[mine])
        return together(tables, f"sequences of {self.of.kind}").combine_chunks(), np.concatenate(parts)


class _Examples(NamedTuple):
    """What is written of a log of n rows."""

    rows: dict[Part, np.ndarray]  # rows of each part
    new_events: np.ndarray  # [n] of the training rows; 0 elsewhere
    counts: dict[str, int]


class _Events(NamedTuple):
    """The events of a log (rows with a user and an item) by user, time and file order."""

    rows: np.ndarray  # [n] row of each
    first: np.ndarray  # [n] place of its user's first event
    counts: dict[str, int]

    @staticmethod
    def of(log: pa.Table, schema: Schema) -> _Events:
        order = history.Order.of(log, schema, "ordered")
        item = log.column(schema.item).is_valid().to_numpy()[order.rows]
        kept = (order.user > 0) & item
        users = order.user[kept]
        starts = np.append(True, users[1:] != users[:-1])[: len(users)]
        counts = {
            "users": len(order.users),
            "rows without a user": int((order.user == 0).sum()),
            "rows without an item": int((~item & (order.user > 0)).sum()),
        }
        return _Events(order.rows[kept], history.last_true(starts), counts)


def _by_place(log: pa.Table, schema: Schema, source: Sequences) -> _Examples:
    """Each user's last events by their place from the end; users with too few have none."""
    events = _Events.of(log, schema)
    from_end: dict[Part, int] = {"train": 1, "validation": 0, "test": 0}
    if source.protocol == "validated":
        from_end = {"train": 2, "validation": 1, "test": 0}
    place = np.arange(len(events.rows)) - events.first
    sizes = np.bincount(events.first, minlength=len(place))[events.first]
    logged = log.column(ROW).to_numpy()[events.rows] >= 0  # others are past only
    enough = (sizes > from_end["train"]) & logged
    chosen: dict[Part, np.ndarray] = {
        part: np.flatnonzero(enough & (sizes - 1 - place == behind)) for part, behind in from_end.items()
    }
    new = (np.arange(len(place)) - history.last_true(_starts(events, logged)))[chosen["train"]]
    users = events.counts["users"]
    few = {"users with too few events, left out": users - len(chosen["test"])}
    return _examples(log, events, chosen, new, source.max_len, few)


def _by_time(log: pa.Table, schema: Schema, parts: np.ndarray, source: Sequences) -> _Examples:
    """The last event of each session of training events; all validation and test rows, events or not."""
    events = _Events.of(log, schema)
    training = parts[events.rows] == PARTS.index("train")
    places = np.arange(len(events.rows))
    starts = _starts(events, training)
    if source.session_gap is not None and len(places):
        assert schema.time is not None
        seconds = unix_seconds(log.column(schema.time).combine_chunks(), schema.time, schema.time_unit)[events.rows]
        starts |= np.diff(seconds, prepend=seconds[0]) >= source.session_gap
    if source.session_events is not None:
        starts |= (places - history.last_true(starts)) % source.session_events == 0
    ends = np.append(starts | ~training, True)[1:] & training
    new = (places - history.last_true(starts))[ends]
    users = events.counts["users"]
    none = {"users without a training event": users - len(np.unique(events.first[ends]))}
    found = _examples(log, events, {"train": np.flatnonzero(ends)}, new, source.max_len, none)
    for number, part in enumerate(PARTS[1:], 1):
        found.rows[part] = np.flatnonzero(parts == number)
    return found


def _starts(events: _Events, targets: np.ndarray) -> np.ndarray:
    """[n] bool, the first event of each user, and each one behind an event that is no target."""
    return (events.first == np.arange(len(targets))) | ~np.append(False, targets)[:-1]


def _examples(
    log: pa.Table, events: _Events, chosen: dict[Part, np.ndarray], new: np.ndarray, max_len: int,
    counts: dict[str, int],
) -> _Examples:  # fmt: skip
    """Chosen events of each part as rows; a training row's `new` events count as far as its lists go back."""
    rows: dict[Part, np.ndarray] = {part: events.rows[places] for part, places in chosen.items()}
    kept = np.minimum(new, max_len)
    new_events = np.zeros(log.num_rows, np.int64)
    new_events[rows["train"]] = kept
    targets = {
        "training events that are targets": int(kept.sum()) + len(kept),
        f"training events that are never a target, more than {max_len} before the end": int((new - kept).sum()),
    }
    return _Examples(rows, new_events, events.counts | counts | targets)


def _plain_columns(source: Source, schema: Schema) -> list[str]:
    """The columns of a source that sequences read: no lists, no numbers."""
    features = [f.column or f.name for f in schema.features if isinstance(f, Categorical)]
    labels = [c for task in schema.tasks for c in (task.column, task.weight, task.mask) if c]
    named = [schema.user, schema.item, schema.time, *features, *labels, *source.best_scores().values()]
    return list(dict.fromkeys(name for name in named if name))


def _no_clash(added: set[str], there: list[str], source: Source) -> None:
    clash = next((name for name in there if name in added), None)
    if clash is not None:
        raise InputError(f"sequences of {source.kind}: {clash!r} is a name that sequences add: rename it there")

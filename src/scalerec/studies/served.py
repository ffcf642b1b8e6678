"""Exposures compared piece by piece: raw columns, their encoding, their scores, and what a differing column costs.

n rows of a piece   T tasks
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from scalerec.batch import Batch
from scalerec.checkpoint import Checkpoint
from scalerec.data.split import times_of
from scalerec.errors import InputError
from scalerec.evaluate import BATCH
from scalerec.features.encoded import encoded_columns
from scalerec.features.hashing import hash_column
from scalerec.features.numeric import numbers
from scalerec.models.base import Model
from scalerec.schema import Numeric, Schema, reads
from scalerec.studies.columns import Comparison, Kind
from scalerec.studies.exposures import ENCODED, RAW, SCORE
from scalerec.studies.score_skew import ScoreSkew
from scalerec.studies.training_rows import TrainingRows, owned, together

ENCODE = 4_096  # rows encoded at a time: as many are left out together where the encoder refuses one
SAMPLE = 512  # differing rows of a column that are scored again with the trained value
PIECE = 64  # of them from one piece


@dataclass
class _Sample:
    """Rows in which a column differs: as served and as trained, all input columns."""

    served: list[pa.RecordBatch] = field(default_factory=list)
    trained: list[pa.RecordBatch] = field(default_factory=list)
    rows: int = 0


class Served:
    """The three comparisons of one model's exposures; `needed` are the columns to read of them."""

    def __init__(self, saved: Checkpoint, names: list[str]):
        """`names` are the columns of the exposure log; InputError where it lacks a raw column of the schema."""
        self.encoder, self.layout = saved.encoder, saved.layout
        self.schema: Schema = saved.encoder.schema
        model = saved.model()
        self.model: Model | None = model if model.ranks else None
        columns = self.schema.input_columns()
        absent = [column for column in columns if RAW + column not in names]
        if absent:
            raise InputError(
                f"no column {RAW + absent[0]!r}: these are exposures of another schema than that of {saved.folder}; "
                "name the model that it is with --model, or give the run that served them"
            )
        features = [feature for feature in self.schema.features if ENCODED + feature.name in names]
        self.not_encoded = [f.name for f in self.schema.features if f not in features]
        tasks = [task for task in self.layout.tasks if SCORE + task in names] if self.model is not None else []
        self.needed: list[str] = list(dict.fromkeys([
            *(["request_id"] if "request_id" in names else []),
            *(RAW + column for column in columns), *(ENCODED + feature.name for feature in features),
            *(SCORE + task for task in tasks),
        ]))  # fmt: skip
        kinds: dict[str, Kind] = {name: kind_of(name, self.schema) for name in columns}
        self.raw = {  # times of events are as good as a name
            name: Comparison(name, kind=kind, shown=kind != "time" and name != self.schema.user)
            for name, kind in kinds.items()
        }
        self.encoded = {
            feature.name: Comparison(
                feature.name,
                kind="quantity" if isinstance(feature, Numeric) and feature.encoding == "linear" else "value",
                shown=self.schema.user not in reads(feature),
            )
            for feature in features
        }
        self.tasks = [self.layout.tasks.index(task) for task in tasks]
        self.scores = ScoreSkew(tasks)
        self.rows = self.refused = 0
        self.refusal = ""
        self._samples: dict[str, _Sample] = {}
        self._stale: dict[str, str] = {}

    def add(self, rows: pa.RecordBatch) -> None:
        """Encode and score what was served, and compare it with what was said then."""
        self.rows += rows.num_rows
        for first in range(0, rows.num_rows, ENCODE):
            piece = rows.slice(first, ENCODE)
            try:
                batch = self.encoder.encode(self._as_logged(piece), labels=False, where="exposures")
            except InputError as error:
                self.refused += piece.num_rows
                self.refusal = self.refusal or str(error)
                continue
            ours = encoded_columns(batch, self.layout) if self.encoded else {}
            for name, comparison in self.encoded.items():
                comparison.add(piece.column(ENCODED + name), ours[name])
            if self.tasks:
                served, broken = zip(*(numbers(piece.column(SCORE + task), task) for task in self.scores.tasks))
                requests = np.zeros(piece.num_rows, np.uint64)
                if "request_id" in self.needed:
                    requests = hash_column(piece.column("request_id"), "request_id")
                self.scores.add(requests, np.stack(served, 1), self._scores(batch)[:, self.tasks], broken)

    def add_joined(self, rows: pa.RecordBatch, trained: pa.RecordBatch) -> None:
        """Compare the raw columns of exposures with the training rows [n] that they became."""
        served = self._as_logged(rows)
        for name, comparison in self.raw.items():
            differs = np.flatnonzero(comparison.add(served.column(name), trained.column(name)))
            sample = self._samples.setdefault(name, _Sample())
            room = min(PIECE, SAMPLE - sample.rows, len(differs))
            if room > 0:
                some = pa.array(differs[np.linspace(0, len(differs) - 1, room).astype(np.int64)])
                sample.served.append(served.take(some))
                sample.trained.append(trained.take(some))
                sample.rows += room

    def look_for_stale(self, log: TrainingRows) -> None:
        """Of columns that differ: were the served values those that the same user or item had before?"""
        if self.schema.time is None:
            return
        listed = {name for sequence in self.schema.sequences for name in sequence.list_columns()}
        for name, sample in self._samples.items():
            if not sample.rows or name in (*listed, self.schema.user, self.schema.item, self.schema.time):
                continue
            served, trained = together(sample.served), together(sample.trained)
            if any(pa.types.is_nested(batch.column(name).type) for batch in (served, trained)):
                continue
            owner = self.schema.user if _side(self.schema, name) == "user" else (self.schema.item or self.schema.user)
            times = times_of(trained, self.schema.time)
            values = served.column(name)
            turned = values.take(pa.array(np.roll(np.arange(len(values)), len(values) // 2)))
            last = log.last_times(owner, name, owned(trained.column(owner), values), times)
            chance = np.isfinite(log.last_times(owner, name, owned(trained.column(owner), turned), times)).mean()
            before = np.isfinite(last)
            # Values that anybody has at some time are no sign: others' values must be found clearly less often.
            if before.mean() >= 0.5 and before.mean() >= 1.5 * chance:
                age = float(np.median((times - last)[before]))
                whose = "user" if owner == self.schema.user else "item"
                self._stale[name] = (
                    f"stale: {before.mean():.0%} of a sample had the served value before, for the same {whose} "
                    f"(median {age:.6g} earlier)"
                )

    def found(self) -> dict[str, Any]:
        """What was compared, ready for JSON; the columns that cost most first."""
        raw = [comparison.found() | self._effect(name) for name, comparison in self.raw.items()]
        for entry in raw:
            if entry["column"] in self._stale:
                entry["looks_like"] = self._stale[entry["column"]]
        raw.sort(key=lambda entry: (-(entry["effect"] or 0.0), -entry["share"]))
        encoded = sorted((c.found() for c in self.encoded.values()), key=lambda entry: -entry["share"])
        return {
            "rows": self.rows, "refused": self.refused, "refusal": self.refusal, "raw": raw, "encoded": encoded,
            "not_encoded": self.not_encoded, "scores": self.scores.found(),
        }  # fmt: skip

    def _effect(self, name: str) -> dict[str, Any]:
        """Mean change of the score over all rows if the trained column is put in place of the served one."""
        sample, comparison = self._samples.get(name, _Sample()), self.raw[name]
        if self.model is None or not sample.rows:
            return {"effect": None}
        served, trained = together(sample.served), together(sample.trained)
        swapped = _swap(served, trained, _belonging(self.schema, name))
        try:
            before, after = (
                self._scores(self.encoder.encode(rows, labels=False, where="exposures")) for rows in (served, swapped)
            )
        except InputError:
            return {"effect": None}
        return {"effect": float(np.abs(after - before).max(1).mean()) * comparison.differ / comparison.rows}

    def _scores(self, batch: Batch) -> np.ndarray:
        """The checkpoint's probabilities [n, T]."""
        assert self.model is not None
        with torch.inference_mode():
            parts = torch.arange(len(batch)).split(BATCH)
            return torch.cat([torch.sigmoid(self.model(batch.take(part)).logits.float()) for part in parts]).numpy()

    def _as_logged(self, rows: pa.RecordBatch) -> pa.RecordBatch:
        names = self.schema.input_columns()
        return pa.RecordBatch.from_arrays([rows.column(RAW + name) for name in names], names=names)


def kind_of(column: str, schema: Schema) -> Kind:
    """Whether differences of an input column have a size: it is a time, a quantity or neither."""
    if column in (schema.time, *(sequence.time_column for sequence in schema.sequences)):
        return "time"
    numeric = (feature.column or feature.name for feature in schema.features if isinstance(feature, Numeric))
    return "quantity" if column in numeric else "value"


def _side(schema: Schema, column: str) -> str:
    """The side that reads the column; the user's where both do."""
    sides: Iterator[str] = (group.side for group in schema.groups for f in group.features if column in reads(f))
    return next(sides, "item")


def _belonging(schema: Schema, column: str) -> list[str]:
    """The column, with the other lists of its sequence, which only make sense together."""
    return next((s.list_columns() for s in schema.sequences if column in s.list_columns()), [column])


def _swap(served: pa.RecordBatch, trained: pa.RecordBatch, columns: list[str]) -> pa.RecordBatch:
    names = served.schema.names
    arrays = [trained.column(name) if name in columns else served.column(name) for name in names]
    return pa.RecordBatch.from_arrays(arrays, names=names)

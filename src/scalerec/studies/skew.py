"""Served against trained: are columns, encoding and scores of an exposure log what training would have had?

raw columns   of each exposure, against the row of the training log with its user, item and time
encoding      what the service's encoder made of the raw columns, against what the run's encoder makes of them
scores        what the service answered, against what the run's checkpoint says of the served columns
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from scalerec import checkpoint
from scalerec.config import override, parse
from scalerec.data.histories import with_histories
from scalerec.data.reader import ParquetRows, find_parquet
from scalerec.data.split import NoSplit
from scalerec.errors import InputError
from scalerec.studies.exposures import RAW, Exposures
from scalerec.studies.join import NOBODY, Keys, Match, match
from scalerec.studies.report import machine
from scalerec.studies.served import Served
from scalerec.studies.training_rows import TrainingRows, together
from scalerec.training.run import Run

BLOCK = 16_384  # exposures joined at a time


def skew(
    exposures: str, folder: Path, *, data: str | None = None, model: str | None = None, version: str | None = None,
    sample: float = 1.0, within: float = 0.0, tolerance: float = 0.0, score_tolerance: float = 1e-5,
    log: bool = True, changes: dict[str, str] | None = None, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """The comparisons as one JSON object; `verdict` says what differs, worst first, `differs` whether anything does.

    Args:
        folder: a run, a checkpoint or a bundle.
        data: other Parquet files of the training log's schema; default: the run's prepared files.
        sample: the share of requests to look at.
        within: how far, in the log's unit of time, an exposure and its training row may lie apart.
        tolerance: the share of rows in which a column may differ.
        score_tolerance: how far a probability may be off.
        log: without it the training log is not read and its columns not compared.

    Raises:
        InputError: no checkpoint, no exposures of its model or schema, no training log, a log without its columns.
    """
    saved = checkpoint.load(folder)
    name = _model_name(exposures, model, version, saved.run.get("name"))
    shown = Exposures(exposures, model=name, version=version, sample=sample)
    try:
        served = Served(saved, shown.columns())
    except InputError as error:
        raise InputError(f"{exposures}: {error}") from None
    join = None
    if log:
        if data:
            files = with_histories(find_parquet(data), saved.encoder.schema, lambda message: None).files
        else:
            files = _prepared(saved.run, folder, changes or {})
        join = _join(served, shown, ParquetRows(files, NoSplit()), within)
    else:
        for rows in shown.pieces(served.needed):
            served.add(rows)
    versions = {str(name): count for (name,), count in shown.count("version").items()}
    found = {
        "exposures": str(exposures), "run": str(folder), "model": name or "", "versions": versions, "join": join,
        **served.found(), "tolerance": tolerance, "score_tolerance": score_tolerance, "machine": machine(),
        "command": command,
    }  # fmt: skip
    found["verdict"] = verdict(found)
    found["differs"] = bool(found["verdict"])
    return found


def _model_name(exposures: str, model: str | None, version: str | None, run: str | None) -> str | None:
    """The model whose exposures are meant: as asked, the only one there, or the one that is called like the run."""
    if model is not None:
        return model
    names = [str(name) for (name,) in Exposures(exposures, version=version).count("model")]
    if len(names) > 1 and run not in names:
        raise InputError(f"{exposures}: exposures of {', '.join(sorted(names))}: name one of them with --model")
    return run if len(names) > 1 else None


def _prepared(run: dict[str, Any], folder: Path, changes: dict[str, str]) -> list[Path]:
    return override(parse(Run, run, str(folder)), changes).data.prepare().files


def _join(served: Served, shown: Exposures, files: ParquetRows, within: float) -> dict[str, Any]:
    """Compare every exposure, and those with a training row with it; who was joined and who not."""
    schema = served.schema
    # The column that the encoder reads is in the log's unit; what else is called time may be the service's clock.
    time = None if schema.time is None else RAW + schema.time if RAW + schema.time in served.needed else "time"
    item = "item" if schema.item else None
    wanted = [name for name in ("user", item, time) if name is not None]
    keys = Keys.cat([Keys.of(rows, "user", item, time, schema.time_unit) for rows in shown.pieces(wanted)])
    log = TrainingRows(files, schema, np.unique(keys.pair))
    found = match(log.keys, keys, within)
    columns = [*schema.input_columns(), *(name for name in (schema.item, schema.time) if name is not None)]
    first = 0
    for rows in _blocks(shown.pieces(served.needed)):
        index = found.index[first : first + rows.num_rows]
        first += rows.num_rows
        served.add(rows)
        joined = np.flatnonzero(index >= 0)
        if len(joined):
            served.add_joined(rows.take(pa.array(joined)), log.take(index[joined], list(dict.fromkeys(columns))))
    served.look_for_stale(log)
    return _figures(found, keys, log, time or "")


def _blocks(pieces: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    held: list[pa.RecordBatch] = []
    for piece in pieces:
        # Files of one model may hold a column in different types, as requests brought it.
        if held and piece.schema != held[0].schema:
            yield together(held)
            held = []
        held.append(piece)
        if sum(rows.num_rows for rows in held) >= BLOCK:
            yield together(held)
            held = []
    if held:
        yield together(held)


def _figures(found: Match, keys: Keys, log: TrainingRows, time: str) -> dict[str, Any]:
    joined = found.index >= 0
    order = keys.order()
    nobody = keys.pair == NOBODY
    repeated = (np.diff(keys.pair[order]) == 0) & (np.diff(keys.time[order]) == 0) & ~nobody[order][1:]
    figures: dict[str, Any] = {
        "exposures": len(joined),
        "joined": int(joined.sum()),
        "without_training_row": int((~joined).sum()),
        "of_a_known_pair": int((~joined & np.isin(keys.pair, log.keys.pair)).sum()),
        "without_user_or_item": int(nobody.sum()),
        "repeated_exposures": int(repeated.sum()),
        "time_column": time,
        "time_scale": found.scale,
        "time_shift": found.shift,
        "time_distance": None if np.isnan(found.distance) else found.distance,
    }
    if time and joined.any():
        moved = (keys.time / found.scale - found.shift)[joined]
        low, high = float(moved.min()), float(moved.max())
        there = log.count_between(low, high)
        exposed = log.keys.time[np.unique(found.index[joined])]  # up to --within of it they may lie beyond that time
        figures["training_rows_of_that_time"] = there
        figures["training_rows_without_exposure"] = there - int(((exposed >= low) & (exposed <= high)).sum())
    return figures


def verdict(found: dict[str, Any]) -> list[str]:
    """What is beyond its tolerance, a line each: the join, refused rows, raw columns by effect, features, scores."""
    lines = _join_verdict(found["join"]) if found["join"] else []
    if found["refused"]:
        lines.append(f"the run's encoder refuses {found['refused']:,} of {found['rows']:,} served rows: "
                     f"{found['refusal']}")  # fmt: skip
    for entry in found["raw"]:
        if entry["share"] > found["tolerance"]:
            effect = f"; moves the score by {entry['effect']:.2g} on average" if entry.get("effect") else ""
            lines.append(f"column {entry['column']}: {_shares(entry)}{_looks(entry)}{effect}")
    for entry in found["encoded"]:
        if entry["share"] > found["tolerance"]:
            lines.append(f"encoding of {entry['column']}: {_shares(entry)}{_looks(entry)}, by the same raw columns")
    for entry in found["scores"]:
        if entry["not_a_number"]:
            lines.append(f"score of {entry['task']}: {entry['not_a_number']:,} were served that are not a number")
        # So written that a checkpoint whose scores are not numbers is found as well.
        if entry["rows"] and not entry["largest_difference"] <= found["score_tolerance"]:
            lines.append(
                f"score of {entry['task']}: up to {entry['largest_difference']:.2g} from the checkpoint's, "
                f"{entry['mean_difference']:.2g} on average"
            )
    return lines


def _join_verdict(join: dict[str, Any]) -> list[str]:
    lines = []
    if join["time_scale"] != 1.0:
        unit = {1e3: " (milliseconds for seconds?)", 1e6: " (microseconds for seconds?)"}.get(join["time_scale"], "")
        lines.append(f"time: served as {join['time_scale']:g} times what the log has{unit}; joined as if it were not")
    if join["time_shift"]:
        lines.append(f"time: served {join['time_shift']:+g} from what the log has (a time zone?); joined without that")
    if not join["joined"]:
        if join["time_distance"] is None:
            why = "no user and item of theirs are in the log"
        else:
            why = f"the nearest rows of their users and items are {join['time_distance']:g} away (median): try --within"
        lines.append(f"none of {join['exposures']:,} exposures has a training row: {why}")
    return lines


def _shares(entry: dict[str, Any]) -> str:
    return f"{entry['share']:.2%} of {entry['rows']:,} rows differ"


def _looks(entry: dict[str, Any]) -> str:
    if entry.get("looks_like"):
        return f", {entry['looks_like']}"
    return f", by {entry['median_difference']:.4g} (median)" if "median_difference" in entry else ""

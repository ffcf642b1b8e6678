"""Which of the models that a service deals its users to did better: exposures say who saw what, events what they did.

An event belongs to the last exposure of its user and item that was not later, and not earlier than the window. All
that a user did is one observation: impressions of one user are not independent.

n exposures   U units
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from scalerec.data.reader import ParquetRows, find_parquet
from scalerec.data.split import NoSplit
from scalerec.errors import InputError
from scalerec.features.hashing import NO_VALUE, hash_column
from scalerec.features.numeric import numbers
from scalerec.studies.exposures import Exposures
from scalerec.studies.join import NOBODY, Keys, last_before
from scalerec.studies.lift import (
    Arm,
    Lift,
    bootstrap_lift,
    delta_lift,
    holm,
    minimum_detectable,
    rate,
    sample_ratio,
)
from scalerec.studies.report import machine

MISMATCH = 0.001  # p-value of the sample ratio below which no lift can be trusted
FEW_UNITS = 100  # of an arm; below it a normal approximation is rough


class Names(NamedTuple):
    """The columns of the event log."""

    user: str = "user"
    item: str | None = "item"
    time: str = "time"
    time_unit: float = 1.0  # seconds, where the exposures have moments and the events numbers


NAMES = Names()


def ab(
    exposures: str, events: str, *, label: str, metric: Literal["mean", "ratio"] = "ratio", by: str = "user",
    arms: str = "model", control: str | None = None, weights: Mapping[str, float] | None = None,
    window: float | None = None, names: Names = NAMES, interval: Literal["delta", "bootstrap"] = "delta",
    command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """The experiment as one JSON object; `verdict` says what it showed, `trusted` whether units were dealt as planned.

    Args:
        label: column of the events that is summed: a click (0 or 1), an amount.
        metric: ratio: label an exposure, sums over all units; mean: label a unit.
        by: column of the exposures whose values were dealt to the arms, the unit of analysis.
        arms: column of the exposures that says which arm it was.
        control: the arm that others are compared with; default: the first of the weights, else the first by name.
        weights: planned shares of the arms; default: equal ones.
        window: the longest time, in the log's unit, from an exposure to an event of its; default: any.
        names: columns of the events; without an item an event belongs to the last exposure of its user.

    Raises:
        InputError: fewer than two arms, an arm that is not there, columns missing, no event of any exposure.
    """
    shown = _Shown.read(exposures, by, arms, names)
    order = _arm_order(shown.arms, control, weights)
    outcome, counts = _attributed(shown, events, label, window, names)
    units = _units(shown, outcome, metric)
    planned = [1.0 if weights is None else weights[name] for name in order]
    dealt = {name: len(units[name].outcome) if name in units else 0 for name in order}
    square, p = sample_ratio(list(dealt.values()), planned)
    found: dict[str, Any] = {
        "exposures": str(exposures), "events": {"files": str(events), **counts}, "label": label, "metric": metric,
        "by": by, "interval": interval, "window": window, "units": sum(dealt.values()),
        "units_in_several_arms": shown.mixed, "exposures_read": len(shown.unit),
        "exposures_of_no_arm": shown.of_no_arm, "exposures_of_no_unit": shown.of_no_unit,
        "sample_ratio": {
            "chi_square": square, "p": p, "units": dealt,
            "planned": {name: weight / sum(planned) for name, weight in zip(order, planned)},
        },
        "trusted": p >= MISMATCH, "arms": _compared(units, order, interval), "machine": machine(), "command": command,
    }  # fmt: skip
    found["verdict"] = verdict(found)
    return found


class _Shown(NamedTuple):
    """All exposures of an arm, sorted by user, item and time."""

    keys: Keys  # [n]
    arm: np.ndarray  # [n] index into `arms`
    unit: np.ndarray  # [n] 0..U-1
    arms: list[str]
    mixed: int  # units that were seen in more than one arm
    of_no_arm: int  # exposures that were not dealt: the request named its model
    of_no_unit: int  # exposures of an arm that do not say whose they are

    @staticmethod
    def read(path: str, by: str, arms: str, names: Names) -> _Shown:
        """InputError where a column is missing or there are fewer than two arms."""
        log = Exposures(path)
        there = log.columns()
        item = "item" if names.item is not None else None
        wanted = ["user", *([item] if item else []), "time", by, arms, *(["bucket"] if "bucket" in there else [])]
        keys, codes, units, known, of_no_arm, of_no_unit = [], [], [], {}, 0, 0
        for rows in log.pieces(list(dict.fromkeys(wanted))):
            dealt = rows.column(arms).is_valid()
            if "bucket" in there:
                dealt = pc.and_(dealt, rows.column("bucket").is_valid())
            of_no_arm += rows.num_rows - (pc.sum(dealt).as_py() or 0)
            rows = rows.filter(dealt)
            unit = hash_column(rows.column(by), by)
            of_no_unit += int((unit == NO_VALUE).sum())
            rows, unit = rows.filter(pa.array(unit != NO_VALUE)), unit[unit != NO_VALUE]
            if not rows.num_rows:
                continue
            keys.append(Keys.of(rows, "user", item, "time", names.time_unit))
            units.append(unit)
            encoded = rows.column(arms).cast(pa.string()).dictionary_encode()
            code = np.array([known.setdefault(name, len(known)) for name in encoded.dictionary.to_pylist()])
            codes.append(code[encoded.indices.to_numpy()])
        if of_no_unit and not known:
            raise InputError(f"{path}: column {by!r} is empty in all exposures of an arm: name another with --by")
        if len(known) < 2:
            one = f"only {next(iter(known))!r}" if known else "none"
            raise InputError(
                f"{path}: an experiment needs two arms; column {arms!r} has {one}: name another with --arms"
            )
        whole = Keys.cat(keys)
        order = whole.order()
        arm, unit = np.concatenate(codes)[order], np.unique(np.concatenate(units), return_inverse=True)[1][order]
        count = int(unit.max()) + 1
        least, most = np.full(count, len(known)), np.full(count, -1)
        np.minimum.at(least, unit, arm)
        np.maximum.at(most, unit, arm)
        mixed = least != most
        arm = np.where(mixed[unit], -1, arm)
        return _Shown(whole.take(order), arm, unit, list(known), int(mixed.sum()), of_no_arm, of_no_unit)


def _arm_order(arms: list[str], control: str | None, weights: Mapping[str, float] | None) -> list[str]:
    """The arms, the control first."""
    order = [name for name, weight in weights.items() if weight or name in arms] if weights else sorted(arms)
    if weights is not None:
        unplanned = sorted(set(arms) - set(order))
        if unplanned:
            raise InputError(f"--weights: no weight for arm {unplanned[0]!r}, which the exposures have")
        if min(weights.values()) < 0 or sum(weights.values()) <= 0:
            raise InputError("--weights: shares are 0 or more, and not all 0")
    first = order[0] if control is None else control
    if first not in arms:
        raise InputError(f"--control {first}: the exposures have the arms {', '.join(sorted(arms))}")
    return [first, *(name for name in order if name != first)]


def _attributed(
    shown: _Shown, events: str, label: str, window: float | None, names: Names
) -> tuple[np.ndarray, dict[str, int]]:
    """The label's sum over the events of each exposure [n], and how many events there were."""
    outcome = np.zeros(len(shown.unit))
    counts = {"rows": 0, "with_label": 0, "without_user_or_item": 0, "attributed": 0}
    columns = [name for name in dict.fromkeys((names.user, names.item, names.time, label)) if name is not None]
    for rows in ParquetRows(find_parquet(events), NoSplit()).batches("train", columns):
        values = np.nan_to_num(numbers(rows.column(label), label)[0])
        counts["rows"] += rows.num_rows
        some = np.flatnonzero(values)
        if not len(some):
            continue
        done = rows.take(pa.array(some))
        asked = Keys.of(done, names.user, names.item, names.time, names.time_unit)
        found = last_before(shown.keys, asked)
        late = asked.time - shown.keys.time[found]
        mine = (found >= 0) & (late <= (np.inf if window is None else window))
        np.add.at(outcome, found[mine], values[some][mine])
        counts["with_label"] += len(some)
        counts["without_user_or_item"] += int((asked.pair == NOBODY).sum())
        counts["attributed"] += int(mine.sum())
    if not counts["attributed"]:
        raise InputError(
            f"{events}: none of {counts['with_label']:,} events with {label!r} belongs to an exposure: are the columns "
            f"{', '.join(columns[:-1])} those of the exposures, in the same unit of time, and is --window long enough?"
        )
    return outcome, counts


def _units(shown: _Shown, outcome: np.ndarray, metric: str) -> dict[str, Arm]:
    """Per arm the outcome and the base of each of its units; units of several arms are left out."""
    count = int(shown.unit.max()) + 1
    y, exposures = np.bincount(shown.unit, outcome, count), np.bincount(shown.unit, minlength=count)
    arm = np.full(count, -1)
    arm[shown.unit] = shown.arm
    base = exposures.astype(np.float64) if metric == "ratio" else np.ones(count)
    return {name: Arm(y[arm == code], base[arm == code]) for code, name in enumerate(shown.arms) if (arm == code).any()}


def _compared(arms: dict[str, Arm], order: list[str], interval: str) -> list[dict[str, Any]]:
    for name in order:
        if len(arms.get(name, Arm(np.empty(0), np.empty(0))).outcome) < 2:
            raise InputError(f"arm {name!r} has fewer than two units that were in no other arm: nothing can be said")
    first = arms[order[0]]
    entries = []
    for name in order:
        found = rate(arms[name])
        low, high = found.interval
        entries.append({
            "arm": name, "units": len(arms[name].outcome), "base": float(arms[name].base.sum()),
            "outcome": float(arms[name].outcome.sum()), "value": found.value, "low": low, "high": high,
        })  # fmt: skip
    by = bootstrap_lift if interval == "bootstrap" else delta_lift
    for entry in entries[1:]:
        other = arms[entry["arm"]]
        lift: Lift = by(first, other)
        entry |= {
            "difference": lift.difference, "difference_low": lift.low, "difference_high": lift.high,
            "lift": lift.lift, "lift_low": lift.lift_low, "lift_high": lift.lift_high, "p": lift.p,
            "resolved": lift.resolved, "minimum_detectable": minimum_detectable(first, other),
        }  # fmt: skip
    for entry, p in zip(entries[1:], holm([entry["p"] for entry in entries[1:]])):
        entry["p_holm"] = p
    return entries


def verdict(found: dict[str, Any]) -> list[str]:
    """What an experimenter must know, a line each: may it be trusted, then each arm against the control."""
    lines = []
    ratio = found["sample_ratio"]
    if not found["trusted"]:
        got = ", ".join(f"{name} {count:,}" for name, count in ratio["units"].items())
        lines.append(
            f"sample ratio mismatch (p = {ratio['p']:.2g}): {got} against the planned shares. Units are missing from "
            "an arm, so no lift below can be trusted; find out why first"
        )
    control = found["arms"][0]
    what = f"{found['label']} {'an exposure' if found['metric'] == 'ratio' else 'a ' + found['by']}"
    for entry in found["arms"][1:]:
        held = "" if entry["resolved"] else ", not resolved"
        lines.append(f"{entry['arm']}: {what} {lift_text(entry)} against {control['arm']}, p = {entry['p']:.2g}{held}")
    return lines


def lift_text(entry: dict[str, Any]) -> str:
    """A lift in percent with its interval; the difference where the control's rate may be zero."""
    if entry["lift_low"] is None:
        return f"{entry['difference']:+.4g} [{entry['difference_low']:+.4g}, {entry['difference_high']:+.4g}]"
    return f"{100 * entry['lift']:+.2f} % [{100 * entry['lift_low']:+.2f}, {100 * entry['lift_high']:+.2f}]"

"""`scalerec skew` and `scalerec ab`: their arguments, and what is printed; 1 where something is not as it should be."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markdown import Markdown, TableElement
from rich.table import Table

from scalerec.errors import InputError
from scalerec.results import to_json

Add = Callable[..., argparse.ArgumentParser]  # (name, run, help, overridable) -> the command's parser


class _FoldingTable(TableElement):
    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for table in super().__rich_console__(console, options):
            assert isinstance(table, Table)
            for column in table.columns:
                column.overflow = "fold"
            yield table


class Folding(Markdown):
    """Markdown in whose tables long names go on in the next line: cut, variants of one recipe would look the same."""

    elements = {**Markdown.elements, "table_open": _FoldingTable}


def add_skew(add: Add) -> None:
    command = add("skew", skew, "compare what was served with what training would have computed")
    command.add_argument("exposures", help="the exposure log: a Parquet file, folder or glob")
    command.add_argument("--run", dest="run_folder", type=Path, required=True, help="the run or bundle that served")
    command.add_argument("--data", help="other Parquet files of the training log's schema")
    command.add_argument("--no-data", action="store_true", help="without the training log: encoding and scores only")
    command.add_argument("--model", help="only exposures of this model (default: the one called like the run)")
    command.add_argument("--version", help="only exposures of this version of a bundle")
    command.add_argument("--sample", type=float, default=1.0, help="share of requests to look at")
    command.add_argument(
        "--within", type=float, default=0.0, metavar="TIME",
        help="how far an exposure and its training row may lie apart, in the log's unit",
    )  # fmt: skip
    command.add_argument("--tolerance", type=float, default=0.0, help="share of rows in which a column may differ")
    command.add_argument("--score-tolerance", type=float, default=1e-5, help="how far a probability may be off")
    command.add_argument("--out", type=Path, help="folder for skew.md, skew.json and skew.png")


def skew(options: argparse.Namespace) -> int:
    """0: nothing differs beyond its tolerance, 1: something does."""
    from scalerec.studies.skew import skew as compare
    from scalerec.studies.skew_report import markdown, write

    found = compare(
        options.exposures, options.run_folder, data=options.data, model=options.model, version=options.version,
        sample=options.sample, within=options.within, tolerance=options.tolerance,
        score_tolerance=options.score_tolerance, log=not options.no_data, changes=options.changes,
        command=command_line(),
    )  # fmt: skip
    _tell(found, markdown, write, options)
    return int(found["differs"])


def add_ab(add: Add) -> None:
    command = add("ab", ab, "compare the models of an experiment by what their users did", overridable=False)
    command.add_argument("exposures", help="the exposure log: a Parquet file, folder or glob")
    command.add_argument("--events", required=True, help="what users did: a Parquet file, folder or glob")
    command.add_argument("--label", required=True, help="column of the events: 0 or 1, or an amount")
    command.add_argument(
        "--metric", choices=("ratio", "mean"), default="ratio", help="the label an exposure, or a user (see --by)"
    )
    command.add_argument("--by", default="user", metavar="COLUMN", help="what was dealt to the arms")
    command.add_argument("--arms", default="model", metavar="COLUMN", help="which arm it was")
    command.add_argument("--control", help="the arm to compare with (default: the first of --weights, or by name)")
    command.add_argument("--weights", type=_weights, help="planned shares, as in a=0.9,b=0.1 (default: equal)")
    command.add_argument("--window", type=float, metavar="TIME", help="longest time from an exposure to its event, in "
                         "the log's unit (default: any)")  # fmt: skip
    command.add_argument("--run", dest="run_folder", type=Path, help="a run whose schema names the events' columns")
    command.add_argument(
        "--columns", default="user,item,time", help="the events' columns (default: %(default)s; user,,time: any item's)"
    )
    command.add_argument("--interval", choices=("delta", "bootstrap"), default="delta")
    command.add_argument("--out", type=Path, help="folder for ab.md and ab.json")


def ab(options: argparse.Namespace) -> int:
    """0: analysed, 1: users were not dealt as planned, so that nothing can be said."""
    from scalerec.studies.ab import ab as analyse
    from scalerec.studies.ab_report import markdown, write

    found = analyse(
        options.exposures, options.events, label=options.label, metric=options.metric, by=options.by,
        arms=options.arms, control=options.control, weights=options.weights, window=options.window,
        names=_names(options), interval=options.interval, command=command_line(),
    )  # fmt: skip
    _tell(found, markdown, write, options)
    return int(not found["trusted"])


def _names(options: argparse.Namespace) -> Any:
    """The events' columns: those of a run's schema, or as given."""
    from scalerec import checkpoint
    from scalerec.studies.ab import Names

    if options.run_folder is not None:
        schema = checkpoint.load(options.run_folder).encoder.schema
        if schema.time is None:
            raise InputError(f"{options.run_folder}: its schema names no time column: give --columns user,item,time")
        return Names(schema.user, schema.item, schema.time, schema.time_unit)
    names = options.columns.split(",")
    if len(names) != 3 or not names[0] or not names[2]:
        raise InputError(f"--columns {options.columns}: three names, as in user_id,item_id,shown_at")
    return Names(names[0], names[1] or None, names[2])


def _weights(text: str) -> dict[str, float]:
    try:
        return {name: float(share) for name, share in (part.rsplit("=", 1) for part in text.split(","))}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not like a=0.9,b=0.1") from None


def _tell(found: dict[str, Any], markdown: Callable, write: Callable, options: argparse.Namespace) -> None:
    if options.out is not None:
        write(found, options.out)
    if options.json:
        print(to_json(found))
        return
    Console().print(Folding(markdown(found)))
    if options.out is not None:
        print(f"kept in {options.out}: {', '.join(sorted(path.name for path in options.out.iterdir()))}",
              file=sys.stderr)  # fmt: skip


def command_line() -> str:
    """What was typed, for a report."""
    return "scalerec " + " ".join(sys.argv[1:])

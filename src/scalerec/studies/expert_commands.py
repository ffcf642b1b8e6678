"""`scalerec experts` and `scalerec sparsity`: their arguments, and what is printed."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scalerec.errors import InputError
from scalerec.results import shown, to_json
from scalerec.studies.commands import Add, command_line

SHOWN = ("open", "dead", "load_cv", "entropy")


def add_experts(add: Add) -> None:
    command = add("experts", experts, "how often the experts of a trained run are open", overridable=False)
    command.add_argument("run_folder", type=Path, metavar="RUN")
    command.add_argument("--part", choices=("train", "validation", "test"), default="test")
    command.add_argument("--out", type=Path, metavar="FIGURE.png", help="default: experts.png in RUN")


def experts(options: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from scalerec.studies.experts import draw, measure

    found = measure(options.run_folder, options.part)
    figure = options.out or options.run_folder / "experts.png"
    draw(found, figure)
    if options.json:
        return print(to_json(found))
    table = Table("layer", "token", "open", "dead", "load CV", "entropy", "features", title=f"{options.part} rows")
    for entry in found["tokens"]:
        features = ", ".join(entry["features"]).replace("[", "\\[")
        table.add_row(str(entry["layer"]), str(entry["token"]), *(shown(entry[k], ".3f") for k in SHOWN), features)
    table.add_row("all", "", *(shown(found[k], ".3f") for k in SHOWN), "")
    console = Console()
    console.print(table)
    share = found["active_expert_macs"] / found["expert_macs"]
    console.print(f"{found['active_expert_macs']:,} of {found['expert_macs']:,} multiply-adds a row ({share:.1%})")
    console.print(f"drawn in {figure}", highlight=False, markup=False)


def add_sparsity(add: Add, run_of: Callable[[str, dict[str, str]], Any]) -> None:
    """`run_of` makes a run of a recipe's name and overrides: recipes stand above this floor."""
    command = add("sparsity", sparsity, "AUC against the share of open experts, for four ways to choose them")
    command.add_argument("recipe", help="a dense RankMixer, whose FFNs become experts as wide as they are")
    command.add_argument("--experts", type=int, default=8, metavar="E")
    command.add_argument("--ratios", type=_ratios, default=(1.0, 0.5, 0.25, 0.125), help="default: 1,0.5,0.25,0.125")
    command.add_argument("--seeds", type=int, default=5)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--workers", type=int, default=1, help="runs trained at the same time, cores shared out")
    command.set_defaults(run_of=run_of)


def sparsity(options: argparse.Namespace) -> None:
    from scalerec.studies.sparsity import sparsity as study

    if options.seeds < 1 or options.workers < 1:
        raise InputError("--seeds and --workers must be at least 1")
    base, command = options.run_of(options.recipe, options.changes), command_line()
    choices = {name: getattr(options, name) for name in ("experts", "ratios", "seeds", "workers")}
    found = study(base, options.out, **choices, command=command)
    print(to_json(found) if options.json else f"kept in {options.out}: report.md, sparsity.json, sparsity.png")


def _ratios(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--ratios {text}: numbers with commas between them are needed, as in 1,0.5") from None

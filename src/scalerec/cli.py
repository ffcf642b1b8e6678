"""The command line: each command reads its arguments, calls one function, prints for people or, by --json, machines."""

from __future__ import annotations

import argparse
import json
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from scalerec import __version__, config
from scalerec.errors import InputError
from scalerec.results import shown, to_json
from scalerec.serving import bench
from scalerec.serving import command as serving
from scalerec.studies import commands as studies
from scalerec.studies import expert_commands

out = Console()
PARTS = ("train", "validation", "test")


def main(arguments: list[str] | None = None) -> int:
    """Run one command; 0 done, 1 it found what it looks for, 2 the input has to change (a line on standard error)."""
    parser = _parser()
    arguments, overrides = _apart(sys.argv[1:] if arguments is None else arguments)
    options, rest = parser.parse_known_args(arguments)
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # asked to stop, by whoever: as with Ctrl-C
    try:
        for package in options.allow:
            config.allow(package)
        changes = _changes(overrides + rest)
        if changes and not options.overridable:
            raise InputError(f"--{next(iter(changes))}: `scalerec {options.command}` has no such option")
        options.changes = changes
        return options.run(options) or 0
    except InputError as error:
        print(f"scalerec: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumable = "; `--resume` goes on from the last checkpoint" if options.command == "train" else ""
        print(f"scalerec: interrupted{resumable}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 0
    except OSError as error:
        if error.filename is None:
            raise
        print(f"scalerec: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="the result as JSON on standard output")
    common.add_argument(
        "--allow", action="append", default=[], metavar="PACKAGE", help="let configurations name its classes"
    )
    parser = argparse.ArgumentParser("scalerec", description="Recommenders that get better as they get bigger.")
    parser.add_argument("--version", action="version", version=f"scalerec {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    def add(name: str, run: Any, help: str, overridable: bool = True) -> argparse.ArgumentParser:
        more = "; any field of the run can be set by its path, as in --model.dim 256" if overridable else ""
        command = commands.add_parser(name, parents=[common], help=help, description=help + more, allow_abbrev=False)
        command.set_defaults(run=run, overridable=overridable)
        return command

    command = add("data", data, "prepare a recipe's data and count its parts")
    command.add_argument("recipe")
    command = add("schema", schema, "`schema infer FILE` writes a first schema; `schema show RECIPE` prints one")
    command.add_argument("action", choices=("infer", "show"))
    command.add_argument("source", help="a Parquet file, folder or glob; or a recipe")
    command.add_argument("--out", type=Path, help="default: standard output")
    add("recipes", recipes, "list the recipes", overridable=False)
    command = add("describe", describe, "what a recipe builds: tokens, parameters, FLOPs, memory")
    command.add_argument("recipe")
    command = add("train", train, "train a recipe into a folder")
    command.add_argument("recipe", help="a recipe, package.module:function, or the JSON file of a run")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--seed", type=int)
    command.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    command.add_argument("--warm-start", type=Path, metavar="RUN", help="begin with this run's weights; new ids append")
    command.add_argument("--skip-bad-shards", action="store_true", help="leave out unreadable files, and count them")
    command.add_argument("--quiet", action="store_true")
    command = add("evaluate", evaluate, "metrics of a trained run")
    command.add_argument("run_folder", type=Path, metavar="RUN")
    command.add_argument("--part", choices=PARTS, default="test")
    command.add_argument("--data", help="other Parquet files, all rows of them")
    command.add_argument("--by", help="a column (or cold_user, cold_item): metrics of each of its values")
    command.add_argument(
        "--keep-rate", type=float, default=1.0, help="share of negatives kept when the log was sampled"
    )
    command = add("predict", predict, "the rows of Parquet files with scores, written while they are read", False)
    command.add_argument("run_folder", type=Path, metavar="RUN")
    command.add_argument("input", help="a Parquet file, folder or glob")
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--skip-bad-shards", action="store_true")
    command = add("compare", compare, "train recipes under several seeds and report paired differences")
    command.add_argument("recipe", nargs="+", help="variants of one as RECIPE+model.time_bias=false")
    command.add_argument("--seeds", type=int, default=5)
    command.add_argument("--out", type=Path, required=True)
    command.add_argument("--reference", action="store_true", help="LightGBM on the same columns as one more row")
    command.add_argument("--workers", type=int, default=1, help="runs trained at the same time, cores shared out")
    command = add("export", export, "a trained run as a bundle that a service loads", overridable=False)
    command.add_argument("run_folder", type=Path, metavar="RUN")
    command.add_argument("--out", type=Path, required=True, metavar="BUNDLE")
    command.add_argument("--name", help="what the service calls it (default: the run's name)")
    command.add_argument("--fusion", default="", metavar="TASK=EXPONENT,...", help="default: the first task alone")
    command.add_argument("--state", metavar="FOLDER", help="also the log's users and histories, for `serve`")
    for more in (serving.add, bench.add, studies.add_skew, studies.add_ab, expert_commands.add_experts):
        more(add)
    expert_commands.add_sparsity(add, _run)
    return parser


def _apart(arguments: list[str]) -> tuple[list[str], list[str]]:
    """All but the overrides by path, and these: argparse would take their values for its own words."""
    own: list[str] = []
    overrides: list[str] = []
    waits = False  # the path before has no value yet
    for word in arguments:
        is_path = re.fullmatch(r"--\w+(\.\w+)+(=.*)?", word, re.DOTALL)
        takes = waits and not word.startswith("--")
        (overrides if is_path or takes else own).append(word)
        waits = is_path is not None and "=" not in word
    return own, overrides


def _changes(rest: list[str]) -> dict[str, str]:
    """Overrides: --a.b value or --a.b=value."""
    changes: dict[str, str] = {}
    words = iter(rest)
    for word in words:
        if not word.startswith("--"):
            raise InputError(f"{word!r}: did not expect that; options look like --model.dim 256")
        path, equals, value = word[2:].partition("=")
        if not equals:
            value = next(words, "--")
            if value.startswith("--"):
                raise InputError(f"--{path}: needs a value")
        changes[path] = value
    return changes


def _run(recipe: str, changes: dict[str, str], *, settled: bool = True) -> Any:
    """The run of "RECIPE", changed; "RECIPE+path=value" is a variant of it, which is named by what it changes."""
    from scalerec.recipes.catalogue import find
    from scalerec.training.run import Run

    own: list[str] = []
    if not Path(recipe).is_file():
        recipe, *own = re.split(r"\+(?=[a-z][\w.]*=)", recipe)
    run = config.read(Run, recipe) if recipe.endswith(".json") else find(recipe)
    run = config.override(run, changes | dict(_pair(change) for change in own))
    data = run.data.settled(_say) if settled else run.data
    return run.model_copy(update={"name": "+".join([run.name, *own]), "data": data})


def _pair(change: str) -> tuple[str, str]:
    path, _, value = change.partition("=")
    if "/" in value:
        raise InputError(f"+{change}: a variant is a folder's name too and cannot hold '/': use --{path} for all runs")
    return path, value


def data(options: argparse.Namespace) -> None:
    from scalerec.data.reader import ParquetRows, check_encoding, check_parts, count_parts

    run = _run(options.recipe, options.changes)
    prepared = run.data.prepare(_say)
    rows, schema = ParquetRows.of(run.data, prepared, skip_bad_shards=run.skip_bad_shards), run.data.schema()
    parts = count_parts(rows, schema)
    check_encoding(rows, schema)
    found = {
        "files": [str(file) for file in prepared.files],
        "parts": {part: {"rows": counts.rows, "positives": counts.positives} for part, counts in parts.items()},
        "notes": prepared.notes,
    }
    if options.json:
        print(to_json(found))
        return check_parts(parts, schema, run.model.ranks)  # after what was found: the counts show what has to change
    table = Table("part", "rows", *(f"{task}" for task in parts["train"].positives))
    for part, counts in parts.items():
        shares = (f"{n / max(counts.counted[task], 1):.2%}" for task, n in counts.positives.items())
        table.add_row(part, f"{counts.rows:,}", *shares)
    out.print(table)
    for key, value in prepared.notes.items():
        out.print(f"{key}: {value}", highlight=False, markup=False, soft_wrap=True)
    check_parts(parts, schema, run.model.ranks)


def schema(options: argparse.Namespace) -> None:
    if options.out and options.out.exists():
        raise InputError(f"--out {options.out}: already there, and perhaps edited: name another, or remove it")
    from scalerec.data.infer import infer
    from scalerec.data.reader import ParquetRows, find_parquet
    from scalerec.data.split import NoSplit

    if options.action == "infer":
        found, remarks = infer(ParquetRows(find_parquet(options.source), NoSplit()))
        for remark in remarks:
            _say(remark)
    else:
        found = _run(options.source, options.changes, settled=False).data.schema()
    text = json.dumps(found.model_dump(mode="json", exclude_defaults=False), indent=2) + "\n"
    if options.out:
        options.out.write_text(text)
        _say(f"wrote {options.out}: read it, move features into groups that belong together, check the labels")
    else:
        print(text, end="")


def recipes(options: argparse.Namespace) -> None:
    from scalerec.recipes.catalogue import all_recipes

    names = sorted(all_recipes())
    print(to_json(names) if options.json else "\n".join(names))


def describe(options: argparse.Namespace) -> None:
    from scalerec.studies.describe import describe as figures

    found = figures(_run(options.recipe, options.changes))
    if options.json:
        return print(to_json(found))
    table = Table("what", "value", title=found["name"])
    for part, number in found["parameters"].items():
        table.add_row(f"parameters, {part}", f"{number:,}")
    table.add_row("dense parameters", f"{found['dense_parameters']:,}")
    table.add_row(
        "embedding parameters", f"{found['embedding_parameters']:,} ({found['embedding_bytes'] / 2**20:,.1f} MiB)"
    )
    table.add_row(
        f"forward MACs, {found['rows']} rows, {found['user_sides']} different user sides", f"{found['forward_macs']:,}"
    )
    table.add_row("forward FLOPs (2 a MAC)", f"{found['forward_flops']:,}")
    table.add_row("training FLOPs (3 x forward)", f"{found['training_flops']:,}")
    table.add_row(
        "forward FLOPs a row and dense parameter", f"{found['flops_per_row'] / found['dense_parameters']:.2f}"
    )
    if "sequences" in found:
        cost = found["sequences"]
        table.add_row("targets in as many examples", f"{cost['targets']:,} in {cost['examples']:,}")
        table.add_row("FLOPs with an example for each target", f"{cost['saving']:.1f} times as many")
    out.print(table)
    rows = [(f"token {i} ({t['side']})", t["features"]) for i, t in enumerate(found["tokens"])]
    rows = rows or [(f"{g['name']} ({g['side']}, {g['width']})", g["features"]) for g in found["groups"]]
    table = Table("token" if found["tokens"] else "group", "features")
    for name, features in rows:
        table.add_row(name, ", ".join(features).replace("[", "\\["))
    out.print(table)


def train(options: argparse.Namespace) -> None:
    from scalerec.training.train import train as fit

    changes = options.changes
    if options.seed is not None:
        changes["training.seed"] = str(options.seed)
    if options.skip_bad_shards:
        changes["skip_bad_shards"] = "true"
    run = _run(options.recipe, changes)
    quiet = options.quiet or options.json
    found = fit(run, options.out, resume=options.resume, warm_start=options.warm_start, quiet=quiet)
    if options.json:
        return print(to_json(found))
    _tables(found["test"], f"{run.name}, test rows")
    events = ", TensorBoard events" if run.training.tensorboard else ""
    _say(f"kept in {options.out}: best checkpoint, scores of the test rows, log{events}")


def evaluate(options: argparse.Namespace) -> None:
    from scalerec.studies.slices import evaluate_run

    _say_if_cut(options.run_folder)
    found = evaluate_run(
        options.run_folder, part=options.part, data=options.data, by=options.by, keep_rate=options.keep_rate,
        changes=options.changes, progress=_say,
    )  # fmt: skip
    if options.json:
        return print(to_json(found))
    for value, tables in found.items():
        _tables(tables, f"{options.by} = {value}" if options.by else value)


def _say_if_cut(folder: Path) -> None:
    if (folder / "checkpoints").is_dir() and not (folder / "metrics.json").exists():
        _say(f"{folder}: this training is not finished; this is its best checkpoint so far")


def predict(options: argparse.Namespace) -> None:
    from scalerec.studies.scores import score_files

    _say_if_cut(options.run_folder)
    found = score_files(
        options.run_folder, options.input, options.out, skip_bad_shards=options.skip_bad_shards, progress=_say
    )
    print(to_json(found) if options.json else f"{found['rows']:,} rows with scores in {options.out}")
    for what, number in found["counts"].items():
        _say(f"  {what}: {number:,}")


def compare(options: argparse.Namespace) -> None:
    from scalerec.studies.compare import compare as paired
    from scalerec.studies.report import markdown

    if options.seeds < 1 or options.workers < 1:
        raise InputError("--seeds and --workers must be at least 1")
    runs = [_run(recipe, options.changes) for recipe in options.recipe]
    command = studies.command_line()
    found = paired(
        runs,
        options.out,
        seeds=options.seeds,
        with_reference=options.reference,
        workers=options.workers,
        command=command,
    )
    if options.json:
        return print(to_json(found))
    out.print(studies.Folding(markdown(found)))
    _say(f"kept in {options.out}: report.md, report.json, report.png and every run")


def export(options: argparse.Namespace) -> None:
    from scalerec.inference.bundle import check_new
    from scalerec.inference.bundle import export as write
    from scalerec.serving.states import is_folder

    if options.state and not is_folder(options.state):
        raise InputError(f"--state {options.state}: name a folder; other stores are filled in Python (docs/state.md)")
    fusion = serving.shares(options.fusion, "--fusion")
    check_new(options.out)
    state: dict[str, Any] = {}
    if options.state:  # first: it can be written again, a bundle cannot, so that what fails here can be repeated
        from scalerec.serving.seed import write_state

        state = write_state(options.run_folder, options.state, _say)
    bundle = write(options.run_folder, options.out, name=options.name, fusion=fusion or None)
    found = {"bundle": str(bundle.folder), "name": bundle.name, "version": bundle.version, "items": len(bundle.items)}
    found |= state
    if options.json:
        return print(to_json(found))
    _say(f"{found['name']} {found['version']}, {found['items']:,} items; proved against its own golden sample")
    more = f" --state {options.state}" if options.state else ""
    more += "".join(f" --allow {package}" for package in config.allowed())
    out.print(f"scalerec serve {options.out}{more}", highlight=False, markup=False, soft_wrap=True)


def _tables(tables: dict[str, dict[str, float]], title: str) -> None:
    """One table for each kind of metrics: of tasks, and of the next item."""
    kinds: dict[str, dict[str, dict[str, float]]] = {}
    for name, found in tables.items():
        kinds.setdefault(next(iter(found)), {})[name] = found
    for kind in kinds.values():
        table = Table("metric", *kind, title=title)
        for metric in dict.fromkeys(metric for found in kind.values() for metric in found):
            table.add_row(metric, *(_cell(found.get(metric)) for found in kind.values()))
        out.print(table)


def _cell(value: float | None) -> str:
    """A number for people; blank for an interval that there is not, with too few users."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else shown(value, ".4f")


def _say(message: str) -> None:
    print(message, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

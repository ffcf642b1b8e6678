"""Rows a second of training DCNv2, from a file of ids to updated weights: scalerec against FuxiCTR and torch-rechub.

    python -m benchmarks.peers --install      # once: both libraries into an environment of their own
    python -m benchmarks.peers [--environment DIR] [--rounds 3] [--threads N] [--json]

`peer_speedup_kuairand` and `peer_speedup_synthetic` (1 M rows, 32 fields): rows a second of one epoch of ours over
those of the faster of the two, in turn, each run a process; `peer_speedup` is the smaller. Keys with `bf16` are of ours
with matrix products in bf16 (`--training.precision bf16`), which neither of the others has. The clock runs from before
the data is opened until the last step: ours fits its dictionaries and encodes in that time, the others get ids, as
arrays that `np.load` reads, ready to be looked up. Starting Python, importing (what torch's optimisers import when the
first is made, too) and testing are outside on all sides.

The same for all: the columns of ids (KuaiRand: numbers in their buckets, without histories), vectors of 16, three full
crosses beside an MLP of 256 and 128, one task, batches of 1,024 shuffled rows, Adam with a rate of 1e-3, threads, and
how long those of OpenMP wait for work. The others' loaders get as many processes as is quickest. Not the same: theirs
is Adam over whole tables and ours over the rows of a step (`--training.optimizer.embedding adamw`), which is what each
has, and its rate for tables is ten times as high (chosen of four on validation rows; the others keep 1e-3), since Adam
over whole tables goes on moving a row for some thirty steps after each that saw it; torch-rechub's MLP has batch
normalisation, which cannot be turned off; each starts as it does by itself.

`auc_difference_*`: AUC of ours less that of the better of the two after that epoch, with its 95 % interval over users.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table as Grid

from benchmarks.environment import install, python_of, say, versions, without_scalerec
from benchmarks.machine import describe_machine, has_bf16_units, options, refuse_if_busy
from benchmarks.turns import spread
from scalerec.data.source import cache_root

PEER = Path(__file__).parent / "dcnv2.py"
LIBRARIES = ("fuxictr", "rechub")
OURS = {"scalerec": "fp32", "scalerec_bf16": "bf16"}
RECIPES = {"kuairand": "rankmixer_kuairand", "synthetic": "rankmixer_synthetic"}
SIZES = {"dim": 16, "crosses": 3, "hidden": [256, 128], "batch": 1024, "lr": 1e-3}
TABLE_RATE = 1e-2  # of ours: of 0.001, 0.003, 0.01 and 0.03 the highest that costs KuaiRand's validation rows no AUC


def prepare(name: str, folder: Path, rows: int) -> None:
    """The ids of a recipe's data, as arrays for the peers and as Parquet and a schema for ours."""
    from scalerec.config import override
    from scalerec.data.loader import Loader
    from scalerec.data.reader import ParquetRows
    from scalerec.features.encoder import Encoder
    from scalerec.recipes import catalogue
    from scalerec.schema import Categorical, Group, Schema, Task

    run = catalogue.find(RECIPES[name])
    if name == "synthetic":
        run = override(run, {"data.rows": str(rows)})
    source = ParquetRows.of(run.data, run.data.prepare(say))
    schema = run.schema()
    encoder = Encoder.fit(schema, source.batches("train", schema.input_columns()))
    folder.mkdir(parents=True)
    known: list[np.ndarray] = []  # of each column, the ids that training has
    for part in ("train", "validation", "test"):
        ids, labels, users = [], [], []
        for batch in Loader(source, encoder, part, 65_536):
            ids.append(np.concatenate([batch.user.ids[batch.user_of_row].numpy(), batch.items.ids.numpy()], 1))
            labels.append(batch.labels[:, 0].numpy())
            users.append(batch.users.numpy())
        together = np.concatenate(ids).T
        known = known or [np.unique(column) for column in together]
        columns: dict[str, Any] = {f"f{i}": dense(*pair) for i, pair in enumerate(zip(together, known))}
        columns |= {"label": np.concatenate(labels).astype(np.int64), "user": np.concatenate(users)}
        pq.write_table(pa.table({**columns, "part": [part] * len(columns["user"])}), folder / f"{part}.parquet")
        np.savez(folder / f"{part}.npz", **{key: value for key, value in columns.items() if key != "user"})
    (folder / "sizes.json").write_text(json.dumps({**SIZES, "rows": [len(those) + 1 for those in known]}))
    features = tuple(Categorical(name=f"f{i}") for i in range(len(known)))
    group = Group(name="ids", side="item", features=features)
    ours = Schema(groups=(group,), tasks=(Task(name="label"),), user="user", dim=SIZES["dim"])
    (folder / "schema.json").write_text(ours.model_dump_json(by_alias=True))


def dense(column: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Places in `known` from 1 on, 0 for what is not there: no table has rows that training never sees."""
    place = np.minimum(np.searchsorted(known, column), len(known) - 1)
    return np.where(known[place] == column, place + 1, 0)


def ours(folder: Path, threads: int, precision: Any, out: Path) -> None:
    """One epoch of scalerec's DCNv2, in this process."""
    import torch
    import torch._dynamo

    from scalerec import evaluate
    from scalerec.data.loader import Loader
    from scalerec.data.sources.parquet import Parquet
    from scalerec.data.split import ColumnSplit
    from scalerec.models.dcnv2 import DCNv2Config
    from scalerec.training.log import Log
    from scalerec.training.optim import OptimizerConfig
    from scalerec.training.run import Run, TrainingConfig
    from scalerec.training.train import Training

    data = Parquet(
        path=str(folder / "*.parquet"), schema_file=str(folder / "schema.json"), split=ColumnSplit(column="part")
    )
    optimizer = OptimizerConfig(dense="adamw", lr=SIZES["lr"], embedding="adamw", embedding_lr=TABLE_RATE, clip=10.0)
    config = TrainingConfig(
        batch_size=SIZES["batch"], threads=threads, precision=precision, optimizer=optimizer, tensorboard=False
    )
    model = DCNv2Config(crosses=SIZES["crosses"], hidden=tuple(SIZES["hidden"]))
    start = time.perf_counter()
    training = Training(Run(name="dcnv2", data=data, model=model, training=config), out.with_suffix(""),
                        log=Log(out.with_suffix(""), quiet=True, tensorboard=False))  # fmt: skip
    training.model.train()
    ready = time.perf_counter()
    for batch, _ in training.loader.epoch(0):
        training.step(batch)
    end = time.perf_counter()
    training.model.eval()
    batches = Loader(training.rows, training.encoder, "test", evaluate.BATCH)
    scores = evaluate.predict(training.model, batches).probabilities[:, 0]
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    np.savez(out, scores=scores, seconds=end - start, loading=ready - start, workers=0, parameters=parameters)
    assert torch.get_num_threads() == threads


def train(name: str, data: Path, environment: Path, threads: int, workers: int, out: Path) -> dict[str, Any]:
    """One run in a process of its own."""
    words = [str(data), "--threads", str(threads), "--out", str(out)]
    if name in OURS:
        words += ["--precision", OURS[name]]
        command, variables = [sys.executable, "-m", "benchmarks.peers", "--ours", *words], None
    else:
        command = [str(python_of(environment)), str(PEER), name, *words, "--workers", str(workers)]
        variables = without_scalerec()
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    with np.load(out) as found:
        return {key: found[key] for key in found.files}


def compare(
    name: str, formats: list[str], data: Path, environment: Path, threads: int, rounds: int, scratch: Path
) -> dict[str, Any]:
    """All rounds on one data set."""
    from scalerec import metrics

    seconds: dict[str, list[float]] = {}
    last: dict[str, dict[str, Any]] = {}
    for number in range(rounds):
        for who in (*LIBRARIES, *formats):
            workers = int(last[who]["workers"]) if who in last else -1
            shutil.rmtree(scratch / who, ignore_errors=True)
            last[who] = train(who, data, environment, threads, workers, scratch / f"{who}.npz")
            seconds.setdefault(who, []).append(float(last[who]["seconds"]))
            say(f"{name}, round {number + 1}: {who} {seconds[who][-1]:.1f} s")
    rows = pq.read_metadata(data / "train.parquet").num_rows
    faster = min(LIBRARIES, key=lambda who: median(seconds[who]))
    test = pq.read_table(data / "test.parquet", columns=["label", "user"])
    labels, users = test["label"].to_numpy(), test["user"].to_numpy()
    auc = {who: metrics.auc(labels, last[who]["scores"]) for who in last}
    better = max(LIBRARIES, key=lambda who: auc[who])
    found: dict[str, Any] = {f"rows_{name}": rows}
    for who in formats:
        key = who.replace("scalerec", name)
        found |= spread(f"peer_speedup_{key}", [a / b for a, b in zip(seconds[faster], seconds[who])])
        difference = metrics.paired_bootstrap(users, labels, last[better]["scores"], last[who]["scores"])
        found |= {
            f"auc_difference_{key}": difference.mean, f"auc_difference_{key}_low": difference.low,
            f"auc_difference_{key}_high": difference.high,
        }  # fmt: skip
    for who in last:
        found |= {f"rows_per_second_{who}_{name}": rows / median(seconds[who]), f"auc_{who}_{name}": auc[who]}
        found |= {
            f"loading_s_{who}_{name}": float(last[who]["loading"]),
            f"workers_{who}_{name}": int(last[who]["workers"]),
        }
        found[f"parameters_{who}_{name}"] = int(last[who]["parameters"])
    return found


def show(found: dict[str, Any], machine: dict[str, Any], sets: list[str], formats: list[str]) -> None:
    caption = ", ".join(f"{name} {value}" for name, value in machine.items())
    grid = Grid("", "", "rows/s", "AUC", "over the faster", caption=caption)
    for name in sets:
        for who in (*LIBRARIES, *formats):
            key = f"peer_speedup_{who.replace('scalerec', name)}"
            low, high = (found.get(f"{key}_{end}", 0.0) for end in ("low", "high"))
            ratio = f"{found[key]:.2f} ({low:.2f} to {high:.2f})" if who in formats else ""
            speed, auc = found[f"rows_per_second_{who}_{name}"], found[f"auc_{who}_{name}"]
            grid.add_row(name, who, f"{speed:,.0f}", f"{auc:.4f}", ratio)
    Console().print(grid)


def main() -> None:
    parser = options("DCNv2 of scalerec against those of FuxiCTR and torch-rechub: rows a second, AUC after an epoch")
    place = cache_root() / "peers"
    parser.add_argument("--environment", type=Path, default=place / "dcnv2", metavar="DIR", help="of the peers")
    parser.add_argument("--install", action="store_true", help="make that environment first, if need be")
    parser.add_argument("--scratch", type=Path, default=place / "dcnv2_data", metavar="DIR", help="what is kept")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=1_000_000, help="of the synthetic log")
    parser.add_argument("--sets", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--threads", type=int, default=0, help="default: all cores")
    parser.add_argument("--ours", type=Path, metavar="DATA", help="one epoch of ours, in this process")
    parser.add_argument("--precision", choices=OURS.values(), default="fp32", help="of --ours")
    parser.add_argument("--out", type=Path, help="of --ours")
    given = parser.parse_args()
    if given.ours:
        ours(given.ours, given.threads, given.precision, given.out)
        return
    environment = given.environment.absolute()
    found_there = versions(environment, PEER, without_scalerec())
    if given.install and isinstance(found_there, str):
        install(environment, PEER.with_suffix(".txt"))
        found_there = versions(environment, PEER, without_scalerec())
    if isinstance(found_there, str):
        print(f"skipped, nothing compared: {found_there}; `--install` makes the environment", file=sys.stderr)
        return
    machine = describe_machine()
    threads = given.threads or int(machine["cores"])
    formats = [who for who, precision in OURS.items() if precision == "fp32" or has_bf16_units()]
    found: dict[str, Any] = {}
    for name in given.sets:
        data = given.scratch / (name if name == "kuairand" else f"{name}-{given.rows}")
        if not (data / "schema.json").exists():
            shutil.rmtree(data, ignore_errors=True)
            prepare(name, data, given.rows)
        busy = refuse_if_busy(given.even_if_busy)
        found |= compare(name, formats, data, environment, threads, given.rounds, given.scratch)
        found["busy"] = busy or found.get("busy", False)
    for ending in (who.removeprefix("scalerec") for who in formats):
        found[f"peer_speedup{ending}"] = min(found[f"peer_speedup_{name}{ending}"] for name in given.sets)
    show(found, machine, given.sets, formats)
    if given.json:
        peers = {f"peer_{name}": version for name, version in found_there.items()}
        print(json.dumps(found | peers | machine | {"rounds": given.rounds}))


if __name__ == "__main__":
    main()

"""AUC against the share of open experts: Figure 3 of the RankMixer paper on any recipe of a dense RankMixer.

What the figure does not say is which capacity it shows; here experts are as wide as the FFN they stand for, so that all
of them together are E times the dense model and one of E costs what the dense model costs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalerec import checkpoint
from scalerec.checkpoint import write_atomically
from scalerec.config import override, paths
from scalerec.data.loader import Loader
from scalerec.data.reader import ParquetRows
from scalerec.errors import InputError
from scalerec.evaluate import BATCH
from scalerec.results import to_json
from scalerec.studies.compare import compare
from scalerec.studies.experts import figures, frequency
from scalerec.training.run import Run

METHODS: dict[str, dict[str, str]] = {
    "DTSI + ReLU": {},
    "ReLU": {"dtsi": "off"},
    "top K": {"routing": "top_k", "dtsi": "off"},
    "top K + balance": {"routing": "top_k", "dtsi": "off", "balance": "0.01"},
}


def sparsity(
    base: Run, out: Path, *, experts: int = 8, ratios: tuple[float, ...] = (1.0, 0.5, 0.25, 0.125), seeds: int = 5,
    workers: int = 1, command: str = "",
) -> dict[str, Any]:  # fmt: skip
    """Train each method at each ratio beside the dense model as wide as all experts, and draw AUC against the ratio.

    Writes what `compare` writes, `sparsity.json` and `sparsity.png` into `out`, and returns what the JSON holds.

    Raises:
        InputError: the recipe is no dense RankMixer, or options do not fit.
    """
    points = planned(base, experts, ratios)
    dense = override(base, {"model.ffn_dim": str(experts * paths(base)["model.ffn_dim"])})
    dense = dense.model_copy(update={"name": f"{base.name}_all"})
    found = compare([dense, base, *points], out, seeds=seeds, workers=workers, command=command)
    models = {model["name"]: model for model in found["models"]}
    series: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for run, (method, ratio) in points.items():
        used = [figures(_frequency(run, out / run.name / f"seed-{seed}")) for seed in range(seeds)]
        mean = {key: sum(one[key] for one in used) / seeds for key in used[0]}
        tasks = {
            task: models[run.name]["tasks"][task]["auc"] for task in found["tasks"] if task in models[run.name]["tasks"]
        }
        series[method].append({"name": run.name, "ratio": ratio, **mean, "tasks": tasks})
    result = {
        "command": command, "experts": experts, "seeds": seeds, "machine": found["machine"], "series": series,
        "reference": dense.name, "dense": {"name": base.name, "tasks": models[base.name]["tasks"]},
    }  # fmt: skip
    write_atomically(out / "sparsity.json", to_json(result, indent=1))
    draw(result, out / "sparsity.png")
    return result


def planned(base: Run, experts: int, ratios: tuple[float, ...]) -> dict[Run, tuple[str, float]]:
    """The runs of the study, with method and ratio."""
    if paths(base).get("model.experts.count") != 0:
        raise InputError(f"{base.name}: name a recipe of a dense RankMixer, whose FFNs can become experts")
    found: list[tuple[Run, tuple[str, float]]] = []
    for method, options in METHODS.items():
        for ratio in ratios:
            changes = {"count": str(experts), "active": str(ratio), **options}
            run = override(base, {f"model.experts.{name}": value for name, value in changes.items()})
            short = "".join(letter for letter in method.lower() if letter.isalnum())
            found.append((run.model_copy(update={"name": f"{base.name}_{short}_{ratio:g}"}), (method, ratio)))
    return dict(found)


def _frequency(run: Run, folder: Path) -> Any:
    """[L, T, E] on the test rows."""
    saved = checkpoint.load(folder)
    rows = ParquetRows.of(run.data, run.data.prepare(), skip_bad_shards=run.skip_bad_shards)
    return frequency(saved.model(), Loader(rows, saved.encoder, "test", BATCH))


def draw(found: dict[str, Any], path: Path) -> None:
    """One panel per task: AUC less that of the model of all experts, with its interval, against the measured share."""
    from matplotlib.figure import Figure

    tasks = list(found["dense"]["tasks"])
    picture = Figure(figsize=(5 * len(tasks), 4), layout="constrained")
    for axes, task in zip(picture.subplots(1, len(tasks), squeeze=False)[0], tasks):
        for marker, (method, points) in zip("osD^", found["series"].items()):
            entries = [
                (point["open"], point["tasks"][task]) for point in points if "difference" in point["tasks"][task]
            ]
            if entries:
                x, y = zip(*((ratio, 100 * entry["difference"]) for ratio, entry in entries))
                spread = [[100 * (e["difference"] - e["low"]) for _, e in entries],
                          [100 * (e["high"] - e["difference"]) for _, e in entries]]  # fmt: skip
                axes.errorbar(x, y, spread, marker=marker, markersize=4, linewidth=1, capsize=2, label=method)
        axes.axhline(0, color="black", linewidth=0.8)
        dense = found["dense"]["tasks"][task]["auc"]
        if "difference" in dense:
            axes.axhline(
                100 * dense["difference"], color="grey", linestyle="--", linewidth=0.8, label="dense, one expert wide"
            )
        axes.set_xscale("log", base=2)
        axes.invert_xaxis()
        axes.set(title=task, xlabel="share of experts open on the test rows", ylabel="100 (AUC - all experts)")
    picture.axes[0].legend(fontsize=7)
    picture.savefig(path, dpi=130)

"""A comparison as Markdown, JSON and a picture."""

from __future__ import annotations

import math
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import scalerec
from scalerec.hardware import cores
from scalerec.results import shown, to_json

TITLES = {"auc": "AUC", "uauc": "UAUC", "ne": "NE"}
SMALL_TEST = 50_000  # rows; below it a report says that the test set is small


def machine() -> dict[str, Any]:
    """What the figures depend on besides the code."""
    return {
        "scalerec": scalerec.__version__, "commit": _commit(), "torch": torch.__version__,
        "python": platform.python_version(), "processor": _processor(), "cores": cores(),
    }  # fmt: skip


def write(found: dict[str, Any], out: Path) -> None:
    out.mkdir(parents=True, exist_ok=True)
    (out / "report.json").write_text(to_json(found, indent=1))
    (out / "report.md").write_text(markdown(found))
    _figure(found, out / "report.png")


def markdown(found: dict[str, Any]) -> str:
    """One table per task; differences are to the first model, with 95 % intervals over users and seeds."""
    seeds, over = (f"{found['seeds']} seeds", "users and seeds") if found["seeds"] > 1 else ("1 seed", "users alone")
    lines = [f"# {', '.join(model['name'] for model in found['models'])}", ""]
    lines += [
        f"{found['test_rows']:,} test rows of {found['test_users']:,} users, {seeds}. Differences are "
        f"to {found['reference']}, in points of 1/100, with 95 % intervals over {over}; "
        "where the interval holds zero the difference is *not resolved*.",
    ]
    if found["test_rows"] < SMALL_TEST:
        lines += ["", "**This test set is small: only large differences can be resolved on it.**"]
    lines += ["", "| model | dense parameters | forward FLOPs a row | training seconds |", "|---|---:|---:|---:|"]
    for model in found["models"]:
        sizes = (f"{model[key]:,.0f}" if model[key] else "" for key in ("dense_parameters", "flops_per_row"))
        lines.append(f"| {model['name']} | {' | '.join(sizes)} | {model['seconds']:.0f} |")
    for task, metrics in found["tasks"].items():
        titles = " | ".join(f"{TITLES.get(metric, metric.upper())} | difference" for metric in metrics)
        lines += ["", f"## {task}", "", f"| model | {titles} |", "|---|" + "---:|---|" * len(metrics)]
        for model in found["models"]:
            if task in model["tasks"]:
                cells = [cell for metric in metrics for cell in _cells(model["tasks"][task][metric])]
                lines.append(f"| {model['name']} | {' | '.join(cells)} |")
        best = found["best_reachable"].get(task)
        if best:
            cells = " | | ".join(shown(best[metric], ".4f") for metric in metrics)
            lines.append(f"| *best reachable* | {cells} | |")
    return "\n".join([*lines, "", *footer(found)])


def footer(found: dict[str, Any]) -> list[str]:
    """The command of a report and the machine it ran on."""
    facts = ", ".join(f"{key} {value}" for key, value in found["machine"].items() if value)
    return [f"Command: `{found['command']}`", "", f"Machine: {facts}", ""]


def _cells(entry: dict[str, Any]) -> tuple[str, str]:
    if math.isnan(entry["mean"]):
        return "-", "-" if "difference" in entry else ""
    value = f"{entry['mean']:.4f}"
    if len(entry["values"]) > 1:
        value += f" ± {entry['spread']:.4f}"
    if "difference" not in entry:
        return value, ""
    change, low, high = (shown(100 * entry[key], "+.2f") for key in ("difference", "low", "high"))
    return value, f"{change} [{low}, {high}]" + ("" if entry["resolved"] else " *not resolved*")


def _figure(found: dict[str, Any], path: Path) -> None:
    """Differences to the first model with their intervals, one panel per task."""
    from matplotlib.figure import Figure

    others = found["models"][1:]
    if not others:
        return
    tasks = found["tasks"]
    names = [model["name"].replace("+", "\n+") for model in others]  # a variant has a line for each change
    height = 0.6 * max(len(others), 0.4 * sum(name.count("\n") + 1 for name in names)) + 1.6
    size = (3.2 * len(tasks) + 0.2 + 0.08 * max(len(line) for name in names for line in name.split("\n")), height)
    figure = Figure(figsize=size)
    axes = figure.subplots(1, len(tasks), sharey=True)
    for axis, (task, metrics) in zip([axes] if len(tasks) == 1 else axes, tasks.items()):
        for y, model in enumerate(others):
            entry = model["tasks"].get(task, {}).get(metrics[0], {})
            if "difference" in entry:
                axis.plot([100 * entry["low"], 100 * entry["high"]], [y, y], color="tab:blue")
                axis.plot(100 * entry["difference"], y, "o", color="tab:blue" if entry["resolved"] else "lightgrey")
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_title(f"{task}: {TITLES.get(metrics[0], metrics[0].upper())}")
        axis.set_yticks(range(len(others)), names)
        axis.set_ylim(len(others) - 0.5, -0.5)
    figure.supxlabel(f"x 100 minus that of {found['reference']}, 95 % interval", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _commit() -> str:
    """The commit of the code, where it runs from a checkout of its own."""
    root = Path(scalerec.__file__).parents[2]
    if not (root / ".git").exists():
        return ""
    try:
        asked = ["git", "-C", str(root), "describe", "--always", "--dirty"]
        return subprocess.run(asked, capture_output=True, text=True, timeout=10).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()

"""Served against trained as Markdown, JSON and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalerec.results import shown, to_json
from scalerec.studies.report import footer

MOST_COLUMNS = 40  # in the picture


def write(found: dict[str, Any], out: Path) -> None:
    """skew.md, skew.json and skew.png in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "skew.json").write_text(to_json(found, indent=1))
    (out / "skew.md").write_text(markdown(found) + "\n![share of rows that differ](skew.png)\n")
    _figure(found, out / "skew.png")


def markdown(found: dict[str, Any]) -> str:
    """The verdict first, then the join, the columns, the encoding and the scores."""
    lines = ["# Served against trained", ""]
    lines += [f"- **{_escape(line)}**" for line in found["verdict"]] or ["Nothing differs beyond its tolerance."]
    lines += [
        "",
        f"{found['rows']:,} exposures in `{found['exposures']}` against `{found['run']}`. Tolerances: "
        f"{found['tolerance']:.2%} of the rows of a column, {found['score_tolerance']:g} of a score.",
    ]
    if len(found["versions"]) > 1:
        some = ", ".join(f"{name} ({count:,})" for name, count in found["versions"].items())
        lines += ["", f"Of several versions: {some}; `--version` looks at one."]
    if found["join"]:
        lines += ["", "## Join", "", *_join(found["join"])]
        lines += ["", "## Raw columns, against the training log", "", *_columns(found["raw"], "column", True)]
    lines += ["", "## Encoding, against the run's encoder on the same raw columns", ""]
    lines += _columns(found["encoded"], "feature", False)
    if found["not_encoded"]:
        lines += ["", f"Not in the exposure log: {', '.join(map(_escape, found['not_encoded']))}."]
    lines += ["", "## Scores, against the run's checkpoint on the same raw columns", "", *_scores(found["scores"])]
    return "\n".join([*lines, "", *_pairs(found), *footer(found)])


def _join(join: dict[str, Any]) -> list[str]:
    names = {
        "exposures": "exposures", "joined": "with a training row", "without_training_row": "without a training row",
        "of_a_known_pair": "of these, user and item are in the log at another time",
        "without_user_or_item": "of these, user or item is missing",
        "repeated_exposures": "exposures of the same user, item and time as another",
        "training_rows_of_that_time": "training rows of that time",
        "training_rows_without_exposure": "of these without an exposure",
    }  # fmt: skip
    rows = [f"| {title} | {join[key]:,} |" for key, title in names.items() if key in join]
    return ["| what | rows |", "|---|---:|", *rows]


def _columns(entries: list[dict[str, Any]], title: str, with_effect: bool) -> list[str]:
    differing = [entry for entry in entries if entry["differ"]]
    same = [_escape(entry["column"]) for entry in entries if not entry["differ"] and entry["rows"]]
    lines = []
    if differing:
        titles = [title, "rows", "differ", "median, largest difference", "lists: other length, first place"]
        titles += [*(["effect on the score"] if with_effect else []), "what it looks like"]
        lines = [f"| {' | '.join(titles)} |", "|---|" + "---:|" * (len(titles) - 2) + "---|"]
    for entry in differing:
        gap = ", ".join(f"{entry[key]:.4g}" for key in ("median_difference", "largest_difference") if key in entry)
        listed = f"{entry['other_length']:.2%}, {entry['first_place']:g}" if "first_place" in entry else ""
        effect = f" {entry['effect']:.2g} |" if entry.get("effect") is not None else " |"
        types = entry["types"]
        looks = entry["looks_like"] or ("" if types[0] == types[1] else f"{types[0]} for {types[1]}")
        lines.append(f"| {_escape(entry['column'])} | {entry['rows']:,} | {entry['share']:.2%} | {gap} | {listed} |"
                     f"{effect if with_effect else ''} {_escape(looks)} |")  # fmt: skip
    if same:
        lines += ["", f"Equal in all rows: {', '.join(same)}."]
    return lines or ["Nothing was compared."]


def _scores(entries: list[dict[str, Any]]) -> list[str]:
    if not entries:
        return ["Nothing was compared: the model gives no scores of tasks, or the exposure log has none."]
    lines = ["| task | rows | largest difference | mean difference | mean served, rescored | rank correlation | within "
             "requests |", "|---|---:|---:|---:|---:|---:|---:|"]  # fmt: skip
    for entry in (entry for entry in entries if entry["rows"]):
        ranks = ("" if entry[key] is None else f"{entry[key]:.6f}"
                 for key in ("rank_correlation", "rank_correlation_in_request"))  # fmt: skip
        gaps = (shown(entry[key], ".2g") for key in ("largest_difference", "mean_difference"))
        means = ", ".join(shown(entry[key], ".4f") for key in ("mean_served", "mean_rescored"))
        lines.append(f"| {_escape(entry['task'])} | {entry['rows']:,} | {' | '.join([*gaps, means, *ranks])} |")
    return lines


def _pairs(found: dict[str, Any]) -> list[str]:
    """The most frequent differing values of each column and feature."""
    lines = []
    for what, entries in (("column", found["raw"]), ("encoding of", found["encoded"])):
        for entry in entries:
            for served, trained, share in entry.get("pairs", ()):
                cells = (f"{what} {entry['column']}", served, trained, f"{share:.1%}")
                lines.append(f"| {' | '.join(map(_escape, cells))} |")
    if not lines:
        return []
    head = ["## Most frequent differences", "", "Of lists, the first place that differs.", "",
            "| where | served | trained, or by the run's encoder | of the differing rows |",
            "|---|---|---|---:|"]  # fmt: skip
    return [*head, *lines, ""]


def _escape(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _figure(found: dict[str, Any], path: Path) -> None:
    """The share of rows that differ, a bar each: raw columns, and features by the run's encoder."""
    from matplotlib.figure import Figure

    panels = [("raw columns", found["raw"]), ("encoded features", found["encoded"])]
    panels = [(title, sorted(rows, key=lambda e: -e["share"])[:MOST_COLUMNS]) for title, rows in panels if rows]
    tallest = max(len(rows) for _, rows in panels)
    figure = Figure(figsize=(4.2 * len(panels), 0.24 * tallest + 1.4))
    axes = figure.subplots(1, len(panels), squeeze=False)
    for axis, (title, rows) in zip(axes[0], panels):
        shares = [100 * entry["share"] for entry in rows]
        beyond = [entry["share"] > found["tolerance"] for entry in rows]
        axis.barh(range(len(rows)), shares, color=["tab:red" if wrong else "tab:blue" for wrong in beyond])
        for y, share in enumerate(shares):
            axis.text(share + 1, y, f"{share:.3g} %" if share else "0", va="center", fontsize=7)
        axis.set_yticks(range(len(rows)), [entry["column"] for entry in rows], fontsize=7)
        axis.set_ylim(tallest - 0.5, -0.5)
        axis.set_xlim(0, 115)
        axis.set_xlabel("% of rows that differ", fontsize=8)
        axis.tick_params(axis="x", labelsize=7)
        axis.set_title(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=120)

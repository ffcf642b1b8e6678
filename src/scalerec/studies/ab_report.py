"""An experiment as Markdown and JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scalerec.results import shown, to_json
from scalerec.studies.ab import FEW_UNITS, lift_text
from scalerec.studies.report import footer


def write(found: dict[str, Any], out: Path) -> None:
    """ab.md and ab.json in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "ab.json").write_text(to_json(found, indent=1))
    (out / "ab.md").write_text(markdown(found))


def markdown(found: dict[str, Any]) -> str:
    """The verdict first, then the arms and how units were dealt."""
    per = "exposure" if found["metric"] == "ratio" else found["by"]
    lines = [f"# {found['label']} per {per}", "", *(f"- **{line}**" for line in found["verdict"]), ""]
    how = "the delta method" if found["interval"] == "delta" else "a bootstrap"
    lines += [
        f"{found['units']:,} units by `{found['by']}`, each one observation; 95 % intervals by {how}; where that of "
        "the difference holds zero, it is *not resolved*. The minimum detectable lift is what such arms would resolve "
        "in 80 % of experiments.",
        "",
        f"| arm | units | {found['label']} | per {per} | lift | p | minimum detectable lift |",
        "|---|---:|---:|---:|---|---:|---:|",
    ]  # fmt: skip
    counted = all(entry["outcome"].is_integer() for entry in found["arms"])  # else it is an amount
    for entry in found["arms"]:
        cells = [f"{entry['units']:,}", format(entry["outcome"], ",.0f" if counted else ",.2f"),
                 f"{entry['value']:.5g} [{entry['low']:.5g}, {entry['high']:.5g}]"]  # fmt: skip
        if "p" in entry:
            held = "" if entry["resolved"] else " *not resolved*"
            cells += [f"{lift_text(entry)}{held}", f"{entry['p']:.2g}", shown(entry["minimum_detectable"], ".2%")]
        else:
            cells += ["control", "", ""]
        lines.append(f"| {entry['arm']} | {' | '.join(cells)} |")
    ratio, events = found["sample_ratio"], found["events"]
    shares = ", ".join(f"{name} {count:,} (planned {ratio['planned'][name]:.1%})"
                       for name, count in ratio["units"].items())  # fmt: skip
    lines += [
        "", f"Sample ratio: {shares}; p = {ratio['p']:.2g} (chi-square).", "",
        f"Left out: {found['units_in_several_arms']:,} units seen in more than one arm; "
        f"{found['exposures_of_no_arm']:,} exposures whose request named its model; "
        f"{found['exposures_of_no_unit']:,} exposures without a `{found['by']}`; of {events['with_label']:,} events "
        f"with the label {events['with_label'] - events['attributed']:,} without an exposure before them"
        f"{'' if found['window'] is None else ' in the window'}, {events['without_user_or_item']:,} of these because "
        "their user or item is missing.",
    ]  # fmt: skip
    if len(found["arms"]) > 2:
        adjusted = ", ".join(f"{entry['arm']} {entry['p_holm']:.2g}" for entry in found["arms"][1:])
        lines += ["", f"Several arms were compared; p-values adjusted for that (Holm): {adjusted}."]
    if min(entry["units"] for entry in found["arms"]) < FEW_UNITS:
        lines += ["", f"**An arm has fewer than {FEW_UNITS} units: intervals are rough.**"]
    return "\n".join([*lines, "", *footer(found)])

"""How a diagnosis is shown: a table for people, one JSON object for programs. Looks at no model."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from lapwing_detector.doctor.cost import megabytes
from lapwing_detector.doctor.examination import Diagnosis
from lapwing_detector.doctor.verdict import Check

WIDTH = 120
SHOWN = {"ok": "ok", "failed": "FAILED", "skipped": "skipped", "measured": "measured"}


def as_json(diagnosis: Diagnosis) -> str:
    """One object: `ok`, the names of what was `skipped`, `model`, and by name what each check found."""
    checks = {
        one.name: {"state": one.state, "said": one.said, "note": one.note, "numbers": one.numbers}
        for one in diagnosis.checks
    }
    found = {
        "ok": not diagnosis.wrong,
        "skipped": diagnosis.skipped,
        "model": diagnosis.patient,
        "checks": checks,
    }
    return json.dumps(finite(found), allow_nan=False)


def finite(value: Any) -> Any:
    """JSON knows no infinity: None in its place."""
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(diagnosis: Diagnosis) -> str:
    """Who the model is, a line for each check, and what it comes to."""
    who = diagnosis.patient
    head = (
        f"{who['name']}: {who['class']}, {who['parameters']:,} parameters, {who['dtype']} on {who['device']}, "
        f"attention {who['attention']}, context {who['context']:,}"
    )
    lines = [line for check in diagnosis.checks for line in check_lines(check)]
    return "\n".join([head, "", *lines, "", conclusion(diagnosis)])


def check_lines(check: Check) -> list[str]:
    """Name, state and what is said, wrapped; beneath it a note, and of the cost a table of lengths."""
    start = f"{check.name:<10}{SHOWN[check.state]:<10}"
    lines = textwrap.wrap(check.said, WIDTH, initial_indent=start, subsequent_indent=" " * len(start))
    if check.note:
        indent = " " * len(start)
        lines += textwrap.wrap(f"note: {check.note}", WIDTH, initial_indent=indent, subsequent_indent=indent)
    return lines + [" " * len(start) + line for line in length_lines(check.numbers)]


def length_lines(numbers: Mapping[str, Any]) -> list[str]:
    """A row for each length for which memory and time were estimated, under the names of the columns."""
    if "lengths" not in numbers:
        return []
    makes_maps = any(one["map_bytes"] for one in numbers["lengths"])
    rows = [["tokens", "time", "", "cache", "sums", "map" if makes_maps else "masks", "total", "maps instead", ""]]
    for one in numbers["lengths"]:
        cache = "none" if one["cache_bytes"] is None else megabytes(one["cache_bytes"])
        sizes = (one["sums_bytes"], one["masks_bytes"] + one["map_bytes"], one["total_bytes"], one["maps_bytes"])
        beyond = "beyond it" if one["beyond_context"] else ""
        rows.append([f"{one['tokens']:,}", *time_cells(one), cache, *map(megabytes, sizes), beyond])
    return aligned(rows)


def time_cells(one: Mapping[str, Any]) -> list[str]:
    """Seconds of a length, and how they are known."""
    if one["seconds"] is None:
        return ["-", "not measured"]
    return [f"{one['seconds']:,.2f} s", "measured" if one["measured"] else "estimated"]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of text, numbers to the right; what is after a time or at the end to the left."""
    widths = [max(len(row[place]) for row in rows) for place in range(len(rows[0]))]
    left = (2, len(widths) - 1)
    return [
        "  ".join(
            cell.ljust(width) if place in left else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def conclusion(diagnosis: Diagnosis) -> str:
    """What it all comes to, in one sentence."""
    if diagnosis.wrong:
        return f"Something is wrong: {', '.join(diagnosis.wrong)}. Do not rely on what is captured of this model."
    skipped = ", ".join(diagnosis.skipped)
    said = f"Nothing is wrong; not checked: {skipped}." if skipped else "All is well."
    if diagnosis.patient["dtype"] in ("bfloat16", "float16"):
        said += f" Rounding hides small differences in {diagnosis.patient['dtype']}: --dtype float32 sees them."
    return said

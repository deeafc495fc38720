"""The results as one table of plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cases import HEADS, HIDDEN, KEY_VALUE_HEADS, LAYERS, VOCABULARY, Way
from results import Comparison, Limit, Results, TimeResult

NAMES: dict[Way, str] = {"sdpa": "SDPA", "ours": "captured", "selected": "captured, 1/4 of heads", "eager": "eager"}

HEADER = ("what", "", "against", "ratio", "middle half", "limit", "met")

KEY = f"""\
time: captured: entering the context, the model's work, leaving it, and summaries(); eager: the forward with
output_attentions=True and the same sums of its maps. Logits of the last position only. The two ways of a row take
turns in one process; ratio of medians, beside it the middle half of the ratios within a turn. decode: the steps
alone, without reading the prompt, in turns step by step; generate: all of it, and the captured way runs one more
step, for the last row.
memory: peak of one prefill above the loaded model, each in a process of its own; MB = 10^6 bytes; glibc: see memory.py.
Limits: of prefill, decode and batch against SDPA, of the eager route, and of memory; "?" where one lies within the
middle half.
Model: Llama with random weights, {LAYERS} layers x {HEADS} heads ({KEY_VALUE_HEADS} for keys), hidden {HIDDEN}, \
vocabulary {VOCABULARY:,}."""


def table(results: Results) -> str:
    rows = [HEADER, *map(_time_row, results.times), *map(_memory_row, results.comparisons())]
    return "\n".join([machine_line(results), "", *columns(rows), "", *_notes(results), KEY])


def columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Lines with their cells below one another; the first is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [lines[0], "  ".join("-" * width for width in widths), *lines[1:]]


def limit_cells(
    limit: Limit | None, measured: float, form: str, middle: tuple[float, float] | None = None
) -> tuple[str, str]:
    """The limit, and whether it is met."""
    if limit is None:
        return "", ""
    return f"{'<=' if limit.at_most else '>='} {form.format(limit.value)}", limit.verdict(measured, middle)


def other_work(machine: Mapping[str, Any]) -> str:
    """What else ran on it, at both ends of the run."""
    start, end = (machine.get(f"busy_at_{when}") for when in ("start", "end"))
    told = [f"{busy} at the {when}" for busy, when in ((start, "start"), (end, "end")) if busy is not None]
    return f"cores busy with other work: {', '.join(told) or 'unknown'}"


def machine_line(results: Results) -> str:
    machine = results.machine
    return (
        f"{machine['cpu']}, {machine['capability']}, {machine['threads']} of {machine['cores']} cores, "
        f"{machine['memory_gb']} GB, torch {machine['torch']}, transformers {machine['transformers']}, "
        f"{machine['date']}{_resumed(machine)}; {other_work(machine)}"
    )


def _resumed(machine: Mapping[str, Any]) -> str:
    parts = [f"{one['date']} ({one['busy_at_start']} cores busy)" for one in machine.get("resumed", [])]
    return f", resumed {', '.join(parts)}" if parts else ""


def _time_row(one: TimeResult) -> tuple[str, ...]:
    first, second = one.case.ways
    low, high = one.middle
    return (
        one.case.name.rsplit(" ", 1)[0],
        f"{NAMES[first]} {_duration(one.median(first))}",
        f"{NAMES[second]} {_duration(one.median(second))}",
        f"{one.ratio:.3f}",
        f"{low:.3f} to {high:.3f}",
        *limit_cells(one.limit, one.ratio, "{:.2f}", one.middle),
    )


def _memory_row(one: Comparison) -> tuple[str, ...]:
    first, second = one.first, one.second
    spread = "" if len(first.peaks_mb) == 1 else f"{_range(first.peaks_mb)} and {_range(second.peaks_mb)}"
    return (
        first.case.name.replace(f" {first.case.way}", ""),
        f"{NAMES[first.case.way]} {first.median_mb:,.0f} MB",
        f"{NAMES[second.case.way]} {second.median_mb:,.0f} MB",
        one.form.format(one.value),
        spread,
        *limit_cells(one.limit, one.value, one.form),
    )


def _notes(results: Results) -> list[str]:
    """What no row of the table says: forwards that were left out, or that have nothing to be compared with."""
    compared = {one.case for comparison in results.comparisons() for one in (comparison.first, comparison.second)}
    alone = [f"{one.case.name}: {one.median_mb:,.0f} MB" for one in results.memory if one.case not in compared]
    return [*alone, *(f"{name}: left out, {reason}" for name, reason in results.left_out.items())]


def _duration(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


def _range(peaks: list[float]) -> str:
    return f"{min(peaks):.0f}-{max(peaks):.0f}"

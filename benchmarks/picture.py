"""The picture of the results: time and memory over the length of the text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cases import HEADS, LAYERS, TimeCase, Way, maps_mb
from results import Results, TimeResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[Way, tuple[str, str, str]] = {
    "eager": ("#d55e00", "s", "eager, with every map"),
    "ours": ("#0072b2", "o", "captured"),
    "sdpa": ("#333333", "x", "plain SDPA"),
}
"""Colour, marker and name, in the order of the legend; the colour-blind can tell them apart as well."""


def save(results: Results, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(path)


def draw(results: Results) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained", dpi=120)
    axes = figure.subplot_mosaic([["time", "memory"], ["ratio", "memory"]], height_ratios=(3, 1))
    times = {case: one for one in results.times if (case := one.case).work == "prefill" and case.dtype == "float32"}
    _draw_time(axes["time"], times)
    _draw_ratio(axes["ratio"], times)
    _draw_memory(axes["memory"], results)
    machine = results.machine
    figure.suptitle(
        f"One forward of a Llama with {LAYERS} layers x {HEADS} heads, float32, {machine['threads']} threads "
        f"({machine['cpu']}, {machine['capability']})",
        fontsize=10,
    )
    return figure


def _draw_time(axes: Axes, times: dict[TimeCase, TimeResult]) -> None:
    for way, partner in (("eager", "ours"), ("ours", "sdpa"), ("sdpa", "ours")):
        found = [(one.case.tokens, one.median(way)) for one in times.values() if set(one.case.ways) == {way, partner}]
        _line(axes, way, found)
    _over_tokens(axes, {case.tokens for case in times})
    axes.set(yscale="log", ylabel="seconds", title="Time")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")
    axes.tick_params(labelbottom=False)
    axes.set_xlabel("")
    axes.legend(frameon=False, fontsize=9)


def _draw_ratio(axes: Axes, times: dict[TimeCase, TimeResult]) -> None:
    """Captured to SDPA, with the middle half of the paired ratios and the limits."""
    found = sorted(
        (one for case, one in times.items() if case.ways == ("ours", "sdpa")), key=lambda one: one.case.tokens
    )
    tokens = [one.case.tokens for one in found]
    colour, marker, _ = STYLES["ours"]
    axes.plot(tokens, [one.ratio for one in found], color=colour, marker=marker, markersize=4)
    axes.vlines(tokens, [one.middle[0] for one in found], [one.middle[1] for one in found], color=colour, alpha=0.5)
    axes.step(tokens, [one.case.at_most or 1 for one in found], where="mid", color="grey", linestyle=":", label="limit")
    axes.axhline(1, color=STYLES["sdpa"][0], linewidth=0.8)
    _over_tokens(axes, {case.tokens for case in times})
    axes.set_ylabel("captured\n/ SDPA")
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _draw_memory(axes: Axes, results: Results) -> None:
    all_tokens = {one.case.tokens for one in results.memory}
    for way in STYLES:
        found = [(tokens, peak.median_mb) for tokens in all_tokens if (peak := results.peak(way, tokens))]
        _line(axes, way, found)
    ordered = sorted(all_tokens)
    axes.plot(ordered, [maps_mb(tokens) for tokens in ordered], "--", color="grey", label="the maps alone", zorder=0)
    _over_tokens(axes, all_tokens)
    axes.set(yscale="log", ylabel="MB above the model", title="Peak memory")
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_minor_formatter("")
    axes.legend(frameon=False, fontsize=9)


def _line(axes: Axes, way: Way, points: list[tuple[int, float]]) -> None:
    colour, marker, name = STYLES[way]
    axes.plot(*zip(*sorted(points), strict=True), color=colour, marker=marker, markersize=5, label=name)


def _over_tokens(axes: Axes, tokens: set[int]) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(tokens), [f"{count:,}" for count in sorted(tokens)])
    axes.set_xlabel("tokens")
    axes.margins(x=0.07)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)

"""How far another store lies from the one that a probe was fitted on, as tables and sentences."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from lapwing_detector.token_statistics import TOKEN_STATISTICS
from lapwing_training.report.blocks import Block, Bullets, Table, Text
from lapwing_training.report.words import feature_title, interval, number, percent

MOST_HEADS = 10
"""Heads that are named, those that moved farthest."""


def drift(result: Mapping[str, Any]) -> Iterator[Block]:
    """The drift of a transfer result; nothing where it holds none."""
    found: Mapping[str, Any] | None = result.get("drift")
    if not found:
        return
    yield Bullets(tuple(_changes(found)))
    heads = found.get("heads")
    if heads:
        yield Text(
            f"Of {heads['tested']:,} numbers that the probe reads of its heads, {heads['drifted']:,} are distributed "
            "otherwise here (Kolmogorov-Smirnov, q < .05 by Benjamini-Hochberg). The farthest:"
        )
        yield _farthest(heads["list"][:MOST_HEADS])


def _changes(found: Mapping[str, Any]) -> Iterator[str]:
    auroc, rate = found.get("auroc"), found.get("base_rate")
    if auroc:
        yield f"AUROC {interval(auroc['before'])} before, {interval(auroc['here'])} here: {interval(auroc['change'])}."
    if rate:
        yield f"Hallucinated: {percent(rate['before'])} before, {percent(rate['here'])} here."
    length = found.get("length")
    if length:
        yield (
            f"Length: median {length['median_before']:.0f} tokens before, {length['median_here']:.0f} here "
            f"(Kolmogorov-Smirnov distance {number(length['distance'])}, p = {length['p_value']:.2g})."
        )
    for one in found.get("statistics", ()):
        yield (
            f"{TOKEN_STATISTICS[one['statistic']].title}: median {number(one['median_before'])} before, "
            f"{number(one['median_here'])} here (Kolmogorov-Smirnov distance {number(one['distance'])}, "
            f"p = {one['p_value']:.2g})."
        )
    shift = found.get("calibration")
    if shift:
        text = (
            f"Calibration: {_sigmoid(shift['before'])} before, {_sigmoid(shift['here'])} if it were fitted here. "
            f"Expected calibration error here {interval(shift['ece_before'])}"
        )
        yield f"{text}, fitted anew {interval(shift['ece_here'])}." if shift.get("ece_here") else f"{text}."


def _sigmoid(calibration: Mapping[str, float]) -> str:
    return f"slope {number(calibration['slope'])}, intercept {number(calibration['intercept'])}"


def _farthest(heads: list[Mapping[str, Any]]) -> Table:
    rows = tuple(
        (
            f"layer {one['layer']} head {one['head']}, {feature_title(one['feature'])}",
            number(one["distance"]),
            f"{one['p_value']:.2g}",
            f"{one['q_value']:.2g}",
        )
        for one in heads
    )
    return Table(("head", "distance", "p", "q"), rows)

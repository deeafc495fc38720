"""The sections of a report, in order; what the metrics do not hold has no section. Knows no markup."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from lapwing_detector.probe import Probe
from lapwing_training.report import figures, quality, summary, tables
from lapwing_training.report.blocks import Block, Bullets, Notes, Picture, Pictures, Section, Text
from lapwing_training.report.drift import drift
from lapwing_training.report.heads import MARGINS, heatmaps, map_size
from lapwing_training.report.origin import origin
from lapwing_training.report.words import about, one_line

Parts = tuple[tuple[str, str, Iterator[Block]], ...]


def of_probe(probe: Probe) -> tuple[Section, ...]:
    """Everything that training found."""
    metrics = probe.metrics
    return _filled(
        ("short", "In short", _short(probe)),
        ("use", "Who should use it, and who should not", _use(probe)),
        *_ranking(metrics),
        ("heads", "Which heads carry signal", _heads(probe)),
        ("number", "How many heads", _number(metrics, int(probe.selected.sum()))),
        *_closer(metrics),
        ("origin", "Data, model, and how to make it again", origin(probe)),
    )


def of_transfer(result: Mapping[str, Any]) -> tuple[Section, ...]:
    """A probe on another store."""
    return _filled(
        ("short", "In short", _transfer_short(result)),
        ("drift", "What changed", drift(result)),
        *_ranking(result),
        *_closer(result),
    )


def _ranking(metrics: Mapping[str, Any]) -> Parts:
    return (
        ("comparison", "Against everything it must beat", quality.comparison(metrics)),
        ("curves", "ROC and precision-recall", quality.curves(metrics)),
        ("thresholds", "Operating points", quality.thresholds(metrics)),
        ("probabilities", "Probabilities", quality.probabilities(metrics)),
    )


def _closer(metrics: Mapping[str, Any]) -> Parts:
    return (
        ("running", "While the answer is being written", quality.running(metrics)),
        ("strata", "Within each kind of question", quality.strata(metrics)),
        ("examples", "Where it is most wrong", quality.examples(metrics)),
    )


def _filled(*parts: tuple[str, str, Iterator[Block]]) -> tuple[Section, ...]:
    sections = (Section(anchor, heading, tuple(blocks)) for anchor, heading, blocks in parts)
    return tuple(section for section in sections if section.blocks)


def _short(probe: Probe) -> Iterator[Block]:
    found = summary.in_words(probe.metrics)
    if found:
        yield Bullets(tuple(found))
    yield Text(summary.described(probe))
    if "test" in probe.metrics:
        yield Text(f"{summary.judged_how(probe)} Intervals in brackets are 95% by group bootstrap.")


def _use(probe: Probe) -> Iterator[Block]:
    notes = tuple(one_line(note, 1000) for note in probe.metrics.get("notes", ()))
    if notes:
        yield Notes(notes)
    yield Bullets(summary.good_for(probe), "For")
    yield Bullets(summary.not_good_for(probe), "Not for")


def _transfer_short(result: Mapping[str, Any]) -> Iterator[Block]:
    left_out = result["seen_groups_left_out"]
    yield Text(f"{about(result['test'])}; {left_out} rows of groups that it was fitted on left out.")
    notes = tuple(one_line(note, 1000) for note in result.get("notes", ())) + _without_log_probability(result)
    if notes:
        yield Notes(notes)
    yield Bullets(tuple(summary.in_words(result)))


def _without_log_probability(result: Mapping[str, Any]) -> tuple[str, ...]:
    count = result["log_probability_missing"]
    if "log_probability" not in result["comparison"]:
        return ("The store holds no log-probability, so that baseline is absent.",)
    return (f"{count} rows have no log-probability; they count as the middle one.",) if count else ()


def _heads(probe: Probe) -> Iterator[Block]:
    if probe.statistics:
        yield Text("Tested on training rows only. Rows are layers, from the first at the top, and columns are heads.")
    yield from heatmaps(probe)
    yield from _stability(probe)
    if "significance" in probe.metrics:
        yield tables.significance(probe.metrics)


def _stability(probe: Probe) -> Iterator[Block]:
    found = probe.metrics.get("stability")
    if not found:
        return
    values = found["frequency"]
    draw = partial(figures.frequencies, values=values, layers=probe.layers)
    alt = "Heatmap over layers and heads: share of the resamples in which each head was selected"
    caption = (
        f"Over {found['resamples']} bootstrap resamples of the groups, how often each head was among the strongest. "
        "Only heads of at least 50% are candidates, as long as there are any."
    )
    yield Pictures((Picture("stability", alt, draw, map_size(probe), MARGINS),), caption, "Selection frequency")
    yield tables.frequencies(values, probe.layers, probe.selected)


def _number(metrics: Mapping[str, Any], read: int) -> Iterator[Block]:
    if "curve" not in metrics:
        return
    draw = partial(figures.against_heads, curve=metrics["curve"], read=read)
    alt = "AUROC against number of heads, for selected heads and for heads drawn by lot"
    caption = (
        "Out-of-fold AUROC of the best heads, and of as many drawn by lot: where both meet, it does not matter which "
        "heads are read. Bands are 95% intervals."
    )
    yield Pictures((Picture("number-of-heads", alt, draw),), caption)
    yield tables.against_heads(metrics["curve"])

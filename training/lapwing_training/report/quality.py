"""What a probe's own rows and any other store are asked alike: one generator of blocks for each section.

Where the metrics do not hold what a section shows, it has no blocks. Nothing is computed here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from lapwing_training.report import figures, tables
from lapwing_training.report.blocks import Block, Bullets, Examples, Picture, Pictures, Text
from lapwing_training.report.words import interval, one_line

Blocks = Iterator[Block]


def comparison(metrics: Mapping[str, Any]) -> Blocks:
    """The AUROCs as a picture, all metrics as a table."""
    if "comparison" not in metrics:
        return
    rows = [(name, row["auroc"]) for name, row in tables.comparison_rows(metrics)]
    picture = Picture(
        "forest",
        "AUROC with interval of the probe and of everything beside it; the numbers stand in the table below",
        partial(figures.forest, rows=rows, own=rows[0][0]),
        *_forest_size(len(rows)),
    )
    caption = "AUROC with 95% intervals. A line that reaches the dashed one, at .5, can't be told from guessing."
    yield Pictures((picture,), caption)
    yield Text(
        "“Within” is the mean of the AUROCs within each stratum: a probe that only recognises the kind of question "
        "shows .5 there."
    )
    yield tables.comparisons(metrics)
    draws = tables.over_draws(metrics)
    if draws:
        yield Bullets(draws)


def curves(metrics: Mapping[str, Any]) -> Blocks:
    """ROC and precision-recall, which only a picture shows."""
    pictures = []
    if "roc" in metrics:
        draw = partial(figures.roc, points=metrics["roc"], thresholds=metrics.get("thresholds", ()))
        pictures.append(Picture("roc", f"ROC curve, area {interval(metrics['test']['auroc'])}", draw, (4.4, 4.2)))
    if "pr" in metrics:
        draw = partial(figures.precision_recall, points=metrics["pr"], base_rate=metrics["test"]["base_rate"])
        alt = f"Precision-recall curve, area {interval(metrics['test']['auprc'])}"
        pictures.append(Picture("precision-recall", alt, draw, (4.4, 4.2)))
    if pictures:
        caption = (
            "Left, each threshold's finds against its false alarms: the further up and left the better, the diagonal "
            "is guessing, the dots are the operating points. Right, how many of the flagged are made up: the dashed "
            "line is their share overall, which guessing gets."
        )
        yield Pictures(tuple(pictures), caption)


def thresholds(metrics: Mapping[str, Any]) -> Blocks:
    """What each operating point promised and what came of it."""
    if "thresholds" not in metrics:
        return
    yield Text("Logits are counted from the mean of the training rows, in their standard deviations.")
    yield tables.thresholds(metrics)
    if metrics.get("guarantee"):
        promise = metrics["guarantee"]
        yield Text(
            "Those above are what the out-of-fold rule would have set. The saved probe has these instead, set on "
            f"{promise['calibration_groups']:,} groups that were kept apart, one row of each: for groups that are "
            "exchangeable with them, the rate of false alarms is at most the one named."
        )
        yield tables.guarantee(promise)
    elif "guarantee" in metrics:
        yield Text(
            "Thresholds come from out-of-fold scores, so what they promise is approximate; lapwing train --guarantee "
            "keeps rows apart for a promise that holds."
        )


def probabilities(metrics: Mapping[str, Any]) -> Blocks:
    """Whether what is said comes true, and how often what is said."""
    test = metrics.get("test", {})
    pictures = []
    if test.get("reliability"):
        draw: Callable[..., None] = partial(figures.reliability, bins=test["reliability"])
        alt = "Reliability diagram: share made up against probability said, with the number of rows"
        pictures.append(Picture("reliability", alt, draw, (4.4, 4.2)))
        yield Text(
            f"On held-out rows: Brier score {interval(test['brier'])}, "
            f"expected calibration error {interval(test['ece'])}."
        )
    if "calibration" in metrics:
        kind = metrics["calibration"]["kind"]
        yield Text(f"Calibration: {one_line(kind)} ({one_line(metrics['calibration']['reason'])}).")
    if "histogram" in metrics:
        draw = partial(figures.histogram, counts=metrics["histogram"])
        alt = "Histogram of the probabilities said of made-up answers and of others"
        pictures.append(Picture("histogram", alt, draw, (4.4, 4.2)))
    if pictures:
        caption = (
            "Reliability: on the dashed line 30% said is 30% true; above it the probe says too little, below it too "
            "much, and points of few rows say little. Scores: the less both classes overlap, the better."
        )
        yield Pictures(tuple(pictures), caption)
    if test.get("reliability"):
        yield tables.reliability(test)
    if "histogram" in metrics:
        yield tables.histogram(metrics["histogram"])


def running(metrics: Mapping[str, Any]) -> Blocks:
    """What is known of a part of the response."""
    stages = metrics.get("stages")
    if not stages:
        return
    auroc = partial(figures.against_fraction, stages=stages, names={"auroc": "AUROC"}, label="AUROC")
    names = {"brier": "calibrated for this part", "brier_final": "calibrated for the whole"}
    brier = partial(figures.against_fraction, stages=stages, names=names, label="Brier score")
    pictures = (
        Picture("stages-auroc", "AUROC against the share of the response seen", auroc),
        Picture("stages-brier", "Brier score against the share of the response seen", brier),
    )
    caption = (
        "How much is known before the answer is finished. Left, higher is better; right, lower is better, and the "
        "distance between the lines is what a calibration of its own wins. Bands are 95% intervals."
    )
    yield Pictures(pictures, caption)
    yield tables.stages(stages)


def strata(metrics: Mapping[str, Any]) -> Blocks:
    """The same within each kind of question."""
    found: Mapping[str, Any] = metrics.get("strata", {})
    if not found or "comparison" not in metrics:
        return
    largest = tables.largest_strata(metrics)
    judged = [
        (one_line(name, 60), metrics["test"]["within"]["strata"][name]) for name, about in largest if about["judged"]
    ]
    if judged:
        draw = partial(figures.forest, rows=judged, own=None)
        alt = "AUROC with interval within each stratum; the numbers stand in the table below"
        picture = Picture("strata-forest", alt, draw, *_forest_size(len(judged)))
        yield Pictures((picture,), "AUROC of the probe within each stratum, with 95% intervals; .5 is guessing.")
    yield tables.strata(metrics)
    if len(largest) < len(found):
        yield Text(f"The {len(largest)} largest of {len(found)} strata.")


def examples(metrics: Mapping[str, Any]) -> Blocks:
    """The most wrong answers of either side."""
    found = metrics.get("examples", {})
    missed, alarms = tuple(found.get("missed", ())), tuple(found.get("false_alarms", ()))
    if missed:
        yield Examples("Made-up answers that it let pass", "The lowest probabilities of made-up answers.", missed)
    if alarms:
        yield Examples("Other answers that it suspected", "The highest probabilities of the others.", alarms)


def _forest_size(rows: int) -> tuple[tuple[float, float], tuple[float, float, float, float]]:
    """Size and margins: names stand inside, so that there is nothing to the left."""
    return (4.4, 0.6 + 0.42 * rows), (0.2, 0.2, 0.5, 0.0)

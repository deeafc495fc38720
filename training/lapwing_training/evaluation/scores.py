"""What can be said of given scores on given rows: metrics, thresholds, strata, baselines. Fits nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lapwing_training.evaluation import diagrams
from lapwing_training.evaluation.baselines import raw_names
from lapwing_training.evaluation.calibrate import OperatingPoint
from lapwing_training.evaluation.sample import Sample
from lapwing_training.progress import Advance, silent
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import Rows
from lapwing_training.store.table import Table


@dataclass(frozen=True)
class Scores:
    """Scores of the same rows, each (rows,), none by anything that saw them."""

    logits: Floats
    probabilities: Floats
    baselines: Mapping[str, Floats]
    """By name, turned so that higher speaks for hallucination."""

    combined: Floats | None
    """Log-probability and attention together; None where there are no log-probabilities."""


def judge_scores(sample: Sample, table: Table, scores: Scores, advance: Advance = silent) -> dict[str, Any]:
    """Everything but the thresholds, as JSON values.

    Args:
        sample: the rows, with their resamples.
        table: the same rows.
        scores: of the same rows.
        advance: called `judging_steps` times.
    """
    labels = table.labels
    result: dict[str, Any] = {
        "test": {**sample.about(), **sample.judge(scores.logits), **sample.calibration(scores.probabilities)},
        "strata": sample.about_strata(),
        "log_probability_missing": int((~np.isfinite(table.log_probabilities)).sum()),
        "roc": diagrams.roc(scores.logits, labels),
        "pr": diagrams.precision_recall(scores.logits, labels),
        "histogram": diagrams.histogram(scores.probabilities, labels),
    }
    if table.response_tokens is not None:
        result["lengths"] = diagrams.lengths(table.response_tokens)
    advance()
    comparison: dict[str, Any] = {}
    for name, values in scores.baselines.items():
        comparison[name] = {"kind": "baseline", **sample.judge(values)}
        advance()
    if scores.combined is not None and "log_probability" in scores.baselines:
        comparison["log_probability+attention"] = {"kind": "combination", **sample.judge(scores.combined)}
        result["paired"] = sample.difference(scores.combined, scores.baselines["log_probability"])
    advance()
    return result | {"comparison": comparison}


def judging_steps(table: Table, rows: Rows | None = None) -> int:
    """How often `judge_scores` advances: the logits, each baseline, and the combination; arguments of `raw_names`."""
    return len(raw_names(table, rows)) + 2


def realised(
    sample: Sample,
    points: Sequence[OperatingPoint],
    limits: Sequence[Floats],
    logits: Floats,
    each_group_once: bool = False,
) -> list[dict[str, Any]]:
    """The promise of each operating point beside what came of it.

    Args:
        sample: the rows, with their resamples.
        points: what is promised and stored.
        limits: for each point (rows,): the threshold that a row is held against, NaN where it has none.
        logits: (rows,)
        each_group_once: false alarms are counted by group, each of its rows an equal part of one.
    """
    return [
        {
            "false_positive_rate": point.false_positive_rate,
            "logit": point.logit,
            "negatives": point.negatives,
            "reason": point.reason,
            **_came_of_it(sample, limit, logits, each_group_once),
        }
        for point, limit in zip(points, limits, strict=True)
    ]


def _came_of_it(sample: Sample, limit: Floats, logits: Floats, each_group_once: bool) -> dict[str, float | None]:
    known = np.isfinite(limit)
    negatives, positives = (np.flatnonzero(known & (sample.labels == label)) for label in (0, 1))
    if not len(negatives) or not len(positives):
        return dict.fromkeys(("realised_rate", "low", "high", "found"))
    rate = sample.take(negatives).rate(logits[negatives] > limit[negatives], each_group_once)
    found = float((logits[positives] > limit[positives]).mean())
    return {"realised_rate": rate["value"], "low": rate["low"], "high": rate["high"], "found": found}

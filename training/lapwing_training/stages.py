"""Scores while a response is being written: how good they are by then, and a calibration for each stage."""

from __future__ import annotations

from typing import Any

import numpy as np

from lapwing_detector.calibration import Calibration
from lapwing_training.calibrate import platt
from lapwing_training.metrics import estimate
from lapwing_training.nested import Trial
from lapwing_training.sample import LEAST_PER_CLASS, Sample
from lapwing_training.significance import Floats
from lapwing_training.splits import Rows
from lapwing_training.table import Table

WHOLE = 1.0


def judge_stages(trial: Trial, sample: Sample) -> list[dict[str, Any]]:
    """How good scores of a part of the response are, for each part that the store holds and for the whole.

    Every row is scored by the probe that did not see its group, and its probability comes from a sigmoid fitted on rows
    of other folds at the same stage. A stage with fewer than ten rows of a class on either side is absent.

    Args:
        trial: rows that are judged.
        sample: the same rows, with their resamples.

    Returns:
        JSON values, ascending by fraction; `brier_final` is with the calibration of whole responses, `slope` and
        `intercept` are the sigmoid of all fitted rows. Empty where the store holds no parts.
    """
    fractions = trial.table.stages
    judged = [_judge(trial, sample, fraction) for fraction in (*fractions, WHOLE)] if fractions else []
    return [stage for stage in judged if stage is not None]


def stage_logits(trial: Trial, fraction: float) -> tuple[Floats, Table]:
    """(rows of the table,) logits of that part of the response, NaN where it is too short; and the rows that have it.

    Args:
        trial: with the probe for each row.
        fraction: one of the table's stages.
    """
    part, rows = trial.table.at_stage(fraction)
    logits = np.full(len(trial.table), np.nan)
    for scored, probe in trial.scorers:
        places = np.flatnonzero(np.isin(rows, scored))
        logits[rows[places]] = probe.logit(part.take(places))
    return logits, part


def _judge(trial: Trial, sample: Sample, fraction: float) -> dict[str, Any] | None:
    logits, part = (trial.held_out, trial.table) if fraction == WHOLE else stage_logits(trial, fraction)
    known = np.isfinite(logits)
    labels = trial.table.labels
    sides = (trial.plan.fitted, trial.plan.tested, *(rows for rows, _ in trial.folds))
    if min(_least(labels[rows[known[rows]]]) for rows in sides) < LEAST_PER_CLASS:
        return None
    own, final = np.full(len(labels), np.nan), np.full(len(labels), np.nan)
    for (fitted, tested), whole in zip(trial.folds, trial.calibrations, strict=True):
        own[tested] = _sigmoid(logits, labels, fitted[known[fitted]]).probabilities(logits[tested])
        final[tested] = whole.probabilities(logits[tested])
    whole_fit = _sigmoid(logits, labels, trial.plan.fitted[known[trial.plan.fitted]])
    judged = np.flatnonzero(known[trial.rows])
    rows, some = trial.rows[judged], sample.take(judged)
    return {
        "fraction": fraction,
        "rows": len(rows),
        "tokens": None if part.response_tokens is None else float(np.median(part.response_tokens)),
        "auroc": estimate(some.auroc(logits[rows])),
        "brier": some.calibration(own[rows])["brier"],
        "brier_final": some.calibration(final[rows])["brier"],
        "slope": whole_fit.slope,
        "intercept": whole_fit.intercept,
    }


def _sigmoid(logits: Floats, labels: Any, rows: Rows) -> Calibration:
    return Calibration(*platt(logits[rows], labels[rows]))


def _least(labels: Any) -> int:
    return min(int((labels == 1).sum()), int((labels == 0).sum()))

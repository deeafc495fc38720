"""The file beside a probe that says what was scored how, row by row, and so which groups the probe has seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lapwing_training.errors import InvalidData, NotEnoughData
from lapwing_training.evaluation.nested import Fitted, Trial
from lapwing_training.files import from_json
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import Rows

PREDICTIONS = "predictions.jsonl"
TESTED = "test"
"""The only rows whose group the probe has not seen in any way."""

APART = "calibration"
"""Rows that only set the thresholds of a guarantee."""


def predictions(fitted: Fitted, trial: Trial) -> str:
    """One line for each labelled row.

    `out-of-fold`: the probe was fitted on it; the logit is that of the probe of its fold, the probability is by the
    calibration of the other folds in nested cross-validation, else by the saved one. `test`: the probe's own.
    `calibration`: the probe's own, and set apart for the thresholds.
    """
    plan = trial.plan
    judged = dict(zip(trial.rows.tolist(), trial.probabilities.tolist(), strict=True))
    said = fitted.calibration.probabilities
    own = fitted.probe.logit(trial.table.take(plan.apart))
    lines = [*_lines(trial, plan.fitted, trial.held_out[plan.fitted], "out-of-fold", said(fitted.held_out), judged)]
    if plan.protocol == "split":
        logits = trial.held_out[plan.tested]
        lines += _lines(trial, plan.tested, logits, TESTED, said(logits), judged)
    lines += _lines(trial, plan.apart, own, APART, said(own), judged)
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


@dataclass(frozen=True)
class Seen:
    """Groups that a probe knows."""

    fitted: frozenset[str]
    """It was fitted or calibrated on them."""

    judged: frozenset[str]
    """Its own report judges it on them, be it out of fold."""


def seen_groups(directory: Path) -> Seen:
    """What the predictions beside a probe say of its groups.

    Raises:
        NotEnoughData: it came without its predictions, so nobody knows.
        InvalidData: they can't be read.
    """
    path = directory / PREDICTIONS
    if not path.is_file():
        raise NotEnoughData(
            f"{path} is missing, so nobody knows which groups the probe was fitted on; fetch the whole probe, or judge "
            "on all groups, which flatters it: --seen-groups"
        )
    try:
        rows = [from_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        return Seen(
            frozenset(row["group"] for row in rows if row["fold"] != TESTED),
            frozenset(row["group"] for row in rows if row["fold"] != APART),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidData(path, None, f"no predictions of lapwing train ({error}); fetch the probe again") from None


def _lines(
    trial: Trial, rows: Rows, logits: Floats, fold: str, probabilities: Floats, judged: dict[int, float]
) -> Iterator[dict[str, Any]]:
    table, number = trial.table, np.full(len(trial.table), -1)
    for place, (_, tested) in enumerate(trial.folds):
        number[tested] = place
    for row, logit, probability in zip(rows.tolist(), logits.tolist(), probabilities.tolist(), strict=True):
        yield {
            "id": str(table.ids[row]),
            "fold": fold,
            **({"outer_fold": int(number[row])} if trial.plan.protocol == "nested" and number[row] >= 0 else {}),
            "logit": logit,
            "probability": judged.get(row, probability),
            "label": int(table.labels[row]),
            "group": str(table.groups[row]),
            "stratum": str(table.strata[row]),
        }

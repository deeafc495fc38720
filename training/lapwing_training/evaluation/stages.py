"""Scores while a response is being written: how good they are by then, and a calibration for each stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lapwing_detector.calibration import Calibration, at_stage
from lapwing_detector.probe import Probe
from lapwing_training.evaluation.calibrate import platt
from lapwing_training.evaluation.nested import Scorers, Trial, scored
from lapwing_training.evaluation.sample import LEAST_PER_CLASS, Sample
from lapwing_training.statistics.metrics import estimate
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import Rows
from lapwing_training.store.table import UNKNOWN, Table

WHOLE = 1.0


@dataclass(frozen=True)
class Stage:
    """What probes say of a part of the response; NaN where it is too short."""

    fraction: float
    held_out: Floats
    """(rows of the table,) by the probe that did not see the row's group."""

    known: tuple[Floats, ...]
    """Of each fold (rows of the table,): what was known without the rows that are judged in it."""

    tokens: float | None
    """The median response, of the fitted rows that have this part; None where the store does not say."""


def judge_stages(trial: Trial, sample: Sample) -> list[dict[str, Any]]:
    """How good scores of a part of the response are, for each part that the store holds and for the whole.

    Every row is scored by the probe that did not see its group, and its probability comes from a sigmoid fitted on rows
    of other folds at the same stage. A stage with fewer than ten rows of a class on either side is absent. All that are
    present are judged on the same rows, those that the earliest has; their sigmoids are fitted on all rows they have.

    Args:
        trial: rows that are judged.
        sample: the same rows, with their resamples.

    Returns:
        JSON values, ascending by fraction; `brier_final` is with the calibration of whole responses, `slope` and
        `intercept` are the sigmoid of all fitted rows. Empty where the store holds no parts.
    """
    fractions = trial.table.stages
    stages = [stage_of(trial, fraction) for fraction in (*fractions, WHOLE)] if fractions else []
    present = [stage for stage in stages if _enough(trial, stage)]
    if not present:
        return []
    # A longer part has the rows of a shorter one, so these are the earliest stage's.
    shared = np.logical_and.reduce([np.isfinite(stage.held_out[trial.rows]) for stage in present])
    judged = np.flatnonzero(shared)
    return [_judge(trial, stage, trial.rows[judged], sample.take(judged)) for stage in present]


def stages_elsewhere(
    probe: Probe, logits_of: Callable[[Probe, Table], Floats], table: Table, sample: Sample
) -> list[dict[str, Any]]:
    """How good a saved probe's running score is on another store; the rows are those that its earliest part has.

    Args:
        probe: with the calibrations of its stages.
        logits_of: (rows,) by the probe.
        table: rows that the probe was not fitted on.
        sample: the same rows, with their resamples.

    Returns:
        JSON values, ascending by fraction. The probability that `brier` is of is the one that is said while so many
        tokens are written, as `Probe.running_probability`; `brier_final` is with the calibration of whole responses.
        Parts with fewer than ten rows of a class are absent. Empty where the store holds no parts.
    """
    parts = [(fraction, *table.at_stage(fraction)) for fraction in table.stages]
    enough = [part for part in parts if _classes(part[1].labels) >= LEAST_PER_CLASS]
    if not enough:
        return []
    shared = enough[0][2]
    for _, _, rows in enough:
        shared = np.intersect1d(shared, rows)
    if _classes(table.labels[shared]) < LEAST_PER_CLASS:
        return []
    cut = [(fraction, part.take(np.isin(rows, shared))) for fraction, part, rows in enough]
    some = sample.take(shared)
    return [_elsewhere(probe, logits_of, at, part, some) for at, part in (*cut, (WHOLE, table.take(shared)))]


def _elsewhere(
    probe: Probe, logits_of: Callable[[Probe, Table], Floats], fraction: float, part: Table, sample: Sample
) -> dict[str, Any]:
    logits, tokens = logits_of(probe, part), part.response_tokens
    final = probe.calibration.probabilities(logits)
    said = final.copy()
    if fraction < WHOLE and tokens is not None:
        for count in np.unique(tokens):
            rows = tokens == count
            said[rows] = at_stage(probe.calibration, probe.stages, int(count)).probabilities(logits[rows])
    return {
        "fraction": fraction,
        "rows": len(part),
        "tokens": None if tokens is None else float(np.median(tokens)),
        "auroc": estimate(sample.auroc(logits)),
        "brier": sample.calibration(said)["brier"],
        "brier_final": sample.calibration(final)["brier"],
    }


def _classes(labels: Any) -> int:
    return min(int((labels == label).sum()) for label in (0, 1))


def stage_of(trial: Trial, fraction: float) -> Stage:
    """The logits of that part of the response.

    Args:
        trial: with the probes for each row.
        fraction: one of the table's stages, or `WHOLE`.
    """
    if fraction == WHOLE:
        return Stage(WHOLE, trial.held_out, trial.known, _tokens(trial.table, trial.plan.fitted))
    part, rows = trial.table.at_stage(fraction)

    def logits(scorers: Scorers) -> Floats:
        found = np.full(len(trial.table), np.nan)
        found[rows] = scored(part, tuple((np.flatnonzero(np.isin(rows, own)), probe) for own, probe in scorers))
        return found

    tokens = _tokens(part, np.flatnonzero(np.isin(rows, trial.plan.fitted)))
    return Stage(fraction, logits(trial.scorers), tuple(map(logits, trial.known_scorers)), tokens)


def _enough(trial: Trial, stage: Stage) -> bool:
    labels = np.where(np.isfinite(stage.held_out), trial.table.labels, UNKNOWN)
    sides = (trial.plan.fitted, trial.plan.tested, *(rows for rows, _ in trial.folds))
    return min(int((labels[rows] == label).sum()) for rows in sides for label in (0, 1)) >= LEAST_PER_CLASS


def _judge(trial: Trial, stage: Stage, rows: Rows, sample: Sample) -> dict[str, Any]:
    """On these rows, which the sample holds."""
    labels, logits = trial.table.labels, stage.held_out
    own, final = np.full(len(labels), np.nan), np.full(len(labels), np.nan)
    for (known, tested), before, whole in zip(trial.folds, stage.known, trial.calibrations, strict=True):
        own[tested] = _sigmoid(before, labels, known).probabilities(logits[tested])
        final[tested] = whole.probabilities(logits[tested])
    whole_fit = _sigmoid(logits, labels, trial.plan.fitted)
    return {
        "fraction": stage.fraction,
        "rows": len(rows),
        "tokens": stage.tokens,
        "auroc": estimate(sample.auroc(logits[rows])),
        "brier": sample.calibration(own[rows])["brier"],
        "brier_final": sample.calibration(final[rows])["brier"],
        "slope": whole_fit.slope,
        "intercept": whole_fit.intercept,
    }


def _sigmoid(logits: Floats, labels: Any, rows: Rows) -> Calibration:
    """Fitted on those of the rows that have a logit."""
    known = rows[np.isfinite(logits[rows])]
    return Calibration(*platt(logits[known], labels[known]))


def _tokens(part: Table, rows: Rows) -> float | None:
    tokens = part.response_tokens
    return None if tokens is None or not len(rows) else float(np.median(tokens[rows]))

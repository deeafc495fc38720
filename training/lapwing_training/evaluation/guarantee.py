"""Thresholds that keep their promise for exchangeable groups: set on groups that nothing else has seen."""

from __future__ import annotations

from typing import Any

import numpy as np

from lapwing_training.evaluation.calibrate import RATES, guaranteed_points
from lapwing_training.evaluation.nested import Fitted, Trial
from lapwing_training.evaluation.sample import Sample
from lapwing_training.evaluation.scores import realised


def guarantee(fitted: Fitted, trial: Trial, sample: Sample, seed: int) -> dict[str, Any] | None:
    """Guaranteed operating points of the saved probe, with the rates that came of the same rule for each fold's.

    The promise is about one random row of a further group, so each group counts once in what came of it.

    Args:
        fitted: the probe.
        trial: rows that are judged, and those that were set apart.
        sample: the judged rows, with their resamples.
        seed: which row of a group sets the threshold.

    Returns:
        JSON values; None where nothing was set apart.
    """
    apart = trial.table.take(trial.plan.apart)
    if not len(apart):
        return None
    points, *by_fold = (
        guaranteed_points(probe.logit(apart), apart.labels, apart.groups, RATES, seed)
        for probe in (fitted.probe, *trial.probes)
    )
    rates = realised(sample, points, trial.limits(by_fold), trial.logits, each_group_once=True)
    return {"calibration_groups": len(np.unique(apart.groups)), "rates": rates}

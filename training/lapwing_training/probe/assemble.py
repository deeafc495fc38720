"""The probe as it is saved, put together from what was fitted and how it was judged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.calibration import StageCalibration
from lapwing_detector.identity import ModelIdentity
from lapwing_detector.probe import Probe, Threshold
from lapwing_training.evaluation.baselines import name_of
from lapwing_training.evaluation.nested import Fitted, Trial
from lapwing_training.evaluation.plan import OUTER_FOLDS
from lapwing_training.evaluation.stages import WHOLE
from lapwing_training.probe.options import TrainOptions
from lapwing_training.progress import Advance
from lapwing_training.statistics.head_probes import head_probe_auroc, head_probe_steps
from lapwing_training.statistics.significance import Floats
from lapwing_training.store.store import Store
from lapwing_training.store.table import Table

Statistics = dict[str, NDArray[np.float32]]

HEAD_PROBE_K = 10
"""Values that a head's own probe reads at most; more of them would cost more than all else, for a picture."""


def assemble(
    name: str,
    fitted: Fitted,
    trial: Trial,
    store: Store,
    statistics: Statistics,
    judged: Mapping[str, Any],
    options: TrainOptions,
) -> Probe:
    """The probe with all that was found.

    Args:
        name: the probe's.
        fitted: on the rows of the plan.
        trial: how it was judged.
        store: whose rows they are.
        statistics: from `statistics_of`.
        judged: the metrics, with mode and command.
        options: how it was fitted.
    """
    probe, plan = fitted.probe, trial.plan
    groups = trial.table.groups
    tested = len(np.unique(groups[plan.tested])) / len(np.unique(groups)) if plan.protocol == "split" else None
    return Probe(
        name=name,
        features=probe.features,
        k=probe.k,
        layers=store.layers,
        weights=probe.weights,
        bias=probe.bias,
        selected=probe.selected,
        statistic_weights=dict(probe.statistic_weights),
        calibration=fitted.calibration,
        thresholds=tuple(_thresholds(judged)),
        stages=tuple(_stages(judged)),
        identity=ModelIdentity.from_dict(store.identity),
        statistics=statistics,
        metrics=judged,
        training={
            "recipe": options.recipe,
            "selection": probe.chosen.get("selection"),
            "trained_as": name_of(fitted.recipe),
            "chosen": dict(probe.chosen),
            "seed": options.seed,
            "protocol": plan.protocol,
            "test_share": tested,
            "outer_folds": OUTER_FOLDS,
            "guarantee": options.guarantee,
            "mode": store.mode,
            "command": judged["command"],
            "store_digest": store.digest,
            "stratum": store.stratum,
            "left_out": len(store.left_out),
        },
    )


def _thresholds(judged: Mapping[str, Any]) -> Iterator[Threshold]:
    entries = judged["thresholds"] if judged["guarantee"] is None else judged["guarantee"]["rates"]
    for entry in entries:
        if entry["logit"] is not None:
            yield Threshold(*(entry[name] for name in ("false_positive_rate", "logit", "realised_rate", "negatives")))


def _stages(judged: Mapping[str, Any]) -> Iterator[StageCalibration]:
    for stage in judged["stages"]:
        if stage["fraction"] < WHOLE:
            yield StageCalibration(*(stage[name] for name in ("fraction", "tokens", "slope", "intercept")))


def statistics_of(fitted: Fitted, trial: Trial, advance: Advance) -> Statistics:
    """What the heatmaps show, of the fitted rows; advances `statistics_steps` times."""
    table = trial.table.take(trial.plan.fitted)
    found: dict[str, Floats] = {}
    for name, tested in fitted.significance.items():
        found |= {
            f"{name}/P_VALUE": tested.p_value,
            f"{name}/Q_VALUE": tested.q_value,
            f"{name}/AUROC": tested.auroc,
            f"{name}/EFFECT_SIZE": tested.effect_size,
            f"{name}/HEAD_PROBE": head_probe_auroc(
                table, (name,), min(fitted.probe.k, HEAD_PROBE_K), fitted.folds, advance
            ),
        }
    return {name: np.asarray(values, dtype=np.float32) for name, values in found.items()}


def statistics_steps(table: Table) -> int:
    """How often `statistics_of` advances."""
    return len(table.feature_names) * head_probe_steps(table)

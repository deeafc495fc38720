"""How far another store lies from the one that a probe was fitted on: heads, lengths, calibration, AUROC.

A sample of the fitted rows is kept with the probe, one row per group. Knows nothing of baselines.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as tensors_from
from safetensors.numpy import save as tensors_to
from scipy import stats

from lapwing_detector.calibration import Calibration
from lapwing_detector.probe import Probe
from lapwing_detector.probe_files import read
from lapwing_detector.token_statistics import TOKEN_STATISTICS
from lapwing_training.errors import InvalidData, NotEnoughData
from lapwing_training.evaluation.calibrate import fit_calibration
from lapwing_training.evaluation.sample import Sample
from lapwing_training.evaluation.scores import Scores
from lapwing_training.recipes.fit import LinearProbe
from lapwing_training.statistics.metrics import estimate
from lapwing_training.statistics.significance import Z_95, Floats
from lapwing_training.statistics.splits import grouped_folds
from lapwing_training.store.table import Table

REFERENCE = "reference.safetensors"
MOST_ROWS = 1000
"""Rows of the fitted store that are kept: two samples of so many tell distributions that differ by .06 apart."""

LEVEL = 0.05
FOLDS = 5


@dataclass(frozen=True)
class Reference:
    """Rows that a probe was fitted on, no two of one group."""

    scalars: NDArray[np.float32]
    """(rows, features, selected heads): one number per head and feature, as it was tested."""

    token_counts: NDArray[np.int64]
    """(rows,)"""

    statistics: NDArray[np.float32] | None = None
    """(rows, statistics) of log-probabilities that the probe reads; None where it reads attention alone."""

    @classmethod
    def of(cls, probe: LinearProbe | Probe, table: Table, seed: int) -> Reference:
        """Rows of the table, for the heads that the probe reads."""
        some = table.take(independent_rows(table.groups, MOST_ROWS, seed))
        return cls(selected_scalars(probe, some), some.token_counts, read_statistics(probe, some))

    def to_bytes(self) -> bytes:
        """Safetensors; the same rows give the same bytes."""
        tensors: dict[str, NDArray[Any]] = {"scalars": self.scalars, "token_counts": self.token_counts}
        return bytes(tensors_to(tensors if self.statistics is None else tensors | {"statistics": self.statistics}))

    @classmethod
    def load(cls, directory: Path) -> Reference | None:
        """Of a probe directory; None where the probe came without it.

        Raises:
            InvalidData: the file can't be read.
        """
        if not (directory / REFERENCE).is_file():
            return None
        try:
            tensors = tensors_from(read(directory, REFERENCE))
            return cls(tensors["scalars"], tensors["token_counts"], tensors.get("statistics"))
        except (SafetensorError, KeyError) as error:
            raise InvalidData(
                directory / REFERENCE, None, f"not as lapwing train writes it ({error}); fetch the probe again"
            ) from None


def independent_rows(groups: NDArray[Any], most: int, seed: int) -> NDArray[np.int64]:
    """At most so many rows by lot, one of each group: the test assumes that rows are independent."""
    random = np.random.default_rng(seed)
    order = random.permutation(len(groups))
    _, first = np.unique(groups[order], return_index=True)
    return np.sort(random.permutation(order[first])[:most])


def selected_scalars(probe: LinearProbe | Probe, table: Table) -> NDArray[np.float32]:
    """(rows, features, selected heads), the heads in the order of their flat index."""
    scalars = table.scalars(probe.features, probe.k)  # (rows, features, layers, heads)
    return np.ascontiguousarray(scalars[:, :, probe.selected], dtype=np.float32)


def read_statistics(probe: LinearProbe | Probe, table: Table) -> NDArray[np.float32] | None:
    """(rows, statistics) of log-probabilities that the probe reads; None where it reads none."""
    ids = ids_of(probe)
    return np.ascontiguousarray(table.statistics(ids), dtype=np.float32) if ids else None


def ids_of(probe: LinearProbe | Probe) -> tuple[str, ...]:
    """The statistics that the probe reads; a saved one keeps no order of its weights."""
    return tuple(id for id in TOKEN_STATISTICS if id in probe.statistic_weights)


def drift_of(
    probe: Probe,
    reference: Reference | None,
    table: Table,
    sample: Sample,
    scores: Scores,
    seed: int,
    seen_groups: bool = False,
) -> dict[str, Any]:
    """What changed from the store that the probe was fitted on to this one, as JSON values.

    Args:
        probe: with the metrics of its own store.
        reference: rows that it was fitted on; None leaves heads and lengths out.
        table: the rows of the new store.
        sample: the same rows, with their resamples.
        scores: of the same rows.
        seed: which row stands for its group.
        seen_groups: rows may be among those that the probe's own report judged, so that the change of AUROC has no
            interval.
    """
    found: dict[str, Any] = {"calibration": _calibration_shift(probe.calibration, table, sample, scores, seed)}
    before = probe.metrics.get("test")
    if before is not None:
        found["base_rate"] = {"before": before["base_rate"], "here": float((table.labels == 1).mean())}
        found["auroc"] = _auroc_change(before["auroc"], sample, scores.logits, seen_groups)
    if reference is not None:
        rows = table.take(independent_rows(table.groups, len(table), seed))
        found["rows"] = {"before": len(reference.token_counts), "here": len(rows)}
        found["heads"] = head_drift(probe, reference, selected_scalars(probe, rows))
        found["length"] = length_drift(reference.token_counts, rows.token_counts)
        if reference.statistics is not None:
            found["statistics"] = statistics_drift(probe, reference.statistics, read_statistics(probe, rows))
    return found


def head_drift(probe: Probe, reference: Reference, scalars: NDArray[np.float32]) -> dict[str, Any]:
    """Two-sample Kolmogorov-Smirnov test of every feature of every head that the probe reads.

    Args:
        probe: whose heads they are.
        reference: rows before.
        scalars: (rows, features, selected heads) here.

    Returns:
        how many were tested, how many have q < .05 (Benjamini-Hochberg over all of them), and each, farthest first.
    """
    result = stats.ks_2samp(reference.scalars, scalars, axis=0, method="asymp")
    distance, p_value = np.atleast_2d(result.statistic), np.atleast_2d(result.pvalue)  # (features, heads)
    q_value = stats.false_discovery_control(p_value.ravel()).reshape(p_value.shape)
    places = np.argwhere(probe.selected)  # (heads, 2)
    order = np.argsort(-distance, axis=None, kind="stable")
    listed = [
        {
            "feature": probe.features[feature],
            "layer": probe.layers[places[head, 0]],
            "head": int(places[head, 1]),
            "distance": float(distance[feature, head]),
            "p_value": float(p_value[feature, head]),
            "q_value": float(q_value[feature, head]),
        }
        for feature, head in zip(*np.unravel_index(order, distance.shape), strict=True)
    ]
    return {"tested": distance.size, "drifted": int((q_value < LEVEL).sum()), "list": listed}


def statistics_drift(
    probe: Probe, before: NDArray[np.float32], here: NDArray[np.float32] | None
) -> list[dict[str, Any]]:
    """The same test of each statistic of log-probabilities that the probe reads, and their medians; empty for none."""
    if here is None:
        return []
    result = stats.ks_2samp(before, here, axis=0, method="asymp")
    return [
        {
            "statistic": id,
            "distance": float(result.statistic[place]),
            "p_value": float(result.pvalue[place]),
            "median_before": float(np.median(before[:, place])),
            "median_here": float(np.median(here[:, place])),
        }
        for place, id in enumerate(ids_of(probe))
    ]


def length_drift(before: NDArray[np.int64], here: NDArray[np.int64]) -> dict[str, Any]:
    """The same test of the token counts, and their medians."""
    result = stats.ks_2samp(before, here, method="asymp")
    return {
        "distance": float(result.statistic),
        "p_value": float(result.pvalue),
        "median_before": float(np.median(before)),
        "median_here": float(np.median(here)),
    }


def _auroc_change(
    before: Mapping[str, float | None], sample: Sample, logits: Floats, seen_groups: bool
) -> dict[str, Any]:
    """AUROC here less that of the probe's own report; where the rows are others, the errors add up.

    Without an interval where rows may be the same, or where one of the two AUROCs has none.
    """
    here = estimate(sample.auroc(logits))
    change: dict[str, float | None] = {"value": None, "low": None, "high": None}
    if before["value"] is not None and here["value"] is not None:
        difference = here["value"] - before["value"]
        change["value"] = difference
        first, second = _standard_error(before), _standard_error(here)
        if not seen_groups and first is not None and second is not None:
            error = float(np.hypot(first, second))
            change |= {"low": difference - Z_95 * error, "high": difference + Z_95 * error}
    return {"before": dict(before), "here": here, "change": change}


def _standard_error(known: Mapping[str, float | None]) -> float | None:
    low, high = known["low"], known["high"]
    return None if low is None or high is None else (high - low) / (2.0 * Z_95)


def _calibration_shift(before: Calibration, table: Table, sample: Sample, scores: Scores, seed: int) -> dict[str, Any]:
    """Platt's sigmoid fitted anew here, and the calibration error with the old one and, out of fold, with the new."""
    logits = scores.logits
    here = fit_calibration(logits, table.labels, table.groups, kind="platt")
    shift: dict[str, Any] = {
        "before": {"slope": before.slope, "intercept": before.intercept},
        "here": {"slope": here.slope, "intercept": here.intercept},
        "ece_before": sample.calibration(scores.probabilities)["ece"],
        "ece_here": None,
    }
    try:
        folds = grouped_folds(table.labels, table.groups, FOLDS, seed)
    except NotEnoughData:  # too few rows to fit on some and judge on others
        return shift
    anew = np.empty(len(table))
    for fitted, tested in folds:
        calibration = fit_calibration(logits[fitted], table.labels[fitted], table.groups[fitted], kind="platt")
        anew[tested] = calibration.probabilities(logits[tested])
    return shift | {"ece_here": sample.calibration(anew)["ece"]}

"""Rows that scores are judged on: metrics with group-bootstrap intervals, overall and within each stratum."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.statistics import metrics
from lapwing_training.statistics.significance import Floats
from lapwing_training.store.table import Table

LEAST_PER_CLASS = 10
"""A stratum with fewer rows of either class says nothing about a score."""


@dataclass(frozen=True)
class Sample:
    """Labelled rows with their bootstrap weights; every score is judged under the same weights, hence paired."""

    labels: NDArray[np.int8]
    groups: NDArray[np.str_]
    strata: NDArray[np.str_]
    weights: NDArray[np.float32]
    """(1 + resamples, rows); the first weighting is the sample itself."""

    @classmethod
    def of(cls, table: Table, resamples: int = metrics.RESAMPLES, seed: int = 0) -> Sample:
        """Draw the resamples."""
        weights = metrics.bootstrap_weights(table.groups, resamples, seed)
        return cls(table.labels, table.groups, table.strata, weights)

    def take(self, rows: NDArray[Any]) -> Sample:
        """Some of the rows, under the same resamples."""
        return Sample(self.labels[rows], self.groups[rows], self.strata[rows], self.weights[:, rows])

    def about(self) -> dict[str, Any]:
        """How many rows, groups and hallucinations."""
        return {
            "rows": len(self.labels),
            "groups": len(np.unique(self.groups)),
            "hallucinated": int((self.labels == 1).sum()),
            "base_rate": float((self.labels == 1).mean()),
        }

    def judge(self, scores: Floats, labels: NDArray[np.int8] | None = None) -> dict[str, Any]:
        """Everything that a ranking of the rows can be asked for.

        Args:
            scores: (rows,) or (draws, rows); over draws the metrics are averaged.
            labels: (draws, rows) other labels than the sample's own, for a control.

        Returns:
            each of `metrics.NAMES` with its interval, and under `within` the AUROC of each stratum and their mean. The
            intervals are those of the average, so over draws `over_draws` says how far the single AUROCs lie apart.
        """
        draws = np.atleast_2d(scores)
        dealt = np.broadcast_to(self.labels if labels is None else labels, draws.shape)
        overall = np.mean(
            [metrics.discrimination(draw, label, self.weights) for draw, label in zip(draws, dealt, strict=True)],
            axis=0,
        )
        judged: dict[str, Any] = {name: metrics.estimate(row) for name, row in zip(metrics.NAMES, overall, strict=True)}
        if len(draws) > 1:
            single = [metrics.auroc_of(draw, label) for draw, label in zip(draws, dealt, strict=True)]
            judged["over_draws"] = {"lowest": min(single), "highest": max(single)}
        within = self.within(draws, dealt)
        if within:
            judged["within"] = {
                "mean": metrics.estimate(mean_over(within)),
                "strata": {name: metrics.estimate(values) for name, values in within.items()},
            }
        return judged

    def auroc(self, scores: Floats) -> Floats:
        """(1 + resamples,), so that two scores can be compared resample by resample."""
        return metrics.auroc(scores, self.labels, self.weights)

    def difference(self, first: Floats, second: Floats) -> dict[str, Any]:
        """AUROC of one score less that of another in the same resamples, overall and as a mean within the strata."""
        found: dict[str, Any] = {"difference": metrics.estimate(self.auroc(first) - self.auroc(second))}
        labels = self.labels[None]
        one, other = self.within(first[None], labels), self.within(second[None], labels)
        if one:
            found["difference_within"] = metrics.estimate(mean_over({name: one[name] - other[name] for name in one}))
        return found

    def rate(self, flagged: NDArray[np.bool_], each_group_once: bool = False) -> dict[str, float | None]:
        """Share of the rows that are flagged, with its interval.

        Args:
            flagged: (rows,)
            each_group_once: every group counts the same, however many rows it has.
        """
        _, codes, counts = np.unique(self.groups, return_inverse=True, return_counts=True)
        weights = self.weights / counts[codes] if each_group_once else self.weights
        found = metrics.estimate(metrics.share(flagged, weights))
        if not flagged.any():  # no resample can show what did not happen: the exact bound of Clopper and Pearson
            found["high"] = 1.0 - 0.025 ** (1.0 / len(counts))
        return found

    def within(self, draws: Floats, labels: NDArray[np.int8]) -> dict[str, Floats]:
        """AUROC (1 + resamples,) within each stratum that has enough rows of both classes; all (draws, rows)."""
        pairs = list(zip(draws, labels, strict=True))
        return {
            name: np.mean(
                [metrics.auroc(draw[rows], label[rows], self.weights[:, rows]) for draw, label in pairs], axis=0
            )
            for name, rows in self.judged_strata().items()
        }

    def judged_strata(self) -> dict[str, NDArray[np.int64]]:
        """Rows of each stratum with enough of both classes."""
        named = {str(name): np.flatnonzero(self.strata == name) for name in np.unique(self.strata) if name}
        return {name: rows for name, rows in named.items() if self._least(rows) >= LEAST_PER_CLASS}

    def about_strata(self) -> dict[str, dict[str, Any]]:
        """Size and base rate of each stratum, and whether it is judged."""
        judged = self.judged_strata()
        return {
            str(name): {
                "rows": int((self.strata == name).sum()),
                "base_rate": float((self.labels[self.strata == name] == 1).mean()),
                "judged": str(name) in judged,
            }
            for name in np.unique(self.strata)
            if name
        }

    def calibration(self, probabilities: Floats) -> dict[str, Any]:
        """Brier score and expected calibration error with intervals, and the reliability diagram."""
        brier, error = metrics.calibration(probabilities, self.labels, self.weights)
        return {
            "brier": metrics.estimate(brier),
            "ece": metrics.estimate(error),
            "reliability": metrics.reliability(probabilities, self.labels),
        }

    def _least(self, rows: NDArray[np.int64]) -> int:
        return min(int((self.labels[rows] == 1).sum()), int((self.labels[rows] == 0).sum()))


def mean_over(within: Mapping[str, Floats]) -> Floats:
    """Mean over the strata, resample by resample; a stratum that lost a class in a resample is passed over there."""
    stacked = np.stack(list(within.values()))
    known = np.isfinite(stacked)
    counts = known.sum(axis=0)
    total = np.where(known, stacked, 0.0).sum(axis=0)
    return np.asarray(np.divide(total, counts, out=np.full(len(counts), np.nan), where=counts > 0))

"""Metrics under many weightings of the rows at once, for the group bootstrap. Knows scores, labels and groups only."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.statistics.significance import Floats

RESAMPLES = 1000
BINS = 10
BLOCK = 4_000_000
"""Numbers that are held at once: weightings are worked off in blocks of about this size."""

NAMES = ("auroc", "auprc", "tpr_at_fpr_0.01", "tpr_at_fpr_0.05", "tpr_at_fpr_0.10")


@dataclass(frozen=True)
class Curve:
    """Weight at or above each distinct score, from the highest on; (weightings, scores)."""

    positives: Floats
    negatives: Floats

    @classmethod
    def of(cls, scores: Floats, labels: NDArray[Any], weights: NDArray[Any]) -> Curve:
        """Count.

        Args:
            scores: (rows,) higher speaks for hallucination; equal scores are one step of the curve.
            labels: (rows,)
            weights: (weightings, rows)
        """
        order = np.argsort(-scores, kind="stable")
        starts = np.flatnonzero(np.diff(scores[order], prepend=np.inf))
        ordered = weights[:, order].astype(np.float64)
        positive = labels[order] == 1
        return cls(
            np.cumsum(np.add.reduceat(ordered * positive, starts, axis=1), axis=1),
            np.cumsum(np.add.reduceat(ordered * ~positive, starts, axis=1), axis=1),
        )

    def auroc(self) -> Floats:
        """(weightings,) area under the ROC curve, ties counted half."""
        gained = np.diff(self.positives, axis=1, prepend=0.0)
        crossed = np.diff(self.negatives, axis=1, prepend=0.0)
        below = self.negatives[:, -1:] - self.negatives + 0.5 * crossed
        return _ratio((gained * below).sum(axis=1), self.positives[:, -1] * self.negatives[:, -1])

    def auprc(self) -> Floats:
        """(weightings,) average precision."""
        gained = np.diff(self.positives, axis=1, prepend=0.0)
        precision = _ratio(self.positives, self.positives + self.negatives, otherwise=0.0)
        return _ratio((gained * precision).sum(axis=1), self.positives[:, -1])

    def true_positive_rate(self, false_positive_rate: float) -> Floats:
        """(weightings,) the largest share of hallucinations found at no more than this false-positive rate."""
        allowed = self.negatives <= false_positive_rate * self.negatives[:, -1:] + 1e-9
        found = np.where(allowed, self.positives, 0.0).max(axis=1)
        return np.where(self.negatives[:, -1] > 0, _ratio(found, self.positives[:, -1]), np.nan)


def discrimination(scores: Floats, labels: NDArray[Any], weights: NDArray[Any]) -> Floats:
    """AUROC, AUPRC, TPR at 1, 5 and 10 % FPR; (metrics, weightings), NaN where a class has no weight."""

    def of(block: NDArray[Any]) -> Floats:
        curve = Curve.of(scores, labels, block)
        rates = [curve.true_positive_rate(rate) for rate in (0.01, 0.05, 0.10)]
        return np.stack([curve.auroc(), curve.auprc(), *rates])

    return in_blocks(of, weights)


def auroc(scores: Floats, labels: NDArray[Any], weights: NDArray[Any]) -> Floats:
    """(weightings,)"""
    return in_blocks(lambda block: Curve.of(scores, labels, block).auroc(), weights)


def auroc_of(scores: Floats, labels: NDArray[Any]) -> float:
    """AUROC of plain rows; NaN where a class is missing."""
    return float(auroc(scores, labels, np.ones((1, len(scores))))[0])


def calibration(probabilities: Floats, labels: NDArray[Any], weights: NDArray[Any]) -> Floats:
    """Brier score and expected calibration error over ten equal bins; (2, weightings)."""
    gap = probabilities - (labels == 1)
    bins = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
    gaps = np.zeros((len(gap), BINS))
    gaps[np.arange(len(gap)), bins] = gap

    def of(block: NDArray[Any]) -> Floats:
        wide = block.astype(np.float64)
        return np.asarray(np.stack([wide @ gap**2, np.abs(wide @ gaps).sum(axis=1)]) / wide.sum(axis=1))

    return in_blocks(of, weights)


def share(flagged: NDArray[Any], weights: NDArray[Any]) -> Floats:
    """(weightings,) weighted share of the rows that are flagged; NaN where no row has a weight.

    Args:
        flagged: (rows,) of truth values.
        weights: (weightings, rows)
    """

    def of(block: NDArray[Any]) -> Floats:
        wide = block.astype(np.float64)
        return _ratio(wide @ flagged.astype(np.float64), wide.sum(axis=1))

    return in_blocks(of, weights)


def reliability(probabilities: Floats, labels: NDArray[Any]) -> list[dict[str, float]]:
    """Ten equal bins of probability: how many rows, what was said, what was true. Empty bins are absent."""
    bins = np.minimum((probabilities * BINS).astype(np.int64), BINS - 1)
    return [
        {
            "rows": int((bins == number).sum()),
            "said": float(probabilities[bins == number].mean()),
            "true": float((labels[bins == number] == 1).mean()),
        }
        for number in range(BINS)
        if (bins == number).any()
    ]


def bootstrap_weights(groups: NDArray[Any], resamples: int, seed: int) -> NDArray[np.float32]:
    """How often each row counts: once in the first weighting, then as whole groups drawn with replacement.

    Args:
        groups: (rows,)
        resamples: how many draws.
        seed: another seed, other draws.

    Returns:
        (1 + resamples, rows)
    """
    _, codes = np.unique(groups, return_inverse=True)
    count = int(codes.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1.0 / count), size=resamples)
    return np.concatenate([np.ones((1, len(codes))), drawn[:, codes]]).astype(np.float32)


def estimate(values: Floats) -> dict[str, float | None]:
    """The sample's own value with the 2.5 and 97.5 % quantiles of its resamples.

    Args:
        values: (1 + resamples,); resamples in which the metric does not exist are NaN.
    """
    value, resampled = values[0], values[1:][np.isfinite(values[1:])]
    if not np.isfinite(value):
        return {"value": None, "low": None, "high": None}
    if not len(resampled):
        return {"value": float(value), "low": None, "high": None}
    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"value": float(value), "low": float(low), "high": float(high)}


def in_blocks(of: Callable[[NDArray[Any]], Floats], weights: NDArray[Any]) -> Floats:
    """Apply to blocks of weightings, so that memory stays bounded; the last axis is joined."""
    rows = max(1, BLOCK // max(1, weights.shape[1]))
    blocks: Sequence[Floats] = [of(weights[start : start + rows]) for start in range(0, len(weights), rows)]
    return np.concatenate(blocks, axis=-1)


def _ratio(above: Floats, below: Floats, otherwise: float = float("nan")) -> Floats:
    return np.asarray(np.divide(above, below, out=np.full(np.shape(above), otherwise), where=below > 0))

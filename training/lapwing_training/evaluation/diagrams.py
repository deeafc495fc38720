"""Held-out scores as the points of curves and bars, few enough for a report. Knows scores and labels only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from lapwing_training.statistics.significance import Floats

POINTS = 200
BARS = 20
LENGTH_BARS = 50


def roc(scores: Floats, labels: NDArray[Any]) -> dict[str, list[float]]:
    """The ROC curve from (0, 0) to (1, 1), as JSON values.

    Args:
        scores: (rows,) higher speaks for hallucination.
        labels: (rows,)
    """
    false, true, _ = roc_curve(labels == 1, scores)
    kept = thinned(len(false))
    return {"false_positive_rate": false[kept].tolist(), "true_positive_rate": true[kept].tolist()}


def precision_recall(scores: Floats, labels: NDArray[Any]) -> dict[str, list[float]]:
    """Precision against recall, which ascends, as JSON values; arguments as for `roc`."""
    precision, recall, _ = precision_recall_curve(labels == 1, scores)
    kept = thinned(len(recall))
    return {"recall": recall[::-1][kept].tolist(), "precision": precision[::-1][kept].tolist()}


def histogram(probabilities: Floats, labels: NDArray[Any]) -> dict[str, list[float]]:
    """How many rows of each class have which probability, in bars of equal width, as JSON values."""
    edges = np.linspace(0.0, 1.0, BARS + 1)
    return {
        "edges": edges.tolist(),
        "hallucinated": np.histogram(probabilities[labels == 1], edges)[0].tolist(),
        "other": np.histogram(probabilities[labels == 0], edges)[0].tolist(),
    }


def lengths(tokens: NDArray[np.int64]) -> dict[str, list[float]]:
    """How many responses have how many tokens, in bars of about as many responses each, as JSON values.

    Args:
        tokens: (rows,) of each response.

    Returns:
        `edges`, whole numbers that ascend, and `counts` of what is at least the lower edge of a bar and below its upper
        one; the last edge lies above the longest response.
    """
    quantiles = np.quantile(tokens, np.linspace(0.0, 1.0, LENGTH_BARS), method="nearest")
    edges = np.unique([*quantiles, tokens.max() + 1])
    return {"edges": edges.tolist(), "counts": np.histogram(tokens, edges)[0].tolist()}


def thinned(count: int) -> NDArray[np.int64]:
    """At most `POINTS` of so many indices, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(np.int64))

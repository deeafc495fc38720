"""Held-out scores as the points of curves and bars, few enough for a report. Knows scores and labels only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from lapwing_training.significance import Floats

POINTS = 200
BARS = 20


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


def thinned(count: int) -> NDArray[np.int64]:
    """At most `POINTS` of so many indices, evenly, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(count, POINTS)).round().astype(np.int64))

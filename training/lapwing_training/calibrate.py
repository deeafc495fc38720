"""From logit to promise: probabilities, and thresholds that keep a false-alarm rate. Knows logits and labels only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from lapwing_training.significance import Floats

RATES = (0.01, 0.05, 0.10)
"""False-positive rates that a threshold is stored for."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold for a false-positive rate, or the reason why there is none."""

    false_positive_rate: float
    logit: float | None
    """Flag when the logit is strictly above."""

    negatives: int
    """Rows without hallucination that it was set on."""

    reason: str | None = None


def platt(logits: Floats, labels: NDArray[Any]) -> tuple[float, float]:
    """Slope and intercept, so that sigmoid(slope * logit + intercept) is a probability.

    Args:
        logits: (rows,) out-of-fold.
        labels: (rows,)

    Returns:
        a slope that is never negative: where the logits carry no signal the slope is 0 and every probability is the
        base rate, since a falling one would contradict the thresholds.

    References:
        Platt 1999.
    """
    centre, scale = logits.mean(), max(float(logits.std()), 1e-12)
    model = LogisticRegression(C=np.inf, max_iter=1000).fit(((logits - centre) / scale)[:, None], labels)
    slope = float(model.coef_[0, 0]) / scale
    if slope <= 0.0:
        rate = float((labels == 1).mean())
        return 0.0, math.log(rate / (1.0 - rate))
    return slope, float(model.intercept_[0] - slope * centre)


def operating_points(negatives: Floats, rates: Sequence[float] = RATES) -> tuple[OperatingPoint, ...]:
    """The ceil((n + 1)(1 - rate))-th smallest of n negative logits, for each rate.

    A further negative, exchangeable with these, is then flagged with a probability of at most `rate`.

    Args:
        negatives: (n,) logits of rows without hallucination.
        rates: in (0, 1).
    """
    ordered = np.sort(negatives)
    return tuple(_operating_point(ordered, rate) for rate in rates)


def _operating_point(ordered: Floats, rate: float) -> OperatingPoint:
    count = len(ordered)
    # (n + 1)(1 - rate) in floats may lie a hair above a whole number: 20 * .95 is 19.
    rank = math.ceil(round((count + 1) * (1.0 - rate), 9))
    if rank > count:
        needed = math.ceil(round(1.0 / rate, 9)) - 1
        reason = f"{count} negatives; a promise of {rate:.0%} needs at least {needed}: label more generations"
        return OperatingPoint(rate, None, count, reason)
    return OperatingPoint(rate, float(ordered[rank - 1]), count)


def flagged_share(logits: Floats, threshold: float) -> float:
    """Share of rows strictly above the threshold; NaN for none."""
    return float((logits > threshold).mean()) if len(logits) else float("nan")

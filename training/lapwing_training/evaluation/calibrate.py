"""From logit to promise: probabilities, and thresholds that keep a false-alarm rate. Knows logits and labels only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression

from lapwing_detector.calibration import Calibration
from lapwing_training.errors import InvalidOption
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import grouped_folds

RATES = (0.01, 0.05, 0.10)
"""False-positive rates that a threshold is stored for."""

KINDS = ("auto", "platt", "isotonic")

ISOTONIC_ROWS, ISOTONIC_PER_CLASS = 1000, 200
"""With fewer rows, or fewer of either class, steps are mostly noise: Platt's two numbers it is."""

COMPARED_FOLDS = 5
"""Folds in which the two kinds are compared."""


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold for a false-positive rate, or the reason why there is none."""

    false_positive_rate: float
    logit: float | None
    """Flag when the logit is strictly above."""

    negatives: int
    """Rows without hallucination that it was set on."""

    reason: str | None = None


def fit_calibration(logits: Floats, labels: NDArray[Any], groups: NDArray[Any], kind: str = "auto") -> Calibration:
    """Probabilities from logits.

    Args:
        logits: (rows,) of rows that the fit did not see.
        labels: (rows,)
        groups: (rows,)
        kind: `platt`, `isotonic`, or `auto` for what `choose_kind` says.

    Raises:
        InvalidOption: no such kind.
    """
    if kind not in KINDS:
        raise InvalidOption(f"calibration is `{kind}`; known are {', '.join(KINDS)}")
    if kind == "auto":
        kind, _ = choose_kind(logits, labels, groups)
    return Calibration(*platt(logits, labels), isotonic(logits, labels) if kind == "isotonic" else ())


def choose_kind(logits: Floats, labels: NDArray[Any], groups: NDArray[Any]) -> tuple[str, str]:
    """`platt` or `isotonic`, and why.

    Isotonic needs 1,000 rows, 200 of each class, and a log loss on rows of other folds that is smaller by more than one
    standard error of the difference, with groups as units.

    Args:
        logits: (rows,) of rows that the fit did not see.
        labels: (rows,)
        groups: (rows,)
    """
    fewest = min(int((labels == 1).sum()), int((labels == 0).sum()))
    if len(labels) < ISOTONIC_ROWS or fewest < ISOTONIC_PER_CLASS:
        return "platt", (
            f"{len(labels)} rows, {fewest} of the rarer class; isotonic needs {ISOTONIC_ROWS} and {ISOTONIC_PER_CLASS}"
        )
    gain = np.zeros(len(labels))  # of isotonic over Platt, in log loss
    for fitted, tested in grouped_folds(labels, groups, COMPARED_FOLDS, seed=0):
        losses = [
            _log_loss(
                fit_calibration(logits[fitted], labels[fitted], groups[fitted], kind), logits[tested], labels[tested]
            )
            for kind in ("platt", "isotonic")
        ]
        gain[tested] = losses[0] - losses[1]
    by_group = np.bincount(np.unique(groups, return_inverse=True)[1], weights=gain - gain.mean())
    error = float(np.sqrt((by_group**2).sum())) / len(gain)
    kind = "isotonic" if gain.mean() > error else "platt"
    return kind, f"out-of-fold log loss of isotonic less than Platt's by {gain.mean():.4f} (standard error {error:.4f})"


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


def isotonic(logits: Floats, labels: NDArray[Any]) -> tuple[tuple[float, float], ...]:
    """The rising curve of least squares, as (logit, probability) knots.

    Args:
        logits: (rows,) out-of-fold.
        labels: (rows,)

    Returns:
        knots with probabilities that keep away from 0 and 1 by what so many rows can't rule out.

    References:
        Zadrozny and Elkan 2002.
    """
    least = 1.0 / (len(labels) + 2)
    model = IsotonicRegression(y_min=least, y_max=1.0 - least).fit(logits, labels == 1)
    return tuple(zip(model.X_thresholds_.tolist(), model.y_thresholds_.tolist(), strict=True))


def operating_points(negatives: Floats, rates: Sequence[float] = RATES) -> tuple[OperatingPoint, ...]:
    """The ceil((n + 1)(1 - rate))-th smallest of n negative logits, for each rate.

    A further negative, exchangeable with these, is then flagged with a probability of at most `rate`.

    Args:
        negatives: (n,) logits of rows without hallucination.
        rates: in (0, 1).
    """
    ordered = np.sort(negatives)
    return tuple(_operating_point(ordered, rate) for rate in rates)


def guaranteed_points(
    logits: Floats, labels: NDArray[Any], groups: NDArray[Any], rates: Sequence[float] = RATES, seed: int = 0
) -> tuple[OperatingPoint, ...]:
    """Operating points that hold for finitely many groups, set on rows that the fit has not seen in any way.

    Rows of a group are not exchangeable with those of another, but groups are. So every group with a negative counts
    once, by one of its negatives, drawn at random: a random negative of a further group is then exchangeable with
    these, and it is flagged with a probability of at most `rate`. (The group's largest would bound the rate at which a
    group has any false alarm, and flag far fewer than promised.)

    Args:
        logits: (rows,) of the final probe, on groups kept apart for this.
        labels: (rows,)
        groups: (rows,)
        rates: in (0, 1).
        seed: of the draw.
    """
    return operating_points(one_per_group(logits[labels == 0], groups[labels == 0], seed), rates)


def one_per_group(values: Floats, groups: NDArray[Any], seed: int) -> Floats:
    """(groups,): of every group the value of one of its rows, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(values))
    _, first = np.unique(groups[order], return_index=True)
    return values[order[first]]


def _operating_point(ordered: Floats, rate: float) -> OperatingPoint:
    count = len(ordered)
    # (n + 1)(1 - rate) in floats may lie a hair above a whole number: 20 * .95 is 19.
    rank = math.ceil(round((count + 1) * (1.0 - rate), 9))
    if rank > count:
        needed = math.ceil(round(1.0 / rate, 9)) - 1
        reason = f"{count} negatives; a promise of {rate:.0%} needs at least {needed}: label more generations"
        return OperatingPoint(rate, None, count, reason)
    return OperatingPoint(rate, float(ordered[rank - 1]), count)


def _log_loss(calibration: Calibration, logits: Floats, labels: NDArray[Any]) -> Floats:
    """(rows,)"""
    said = calibration.probabilities(logits)
    # Platt's sigmoid may round to 0 or 1.
    return -np.log(np.maximum(np.where(labels == 1, said, 1.0 - said), 1e-12))

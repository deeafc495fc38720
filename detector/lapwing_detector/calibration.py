"""From logit to probability: of a whole text, and of one that is still being written. Knows numbers only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Calibration:
    """By Platt's sigmoid, sigmoid(slope * logit + intercept), or isotonic where there are knots."""

    slope: float
    """Not negative; also kept beside knots, as the smooth curve nearest to them."""

    intercept: float
    knots: tuple[tuple[float, float], ...] = ()
    """(logit, probability) of an isotonic calibration, neither ever falling: straight lines between them, and beyond
    the outermost their probability. Empty: Platt's sigmoid."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.slope) and math.isfinite(self.intercept)):
            raise ValueError(f"calibration {self.slope}, {self.intercept} must be finite")
        logits, probabilities = [knot[0] for knot in self.knots], [knot[1] for knot in self.knots]
        if not all(map(math.isfinite, logits)) or not all(0.0 <= value <= 1.0 for value in probabilities):
            raise ValueError("a knot must be a finite logit and a probability in [0, 1]")
        if any(later <= one for one, later in pairwise(logits)) or probabilities != sorted(probabilities):
            raise ValueError("knots must ascend in their logits and never fall in their probabilities")

    def probability(self, logit: float) -> float:
        """In [0, 1]."""
        return float(self.probabilities(np.array([logit]))[0])

    def probabilities(self, logits: NDArray[Any]) -> NDArray[np.float64]:
        """In [0, 1], of the shape of the logits."""
        if self.knots:
            at, known = np.array(self.knots).T
            return np.asarray(np.interp(logits, at, known), dtype=np.float64)
        z = self.slope * np.asarray(logits, dtype=np.float64) + self.intercept
        fallen = np.exp(-np.abs(z))  # of the absolute value, which can't overflow
        return np.asarray(np.where(z >= 0, 1.0, fallen) / (1.0 + fallen))


@dataclass(frozen=True)
class StageCalibration:
    """Platt's sigmoid for the score of a response of which only a part is written."""

    fraction: float
    """Of the response, in (0, 1)."""

    tokens: float
    """Response tokens written by then: the median over the items that it was fitted on."""

    slope: float
    intercept: float

    def __post_init__(self) -> None:
        numbers = (self.fraction, self.tokens, self.slope, self.intercept)
        if not all(map(math.isfinite, numbers)) or not (0.0 < self.fraction < 1.0 and self.tokens >= 0.0):
            raise ValueError(f"stage {numbers}: a fraction in (0, 1), and finite numbers")


def at_stage(whole: Calibration, stages: Sequence[StageCalibration], response_tokens: int) -> Calibration:
    """The calibration of a response that is still being written.

    How long it will become is not known, so its stage is told from the number of tokens that responses usually have
    by then.

    Args:
        whole: of finished responses.
        stages: ascending by fraction; none: finished responses' calibration is all there is.
        response_tokens: written so far.
    """
    if not stages or response_tokens >= stages[-1].tokens / stages[-1].fraction:
        return whole
    reached = [stage for stage in stages if stage.tokens <= response_tokens] or [stages[0]]
    return Calibration(reached[-1].slope, reached[-1].intercept)

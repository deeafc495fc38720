"""One operating point of a probe. Knows numbers only."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """One operating point: flag when the logit is strictly above."""

    false_positive_rate: float
    """The promised rate, such as .05."""

    logit: float
    realised_rate: float | None
    """Rate among the held-out negatives; None where there were none."""

    negatives: int
    """How many negatives set the threshold."""

    def __post_init__(self) -> None:
        if not (0 < self.false_positive_rate < 1 and math.isfinite(self.logit)):
            raise ValueError(f"threshold {self.logit} at rate {self.false_positive_rate}: finite, at a rate in (0, 1)")

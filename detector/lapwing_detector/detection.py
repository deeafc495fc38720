"""What the detector says of one answer: a score, or plainly that it could not look."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np
from numpy.typing import NDArray

DEFAULT_FALSE_POSITIVE_RATE = 0.05
"""The operating point at which `Detection.flagged` is decided unless the caller asks for another."""


class State(StrEnum):
    """Whether there is a score."""

    SCORED = "SCORED"
    UNSCORED = "UNSCORED"


class Reason(StrEnum):
    """Why there is no score."""

    TOO_SHORT = "TOO_SHORT"
    """Fewer tokens than the probe's feature needs, or no response at all."""

    NON_FINITE = "NON_FINITE"
    """The model's attention held NaN or infinities."""

    TRUNCATED = "TRUNCATED"
    """Part of the text did not reach the model."""


@dataclass(frozen=True)
class HeadContribution:
    """How much one head moved the logit."""

    layer: int
    """Index of the layer in the model."""

    head: int
    contribution: float
    """Signed; positive speaks for hallucination."""


@dataclass(frozen=True)
class Detection:
    """The verdict on one prompt and response. It never reads "not hallucinated" when it could not look."""

    state: State
    reason: Reason | None
    """Why it is UNSCORED; None when it is SCORED."""

    message: str
    """The reason in words; empty when SCORED."""

    probability: float | None
    """Calibrated probability that the response is made up, in [0, 1]; None when UNSCORED."""

    logit: float | None
    """The probe's linear score before calibration; None when UNSCORED."""

    bias: float
    """The part of the logit that belongs to no token and no head."""

    flagged: bool | None
    """Whether the score passes the threshold of `false_positive_rate`; None when UNSCORED or none is stored for it."""

    false_positive_rate: float
    """The operating point that was asked for."""

    flagged_at: tuple[float, ...]
    """Every stored operating point whose threshold is passed, strictest first."""

    probe_name: str
    probe_revision: str

    prompt_tokens: int
    response_tokens: int
    token_ids: tuple[int, ...]
    """Prompt and response as the model read them, without the end-of-sequence token."""

    token_contributions: NDArray[np.float32] = field(repr=False)
    """(tokens,): signed share of each token in the logit; their sum is logit - bias. Empty when UNSCORED."""

    head_contributions: tuple[HeadContribution, ...] = field(repr=False)
    """Every head that the probe reads, strongest first; their sum is logit - bias."""

    seconds: Mapping[str, float] = field(repr=False)
    """Wall time by stage: `tokenise`, `forward` (of the whole batch that it was read in), `probe`."""

    heads_contribution: float = 0.0
    """What all heads together add to the logit: the sum of `head_contributions`."""

    statistic_contributions: Mapping[str, float] = field(default_factory=dict, repr=False)
    """What each statistic of the log-probabilities adds to the logit, by its name; empty without such statistics."""

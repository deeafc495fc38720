"""What comes of writing an answer: each token with the score of all that stands so far, and the whole at the end."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lapwing_detector.detection import Detection


@dataclass(frozen=True)
class GeneratedToken:
    """One token of the answer and the running score."""

    index: int
    """Place in the answer, from 0."""

    token_id: int
    text: str
    """What this token adds to the text; empty while a character is incomplete, or while a stop string may begin."""

    log_probability: float
    """Natural logarithm, of the model's own distribution (temperature 1)."""

    probability: float | None
    """Running probability that the answer so far is made up; None while it is too short to score, and where it was not
    to be scored."""

    logit: float | None
    token_contributions: NDArray[np.float32] | None = field(default=None, repr=False)
    """(tokens of prompt and answer so far,): the share of each in the logit; None where there is no logit, or they
    were not asked for."""


@dataclass(frozen=True)
class Generation:
    """A finished answer."""

    text: str
    prompt_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    """Of the answer, without the end-of-sequence token."""

    finish_reason: str
    """`stop`: the model ended by itself; `length`: it reached the limit; `stop_string`: one appeared in the text;
    `flagged`: the running probability rose above `stop_when_probability_above`."""

    detection: Detection

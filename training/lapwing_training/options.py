"""What the options of several steps share: the features by name, and what every feature list and seed must keep."""

from __future__ import annotations

from collections.abc import Sequence

from lapwing_detector.features import FEATURES
from lapwing_training.errors import InvalidOption

ATTENTION_SCORE, LAPLACIAN = "attention_score.v1", "laplacian_eigenvalues.v1"
"""The two features that are compared everywhere; the second is what a probe reads unless it is told otherwise."""

SINK = "sink_scores.v1"
"""What the recipe `sink` reads."""

SEEDS = 1 << 31
"""Seeds lie below this: NumPy, scikit-learn and torch all take them, also after a few were counted on."""


def require_features(names: Sequence[str]) -> None:
    """At least one, all known, each once.

    Raises:
        InvalidOption: they are not.
    """
    known = ", ".join(FEATURES)
    if not names:
        raise InvalidOption(f"features is empty; name at least one of {known}")
    for name in names:
        if name not in FEATURES:
            raise InvalidOption(f"feature is `{name}`; known are {known}")
    if len(set(names)) < len(names):
        raise InvalidOption(f"features are {', '.join(names)}; name each once")


def require_seed(seed: int) -> None:
    """A seed that every library takes.

    Raises:
        InvalidOption: it is none.
    """
    if not 0 <= seed < SEEDS:
        raise InvalidOption(f"seed is {seed}; expected a whole number from 0 to {SEEDS - 1}")


def require_resamples(resamples: int) -> None:
    """At least one resample, since intervals are taken from them.

    Raises:
        InvalidOption: there is none.
    """
    if resamples < 1:
        raise InvalidOption(f"resamples is {resamples}; it must be at least 1, such as 1000")

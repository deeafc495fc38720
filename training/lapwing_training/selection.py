"""How many heads, and which: significance is hygiene, effect size ranks, cross-validation decides. Arrays only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.significance import Floats, head_significance

LEVEL = 0.05
"""Heads with a q-value below this may be selected."""

MOST_HEADS = 256
"""Beyond this a probe is not a selection any more, and the inner fits become slow."""


@dataclass(frozen=True)
class Ranking:
    """Heads that may be selected."""

    heads: NDArray[np.int64]
    """(candidates,) flat head indices, strongest first."""

    significant: int
    """How many had q < .05. None: all heads are candidates, so that there is a probe to look at, and a warning."""


def rank_heads(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any]) -> Ranking:
    """Significant heads by |AUROC - .5|, strongest first.

    With several features a head counts when any of them is significant, with q-values over all heads of that feature
    (those of the heatmaps), and is as strong as its strongest feature.

    Args:
        scalars: (rows, features, layers, heads), training rows only.
        labels: (rows,)
        groups: (rows,)
    """
    flat = scalars.reshape(*scalars.shape[:2], -1)  # (rows, features, heads)
    tested = [head_significance(flat[:, feature], labels, groups) for feature in range(flat.shape[1])]
    strength = np.max([np.abs(one.auroc - 0.5) for one in tested], axis=0)  # (heads,)
    significant = np.any([one.q_value < LEVEL for one in tested], axis=0)
    order = np.argsort(-strength, kind="stable")
    chosen = order[significant[order]] if significant.any() else order
    return Ranking(chosen.astype(np.int64), int(significant.sum()))


def head_counts(heads: int) -> tuple[int, ...]:
    """Numbers of heads that are tried: powers of two, and all of them when they are few."""
    most = min(heads, MOST_HEADS)
    powers = [2**exponent for exponent in range(most.bit_length()) if 2**exponent < most]
    return (*powers, most)


def one_standard_error(scores: Floats) -> int:
    """The first candidate that is no worse than the best by more than the best's standard error.

    Args:
        scores: (folds, candidates), higher is better, candidates from the simplest on.

    References:
        Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.
    """
    mean = scores.mean(axis=0)
    best = int(mean.argmax())
    error = scores[:, best].std(ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return int(np.flatnonzero(mean >= mean[best] - error)[0])

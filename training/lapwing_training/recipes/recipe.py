"""What a recipe is, and how it decides between candidates. Knows no recipe by name."""

from __future__ import annotations

from typing import Protocol

import numpy as np

from lapwing_training.recipes.linear_probe import LinearProbe
from lapwing_training.statistics.significance import Floats
from lapwing_training.store.table import Table

INNER_FOLDS = 5
"""Folds of the training rows inside which a recipe chooses."""


class Recipe(Protocol):
    """A way to fit."""

    @property
    def name(self) -> str:
        """As on the command line."""
        ...

    @property
    def features(self) -> tuple[str, ...]:
        """Ids of the features that it reads."""
        ...

    def fit(self, table: Table, seed: int) -> LinearProbe:
        """Fit on all rows of the table, which are training rows."""
        ...


def simplest(scores: Floats) -> int:
    """The first candidate that falls short of the best by no more than one standard error of the shortfall.

    All candidates are scored on the same folds. What makes a fold easy or hard for all of them is no doubt about which
    of them is better, and leaving it in would take any candidate within what a few hundred rows scatter.

    Args:
        scores: (folds, candidates), higher is better, candidates from the simplest on.

    References:
        Breiman et al., Classification and Regression Trees, 1984, section 3.4.3, with the error of the difference.
    """
    short = scores[:, [scores.mean(axis=0).argmax()]] - scores
    error = short.std(axis=0, ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else np.zeros(scores.shape[1])
    return int(np.flatnonzero(short.mean(axis=0) <= error)[0])

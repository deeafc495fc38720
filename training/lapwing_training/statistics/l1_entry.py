"""In which order columns enter an L1 logistic regression while its penalty falls. Knows arrays only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit
from sklearn.linear_model import Lasso

from lapwing_training.recipes.linear_probe import standardiser
from lapwing_training.statistics.ranks import Floats

PENALTIES = 1.0 / 2.0 ** np.arange(0.2, 6.1, 0.2)
"""As shares of the smallest penalty that keeps every column out."""

STEP = 0.87
"""A penalty is approached by steps of at least this ratio: beyond, the strong rule leaves hardly a column out."""

ROUNDS = 20
"""Quadratic approximations at one penalty, at most; from the neighbour's solution two or three do."""

SETTLED = 1e-3
"""A logit that moves less than this changes the order of entry no more."""


@dataclass
class L1Path:
    """A balanced L1 logistic regression that goes down its path; each solution starts from the one before.

    References:
        Friedman, Hastie and Tibshirani 2010 (quadratic approximations); Tibshirani et al. 2012 (the strong rule).
    """

    columns: Floats
    """(rows, columns) standardised."""

    labels: NDArray[np.bool_]
    """(rows,)"""

    def __post_init__(self) -> None:
        share = self.labels.mean()
        self.weights = np.where(self.labels, 0.5 / share, 0.5 / (1.0 - share))  # (rows,) of mean 1
        self.coefficients = np.zeros(self.columns.shape[1])
        self.logits = np.zeros(len(self.labels))  # balanced: without columns the intercept is 0
        self.gradient = self._gradient()
        self.penalty = float(np.abs(self.gradient).max())

    def solve(self, penalty: float) -> None:
        """Go on to a smaller penalty on the mean loss."""
        steps = max(1, math.ceil(math.log(penalty / self.penalty) / math.log(STEP)))
        for step in np.geomspace(self.penalty, penalty, steps + 1)[1:]:
            self._step(float(step))

    def _step(self, penalty: float) -> None:
        # Few columns can enter between two penalties; whatever was wrongly left out shows in the gradient and is added.
        kept = (np.abs(self.gradient) >= 2.0 * penalty - self.penalty) | (self.coefficients != 0.0)
        for _ in range(ROUNDS):
            moved = self._approximate(penalty, kept)
            self.gradient = self._gradient()
            missing = ~kept & (np.abs(self.gradient) > penalty)
            kept |= missing
            if moved < SETTLED and not missing.any():
                break
        self.penalty = penalty

    def _approximate(self, penalty: float, kept: NDArray[np.bool_]) -> float:
        """One quadratic approximation, solved as a Lasso over some columns; how far the logits moved."""
        said = expit(self.logits)
        curvature = np.maximum(said * (1.0 - said), 1e-5)
        importance = self.weights * curvature
        target = self.logits + (self.labels - said) / curvature
        lasso = Lasso(
            alpha=penalty / importance.mean(),
            precompute=bool(kept.sum() <= len(target)),  # else their products are more than they are
            copy_X=False,  # they are a copy
            max_iter=5000,
        )
        lasso.fit(self.columns[:, kept], target, sample_weight=importance)
        entered = np.flatnonzero(kept)[lasso.coef_ != 0.0]
        logits = self.columns[:, entered] @ lasso.coef_[lasso.coef_ != 0.0] + lasso.intercept_
        moved = float(np.abs(logits - self.logits).max())
        self.coefficients[kept], self.logits = lasso.coef_, logits
        return moved

    def _gradient(self) -> Floats:
        pull = self.weights * (self.labels - expit(self.logits))
        # In the columns' precision: another would copy them all.
        return np.asarray(pull.astype(self.columns.dtype) @ self.columns, dtype=np.float64) / len(pull)


def entry_order(columns: Floats, labels: NDArray[Any], most: int) -> NDArray[np.int64]:
    """Columns in the order in which they enter; those that stay out are absent.

    Of columns that enter between the same two penalties the one with the larger coefficient comes first. The path ends
    when enough have entered, also when they are as many as a quarter of the rows: then little is left to be explained.

    Args:
        columns: (rows, columns)
        labels: (rows,) 1 hallucinated, 0 not; both are there.
        most: how many are enough.

    Returns:
        (entered,)
    """
    mean, scale = standardiser(columns)
    path = L1Path((columns - mean) / scale, labels == 1)
    entered: list[int] = []
    largest = path.penalty
    if largest < 1e-12:  # no column varies
        return np.array(entered, dtype=np.int64)
    for share in PENALTIES:
        if len(entered) >= min(most, max(1, len(labels) // 4)):
            break
        path.solve(share * largest)
        fresh = np.flatnonzero(path.coefficients)
        fresh = fresh[~np.isin(fresh, entered)]
        entered += fresh[np.argsort(-np.abs(path.coefficients[fresh]), kind="stable")].tolist()
    return np.array(entered, dtype=np.int64)

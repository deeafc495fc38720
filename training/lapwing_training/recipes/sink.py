"""SinkProbe's recipe: sink scores of all heads, logistic regression with an L1 penalty that leaves few of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.recipes.linear_probe import (
    LinearProbe,
    columns_of,
    fold,
    mask_of,
    precise,
    standardise,
    standardiser,
)
from lapwing_training.recipes.recipe import INNER_FOLDS, simplest
from lapwing_training.statistics.l1_entry import L1Path
from lapwing_training.statistics.metrics import auroc_of
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import Fold, grouped_folds
from lapwing_training.store.table import Table

SHARES = (0.7, 0.5, 0.35, 0.25, 0.18, 0.125, 0.09, 0.06, 0.03, 0.015)
"""Penalties that are tried, as shares of the smallest that leaves no head: those that leave the fewest first."""


@dataclass(frozen=True)
class SinkRecipe:
    """Standardised top-k sink scores of all heads, L1; the heads with a weight that is not zero are selected.

    References:
        Binkowski et al., SinkProbe, ICML 2026.
    """

    features: tuple[str, ...]
    k: int
    share: float | None = None
    """One of `SHARES`, given or chosen by grouped cross-validation."""

    name = "sink"

    def fit(self, table: Table, seed: int) -> LinearProbe:
        """Choose the penalty, then fit on all rows.

        Raises:
            NotEnoughData: too few groups for the folds.
            InvalidOption: a feature or a k that the store does not hold.
        """
        share = self.choose(table, seed) if self.share is None else self.share
        columns, mean, scale = self._standardised(table)
        penalty, weights = next((one[1], one[2]) for one in l1_fits(columns, table.labels) if one[0] == share)
        shape = (*table.shape, len(weights) // (table.shape[0] * table.shape[1]))
        heads = np.arange(shape[0] * shape[1])
        folded, bias = fold(weights / scale, 0.0, mean, shape, heads)
        selected = np.flatnonzero(folded.reshape(len(heads), -1).any(axis=1))
        chosen: dict[str, Any] = {"heads": len(selected), "C": _strength(penalty, len(table)), "k": self.k}
        chosen["selection"] = "l1"
        return LinearProbe(self.features, self.k, folded, bias, mask_of(selected, shape), chosen).on_unit_scale(table)

    def choose(self, table: Table, seed: int) -> float:
        """The strongest penalty whose AUROC in inner folds is as good as the best, by one standard error."""
        folds = grouped_folds(table.labels, table.groups, INNER_FOLDS, seed)
        return SHARES[simplest(np.array([self._inner_scores(table, rows) for rows in folds]))]

    def _inner_scores(self, table: Table, rows: Fold) -> list[float]:
        fitted, tested = table.take(rows[0]), table.take(rows[1])
        columns, mean, scale = self._standardised(fitted)
        unseen = standardise(precise(self._columns(tested)), mean, scale)
        return [auroc_of(unseen @ weights, tested.labels) for _, _, weights in l1_fits(columns, fitted.labels)]

    def _columns(self, table: Table) -> NDArray[np.float32]:
        return columns_of(table, self.features, self.k, np.arange(table.shape[0] * table.shape[1]))

    def _standardised(self, table: Table) -> tuple[NDArray[Any], Floats, Floats]:
        columns = precise(self._columns(table))
        mean, scale = standardiser(columns)
        return standardise(columns, mean, scale), mean, scale


def l1_fits(columns: NDArray[Any], labels: NDArray[Any]) -> Iterator[tuple[float, float, Floats]]:
    """For each of `SHARES` the share, the penalty on the mean balanced loss and the weights (columns,).

    The intercept is left out: the logits are put on a scale of their own anyhow.

    Args:
        columns: (rows, columns) standardised.
        labels: (rows,)
    """
    path = L1Path(columns, labels == 1)
    largest = path.penalty
    for share in SHARES:
        if largest > 1e-12:  # else no column varies
            path.solve(share * largest)
        yield share, share * largest, path.coefficients.copy()


def _strength(penalty: float, rows: int) -> float | None:
    """scikit-learn's `C` of this penalty; None where no column varies."""
    return 1.0 / (penalty * rows) if penalty > 0.0 else None

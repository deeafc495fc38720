"""The published recipe: all heads, PCA without scaling, logistic regression."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from lapwing_detector.features import FEATURES
from lapwing_training.recipes.linear_probe import LinearProbe, columns_of, fold, mask_of, precise
from lapwing_training.recipes.recipe import INNER_FOLDS
from lapwing_training.statistics.metrics import auroc_of
from lapwing_training.statistics.splits import Fold, grouped_folds
from lapwing_training.store.table import Table

PAPER_COMPONENTS = 512
PAPER_SEED = 42
PAPER_K = (5, 10, 25, 50, 100)

CHOICE_NUMBERS = 100_000_000
"""k is chosen on whole groups of rows that hold no more values than this together: on all of them for small models."""


@dataclass(frozen=True)
class PaperRecipe:
    """All heads, PCA without scaling, logistic regression.

    References:
        Binkowski et al., EMNLP 2025. The published k is the best on the test rows; ours is chosen inside.
    """

    features: tuple[str, ...]
    k: int | None = None
    """Given, or chosen by grouped cross-validation from the published grid."""

    name = "paper"

    def fit(self, table: Table, seed: int) -> LinearProbe:
        """Choose k, then fit on all rows.

        Raises:
            NotEnoughData: too few groups for the folds.
            InvalidOption: a feature or a k that the store does not hold.
        """
        k = self.k if self.k is not None else self.choose(table, seed)
        heads = np.arange(table.shape[0] * table.shape[1])
        columns = precise(columns_of(table, self.features, k, heads))
        shape = (*table.shape, columns.shape[1] // len(heads))
        pca, model = paper_classifier(columns, table.labels, copy=False)
        del columns  # centred in place: of no more use
        # Projection and classifier are one linear map.
        weights = model.coef_[0].astype(np.float64) @ pca.components_
        folded, bias = fold(weights, float(model.intercept_[0]), pca.mean_.astype(np.float64), shape, heads)
        chosen = {"heads": len(heads), "C": 1.0, "k": k, "components": int(pca.n_components_)}
        return LinearProbe(self.features, k, folded, bias, mask_of(heads, shape), chosen).on_unit_scale(table)

    def choose(self, table: Table, seed: int) -> int:
        """The k of the best mean AUROC over inner folds."""
        grid = [k for k in PAPER_K if k <= table.k] or [table.k]
        if len(grid) == 1 or not any(FEATURES[name].ranked for name in self.features):
            return grid[-1]
        some = some_groups(table, CHOICE_NUMBERS // (table.shape[0] * table.shape[1] * grid[-1]), seed)
        folds = grouped_folds(some.labels, some.groups, INNER_FOLDS, seed)
        scores = [np.mean([self._inner_score(some, k, rows, seed) for rows in folds]) for k in grid]
        return grid[int(np.argmax(scores))]

    def _inner_score(self, table: Table, k: int, rows: Fold, seed: int) -> float:
        fitted, tested = table.take(rows[0]), table.take(rows[1])
        probe = replace(self, k=k).fit(fitted, seed)
        return auroc_of(probe.logit(tested), tested.labels)


def paper_classifier(columns: NDArray[Any], labels: NDArray[Any], copy: bool = True) -> tuple[PCA, LogisticRegression]:
    """PCA and classifier with the published settings.

    Args:
        columns: (rows, columns)
        labels: (rows,)
        copy: False: the columns are centred in place and are of no use afterwards.
    """
    pca = PCA(n_components=min(PAPER_COMPONENTS, *columns.shape), random_state=PAPER_SEED, copy=copy)
    model = LogisticRegression(max_iter=2000, class_weight="balanced", random_state=PAPER_SEED)
    model.fit(pca.fit_transform(columns), labels)
    return pca, model


def some_groups(table: Table, rows: int, seed: int) -> Table:
    """Whole groups, drawn at random until there are about so many rows; all of them where there are no more."""
    if len(table) <= rows:
        return table
    names, codes = np.unique(table.groups, return_inverse=True)
    order = np.random.default_rng(seed).permutation(len(names))
    filled = np.cumsum(np.bincount(codes)[order])
    drawn = order[: max(1, int(np.searchsorted(filled, rows, side="right")))]
    return table.take(np.flatnonzero(np.isin(codes, drawn)))

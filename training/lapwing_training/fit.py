"""Recipes: from training rows to one linear map over all heads. Whatever is chosen is chosen inside `fit`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import LinAlgError, cho_factor, cho_solve
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression

from lapwing_detector.features import FEATURES
from lapwing_training.errors import InvalidOption
from lapwing_training.metrics import auroc_of
from lapwing_training.options import require_features
from lapwing_training.progress import Advance, silent
from lapwing_training.selection import head_counts, one_standard_error, rank_heads
from lapwing_training.significance import Floats
from lapwing_training.splits import Fold, grouped_folds
from lapwing_training.table import Table

INNER_FOLDS = 5
STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Inverse L2 penalties (`C`) that are tried, the simplest first."""

SCALE_FLOOR = 1e-4
"""A number that varies less than this is not blown up to unit variance: two devices agree to about 1e-6 in it."""

PAPER_COMPONENTS = 512
PAPER_SEED = 42
PAPER_K = (5, 10, 25, 50, 100)


@dataclass(frozen=True)
class LinearProbe:
    """A fitted linear map over all heads, and how it came about."""

    features: tuple[str, ...]
    k: int
    weights: NDArray[np.float32]
    """(layers, heads, width) in the order of `features`; zero for heads that were not selected."""

    bias: float
    selected: NDArray[np.bool_]
    """(layers, heads)"""

    chosen: Mapping[str, Any]
    """What was chosen inside, for the record."""

    def on_unit_scale(self, fitted: Table) -> LinearProbe:
        """The same ranking, its logits of mean 0 and standard deviation 1 over the rows that it was fitted on.

        How far the logits of a regression spread is decided by its C, and that differs from fold to fold. On one scale,
        what is set on out-of-fold logits (thresholds, calibration, the combination) holds for the final probe: in
        simulation a promise of 10 % came out at 7 to 17 % instead of 0 to 44 %. The regression's own decision function
        is `logit * chosen["logit_scale"] + chosen["logit_centre"]`.
        """
        raw = self.logit(fitted)
        scale = float(raw.std())
        scale = scale if scale > 1e-9 else 1.0  # no spread but rounding: all weights are about zero
        scaled = replace(self, weights=(self.weights / scale).astype(np.float32), bias=0.0)
        # From the rounded weights, so that the mean is 0 whatever was rounded.
        bias = -float(scaled.logit(fitted).mean())
        record = {**self.chosen, "logit_scale": scale, "logit_centre": float(raw.mean())}
        return replace(scaled, bias=bias, chosen=record)

    def logit(self, table: Table) -> Floats:
        """(rows,) before calibration; positive speaks for hallucination."""
        values = table.stacked(self.features, self.k)
        heads = np.flatnonzero(self.selected)
        flat = values.reshape(len(table), self.selected.size, -1)[:, heads].astype(np.float64)
        weights = self.weights.reshape(self.selected.size, -1)[heads].astype(np.float64)
        return np.asarray(np.einsum("nhw,hw->n", flat, weights)) + self.bias


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


@dataclass(frozen=True)
class LapwingRecipe:
    """Standardised features of selected heads, logistic regression with an L2 penalty."""

    features: tuple[str, ...]
    k: int
    heads: NDArray[np.int64] | None = None
    """Flat indices of heads that are given instead of selected, for controls."""

    strength: float | None = None
    """`C` that is given instead of chosen."""

    name = "lapwing"

    def fit(self, table: Table, seed: int) -> LinearProbe:
        """Rank the heads, choose their number and C by grouped cross-validation, fit.

        Raises:
            NotEnoughData: too few groups for the folds.
        """
        ranking = rank_heads(table.scalars(self.features, self.k), table.labels, table.groups)
        if self.heads is not None and self.strength is not None:
            return self.fit_chosen(table, self.heads, self.strength, ranking.significant)
        count, strength = self.choose(table, seed)
        heads = ranking.heads[:count] if self.heads is None else self.heads
        return self.fit_chosen(table, heads, self.strength or strength, ranking.significant)

    def choose(self, table: Table, seed: int) -> tuple[int, float]:
        """Number of heads and C by the AUROC of inner folds; heads are ranked anew inside each."""
        folds = grouped_folds(table.labels, table.groups, INNER_FOLDS, seed)
        layers, heads = table.shape
        counts = head_counts(layers * heads) if self.heads is None else (len(self.heads),)
        scores = np.stack([self._inner_scores(table, fold, counts) for fold in folds])  # (folds, counts, C)
        best = scores.mean(axis=0).argmax(axis=1)  # (counts,): the best C of each
        curve = scores[:, np.arange(len(counts)), best]  # (folds, counts)
        chosen = one_standard_error(curve)
        return counts[chosen], STRENGTHS[best[chosen]]

    def fit_chosen(
        self, table: Table, heads: NDArray[np.int64], strength: float, significant: int | None = None
    ) -> LinearProbe:
        """The fit itself, once heads and C are known."""
        columns, shape = self._columns(table, heads)
        mean, scale = standardiser(columns)
        model = LogisticRegression(C=strength, class_weight="balanced", max_iter=2000)
        model.fit((columns - mean) / scale, table.labels)
        folded, bias = fold(model.coef_[0] / scale, float(model.intercept_[0]), mean, shape, heads)
        chosen = {"heads": len(heads), "C": strength, "k": self.k, "significant_heads": significant}
        probe = LinearProbe(self.features, self.k, folded, bias, mask_of(heads, shape), chosen)
        return probe.on_unit_scale(table)

    def _inner_scores(self, table: Table, rows: Fold, counts: Sequence[int]) -> Floats:
        fitted, tested = table.take(rows[0]), table.take(rows[1])
        heads = self.heads
        if heads is None:
            ranking = rank_heads(fitted.scalars(self.features, self.k), fitted.labels, fitted.groups)
            heads = ranking.heads[: max(counts)]
        columns, shape = self._columns(fitted, heads)
        mean, scale = standardiser(columns)
        sizes = [min(count, len(heads)) * shape[2] for count in counts]
        logits = first_newton_steps(
            (columns - mean) / scale, fitted.labels, (self._columns(tested, heads)[0] - mean) / scale, sizes
        )
        return np.array([[auroc_of(logit, tested.labels) for logit in by_strength] for by_strength in logits])

    def _columns(self, table: Table, heads: NDArray[np.int64]) -> tuple[Floats, tuple[int, int, int]]:
        """(rows, heads * width), head by head in the given order; and the shape (layers, heads, width)."""
        values = table.stacked(self.features, self.k)
        rows, layers, per_layer, width = values.shape
        flat = values.reshape(rows, layers * per_layer, width)[:, heads]
        return flat.reshape(rows, -1).astype(np.float64), (layers, per_layer, width)


@dataclass(frozen=True)
class PaperRecipe:
    """All heads, PCA without scaling, logistic regression: the published recipe.

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
        """
        k = self.k if self.k is not None else self.choose(table, seed)
        values = table.stacked(self.features, k)
        shape = (values.shape[1], values.shape[2], values.shape[3])
        columns = values.reshape(len(table), -1).astype(np.float64)
        pca, model = paper_classifier(columns, table.labels)
        heads = np.arange(shape[0] * shape[1])
        # Projection and classifier are one linear map.
        folded, bias = fold(model.coef_[0] @ pca.components_, float(model.intercept_[0]), pca.mean_, shape, heads)
        chosen = {"heads": len(heads), "C": 1.0, "k": k, "components": int(pca.n_components_)}
        return LinearProbe(self.features, k, folded, bias, mask_of(heads, shape), chosen).on_unit_scale(table)

    def choose(self, table: Table, seed: int) -> int:
        """The k of the best mean AUROC over inner folds."""
        grid = [k for k in PAPER_K if k <= table.k] or [table.k]
        if len(grid) == 1 or not any(FEATURES[name].ranked for name in self.features):
            return grid[-1]
        folds = grouped_folds(table.labels, table.groups, INNER_FOLDS, seed)
        scores = [np.mean([self._inner_score(table, k, rows, seed) for rows in folds]) for k in grid]
        return grid[int(np.argmax(scores))]

    def _inner_score(self, table: Table, k: int, rows: Fold, seed: int) -> float:
        fitted, tested = table.take(rows[0]), table.take(rows[1])
        probe = replace(self, k=k).fit(fitted, seed)
        return auroc_of(probe.logit(tested), tested.labels)


RECIPES = ("lapwing", "paper")


def make_recipe(name: str, features: Sequence[str], k: int | None, stored_k: int) -> Recipe:
    """A recipe by its name.

    Raises:
        InvalidOption: no such recipe or feature.
    """
    require_features(features)
    if name == "lapwing":
        return LapwingRecipe(tuple(features), stored_k if k is None else k)
    if name == "paper":
        return PaperRecipe(tuple(features), k)
    raise InvalidOption(f"recipe is `{name}`; known recipes: {', '.join(RECIPES)}")


def paper_classifier(columns: Floats, labels: NDArray[Any]) -> tuple[PCA, LogisticRegression]:
    """PCA and classifier with the published settings."""
    pca = PCA(n_components=min(PAPER_COMPONENTS, *columns.shape), random_state=PAPER_SEED)
    model = LogisticRegression(max_iter=2000, class_weight="balanced", random_state=PAPER_SEED)
    model.fit(pca.fit_transform(columns), labels)
    return pca, model


def standardiser(columns: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each column, the latter not below the floor."""
    return columns.mean(axis=0), np.maximum(columns.std(axis=0), SCALE_FLOOR)


def first_newton_steps(
    columns: Floats, labels: NDArray[Any], tested: Floats, sizes: Sequence[int]
) -> list[list[Floats]]:
    """Logits of the first Newton step from zero of balanced logistic regressions, for nested sets of columns.

    For signals as weak as a head's the step ranks as the full fit does, and one Gram matrix serves all sizes and
    strengths. It only decides among them; the probe itself is fitted to the end.

    Args:
        columns: (rows, columns) standardised.
        labels: (rows,)
        tested: (tested rows, columns)
        sizes: how many leading columns each fit has.

    Returns:
        for each size and each of `STRENGTHS`, (tested rows,)
    """
    weight = np.where(labels == 1, 0.5 / (labels == 1).mean(), 0.5 / (labels == 0).mean())
    # Balanced weights put the gradient of the intercept at zero; centring by them decouples it in the Hessian, too.
    centre = weight @ columns / weight.sum()
    centred, tested = columns - centre, tested - centre
    gradient = centred.T @ (weight * (labels - 0.5))  # (columns,)
    hessian = (centred * (0.25 * weight)[:, None]).T @ centred  # (columns, columns)
    return [
        [tested[:, :size] @ _penalised(hessian[:size, :size], gradient[:size], strength) for strength in STRENGTHS]
        for size in sizes
    ]


def _penalised(hessian: Floats, gradient: Floats, strength: float) -> Floats:
    try:
        factor = cho_factor(hessian + np.eye(len(gradient)) / strength, overwrite_a=True, check_finite=False)
    except LinAlgError:
        return np.asarray(np.linalg.lstsq(hessian, gradient, rcond=None)[0])
    return np.asarray(cho_solve(factor, gradient, check_finite=False))


def fold(
    weights: Floats, intercept: float, mean: Floats, shape: tuple[int, int, int], heads: NDArray[np.int64]
) -> tuple[NDArray[np.float32], float]:
    """Weights that act on the plain values of all heads, and their bias.

    Args:
        weights: (heads * width,) acting on values less their mean.
        intercept: of the fit.
        mean: (heads * width,)
        shape: layers, heads per layer, width.
        heads: flat indices of the heads that have weights.

    Returns:
        (layers, heads, width), zero for all other heads, and the bias.
    """
    layers, per_layer, width = shape
    folded = np.zeros((layers * per_layer, width), dtype=np.float32)
    folded[heads] = weights.reshape(len(heads), width)
    # From the rounded weights, so that rounding acts on the distance from the mean and not on the values.
    bias = intercept - float(folded[heads].astype(np.float64).ravel() @ mean)
    return folded.reshape(shape), bias


def mask_of(heads: NDArray[np.int64], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    """(layers, heads) true for these flat indices."""
    mask = np.zeros(shape[0] * shape[1], dtype=bool)
    mask[heads] = True
    return mask.reshape(shape[:2])


def out_of_fold_logits(recipe: Recipe, table: Table, folds: int, seed: int, advance: Advance = silent) -> Floats:
    """(rows,) logits from probes that never saw the row's group; everything is chosen anew inside each fold."""
    logits = np.full(len(table), np.nan)
    for fitted, tested in grouped_folds(table.labels, table.groups, folds, seed):
        logits[tested] = recipe.fit(table.take(fitted), seed).logit(table.take(tested))
        advance()
    return logits

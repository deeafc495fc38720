"""The default recipe: standardised features of selected heads, logistic regression with an L2 penalty.

The same with statistics of the response's token log-probabilities beside the heads is the recipe `combined`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from lapwing_detector.features import FEATURES
from lapwing_training.errors import InvalidOption
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
from lapwing_training.statistics.metrics import auroc_of
from lapwing_training.statistics.newton import STRENGTHS, first_newton_steps
from lapwing_training.statistics.selection import Ranking, head_counts, rank_heads
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import Fold, grouped_folds
from lapwing_training.store.table import Table

KS = (5, 10, 25, 50)
"""Values per head that are tried beside all that the store holds."""

MOST_COLUMNS = 2048
"""No more heads are tried than have so many values together: beyond, a fit that chooses takes minutes."""


FREEDOM = 10.0
"""A statistic of log-probabilities may weigh so many times what a head's feature may for the same penalty: it stands
alone against many heads, and would be shrunk with them."""


@dataclass(frozen=True, order=True)
class Choice:
    """What a fit is to be made with; in the order of simplicity, fewest heads first."""

    count: int
    k: int
    strength: float


@dataclass(frozen=True)
class LapwingRecipe:
    """Heads by rank, their values standardised, an L2 penalty; what is not given is chosen inside."""

    features: tuple[str, ...]
    k: int | None = None
    """Values per head of a ranked feature."""

    selection: str = "fdr"
    """How heads are ranked: a key of `selection.SELECTIONS`."""

    heads: NDArray[np.int64] | None = None
    """Flat indices of heads that are given instead of selected, for controls."""

    strength: float | None = None
    """`C`."""

    count: int | None = None
    """Number of heads; where the selection leaves fewer, others follow by effect."""

    statistics: tuple[str, ...] = ()
    """Ids of statistics of the log-probabilities that are read, too; heads are ranked without regard to them."""

    @property
    def name(self) -> str:
        """`combined` where more than attention is read."""
        return "combined" if self.statistics else "lapwing"

    def fit(self, table: Table, seed: int) -> LinearProbe:
        """Choose k, the number of heads and C by grouped cross-validation, rank the heads of all rows, fit.

        Raises:
            NotEnoughData: too few groups for the folds.
            InvalidOption: a feature, a k or a selection that there is not, more heads than there are, or statistics
                of which the table holds none.
        """
        choice = self.choose(table, seed)
        given = replace(self, k=choice.k)
        if self.heads is not None:
            return given.fit_chosen(table, self.heads, choice.strength)
        ranking = given.rank(table, table.scalars(self.features, choice.k), seed)
        probe = given.fit_chosen(table, ranking.heads[: choice.count], choice.strength, ranking.significant)
        frequency = None if ranking.frequency is None else ranking.frequency.reshape(table.shape)
        return replace(probe, frequency=frequency)

    def choose(self, table: Table, seed: int) -> Choice:
        """The simplest choice whose AUROC in inner folds is as good as the best; heads are ranked anew inside each."""
        choices = self.choices(table)
        if len(choices) == 1:
            return choices[0]
        folds = grouped_folds(table.labels, table.groups, INNER_FOLDS, seed)
        scores: dict[Choice, list[float]] = {choice: [] for choice in choices}
        for k in sorted({choice.k for choice in choices}):
            recipe, of_k = replace(self, k=k), [choice for choice in choices if choice.k == k]
            scalars = table.scalars(self.features, k) if self.heads is None else None
            for rows in folds:
                for choice, score in recipe.inner_scores(table, rows, of_k, scalars, seed).items():
                    scores[choice].append(score)
        return choices[simplest(np.array([scores[choice] for choice in choices]).T)]

    def choices(self, table: Table) -> list[Choice]:
        """All that is tried, the simplest first."""
        strengths = STRENGTHS if self.strength is None else (self.strength,)
        return sorted(
            Choice(count, k, strength)
            for k in self.ks(table)
            for count in self.counts(table, k)
            for strength in strengths
        )

    def ks(self, table: Table) -> tuple[int, ...]:
        """The k that are tried: those of the grid that the store holds, and all that it holds."""
        if self.k is not None:
            return (self.k,)
        if not any(FEATURES[name].ranked for name in self.features):
            return (table.k,)
        return (*(k for k in KS if k < table.k), table.k)

    def counts(self, table: Table, k: int) -> tuple[int, ...]:
        """The numbers of heads that are tried."""
        layers, heads = table.shape
        if self.heads is not None:
            return (len(self.heads),)
        if self.count is not None:
            if self.count > layers * heads:
                raise InvalidOption(f"heads is {self.count}; the store holds {layers * heads}: give at most as many")
            return (self.count,)
        if self.selection == "all":
            return (layers * heads,)
        width = replace(self, k=k).width
        counts = head_counts(layers * heads)
        return tuple(count for count in counts if count * width <= MOST_COLUMNS) or counts[:1]

    def rank(self, table: Table, scalars: Floats, seed: int) -> Ranking:
        """The heads by the recipe's selection; (rows, features, layers, heads) of the table's rows."""
        return rank_heads(scalars, table.labels, table.groups, self.selection, seed).at_least(self.count or 0)

    def inner_scores(
        self, table: Table, rows: Fold, choices: Sequence[Choice], scalars: Floats | None, seed: int
    ) -> dict[Choice, float]:
        """AUROC of each choice, all of this recipe's k, on the fold's rows to test on."""
        fitted, tested = table.take(rows[0]), table.take(rows[1])
        most = max(choice.count for choice in choices)
        heads = self.heads if scalars is None else self.rank(fitted, scalars[rows[0]], seed).heads[:most]
        assert heads is not None
        columns, unseen = self.columns(fitted, heads), self.columns(tested, heads)
        mean, scale = self.scaler(columns)
        counts = sorted({min(choice.count, len(heads)) for choice in choices})
        strengths = sorted({choice.strength for choice in choices})
        steps = first_newton_steps(
            standardise(columns, mean, scale),
            fitted.labels,
            standardise(unseen, mean, scale),
            [self.size(count) for count in counts],
            strengths,
        )
        scores = {
            (count, strength): auroc_of(logit, tested.labels)
            for count, of_count in zip(counts, steps, strict=True)
            for strength, logit in zip(strengths, of_count, strict=True)
        }
        return {choice: scores[min(choice.count, len(heads)), choice.strength] for choice in choices}

    def scaler(self, columns: NDArray[Any]) -> tuple[Floats, Floats]:
        """What to subtract from each column and to divide it by.

        The values of a head's feature share a variance of 1, each in proportion to its standard deviation. So a feature
        of one number weighs as much as one of k, a C means the same for every k, and of ranked values the first, which
        vary most, are shrunk least.

        Args:
            columns: (rows, size) as of `columns`.
        """
        assert self.k is not None
        mean, deviation = standardiser(columns)
        widths = [FEATURES[name].width(self.k) for name in self.features]
        starts, first = np.cumsum([0, *widths[:-1]]), len(self.statistics)
        by_head = deviation[first:].reshape(-1, sum(widths))  # (heads, width)
        shared = np.repeat(np.add.reduceat(by_head, starts, axis=1), widths, axis=1)
        return mean, np.concatenate([deviation[:first] / FREEDOM, np.sqrt(by_head * shared).ravel()])

    def fit_chosen(
        self, table: Table, heads: NDArray[np.int64], strength: float, significant: int | None = None
    ) -> LinearProbe:
        """The fit itself, once k, heads and C are known.

        Args:
            table: training rows.
            heads: (heads,) flat indices.
            strength: C.
            significant: how many heads were significant, for the record; None where nobody asked.
        """
        if self.k is None:
            return replace(self, k=table.k).fit_chosen(table, heads, strength, significant)
        columns = precise(self.columns(table, heads))
        mean, scale = self.scaler(columns)
        model = regression(columns.shape[1], strength)
        model.fit(standardise(columns, mean, scale), table.labels)
        shape, first = (*table.shape, self.width), len(self.statistics)
        coefficients = model.coef_[0].astype(np.float64) / scale
        intercept = float(model.intercept_[0]) - float(coefficients[:first] @ mean[:first])
        folded, bias = fold(coefficients[first:], intercept, mean[first:], shape, heads)
        of_statistics = dict(zip(self.statistics, coefficients[:first].tolist(), strict=True))
        chosen: dict[str, Any] = {"heads": len(heads), "C": strength, "k": self.k, "significant_heads": significant}
        chosen["selection"] = self.selection if self.heads is None else "given"
        probe = LinearProbe(self.features, self.k, folded, bias, mask_of(heads, shape), chosen, of_statistics)
        return probe.on_unit_scale(table)

    def columns(self, table: Table, heads: NDArray[np.int64]) -> NDArray[np.float32]:
        """(rows, size): statistics, then head by head in the given order; a copy that may be worked in."""
        assert self.k is not None
        of_heads = columns_of(table, self.features, self.k, heads)
        if not self.statistics:
            return of_heads
        return np.concatenate([table.statistics(self.statistics).astype(np.float32), of_heads], axis=1)

    @property
    def width(self) -> int:
        """Columns of a head."""
        assert self.k is not None
        return sum(FEATURES[name].width(self.k) for name in self.features)

    def size(self, heads: int) -> int:
        """Columns of so many heads, with the statistics in front."""
        return len(self.statistics) + heads * self.width


def regression(columns: int, strength: float) -> LogisticRegression:
    """Balanced and with an L2 penalty; where the Hessian is small enough by Newton's method, which needs a few steps.

    Args:
        columns: how many.
        strength: C.
    """
    solver = "newton-cholesky" if columns <= MOST_COLUMNS else "lbfgs"
    return LogisticRegression(C=strength, class_weight="balanced", max_iter=2000, solver=solver)

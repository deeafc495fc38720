"""How many heads are worth reading: out-of-fold logits for every number of heads, by rank and by lot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from lapwing_training.progress import Advance, silent
from lapwing_training.recipes.lapwing import LapwingRecipe
from lapwing_training.recipes.linear_probe import LinearProbe, standardise
from lapwing_training.statistics.newton import first_newton_steps
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import Fold
from lapwing_training.store.table import Table

DRAWS = 5
"""Orders of heads by lot."""


@dataclass(frozen=True)
class Curve:
    """Logits of rows that the fit did not see, by number of heads; NaN for rows of no fold."""

    heads: tuple[int, ...]
    """Ascending."""

    selected: Floats
    """(counts, rows): the strongest heads, ranked on training rows."""

    by_lot: Floats
    """(counts, draws, rows): as many heads, drawn."""


def learning_curve(
    recipe: LapwingRecipe,
    table: Table,
    folds: list[Fold],
    seed: int,
    advance: Advance = silent,
    fitted: Sequence[LinearProbe] | None = None,
) -> Curve:
    """The recipe with every number of heads instead of the chosen one.

    k and C are chosen once in each fold, from its training rows, and are the same for all numbers. The logits are those
    of the first Newton step, which ranks as the full fit does: all numbers of heads share one Gram matrix.

    Args:
        recipe: what is chosen inside is; `heads` and `count` are of no matter here.
        table: labelled rows.
        folds: rows to fit on and to test on.
        seed: of the folds inside and of the draws.
        advance: called once for each fold.
        fitted: the recipe's own probe of each fold, so that k and C need not be chosen again.
    """
    recipe = replace(recipe, heads=None, count=None, selection=_whole(recipe.selection))
    plans = [
        _plan(recipe, table.take(rows), seed, fitted[number] if fitted else None)
        for number, (rows, _) in enumerate(folds)
    ]
    counts = sorted(set.intersection(*(set(plan.counts(table, plan.k or table.k)) for plan in plans)))
    selected = np.full((len(counts), len(table)), np.nan)
    by_lot = np.full((len(counts), DRAWS, len(table)), np.nan)
    for number, (plan, (rows, tested)) in enumerate(zip(plans, folds, strict=True)):
        train, test = table.take(rows), table.take(tested)
        ranking = plan.rank(train, train.scalars(plan.features, plan.k or table.k), seed)
        ranked = ranking.at_least(max(counts)).heads  # beyond the candidates, too
        selected[:, tested] = nested_logits(plan, train, test, ranked, counts)
        lots = np.random.default_rng([seed, number])
        for draw in range(DRAWS):
            order = lots.permutation(table.shape[0] * table.shape[1])
            by_lot[:, draw, tested] = nested_logits(plan, train, test, order, counts)
        advance()
    return Curve(tuple(counts), selected, by_lot)


def nested_logits(
    recipe: LapwingRecipe, train: Table, test: Table, order: NDArray[np.int64], counts: Sequence[int]
) -> Floats:
    """(counts, test rows): with the first heads of the order, on the scale of the training rows.

    Args:
        recipe: with k and C.
        train: rows to fit on.
        test: rows to be scored.
        order: flat head indices, at least as many as the largest count.
        counts: numbers of heads.
    """
    assert recipe.strength is not None
    heads = order[: max(counts)]
    columns, unseen = (recipe.columns(part, heads) for part in (train, test))
    mean, scale = recipe.scaler(columns)
    columns, unseen = standardise(columns, mean, scale), standardise(unseen, mean, scale)
    sizes = [recipe.size(count) for count in counts]
    scored = np.concatenate([columns, unseen])
    steps = first_newton_steps(columns, train.labels, scored, sizes, [recipe.strength])
    logits = np.array([step for [step] in steps])  # (counts, train and test rows)
    inside, outside = logits[:, : len(train)], logits[:, len(train) :]
    spread = np.maximum(inside.std(axis=1, keepdims=True), 1e-9)
    return np.asarray((outside - inside.mean(axis=1, keepdims=True)) / spread)


def _whole(selection: str) -> str:
    """The selection that ranks as this one does, but heads that it leaves out or does not rank by effect."""
    return "top-m" if selection in ("fdr", "all") else selection


def _plan(recipe: LapwingRecipe, train: Table, seed: int, fitted: LinearProbe | None) -> LapwingRecipe:
    """The recipe with the k and C of this fold."""
    if fitted is not None:
        return replace(recipe, k=fitted.k, strength=float(fitted.chosen["C"]))
    choice = recipe.choose(train, seed)
    return replace(recipe, k=choice.k, strength=choice.strength)

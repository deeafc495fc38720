"""Every row is scored by a probe that never saw its group, and held against what the others say. Knows no metrics.

Nested cross-validation judges all rows, each by the probe of its fold, with the calibration and the thresholds that the
other folds set: on logits of probes that saw neither those rows nor the judged ones, one probe for each pair of folds.
A fixed split judges rows that were kept for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np

from lapwing_detector.calibration import Calibration
from lapwing_training.evaluation.calibrate import OperatingPoint, fit_calibration, operating_points
from lapwing_training.evaluation.plan import OUTER_FOLDS, Plan
from lapwing_training.progress import Advance, silent
from lapwing_training.recipes.fit import LinearProbe, Recipe
from lapwing_training.statistics.significance import Floats, HeadSignificance, head_significance
from lapwing_training.statistics.splits import Fold, Rows, grouped_folds
from lapwing_training.store.table import Table

Scorers = tuple[tuple[Rows, LinearProbe], ...]
"""Rows of a table, and the probe that scores them."""


@dataclass(frozen=True)
class Fitted:
    """All that training has found before anything is judged."""

    recipe: Recipe
    seed: int
    """Of every fit."""

    probe: LinearProbe
    folds: tuple[Fold, ...]
    """Of the rows that the probe was fitted on."""

    fold_probes: tuple[LinearProbe, ...]
    """Fitted without the tested rows of each fold; everything was chosen anew."""

    held_out: Floats
    """(fitted rows,) out-of-fold logits: those of the fold probes."""

    calibration: Calibration
    points: tuple[OperatingPoint, ...]
    significance: Mapping[str, HeadSignificance]
    """By feature, of the fitted rows."""


def fit(table: Table, recipe: Recipe, seed: int, advance: Advance = silent) -> Fitted:
    """Everything that is fitted, from training rows alone; advances once for the probe and once for each fold.

    Raises:
        NotEnoughData: too few groups or classes for the folds.
        InvalidOption: a feature or a k that the table does not hold.
    """
    folds = grouped_folds(table.labels, table.groups, OUTER_FOLDS, seed)
    probe = recipe.fit(table, seed)
    advance()
    probes, parts = [], []
    for known, tested in folds:
        probes.append(recipe.fit(table.take(known), seed))
        parts.append(probes[-1].logit(table.take(tested)))
        advance()
    held_out = joined(folds, parts)
    return Fitted(
        recipe=recipe,
        seed=seed,
        probe=probe,
        folds=tuple(folds),
        fold_probes=tuple(probes),
        held_out=held_out,
        calibration=fit_calibration(held_out, table.labels, table.groups),
        points=operating_points(held_out[table.labels == 0]),
        significance={
            name: head_significance(table.scalars((name,), probe.k)[:, 0], table.labels, table.groups, errors=True)
            for name in table.feature_names
        },
    )


@dataclass(frozen=True)
class Trial:
    """The rows that are judged, each beside what was known without its group."""

    plan: Plan
    table: Table
    """All labelled rows; the rows below are indices of it."""

    folds: tuple[Fold, ...]
    """Rows that were known, rows that are judged: the outer folds, or the one split."""

    probes: tuple[LinearProbe, ...]
    """Of each fold, fitted on the rows that were known."""

    scorers: Scorers
    """Every fitted or judged row, and the probe that did not see its group."""

    held_out: Floats
    """(rows of the table,) logits by the scorers; NaN for rows that were set apart."""

    known_scorers: tuple[Scorers, ...]
    """Of each fold the rows that were known, and probes that saw neither their groups nor those that are judged."""

    known: tuple[Floats, ...]
    """Of each fold (rows of the table,): logits by those; NaN for all rows that were not known."""

    @cached_property
    def rows(self) -> Rows:
        """Rows that are judged, ascending."""
        return np.sort(self.plan.tested)

    @cached_property
    def tested(self) -> Table:
        """The rows that are judged."""
        return self.table.take(self.rows)

    @property
    def logits(self) -> Floats:
        """(judged rows,)"""
        return self.held_out[self.rows]

    @cached_property
    def calibrations(self) -> tuple[Calibration, ...]:
        """Of each fold, from what was known."""
        labels, groups = self.table.labels, self.table.groups
        pairs = zip(self.known, self.folds, strict=True)
        return tuple(fit_calibration(logits[rows], labels[rows], groups[rows]) for logits, (rows, _) in pairs)

    @cached_property
    def probabilities(self) -> Floats:
        """(judged rows,) by the calibration of the row's fold."""
        pairs = zip(self.calibrations, self.folds, strict=True)
        return joined(self.folds, [one.probabilities(self.held_out[tested]) for one, (_, tested) in pairs])

    @property
    def points(self) -> list[tuple[OperatingPoint, ...]]:
        """Of each fold, from what was known."""
        labels, pairs = self.table.labels, zip(self.known, self.folds, strict=True)
        return [operating_points(logits[rows[labels[rows] == 0]]) for logits, (rows, _) in pairs]

    def limits(self, points: Sequence[Sequence[OperatingPoint]]) -> list[Floats]:
        """For each rate (judged rows,): the threshold of the row's fold, NaN where that has none.

        Args:
            points: of each fold, at the same rates.
        """
        by_rate = zip(*points, strict=True)
        return [self.spread([np.nan if one.logit is None else one.logit for one in rate]) for rate in by_rate]

    def spread(self, values: Sequence[float]) -> Floats:
        """(judged rows,): to each row the value of its fold."""
        pairs = zip(values, self.folds, strict=True)
        return joined(self.folds, [np.full(len(tested), value) for value, (_, tested) in pairs])


def trial_of(fitted: Fitted, table: Table, plan: Plan, advance: Advance = silent) -> Trial:
    """What there is to be judged; in nested cross-validation fits a probe without each pair of folds.

    Args:
        fitted: on the rows that the plan names.
        table: all labelled rows.
        plan: who is fitted on and who is judged.
        advance: called once for each of the plan's pairs.

    Raises:
        NotEnoughData: too few groups are left beside a pair of folds.
    """
    rows = plan.fitted
    folds = tuple((rows[known], rows[tested]) for known, tested in fitted.folds)
    scorers = tuple((tested, probe) for (_, tested), probe in zip(folds, fitted.fold_probes, strict=True))
    out_of_fold = np.full(len(table), np.nan)
    out_of_fold[rows] = fitted.held_out
    if plan.protocol == "nested":
        apart = _pair_scorers(fitted, table, folds, advance)
        known = tuple(scored(table, each) for each in apart)
        return Trial(plan, table, folds, fitted.fold_probes, scorers, out_of_fold, apart, known)
    held_out = out_of_fold.copy()
    held_out[plan.tested] = fitted.probe.logit(table.take(plan.tested))
    own = (plan.tested, fitted.probe)
    split = ((rows, plan.tested),)
    return Trial(plan, table, split, (fitted.probe,), (*scorers, own), held_out, (scorers,), (out_of_fold,))


def _pair_scorers(fitted: Fitted, table: Table, folds: Sequence[Fold], advance: Advance) -> tuple[Scorers, ...]:
    """Of each fold, the rows of every other one with the probe that saw neither of the two."""
    found: list[list[tuple[Rows, LinearProbe]]] = [[] for _ in folds]
    for first, second in combinations(range(len(folds)), 2):
        rows = np.intersect1d(folds[first][0], folds[second][0])
        probe = fitted.recipe.fit(table.take(rows), fitted.seed)
        found[first].append((folds[second][1], probe))
        found[second].append((folds[first][1], probe))
        advance()
    return tuple(tuple(scorers) for scorers in found)


def scored(table: Table, scorers: Scorers) -> Floats:
    """(rows of the table,) logits; NaN for rows that nothing scores."""
    logits = np.full(len(table), np.nan)
    for rows, probe in scorers:
        logits[rows] = probe.logit(table.take(rows))
    return logits


def logits_over(recipe: Recipe, table: Table, folds: Sequence[Fold], seed: int, advance: Advance = silent) -> Floats:
    """(tested rows,) logits of a recipe that is fitted anew for each fold; advances for each."""
    parts = []
    for known, tested in folds:
        parts.append(recipe.fit(table.take(known), seed).logit(table.take(tested)))
        advance()
    return joined(folds, parts)


def joined(folds: Sequence[Fold], parts: Sequence[Floats]) -> Floats:
    """(..., tested rows) in the order of the rows, from what each fold says of its own."""
    order = np.argsort(np.concatenate([tested for _, tested in folds]), kind="stable")
    return np.asarray(np.concatenate(parts, axis=-1)[..., order])

"""What a probe must beat: scores that need no fit, and controls that must fail."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from lapwing_training.evaluation.nested import joined, logits_over
from lapwing_training.options import ATTENTION_SCORE, LAPLACIAN, SINK
from lapwing_training.progress import Advance, silent
from lapwing_training.recipes.fit import LapwingRecipe, LinearProbe, PaperRecipe, Recipe, SinkRecipe
from lapwing_training.statistics.metrics import auroc_of
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import Fold, Rows
from lapwing_training.store.table import Table

RANDOM_DRAWS = 10
SHUFFLES = 20
NESTED_DRAWS = 5
"""Of either control where every draw is fitted once for each outer fold."""

DIRECTIONS = {"token_count": 1.0, "log_probability": -1.0, "summed_attention_score": 1.0}
"""Which way each baseline is expected to speak for hallucination, when no training rows can say."""


@dataclass(frozen=True)
class Combination:
    """Log-probability and attention in one small logistic regression, on standardised inputs.

    The log-probability enters as the log-odds of the mean token probability. By itself it piles up just below zero,
    where most of what it knows lies, and a straight line through its long tail loses that.
    """

    weights: tuple[float, float]
    means: tuple[float, float]
    scales: tuple[float, float]

    @classmethod
    def fit(cls, log_probabilities: Floats, logits: Floats, table: Table) -> Combination:
        """Fit on training rows; the logits are out-of-fold ones."""
        columns = np.stack([log_odds(log_probabilities), logits], axis=1)  # (rows, 2)
        means, scales = columns.mean(axis=0), np.maximum(columns.std(axis=0), 1e-12)
        model = LogisticRegression(class_weight="balanced").fit((columns - means) / scales, table.labels)
        first, second = (float(weight) for weight in model.coef_[0])
        return cls((first, second), (float(means[0]), float(means[1])), (float(scales[0]), float(scales[1])))

    def score(self, log_probabilities: Floats, logits: Floats) -> Floats:
        """(rows,)"""
        columns = np.stack([log_odds(log_probabilities), logits], axis=1)
        return np.asarray((columns - np.array(self.means)) / np.array(self.scales) @ np.array(self.weights))

    def to_dict(self) -> dict[str, Any]:
        """JSON values; the inputs in the order log-odds of the mean token probability, attention logit."""
        return {"weights": list(self.weights), "means": list(self.means), "scales": list(self.scales)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Combination:
        """From `to_dict`."""
        return cls(*(tuple(values[name]) for name in ("weights", "means", "scales")))


def log_odds(log_probabilities: Floats) -> Floats:
    """log(p / (1 - p)) of p = exp(log_probabilities); (rows,), the order unchanged."""
    bounded = np.minimum(log_probabilities, -1e-9)  # float32 logits can't tell a larger p from 1
    return np.asarray(bounded - np.log(-np.expm1(bounded)))


def raw_names(table: Table, rows: Rows | None = None) -> tuple[str, ...]:
    """Which of `raw_scores` there are; arguments as there. Reads no features."""
    known = np.isfinite(table.log_probabilities if rows is None else table.log_probabilities[rows])
    there = {"log_probability": known.any(), "summed_attention_score": ATTENTION_SCORE in table.feature_names}
    return ("token_count", *(name for name, held in there.items() if held))


def raw_scores(table: Table, rows: Rows | None = None) -> dict[str, Floats]:
    """Scores that need no probe; absent where the store does not hold what they need.

    Args:
        table: whose rows are scored.
        rows: those that may say what a missing log-probability counts as, such as the training rows; all without it.
            Where none of them has a log-probability, that score is absent.
    """
    return {name: RAW[name](table, rows) for name in raw_names(table, rows)}


def _log_probabilities(table: Table, rows: Rows | None) -> Floats:
    """An empty answer has no tokens, hence no mean; it gets the middle one."""
    telling = table.log_probabilities if rows is None else table.log_probabilities[rows]
    known = table.log_probabilities
    return np.where(np.isfinite(known), known, np.median(telling[np.isfinite(telling)]))


def _summed_attention_scores(table: Table, rows: Rows | None) -> Floats:
    values = table.feature(ATTENTION_SCORE, 1).astype(np.float64)
    return np.asarray(values.sum(axis=(1, 2, 3)))


RAW: dict[str, Callable[[Table, Rows | None], Floats]] = {
    "token_count": lambda table, rows: table.token_counts.astype(np.float64),
    "log_probability": _log_probabilities,
    "summed_attention_score": _summed_attention_scores,
}


def directions(scores: Mapping[str, Floats], labels: NDArray[Any], rows: Rows) -> dict[str, float]:
    """The sign with which each baseline speaks for hallucination on these rows, which are training rows."""
    return {name: 1.0 if auroc_of(values[rows], labels[rows]) >= 0.5 else -1.0 for name, values in scores.items()}


def random_head_scores(
    probes: Sequence[LinearProbe],
    table: Table,
    folds: Sequence[Fold],
    seed: int,
    draws: int = RANDOM_DRAWS,
    advance: Advance = silent,
) -> Floats:
    """(draws, tested rows): the number of heads and the fit of each fold's probe, but heads drawn by lot."""
    parts, rng = [], np.random.default_rng(seed)
    for probe, (known, tested) in zip(probes, folds, strict=True):
        train, test = table.take(known), table.take(tested)
        recipe = LapwingRecipe(probe.features, probe.k, statistics=tuple(probe.statistic_weights))
        scores = np.empty((draws, len(test)))
        for draw in range(draws):
            heads = np.sort(rng.choice(probe.selected.size, int(probe.selected.sum()), replace=False))
            scores[draw] = recipe.fit_chosen(train, heads, float(probe.chosen["C"])).logit(test)
            advance()
        parts.append(scores)
    return joined(folds, parts)


def all_head_scores(
    probes: Sequence[LinearProbe], table: Table, folds: Sequence[Fold], seed: int, advance: Advance = silent
) -> Floats:
    """(tested rows,): features and k of each fold's probe, but no selection; C is chosen anew."""
    parts = []
    for probe, (known, tested) in zip(probes, folds, strict=True):
        statistics = tuple(probe.statistic_weights)
        recipe = LapwingRecipe(probe.features, probe.k, heads=np.arange(probe.selected.size), statistics=statistics)
        parts.append(recipe.fit(table.take(known), seed).logit(table.take(tested)))
        advance()
    return joined(folds, parts)


def shuffled(table: Table, folds: Sequence[Fold], seed: int) -> Table:
    """The same rows, their labels dealt anew: nothing is left to be found.

    They are dealt among the tested rows of each fold and among those that none tests, so that every fold keeps as many
    of both classes on both sides as it had.
    """
    rng, labels = np.random.default_rng(seed), table.labels.copy()
    tested = np.concatenate([rows for _, rows in folds])
    for rows in (*(rows for _, rows in folds), np.setdiff1d(np.arange(len(table)), tested)):
        labels[rows] = rng.permutation(labels[rows])
    return table.with_labels(labels)


def shuffled_control(
    recipe: Recipe,
    table: Table,
    folds: Sequence[Fold],
    seed: int,
    draws: int = SHUFFLES,
    advance: Advance = silent,
) -> list[tuple[Table, Floats]]:
    """The whole recipe on labels dealt anew, a few times: the tested rows with those labels, and their logits.

    Raises:
        NotEnoughData: a deal left too few groups of one class for the folds.
    """
    tested, deals = np.sort(np.concatenate([rows for _, rows in folds])), []
    for number in range(draws):
        dealt = shuffled(table, folds, seed + number)
        deals.append((dealt.take(tested), logits_over(recipe, dealt, folds, seed, advance)))
    return deals


def comparisons(recipe: Recipe, table: Table) -> dict[str, Recipe]:
    """The recipe itself and what is fitted beside it, by name; what the store can't serve is absent."""
    k = recipe.k if isinstance(recipe, LapwingRecipe) else table.k
    found: list[Recipe] = [
        LapwingRecipe(names, k)
        for names in ((LAPLACIAN,), (ATTENTION_SCORE,), (ATTENTION_SCORE, LAPLACIAN))
        if set(names) <= set(table.feature_names)
    ]
    if LAPLACIAN in table.feature_names:
        found.append(PaperRecipe((LAPLACIAN,)))
    if SINK in table.feature_names:
        found.append(SinkRecipe((SINK,), table.k))
    # The recipe comes last, so that under its name stands itself and not the same recipe with another k.
    return {name_of(entry): entry for entry in (*found, recipe)}


def name_of(recipe: Recipe) -> str:
    """Recipe and features, such as `lapwing/laplacian_eigenvalues.v1`."""
    return f"{recipe.name}/{'+'.join(recipe.features)}"

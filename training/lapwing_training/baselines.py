"""What a probe must beat: scores that need no fit, and controls that must fail."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression

from lapwing_training.fit import LapwingRecipe, LinearProbe, PaperRecipe, Recipe
from lapwing_training.metrics import auroc_of
from lapwing_training.options import ATTENTION_SCORE, LAPLACIAN
from lapwing_training.progress import Advance, silent
from lapwing_training.significance import Floats
from lapwing_training.splits import Fold
from lapwing_training.table import Table

RANDOM_DRAWS = 10
SHUFFLES = 20
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


def raw_scores(table: Table) -> dict[str, Floats]:
    """Scores that need no probe; absent where the store does not hold what they need."""
    scores: dict[str, Floats] = {"token_count": table.token_counts.astype(np.float64)}
    known = np.isfinite(table.log_probabilities)
    if known.any():
        # An empty answer has no tokens, hence no mean; it gets the middle one.
        scores["log_probability"] = np.where(known, table.log_probabilities, np.median(table.log_probabilities[known]))
    if ATTENTION_SCORE in table.features:
        values = table.features[ATTENTION_SCORE].astype(np.float64)
        scores["summed_attention_score"] = values.sum(axis=(1, 2, 3))
    return scores


def directions(train: Table) -> dict[str, float]:
    """The sign with which each baseline speaks for hallucination, from training rows."""
    return {name: 1.0 if auroc_of(scores, train.labels) >= 0.5 else -1.0 for name, scores in raw_scores(train).items()}


def random_head_scores(fitted: LinearProbe, train: Table, test: Table, seed: int, advance: Advance = silent) -> Floats:
    """(draws, test rows): the same number of heads and the same fit, but heads drawn by lot."""
    rng = np.random.default_rng(seed)
    recipe = LapwingRecipe(fitted.features, fitted.k)
    count, strength = int(fitted.selected.sum()), float(fitted.chosen["C"])
    scores = np.empty((RANDOM_DRAWS, len(test)))
    for draw in range(RANDOM_DRAWS):
        heads = np.sort(rng.choice(fitted.selected.size, count, replace=False))
        scores[draw] = recipe.fit_chosen(train, heads, strength).logit(test)
        advance()
    return scores


def all_heads(fitted: LinearProbe, layers_and_heads: tuple[int, int]) -> Recipe:
    """The same recipe without selection; C is chosen anew."""
    layers, heads = layers_and_heads
    return LapwingRecipe(fitted.features, fitted.k, heads=np.arange(layers * heads))


def shuffled(table: Table, seed: int) -> Table:
    """The same rows, their labels dealt anew: nothing is left to be found."""
    return table.with_labels(np.random.default_rng(seed).permutation(table.labels))


def shuffled_control(
    recipe: Recipe, table: Table, split: Fold, seed: int, advance: Advance = silent
) -> list[tuple[Table, Floats]]:
    """The whole recipe on labels dealt anew, a few times: the test rows with those labels, and their logits.

    Training and test rows are dealt apart, so that each side keeps as many of both classes as it had.

    Raises:
        NotEnoughData: a deal left too few groups of one class for the folds.
    """
    train, test = table.take(split[0]), table.take(split[1])
    deals = []
    for number in range(SHUFFLES):
        fitted = recipe.fit(shuffled(train, seed + number), seed)
        deals.append((shuffled(test, seed + SHUFFLES + number), fitted.logit(test)))
        advance()
    return deals


def comparisons(recipe: Recipe, table: Table) -> dict[str, Recipe]:
    """The recipe itself and what is fitted beside it, by name; what the store can't serve is absent."""
    k = recipe.k if isinstance(recipe, LapwingRecipe) else table.k
    found: list[Recipe] = [
        LapwingRecipe(names, k)
        for names in ((LAPLACIAN,), (ATTENTION_SCORE,), (ATTENTION_SCORE, LAPLACIAN))
        if set(names) <= set(table.features)
    ]
    if LAPLACIAN in table.features:
        found.append(PaperRecipe((LAPLACIAN,)))
    # The recipe comes last, so that under its name stands itself and not the same recipe with another k.
    return {name_of(entry): entry for entry in (*found, recipe)}


def name_of(recipe: Recipe) -> str:
    """Recipe and features, such as `lapwing/laplacian_eigenvalues.v1`."""
    return f"{recipe.name}/{'+'.join(recipe.features)}"

"""What statistics of the log-probabilities say without attention, which attention must add to. Knows no probe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

from lapwing_detector.token_statistics import TOKEN_STATISTICS, statistics_logit
from lapwing_training.evaluation.nested import joined
from lapwing_training.evaluation.sample import Sample
from lapwing_training.recipes.linear_probe import standardiser
from lapwing_training.statistics.significance import Floats
from lapwing_training.statistics.splits import Fold
from lapwing_training.store.table import Table

NAME = "token_statistics"
"""Its name in the comparison."""


@dataclass(frozen=True)
class StatisticsAlone:
    """A small logistic regression on the statistics, as plain weights of them."""

    weights: Mapping[str, float]
    """By the statistic's id."""

    bias: float

    @classmethod
    def fit(cls, statistics: Floats, labels: NDArray[Any]) -> StatisticsAlone:
        """Fit on training rows: (rows, statistics) in the order of `TOKEN_STATISTICS`, and (rows,)."""
        mean, scale = standardiser(statistics)
        model = LogisticRegression(class_weight="balanced").fit((statistics - mean) / scale, labels)
        weights = model.coef_[0] / scale
        return cls(
            dict(zip(TOKEN_STATISTICS, weights.tolist(), strict=True)), float(model.intercept_[0] - mean @ weights)
        )

    def score(self, statistics: Floats) -> Floats:
        """(rows,) logits."""
        return statistics_logit(self.weights, statistics) + self.bias

    def to_dict(self) -> dict[str, Any]:
        """JSON values, kept with a probe so that other stores can be judged by them."""
        return {"weights": dict(self.weights), "bias": self.bias}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StatisticsAlone:
        """From `to_dict`."""
        return cls({id: float(weight) for id, weight in values["weights"].items()}, float(values["bias"]))


def held_out_scores(table: Table, folds: Sequence[Fold]) -> Floats | None:
    """(tested rows,), each by a regression on its fold's training rows; None where the store holds no statistics."""
    columns = table.token_statistics
    if columns is None:
        return None
    parts = [StatisticsAlone.fit(columns[known], table.labels[known]).score(columns[tested]) for known, tested in folds]
    return joined(folds, parts)


def beside_statistics(sample: Sample, logits: Floats, alone: Floats, reads_them: bool, result: dict[str, Any]) -> None:
    """Adds the statistics' row to a result, and by how much the probe's AUROC differs from theirs, paired.

    Args:
        sample: the rows, with their resamples.
        logits: (rows,) of the probe.
        alone: (rows,) of the statistics.
        reads_them: whether the probe reads them, too, so that the difference is what attention adds.
        result: what the rows are judged by, with its `comparison`.
    """
    result["comparison"][NAME] = {"kind": "combination", **sample.judge(alone)}
    difference = sample.difference(logits, alone)
    if reads_them:
        result["paired"] = {"of": NAME, **difference}
    else:
        result["against_statistics"] = difference

"""Statistics of the log-probabilities that a model gave the tokens of a response. Knows numbers only.

They are not read from attention. Each is a mean over some of the tokens, so that a probe that is linear in them can
say exactly which token added what. Three are enough: the mean is what the field reports; the minimum is the weakest
word of an answer, and alone ranks short answers better than the mean does; the mean of the lowest quarter stays where
it is when a long answer goes on with words that are never in doubt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

PROBABILITY_FLOOR = 1e-12
"""A token that is less likely counts as this likely: one absurd token should not outweigh all others."""

DOUBT_FLOOR = 1e-3
"""A token that is surer counts as this unsure: float32 logits can't tell 1 - p from 0 for long after that."""


@dataclass(frozen=True)
class TokenStatistic:
    """One statistic by its versioned id, as it is written into every artifact."""

    id: str
    title: str
    """How people call it."""

    token_values: Callable[[Floats], Floats]
    """From the log-probabilities of the tokens to the numbers that are averaged; both (tokens,), never falling."""

    count: Callable[[int], int]
    """Of so many tokens, how many of the lowest are averaged; at least 1."""

    def token_shares(self, log_probabilities: Floats) -> Floats:
        """(tokens,) what each token adds to the statistic, which is their sum; 0 for tokens that are not averaged."""
        values = self.token_values(log_probabilities)
        count = self.count(len(values)) if len(values) else 0
        # Stable: of equal tokens the first ones are averaged, on every machine.
        lowest = np.argsort(values, kind="stable")[:count]
        shares = np.zeros(len(values))
        shares[lowest] = values[lowest] / max(count, 1)
        return shares


def log_odds(log_probabilities: Floats) -> Floats:
    """log(p / (1 - p)), 1 - p not below its floor; (tokens,).

    A straight line through log-probabilities loses what they know near 0, where most tokens lie.
    """
    doubt = np.maximum(-np.expm1(log_probabilities), DOUBT_FLOOR)
    return np.asarray(log_probabilities - np.log(doubt), dtype=np.float64)


TOKEN_STATISTICS: dict[str, TokenStatistic] = {
    statistic.id: statistic
    for statistic in (
        TokenStatistic("mean_log_probability.v1", "mean log-probability", lambda values: values, lambda tokens: tokens),
        TokenStatistic(
            "lowest_quarter_log_odds.v1",
            "mean log-odds of the lowest quarter",
            log_odds,
            lambda tokens: math.ceil(tokens / 4),
        ),
        TokenStatistic("minimum_log_odds.v1", "lowest log-odds", log_odds, lambda tokens: 1),
    )
}


def token_statistics(log_probabilities: Sequence[float] | NDArray[np.floating]) -> Floats:
    """Every statistic of one response.

    Args:
        log_probabilities: (tokens,) natural logarithms, of the model's own distribution (temperature 1), of the
            response's tokens without the end-of-sequence token.

    Returns:
        (statistics,) in the order of `TOKEN_STATISTICS`. Of no tokens all are 0; where one is NaN all are NaN.
    """
    bounded = _bounded(log_probabilities)
    return np.array([statistic.token_shares(bounded).sum() for statistic in TOKEN_STATISTICS.values()])


def token_contributions(
    log_probabilities: Sequence[float] | NDArray[np.floating], weights: Mapping[str, float]
) -> tuple[Floats, dict[str, float]]:
    """What the tokens, and what the statistics add to a score that is linear in the statistics.

    Args:
        log_probabilities: (tokens,) as for `token_statistics`.
        weights: of statistics by id.

    Returns:
        (tokens,) and, for each of the weights, its statistic's part; both have the same sum.
    """
    bounded = _bounded(log_probabilities)
    shares = {id: weight * TOKEN_STATISTICS[id].token_shares(bounded) for id, weight in weights.items()}
    return sum(shares.values(), np.zeros(len(bounded))), {id: float(part.sum()) for id, part in shares.items()}


def statistics_logit(weights: Mapping[str, float], statistics: NDArray[np.floating]) -> NDArray[np.float64]:
    """What the statistics of many responses add to their scores.

    Args:
        weights: of statistics by id.
        statistics: (..., statistics) in the order of `TOKEN_STATISTICS`.

    Returns:
        (...)
    """
    of_all = np.array([weights.get(id, 0.0) for id in TOKEN_STATISTICS])
    return np.asarray(statistics.astype(np.float64) @ of_all)


def _bounded(log_probabilities: Sequence[float] | NDArray[np.floating]) -> Floats:
    """In [log 1e-12, 0]: rounding may put the probability of a sure token above 1. One NaN makes all NaN."""
    values = np.asarray(log_probabilities, dtype=np.float64)
    if np.isnan(values).any():
        return np.full(len(values), np.nan)
    return np.clip(values, math.log(PROBABILITY_FLOOR), 0.0)

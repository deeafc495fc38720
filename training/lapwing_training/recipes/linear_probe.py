"""What every recipe ends in: one linear map over all heads. Knows no recipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.statistics.significance import Floats
from lapwing_training.store.table import Table

SCALE_FLOOR = 1e-4
"""A number that varies less than this is not blown up to unit variance: two devices agree to about 1e-6 in it."""

BLOCK = 16_000_000
"""Numbers that are held at once in float64 where rows are worked off in blocks."""

EXACT = 32_000_000
"""Up to so many numbers a fit is computed in float64; beyond in float32, as they are stored, to stay within memory."""


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

    statistic_weights: Mapping[str, float] = field(default_factory=dict)
    """Of statistics of the response's token log-probabilities, by id; empty where attention alone is read."""

    frequency: Floats | None = None
    """(layers, heads) share of the resamples in which each head was selected; None where nothing was resampled."""

    def on_unit_scale(self, fitted: Table) -> LinearProbe:
        """The same ranking, its logits of mean 0 and standard deviation 1 over the rows that it was fitted on.

        How far the logits of a regression spread is decided by its C, and that differs from fold to fold. On one scale,
        what is set on out-of-fold logits (thresholds, calibration, the combination) holds for the final probe: in
        simulation a promise of 10 % came out at 6 to 18 % instead of 0 to 40 %. The regression's own decision function
        is `logit * chosen["logit_scale"] + chosen["logit_centre"]`.
        """
        raw = self.logit(fitted)
        scale = float(raw.std())
        scale = scale if scale > 1e-9 else 1.0  # no spread but rounding: all weights are about zero
        statistics = {id: weight / scale for id, weight in self.statistic_weights.items()}
        weights = (self.weights / scale).astype(np.float32)
        scaled = replace(self, weights=weights, bias=0.0, statistic_weights=statistics)
        # From the rounded weights, so that the mean is 0 whatever was rounded.
        bias = -float(scaled.logit(fitted).mean())
        record = {**self.chosen, "logit_scale": scale, "logit_centre": float(raw.mean())}
        return replace(scaled, bias=bias, chosen=record)

    def logit(self, table: Table) -> Floats:
        """(rows,) before calibration; positive speaks for hallucination. Reads the selected heads only.

        Raises:
            InvalidOption: the table lacks what the probe reads.
        """
        heads = np.flatnonzero(self.selected)
        logits = np.full(len(table), self.bias)
        if self.statistic_weights:
            logits += table.statistics(tuple(self.statistic_weights)) @ np.array(list(self.statistic_weights.values()))
        if not len(heads):
            return logits
        weights = self.weights.reshape(self.selected.size, -1)[heads].astype(np.float64)
        for rows in row_blocks(len(table), weights.size):
            values = table.take(rows).of_heads(self.features, self.k, heads)  # (rows, heads, width)
            logits[rows] += np.einsum("nhw,hw->n", values.astype(np.float64), weights)
        return logits


def row_blocks(rows: int, width: int) -> Iterator[NDArray[np.int64]]:
    """The rows in blocks of a bounded number of values."""
    size = max(1, BLOCK // max(1, width))
    return (np.arange(start, min(start + size, rows)) for start in range(0, rows, size))


def columns_of(table: Table, features: Sequence[str], k: int, heads: NDArray[np.int64]) -> NDArray[np.float32]:
    """(rows, heads * width), head by head in the given order; a copy that may be worked in."""
    values = table.of_heads(features, k, heads)
    return values.reshape(len(table), -1)


def precise(columns: NDArray[np.float32]) -> NDArray[Any]:
    """In float64 where that fits into memory."""
    return columns.astype(np.float64) if columns.size <= EXACT else columns


def standardiser(columns: NDArray[Any]) -> tuple[Floats, Floats]:
    """Mean and standard deviation of each column, the latter not below the floor.

    Args:
        columns: (rows, columns), float32 or float64; the sums are float64.
    """
    mean = columns.mean(axis=0, dtype=np.float64)
    square = np.zeros_like(mean)
    for rows in row_blocks(len(columns), columns.shape[1]):
        square += ((columns[rows[0] : rows[-1] + 1] - mean) ** 2).sum(axis=0)
    return mean, np.maximum(np.sqrt(square / len(columns)), SCALE_FLOOR)


def standardise(columns: NDArray[Any], mean: Floats, scale: Floats) -> NDArray[Any]:
    """In place, in the columns' own precision."""
    columns -= mean.astype(columns.dtype)
    columns /= scale.astype(columns.dtype)
    return columns


def fold(
    weights: NDArray[Any], intercept: float, mean: Floats, shape: tuple[int, int, int], heads: NDArray[np.int64]
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


def mask_of(heads: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """(layers, heads) true for these flat indices."""
    mask = np.zeros(shape[0] * shape[1], dtype=bool)
    mask[heads] = True
    return mask.reshape(shape[:2])

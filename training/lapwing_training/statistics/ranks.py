"""Two classes compared by ranks, many columns at once: one sort serves the U test, the AUROC and its error.

Knows arrays only: not what a column is, nor how many tests are made at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr

from lapwing_training.errors import NotEnoughData

Floats = NDArray[np.float64]

COLUMNS_AT_ONCE = 64
"""Columns that are ranked together, so that the working arrays stay small."""


@dataclass(frozen=True)
class Ranked:
    """Every column sorted, and each item placed among the items of the other class."""

    labels: NDArray[np.bool_]
    """(items,) true for hallucinated."""

    order: NDArray[np.int64]
    """(columns, items) indices of the items, the lowest value first."""

    below: Floats
    """(columns, items) in that order: how many items of the other class are lower, ties counted half."""

    statistic: Floats
    """(columns,) Mann and Whitney's U: pairs in which the hallucinated item is higher, ties counted half."""

    spread: Floats
    """(columns,) sum of squared distances of the mid-ranks from their mean; every tie makes it smaller."""

    @classmethod
    def of(cls, values: Floats, labels: NDArray[Any]) -> Ranked:
        """Sort.

        Args:
            values: (items, columns)
            labels: (items,) 1 hallucinated, 0 not.

        Raises:
            NotEnoughData: one of the two classes is missing.
        """
        positive = labels == 1
        require_both(positive)
        columns = np.ascontiguousarray(values.T)  # (columns, items)
        order = np.argsort(columns, axis=1)
        first, last = ties(np.take_along_axis(columns, order, axis=1))
        lower = np.zeros((len(order), len(labels) + 1), dtype=np.int64)
        sorted_positive = positive[order]
        np.cumsum(sorted_positive, axis=1, out=lower[:, 1:])
        twice = first + last + 1  # twice the items below, ties counted half and the item itself among them
        twice_positive = np.take_along_axis(lower, first, axis=1) + np.take_along_axis(lower, last + 1, axis=1)
        below = 0.5 * np.where(sorted_positive, twice - twice_positive, twice_positive)
        statistic = np.where(sorted_positive, below, 0.0).sum(axis=1)
        return cls(positive, order, below, statistic, ((0.5 * (twice - len(labels))) ** 2).sum(axis=1))

    @property
    def counts(self) -> tuple[int, int]:
        """Hallucinated items and others."""
        hallucinated = int(self.labels.sum())
        return hallucinated, len(self.labels) - hallucinated

    @property
    def auroc(self) -> Floats:
        """(columns,)"""
        hallucinated, other = self.counts
        return self.statistic / (hallucinated * other)

    def p_value(self) -> Floats:
        """(columns,) of the two-sided U test: normal approximation, corrected for continuity and ties."""
        pairs, items = self.counts[0] * self.counts[1], len(self.labels)
        # The variance of U under the null is that of the mid-ranks, so the tie correction needs no counts of ties.
        deviation = np.sqrt(pairs * self.spread / (items * (items - 1)))
        distance = np.abs(self.statistic - 0.5 * pairs) - 0.5
        # A constant column has no rank variance: nothing speaks against the null.
        z = np.divide(distance, deviation, out=np.full(len(distance), -np.inf), where=deviation > 0)
        return np.minimum(2.0 * np.asarray(ndtr(-z)), 1.0)

    def influence(self, codes: NDArray[np.int64]) -> tuple[Floats, Floats]:
        """How far the AUROC moves with each group's hallucinated items, and with its others.

        Args:
            codes: (items,) the group of each, counted from 0 without gaps.

        Returns:
            (columns, groups) twice; each sums to zero over the groups.
        """
        hallucinated, other = self.counts
        below = np.empty_like(self.below)  # (columns, items) in the order of the items
        np.put_along_axis(below, self.order, self.below, axis=1)
        by_group = np.argsort(codes, kind="stable")
        starts = np.searchsorted(codes[by_group], np.arange(codes.max() + 1))
        below, positive = below[:, by_group], self.labels[by_group]
        auroc = self.auroc[:, None]
        # Of an item: the share of the other class on its right side, less the AUROC, which is its mean.
        won = np.where(positive, (below / other - auroc) / hallucinated, 0.0)
        lost = np.where(positive, 0.0, (1.0 - below / hallucinated - auroc) / other)
        return np.add.reduceat(won, starts, axis=1), np.add.reduceat(lost, starts, axis=1)

    def auroc_error(self, codes: NDArray[np.int64]) -> Floats:
        """Standard error of every column's AUROC.

        With a group for each item it is DeLong's. Otherwise whole groups count as one observation, also those that hold
        items of both classes; NaN where a class has one group only.

        Args:
            codes: (items,) the group of each, counted from 0 without gaps.

        Returns:
            (columns,)

        References:
            DeLong, DeLong and Clarke-Pearson 1988, by ranks as in Sun and Xu 2014; Obuchowski 1997, equations 3 to 5.
        """
        won, lost = self.influence(codes)
        variance = unbiased(len(np.unique(codes[self.labels]))) * (won**2).sum(axis=1)
        variance += unbiased(len(np.unique(codes[~self.labels]))) * (lost**2).sum(axis=1)
        variance += 2.0 * unbiased(int(codes.max()) + 1) * (won * lost).sum(axis=1)
        return np.asarray(np.sqrt(np.maximum(variance, 0.0)))


def require_both(positive: NDArray[np.bool_]) -> None:
    """Both classes are there.

    Raises:
        NotEnoughData: one is missing.
    """
    hallucinated = int(positive.sum())
    if not 0 < hallucinated < len(positive):
        raise NotEnoughData(
            f"{hallucinated} hallucinated and {len(positive) - hallucinated} other items; the test needs both: "
            "label more generations or make the questions harder or easier"
        )


def ties(ordered: Floats) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places of the first and the last value that equal each value; (columns, items) ascending along the items."""
    items = ordered.shape[1]
    place = np.arange(items)
    rises = np.ones((len(ordered), items + 1), dtype=bool)  # at a place: its value is above the one before
    np.not_equal(ordered[:, 1:], ordered[:, :-1], out=rises[:, 1:-1])
    first = np.maximum.accumulate(np.where(rises[:, :-1], place, 0), axis=1)
    last = np.minimum.accumulate(np.where(rises[:, 1:], place, items)[:, ::-1], axis=1)[:, ::-1]
    return first, last


def unbiased(count: int) -> float:
    """What turns a mean square of deviations into an unbiased variance; NaN for one observation."""
    return count / (count - 1.0) if count > 1 else float("nan")


def column_blocks(values: Floats) -> list[Floats]:
    """Views of a bounded number of columns each; (items, columns)."""
    return [values[:, start : start + COLUMNS_AT_ONCE] for start in range(0, values.shape[1], COLUMNS_AT_ONCE)]


def group_codes(groups: NDArray[Any]) -> NDArray[np.int64]:
    """(items,) the group of each item, counted from 0 without gaps."""
    return np.asarray(np.unique(groups, return_inverse=True)[1], dtype=np.int64)


def one_value_per_group(values: Floats, labels: NDArray[Any], groups: NDArray[Any]) -> tuple[Floats, NDArray[np.int64]]:
    """Mean over the items of each group and class.

    Args:
        values: (items, columns)
        labels: (items,)
        groups: (items,)

    Returns:
        (groups with this class, columns) and their labels.
    """
    cells, cell = np.unique(group_codes(groups) * 2 + (labels == 1), return_inverse=True)
    order = np.argsort(cell, kind="stable")
    counts = np.bincount(cell)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    means = np.add.reduceat(values[order], starts, axis=0) / counts[:, None]
    return means, (cells % 2).astype(np.int64)

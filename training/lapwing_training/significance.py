"""Which heads tell hallucinations apart: rank tests and effect sizes, one scalar per head. Knows arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lapwing_training.errors import NotEnoughData

Floats = NDArray[np.float64]

Z_95 = 1.959963984540054
"""Half the width of a 95 % interval in standard errors."""


@dataclass(frozen=True)
class HeadSignificance:
    """The two-sided Mann-Whitney U test of hallucinated against not, for every head at once."""

    p_value: Floats
    """(...,) in [0, 1]: low marks a head that separates the classes."""

    q_value: Floats
    """(...,) Benjamini-Hochberg over all heads."""

    auroc: Floats
    """(...,) probability that a hallucinated item's value is above another's; over items."""

    auroc_error: Floats | None = None
    """(...,) DeLong's standard error of the AUROC, clustered by group; None where it was not asked for."""

    @property
    def auroc_interval(self) -> tuple[Floats, Floats]:
        """(...,) and (...,): the ends of the 95 % interval.

        Raises:
            ValueError: the error was not asked for.
        """
        if self.auroc_error is None:
            raise ValueError("no standard error was computed; call head_significance(..., errors=True)")
        reach = Z_95 * self.auroc_error
        return np.clip(self.auroc - reach, 0.0, 1.0), np.clip(self.auroc + reach, 0.0, 1.0)

    @property
    def effect_size(self) -> Floats:
        """(...,) rank-biserial correlation, 2 AUROC - 1, in [-1, 1]."""
        return 2.0 * self.auroc - 1.0

    @property
    def share_p(self) -> float:
        """Share of heads with p < .05."""
        return float((self.p_value < 0.05).mean())

    @property
    def share_q(self) -> float:
        """Share of heads with q < .05."""
        return float((self.q_value < 0.05).mean())


def strongest_heads(tested: HeadSignificance, layers: Sequence[int], count: int = 3) -> list[dict[str, float]]:
    """The heads whose AUROC is farthest from .5, as JSON values.

    Args:
        tested: (layers, heads), with errors.
        layers: index in the model of each row.
        count: how many.
    """
    low, high = tested.auroc_interval
    farthest = np.argsort(-np.abs(tested.auroc - 0.5), axis=None, kind="stable")[:count]
    places = zip(*np.unravel_index(farthest, tested.auroc.shape), strict=True)
    return [
        {
            "layer": int(layers[row]),
            "head": int(head),
            "value": float(tested.auroc[row, head]),
            "low": float(low[row, head]),
            "high": float(high[row, head]),
        }
        for row, head in places
    ]


def head_scalars(values: NDArray[Any]) -> Floats:
    """One number per head and item: the mean of the top k.

    The k values of a head correlate; pooled as if independent they reject a true null in 41-50 % of cases at 5 %.

    Args:
        values: (items, layers, heads, width) of one feature.

    Returns:
        (items, layers, heads)
    """
    return np.asarray(values.mean(axis=-1, dtype=np.float64))


def head_significance(
    scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], errors: bool = False
) -> HeadSignificance:
    """Test every head.

    Where groups repeat, items are not independent: the p-value is then that of one value (the mean) per group and
    class. The AUROC, a description and not a test, is always that of the items.

    Args:
        scalars: (items, ...) one number per head.
        labels: (items,) 1 hallucinated, 0 not.
        groups: (items,) of any comparable kind.
        errors: compute `auroc_error`, too, which takes as long again.

    Returns:
        arrays of the shape (...,)

    Raises:
        NotEnoughData: one of the two classes is missing.

    References:
        Mann and Whitney 1947, with tie-corrected normal approximation; Benjamini and Hochberg 1995; DeLong et al. 1988,
        in Obuchowski's form of 1997 for groups.
    """
    heads = scalars.shape[1:]
    flat = scalars.reshape(len(scalars), -1)
    p_value, auroc = mann_whitney(flat, labels)
    if len(np.unique(groups)) < len(groups):
        p_value, _ = mann_whitney(*one_value_per_group(flat, labels, groups))
    q_value = stats.false_discovery_control(p_value)
    error = delong_error(flat, labels, groups).reshape(heads) if errors else None
    return HeadSignificance(p_value.reshape(heads), q_value.reshape(heads), auroc.reshape(heads), error)


def mann_whitney(values: Floats, labels: NDArray[Any]) -> tuple[Floats, Floats]:
    """Two-sided p-value and AUROC of every column.

    Args:
        values: (items, columns)
        labels: (items,)

    Returns:
        (columns,) and (columns,)

    Raises:
        NotEnoughData: one of the two classes is missing.
    """
    hallucinated, other = values[labels == 1], values[labels == 0]
    if not len(hallucinated) or not len(other):
        raise NotEnoughData(
            f"{len(hallucinated)} hallucinated and {len(other)} other items; the test needs both: "
            "label more generations or make the questions harder or easier"
        )
    result = stats.mannwhitneyu(hallucinated, other, axis=0, alternative="two-sided", method="asymptotic")
    # A head that is constant has no rank variance: nothing speaks against the null.
    p_value = np.nan_to_num(np.asarray(result.pvalue, dtype=np.float64), nan=1.0)
    return p_value, np.asarray(result.statistic / (len(hallucinated) * len(other)), dtype=np.float64)


def delong_error(values: Floats, labels: NDArray[Any], groups: NDArray[Any]) -> Floats:
    """Standard error of every column's AUROC.

    With a group for each item it is DeLong's. Otherwise whole groups count as one observation, also those that hold
    items of both classes; NaN where a class has one group only.

    Args:
        values: (items, columns)
        labels: (items,)
        groups: (items,)

    Returns:
        (columns,)

    References:
        DeLong, DeLong and Clarke-Pearson 1988, by ranks as in Sun and Xu 2014; Obuchowski 1997, equations 3 to 5.
    """
    names, codes = np.unique(groups, return_inverse=True)
    ranks = stats.rankdata(values, axis=0)
    influence, present = [], []
    for label in (1, 0):
        rows = labels == label
        # Of an item: the share of the other class on its side, less the AUROC, which is its mean.
        beaten = (ranks[rows] - stats.rankdata(values[rows], axis=0)) / (~rows).sum()
        sums = np.zeros((len(names), values.shape[1]))
        np.add.at(sums, codes[rows], beaten - beaten.mean(axis=0))
        count = len(np.unique(codes[rows]))
        influence.append(sums / rows.sum())
        present.append(count / (count - 1.0) if count > 1 else np.nan)
    hallucinated, other = influence
    # What is high for one class is low for the other: for label 0 the share below is one less the share above.
    variance = present[0] * (hallucinated**2).sum(axis=0) + present[1] * (other**2).sum(axis=0)
    both = len(names) / (len(names) - 1.0) if len(names) > 1 else np.nan
    variance = variance - 2.0 * both * (hallucinated * other).sum(axis=0)
    return np.asarray(np.sqrt(np.maximum(variance, 0.0)))


def one_value_per_group(values: Floats, labels: NDArray[Any], groups: NDArray[Any]) -> tuple[Floats, NDArray[np.int64]]:
    """Mean over the items of each group and class.

    Args:
        values: (items, columns)
        labels: (items,)
        groups: (items,)

    Returns:
        (groups with this class, columns) and their labels.
    """
    _, codes = np.unique(groups, return_inverse=True)
    cells, cell = np.unique(codes * 2 + (labels == 1), return_inverse=True)
    order = np.argsort(cell, kind="stable")
    counts = np.bincount(cell)
    starts = np.concatenate([[0], np.cumsum(counts)[:-1]])
    means = np.add.reduceat(values[order], starts, axis=0) / counts[:, None]
    return means, (cells % 2).astype(np.int64)

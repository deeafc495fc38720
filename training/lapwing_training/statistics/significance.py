"""Which heads tell hallucinations apart: rank tests and effect sizes, one scalar per head. Knows arrays only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lapwing_training.statistics.ranks import Ranked, column_blocks, group_codes, one_value_per_group

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
        errors: compute `auroc_error`, too.

    Returns:
        arrays of the shape (...,)

    Raises:
        NotEnoughData: one of the two classes is missing.

    References:
        Mann and Whitney 1947, with tie-corrected normal approximation; Benjamini and Hochberg 1995; DeLong et al. 1988,
        in Obuchowski's form of 1997 for groups.
    """
    flat, codes = scalars.reshape(len(scalars), -1), group_codes(groups)
    tested = [_test(block, labels, codes, errors) for block in column_blocks(flat)]
    p_value, auroc, error = (np.concatenate(parts) for parts in zip(*tested, strict=True))
    shape = scalars.shape[1:]
    return HeadSignificance(
        p_value=p_value.reshape(shape),
        q_value=stats.false_discovery_control(p_value).reshape(shape),
        auroc=auroc.reshape(shape),
        auroc_error=error.reshape(shape) if errors else None,
    )


def _test(values: Floats, labels: NDArray[Any], codes: NDArray[np.int64], errors: bool) -> tuple[Floats, ...]:
    """p-value, AUROC and its error (NaN if not asked for) of some heads, (heads,) each."""
    ranked = Ranked.of(values, labels)
    repeats = int(codes.max()) + 1 < len(codes)
    compared = Ranked.of(*one_value_per_group(values, labels, codes)) if repeats else ranked
    error = ranked.auroc_error(codes) if errors else np.full(values.shape[1], np.nan)
    return compared.p_value(), ranked.auroc, error

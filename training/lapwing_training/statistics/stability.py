"""How often a head is among the strongest over resamples of the groups. Knows arrays only."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.statistics.ranks import Floats, Ranked, column_blocks, group_codes

RESAMPLES = 200


def selection_frequency(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], count: int, seed: int) -> Floats:
    """Share of group-bootstrap resamples in which a head is among the `count` with the largest |AUROC - .5|.

    Args:
        scalars: (rows, features, heads); a head is as strong as its strongest feature.
        labels: (rows,) 1 hallucinated, 0 not.
        groups: (rows,) drawn as a whole.
        count: how many heads every resample selects.
        seed: another seed, other resamples.

    Returns:
        (heads,) in [0, 1]
    """
    codes = group_codes(groups)
    found = int(codes.max()) + 1
    times = np.random.default_rng(seed).multinomial(found, np.full(found, 1.0 / found), size=RESAMPLES)
    drawn = times.astype(np.float64)  # (resamples, groups)
    auroc = [resampled_auroc(scalars[:, feature], labels, codes, drawn) for feature in range(scalars.shape[1])]
    strength = np.max(np.abs(np.array(auroc) - 0.5), axis=0)  # (resamples, heads)
    order = np.argsort(-strength, axis=1, kind="stable")[:, :count]
    return np.bincount(order.ravel(), minlength=scalars.shape[2]) / RESAMPLES


def resampled_auroc(scalars: Floats, labels: NDArray[Any], codes: NDArray[np.int64], drawn: Floats) -> Floats:
    """The AUROC of every head in resamples of the groups, to first order.

    The AUROC is a U statistic: how often a group was drawn acts on it through the group's influence, and what is left
    out is of the order of one part in the number of groups. One product then serves all heads and resamples.

    Args:
        scalars: (rows, heads)
        labels: (rows,)
        codes: (rows,) the group of each, counted from 0 without gaps.
        drawn: (resamples, groups) how often each group was drawn.

    Returns:
        (resamples, heads)
    """
    found = []
    for block in column_blocks(scalars):
        ranked = Ranked.of(block, labels)
        won, lost = ranked.influence(codes)  # (heads, groups), of sum 0
        found.append(ranked.auroc + drawn @ (won + lost).T)
    return np.concatenate(found, axis=1)

"""Which heads, and how many: ways to put heads in order, and what cross-validation makes of it. Arrays only.

Significance is hygiene and effect size ranks; nothing here knows rows that are tested later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lapwing_training.errors import InvalidOption
from lapwing_training.l1_entry import entry_order
from lapwing_training.significance import Floats, head_significance
from lapwing_training.stability import selection_frequency

LEVEL = 0.05
"""Heads with a q-value below this may be selected."""

MOST_HEADS = 256
"""Beyond this a probe is not a selection any more, and the inner fits become slow."""

STABLE = 0.5
"""Heads that are selected in at least this share of the resamples count as stable."""


@dataclass(frozen=True)
class Ranking:
    """Heads that may be selected."""

    heads: NDArray[np.int64]
    """(candidates,) flat head indices, the first to be taken first."""

    significant: int
    """How many had q < .05."""

    frequency: Floats | None = None
    """(heads,) share of the resamples in which each head was selected; None where nothing was resampled."""

    choose: bool = True
    """Whether the number of heads is to be chosen; without it all candidates are taken."""


Selection = Callable[[Floats, NDArray[Any], NDArray[Any], int], Ranking]
"""From scalars (rows, features, layers, heads), labels (rows,), groups (rows,) and a seed."""


def rank_heads(
    scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], selection: str = "fdr", seed: int = 0
) -> Ranking:
    """The heads that may be selected, in the order of one of `SELECTIONS`.

    Args:
        scalars: (rows, features, layers, heads), training rows only.
        labels: (rows,) 1 hallucinated, 0 not.
        groups: (rows,)
        selection: name of the order.
        seed: for those that draw.

    Raises:
        InvalidOption: no such selection.
        NotEnoughData: one of the two classes is missing.
    """
    if selection not in SELECTIONS:
        raise InvalidOption(f"selection is `{selection}`; known selections: {', '.join(SELECTIONS)}")
    return SELECTIONS[selection](scalars, labels, groups, seed)


def by_significance(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], seed: int = 0) -> Ranking:
    """Heads with q < .05 by effect; all of them when none is, so that there is a probe to look at, and a warning."""
    order, significant = by_strength(scalars, labels, groups)
    chosen = order[significant[order]] if significant.any() else order
    return Ranking(chosen, int(significant.sum()))


def by_effect(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], seed: int = 0) -> Ranking:
    """All heads by effect, significant or not."""
    order, significant = by_strength(scalars, labels, groups)
    return Ranking(order, int(significant.sum()))


def by_l1_path(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], seed: int = 0) -> Ranking:
    """Heads in the order in which an L1 logistic regression over all of them takes them in.

    A head that says what another has said comes late, however strong. Where nothing enters, heads come by effect.
    """
    order, significant = by_strength(scalars, labels, groups)
    features, heads = scalars.shape[1], len(order)
    entered = entry_order(scalars.reshape(len(scalars), -1), labels, MOST_HEADS * features) % heads
    _, first = np.unique(entered, return_index=True)
    chosen = entered[np.sort(first)] if len(entered) else order
    return Ranking(chosen, int(significant.sum()))


def by_stability(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], seed: int = 0) -> Ranking:
    """Heads by how often they are selected over resamples of the groups, then by effect.

    A resample selects its strongest heads: as many as are significant in all rows, but at most a quarter of all, since
    with thousands of rows nearly every head is significant. It does not test, since a row that was drawn twice would
    count as two. Only stable heads are candidates; all of them where none is stable.
    """
    order, significant = by_strength(scalars, labels, groups)
    count = min(max(1, int(significant.sum())), max(1, len(order) // 4))
    flat = scalars.reshape(*scalars.shape[:2], -1)  # (rows, features, heads)
    frequency = selection_frequency(flat, labels, groups, count, seed)
    order = order[np.argsort(-frequency[order], kind="stable")]
    stable = frequency[order] >= STABLE
    return Ranking(order[stable] if stable.any() else order, int(significant.sum()), frequency)


def all_heads(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], seed: int = 0) -> Ranking:
    """Every head, in the order of the model: nothing is chosen."""
    order, significant = by_strength(scalars, labels, groups)
    return Ranking(np.arange(len(order)), int(significant.sum()), choose=False)


SELECTIONS: Mapping[str, Selection] = {
    "fdr": by_significance,
    "top-m": by_effect,
    "l1": by_l1_path,
    "stability": by_stability,
    "all": all_heads,
}


def by_strength(
    scalars: Floats, labels: NDArray[Any], groups: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Heads by |AUROC - .5|, strongest first, and which are significant.

    With several features a head counts when any of them is significant, with q-values over all heads of that feature
    (those of the heatmaps), and is as strong as its strongest feature.

    Returns:
        (heads,) flat indices, and (heads,) by flat index.
    """
    flat = scalars.reshape(*scalars.shape[:2], -1)  # (rows, features, heads)
    tested = [head_significance(flat[:, feature], labels, groups) for feature in range(flat.shape[1])]
    strength = np.max([np.abs(one.auroc - 0.5) for one in tested], axis=0)  # (heads,)
    significant = np.any([one.q_value < LEVEL for one in tested], axis=0)
    return np.argsort(-strength, kind="stable").astype(np.int64), significant


def head_counts(heads: int) -> tuple[int, ...]:
    """Numbers of heads that are tried: powers of two, and all of them when they are few."""
    most = min(heads, MOST_HEADS)
    powers = [2**exponent for exponent in range(most.bit_length()) if 2**exponent < most]
    return (*powers, most)


def one_standard_error(scores: Floats) -> int:
    """The first candidate that is no worse than the best by more than the best's standard error.

    Args:
        scores: (folds, candidates), higher is better, candidates from the simplest on.

    References:
        Breiman et al., Classification and Regression Trees, 1984, section 3.4.3.
    """
    mean = scores.mean(axis=0)
    best = int(mean.argmax())
    error = scores[:, best].std(ddof=1) / np.sqrt(len(scores)) if len(scores) > 1 else 0.0
    return int(np.flatnonzero(mean >= mean[best] - error)[0])

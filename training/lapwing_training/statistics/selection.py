"""Which heads, and how many: ways to put heads in order, and what cross-validation makes of it. Arrays only.

Significance is hygiene and effect size ranks; nothing here knows rows that are tested later.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from lapwing_training.errors import InvalidOption
from lapwing_training.statistics.l1_entry import entry_order
from lapwing_training.statistics.significance import Floats, head_significance
from lapwing_training.statistics.stability import selection_frequency

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

    others: NDArray[np.int64]
    """(heads - candidates,) those that are no candidates, by effect."""

    significant: int
    """How many had q < .05."""

    frequency: Floats | None = None
    """(heads,) share of the resamples in which each head was selected; None where nothing was resampled."""

    def at_least(self, count: int) -> Ranking:
        """With so many candidates, for whoever asks for a number of heads: where they are too few, others follow."""
        missing = max(0, count - len(self.heads))
        heads = np.concatenate([self.heads, self.others[:missing]])
        return replace(self, heads=heads, others=self.others[missing:])


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
    return _ranking(chosen, order, significant)


def by_effect(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], seed: int = 0) -> Ranking:
    """All heads by effect, significant or not."""
    order, significant = by_strength(scalars, labels, groups)
    return _ranking(order, order, significant)


def by_l1_path(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], seed: int = 0) -> Ranking:
    """Heads in the order in which an L1 logistic regression over all of them takes them in.

    A head that says what another has said comes late, however strong. Where nothing enters, heads come by effect.
    """
    order, significant = by_strength(scalars, labels, groups)
    features, heads = scalars.shape[1], len(order)
    entered = entry_order(scalars.reshape(len(scalars), -1), labels, MOST_HEADS * features) % heads
    _, first = np.unique(entered, return_index=True)
    chosen = entered[np.sort(first)] if len(entered) else order
    return _ranking(chosen, order, significant)


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
    often = order[np.argsort(-frequency[order], kind="stable")]
    stable = frequency[often] >= STABLE
    return _ranking(often[stable] if stable.any() else often, order, significant, frequency)


def all_heads(scalars: Floats, labels: NDArray[Any], groups: NDArray[Any], seed: int = 0) -> Ranking:
    """Every head, in the order of the model: nothing is chosen."""
    order, significant = by_strength(scalars, labels, groups)
    return _ranking(np.arange(len(order)), order, significant)


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

    A head of several features has one p-value, the smallest times their number (Bonferroni), and the q-values are over
    heads, so that of the heads that pass no more are false than promised; the heatmaps show each feature's own. It is
    as strong as its strongest feature.

    Returns:
        (heads,) flat indices, and (heads,) by flat index.
    """
    flat = scalars.reshape(*scalars.shape[:2], -1)  # (rows, features, heads)
    tested = [head_significance(flat[:, feature], labels, groups) for feature in range(flat.shape[1])]
    strength = np.max([np.abs(one.auroc - 0.5) for one in tested], axis=0)  # (heads,)
    p_value = np.minimum(len(tested) * np.min([one.p_value for one in tested], axis=0), 1.0)
    significant = stats.false_discovery_control(p_value) < LEVEL
    return np.argsort(-strength, kind="stable").astype(np.int64), significant


def head_counts(heads: int) -> tuple[int, ...]:
    """Numbers of heads that are tried: powers of two, and all of them when they are few."""
    most = min(heads, MOST_HEADS)
    powers = [2**exponent for exponent in range(most.bit_length()) if 2**exponent < most]
    return (*powers, most)


def _ranking(
    chosen: NDArray[np.int64], order: NDArray[np.int64], significant: NDArray[np.bool_], frequency: Floats | None = None
) -> Ranking:
    """From the candidates, and all heads by effect."""
    return Ranking(chosen, order[~np.isin(order, chosen)], int(significant.sum()), frequency)

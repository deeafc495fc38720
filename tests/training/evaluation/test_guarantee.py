"""A guaranteed threshold keeps its promise on groups to come, however far the probe is fitted to its own rows."""

from __future__ import annotations

import numpy as np
from training_fakes import LAPLACIAN, make_table

from lapwing_training.evaluation.calibrate import RATES, guaranteed_points
from lapwing_training.recipes.fit import LapwingRecipe
from lapwing_training.store.table import Table

RESAMPLINGS = 200
FITTED, SET, ALL = 100, 260, 600
"""Groups to fit on, groups to set thresholds on beside them, groups in all."""


def realised_rates(table: Table, seed: int) -> tuple[list[float], list[float]]:
    """Of one division of the groups: false-alarm rates as guaranteed, and of a quantile of the fit's own rows."""
    names = np.unique(table.groups)
    order = np.random.default_rng(seed).permutation(len(names))
    place = order[np.searchsorted(names, table.groups)]
    train = table.take(place < FITTED)
    kept = table.take((place >= FITTED) & (place < FITTED + SET))
    fresh = table.take(place >= FITTED + SET)
    heads = np.arange(16)
    probe = LapwingRecipe((LAPLACIAN,), 2).fit_chosen(train, heads, strength=1.0)
    points = guaranteed_points(probe.logit(kept), kept.labels, kept.groups, RATES, seed)
    negatives = probe.logit(fresh)[fresh.labels == 0]
    own = probe.logit(train)[train.labels == 0]
    guaranteed = [(negatives > point.logit).mean() for point in points if point.logit is not None]
    return guaranteed, [(negatives > np.quantile(own, 1.0 - rate)).mean() for rate in RATES]


def test_over_resamplings_the_realised_rate_is_the_promised_one_and_a_training_quantile_is_not() -> None:
    table = make_table(rows=ALL * 3, k=2, planted=(1, 5), strength=0.5, per_group=3, group_effect=0.6, seed=0)
    rates = [realised_rates(table, seed) for seed in range(RESAMPLINGS)]
    guaranteed, naive = (np.mean(part, axis=0) for part in zip(*rates, strict=True))
    for promised, kept in zip(RATES, guaranteed, strict=True):
        assert kept <= promised + 0.01
        assert kept > promised / 3  # not by flagging nothing
    # Control: the rows of the fit look safer than any others, and their rows are not as many as they seem.
    assert (naive > np.array(RATES) + 0.02).all()

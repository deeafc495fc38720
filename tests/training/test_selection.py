from __future__ import annotations

import numpy as np
import pytest
from training_fakes import LAPLACIAN, SCORE, make_table

from lapwing_training.fit import LapwingRecipe
from lapwing_training.selection import head_counts, one_standard_error, rank_heads
from lapwing_training.significance import head_significance


def test_planted_heads_are_found_among_64() -> None:
    table = make_table(rows=1500, layers=8, heads=8, planted=(3, 30, 61), strength=0.6)
    ranking = rank_heads(table.scalars((LAPLACIAN,), table.k), table.labels, table.groups)
    assert set(ranking.heads[:3].tolist()) == {3, 30, 61}
    # Of 61 null heads BH lets a few pass at most.
    assert 3 <= ranking.significant <= 6
    probe = LapwingRecipe((LAPLACIAN,), table.k).fit(table, seed=0)
    assert {3, 30, 61} <= set(np.flatnonzero(probe.selected).tolist())
    assert probe.selected.sum() <= 6


def test_a_head_that_either_feature_marks_is_a_candidate() -> None:
    table = make_table(rows=800, planted=(5,), strength=0.8)
    broken = {**table.features, LAPLACIAN: np.roll(table.features[LAPLACIAN], 1, axis=0)}
    broken[LAPLACIAN][:] = np.random.default_rng(0).permutation(broken[LAPLACIAN])
    scalars = np.stack([broken[name].mean(axis=-1) for name in (SCORE, LAPLACIAN)], axis=1)
    ranking = rank_heads(scalars, table.labels, table.groups)
    assert ranking.heads[0] == 5


def test_q_values_are_those_of_one_feature_each() -> None:
    rng = np.random.default_rng(19)
    labels, groups = (rng.random(400) < 0.5).astype(int), np.arange(400)
    scalars = rng.normal(size=(400, 2, 4, 4))
    scalars[:, 0, :3] += 0.8 * labels[:, None, None]  # strong in the first feature
    scalars[:, 1, 3:] += 0.22 * labels[:, None, None]  # doubtful in the second
    maps = [head_significance(scalars[:, feature], labels, groups).q_value for feature in (0, 1)]
    expected = np.flatnonzero(np.any([q_value.ravel() < 0.05 for q_value in maps], axis=0))
    ranking = rank_heads(scalars, labels, groups)
    assert sorted(ranking.heads.tolist()) == expected.tolist()
    assert ranking.significant == len(expected)
    # Control: pooled, the strong heads of one feature let doubtful ones of the other pass.
    pooled = (head_significance(scalars, labels, groups).q_value < 0.05).any(axis=0)
    assert pooled.sum() > len(expected)


def test_without_significance_all_heads_are_candidates_and_it_is_said() -> None:
    table = make_table(rows=200, seed=1)
    ranking = rank_heads(table.scalars((LAPLACIAN,), table.k), table.labels, table.groups)
    assert ranking.significant == 0
    assert sorted(ranking.heads.tolist()) == list(range(16))


def test_a_negative_effect_counts_as_much() -> None:
    table = make_table(rows=800, planted=(5,), strength=-0.8)
    assert rank_heads(table.scalars((LAPLACIAN,), table.k), table.labels, table.groups).heads[0] == 5


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([[0.60, 0.69, 0.70], [0.62, 0.71, 0.72]], 1),  # .70 lies within .71 - .01
        ([[0.60, 0.69, 0.80], [0.62, 0.69, 0.80]], 2),  # the best has no error: nothing else will do
        ([[0.70, 0.60, 0.60], [0.70, 0.60, 0.60]], 0),
        # Five folds: the best has a standard deviation of .05, hence an error of .022; .66 is too far, .69 is not.
        ([[m, 0.69, 0.70 + d] for m, d in zip([0.66] * 5, [-0.05, -0.05, 0.0, 0.05, 0.05], strict=True)], 1),
    ],
)
def test_one_standard_error_takes_the_simplest_that_is_as_good(scores: list[list[float]], expected: int) -> None:
    assert one_standard_error(np.array(scores)) == expected


def test_head_counts_are_powers_of_two_and_end_with_all() -> None:
    assert head_counts(1) == (1,)
    assert head_counts(48) == (1, 2, 4, 8, 16, 32, 48)
    assert head_counts(1024)[-1] == 256

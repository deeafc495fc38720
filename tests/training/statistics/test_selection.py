from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import false_discovery_control, mannwhitneyu
from sklearn.linear_model import LogisticRegression
from training_fakes import LAPLACIAN, SCORE, make_table

from lapwing_training.errors import InvalidOption
from lapwing_training.recipes.fit import LapwingRecipe
from lapwing_training.statistics.l1_entry import L1Path, entry_order
from lapwing_training.statistics.metrics import auroc
from lapwing_training.statistics.ranks import group_codes
from lapwing_training.statistics.selection import SELECTIONS, Ranking, head_counts, rank_heads
from lapwing_training.statistics.stability import resampled_auroc
from lapwing_training.store.table import Table

CHOOSING = [name for name in SELECTIONS if name != "all"]


def ranked(table: Table, selection: str = "fdr", seed: int = 0) -> Ranking:
    return rank_heads(table.scalars((LAPLACIAN,), table.k), table.labels, table.groups, selection, seed)


@pytest.mark.parametrize("selection", CHOOSING)
def test_planted_heads_come_first_among_64(selection: str) -> None:
    table = make_table(rows=1500, layers=8, heads=8, planted=(3, 30, 61), strength=0.6)
    ranking = ranked(table, selection)
    assert set(ranking.heads[:3].tolist()) == {3, 30, 61}
    # Of 61 null heads BH lets a few pass at most.
    assert 3 <= ranking.significant <= 6


def test_the_recipe_takes_planted_heads_and_few_others() -> None:
    table = make_table(rows=1500, layers=8, heads=8, planted=(3, 30, 61), strength=0.6)
    probe = LapwingRecipe((LAPLACIAN,), table.k).fit(table, seed=0)
    assert {3, 30, 61} <= set(np.flatnonzero(probe.selected).tolist())
    assert probe.selected.sum() <= 6


@pytest.mark.parametrize("selection", SELECTIONS)
def test_the_same_seed_gives_the_same_order_and_no_head_comes_twice(selection: str) -> None:
    table = make_table(rows=300, planted=(5,), per_group=3, group_effect=0.3)
    first, again = (ranked(table, selection, seed=3) for _ in range(2))
    np.testing.assert_array_equal(first.heads, again.heads)
    np.testing.assert_array_equal(first.frequency, again.frequency)
    assert len(set(first.heads.tolist())) == len(first.heads) > 0


def test_an_unknown_selection_is_refused() -> None:
    with pytest.raises(InvalidOption, match="`best`; known selections: fdr, top-m, l1, stability, all"):
        ranked(make_table(rows=50), "best")


def test_all_heads_are_taken_without_a_choice() -> None:
    ranking = ranked(make_table(rows=200, planted=(5,)), "all")
    assert ranking.heads.tolist() == list(range(16))
    assert not len(ranking.others)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_who_asks_for_more_heads_than_there_are_candidates_gets_others_by_effect(selection: str) -> None:
    table = make_table(rows=800, layers=8, heads=8, planted=(5, 9), strength=0.8)
    ranking, by_effect = ranked(table, selection), ranked(table, "top-m").heads.tolist()
    candidates = ranking.heads.tolist()
    expected = candidates + [head for head in by_effect if head not in candidates]
    assert len(expected) == 64
    for count in (0, 1, len(candidates), 40, 64):
        more = ranking.at_least(count)
        assert more.heads.tolist() == expected[: max(count, len(candidates))]
        assert more.others.tolist() == expected[len(more.heads) :]
    assert (len(candidates) < 40) == (selection in ("fdr", "stability"))  # control: there the others are needed


def test_a_head_that_either_feature_marks_is_a_candidate() -> None:
    table = make_table(rows=800, planted=(5,), strength=0.8)
    scalars = table.scalars((SCORE, LAPLACIAN), table.k)
    scalars[:, 1] = np.random.default_rng(0).permutation(scalars[:, 1])
    for selection in CHOOSING:
        assert rank_heads(scalars, table.labels, table.groups, selection).heads[0] == 5


def test_a_head_has_one_p_value_over_its_features() -> None:
    rng = np.random.default_rng(33)
    labels, groups = (rng.random(400) < 0.5).astype(int), np.arange(400)
    scalars = rng.normal(size=(400, 2, 4, 4))
    scalars[:, 0, :1] += 0.8 * labels[:, None, None]  # strong in the first feature
    scalars[:, 1, 1:] += 0.22 * labels[:, None, None]  # doubtful in the second
    by_feature = np.array(
        [
            [
                mannwhitneyu(values[labels == 1], values[labels == 0], method="asymptotic").pvalue
                for values in scalars[:, feature].reshape(400, 16).T
            ]
            for feature in (0, 1)
        ]
    )
    expected = np.flatnonzero(false_discovery_control(np.minimum(2 * by_feature.min(axis=0), 1.0)) < 0.05)
    ranking = rank_heads(scalars, labels, groups)
    assert sorted(ranking.heads.tolist()) == expected.tolist()
    assert ranking.significant == len(expected)
    # Control: as good as its better feature a head would pass too easily.
    assert (false_discovery_control(by_feature.min(axis=0)) < 0.05).sum() > len(expected)


def test_without_significance_all_heads_are_candidates_and_it_is_said() -> None:
    ranking = ranked(make_table(rows=200, seed=1))
    assert ranking.significant == 0
    assert sorted(ranking.heads.tolist()) == list(range(16))


def test_a_negative_effect_counts_as_much() -> None:
    table = make_table(rows=800, planted=(5,), strength=-0.8)
    assert [ranked(table, selection).heads[0] for selection in CHOOSING] == [5] * len(CHOOSING)


def test_without_the_gate_the_order_is_the_same_and_goes_on() -> None:
    table = make_table(rows=800, planted=(5, 9), strength=0.8)
    gated, free = ranked(table), ranked(table, "top-m")
    assert free.heads[: len(gated.heads)].tolist() == gated.heads.tolist()
    assert len(free.heads) == 16 > len(gated.heads)


# L1: the order of entry


def echoing_heads() -> tuple[np.ndarray, np.ndarray]:
    """Heads 1 and 2 say the same; head 3 says less, but something else; 4 to 9 say nothing."""
    rng = np.random.default_rng(0)
    labels = (rng.random(1500) < 0.4).astype(int)
    scalars = rng.normal(size=(1500, 1, 1, 10))
    scalars[..., 1] += 1.2 * labels[:, None, None]
    scalars[..., 2] = scalars[..., 1] + 0.4 * rng.normal(size=(1500, 1, 1))
    scalars[..., 3] += 0.6 * labels[:, None, None]
    return scalars, labels


def test_the_l1_path_takes_what_is_new_before_an_echo() -> None:
    scalars, labels = echoing_heads()
    first, second = rank_heads(scalars, labels, np.arange(1500), "l1").heads[:2].tolist()
    assert {first, second} in ({1, 3}, {2, 3})
    # Control: by effect the echo comes second.
    assert set(rank_heads(scalars, labels, np.arange(1500), "top-m").heads[:2].tolist()) == {1, 2}


def standardised(rows: int = 400, columns: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(rows, columns)) + 0.7 * rng.normal(size=(rows, 1))  # correlated
    labels = rng.random(rows) < 1 / (1 + np.exp(1.0 - 0.8 * values[:, 0] + 0.6 * values[:, 1] - 0.3 * values[:, 2]))
    return (values - values.mean(axis=0)) / values.std(axis=0), labels


def test_the_path_meets_scikit_learn_at_every_penalty() -> None:
    columns, labels = standardised()
    path = L1Path(columns, labels)
    largest = path.penalty
    for share in (0.9, 0.5, 0.2, 0.1):
        path.solve(share * largest)
        oracle = LogisticRegression(
            C=1 / (share * largest * len(labels)),
            l1_ratio=1.0,
            solver="saga",
            class_weight="balanced",
            tol=1e-9,
            max_iter=20_000,
        ).fit(columns, labels)
        # The path stops when no logit moves by .001.
        np.testing.assert_allclose(path.coefficients, oracle.coef_[0], atol=1e-3)


def test_far_apart_penalties_are_reached_by_small_steps_in_which_the_strong_rule_holds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    columns, labels = standardised(rows=120, columns=600)
    kept: list[int] = []
    approximate = L1Path._approximate

    def spy(self: L1Path, penalty: float, some: np.ndarray) -> float:
        kept.append(int(some.sum()))
        return approximate(self, penalty, some)

    monkeypatch.setattr(L1Path, "_approximate", spy)
    far, near = L1Path(columns, labels), L1Path(columns, labels)
    largest = far.penalty
    for share in 0.5 ** np.arange(0.1, 3.1, 0.1):
        near.solve(share * largest)
    kept.clear()
    for share in (0.5, 0.25, 0.125):
        far.solve(share * largest)
    assert max(kept) < 300  # with one step the rule keeps all 600
    # The path stops when no logit moves by .001.
    np.testing.assert_allclose(far.logits, near.logits, atol=5e-3)
    assert np.ptp(far.logits - columns @ far.coefficients) < 1e-9  # all but the intercept


def test_float32_columns_are_followed_in_float32_to_the_same() -> None:
    columns, labels = standardised(rows=120, columns=600)
    exact, single = L1Path(columns, labels), L1Path(columns.astype(np.float32), labels)
    largest = exact.penalty
    for share in (0.5, 0.1):
        exact.solve(share * largest)
        single.solve(share * largest)
    np.testing.assert_allclose(single.coefficients, exact.coefficients, atol=5e-3)


def test_the_first_penalty_is_the_one_that_keeps_everything_out() -> None:
    columns, labels = standardised()
    path = L1Path(columns, labels)
    largest = path.penalty
    oracle = LogisticRegression(l1_ratio=1.0, solver="saga", class_weight="balanced", max_iter=1000)
    assert not oracle.set_params(C=1 / (1.01 * largest * len(labels))).fit(columns, labels).coef_.any()
    path.solve(0.97 * largest)
    assert np.count_nonzero(path.coefficients) == 1


def test_the_path_ends_when_enough_have_entered_and_before_the_rows_are_used_up() -> None:
    columns, labels = standardised()
    few, many = entry_order(columns, labels, 3), entry_order(columns, labels, 30)
    assert 3 <= len(few) < len(many)
    assert many[: len(few)].tolist() == few.tolist()
    assert len(entry_order(columns[:40], labels[:40], 30)) < 20
    assert not len(entry_order(np.ones((40, 3)), labels[:40], 3))


def test_constant_heads_leave_the_order_of_effects() -> None:
    ranking = rank_heads(np.ones((40, 1, 2, 2)), np.arange(40) % 2, np.arange(40), "l1")
    assert ranking.heads.tolist() == [0, 1, 2, 3]


# Stability: frequencies over resamples


def test_frequencies_are_shares_of_a_fixed_number_of_heads() -> None:
    table = make_table(rows=400, layers=8, heads=8, planted=(3, 30, 61, 62, 63), strength=0.45)
    ranking = ranked(table, "stability")
    assert ranking.frequency is not None
    assert ranking.frequency.shape == (64,)
    assert ranking.frequency[[3, 30, 61, 62, 63]].min() > ranking.frequency[:3].max()
    assert ranking.frequency.sum() == pytest.approx(ranking.significant)  # so many in every resample
    assert (np.diff(ranking.frequency[ranking.heads]) <= 0).all()
    other = ranked(table, "stability", seed=1).frequency
    assert (other != ranking.frequency).any()


def resampling() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Scalars with ties, labels, groups, and how often each group was drawn."""
    table = make_table(rows=600, planted=(5,), strength=0.6, per_group=3, group_effect=0.5)
    scalars = np.round(table.scalars((LAPLACIAN,), table.k).reshape(600, 16), 2)
    drawn = np.random.default_rng(1).multinomial(200, np.full(200, 1 / 200), size=40)
    return scalars, table.labels, group_codes(table.groups), drawn


def test_resampled_aurocs_are_those_of_rows_that_are_drawn_again() -> None:
    scalars, labels, codes, drawn = resampling()
    found = resampled_auroc(scalars, labels, codes, drawn.astype(float))
    exact = np.stack([auroc(scalars[:, head], labels, drawn[:, codes]) for head in range(16)], axis=1)
    spread = exact.std(axis=0)  # (heads,): what the resamples are drawn for, .03
    assert (np.sqrt(((found - exact) ** 2).mean(axis=0)) < spread / 4).all()
    assert (np.abs(found.std(axis=0) / spread - 1) < 0.1).all()
    # Control: rows drawn one by one lie too close together, since the rows of a group resemble each other.
    rows = np.random.default_rng(1).multinomial(600, np.full(600, 1 / 600), size=40)
    assert (resampled_auroc(scalars, labels, np.arange(600), rows.astype(float)).std(axis=0) / spread).mean() < 0.85


# How many


def test_head_counts_are_powers_of_two_and_end_with_all() -> None:
    assert head_counts(1) == (1,)
    assert head_counts(48) == (1, 2, 4, 8, 16, 32, 48)
    assert head_counts(1024)[-1] == 256
    assert all(second <= 2 * first for first, second in pairwise(head_counts(1000)))
